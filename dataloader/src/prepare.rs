//! From text files to a folder with a data set for training and one for validation. Owns the two
//! passes, the folders and what is reported; refuses to know the formats of either end.

use crate::documents::{Flow, RawDocument, check_kinds, for_each};
use crate::split::{end_start, enough_documents, is_held_out};
use crate::{DataError, DataSetWriter, MANIFEST_NAME, Manifest, PrepareError, SplitRule, Tokenizer, files};
use std::fs;
use std::path::{Path, PathBuf};

/// How to prepare text.
#[derive(Debug, Clone)]
pub struct PrepareOptions {
    /// What makes the tokens.
    pub tokenizer: Tokenizer,
    /// Share of the text to hold out, in [0, 1); 0 writes no validation set.
    pub val_fraction: f64,
    /// Whether to replace an earlier preparation.
    pub force: bool,
    /// Tokens after which the next shard starts.
    pub max_shard_tokens: u64,
}

impl Default for PrepareOptions {
    fn default() -> PrepareOptions {
        PrepareOptions {
            tokenizer: Tokenizer::Bytes,
            val_fraction: 0.05,
            force: false,
            max_shard_tokens: crate::DEFAULT_MAX_SHARD_TOKENS,
        }
    }
}

/// What was prepared.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PrepareReport {
    /// Files read.
    pub files: u64,
    /// Documents with text in these files.
    pub documents: u64,
    /// Documents without any, which were passed over.
    pub skipped_documents: u64,
    /// Bytes of text.
    pub source_bytes: u64,
    /// How text was held out.
    pub rule: SplitRule,
    /// What is in OUT/train.
    pub train: SplitTotals,
    /// What is in OUT/val, if there is one.
    pub val: Option<SplitTotals>,
}

/// What is in one split.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SplitTotals {
    /// Shards.
    pub shards: u64,
    /// Documents; where ends are held out, a document counts in both splits.
    pub documents: u64,
    /// Tokens.
    pub tokens: u64,
    /// Bytes of text.
    pub source_bytes: u64,
}

/// Makes `out/train` and `out/val` from text files. The folder appears when it is complete; one that
/// is there is replaced with `force`, if all that it holds was made by a preparation.
///
/// # Errors
/// Unknown kinds of files, unreadable or bad ones (with file and line), text too short to share,
/// an output in the way. Nothing is left behind.
pub fn prepare(
    files: &[PathBuf],
    out: &Path,
    options: &PrepareOptions,
) -> Result<PrepareReport, PrepareError> {
    if files.is_empty() {
        return Err(PrepareError::NoFiles);
    }
    let fraction = options.val_fraction;
    if !(0.0..1.0).contains(&fraction) {
        return Err(PrepareError::ValFraction { got: fraction });
    }
    check_kinds(files)?;
    let folders = Folders::claim(out, options.force)?;
    let build = || {
        let rule = split_rule(files, fraction)?;
        let report = write(files, &folders.building, rule, options)?;
        folders.publish()?;
        Ok(report)
    };
    match build() {
        Ok(report) => Ok(report),
        Err(error) => {
            // The first error is the one to tell; a folder that cannot be removed is found next time.
            let _ = fs::remove_dir_all(&folders.building);
            Err(error)
        }
    }
}

/// Looks at just as many documents as it takes to know which rule to follow.
fn split_rule(files: &[PathBuf], fraction: f64) -> Result<SplitRule, PrepareError> {
    if fraction == 0.0 {
        return Ok(SplitRule::Nothing);
    }
    let enough = enough_documents(fraction);
    let mut documents = 0;
    for_each(files, |document| {
        documents += u64::from(!document.text.is_empty());
        Ok(if documents < enough { Flow::Continue } else { Flow::Stop })
    })?;
    Ok(if documents < enough { SplitRule::Ends } else { SplitRule::Documents })
}

