//! What is started, what passes through, and what is left when it ends.

use super::Bench;
use crate::support::Command;
use std::time::Duration;

/// Waits in a way that lets the shell act on signals.
const WAIT: &str = "sleep 300 & while :; do wait; done";

#[test]
fn a_dry_run_prints_exactly_the_command_and_starts_nothing() {
    let bench = Bench::new("dry", "touch started");
    let done = bench
        .train(
            "-n 2 --hosts localhost:1,127.0.0.1:1 --set optim.lr=3e-4 --mca btl=self,vader --fresh --dry-run",
        )
        .args(["--set", "run.name=a b"])
        .run()
        .expect_code(0);
    let root = if bench.is_root() { " --allow-run-as-root" } else { "" };
    let rank = bench.scratch.join("bin/phalanx-rank");
    let expected = format!(
        "mpirun -n 2 --host localhost:1,127.0.0.1:1 --bind-to none{root} --tag-output -mca btl self,vader \
         {} train tiny.toml --set optim.lr=3e-4 --set 'run.name=a b'\n",
        rank.display()
    );
    assert_eq!((done.stdout, done.stderr.as_str()), (expected, ""));
    assert!(!bench.scratch.join("started").exists());
}

#[test]
fn ranks_by_default_are_those_that_fit_and_share_the_batch() {
    let bench = Bench::new("ranks", "");
    for (hosts, ranks) in [("a:1", 1), ("a:2,b:1", 2), ("a:4,b:4", 8), ("a:32", 8)] {
        let told = bench.train(&format!("--hosts {hosts} --dry-run")).run().expect_code(0).stdout;
        assert!(told.starts_with(&format!("mpirun -n {ranks} ")), "{hosts}: {told}");
    }
}

#[test]
fn the_command_is_shown_and_every_rank_gets_its_arguments() {
    let bench = Bench::new("shown", "echo \"got $*\"");
    let done = bench.train("-n 2 --oversubscribe --set optim.lr=3e-4").run().expect_code(0);
    assert!(done.stderr.starts_with("mpirun -n 2 --bind-to none --oversubscribe"), "{}", done.stderr);
    assert!(done.stderr.ends_with("\nfinished\n"), "{}", done.stderr);
    for rank in 0..2 {
        let line = format!("[rank {rank}] got train tiny.toml --set optim.lr=3e-4\n");
        assert!(done.stdout.contains(&line), "{}", done.stdout);
    }
}

#[test]
fn each_line_names_its_rank_once_and_keeps_its_stream() {
    let bench = Bench::new("prefix", "echo \"[rank $R] own\"; echo \"[vm] plain\" >&2; printf 'no end'");
    let done = bench.train("-n 1").run().expect_code(0);
    assert_eq!(done.stdout, "[rank 0] own\n[rank 0] no end\n");
    assert!(done.stderr.contains("\n[rank 0] [vm] plain\n"), "{}", done.stderr);
}

#[test]
fn regular_exit_codes_pass_through_without_noise_of_mpirun() {
    for (code, told) in [(2, "something must be changed"), (3, "stopped with a checkpoint")] {
        let bench = Bench::new("code", &format!("exit {code}"));
        let done = bench.train("-n 2 --oversubscribe").run().expect_code(code).expect_stderr(&[told]);
        assert_eq!(done.stderr.lines().count(), 2, "more than command and outcome:\n{}", done.stderr);
    }
}

#[test]
fn a_rank_that_fails_is_named_and_the_rest_ends() {
    let bench = Bench::new("killed", &format!("[ $R = 1 ] && kill -9 $$; {WAIT}"));
    let done = bench.train("-n 2 --oversubscribe").run().expect_code(1);
    assert!(done.stderr.contains("goes on from the last checkpoint"), "{}", done.stderr);
    assert!(done.stderr.contains("signal 9"), "{}", done.stderr);
    assert_eq!(done.survivors, Vec::<String>::new());
}

