//! What `phalanx export-metrics` writes, by TensorBoard's own reader. Where `make parity` has not installed it, a
//! test says so and passes.

mod whole_table {
    use crate::Watched;
    use crate::support::{Command, metrics, of_kind, phalanx};
    use std::io::Write;
    use std::path::Path;

    #[test]
    fn tensorboard_reads_the_numbers_of_metrics_jsonl() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let python = root.join(".local/reference/bin/python");
        if !python.exists() {
            let _ = writeln!(std::io::stderr(), "skipped: no TensorBoard here (make parity brings it)");
            return;
        }
        let run = Watched::start("events", "--set schedule.max_steps=30 --set eval.every_steps=10");
        let scratch = run.scratch;
        run.job.finish().expect_code(0);
        let export = ["export-metrics", "runs/tiny", "--tensorboard", "board"];
        Command::new(phalanx()).args(export).current_dir(scratch.path()).run().expect_code(0);
        let read = root.join("tests/reference/read_events.py");
        let read = Command::new(python)
            .args([read.as_os_str()])
            .args(["board"])
            .current_dir(scratch.path())
            .run()
            .expect_code(0);
        let read: serde_json::Value = serde_json::from_str(&read.stdout).unwrap();
        let events = metrics(&scratch.join("runs/tiny"));
        for (kind, key, tag) in [
            ("step", "loss", "train/loss"),
            ("step", "tokens_per_second", "train/tokens_per_second"),
            ("eval", "val_loss", "eval/val_loss"),
        ] {
            // TensorBoard has numbers in 32 bits.
            let ours: Vec<(u64, f32)> = of_kind(&events, kind)
                .iter()
                .map(|event| (event["step"].as_u64().unwrap(), event[key].as_f64().unwrap() as f32))
                .collect();
            let theirs: Vec<(u64, f32)> = read[tag]
                .as_array()
                .unwrap()
                .iter()
                .map(|event| (event[0].as_u64().unwrap(), event[2].as_f64().unwrap() as f32))
                .collect();
            assert_eq!(ours, theirs, "{tag}");
        }
        let times: Vec<f64> =
            read["train/loss"].as_array().unwrap().iter().map(|event| event[1].as_f64().unwrap()).collect();
        assert!(times[0] > 1.7e9 && times.is_sorted(), "{times:?}");
    }
}
