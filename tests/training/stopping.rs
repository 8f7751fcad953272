//! Stopping on request: whoever is asked, all ranks agree on a step, save, and end with code 3; the
//! same command goes on, and nobody can tell from the numbers that there was a stop.

use crate::Bench;
use crate::left::assert_same;
use crate::support::{Command, Running};

/// 32 samples a step, so that there is time to stop more than once.
const SLOWER: &str = "--set batch.global_batch_tokens=1024";

/// Starts the run, lets it do a few steps, asks it to stop, and expects that it does.
#[track_caller]
fn stop(command: Command, ask: impl Fn(&Running)) {
    let mut job = command.start();
    job.wait_for("| loss", 3);
    ask(&job);
    let stopped = job.finish().expect_code(3).expect_stderr(&["with a checkpoint; the same command goes on"]);
    assert_eq!(stopped.survivors, Vec::<String>::new());
}

#[test]
fn a_run_stopped_through_its_launcher_by_each_signal_equals_an_undisturbed_one() {
    let bench = Bench::new("launcher", 40);
    let undisturbed = bench.trained("undisturbed", 2, SLOWER);
    for signal in ["TERM", "INT", "USR1"] {
        stop(bench.train("stopped", 2, SLOWER), |job| job.signal(signal));
    }
    assert_same(&undisturbed, &bench.trained("stopped", 2, SLOWER), 40);
}

#[test]
fn a_run_stopped_through_mpirun_or_any_rank_equals_an_undisturbed_one() {
    let bench = Bench::new("any", 40);
    let undisturbed = bench.trained("undisturbed", 2, SLOWER);
    stop(bench.train_under_mpirun("stopped", 2, SLOWER), |job| job.signal("USR1"));
    stop(bench.train("stopped", 2, SLOWER), |job| job.signal_member("mpirun", "USR1"));
    stop(bench.train("stopped", 2, SLOWER), |job| job.signal_rank(1, "USR1"));
    assert_same(&undisturbed, &bench.trained("stopped", 2, SLOWER), 40);
}

#[test]
fn one_rank_alone_stops_and_goes_on_too() {
    let bench = Bench::new("one", 40);
    bench.train_alone("undisturbed", SLOWER).run().expect_code(0);
    for signal in ["TERM", "INT"] {
        stop(bench.train_alone("stopped", SLOWER), |job| job.signal(signal));
    }
    bench.train_alone("stopped", SLOWER).run().expect_code(0);
    assert_same(&bench.left("undisturbed"), &bench.left("stopped"), 40);
}

#[test]
fn a_run_whose_last_checkpoint_cannot_be_written_says_so_and_does_not_end_well() {
    let bench = Bench::new("unsaved", 40);
    let mut job = bench.train("unsaved", 2, SLOWER).start();
    job.wait_for("step 5/", 1);
    // A file where the folder should be: what a full or broken disk is to the run.
    let checkpoints = bench.left("unsaved").folder().join("checkpoints");
    std::fs::rename(&checkpoints, checkpoints.with_extension("gone")).unwrap();
    std::fs::write(&checkpoints, "").unwrap();
    job.finish().expect_code(1).expect_stderr(&[
        "warning: no checkpoint of step 40, training goes on",
        "step 40: the last checkpoint could not be written into runs/unsaved/checkpoints",
    ]);
}
