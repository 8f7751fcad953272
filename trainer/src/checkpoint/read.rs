//! Finding and reading checkpoints: the newest that is proved good, and whole buffers from whatever
//! slices it is made of. Writes nothing, and does not trust what it reads.

use super::error::{CheckpointError, Damage, Damaged};
use super::manifest::{FileEntry, MANIFEST, Manifest, TrainState, layout_difference};
use super::slice::StateKind;
use super::{published_step, state_file, step_folder};
use crate::run_folder::{FileError, RunFolder, folder_names};
use configs::SegmentSpec;
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// No manifest is longer: that of a thousand ranks and a hundred layers has 40 MB.
const MAX_MANIFEST_BYTES: u64 = 1 << 30;

/// The checkpoints of a run, for reading.
#[derive(Debug, Clone)]
pub struct Checkpoints {
    folder: PathBuf,
}

impl Checkpoints {
    /// Those in a run's folder. Touches nothing; a run without any is fine.
    pub fn open(run_dir: &Path) -> Checkpoints {
        Checkpoints { folder: RunFolder::at(run_dir).checkpoints_dir() }
    }

    /// The steps that have a published checkpoint, oldest first. Says nothing about damage.
    ///
    /// # Errors
    /// A folder that cannot be listed.
    pub fn steps(&self) -> Result<Vec<u64>, CheckpointError> {
        let names = folder_names(&self.folder)?;
        let mut steps: Vec<u64> = names.iter().filter_map(|name| published_step(name)).collect();
        steps.sort_unstable();
        Ok(steps)
    }

    /// The folder of a step's checkpoint.
    pub fn folder(&self, step: u64) -> PathBuf {
        self.folder.join(step_folder(step))
    }

    /// The newest checkpoint all of whose bytes are what was written, or nothing when the run has
    /// none. Newer ones that are damaged are in [`Loaded::skipped`]. Reads every byte.
    ///
    /// # Errors
    /// `NoneGood` when there are checkpoints and all are damaged; a folder that cannot be listed.
    pub fn newest_good(&self) -> Result<Option<Loaded>, CheckpointError> {
        let mut skipped = Vec::new();
        for step in self.steps()?.into_iter().rev() {
            match self.verify(step) {
                Ok(loaded) => return Ok(Some(Loaded { skipped, ..loaded })),
                Err(damaged) => skipped.push(damaged),
            }
        }
        if skipped.is_empty() { Ok(None) } else { Err(none_good(&skipped)) }
    }

    /// Opens a step's checkpoint and proves every byte of it.
    ///
    /// # Errors
    /// The first damage found.
    pub fn verify(&self, step: u64) -> Result<Loaded, Damaged> {
        self.verify_share(step, 0, 1)
    }

    /// As `verify`, but proves only every `of`-th state file, beginning with number `share`: ranks divide
    /// the files among them.
    ///
    /// # Errors
    /// The first damage found.
    pub fn verify_share(&self, step: u64, share: usize, of: usize) -> Result<Loaded, Damaged> {
        let folder = self.folder(step);
        open(&folder, step, |file| file % of == share).map_err(|damage| Damaged { folder, damage })
    }

    /// Opens a step's checkpoint without reading its values: all that `verify` does but the hashes of
    /// the state files.
    ///
    /// # Errors
    /// `Damaged`.
    pub fn read(&self, step: u64) -> Result<Loaded, CheckpointError> {
        let folder = self.folder(step);
        open(&folder, step, |_| false).map_err(|damage| CheckpointError::Damaged(Damaged { folder, damage }))
    }
}

/// Where some values of a buffer lie.
#[derive(Debug, Clone)]
struct Piece {
    start: usize,
    len: usize,
    file: usize,
    at_byte: u64,
}

/// A checkpoint that has been opened.
#[derive(Debug)]
pub struct Loaded {
    folder: PathBuf,
    manifest: Manifest,
    skipped: Vec<Damaged>,
    /// The pieces of each buffer, in order, without gap or overlap.
    pieces: HashMap<(String, StateKind), Vec<Piece>>,
}

impl Loaded {
    /// Its folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Its manifest.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The run at its step.
    pub fn state(&self) -> &TrainState {
        &self.manifest.state
    }

    /// Newer checkpoints that were passed over because they are damaged, for the user to know.
    pub fn skipped(&self) -> &[Damaged] {
        &self.skipped
    }

    /// Whether it holds this model.
    ///
    /// # Errors
    /// `Layout`, with the first difference.
    pub fn check_layout(&self, segments: &[SegmentSpec]) -> Result<(), CheckpointError> {
        match layout_difference(&self.manifest.state.segments, segments) {
            None => Ok(()),
            Some(what) => Err(CheckpointError::Layout { folder: self.folder.clone(), what }),
        }
    }

    /// Fills a segment's whole flat buffer, `[numel]`.
    ///
    /// # Errors
    /// `Layout` for a buffer that the checkpoint does not have in this length; values that cannot be
    /// read.
    pub fn fill(&self, segment: &str, kind: StateKind, into: &mut [f32]) -> Result<(), CheckpointError> {
        let numel = self.numel(segment)?;
        if into.len() != numel {
            let what = format!("segment {segment} has {numel} elements, expected {}", into.len());
            return Err(CheckpointError::Layout { folder: self.folder.clone(), what });
        }
        self.fill_from(segment, kind, 0, into)
    }

