//! What training promises, seen from outside: real ranks under real mpirun on tiny runs, judged by what
//! they leave behind: exit codes, messages, `metrics.jsonl`, logs and checkpoints.
//!
//! That a panic on one rank ends all of them is shown by the tests of the collectives: no input makes
//! a rank panic here.

#![allow(clippy::unwrap_used)] // unwrap is how a test fails

#[path = "../support/mod.rs"]
mod support;

mod chaos;
mod damage;
mod evaluating;
mod finetuning;
mod generating;
mod guard;
mod hostile;
mod left;
mod masked;
mod mixture;
mod nodes;
mod numbers;
mod packed;
mod ramp;
mod ranks;
mod refusals;
mod resuming;
mod sharding;
mod shards;
mod slurm;
mod stopping;
mod surviving;

use left::Left;
use std::path::Path;
use support::{Command, Scratch, phalanx, phalanx_rank, tiny_run};

/// A scratch folder with data and the configuration of a tiny run.
struct Bench {
    scratch: Scratch,
}

impl Bench {
    fn new(name: &str, max_steps: u64) -> Bench {
        let scratch = Scratch::new(name);
        tiny_run(&scratch, max_steps);
        Bench { scratch }
    }

    /// `phalanx train tiny.toml -n RANKS` for the run `run`; more arguments are split at spaces. A start that
    /// fails is not followed by another.
    fn train(&self, run: &str, ranks: usize, arguments: &str) -> Command {
        self.train_on(run, ranks, &format!("--max-restarts 0 {arguments}"))
    }

    /// The same, but one that fails is.
    fn train_on(&self, run: &str, ranks: usize, arguments: &str) -> Command {
        let launcher = ["train", "tiny.toml", "--oversubscribe", "-n", &ranks.to_string()];
        self.command(&phalanx(), &launcher, run, arguments)
    }

    /// `phalanx-rank train tiny.toml`, without mpirun.
    fn train_alone(&self, run: &str, arguments: &str) -> Command {
        self.command(&phalanx_rank(), &["train", "tiny.toml"], run, arguments)
    }

    /// `mpirun -n RANKS phalanx-rank train tiny.toml`, without the launcher.
    fn train_under_mpirun(&self, run: &str, ranks: usize, arguments: &str) -> Command {
        let (rank, ranks) = (phalanx_rank().display().to_string(), ranks.to_string());
        let mpirun = ["-n", &ranks, "--oversubscribe", "--bind-to", "none", &rank, "train", "tiny.toml"];
        self.command(Path::new("mpirun"), &mpirun, run, arguments)
    }

    fn command(&self, program: &Path, first: &[&str], run: &str, arguments: &str) -> Command {
        Command::new(program)
            .args(first)
            .args(["--set", &format!("run.name={run}")])
            .args(arguments.split_whitespace())
            .current_dir(self.scratch.path())
    }

    /// Trains `run` to its end under the launcher.
    #[track_caller]
    fn trained(&self, run: &str, ranks: usize, arguments: &str) -> Left {
        let done = self.train(run, ranks, arguments).run().expect_code(0);
        assert_eq!(done.survivors, Vec::<String>::new());
        self.left(run)
    }

    /// What a run has left.
    fn left(&self, run: &str) -> Left {
        Left::by(self.scratch.join("runs").join(run))
    }

    /// Copies a run, so that more than one start can go on from the same place.
    fn copy_run(&self, from: &str, to: &str) {
        let runs = self.scratch.join("runs");
        Command::new("cp").args(["-r", from, to]).current_dir(runs).run().expect_code(0);
    }
}

/// Panics unless the numbers agree pair by pair, relative to the first.
#[track_caller]
fn assert_close(expected: &[f64], got: &[f64], tolerance: f64) {
    assert_eq!(expected.len(), got.len());
    for (i, (a, b)) in expected.iter().zip(got).enumerate() {
        assert!((a - b).abs() <= tolerance * a.abs(), "number {i} is {b}, expected {a}");
    }
}
