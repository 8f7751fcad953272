//! From text files to a folder with a data set for training and one for validation: a pass over the first
//! documents to know how text is held out, and one over all, on every core, in bounded memory. Owns the
//! passes, the folders, how a killed preparation goes on and what is reported; refuses to know the formats
//! of either end.

use crate::curate::{Curation, CurationReport, Document, Dropped, Duplicates};
use crate::documents::{Body, Inputs, Part, Parts, Raw, Reader, whole_text};
use crate::pipeline::{self, Flow};
use crate::shard_pairs::{Finished, ShardPairs, Split};
use crate::split::{end_start, enough_documents, is_held_out};
use crate::tokenizer::is_table_name;
use crate::{
    DataError, Encoder, MANIFEST_NAME, Manifest, PrepareError, SplitRule, Tokenizer, all_threads, files,
};
use serde::{Deserialize, Serialize};
use std::fs::{self, File, TryLockError};
use std::ops::Range;
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
    /// Threads that tokenise.
    pub threads: usize,
    /// What is left out. With it, whole documents are in memory.
    pub curation: Curation,
}

impl Default for PrepareOptions {
    fn default() -> PrepareOptions {
        PrepareOptions {
            tokenizer: Tokenizer::Bytes,
            val_fraction: 0.05,
            force: false,
            max_shard_tokens: crate::DEFAULT_MAX_SHARD_TOKENS,
            threads: all_threads(),
            curation: Curation::default(),
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
    /// What was left out, where there was something to leave out.
    pub curation: Option<CurationReport>,
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

/// Makes `out/train` and `out/val` from text. The folder appears when it is complete; one that is there
/// is replaced with `force`, if all that it holds was made by a preparation. A preparation that was killed
/// goes on after the last shards that it had finished, and ends with the same bytes.
///
/// # Errors
/// Unknown kinds of files, unreadable or bad ones (with file and line), text too short to share,
/// an output in the way. Nothing is left behind, but for finished shards where the system failed.
pub fn prepare(inputs: &Inputs, out: &Path, options: &PrepareOptions) -> Result<PrepareReport, PrepareError> {
    inputs.check()?;
    let fraction = options.val_fraction;
    if !(0.0..1.0).contains(&fraction) {
        return Err(PrepareError::ValFraction { got: fraction });
    }
    let (folders, mut progress) = Folders::claim(out, options.force, fingerprint(inputs, options))?;
    let mut build = || {
        let rule = match progress.rule {
            Some(rule) => rule,
            None => split_rule(inputs, fraction, &options.curation)?,
        };
        progress.rule = Some(rule);
        let report = write(inputs, &folders.building, rule, options, &mut progress)?;
        folders.publish()?;
        Ok(report)
    };
    let report = build();
    let system_failed = matches!(report, Err(PrepareError::Data(DataError::Io { .. })));
    if report.is_err() && (!system_failed || progress.finished.is_empty()) {
        // The first error is the one to tell; a folder that cannot be removed is found next time.
        let _ = fs::remove_dir_all(&folders.building);
    }
    report
}

/// Looks at just as many documents as it takes to know which rule to follow.
fn split_rule(inputs: &Inputs, fraction: f64, curation: &Curation) -> Result<SplitRule, PrepareError> {
    if fraction == 0.0 {
        return Ok(SplitRule::Nothing);
    }
    let enough = enough_documents(fraction);
    let mut documents = 0;
    let whole = |text: &[u8]| Some(text.len());
    let parts = curation.is_empty().then_some(Parts { last_cut: &whole, ends_fraction: None });
    for raw in Reader::new(inputs, parts, (0, 1)) {
        let raw = raw?;
        if !curation.is_empty()
            && curation.verdict(&Document::of(inputs, &raw, curation.wants_fields())?).is_some()
        {
            continue;
        }
        let is_document = match &raw.body {
            Body::Part(part) => part.begins,
            _ => !whole_text(inputs, &raw)?.is_empty(),
        };
        documents += u64::from(is_document);
        if documents >= enough {
            return Ok(SplitRule::Documents);
        }
    }
    Ok(SplitRule::Ends)
}

/// How far a preparation has come; written whenever shards are finished.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Progress {
    /// What is prepared, and how.
    fingerprint: String,
    rule: Option<SplitRule>,
    documents: u64,
    skipped_documents: u64,
    source_bytes: u64,
    curation: CurationReport,
    /// File and record of the first document that is in no finished shard.
    next: (usize, u64),
    finished: Finished,
}

impl Progress {
    fn save(&self, folder: &Path) -> Result<(), DataError> {
        let json = serde_json::to_vec(self).expect("numbers and strings have a JSON form");
        files::write(&folder.join(PROGRESS_NAME), &json)
    }

    /// What an earlier preparation of the same has written down; none for any other.
    fn load(folder: &Path, fingerprint: &str) -> Option<Progress> {
        let json = fs::read(folder.join(PROGRESS_NAME)).ok()?;
        let progress: Progress = serde_json::from_slice(&json).ok()?;
        (progress.fingerprint == fingerprint).then_some(progress)
    }
}

/// Files that a preparation has beside its shards until it is complete.
const PROGRESS_NAME: &str = "progress.json";
const LOCK_NAME: &str = "lock";
const SCRATCH_NAME: &str = "scratch";

/// All that decides what a preparation writes, as a digest.
fn fingerprint(inputs: &Inputs, options: &PrepareOptions) -> String {
    let mut hasher = blake3::Hasher::new();
    let mut add = |value: &[u8]| {
        hasher.update(&(value.len() as u64).to_le_bytes()).update(value);
    };
    for file in &inputs.files {
        add(file.as_os_str().as_encoded_bytes());
        // A file that cannot be looked at is refused when it is read.
        if let Ok(metadata) = file.metadata() {
            let modified = metadata.modified().ok();
            let since = modified.and_then(|at| at.duration_since(std::time::UNIX_EPOCH).ok());
            add(&metadata.len().to_le_bytes());
            add(&since.unwrap_or_default().as_nanos().to_le_bytes());
        }
    }
    let PrepareOptions { tokenizer, val_fraction, force: _, max_shard_tokens, threads: _, curation } =
        options;
    add(inputs.text_key.as_bytes());
    add(tokenizer.id().as_bytes());
    add(&tokenizer.digest());
    add(&val_fraction.to_le_bytes());
    add(&max_shard_tokens.to_le_bytes());
    add(curation.described().as_bytes());
    files::hex(hasher.finalize().as_bytes())
}

/// A document, or a part of one, as tokens.
struct Encoded {
    source: u64,
    record: u64,
    /// Of train and val.
    pieces: [Piece; 2],
    /// Of a part of a long text.
    part: Option<LongPart>,
    /// Why it is left out, where something is.
    dropped: Option<Dropped>,
    /// Its first characters, where something is left out.
    start: String,
}

/// What is known of a part of a long text.
#[derive(Clone, Copy)]
struct LongPart {
    /// Bytes of the whole document, if this is where it starts.
    starts: Option<u64>,
    /// Whether it is the first in its split.
    begins: bool,
}

#[derive(Default)]
struct Piece {
    bytes: u64,
    tokens: Range<usize>,
}

/// A batch of them with their tokens.
struct Tokens {
    documents: Vec<Encoded>,
    tokens: Vec<u32>,
}

/// What a thread does to documents.
struct Worker<'a> {
    inputs: &'a Inputs,
    encoder: Encoder<'a>,
    curation: &'a Curation,
    end_of_text: u32,
    /// The share at the end of each document that is held out.
    ends_fraction: Option<f64>,
}

impl Worker<'_> {
    fn encode(&mut self, batch: Vec<Raw>) -> Result<Tokens, PrepareError> {
        let mut out = Tokens { documents: Vec::with_capacity(batch.len()), tokens: Vec::new() };
        for raw in batch {
            let (source, record) = (raw.source, raw.record);
            let mut pieces = [Piece::default(), Piece::default()];
            let mut part = None;
            let (dropped, start) = self.verdict(&raw)?;
            match &raw.body {
                &Body::Part(Part { ref text, whole_bytes, held_out, begins, ends }) => {
                    pieces[usize::from(held_out)] = self.piece(text, ends, &mut out.tokens);
                    // What is held out of it comes behind the rest.
                    part = Some(LongPart { starts: (begins && !held_out).then_some(whole_bytes), begins });
                }
                _ if dropped.is_some() => {}
                _ => pieces = self.whole(&whole_text(self.inputs, &raw)?, &mut out.tokens),
            }
            out.documents.push(Encoded { source, record, pieces, part, dropped, start });
        }
        Ok(out)
    }

