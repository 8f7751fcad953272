//! Which documents are worth training on: filters, a quality classifier, removal of duplicates and of what
//! evaluation sets hold. Owns the order of the stages and what is reported of them; refuses to know tokens.

mod classify;
mod contamination;
mod dedup;
mod filter;
mod report;

pub use classify::{Classifier, ClassifierReport, Gate, train_classifier};
pub use contamination::Contamination;
pub use dedup::DedupOptions;
pub(crate) use dedup::Duplicates;
pub use filter::Filter;
pub use report::{CurationReport, Dropped, Example};

use crate::documents::{Body, Fields, Inputs, Raw, Reader, whole_text};
use crate::pipeline::{self, Flow};
use crate::{PrepareError, files};
use std::borrow::Cow;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

/// The stages, in the order in which they are applied; each is left out if it is not asked for.
#[derive(Debug, Clone, Default)]
pub struct Curation {
    /// By metadata and simple rules.
    pub filter: Option<Filter>,
    /// By the classifier's score.
    pub gate: Option<Gate>,
    /// Without what evaluation sets hold.
    pub contamination: Option<Contamination>,
    /// Without duplicates of what came before.
    pub dedup: Option<DedupOptions>,
}

/// A document as the stages see it.
pub(crate) struct Document<'a> {
    /// With U+FFFD for what is no UTF-8.
    pub(crate) text: Cow<'a, str>,
    /// The other values of its object, where a stage wants them.
    pub(crate) fields: Fields,
}

impl<'a> Document<'a> {
    /// A document as it was read.
    ///
    /// # Errors
    /// A line that holds none.
    pub(crate) fn of(inputs: &Inputs, raw: &'a Raw, with_fields: bool) -> Result<Document<'a>, PrepareError> {
        let text = match whole_text(inputs, raw)? {
            Cow::Borrowed(text) => String::from_utf8_lossy(text),
            Cow::Owned(text) => Cow::Owned(String::from_utf8_lossy(&text).into_owned()),
        };
        let fields = match &raw.body {
            // The line was read as an object before.
            Body::Json(line) if with_fields => serde_json::from_slice(line).unwrap_or_default(),
            _ => Fields::default(),
        };
        Ok(Document { text, fields })
    }
}

impl Curation {
    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.filter.is_none() && self.gate.is_none() && self.contamination.is_none() && self.dedup.is_none()
    }

    /// All that decides what is kept, in words.
    pub(crate) fn described(&self) -> String {
        let Curation { filter, gate, contamination, dedup } = self;
        let gate = gate.as_ref().map(Gate::described);
        let contamination = contamination.as_ref().map(Contamination::described);
        format!("{filter:?} {gate:?} {contamination:?} {dedup:?}")
    }

    /// Why a document is dropped, looked at by itself.
    pub(crate) fn verdict(&self, document: &Document<'_>) -> Option<Dropped> {
        None.or_else(|| self.filter.as_ref()?.verdict(document))
            .or_else(|| self.gate.as_ref()?.verdict(document))
            .or_else(|| self.contamination.as_ref()?.verdict(document))
    }

    /// Whether stages look at other values than the text.
    pub(crate) fn wants_fields(&self) -> bool {
        self.filter.as_ref().is_some_and(Filter::wants_fields)
            || self.dedup.as_ref().is_some_and(|dedup| dedup.by.is_some())
    }

    /// Which documents duplicate earlier ones: for each, in order, whether and how. Empty without a stage
    /// that asks for it. `scratch` is a folder for what does not fit memory.
    ///
    /// # Errors
    /// Those of reading, and of the file system.
    pub(crate) fn duplicates(
        &self,
        inputs: &Inputs,
        threads: usize,
        scratch: &Path,
    ) -> Result<Duplicates, PrepareError> {
        match &self.dedup {
            Some(options) => dedup::find(inputs, self, options, threads, scratch),
            None => Ok(Duplicates::default()),
        }
    }
}

