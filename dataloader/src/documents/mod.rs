//! The documents in text files, one at a time and in order. Owns what a document is in each kind of
//! file; refuses to know tokens and splits.

mod json;
mod parquet;

pub(crate) use json::Fields;

use crate::{DataError, PrepareError};
use std::borrow::Cow;
use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The kinds of files that are read.
pub const KNOWN_EXTENSIONS: [&str; 6] = [".txt", ".md", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"];

/// The key or column of a document's text where none is named.
pub const TEXT_KEY: &str = "text";

/// A longer line is refused: a compressed file of a few kilobytes could hold one that fits no memory.
const MAX_LINE_BYTES: u64 = 1 << 30;

/// A text file longer than this is read in parts where whole documents are not asked for.
const PART_BYTES: usize = 4 << 20;

/// How far around the wanted place a long text is searched for a line end to be cut at.
const CUT_WINDOW: u64 = 1 << 20;

/// What a file's documents are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// The file is the document; any bytes.
    Text,
    /// Every line that is not blank is an object with a text.
    JsonLines(Packing),
    /// Every row of a table.
    Parquet,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Packing {
    None,
    Gzip,
    Zstd,
}

impl Kind {
    fn of(file: &Path) -> Result<Kind, PrepareError> {
        let name = file.file_name().unwrap_or_default().to_string_lossy().to_ascii_lowercase();
        let (stem, packing) = match (name.strip_suffix(".gz"), name.strip_suffix(".zst")) {
            (Some(stem), _) => (stem, Packing::Gzip),
            (_, Some(stem)) => (stem, Packing::Zstd),
            _ => (&*name, Packing::None),
        };
        match (stem.rsplit_once('.').map(|(_, extension)| extension), packing) {
            (Some("txt" | "md"), Packing::None) => Ok(Kind::Text),
            (Some("jsonl"), packing) => Ok(Kind::JsonLines(packing)),
            (Some("parquet"), Packing::None) => Ok(Kind::Parquet),
            _ => Err(PrepareError::UnknownExtension { file: file.into() }),
        }
    }
}

/// Files of text in order, and how they are read.
#[derive(Debug, Clone)]
pub struct Inputs {
    /// The files; their extensions say what is in them.
    pub files: Vec<PathBuf>,
    /// The key of JSON objects, or the column of tables, that holds the text.
    pub text_key: String,
    /// Bytes of the files read so far, as they lie on disk.
    pub meter: Arc<AtomicU64>,
}

impl Inputs {
    /// These files, with the text where it usually is.
    pub fn new(files: &[PathBuf]) -> Inputs {
        Inputs { files: files.to_vec(), text_key: TEXT_KEY.into(), meter: Arc::default() }
    }

    /// Checks that there are files and that each one's kind is known, before any is read.
    ///
    /// # Errors
    /// No files, or an unknown kind.
    pub fn check(&self) -> Result<(), PrepareError> {
        if self.files.is_empty() {
            return Err(PrepareError::NoFiles);
        }
        self.files.iter().try_for_each(|file| Kind::of(file).map(drop))
    }

    /// Bytes of all files on disk; files that cannot be looked at count as empty until they are read.
    pub fn bytes(&self) -> u64 {
        self.files.iter().filter_map(|file| file.metadata().ok()).map(|file| file.len()).sum()
    }

    /// The names of the files, as manifests have them.
    pub(crate) fn names(&self) -> Vec<String> {
        self.files.iter().map(|file| file.display().to_string()).collect()
    }
}

/// One document as it was found, or a part of a long one.
#[derive(Debug)]
pub(crate) struct Raw {
    /// Number of its file.
    pub(crate) source: u64,
    /// Line, row, or 1 for a text file.
    pub(crate) record: u64,
    pub(crate) body: Body,
}

#[derive(Debug)]
pub(crate) enum Body {
    /// A whole text.
    Text(Vec<u8>),
    /// An object with the text and whatever else; not yet parsed.
    Json(Vec<u8>),
    /// A part of a long text.
    Part(Part),
}

/// A part of a text that is too long to be in memory.
#[derive(Debug)]
pub(crate) struct Part {
    pub(crate) text: Vec<u8>,
    /// Bytes of the whole.
    pub(crate) whole_bytes: u64,
    /// Whether it belongs to what is held out.
    pub(crate) held_out: bool,
    /// Whether it is the first of the document, or of what is held out of it.
    pub(crate) begins: bool,
    /// Whether the document, or the part of it before what is held out, ends with it.
    pub(crate) ends: bool,
}

impl Raw {
    pub(crate) fn bytes(&self) -> usize {
        match &self.body {
            Body::Text(text) | Body::Json(text) => text.len(),
            Body::Part(part) => part.text.len(),
        }
    }
}

/// The text of a document, or of a part of one.
///
/// # Errors
/// A line that holds no document.
pub(crate) fn whole_text<'a>(inputs: &Inputs, raw: &'a Raw) -> Result<Cow<'a, [u8]>, PrepareError> {
    match &raw.body {
        Body::Text(text) => Ok(Cow::Borrowed(text)),
        Body::Part(part) => Ok(Cow::Borrowed(&part.text)),
        Body::Json(line) => {
            let text = json::parse(line, &inputs.text_key).map_err(|what| {
                let file = inputs.files[raw.source as usize].clone();
                PrepareError::BadLine { file, line: raw.record, what }
            })?;
            Ok(match text {
                Cow::Borrowed(text) => Cow::Borrowed(text.as_bytes()),
                Cow::Owned(text) => Cow::Owned(text.into_bytes()),
            })
        }
    }
}

