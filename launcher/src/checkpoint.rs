//! `phalanx checkpoint`: what people ask of a run's checkpoints. Owns the arguments; the answers are
//! `phalanx-rank`'s, which knows the files, but for the proof of a resume, which is in `prove`.

use crate::hand_on;
use crate::prove::{self, ProveArgs};
use anyhow::Result;
use clap::{Args, Subcommand};
use configs::Exit;
use std::ffi::OsString;
use std::path::PathBuf;

/// `phalanx checkpoint`
#[derive(Debug, Args)]
pub struct CheckpointArgs {
    /// What to do.
    #[command(subcommand)]
    pub command: CheckpointCommand,
}

/// The subcommands of `phalanx checkpoint`.
#[derive(Debug, Subcommand)]
pub enum CheckpointCommand {
    /// List a run's checkpoints, with size, age and state.
    Ls {
        /// The run's folder, like runs/NAME.
        run: PathBuf,
    },
    /// Read every byte and prove that it is what was written.
    Verify {
        /// The run's folder.
        run: PathBuf,
        /// One step instead of all.
        #[arg(long)]
        step: Option<u64>,
    },
    /// Show what a checkpoint holds: progress, data, layout, configuration.
    Show {
        /// The run's folder.
        run: PathBuf,
        /// A step instead of the newest.
        #[arg(long)]
        step: Option<u64>,
    },
    /// Remove older checkpoints; the newest whole one always stays.
    Prune {
        /// The run's folder.
        run: PathBuf,
        /// How many of the newest stay.
        #[arg(long, value_name = "N")]
        keep_last: usize,
        /// Multiples of this many steps stay too.
        #[arg(long, value_name = "N", default_value_t = 0)]
        keep_every_steps: u64,
        /// Say what would be removed, and remove nothing.
        #[arg(long)]
        dry_run: bool,
    },
    /// Compare two checkpoints bit for bit; exit code 1 if they differ.
    Compare {
        /// A run's folder, or a checkpoint's.
        first: PathBuf,
        /// Another.
        second: PathBuf,
        /// A step instead of the newest.
        #[arg(long)]
        step: Option<u64>,
    },
    /// Prove that a run goes on bit for bit: train it straight, train it with a kill in between, compare.
    ProveResume(ProveArgs),
}

/// Runs `phalanx checkpoint`.
///
/// # Errors
/// The installation is not complete, or a proof could not be made.
pub fn run(args: &CheckpointArgs) -> Result<Exit> {
    let of_step =
        |step: &Option<u64>| step.iter().flat_map(|step| words(&["--step", &step.to_string()])).collect();
    let (name, paths, flags): (_, Vec<&PathBuf>, Vec<OsString>) = match &args.command {
        CheckpointCommand::ProveResume(args) => return prove::run(args),
        CheckpointCommand::Ls { run } => ("ls", vec![run], Vec::new()),
        CheckpointCommand::Verify { run, step } => ("verify", vec![run], of_step(step)),
        CheckpointCommand::Show { run, step } => ("show", vec![run], of_step(step)),
        CheckpointCommand::Prune { run, keep_last, keep_every_steps, dry_run } => {
            let (last, every) = (keep_last.to_string(), keep_every_steps.to_string());
            let mut flags = words(&["--keep-last", &last, "--keep-every-steps", &every]);
            flags.extend(dry_run.then(|| "--dry-run".into()));
            ("prune", vec![run], flags)
        }
        CheckpointCommand::Compare { first, second, step } => ("compare", vec![first, second], of_step(step)),
    };
    let paths = paths.into_iter().map(|path| path.clone().into_os_string());
    hand_on::run(words(&["checkpoint", name]).into_iter().chain(paths).chain(flags))
}

fn words(words: &[&str]) -> Vec<OsString> {
    words.iter().map(OsString::from).collect()
}
