//! What a run shows while it goes on: real ranks under the real mpirun, asked over real sockets.

#![allow(clippy::unwrap_used)] // unwrap is how a test fails

#[path = "../support/mod.rs"]
mod support;

mod browser;
mod export;
mod prometheus;
mod restarts;
mod rules;
mod web;

use std::time::{Duration, Instant};
use support::{Command, Running, Scratch, metrics, of_kind, phalanx, tiny_run};
use web::{get, sample};

/// A run that goes on until it is ended, with a folder for it.
struct Watched {
    scratch: Scratch,
    job: Running,
}

impl Watched {
    /// Two ranks of the tiny run, with these arguments of `phalanx train`, split at spaces.
    fn start(name: &str, arguments: &str) -> Watched {
        let scratch = Scratch::new(name);
        tiny_run(&scratch, 1_000_000);
        let job = Command::new(phalanx())
            .args(["train", "tiny.toml", "-n", "2", "--oversubscribe"])
            .args(arguments.split_whitespace())
            .current_dir(scratch.path())
            .deadline(Duration::from_secs(400))
            .start();
        Watched { scratch, job }
    }

    /// `targets.json` once it lists so many places, by the label `rank`, or `launcher`.
    fn targets(&self, count: usize) -> Vec<(String, String)> {
        let file = self.scratch.join("runs/tiny/targets.json");
        self.until("targets.json", || {
            let list: serde_json::Value = serde_json::from_slice(&std::fs::read(&file).ok()?).ok()?;
            let list = list.as_array().filter(|list| list.len() == count)?;
            let name = |label: &serde_json::Value| label.as_str().unwrap_or("launcher").to_string();
            let place = |one: &serde_json::Value| {
                (name(&one["labels"]["rank"]), one["targets"][0].as_str().unwrap().to_string())
            };
            Some(list.iter().map(place).collect())
        })
    }

    /// Asks again and again until there is an answer, for at most a minute.
    fn until<T>(&self, what: &str, ask: impl Fn() -> Option<T>) -> T {
        let began = Instant::now();
        loop {
            if let Some(answer) = ask() {
                return answer;
            }
            assert!(began.elapsed() < Duration::from_secs(60), "waited for {what}\n{}", self.job.output());
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

#[test]
fn every_rank_and_the_launcher_serve_what_metrics_jsonl_has() {
    let run = Watched::start("serve", "");
    let targets = run.targets(3);
    let at = |who: &str| targets.iter().find(|(name, _)| name == who).map(|(_, at)| at.as_str()).unwrap();
    let step =
        run.until("a step", || sample(&get(at("0"), "/metrics"), "phalanx_step").filter(|step| *step > 0.0));
    let (zero, one, launcher) =
        (get(at("0"), "/metrics"), get(at("1"), "/metrics"), get(at("launcher"), "/metrics"));
    // The loss shown is that of the step shown, to the last bit.
    let shown = sample(&zero, "phalanx_step").unwrap();
    assert!(shown >= step && sample(&one, "phalanx_loss").is_none());
    let event = run.until("the step in the file", || {
        let events = metrics(&run.scratch.join("runs/tiny"));
        of_kind(&events, "step").into_iter().find(|event| event["step"].as_f64() == Some(shown)).cloned()
    });
    assert_eq!(sample(&zero, "phalanx_loss"), event["loss"].as_f64());
    assert_eq!(sample(&zero, "phalanx_tokens_total"), Some(shown * 512.0));
    for (rank, text) in [("0", &zero), ("1", &one)] {
        let own = sample(text, &format!("phalanx_rank_step_seconds{{rank=\"{rank}\"}}"));
        assert!(own.is_some_and(|seconds| seconds > 0.0), "{text}");
    }
    assert_eq!(
        (sample(&launcher, "phalanx_ranks"), sample(&launcher, "phalanx_ranks_live")),
        (Some(2.0), Some(2.0))
    );
    web::promtool_checks(&run.scratch, &[&zero, &one, &launcher]);
    run.job.signal("TERM");
    run.job.finish().expect_code(3);
    assert_eq!(std::fs::read_to_string(run.scratch.join("runs/tiny/targets.json")).unwrap(), "[]\n");
}

#[test]
fn a_port_that_is_taken_costs_a_warning_and_off_serves_nothing() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let mut run =
        Watched::start("taken", &format!("--set metrics.listen=127.0.0.1:{port} --set schedule.max_steps=5"));
    run.job.wait_for("the launcher's metrics are at 127.0.0.1:", 1);
    run.job.finish().expect_code(0);
    let run = Watched::start("off", "--set metrics.listen=off --set schedule.max_steps=5");
    run.job.finish().expect_code(0);
    assert!(!run.scratch.join("runs/tiny/targets.json").exists());
}

#[test]
fn a_run_is_shown_as_text_and_exported_for_tensorboard_and_a_folder_without_one_is_refused() {
    let run = Watched::start("text", "--set schedule.max_steps=20");
    let scratch = run.scratch;
    run.job.finish().expect_code(0);
    let ask = |arguments: &[&str]| Command::new(phalanx()).args(arguments).current_dir(scratch.path()).run();
    ask(&["watch", "--text", "runs/tiny"]).expect_code(0).expect_stdout(&[
        "tiny  finished",
        "step 20 of 20",
        "loss ",
    ]);
    let told = ["20 steps and 2 validations", "hint: tensorboard --logdir board"];
    ask(&["export-metrics", "runs/tiny", "--tensorboard", "board"]).expect_code(0).expect_stdout(&told);
    ask(&["watch", "runs/none"]).expect_code(2).expect_stderr(&["runs/none/metrics.jsonl", "hint:"]);
    ask(&["watch", "http://127.0.0.1:1"]).expect_code(2).expect_stderr(&["http://127.0.0.1:1", "hint:"]);
    ask(&["export-metrics", "runs/none", "--tensorboard", "board"]).expect_code(2).expect_stderr(&["hint:"]);
}