/// Finds the last place in a text where it may be cut.
type LastCut<'a> = &'a (dyn Fn(&[u8]) -> Option<usize> + Sync);

/// How long texts are cut into parts.
#[derive(Clone, Copy)]
pub(crate) struct Parts<'a> {
    /// Where a text may be cut: the last such place.
    pub(crate) last_cut: LastCut<'a>,
    /// The share at the end of each text that is held out.
    pub(crate) ends_fraction: Option<f64>,
}

/// Reads documents in order, from a place on.
pub(crate) struct Reader<'a> {
    inputs: &'a Inputs,
    parts: Option<Parts<'a>>,
    /// File and record of the next document.
    next: (usize, u64),
    open: Option<Open>,
    failed: bool,
}

/// The file that is being read.
enum Open {
    Lines { lines: Box<dyn BufRead + Send>, record: u64 },
    Rows(Box<parquet::Rows>),
    Parts(VecDeque<Stretch>, File),
}

/// Bytes of a long text that are read part by part.
struct Stretch {
    start: u64,
    end: u64,
    held_out: bool,
    begins: bool,
}

impl<'a> Reader<'a> {
    /// A reader whose first document is record `next.1` (from 1) of file `next.0`, or the first after.
    pub(crate) fn new(inputs: &'a Inputs, parts: Option<Parts<'a>>, next: (usize, u64)) -> Reader<'a> {
        Reader { inputs, parts, next, open: None, failed: false }
    }

    fn read(&mut self) -> Result<Option<Raw>, PrepareError> {
        loop {
            let (source, from) = self.next;
            let Some(file) = self.inputs.files.get(source) else { return Ok(None) };
            let source_number = source as u64;
            let Some(open) = &mut self.open else {
                if Kind::of(file)? == Kind::Text {
                    match self.open_text(file, from)? {
                        Some(text) => {
                            self.next = (source + 1, 1);
                            return Ok(Some(Raw {
                                source: source_number,
                                record: 1,
                                body: Body::Text(text),
                            }));
                        }
                        None if self.open.is_none() => self.next = (source + 1, 1),
                        None => {}
                    }
                } else {
                    self.open = Some(self.open_records(file)?);
                }
                continue;
            };
            let found = match open {
                Open::Lines { lines, record } => {
                    let line = next_line(lines.as_mut(), record).map_err(DataError::io(file, "read"))?;
                    line.map(|line| (*record, Body::Json(line)))
                }
                Open::Rows(rows) => rows.next_row()?.map(|(record, row)| (record, Body::Json(row))),
                Open::Parts(stretches, open) => {
                    let last_cut = self.parts.map(|parts| parts.last_cut);
                    next_part(stretches, open, last_cut, &self.inputs.meter)
                        .map_err(DataError::io(file, "read"))?
                        .map(|part| (1, Body::Part(part)))
                }
            };
            match found {
                Some((record, _)) if record < from => {}
                Some((record, body)) => return Ok(Some(Raw { source: source_number, record, body })),
                None => (self.open, self.next) = (None, (source + 1, 1)),
            }
        }
    }

    /// Reads a text, or begins to read a long one in parts. None and nothing open if it was seen before.
    fn open_text(&mut self, file: &Path, from: u64) -> Result<Option<Vec<u8>>, PrepareError> {
        let mut open = File::open(file).map_err(DataError::io(file, "read"))?;
        let bytes = open.metadata().map_err(DataError::io(file, "read"))?.len();
        if from > 1 {
            self.inputs.meter.fetch_add(bytes, Ordering::Relaxed);
            return Ok(None);
        }
        if let Some(parts) = self.parts.filter(|_| bytes > PART_BYTES as u64) {
            let cut = match parts.ends_fraction {
                Some(fraction) => {
                    long_end_start(&open, bytes, fraction).map_err(DataError::io(file, "read"))?
                }
                None => bytes,
            };
            let stretches = [
                Stretch { start: 0, end: cut, held_out: false, begins: true },
                Stretch { start: cut, end: bytes, held_out: true, begins: true },
            ];
            let stretches = stretches.into_iter().filter(|stretch| stretch.start < stretch.end).collect();
            self.open = Some(Open::Parts(stretches, open));
            return Ok(None);
        }
        let mut text = Vec::with_capacity(bytes as usize);
        open.read_to_end(&mut text).map_err(DataError::io(file, "read"))?;
        self.inputs.meter.fetch_add(bytes, Ordering::Relaxed);
        Ok(Some(text))
    }

    fn open_records(&self, file: &Path) -> Result<Open, PrepareError> {
        let meter = self.inputs.meter.clone();
        let open = File::open(file).map_err(DataError::io(file, "read"))?;
        let packing = match Kind::of(file)? {
            Kind::JsonLines(packing) => packing,
            _ => {
                let rows = parquet::Rows::open(file, open, &self.inputs.text_key, meter)?;
                return Ok(Open::Rows(Box::new(rows)));
            }
        };
        let metered = Metered { file: open, meter };
        let buffered = |read: Box<dyn Read + Send>| Box::new(BufReader::with_capacity(1 << 18, read));
        let lines = match packing {
            Packing::None => buffered(Box::new(metered)),
            Packing::Gzip => buffered(Box::new(flate2::bufread::MultiGzDecoder::new(
                BufReader::with_capacity(1 << 18, metered),
            ))),
            Packing::Zstd => {
                buffered(Box::new(zstd::Decoder::new(metered).map_err(DataError::io(file, "unpacked"))?))
            }
        };
        Ok(Open::Lines { lines, record: 0 })
    }
}

