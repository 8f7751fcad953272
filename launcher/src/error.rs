//! What can be wrong before any rank runs, and the one place that turns an error into an exit code.

use configs::Exit;
use std::path::PathBuf;

/// Why the launcher cannot start what it was asked to start.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// A host list or hostfile that does not parse. `place` is the flag, or file and line.
    #[error("{place}: {what}\nhint: {hint}")]
    Hosts {
        /// The flag, or file and line.
        place: String,
        /// What is wrong, with the text that is.
        what: String,
        /// How to write it.
        hint: &'static str,
    },
    /// More ranks than slots.
    #[error(
        "{ranks} ranks were asked for, but there {} {slots} {} ({stated})\n\
         hint: state more with --hosts or --hostfile, ask for at most -n {slots}, \
         or let ranks share cores with --oversubscribe",
        if *slots == 1 { "is" } else { "are" }, if *slots == 1 { "slot" } else { "slots" }
    )]
    TooManyRanks {
        /// What `-n` asks for.
        ranks: usize,
        /// What there is.
        slots: usize,
        /// Where the number of slots comes from.
        stated: String,
    },
    /// Ranks that cannot share the micro-batches of a task.
    #[error(
        "{ranks} ranks cannot share the {micro_batches} micro-batches of a step evenly (task.batch_examples / \
         task.micro_batch)\nhint: ask for a number of ranks that divides it, or set another task.micro_batch"
    )]
    TaskRanks {
        /// What `-n` asks for.
        ranks: usize,
        /// What there is to share.
        micro_batches: u64,
    },
    /// A hostfile that leaves the number of slots to each machine, and no `-n`.
    #[error(
        "{hosts} states no slots for some hosts, so the number of ranks cannot be derived\n\
         hint: give -n RANKS, or write slots=N behind every host"
    )]
    UnknownSlots {
        /// The hostfile.
        hosts: String,
    },
    /// `-n 0`.
    #[error("-n 0: a run needs at least one rank\nhint: leave -n away for as many ranks as there are slots")]
    NoRanks,
    /// `--mca` without a value.
    #[error("--mca {0}: expected key=value\nhint: for example --mca btl_tcp_if_include=eth0")]
    Mca(String),
    /// No `mpirun` on PATH.
    #[error(
        "mpirun was not found on PATH\n\
         hint: install Open MPI (Debian and Ubuntu: apt-get install openmpi-bin), \
         or put the folder of your mpirun on PATH"
    )]
    NoMpirun,
    /// No `phalanx-rank` beside the running `phalanx`.
    #[error(
        "{} is not there; it is what mpirun starts on every rank\n\
         hint: both binaries belong into one folder, at the same path on every host; \
         cargo build --release builds both", .0.display()
    )]
    NoRankBinary(PathBuf),
    /// A task of a suite whose data is not there.
    #[error(
        "task {task:?}: {} is not there\n\
         hint: task.data is relative to the folder in which the command is given", data.display()
    )]
    NoSuiteData {
        /// The task's name.
        task: String,
        /// Its data.
        data: PathBuf,
    },
    /// A path that cannot stand in a command.
    #[error("{} is no UTF-8 and cannot be passed to mpirun", .0.display())]
    OddPath(PathBuf),
    /// A proof that would prove nothing.
    #[error("{0}")]
    Proof(String),
    /// No run is there to be watched.
    #[error("{0}")]
    NothingToWatch(String),
    /// A calibration that is not there, or is none.
    #[error(
        "--gpu measured: {}: {why}\n\
         hint: phalanx-rank bench calibrate writes such a file, and --machine names one; data sheets need none: {}",
        file.display(), configs::plan::MACHINES.join(", ")
    )]
    Calibration {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The old run folder could not be moved aside.
    #[error("--fresh: {} could not be moved to {}", from.display(), to.display())]
    MoveAside {
        /// The run folder.
        from: PathBuf,
        /// Where it should have gone.
        to: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// Another launcher looks after the run.
    #[error(
        "{}: another launcher looks after this run ({holder})\n\
         hint: stop that one first (kill -USR1 for a checkpoint), or start another run with --set run.name=…",
        folder.display()
    )]
    RunIsHeld {
        /// The run folder.
        folder: PathBuf,
        /// Who it is.
        holder: String,
    },
    /// A process or its signals could not be set up.
    #[error("{what}")]
    System {
        /// What was tried.
        what: String,
        /// Why it failed.
        source: std::io::Error,
    },
}

/// The exit code that an error deserves: 2 where the user must change something, 1 where a retry may
/// help.
pub fn exit_of(error: &anyhow::Error) -> Exit {
    let user_must_act = error.chain().any(|cause| {
        cause.is::<configs::ConfigError>()
            || cause.is::<configs::BatchError>()
            || cause.is::<configs::plan::PlanError>()
            || cause.is::<dataloader::DataError>()
            || cause.is::<dataloader::PrepareError>()
            || cause.is::<monitor::ExportError>()
            || cause
                .downcast_ref::<LaunchError>()
                .is_some_and(|error| !matches!(error, LaunchError::System { .. }))
    });
    if user_must_act { Exit::UserError } else { Exit::Failed }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;

    #[test]
    fn a_user_error_is_found_below_any_context() {
        let error = Err::<(), _>(LaunchError::NoMpirun).context("train").context("outer").unwrap_err();
        assert_eq!(exit_of(&error), Exit::UserError);
        let batch = configs::BatchPlan::new(100, 4, 256, 2).unwrap_err();
        assert_eq!(exit_of(&batch.into()), Exit::UserError);
    }

    #[test]
    fn what_the_system_refused_may_work_the_next_time() {
        let source = std::io::Error::from(std::io::ErrorKind::OutOfMemory);
        let error = LaunchError::System { what: "fork".into(), source };
        assert_eq!(exit_of(&error.into()), Exit::Failed);
        assert_eq!(exit_of(&anyhow::anyhow!("something else")), Exit::Failed);
    }
}