    fn verdict(&self, raw: &Raw) -> Result<(Option<Dropped>, String), PrepareError> {
        if self.curation.is_empty() {
            return Ok((None, String::new()));
        }
        let document = Document::of(self.inputs, raw, self.curation.wants_fields())?;
        Ok((self.curation.verdict(&document), CurationReport::start(&document.text)))
    }

    fn whole(&mut self, text: &[u8], tokens: &mut Vec<u32>) -> [Piece; 2] {
        let cut = self.ends_fraction.map_or(text.len(), |fraction| end_start(text, fraction));
        let (train, val) = text.split_at(cut);
        [train, val]
            .map(|text| if text.is_empty() { Piece::default() } else { self.piece(text, true, tokens) })
    }

    fn piece(&mut self, text: &[u8], ends: bool, tokens: &mut Vec<u32>) -> Piece {
        let from = tokens.len();
        self.encoder.encode(text, tokens);
        tokens.extend(ends.then_some(self.end_of_text));
        Piece { bytes: text.len() as u64, tokens: from..tokens.len() }
    }
}

fn write(
    inputs: &Inputs,
    folder: &Path,
    rule: SplitRule,
    options: &PrepareOptions,
    progress: &mut Progress,
) -> Result<PrepareReport, PrepareError> {
    let PrepareOptions { tokenizer, val_fraction: fraction, max_shard_tokens, threads, curation, .. } =
        options;
    let duplicates = curation.duplicates(inputs, *threads, &folder.join(SCRATCH_NAME))?;
    inputs.meter.store(0, std::sync::atomic::Ordering::Relaxed);
    let splits: &[Split] =
        if rule == SplitRule::Nothing { &[Split::Train] } else { &[Split::Train, Split::Val] };
    let finished = progress.finished.clone();
    let shards = ShardPairs::create(folder, splits, tokenizer, *max_shard_tokens, finished)?;
    progress.save(folder)?;

    let ends_fraction = (rule == SplitRule::Ends).then_some(*fraction);
    let last_cut = |text: &[u8]| tokenizer.last_cut(text);
    let parts = curation.is_empty().then_some(Parts { last_cut: &last_cut, ends_fraction });
    let reader = Reader::new(inputs, parts, progress.next);
    let worker = || {
        let (encoder, end_of_text) = (tokenizer.encoder(), tokenizer.end_of_text());
        let mut worker = Worker { inputs, encoder, curation, end_of_text, ends_fraction };
        move |batch| worker.encode(batch)
    };
    let now = progress.clone();
    let mut sink = Sink {
        inputs,
        folder,
        fraction: *fraction,
        rule,
        duplicates,
        shards,
        now,
        saved: progress,
        held_out: false,
    };
    pipeline::run(reader, *threads, worker, |batch: Tokens| {
        batch.documents.into_iter().try_for_each(|document| sink.take(document, &batch.tokens))?;
        Ok(Flow::Continue)
    })?;
    let Sink { shards, now, .. } = sink;
    if now.documents == 0 {
        return Err(PrepareError::NoText { files: inputs.files.len() });
    }

    let manifests = shards.finish(splits, &inputs.names())?;
    let train = totals("train", &manifests[0], *fraction)?;
    let val = manifests.get(1).map(|manifest| totals("val", manifest, *fraction)).transpose()?;
    let Progress { documents, skipped_documents, source_bytes, curation: left_out, .. } = now;
    let curation = (!curation.is_empty()).then_some(left_out);
    let files = inputs.files.len() as u64;
    Ok(PrepareReport { files, documents, skipped_documents, source_bytes, curation, rule, train, val })
}