fn write(
    files: &[PathBuf],
    folder: &Path,
    rule: SplitRule,
    options: &PrepareOptions,
) -> Result<PrepareReport, PrepareError> {
    let fraction = options.val_fraction;
    let create = |split: &str| {
        DataSetWriter::create(&folder.join(split), options.tokenizer.clone(), options.max_shard_tokens)
    };
    let mut train = create("train")?;
    let mut val = if rule == SplitRule::Nothing { None } else { Some(create("val")?) };
    let (mut documents, mut skipped_documents, mut source_bytes) = (0u64, 0u64, 0u64);
    for_each(files, |RawDocument { source, record, text }| {
        if text.is_empty() {
            skipped_documents += 1;
            return Ok(Flow::Continue);
        }
        let cut = match rule {
            SplitRule::Nothing => text.len(),
            SplitRule::Documents if is_held_out(documents, fraction) => 0,
            SplitRule::Documents => text.len(),
            SplitRule::Ends => end_start(text, fraction),
        };
        train.push(source, record, &text[..cut])?;
        if let Some(val) = &mut val {
            val.push(source, record, &text[cut..])?;
        }
        documents += 1;
        source_bytes += text.len() as u64;
        Ok(Flow::Continue)
    })?;
    if documents == 0 {
        return Err(PrepareError::NoText { files: files.len() });
    }

    let sources: Vec<String> = files.iter().map(|file| file.display().to_string()).collect();
    let train = totals("train", &train.finish(sources.clone())?, fraction)?;
    let val = val.map(|val| totals("val", &val.finish(sources)?, fraction)).transpose()?;
    let files = files.len() as u64;
    Ok(PrepareReport { files, documents, skipped_documents, source_bytes, rule, train, val })
}

fn totals(split: &'static str, manifest: &Manifest, val_fraction: f64) -> Result<SplitTotals, PrepareError> {
    if manifest.tokens == 0 {
        return Err(PrepareError::EmptySplit { split, val_fraction });
    }
    Ok(SplitTotals {
        shards: manifest.shards.len() as u64,
        documents: manifest.documents,
        tokens: manifest.tokens,
        source_bytes: manifest.source_bytes,
    })
}

/// The output and the folder beside it in which it is built.
struct Folders {
    out: PathBuf,
    building: PathBuf,
}

impl Folders {
    /// Makes the folder to build in, if the output may be written at all.
    fn claim(out: &Path, force: bool) -> Result<Folders, PrepareError> {
        // A link to a folder elsewhere stays a link: what it leads to is replaced.
        let out = out.canonicalize().unwrap_or_else(|_| out.to_path_buf());
        if out.file_name().is_none() {
            return Err(PrepareError::OutName { out });
        }
        if is_occupied(&out)? {
            if !force {
                return Err(PrepareError::OutExists { out });
            }
            require_ours(&out)?;
        }
        let building = files::temporary(&out);
        if building.exists() {
            if !force {
                return Err(PrepareError::Unfinished { folder: building });
            }
            require_ours(&building)?;
            fs::remove_dir_all(&building).map_err(DataError::io(&building, "removed"))?;
        }
        fs::create_dir_all(files::parent(&out)).map_err(DataError::io(files::parent(&out), "created"))?;
        fs::create_dir(&building).map_err(DataError::io(&building, "created"))?;
        Ok(Folders { out, building })
    }

    /// Puts what was built in the output's place.
    fn publish(&self) -> Result<(), PrepareError> {
        files::sync_folder(&self.building)?;
        if self.out.exists() {
            fs::remove_dir_all(&self.out).map_err(DataError::io(&self.out, "removed"))?;
        }
        fs::rename(&self.building, &self.out)
            .map_err(DataError::io(&self.out, "renamed from its temporary name"))?;
        Ok(files::sync_folder(files::parent(&self.out))?)
    }
}

fn is_occupied(folder: &Path) -> Result<bool, DataError> {
    match fs::read_dir(folder) {
        Ok(mut entries) => Ok(entries.next().is_some()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(source) => Err(DataError::Io { file: folder.into(), action: "used as a folder", source }),
    }
}

/// Whether all that a folder holds was made by a preparation: nothing else is ever removed.
fn require_ours(folder: &Path) -> Result<(), PrepareError> {
    for split in entries(folder)? {
        let name = split.file_name().unwrap_or_default();
        if (name != "train" && name != "val") || !split.is_dir() {
            return Err(PrepareError::OutHoldsOtherThings { stranger: split });
        }
        for file in entries(&split)? {
            let name = file.file_name().unwrap_or_default().to_string_lossy();
            let name = name.strip_suffix(".tmp").unwrap_or(&name);
            let is_shard = name.starts_with("shard-") && name.ends_with(".tokens");
            if name != MANIFEST_NAME && !is_shard {
                return Err(PrepareError::OutHoldsOtherThings { stranger: file });
            }
        }
    }
    Ok(())
}

fn entries(folder: &Path) -> Result<Vec<PathBuf>, DataError> {
    let read = || -> std::io::Result<Vec<PathBuf>> {
        fs::read_dir(folder)?.map(|entry| entry.map(|entry| entry.path())).collect()
    };
    read().map_err(DataError::io(folder, "listed"))
}