#[test]
fn what_mpirun_says_about_itself_is_shown() {
    let bench = Bench::new("itself", "");
    let done = bench.train("-n 1 --mca btl=no_such_transport_at_all --mca plm=none_such").run();
    assert_eq!(done.code, Some(1), "{}", done.stderr);
    assert!(done.stderr.contains("none_such"), "{}", done.stderr);
}

#[test]
fn nothing_that_a_rank_left_behind_outlives_the_launcher() {
    let bench = Bench::new("orphans", "setsid sleep 300 >/dev/null 2>&1 & sleep 0.2");
    let done = bench.train("-n 2 --oversubscribe").run().expect_code(0);
    assert_eq!(done.survivors, Vec::<String>::new());
    assert!(done.elapsed < Duration::from_secs(10), "{:?}", done.elapsed);
}

#[test]
fn each_stop_signal_asks_every_rank_for_a_checkpoint() {
    let bench = Bench::new("stop", &format!("trap 'echo saved; exit 3' USR1; echo ready; {WAIT}"));
    for signal in ["TERM", "INT", "USR1"] {
        let mut job = bench.train("-n 2 --oversubscribe").start();
        job.wait_for("ready", 2);
        job.signal(signal);
        let done = job.finish().expect_code(3).expect_stderr(&[
            "stopping: asked the ranks to write a checkpoint; a second signal ends at once",
            "stopped with a checkpoint; the same command goes on",
        ]);
        assert_eq!(done.stdout.matches("saved").count(), 2, "SIG{signal}: {}", done.stdout);
        assert_eq!(done.survivors, Vec::<String>::new());
    }
}

#[test]
fn a_second_signal_ends_at_once() {
    let bench = Bench::new("second", &format!("trap 'echo busy' USR1; trap '' TERM; echo ready; {WAIT}"));
    let mut job = bench.train("-n 2 --oversubscribe").start();
    job.wait_for("ready", 2);
    job.signal("TERM");
    job.wait_for("busy", 2);
    job.signal("USR1"); // asks again, which changes nothing
    job.signal("TERM");
    let done = job.finish().expect_code(1).expect_stderr(&["ended at once"]);
    assert_eq!(done.survivors, Vec::<String>::new());
    assert!(done.elapsed < Duration::from_secs(12), "{:?}", done.elapsed);
}

#[test]
fn fresh_moves_an_earlier_run_aside() {
    let bench = Bench::new("fresh", "mkdir -p runs/tiny; echo new > runs/tiny/mark; echo \"got $*\"");
    bench.scratch.write("runs/tiny/mark", "old");
    let done = bench.train("-n 1 --fresh").run().expect_code(0);
    assert!(done.stderr.contains("moved runs/tiny to runs/tiny.old-1"), "{}", done.stderr);
    assert_eq!(done.stdout, "[rank 0] got train tiny.toml\n");
    let read = |path: &str| std::fs::read_to_string(bench.scratch.join(path)).unwrap();
    assert_eq!((read("runs/tiny.old-1/mark").as_str(), read("runs/tiny/mark").as_str()), ("old", "new\n"));
}

#[test]
fn steps_are_plain_lines_in_a_file_and_one_live_line_on_a_terminal() {
    let rank =
        "for i in 1 2 3; do echo \"[rank 0] step $i/3 | loss 1\" >&2; done; echo \"[rank 0] saved\" >&2";
    let bench = Bench::new("live", rank);
    let done = bench.train("-n 1").run().expect_code(0);
    assert!(
        done.stderr.contains("\n[rank 0] step 2/3 | loss 1\n[rank 0] step 3/3 | loss 1\n"),
        "{}",
        done.stderr
    );

    let command = format!("{} train tiny.toml -n 1", bench.scratch.join("bin/phalanx").display());
    let done = Command::new("script")
        .args(["--quiet", "--return", "--command", &command, "/dev/null"])
        .current_dir(bench.scratch.path())
        .run()
        .expect_code(0);
    let live = "\r[rank 0] step 2/3 | loss 1\x1b[K\r[rank 0] step 3/3 | loss 1\x1b[K\r\n[rank 0] saved\r\n";
    assert!(done.stdout.contains(live), "{:?}", done.stdout);
}