/// Where documents go, in order: counted, held out or not, into shards.
struct Sink<'a> {
    inputs: &'a Inputs,
    folder: &'a Path,
    fraction: f64,
    rule: SplitRule,
    duplicates: Duplicates,
    shards: ShardPairs,
    now: Progress,
    /// What is written down: as of the last finished shards.
    saved: &'a mut Progress,
    /// Whether the present document is held out as a whole.
    held_out: bool,
}

impl Sink<'_> {
    fn take(&mut self, mut document: Encoded, tokens: &[u32]) -> Result<(), PrepareError> {
        let now = &mut self.now;
        let name = || self.inputs.files[document.source as usize].display().to_string();
        let dropped = document.dropped.take().or_else(|| self.duplicates.verdict(now.curation.read));
        if let Some(dropped) = dropped {
            now.curation.count(Some(&dropped), || (name(), document.record, document.start.clone()));
            return Ok(());
        }
        let starts = document.part.is_none_or(|part| part.starts.is_some());
        if self.rule == SplitRule::Documents {
            if starts {
                self.held_out = is_held_out(now.documents, self.fraction);
            }
            if self.held_out {
                document.pieces.swap(0, 1);
            }
        }
        if starts {
            now.next = (document.source as usize, document.record);
            if let Some(finished) = self.shards.make_room(document.most_tokens())? {
                now.finished = finished.clone();
                *self.saved = now.clone();
                now.save(self.folder)?;
            }
            now.curation.count(None, || (name(), document.record, String::new()));
            let is_empty = document.most_tokens() == [0, 0];
            now.skipped_documents += u64::from(is_empty);
            now.documents += u64::from(!is_empty);
        }
        now.source_bytes += document.pieces.iter().map(|piece| piece.bytes).sum::<u64>();
        push(&mut self.shards, &document, tokens)
    }
}

