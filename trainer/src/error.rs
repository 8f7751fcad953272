//! What can end a run, and with which exit code.

use crate::checkpoint::CheckpointError;
use crate::exchange::ExchangeError;
use crate::run_folder::FileError;
use configs::{BatchError, ConfigError, Exit, Fault};
use dataloader::DataError;
use ops::OpsError;
use ops::collectives::CommError;
use std::io;
use std::path::PathBuf;

/// Why a run cannot start or go on.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// The configuration cannot be used.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The ranks cannot share the batch evenly.
    #[error(transparent)]
    Batch(#[from] BatchError),
    /// The data cannot be used.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The configuration's vocabulary is smaller than the data's.
    #[error(
        "model.vocab_size = {model}, but {} has {data} different tokens\n\
         hint: leave model.vocab_size out, or set it to at least {data}", folder.display()
    )]
    Vocabulary {
        /// As configured.
        model: usize,
        /// As the data's tokenizer has it.
        data: usize,
        /// The data.
        folder: PathBuf,
    },
    /// The run was made with something else that may not change.
    #[error(
        "{} was made with another configuration:\n  {}\n\
         hint: set these back to go on, or start over with --fresh (the old run is moved aside)",
        checkpoint.display(), differences.join("\n  ")
    )]
    Fixed {
        /// The checkpoint.
        checkpoint: PathBuf,
        /// One line each.
        differences: Vec<String>,
    },
    /// A checkpoint from which this cannot start.
    #[error("{} cannot be started from: {what}", checkpoint.display())]
    Base {
        /// The checkpoint.
        checkpoint: PathBuf,
        /// Why not.
        what: String,
    },
    /// The loss or the gradient is no number; every rank stops before the update.
    #[error(
        "step {step}: loss {loss}, gradient norm {grad_norm}: not finite, no rank made the update\n\
         {suspects}\n\
         hint: the samples were {first_sample}..{end_sample}; the same step would fail again, so look at \
         the learning rate and at these samples; the last checkpoint is as it was"
    )]
    NotFinite {
        /// The update that was not made.
        step: u64,
        /// Its loss.
        loss: f64,
        /// Its gradient norm.
        grad_norm: f64,
        /// Whose loss it was, and the documents of these micro-batches, some lines.
        suspects: String,
        /// First sample of the step.
        first_sample: u64,
        /// One past its last sample.
        end_sample: u64,
    },
    /// Ranks that must hold the same weights do not.
    #[error(
        "step {step}: the ranks hold different weights in segment {segment}\n  {ranks}\n\
         hint: all compute the same, so memory or a processor is at fault, most likely there; checkpoints \
         are only made of weights that agree, so the same command goes on from the last one"
    )]
    ReplicasDiffer {
        /// Updates done.
        step: u64,
        /// The first segment that differs.
        segment: String,
        /// Who differs.
        ranks: String,
    },
    /// A spike, and going back has not helped so far.
    #[error(
        "step {step}: loss {loss} where {reference} is usual, after {skipped} batches were left out since the \
         checkpoint of step {checkpoint}\n\
         hint: it is not the data, then; look at optim.lr, schedule.warmup_tokens and optim.grad_clip, or at \
         guard.spike_factor"
    )]
    SpikesGoOn {
        /// The update that was not made.
        step: u64,
        /// Its loss.
        loss: f64,
        /// The median of the last losses.
        reference: f64,
        /// Batches left out.
        skipped: usize,
        /// The checkpoint to which the run went back each time.
        checkpoint: u64,
    },
    /// A spike, and no checkpoint to go back to.
    #[error(
        "step {step}: loss {loss} where {reference} is usual, and there is no checkpoint to go back to in {}\n\
         hint: why none could be written stands in the log; make room or mend the folder", folder.display()
    )]
    NothingToGoBackTo {
        /// The update that was not made.
        step: u64,
        /// Its loss.
        loss: f64,
        /// The median of the last losses.
        reference: f64,
        /// Where checkpoints would be.
        folder: PathBuf,
    },
    /// A machine runs something else.
    #[error(
        "rank {rank} on {host} does not run what rank 0 does: {what}\n\
         hint: have the same build, libtorch and environment on every host; make dist packs what a host needs, \
         and phalanx doctor --hosts … looks at each"
    )]
    Unlike {
        /// The first that differs.
        rank: usize,
        /// Its machine.
        host: String,
        /// In what.
        what: String,
    },
    /// A fault was asked for on a rank that there is not.
    #[error("--inject {fault}: there are {world_size} ranks, from 0\nhint: name one of them, or start more")]
    FaultyRank {
        /// As asked for.
        fault: Fault,
        /// Ranks.
        world_size: usize,
    },
    /// A GPU was to be checked.
    #[error("no GPU to check: {0}")]
    NoGpu(ops::cuda::NoCuda),
    /// A native operation failed.
    #[error(transparent)]
    Ops(#[from] OpsError),
    /// A collective failed.
    #[error(transparent)]
    Comm(#[from] CommError),
    /// A checkpoint cannot be written or read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The last checkpoint of a run could not be written; why stands in the log.
    #[error(
        "step {step}: the last checkpoint could not be written into {}; the run is as it was at the one \
         before\nhint: make room or mend the folder, and the same command goes on from there", folder.display()
    )]
    NotSaved {
        /// The step that is lost.
        step: u64,
        /// Where it should have gone.
        folder: PathBuf,
    },
    /// A model of another program cannot be written or read.
    #[error(transparent)]
    Exchange(#[from] ExchangeError),
    /// Something was asked for that cannot be had.
    #[error("{what}\nhint: {hint}")]
    Refused {
        /// What, where, got and expected.
        what: String,
        /// What to do.
        hint: String,
    },
    /// The run folder cannot be used.
    #[error(transparent)]
    Folder(#[from] FileError),
    /// A machine file that is not there, or is none.
    #[error("{}: {why}\nhint: phalanx-rank bench calibrate writes such a file, on as many ranks", file.display())]
    Machine {
        /// The file.
        file: PathBuf,
        /// What is wrong with it, with the line.
        why: String,
    },
    /// A file of the run folder cannot be written or read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl TrainError {
    /// Names the file of an I/O error.
    pub fn io(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> TrainError {
        let path = path.into();
        move |source| TrainError::Io { path, source }
    }

    /// In one word, for `metrics.jsonl` and who reads it.
    pub(crate) fn fault(&self) -> &'static str {
        match self {
            TrainError::NotFinite { .. } => "not_finite",
            TrainError::ReplicasDiffer { .. } => "replicas",
            _ => "error",
        }
    }

    /// Whether all ranks end for the same reason and in the same words, so that one may speak for all.
    pub fn is_everybodys(&self) -> bool {
        self.exit() == Exit::UserError
            || matches!(self, TrainError::ReplicasDiffer { .. } | TrainError::NothingToGoBackTo { .. })
    }

    /// The exit code: whether the user must change something, or a retry may help.
    pub fn exit(&self) -> Exit {
        match self {
            TrainError::Config(_)
            | TrainError::Batch(_)
            | TrainError::Data(_)
            | TrainError::Vocabulary { .. }
            | TrainError::Machine { .. }
            | TrainError::Fixed { .. }
            | TrainError::Base { .. }
            | TrainError::NotFinite { .. }
            | TrainError::SpikesGoOn { .. }
            | TrainError::FaultyRank { .. }
            | TrainError::Refused { .. }
            | TrainError::Exchange(
                ExchangeError::NoPlace { .. }
                | ExchangeError::NotOurs { .. }
                | ExchangeError::Malformed { .. }
                | ExchangeError::Exists { .. }
                | ExchangeError::Differs { .. }
                | ExchangeError::Python { .. },
            )
            | TrainError::Unlike { .. }
            | TrainError::Comm(
                CommError::NoCommonWorld { .. }
                | CommError::Devices { .. }
                | CommError::SharedGpu { .. },
            )
            | TrainError::Checkpoint(
                CheckpointError::NoneGood { .. }
                | CheckpointError::NoSuch { .. }
                // Starting again would overtake the other start in turn.
                | CheckpointError::StaleGeneration { .. }
                | CheckpointError::Layout { .. }
                | CheckpointError::Damaged { .. },
            )
            | TrainError::NoGpu(_)
            | TrainError::Ops(OpsError::NoCuda(_)) => Exit::UserError,
            TrainError::NotSaved { .. }
            | TrainError::Exchange(_)
            | TrainError::ReplicasDiffer { .. }
            | TrainError::NothingToGoBackTo { .. }
            | TrainError::Ops(_)
            | TrainError::Comm(_)
            | TrainError::Checkpoint(_)
            | TrainError::Folder(_)
            | TrainError::Io { .. } => Exit::Failed,
        }
    }
}