    /// Fills what starts at element `start` of a segment's flat buffer, such as what a rank owns.
    ///
    /// # Errors
    /// As `fill`.
    pub fn fill_from(
        &self,
        segment: &str,
        kind: StateKind,
        start: usize,
        into: &mut [f32],
    ) -> Result<(), CheckpointError> {
        let numel = self.numel(segment)?;
        let end = start.checked_add(into.len()).filter(|&end| end <= numel).ok_or_else(|| {
            let what = format!("segment {segment} has {numel} elements, asked for {} at {start}", into.len());
            CheckpointError::Layout { folder: self.folder.clone(), what }
        })?;
        // The pieces make up the whole buffer: that was checked when it was opened.
        for piece in self.pieces.get(&(segment.to_string(), kind)).into_iter().flatten() {
            let (from, to) = (piece.start.max(start), (piece.start + piece.len).min(end));
            if from < to {
                let path = self.folder.join(&self.manifest.files[piece.file].name);
                let at_byte = piece.at_byte + ((from - piece.start) * size_of::<f32>()) as u64;
                File::open(&path)
                    .and_then(|mut file| {
                        state_file::read_values(&mut file, at_byte, &mut into[from - start..to - start])
                    })
                    .map_err(FileError::of("read", &path))?;
            }
        }
        Ok(())
    }

    fn numel(&self, segment: &str) -> Result<usize, CheckpointError> {
        let known = self.manifest.state.segments.iter().find(|spec| spec.name == segment);
        known.map(|spec| spec.numel).ok_or_else(|| {
            let what = format!("it has no segment {segment}");
            CheckpointError::Layout { folder: self.folder.clone(), what }
        })
    }
}

/// Opens a checkpoint, with the hashes of those state files that `proves` takes.
fn open(folder: &Path, step: u64, proves: impl Fn(usize) -> bool) -> Result<Loaded, Damage> {
    let (file, length) = open_file(folder, MANIFEST)?;
    if length > MAX_MANIFEST_BYTES {
        return Err(Damage::ManifestUnparsable { what: format!("it has {length} bytes") });
    }
    let mut bytes = Vec::new();
    file.take(MAX_MANIFEST_BYTES).read_to_end(&mut bytes).map_err(unreadable(MANIFEST))?;
    let manifest = Manifest::decode(&bytes)?;
    if manifest.state.step != step {
        let what = format!("it is of step {}, its folder of step {step}", manifest.state.step);
        return Err(Damage::Inconsistent { what });
    }

    let mut pieces: HashMap<(String, StateKind), Vec<Piece>> = HashMap::new();
    for (index, entry) in manifest.files.iter().enumerate() {
        let places = open_entry(folder, entry, proves(index))?;
        for (slice, at_byte) in entry.slices.iter().zip(places) {
            let piece = Piece { start: slice.start, len: slice.len, file: index, at_byte };
            pieces.entry((slice.segment.clone(), slice.kind)).or_default().push(piece);
        }
    }
    pieces.values_mut().for_each(|pieces| pieces.sort_unstable_by_key(|piece| piece.start));
    Ok(Loaded { folder: folder.to_path_buf(), manifest, skipped: Vec::new(), pieces })
}

/// Checks a state file against its entry, its hash if `proves`, and returns where each of its slices starts.
fn open_entry(folder: &Path, entry: &FileEntry, proves: bool) -> Result<Vec<u64>, Damage> {
    let name = &entry.name;
    let (mut file, got_bytes) = open_file(folder, name)?;
    if got_bytes != entry.size_bytes {
        return Err(Damage::WrongLength { file: name.clone(), expected_bytes: entry.size_bytes, got_bytes });
    }
    if proves {
        let got = state_file::hash(&mut file).map_err(unreadable(name))?;
        if got != entry.blake3 {
            return Err(Damage::WrongHash { file: name.clone(), expected: entry.blake3.clone(), got });
        }
    }
    state_file::read_header(&mut file, got_bytes, &entry.slices)
        .map_err(|what| Damage::Header { file: name.clone(), what })
}

/// Opens a plain file of the folder; its length comes with it.
fn open_file(folder: &Path, name: &str) -> Result<(File, u64), Damage> {
    let path = folder.join(name);
    // Asked before opening: opening a pipe would wait for ever.
    let length = match std::fs::metadata(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(Damage::Missing { file: name.to_string() });
        }
        found => found.map_err(unreadable(name))?,
    };
    if !length.is_file() {
        return Err(unreadable(name)(io::Error::other("it is not a plain file")));
    }
    let file = File::open(&path).map_err(unreadable(name))?;
    Ok((file, length.len()))
}

fn none_good(damaged: &[Damaged]) -> CheckpointError {
    CheckpointError::NoneGood(damaged.iter().map(ToString::to_string).collect())
}

fn unreadable(file: &str) -> impl FnOnce(io::Error) -> Damage {
    move |error| Damage::Unreadable { file: file.to_string(), error }
}