impl Encoded {
    /// How many tokens the document has in each split, or for a long one at most.
    fn most_tokens(&self) -> [u64; 2] {
        let most = |piece: &Piece| match self.part.and_then(|part| part.starts) {
            Some(bytes) if piece.bytes > 0 => bytes + 1,
            _ => piece.tokens.len() as u64,
        };
        self.pieces.each_ref().map(most)
    }
}

fn push(shards: &mut ShardPairs, document: &Encoded, tokens: &[u32]) -> Result<(), PrepareError> {
    let &Encoded { source, record, .. } = document;
    for (split, piece) in [Split::Train, Split::Val].into_iter().zip(&document.pieces) {
        if piece.bytes == 0 {
            continue;
        }
        let (shard, tokens) = (shards.shard(split)?, &tokens[piece.tokens.clone()]);
        if document.part.is_none_or(|part| part.begins) {
            shard.begin(source, record);
        }
        shard.extend(piece.bytes, tokens)?;
    }
    Ok(())
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
    /// Held while the preparation runs: two must not write into one folder.
    _lock: File,
}

impl Folders {
    /// Makes the folder to build in, if the output may be written at all, or finds the one in which the
    /// same preparation was interrupted.
    fn claim(out: &Path, force: bool, fingerprint: String) -> Result<(Folders, Progress), PrepareError> {
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
        fs::create_dir_all(files::parent(&out)).map_err(DataError::io(files::parent(&out), "created"))?;
        let mut progress = Progress { fingerprint, next: (0, 1), ..Progress::default() };
        if building.exists() {
            let earlier = Progress::load(&building, &progress.fingerprint);
            if earlier.is_none() && !force {
                return Err(PrepareError::Unfinished { folder: building });
            }
            require_ours(&building)?;
            drop(lock(&building)?); // of one that runs, nothing is removed
            match earlier {
                Some(earlier) => progress = earlier,
                None => fs::remove_dir_all(&building).map_err(DataError::io(&building, "removed"))?,
            }
        }
        fs::create_dir_all(&building).map_err(DataError::io(&building, "created"))?;
        let lock = lock(&building)?;
        progress.save(&building)?;
        Ok((Folders { out, building, _lock: lock }, progress))
    }

    /// Puts what was built in the output's place.
    fn publish(&self) -> Result<(), PrepareError> {
        for name in [PROGRESS_NAME, LOCK_NAME] {
            let file = self.building.join(name);
            fs::remove_file(&file).map_err(DataError::io(&file, "removed"))?;
        }
        files::sync_folder(&self.building)?;
        if self.out.exists() {
            fs::remove_dir_all(&self.out).map_err(DataError::io(&self.out, "removed"))?;
        }
        fs::rename(&self.building, &self.out)
            .map_err(DataError::io(&self.out, "renamed from its temporary name"))?;
        Ok(files::sync_folder(files::parent(&self.out))?)
    }
}

/// The lock of a folder that is being built.
fn lock(building: &Path) -> Result<File, PrepareError> {
    let file = building.join(LOCK_NAME);
    let open = File::create(&file).map_err(DataError::io(&file, "created"))?;
    match open.try_lock() {
        Ok(()) => Ok(open),
        Err(TryLockError::WouldBlock) => Err(PrepareError::Running { folder: building.into() }),
        Err(TryLockError::Error(source)) => Err(DataError::Io { file, action: "locked", source }.into()),
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
        if [PROGRESS_NAME, LOCK_NAME, SCRATCH_NAME, "progress.json.tmp"].iter().any(|ours| name == *ours) {
            continue;
        }
        if (name != "train" && name != "val") || !split.is_dir() {
            return Err(PrepareError::OutHoldsOtherThings { stranger: split });
        }
        for file in entries(&split)? {
            let name = file.file_name().unwrap_or_default().to_string_lossy();
            let name = name.strip_suffix(".tmp").unwrap_or(&name);
            let is_shard = name.starts_with("shard-") && name.ends_with(".tokens");
            if name != MANIFEST_NAME && !is_shard && !is_table_name(name) {
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
