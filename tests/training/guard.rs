//! Numbers that go wrong, brought about on purpose: who is named, what is left, and that the run goes on
//! as if it had known.

use crate::Bench;
use crate::left::{Left, assert_same};
use crate::support::{metrics, of_kind};

/// Checkpoints, and nothing that depends on where the run ends.
const OFTEN: &str = "--set checkpoint.every_steps=5 --set schedule.kind=constant";

/// As [`OFTEN`], with a guard against spikes.
const GUARDED: &str =
    "--set checkpoint.every_steps=5 --set schedule.kind=constant --set guard.spike_factor=3";

/// Samples of a step.
const STEP: u64 = 16;

fn faulty(arguments: &str, fault: &str) -> String {
    format!("{arguments} --allow-faults --inject {fault}")
}

#[test]
fn faults_are_refused_unless_they_are_allowed() {
    let bench = Bench::new("faults", 5);
    let told = ["--allow-faults"];
    bench.train("run", 2, "--inject nan@step=2,rank=1").run().expect_code(2).expect_stderr(&told);
    bench.train_alone("run", "--inject nan@step=2,rank=0").run().expect_code(2).expect_stderr(&told);
    let told = ["fault \"nan@step=2\": rank=… is missing", "hint: there are nan@step=5,rank=1"];
    bench.train("run", 2, &faulty("", "nan@step=2")).run().expect_code(2).expect_stderr(&told);
    assert!(!bench.scratch.join("runs").exists());
    let told = ["--inject nan@step=2,rank=2: there are 2 ranks, from 0"];
    bench.train("run", 2, &faulty("", "nan@step=2,rank=2")).run().expect_code(2).expect_stderr(&told);
}

#[test]
fn a_nan_on_one_rank_stops_all_before_the_update_and_is_traced_to_its_documents() {
    let bench = Bench::new("nan", 12);
    let undisturbed = bench.trained("undisturbed", 2, OFTEN);
    let stopped = bench.train("run", 2, &faulty(OFTEN, "nan@step=8,rank=1")).run().expect_code(2);
    assert_eq!(stopped.survivors, Vec::<String>::new());
    assert!(!stopped.stderr.contains("rank 0: loss"), "{}", stopped.stderr);
    // Rank 1 has the second half of the eight micro-batches of two.
    stopped.expect_stderr(&[
        "step 8: loss NaN, gradient norm NaN: not finite, no rank made the update",
        "rank 1: loss NaN of samples 120..122, micro-batch 5 of 8",
        "sample 120: corpus.txt record 1, tokens ",
        "sample 121: corpus.txt record 1, tokens ",
        "(document 0 in shard-00000.tokens)",
        "hint: the samples were 112..128;",
    ]);
    let left = bench.left("run");
    assert_eq!(left.of_steps("loss"), undisturbed.of_steps("loss")[..7]);

    // The last checkpoint is as it was: without the fault, the same command goes on from there.
    let told = ["going on from runs/run/checkpoints/step-00000005 at step 5"];
    bench.train("run", 2, OFTEN).run().expect_code(0).expect_stderr(&told);
    assert_same(&undisturbed, &left, 12);
}

#[test]
fn a_flipped_bit_in_one_replica_is_caught_and_its_rank_named() {
    let bench = Bench::new("flipped", 20);
    let check = "--set guard.replica_check_steps=4";
    let ended = bench.train("run", 4, &faulty(check, "flip@step=6,rank=2")).run().expect_code(1);
    assert_eq!(ended.survivors, Vec::<String>::new());
    let left = bench.left("run");
    assert_eq!(left.of_steps("loss").len(), 8);
    ended.expect_stderr(&[
        "step 8: the ranks hold different weights in segment ",
        "rank 2 on ",
        ": unlike the other 3, which agree",
        "hint: all compute the same, so memory or a processor is at fault",
    ]);
}

#[test]
fn a_flipped_bit_in_a_gathered_copy_is_caught_where_it_is_compared() {
    let bench = Bench::new("flipped-copy", 20);
    let check = "--set parallel.shard=optimizer --set guard.replica_check_steps=3";
    let told = ["step 6: the ranks hold different weights in segment h.0", "rank 0 on ", "rank 1 on "];
    let ended = bench.train("run", 2, &faulty(check, "flip@step=6,rank=1")).run().expect_code(1);
    ended.expect_stderr(&told);
    let nothing = "--set parallel.shard=parameters --set guard.replica_check_steps=3";
    let told = ["guard.replica_check_steps: nothing to compare, with parallel.shard = \"parameters\""];
    bench.train("sharded", 2, nothing).run().expect_code(0).expect_stderr(&told);
}

#[test]
fn a_flipped_bit_never_gets_into_a_checkpoint() {
    let bench = Bench::new("unsaved-flip", 12);
    let undisturbed = bench.trained("undisturbed", 2, OFTEN);
    let check = format!("{OFTEN} --set guard.replica_check_steps=1000");
    let told = ["step 10: the ranks hold different weights in segment h.0", "rank 0 on ", "rank 1 on "];
    let ended = bench.train("run", 2, &faulty(&check, "flip@step=10,rank=1")).run().expect_code(1);
    ended.expect_stderr(&told);
    let told = ["going on from runs/run/checkpoints/step-00000005 at step 5"];
    bench.train("run", 2, &check).run().expect_code(0).expect_stderr(&told);
    assert_same(&undisturbed, &bench.left("run"), 12);
}

/// The first samples of a run's steps when the batch of step `spike` is left out.
fn first_samples(steps: u64, spike: u64) -> Vec<f64> {
    (1..=steps).map(|step| ((step - u64::from(step < spike)) * STEP) as f64).collect()
}

