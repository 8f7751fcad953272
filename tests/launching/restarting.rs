//! What is started again and what is not, and that a run has one launcher.

use super::Bench;
use std::time::Duration;

fn starts(bench: &Bench) -> usize {
    let text = std::fs::read_to_string(bench.scratch.join("starts")).unwrap_or_default();
    text.lines().count()
}

#[test]
fn what_fails_is_started_again_as_often_as_was_said_and_then_given_up() {
    let bench = Bench::new("again", "echo started >> starts; exit 9");
    let done = bench.train("-n 1 --max-restarts 2").run().expect_code(1).expect_stderr(&[
        "failed: rank 0 exited with code 9",
        "restart 1 of at most 2 without a new checkpoint, from the beginning, in 1 s",
        "restart 2 of at most 2 without a new checkpoint, from the beginning, in 2 s",
        "given up: 2 restarts brought no new checkpoint",
    ]);
    assert_eq!((starts(&bench), done.survivors.len()), (3, 0));
    let metrics = std::fs::read_to_string(bench.scratch.join("runs/tiny/metrics.jsonl")).unwrap();
    assert_eq!(metrics.matches("\"kind\":\"restart\"").count(), 2, "{metrics}");
    assert!(metrics.contains("\"fault\":\"dead\",\"rank\":0"), "{metrics}");
}

#[test]
fn a_new_checkpoint_gives_new_restarts() {
    // Each of the first three starts gets a checkpoint further.
    let rank = "echo started >> starts; n=$(wc -l < starts); [ $n -ge 4 ] && exit 0; \
                mkdir -p runs/tiny/checkpoints/step-0000000$n; exit 1";
    let bench = Bench::new("further", rank);
    let told = ["restart 1 of at most 1 without a new checkpoint, from the checkpoint of step 3, in 1 s"];
    bench.train("-n 1 --max-restarts 1").run().expect_code(0).expect_stderr(&told);
    assert_eq!(starts(&bench), 4);
}

#[test]
fn what_a_restart_would_not_change_is_not_started_again() {
    for code in [0, 2, 3] {
        let bench = Bench::new("once", &format!("echo started >> starts; exit {code}"));
        bench.train("-n 1 --max-restarts 5").run().expect_code(code);
        assert_eq!(starts(&bench), 1, "code {code}");
    }
}

#[test]
fn a_signal_between_two_starts_ends_the_run() {
    let bench = Bench::new("between", "echo started >> starts; exit 1");
    let mut job = bench.train("-n 1 --max-restarts 9").start();
    job.wait_for("in 4 s", 1);
    job.signal("TERM");
    job.finish().expect_code(1).expect_stderr(&["asked to stop between two starts"]);
    assert_eq!(starts(&bench), 3);
}

#[test]
fn a_run_has_one_launcher_at_a_time() {
    let bench = Bench::new("one", "echo ready; sleep 300 & while :; do wait; done");
    let mut first = bench.train("-n 1").start();
    first.wait_for("ready", 1);
    let told = ["another launcher looks after this run (pid ", "hint: stop that one first"];
    bench.train("-n 1").run().expect_code(2).expect_stderr(&told);
    bench.train("-n 1 --fresh").run().expect_code(2).expect_stderr(&told);
    bench.train("-n 1 --set run.name=other --dry-run").run().expect_code(0);
}

#[test]
fn after_a_killed_launcher_the_same_command_ends_what_it_left_and_goes_on() {
    let rank = "echo started >> starts; [ $(wc -l < starts) -ge 3 ] && exit 0; echo ready; sleep 300; true";
    let bench = Bench::new("killed", rank);
    let mut first = bench.train("-n 2 --oversubscribe").start();
    first.wait_for("ready", 2);
    first.signal("KILL");
    let second = bench.train("-n 2 --oversubscribe").run().expect_code(0);
    assert!(second.elapsed < Duration::from_secs(20), "{:?}", second.elapsed);
    let left = first.finish();
    assert_eq!(left.survivors, Vec::<String>::new());
}

#[test]
fn ranks_find_the_launcher_and_a_secret_in_their_environment_and_on_no_command_line() {
    // The pattern comes from a file, so that the search does not find itself.
    let rank = "echo \"to $PHALANX_LAUNCHER\"; echo \"${#PHALANX_SECRET} digits\"; \
                printf %s \"$PHALANX_SECRET\" > secret.$R; \
                grep -lzf secret.$R /proc/[0-9]*/cmdline 2>/dev/null | sed 's/^/told by /'; true";
    let bench = Bench::new("secret", rank);
    let done = bench.train("-n 2 --oversubscribe").run().expect_code(0);
    assert_eq!(done.stdout.matches("to 127.0.0.1:").count(), 2, "{}", done.stdout);
    assert_eq!(done.stdout.matches("64 digits").count(), 2, "{}", done.stdout);
    assert!(!done.stdout.contains("told by"), "{}", done.stdout);
    assert!(!done.stderr.contains("PHALANX_SECRET"), "{}", done.stderr);
}
