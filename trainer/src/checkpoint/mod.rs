//! Checkpoints: the whole state of a run at a step, on disk, such that a crash at any moment leaves
//! the run something good to go on from.
//!
//! Owns the folder `checkpoints/` of a run: its names, its files, who may write them, and the proof
//! that what is read is what was written. Refuses to know tensors and ranks' communication: it takes
//! and gives plain `f32` slices, and the loop carries the flags between the ranks.
//!
//! How a checkpoint comes to be, every line a step that all ranks have agreed on:
//!
//! 1. rank 0: [`Publisher::prepare`] makes `step-00001000.tmp/`, if there is room;
//! 2. every rank: [`CheckpointWriter::start`] with a [`Snapshot`] of what it owns; a thread writes
//!    `rank-00003.safetensors`, then `rank-00003.json` that vouches for it, while training goes on;
//! 3. when [`CheckpointWriter::finished`] is `Some(Ok)` on every rank, rank 0: [`Publisher::publish`]
//!    writes `manifest.json` and renames the folder; when it is `Some` on every rank and an error on
//!    one, rank 0: [`Publisher::abandon`].
//!
//! A folder without `.tmp` is complete. Only the newest generation of a run may write.

pub mod commands;
mod error;
mod manifest;
mod publish;
mod read;
mod slice;
mod state_file;
mod write;

#[cfg(test)]
mod tests;

pub use error::{CheckpointError, Damage, Damaged};
pub use manifest::{FileEntry, MANIFEST, Manifest, Skip, TrainState, VERSION, rank_file};
pub use publish::Publisher;
pub use read::{Checkpoints, Loaded};
pub use slice::{Slice, SliceError, SliceSpec, StateKind};
pub use write::{CheckpointWriter, Snapshot, Written};

use crate::run_folder::RunFolder;
use std::path::{Path, PathBuf};

/// What the names of folders that are not (or no longer) checkpoints end in.
const UNFINISHED: &str = ".tmp";

/// What stands before it in the names of those that were published once and are being removed.
const SET_ASIDE: &str = ".old";

/// The folder of a published checkpoint: `step-00001000`.
pub fn step_folder(step: u64) -> String {
    format!("step-{step:08}")
}

/// The folder of one that is being written: `step-00001000.tmp`.
fn unfinished_folder(step: u64) -> String {
    step_folder(step) + UNFINISHED
}

/// The step of a published checkpoint, from its folder's name; nothing for any other name.
fn published_step(name: &str) -> Option<u64> {
    let step = name.strip_prefix("step-")?.parse().ok()?;
    (step_folder(step) == name).then_some(step)
}

/// The step of a folder that is no checkpoint yet, or none any more.
fn unfinished_step(name: &str) -> Option<u64> {
    let name = name.strip_suffix(UNFINISHED)?;
    published_step(name.strip_suffix(SET_ASIDE).unwrap_or(name))
}

/// Which checkpoint a path means: that of a step, or the newest, of a run's folder; or the one whose own folder
/// it is.
pub(crate) fn one_of(path: &Path, step: Option<u64>) -> (PathBuf, Option<u64>) {
    let name = path.file_name().map(|name| name.to_string_lossy());
    let run = path.parent().and_then(Path::parent);
    match (step, name.and_then(|name| published_step(&name)), run) {
        (None, Some(step), Some(run)) => (run.to_path_buf(), Some(step)),
        _ => (path.to_path_buf(), step),
    }
}

/// Refuses to go on when another start of the run has taken over.
fn require_newest(run: &RunFolder, mine: u64) -> Result<(), CheckpointError> {
    let newest = run.newest_generation()?;
    if newest > mine {
        return Err(CheckpointError::StaleGeneration { run: run.dir().to_path_buf(), mine, newest });
    }
    Ok(())
}