#[track_caller]
fn rewinds(left: &Left) -> Vec<(u64, u64, u64, u64)> {
    let events = metrics(left.folder());
    let number = |event: &serde_json::Value, key: &str| event[key].as_u64().unwrap();
    let rewind = |event: &&serde_json::Value| {
        let [step, first, end, checkpoint] =
            ["step", "first_sample", "end_sample", "checkpoint_step"].map(|key| number(event, key));
        assert!(event["loss"].as_f64().unwrap() > 3.0 * event["reference"].as_f64().unwrap(), "{event}");
        let documents = event["documents"].as_array().unwrap();
        assert_eq!((documents.len(), number(event, "more_documents")), (STEP as usize, 0));
        assert_eq!(documents[0]["sample"], first);
        assert_eq!(documents[0]["file"], "corpus.txt");
        (step, first, end, checkpoint)
    };
    of_kind(&events, "rewind").iter().map(rewind).collect()
}

#[test]
fn a_spike_is_rewound_and_its_batch_left_out_then_and_after_every_restart() {
    let bench = Bench::new("spike", 20);
    let spike = faulty(GUARDED, "spike@step=8");
    let told = [
        "step 8: loss ",
        "its samples 112..128 are left out from now on, and training goes on from checkpoints/step-00000005",
        "sample 112: corpus.txt record 1, tokens ",
        "and 12 more passages",
    ];
    bench.train("whole", 2, &spike).run().expect_code(0).expect_stderr(&told);
    let whole = bench.left("whole");
    whole.assert_repeats_agree();
    assert_eq!(rewinds(&whole), [(8, 112, 128, 5)]);
    assert_eq!(whole.of_steps("first_sample"), first_samples(20, 8));
    assert_eq!(whole.of_steps("tokens")[19], 20.0 * 512.0);

    // Ended between the spike and the end; the rest on other ranks, where nothing spikes any more. Who
    // holds which weights does not matter to either.
    let sharded = format!("{spike} --set schedule.max_steps=12 --set parallel.shard=gradients");
    bench.train("resumed", 2, &sharded).run().expect_code(0);
    let sharded = format!("{GUARDED} --set parallel.shard=parameters");
    bench.train("resumed", 4, &sharded).run().expect_code(0).expect_stderr(&["at step 12"]);
    let resumed = bench.left("resumed");
    assert_eq!(rewinds(&resumed).len(), 1);
    assert_same(&whole, &resumed, 20);
}

#[test]
fn a_batch_left_out_while_batches_grow_moves_all_later_ones_by_its_own_size() {
    let bench = Bench::new("growing", 16);
    // 8 samples a step, and 16 after 8 steps.
    let ramp = "--set batch.ramp_start_tokens=256 --set batch.ramp_tokens=2048";
    let arguments = format!("{GUARDED} {ramp}");
    let plain = bench.trained("plain", 1, &arguments).of_steps("first_sample");
    assert_eq!((plain[7], plain[8], plain[9]), (56.0, 64.0, 80.0));
    let spiked = bench.trained("spiked", 2, &faulty(&arguments, "spike@step=7"));
    let first_samples: Vec<f64> = (1u8..).zip(plain).map(|(s, n)| if s < 7 { n } else { n + 8.0 }).collect();
    assert_eq!(spiked.of_steps("first_sample"), first_samples);
    spiked.assert_repeats_agree();
}

#[test]
fn a_run_killed_right_after_a_rewind_remembers_what_to_leave_out() {
    let bench = Bench::new("forgetful", 40);
    // No checkpoint but the one that the guard makes of the start.
    let guarded =
        "--set checkpoint.every_steps=0 --set guard.spike_factor=3 --set batch.global_batch_tokens=1024";
    let spike = faulty(guarded, "spike@step=8");
    let whole = bench.trained("whole", 2, &spike);
    assert_eq!(of_kind(&metrics(whole.folder()), "rewind")[0]["checkpoint"], "checkpoints/step-00000000");

    let mut job = bench.train("killed", 2, &spike).start();
    job.wait_for("are left out from now on", 1);
    job.signal_rank(1, "KILL");
    job.finish().expect_code(1);
    let killed = bench.left("killed");
    assert!(!killed.checkpoint(40).exists(), "the kill came too late");
    bench.train("killed", 1, guarded).run().expect_code(0).expect_stderr(&["at step 0"]);
    assert_eq!(of_kind(&metrics(killed.folder()), "rewind").len(), 1);
    assert_same(&whole, &killed, 40);
}

#[test]
fn a_guard_that_meets_no_spike_changes_nothing() {
    let bench = Bench::new("quiet", 12);
    let plain = bench.trained("plain", 2, OFTEN);
    let checked = format!("{GUARDED} --set guard.replica_check_steps=3");
    assert_same(&plain, &bench.trained("guarded", 2, &checked), 12);
}

#[test]
fn a_run_that_spikes_whatever_is_left_out_ends_and_is_not_retried() {
    let bench = Bench::new("spikes", 20);
    let spikes = ["7", "8", "9", "10"].map(|step| format!("--inject spike@step={step}")).join(" ");
    let arguments = format!("{GUARDED} --allow-faults {spikes}");
    let told = ["step 7: loss ", "after 3 batches were left out since the checkpoint of step 5", "optim.lr"];
    bench.train("run", 2, &arguments).run().expect_code(2).expect_stderr(&told);
    let skipped: Vec<u64> =
        rewinds(&bench.left("run")).into_iter().map(|(_, first, ..)| first / STEP + 1).collect();
    assert_eq!(skipped, [7, 8, 9]);
}
