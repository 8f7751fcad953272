//! A rank's part of a checkpoint: one state file and the report that vouches for it, written by a
//! thread from a snapshot while training goes on. Knows nothing of the other ranks.

use super::error::CheckpointError;
use super::manifest::{FileEntry, rank_file};
use super::slice::{Slice, SliceSpec};
use super::{require_newest, state_file, unfinished_folder};
use crate::run_folder::{FileError, RunFolder, write_atomically, write_atomically_with};
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// A copy of what one rank owns of the state at a step.
#[derive(Debug, Clone, PartialEq)]
pub struct Snapshot {
    /// Optimizer updates done.
    pub step: u64,
    /// This start of the run.
    pub generation: u64,
    /// Whose copy.
    pub rank: usize,
    /// Ranks that share the checkpoint.
    pub world_size: usize,
    /// What it owns of every segment, of each kind; see [`super::owned_range`].
    pub slices: Vec<Slice>,
}

impl Snapshot {
    /// Bytes of its values.
    pub fn bytes(&self) -> u64 {
        self.slices.iter().map(|slice| size_of_val(slice.values.as_slice()) as u64).sum()
    }
}

/// What a rank has written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    /// Length of the state file.
    pub bytes: u64,
    /// From the start of the thread until all was on disk.
    pub elapsed: Duration,
}

/// What a rank says of its file, for rank 0 to put into the manifest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct RankReport {
    pub(crate) step: u64,
    pub(crate) generation: u64,
    pub(crate) rank: usize,
    pub(crate) world_size: usize,
    pub(crate) file: FileEntry,
}

/// The name of a rank's report.
pub(crate) fn report_file(rank: usize) -> String {
    format!("rank-{rank:05}.json")
}

/// A snapshot on its way to the disk. Dropping it does not stop the write.
#[derive(Debug)]
pub struct CheckpointWriter {
    step: u64,
    thread: Option<JoinHandle<Result<Written, CheckpointError>>>,
    outcome: Option<Result<Written, CheckpointError>>,
}

impl CheckpointWriter {
    /// Starts writing a snapshot into the folder that rank 0 has prepared for its step. What goes
    /// wrong, starting the thread included, is told by `finished` and `wait`.
    pub fn start(run: &RunFolder, snapshot: impl Into<Arc<Snapshot>>) -> CheckpointWriter {
        let snapshot = snapshot.into();
        let (run, step) = (run.clone(), snapshot.step);
        let named = std::thread::Builder::new().name("checkpoint".into());
        let folder = run.checkpoints_dir();
        match named.spawn(move || write_rank(&run, &snapshot)) {
            Ok(thread) => CheckpointWriter { step, thread: Some(thread), outcome: None },
            Err(error) => {
                let error = FileError::of("start the thread that writes", &folder)(error);
                CheckpointWriter { step, thread: None, outcome: Some(Err(error.into())) }
            }
        }
    }

    /// The step of the snapshot.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// The outcome, or nothing while the thread still writes. Does not wait.
    pub fn finished(&mut self) -> Option<&Result<Written, CheckpointError>> {
        if self.thread.as_ref().is_none_or(JoinHandle::is_finished) {
            self.join();
        }
        self.outcome.as_ref()
    }

    /// Waits for the thread; `finished` has the outcome then.
    pub fn block(&mut self) {
        self.join();
    }

    /// The outcome, after waiting for it.
    ///
    /// # Errors
    /// `StaleGeneration`, `DiskFull`, or what the file system refused.
    pub fn wait(mut self) -> Result<Written, CheckpointError> {
        self.block();
        self.outcome.expect("a writer has a thread or an outcome")
    }

    fn join(&mut self) {
        if let Some(thread) = self.thread.take() {
            self.outcome = Some(thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        }
    }
}

fn write_rank(run: &RunFolder, snapshot: &Snapshot) -> Result<Written, CheckpointError> {
    let started = Instant::now();
    let folder = run.checkpoints_dir().join(unfinished_folder(snapshot.step));
    let of_write = |error| CheckpointError::of_write(&folder, snapshot.bytes(), error);

    require_newest(run, snapshot.generation)?;
    let file = write_slices(&folder, snapshot).map_err(of_write)?;
    let bytes = file.size_bytes;
    let report = RankReport {
        step: snapshot.step,
        generation: snapshot.generation,
        rank: snapshot.rank,
        world_size: snapshot.world_size,
        file,
    };
    let json = serde_json::to_vec_pretty(&report).expect("strings, numbers and lists are JSON");
    // The file took its time: a newer start may have prepared the same folder for its own ranks.
    require_newest(run, snapshot.generation)?;
    write_atomically(&folder.join(report_file(snapshot.rank)), &json).map_err(of_write)?;
    Ok(Written { bytes, elapsed: started.elapsed() })
}

fn write_slices(folder: &Path, snapshot: &Snapshot) -> Result<FileEntry, FileError> {
    let name = rank_file(snapshot.rank);
    let (size_bytes, blake3) =
        write_atomically_with(&folder.join(&name), |file| state_file::write(&snapshot.slices, file))?;
    let slices: Vec<SliceSpec> = snapshot.slices.iter().map(Slice::spec).collect();
    Ok(FileEntry { name, size_bytes, blake3, slices })
}
