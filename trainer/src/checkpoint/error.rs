//! Every way in which saving or loading a checkpoint can fail, in words for people.

use super::slice::SliceError;
use crate::run_folder::FileError;
use std::io;
use std::path::{Path, PathBuf};

/// Why a checkpoint folder cannot be used. One variant per way to be wrong.
#[derive(Debug, thiserror::Error)]
pub enum Damage {
    /// A file that should be there is not.
    #[error("{file} is missing")]
    Missing {
        /// The file's name.
        file: String,
    },
    /// A file that the system does not let us read.
    #[error("{file} cannot be read: {error}")]
    Unreadable {
        /// The file's name.
        file: String,
        /// What the system said.
        error: io::Error,
    },
    /// A file that was cut short, or has grown.
    #[error("{file} has {got_bytes} bytes, expected {expected_bytes}")]
    WrongLength {
        /// The file's name.
        file: String,
        /// What the manifest says.
        expected_bytes: u64,
        /// What is there.
        got_bytes: u64,
    },
    /// A file whose content changed.
    #[error("{file} has the hash {got}, expected {expected}")]
    WrongHash {
        /// The file's name.
        file: String,
        /// blake3 in the manifest.
        expected: String,
        /// blake3 of what is there.
        got: String,
    },
    /// A state file whose hash is right and which still does not hold what the manifest lists.
    #[error("{file} does not hold what the manifest lists: {what}")]
    Header {
        /// The file's name.
        file: String,
        /// What is wrong.
        what: String,
    },
    /// A manifest that is cut short or no JSON of ours.
    #[error("manifest.json cannot be read: {what}")]
    ManifestUnparsable {
        /// What is wrong.
        what: String,
    },
    /// A manifest whose content changed.
    #[error("manifest.json has the digest {got}, expected {expected}")]
    ManifestDigest {
        /// blake3 that the manifest states of itself.
        expected: String,
        /// blake3 of what is there.
        got: String,
    },
    /// A format that this program does not know.
    #[error("the checkpoint has format version {got}, this program reads version {supported}")]
    UnsupportedVersion {
        /// In the manifest.
        got: u64,
        /// What is read here.
        supported: u64,
    },
    /// A manifest that contradicts itself or its folder.
    #[error("manifest.json contradicts itself: {what}")]
    Inconsistent {
        /// What is wrong.
        what: String,
    },
    /// A manifest that names a file which no rank writes; such a name could lead out of the folder.
    #[error("manifest.json names the file {got:?}, expected {expected:?}")]
    ForeignName {
        /// In the manifest.
        got: String,
        /// The only name allowed at that place.
        expected: String,
    },
    /// Files that together do not hold the model.
    #[error(transparent)]
    Slices(#[from] SliceError),
}

/// A folder that was passed over, and why.
#[derive(Debug, thiserror::Error)]
#[error("checkpoint {} is damaged: {damage}", folder.display())]
pub struct Damaged {
    /// The checkpoint's folder.
    pub folder: PathBuf,
    /// Why.
    pub damage: Damage,
}

/// A checkpoint that could not be saved or loaded.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The file system refused.
    #[error(transparent)]
    File(#[from] FileError),
    /// Something was asked of a run or a step that is not there.
    #[error(
        "{what}\nhint: name the folder of a run, like runs/NAME; `phalanx checkpoint ls RUN` lists its steps"
    )]
    NoSuch {
        /// What is not there.
        what: String,
    },
    /// No room for a checkpoint; the run can go on without it.
    #[error(
        "not enough room for a checkpoint in {}: needs {need_bytes} bytes, {have_bytes} are free\n\
         hint: free some space or lower checkpoint.keep_last; the run goes on and tries again next time",
        folder.display()
    )]
    DiskFull {
        /// Where it should have gone.
        folder: PathBuf,
        /// The checkpoint, or this rank's part of it, with a margin.
        need_bytes: u64,
        /// What the file system has left for us.
        have_bytes: u64,
    },
    /// Another start of the run has taken over.
    #[error(
        "generation {mine} of the run in {} was overtaken by generation {newest}; it may not write \
         checkpoints any more\n\
         hint: the run was started again elsewhere; look for its processes before starting another",
        run.display()
    )]
    StaleGeneration {
        /// The run's folder.
        run: PathBuf,
        /// The generation of this process.
        mine: u64,
        /// The newest claimed.
        newest: u64,
    },
    /// A rank that said it was done, but whose report is not there or does not fit.
    #[error(
        "the report of rank {rank} in {} cannot be used: {what}\n\
         hint: do all ranks see the same run folder?", path.display()
    )]
    RankReport {
        /// Whose.
        rank: usize,
        /// The report.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// The ranks' slices do not make up the model: our own mistake, caught before publishing.
    #[error("the checkpoint of step {step} is incomplete: {error}")]
    Incomplete {
        /// Of which step.
        step: u64,
        /// What is missing or twice there.
        error: SliceError,
    },
    /// A folder that cannot be used, where only that one would do.
    #[error("{0}")]
    Damaged(Damaged),
    /// Checkpoints, but not one that can be used. Starting from nothing would hide the loss.
    #[error(
        "no checkpoint of the run can be used:\n  {}\n\
         hint: restore one from a copy, or train from the beginning with --fresh",
        .0.join("\n  ")
    )]
    NoneGood(Vec<String>),
    /// A checkpoint of another model.
    #[error(
        "checkpoint {} holds another model than the configuration: {what}\n\
         hint: restore the model section that the run was started with, or start another run", folder.display()
    )]
    Layout {
        /// The checkpoint's folder.
        folder: PathBuf,
        /// The first difference.
        what: String,
    },
}

impl CheckpointError {
    /// The failure of a write, told apart by whether there was room.
    pub(crate) fn of_write(folder: &Path, need_bytes: u64, error: FileError) -> CheckpointError {
        match error.error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => CheckpointError::DiskFull {
                folder: folder.to_path_buf(),
                need_bytes,
                // A quota may be full where the disk is not.
                have_bytes: super::publish::free_space(folder).unwrap_or(0).min(need_bytes),
            },
            _ => CheckpointError::File(error),
        }
    }
}