/// Reads documents and writes those that are kept, one JSON object a line, as they were read (texts as
/// `{"text": ...}`). The file is compressed by its name (`.jsonl`, `.jsonl.gz`, `.jsonl.zst`); it is complete,
/// or not there.
///
/// # Errors
/// Those of reading and of writing.
pub fn curate(
    inputs: &Inputs,
    curation: &Curation,
    out: &Path,
    threads: usize,
) -> Result<CurationReport, PrepareError> {
    inputs.check()?;
    let temporary = files::temporary(out);
    let scratch = temporary.with_extension("scratch");
    let report = write(inputs, curation, (out, &temporary, &scratch), threads);
    if report.is_err() {
        // The first error is the one to tell; what cannot be removed is overwritten next time.
        let _ = std::fs::remove_file(&temporary);
        let _ = std::fs::remove_dir_all(&scratch);
    }
    report
}

fn write(
    inputs: &Inputs,
    curation: &Curation,
    (out, temporary, scratch): (&Path, &Path, &Path),
    threads: usize,
) -> Result<CurationReport, PrepareError> {
    let duplicates = curation.duplicates(inputs, threads, scratch)?;
    inputs.meter.store(0, std::sync::atomic::Ordering::Relaxed);

    let failed = |action| crate::DataError::io(out, action);
    let file = File::create(temporary).map_err(crate::DataError::io(temporary, "created"))?;
    let mut lines = packed(out, file).map_err(failed("written"))?;
    let mut report = CurationReport::default();
    let worker = || {
        move |batch: Vec<Raw>| {
            let judge = |raw: Raw| {
                let document = Document::of(inputs, &raw, curation.wants_fields())?;
                let verdict = curation.verdict(&document);
                let start = CurationReport::start(&document.text);
                let line = match (&verdict, &raw.body) {
                    (Some(_), _) => Vec::new(),
                    (None, Body::Json(line)) => line.trim_ascii_end().to_vec(),
                    (None, _) => serde_json::json!({ "text": document.text }).to_string().into_bytes(),
                };
                Ok((raw.source, raw.record, line, verdict, start))
            };
            batch.into_iter().map(judge).collect::<Result<Vec<_>, PrepareError>>()
        }
    };
    pipeline::run(Reader::new(inputs, None, (0, 1)), threads, worker, |batch| {
        for (source, record, line, verdict, start) in batch {
            let verdict = verdict.or_else(|| duplicates.verdict(report.read));
            report.count(verdict.as_ref(), || {
                (inputs.files[source as usize].display().to_string(), record, start)
            });
            if verdict.is_none() {
                lines.write_all(&line).and_then(|()| lines.write_all(b"\n")).map_err(failed("written"))?;
            }
        }
        Ok(Flow::Continue)
    })?;
    let file = lines.finish().map_err(failed("written"))?;
    files::publish(&file, out)?;
    Ok(report)
}

/// A file that is compressed by its name.
enum Packed {
    Plain(BufWriter<File>),
    Gzip(flate2::write::GzEncoder<BufWriter<File>>),
    Zstd(zstd::Encoder<'static, BufWriter<File>>),
}

fn packed(name: &Path, file: File) -> io::Result<Packed> {
    let file = BufWriter::with_capacity(1 << 20, file);
    Ok(match name.extension().and_then(|extension| extension.to_str()) {
        Some("gz") => Packed::Gzip(flate2::write::GzEncoder::new(file, flate2::Compression::default())),
        Some("zst") => Packed::Zstd(zstd::Encoder::new(file, 3)?),
        _ => Packed::Plain(file),
    })
}

impl Packed {
    fn finish(self) -> io::Result<File> {
        let file = match self {
            Packed::Plain(file) => file,
            Packed::Gzip(encoder) => encoder.finish()?,
            Packed::Zstd(encoder) => encoder.finish()?,
        };
        file.into_inner().map_err(io::IntoInnerError::into_error)
    }
}

impl Write for Packed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Packed::Plain(file) => file.write(bytes),
            Packed::Gzip(encoder) => encoder.write(bytes),
            Packed::Zstd(encoder) => encoder.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Packed::Plain(file) => file.flush(),
            Packed::Gzip(encoder) => encoder.flush(),
            Packed::Zstd(encoder) => encoder.flush(),
        }
    }
}
