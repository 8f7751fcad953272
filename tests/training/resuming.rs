//! Going on where a run stopped: after a kill, on other ranks, at the end, and not at all.

use crate::Bench;
use crate::left::assert_same;
use crate::support::{Command, of_kind, phalanx};
use std::ops::Range;

/// 32 samples a step, so that there is time to kill between two checkpoints.
const SLOWER: &str = "--set batch.global_batch_tokens=1024 --set checkpoint.every_steps=20";
const SAMPLES_PER_STEP: u64 = 32;

/// Trains on two ranks and kills one of them between the checkpoints of steps 20 and 40.
#[track_caller]
fn train_and_kill(bench: &Bench, run: &str, rank: usize) {
    let mut job = bench.train(run, 2, SLOWER).start();
    job.wait_for("checkpoint checkpoints/step-00000020 is complete", 1);
    job.signal_rank(rank, "KILL");
    let killed = job.finish().expect_code(1).expect_stderr(&[
        &format!("rank {rank} on "),
        "signal 9",
        "the same command goes on from the last checkpoint",
    ]);
    assert_eq!(killed.survivors, Vec::<String>::new());
    assert!(!bench.left(run).checkpoint(40).exists(), "the kill came too late");
}

#[test]
fn forty_steps_equal_twenty_and_a_kill_and_twenty_more() {
    let bench = Bench::new("kill", 40);
    let undisturbed = bench.trained("undisturbed", 2, SLOWER);
    train_and_kill(&bench, "killed", 1);
    bench
        .train("killed", 2, SLOWER)
        .run()
        .expect_code(0)
        .expect_stderr(&["going on from runs/killed/checkpoints/step-00000020 at step 20"]);
    let killed = bench.left("killed");
    killed.assert_repeats_agree();
    assert_same(&undisturbed, &killed, 40);
}

#[test]
fn other_numbers_of_ranks_go_on_with_the_same_samples_and_end_with_the_same_bits() {
    let bench = Bench::new("reshaped", 40);
    train_and_kill(&bench, "killed", 0);
    let mut runs = Vec::new();
    for ranks in [2, 1, 4] {
        let run = format!("on-{ranks}");
        bench.copy_run("killed", &run);
        let left = bench.trained(&run, ranks, SLOWER);
        let steps = left.samples_of_the_last_start(ranks);
        assert_eq!(
            steps.iter().map(|(step, _)| *step).collect::<Vec<u64>>(),
            (21..=40).collect::<Vec<u64>>()
        );
        for (step, samples) in steps {
            let end = step * SAMPLES_PER_STEP;
            assert_eq!(joined(&samples), Some(end - SAMPLES_PER_STEP..end), "step {step} on {ranks} ranks");
        }
        runs.push(left);
    }
    for left in &runs[1..] {
        assert_same(&runs[0], left, 40);
    }
}

/// Ranges as one, if each begins where the one before ends.
fn joined(ranges: &[Range<u64>]) -> Option<Range<u64>> {
    let gapless = ranges.windows(2).all(|pair| pair[0].end == pair[1].start);
    gapless.then(|| ranges.first().map(|first| first.start..ranges[ranges.len() - 1].end))?
}

#[test]
fn a_resume_is_proved_on_the_users_own_configuration_and_its_checkpoints_looked_at() {
    let bench = Bench::new("proof", 10);
    let phalanx = |arguments: &str| {
        let command = Command::new(phalanx()).args(arguments.split_whitespace());
        command.current_dir(bench.scratch.path()).run()
    };
    let arguments = "--steps 3 --more 60 -n 2 --then-ranks 1 --oversubscribe --set run.dir=runs/proof";
    let proved = phalanx(&format!("checkpoint prove-resume tiny.toml {arguments}")).expect_code(0);
    proved.expect_stderr(&["going on from step 3", "proved: 3 steps, a kill and 60 steps more"]);
    assert!(
        !bench.scratch.join("runs").exists() || bench.scratch.join("runs").read_dir().unwrap().count() == 0
    );

    bench.trained("run", 2, "--set checkpoint.every_steps=5");
    phalanx("checkpoint ls runs/run").expect_code(0).expect_stdout(&["complete"]);
    phalanx("checkpoint verify runs/run --step 5").expect_code(0).expect_stdout(&["step 5: whole"]);
    let compare = "checkpoint compare runs/run/checkpoints/step-00000005 runs/run";
    phalanx(compare).expect_code(1).expect_stdout(&["differ:", "param of h.0, first at element"]);
    phalanx("checkpoint prune runs/run --keep-last 1").expect_code(0).expect_stdout(&["steps that stay: 10"]);
    let told = ["runs/run has no checkpoint of step 5; there are: 10", "hint:"];
    phalanx("checkpoint show runs/run --step 5").expect_code(2).expect_stderr(&told);
}

#[test]
fn a_finished_run_says_so_and_goes_on_only_to_a_later_end() {
    let bench = Bench::new("finished", 10);
    bench.trained("run", 2, "");
    let told = ["this run is finished: 10 of 10 steps", "schedule.max_steps", "--fresh"];
    bench.train("run", 2, "").run().expect_code(0).expect_stderr(&told);
    assert_eq!(bench.left("run").of_steps("loss").len(), 10);

    let longer = "--set schedule.max_steps=15";
    bench.train("run", 2, longer).run().expect_code(0).expect_stderr(&["at step 10"]);
    assert_eq!(bench.left("run").of_steps("loss").len(), 15);
}

#[test]
fn fresh_moves_the_old_run_aside_and_starts_at_the_first_step() {
    let bench = Bench::new("fresh", 10);
    let old = bench.trained("run", 1, "").of_steps("loss");
    let told = ["moved runs/run to runs/run.old-1", "validation after 0 steps"];
    bench.train("run", 1, "--fresh --set run.seed=7").run().expect_code(0).expect_stderr(&told);
    assert_eq!(bench.left("run.old-1").of_steps("loss"), old);
    let new = bench.left("run");
    let starts = crate::support::metrics(new.folder());
    assert_eq!(of_kind(&starts, "start").iter().map(|start| &start["step"]).collect::<Vec<_>>(), [0]);
    assert_ne!(new.of_steps("loss"), old);
}

#[test]
fn a_start_that_is_overtaken_by_another_ends_and_does_no_harm() {
    let bench = Bench::new("overtaken", 2000);
    let often = "--set checkpoint.every_steps=5";
    let mut first = bench.train_alone("run", often).start();
    first.wait_for("is complete", 1);
    let mut second = bench.train_alone("run", often).start();
    second.wait_for("going on from", 1);
    let told = ["generation 1 of the run in runs/run was overtaken by generation 2", "hint:"];
    first.finish().expect_code(2).expect_stderr(&told);
    second.wait_for("is complete", 1);
    second.signal("USR1");
    second.finish().expect_code(3);
    bench.left("run").assert_repeats_agree();
}
