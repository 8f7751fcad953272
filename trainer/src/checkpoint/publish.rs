//! What rank 0 does for all: makes room for a checkpoint, publishes it when every rank has written its
//! part, and removes what is no longer needed. Talks to nobody; the loop tells it when.

use super::error::{CheckpointError, Damage, Damaged};
use super::manifest::{FileEntry, MANIFEST, Manifest, Skip, TrainState, rank_file};
use super::slice::{StateKind, check_cover};
use super::write::{RankReport, report_file};
use super::{SET_ASIDE, UNFINISHED, published_step, require_newest, step_folder};
use super::{unfinished_folder, unfinished_step};
use crate::run_folder::{FileError, RunFolder, folder_names, sync_folder, write_atomically};
use configs::{CheckpointConfig, SegmentSpec};
use std::collections::HashSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Left free beside a checkpoint: for its JSON files, and so that logs can still be written.
const MARGIN_BYTES: u64 = 64 << 20;

/// Rank 0's hand on the checkpoints of a run. Every method refuses once a newer generation has started.
#[derive(Debug, Clone)]
pub struct Publisher {
    run: RunFolder,
    generation: u64,
    free_space: fn(&Path) -> io::Result<u64>,
}

impl Publisher {
    /// For the start of the run that claimed `generation`.
    pub fn new(run: &RunFolder, generation: u64) -> Publisher {
        Publisher { run: run.clone(), generation, free_space }
    }

    /// Asks another source than the file system how many bytes are free.
    #[cfg(test)]
    pub(crate) fn with_free_space(self, free_space: fn(&Path) -> io::Result<u64>) -> Publisher {
        Publisher { free_space, ..self }
    }

    /// Removes what earlier starts left half-written or half-removed. Once, before the first
    /// `prepare`: no other generation may be writing any more, and this one is not yet.
    ///
    /// # Errors
    /// `StaleGeneration`, or a folder that cannot be removed.
    pub fn clear_unfinished(&self) -> Result<(), CheckpointError> {
        require_newest(&self.run, self.generation)?;
        self.remove_unfinished(|_| true)
    }

    /// Makes the folder for a step, in place of any that an earlier attempt left there. The other
    /// ranks start to write after they know that it worked. `segments` tell how much will be written.
    ///
    /// # Errors
    /// `DiskFull` when there is no room, before anything is written; `StaleGeneration`; a folder that
    /// cannot be made.
    pub fn prepare(&self, step: u64, segments: &[SegmentSpec]) -> Result<(), CheckpointError> {
        require_newest(&self.run, self.generation)?;
        let folder = self.unfinished(step);
        remove_folder(&folder)?;

        let parent = self.run.checkpoints_dir();
        let values: u64 = segments.iter().map(|segment| segment.numel as u64).sum();
        let state_bytes = values * StateKind::ALL.len() as u64 * size_of::<f32>() as u64;
        let need_bytes = state_bytes + MARGIN_BYTES;
        let have_bytes =
            (self.free_space)(&parent).map_err(FileError::of("ask for free space in", &parent))?;
        if have_bytes < need_bytes {
            return Err(CheckpointError::DiskFull { folder: parent, need_bytes, have_bytes });
        }
        fs::create_dir(&folder).map_err(FileError::of("create the folder", &folder))?;
        Ok(sync_folder(&parent)?)
    }

    /// Publishes the step that every rank has written: gathers what the `world_size` ranks report,
    /// writes the manifest and renames the folder. Returns the folder.
    ///
    /// # Errors
    /// A report that is missing or does not fit, slices that do not make up the model,
    /// `StaleGeneration`, or what the file system refused. The folder is then still unfinished.
    pub fn publish(&self, state: &TrainState, world_size: usize) -> Result<PathBuf, CheckpointError> {
        let step = state.step;
        let parent = self.run.checkpoints_dir();
        let (unfinished, published) = (self.unfinished(step), parent.join(step_folder(step)));
        let files: Result<Vec<FileEntry>, CheckpointError> =
            (0..world_size).map(|rank| self.report(&unfinished, step, rank, world_size)).collect();
        let files = files?;
        check_cover(&state.segments, files.iter().flat_map(|file| &file.slices))
            .map_err(|error| CheckpointError::Incomplete { step, error })?;

        let manifest = Manifest::new(state.clone(), self.generation, files).encode();
        write_atomically(&unfinished.join(MANIFEST), &manifest)
            .map_err(|error| CheckpointError::of_write(&unfinished, manifest.len() as u64, error))?;
        remove_strays(&unfinished, world_size)?;
        sync_folder(&unfinished)?;

        // From here to the rename nothing takes time.
        require_newest(&self.run, self.generation)?;
        let old = set_aside(&published)?;
        fs::rename(&unfinished, &published).map_err(FileError::of("publish", &published))?;
        sync_folder(&parent)?;
        old.map_or(Ok(()), |old| remove_folder(&old))?;
        Ok(published)
    }

    /// Writes down in a published checkpoint which batches are left out from it on; all else in it stays.
    /// The manifest is replaced as a whole, so that at any moment one of the two is there.
    ///
    /// # Errors
    /// `StaleGeneration`, a manifest that is damaged, or what the file system refused.
    pub fn record_skips(&self, step: u64, skips: &[Skip]) -> Result<(), CheckpointError> {
        require_newest(&self.run, self.generation)?;
        let folder = self.run.checkpoints_dir().join(step_folder(step));
        let damaged = |damage: Damage| CheckpointError::Damaged(Damaged { folder: folder.clone(), damage });
        let path = folder.join(MANIFEST);
        let bytes = fs::read(&path).map_err(FileError::of("read", &path))?;
        let mut manifest = Manifest::decode(&bytes).map_err(damaged)?;
        manifest.state.skips = skips.to_vec();
        Ok(write_atomically(&path, &manifest.encode())?)
    }