impl Iterator for Reader<'_> {
    type Item = Result<Raw, PrepareError>;

    /// The next document; after an error there is none.
    fn next(&mut self) -> Option<Result<Raw, PrepareError>> {
        if self.failed {
            return None;
        }
        let read = self.read();
        self.failed = read.is_err();
        read.transpose()
    }
}

/// Counts the bytes that are read.
struct Metered {
    file: File,
    meter: Arc<AtomicU64>,
}

impl Read for Metered {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read(buffer)?;
        self.meter.fetch_add(read as u64, Ordering::Relaxed);
        Ok(read)
    }
}

/// The next line that is not blank; `record` is its number, from 1.
fn next_line(lines: &mut dyn BufRead, record: &mut u64) -> io::Result<Option<Vec<u8>>> {
    let mut line = Vec::new();
    loop {
        line.clear();
        let read = io::Read::take(&mut *lines, MAX_LINE_BYTES).read_until(b'\n', &mut line)?;
        if read == 0 {
            return Ok(None);
        }
        *record += 1;
        if read as u64 == MAX_LINE_BYTES && line.last() != Some(&b'\n') {
            let what = format!("line {record} has more than {MAX_LINE_BYTES} bytes");
            return Err(io::Error::new(io::ErrorKind::InvalidData, what));
        }
        if !line.trim_ascii().is_empty() {
            return Ok(Some(line));
        }
    }
}

/// The next part of a long text.
fn next_part(
    stretches: &mut VecDeque<Stretch>,
    open: &File,
    last_cut: Option<LastCut<'_>>,
    meter: &AtomicU64,
) -> io::Result<Option<Part>> {
    let whole_bytes = open.metadata()?.len();
    let Some(Stretch { start, end, held_out, begins }) = stretches.front_mut() else { return Ok(None) };
    let left = *end - *start;
    let mut text = vec![0; (left as usize).min(PART_BYTES)];
    read_at(open, &mut text, *start)?;
    if (text.len() as u64) < left {
        // Without a place to cut at, between any two bytes is as good as another.
        let cut = last_cut.and_then(|last_cut| last_cut(&text)).unwrap_or(text.len());
        text.truncate(cut);
    }
    meter.fetch_add(text.len() as u64, Ordering::Relaxed);
    *start += text.len() as u64;
    let ends = *start == *end;
    let part = Part { text, whole_bytes, held_out: *held_out, begins: std::mem::take(begins), ends };
    if ends {
        stretches.pop_front();
    }
    Ok(Some(part))
}

/// Where the held-out end of a long text starts: by the rule of short ones, looked at through a window.
fn long_end_start(open: &File, bytes: u64, fraction: f64) -> io::Result<u64> {
    let held_out = (bytes as f64 * fraction).round() as u64;
    let wanted = bytes - held_out.min(bytes);
    let reach = (held_out / 2).min(CUT_WINDOW);
    let low = wanted - reach.min(wanted);
    let mut window = vec![0; (bytes.min(wanted + reach) - low) as usize];
    read_at(open, &mut window, low)?;
    Ok(low + crate::split::near(&window, (wanted - low) as usize) as u64)
}

fn read_at(open: &File, buffer: &mut [u8], offset: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(open, buffer, offset)
}
