//! Going on by itself: ranks that die, stop, hang or are slow are named, the run is started again from its
//! last checkpoint, and nobody can tell from the numbers.

use crate::Bench;
use crate::left::assert_same;
use crate::support::{Command, Finished, Running, metrics, of_kind, phalanx_rank};
use std::time::{Duration, Instant};

/// 32 samples a step, a checkpoint every 10, and seconds instead of a minute until a rank hangs.
const SLOWER: &str = "--set batch.global_batch_tokens=1024 --set checkpoint.every_steps=10 \
                      --set guard.hang_timeout_s=4";

/// A test that is run, disturbed, and compared with one that is not.
#[track_caller]
fn same_as_undisturbed(name: &str, arguments: &str, disturb: impl FnOnce(&mut Running)) -> Finished {
    let bench = Bench::new(name, 40);
    let undisturbed = bench.trained("undisturbed", 2, SLOWER);
    let mut job = bench.train_on("disturbed", 2, &format!("{SLOWER} {arguments}")).start();
    disturb(&mut job);
    let done = job.finish().expect_code(0);
    assert_eq!(done.survivors, Vec::<String>::new());
    let disturbed = bench.left("disturbed");
    disturbed.assert_repeats_agree();
    assert_same(&undisturbed, &disturbed, 40);
    let events = metrics(disturbed.folder());
    assert_eq!(of_kind(&events, "restart").len(), 1, "{}", done.stderr);
    done
}

#[test]
fn after_a_killed_rank_the_run_goes_on_by_itself_and_ends_with_the_same_bits() {
    let done = same_as_undisturbed("killed", "", |job| {
        // Late enough for a heartbeat from within a step: on a fast machine ten of them take less than half a second.
        job.wait_for("step-00000020 is complete", 1);
        let killed = Instant::now();
        job.signal_rank(1, "KILL");
        job.wait_for("restart 1 of at most 5", 1);
        assert!(killed.elapsed() < Duration::from_secs(10), "{:?}", killed.elapsed());
    });
    done.expect_stderr(&["failed: rank 1 on ", "was ended by signal 9 (Killed) (step ", "going on from "]);
}

#[test]
fn a_stopped_rank_is_named_within_its_time_and_the_run_goes_on() {
    let done = same_as_undisturbed("stopped", "", |job| {
        job.wait_for("step-00000010 is complete", 1);
        let stopped = Instant::now();
        job.signal_rank(0, "STOP");
        job.wait_for("rank 0 on ", 1);
        assert!(stopped.elapsed() < Duration::from_secs(9), "{:?}", stopped.elapsed());
    });
    done.expect_stderr(&[" has not been heard of for ", "ending what is left of the job", "going on from "]);
}

#[test]
fn a_rank_that_hangs_is_named_with_what_it_was_doing_and_the_run_goes_on() {
    let done = same_as_undisturbed("hung", "--allow-faults --inject hang@step=15,rank=1", |_| {});
    let told =
        ["rank 1 on ", " hangs: no progress for ", "(step 15, data); ending what is left", "at step 10"];
    done.expect_stderr(&told);
}

#[test]
fn a_panic_is_told_with_its_rank_and_the_run_goes_on() {
    let done = same_as_undisturbed("panic", "--allow-faults --inject panic@step=15,rank=1", |_| {});
    done.expect_stderr(&["as asked for: panic@step=15,rank=1", "failed: rank 1 ended the job with code 1"]);
}

#[test]
fn a_step_that_takes_long_is_no_hang_and_a_slow_rank_is_named() {
    let bench = Bench::new("slow", 12);
    let long = "--set guard.hang_timeout_s=1 --allow-faults --inject slow@ms=3000,rank=1 \
                --set schedule.max_steps=3";
    bench.train("long", 2, long).run().expect_code(0);
    // Longer than the half second between heartbeats, so that each of the 12 steps is seen in one.
    let slow = "--allow-faults --inject slow@ms=600,rank=1";
    let done = bench.train("slow", 2, slow).run().expect_code(0);
    done.expect_stderr(&["warning: rank 1 on ", " is slow: its own part of step "]);
}

#[test]
fn under_plain_mpirun_a_step_that_hangs_ends_the_job() {
    let bench = Bench::new("plain", 40);
    let hang = "--set guard.hang_timeout_s=3 --allow-faults --inject hang@step=15,rank=1";
    let done = bench.train_under_mpirun("hung", 2, hang).run().expect_code(1);
    assert!(done.elapsed < Duration::from_secs(30), "{:?}", done.elapsed);
    done.expect_stderr(&[
        "no progress for ",
        "guard.hang_timeout_s",
        "this rank hangs, or waits for one that does",
    ]);
}

#[test]
fn ranks_end_by_themselves_when_their_launcher_is_lost() {
    let bench = Bench::new("lost", 100_000);
    let mut job = bench.train_on("lost", 2, SLOWER).start();
    job.wait_for("| loss", 3);
    job.signal("KILL");
    let killed = Instant::now();
    while !job.alone() {
        assert!(killed.elapsed() < Duration::from_secs(30), "ranks are left");
        std::thread::sleep(Duration::from_millis(100));
    }
    bench.train_on("lost", 2, &format!("{SLOWER} --set schedule.max_steps=1")).run().expect_code(0);
}

#[test]
fn a_rank_whose_launcher_does_not_answer_says_so_and_ends() {
    let bench = Bench::new("unanswered", 100_000);
    // A port that was just given back, so that nobody listens on it.
    let port = std::net::UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let rank = bench.train_alone("run", "").env("PHALANX_LAUNCHER", port.to_string());
    let done = rank.env("PHALANX_SECRET", "00".repeat(32)).run().expect_code(1);
    assert!(done.elapsed < Duration::from_secs(15), "{:?}", done.elapsed);
    done.expect_stderr(&["the launcher is lost: it has not answered for ", "hint: the command that started"]);
    assert!(bench.left("run").log(0).contains("the launcher is lost"));
}

#[test]
fn a_rank_that_does_not_run_what_the_others_do_is_named_before_the_first_step() {
    let bench = Bench::new("unlike", 10);
    let rank = phalanx_rank().display().to_string();
    let train = [rank.as_str(), "train", "tiny.toml"];
    let done = Command::new("mpirun")
        .args(["--oversubscribe", "--bind-to", "none", "-n", "1", "-x", "OMP_OF_THE_FIRST=3"])
        .args(train)
        .args([":", "-n", "1"])
        .args(train)
        .current_dir(bench.scratch.path())
        .run()
        .expect_code(2);
    assert!(!bench.scratch.join("runs/tiny/metrics.jsonl").exists());
    let told = [
        "rank 1 on ",
        " does not run what rank 0 does: OMP_OF_THE_FIRST is unset instead of \"3\"",
        "hint: ",
    ];
    done.expect_stderr(&told);
}