    /// Removes the unfinished folder of a step that some rank could not write. All ranks have finished.
    ///
    /// # Errors
    /// `StaleGeneration`, or a folder that cannot be removed.
    pub fn abandon(&self, step: u64) -> Result<(), CheckpointError> {
        require_newest(&self.run, self.generation)?;
        Ok(remove_folder(&self.unfinished(step))?)
    }

    /// Removes the checkpoints that need not be kept, and unfinished folders, up to the step that
    /// was just published: that one is good and stays. Later ones, left by a start that got further
    /// before it fell back, are not judged here. Returns the steps removed.
    ///
    /// # Errors
    /// `StaleGeneration`, or a folder that cannot be removed. The published step is safe either way.
    pub fn prune(&self, keep: &CheckpointConfig, just_published: u64) -> Result<Vec<u64>, CheckpointError> {
        require_newest(&self.run, self.generation)?;
        let parent = self.run.checkpoints_dir();
        let mut steps: Vec<u64> =
            folder_names(&parent)?.iter().filter_map(|name| published_step(name)).collect();
        steps.retain(|&step| step <= just_published);
        steps.sort_unstable();
        let surplus = keep.surplus(&steps);
        surplus.iter().try_for_each(|&step| remove_published(&parent.join(step_folder(step))))?;
        self.remove_unfinished(|step| step <= just_published)?;
        Ok(surplus)
    }

    fn unfinished(&self, step: u64) -> PathBuf {
        self.run.checkpoints_dir().join(unfinished_folder(step))
    }

    fn remove_unfinished(&self, which: impl Fn(u64) -> bool) -> Result<(), CheckpointError> {
        let parent = self.run.checkpoints_dir();
        for name in folder_names(&parent)? {
            if unfinished_step(&name).is_some_and(&which) {
                remove_folder(&parent.join(name))?;
            }
        }
        Ok(())
    }

    /// Reads a rank's report and checks it against its file and this attempt.
    fn report(
        &self,
        folder: &Path,
        step: u64,
        rank: usize,
        world_size: usize,
    ) -> Result<FileEntry, CheckpointError> {
        let path = folder.join(report_file(rank));
        let wrong = |what: String| CheckpointError::RankReport { rank, path: path.clone(), what };
        let bytes = fs::read(&path).map_err(|error| wrong(error.to_string()))?;
        let report: RankReport = serde_json::from_slice(&bytes).map_err(|error| wrong(error.to_string()))?;
        let got = (report.step, report.generation, report.rank, report.world_size);
        let expected = (step, self.generation, rank, world_size);
        if got != expected {
            return Err(wrong(format!(
                "its step, generation, rank and world size are {got:?}, expected {expected:?}"
            )));
        }
        let (name, size_bytes) = (rank_file(rank), report.file.size_bytes);
        let length =
            fs::metadata(folder.join(&name)).map_err(|error| wrong(format!("{name}: {error}")))?.len();
        if (&report.file.name, size_bytes) != (&name, length) {
            let said = &report.file.name;
            return Err(wrong(format!("it speaks of {size_bytes} bytes in {said}; {name} has {length}")));
        }
        Ok(report.file)
    }
}

/// Bytes that this process may still write to the file system of a folder.
pub(crate) fn free_space(folder: &Path) -> io::Result<u64> {
    let space = rustix::fs::statvfs(folder)?;
    if space.f_blocks == 0 {
        return Ok(u64::MAX); // some network file systems do not tell
    }
    Ok(space.f_bavail.saturating_mul(space.f_frsize))
}

/// Removes a published checkpoint. Renamed first: a folder without `.tmp` is complete, also while it goes.
pub(super) fn remove_published(folder: &Path) -> Result<(), FileError> {
    set_aside(folder)?.map_or(Ok(()), |old| remove_folder(&old))
}

/// Renames a published folder so that nobody takes it for complete; nothing if it is not there.
fn set_aside(published: &Path) -> Result<Option<PathBuf>, FileError> {
    let name = published.file_name().unwrap_or_default().to_string_lossy();
    let old = published.with_file_name(format!("{name}{SET_ASIDE}{UNFINISHED}"));
    remove_folder(&old)?;
    match fs::rename(published, &old) {
        Ok(()) => Ok(Some(old)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(FileError::of("set aside", published)(error)),
    }
}

/// Removes a folder with all in it; one that is not there is fine.
fn remove_folder(folder: &Path) -> Result<(), FileError> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(FileError::of("remove the folder", folder)(error))
        }
        _ => Ok(()),
    }
}

/// Removes what does not belong into a published folder: the reports, now in the manifest, and
/// temporary files of writers that died.
fn remove_strays(folder: &Path, world_size: usize) -> Result<(), FileError> {
    let belongs: HashSet<String> = (0..world_size).map(rank_file).chain([MANIFEST.to_string()]).collect();
    for name in folder_names(folder)? {
        if !belongs.contains(&name) {
            let path = folder.join(&name);
            fs::remove_file(&path).map_err(FileError::of("remove", &path))?;
        }
    }
    Ok(())
}
