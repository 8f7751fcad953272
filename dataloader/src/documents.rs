//! The documents in text files, one at a time. Owns what a document is in each kind of file;
//! refuses to know tokens and splits.

use crate::{DataError, PrepareError};
use serde::Deserialize;
use std::borrow::Cow;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

/// The kinds of files that are read.
pub const KNOWN_EXTENSIONS: [&str; 2] = [".txt", ".jsonl"];

/// What a file's documents are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// The file is the document; any bytes.
    Text,
    /// Every line that is not blank is an object with a `text`.
    JsonLines,
}

impl Kind {
    fn of(file: &Path) -> Result<Kind, PrepareError> {
        let extension = file.extension().map(|extension| extension.to_string_lossy().to_ascii_lowercase());
        match extension.as_deref() {
            Some("txt") => Ok(Kind::Text),
            Some("jsonl") => Ok(Kind::JsonLines),
            _ => Err(PrepareError::UnknownExtension { file: file.into() }),
        }
    }
}

/// One document: number of its file, record in it from 1, and text.
pub(crate) struct RawDocument<'a> {
    pub(crate) source: u64,
    pub(crate) record: u64,
    pub(crate) text: &'a [u8],
}

/// Checks that every file's kind is known, before any is read.
pub(crate) fn check_kinds(files: &[PathBuf]) -> Result<(), PrepareError> {
    files.iter().try_for_each(|file| Kind::of(file).map(drop))
}

/// Calls `each` for every document of every file, in order, until it says to stop. One document is
/// in memory at a time.
///
/// # Errors
/// Unreadable files, bad lines, and what `each` returns.
pub(crate) fn for_each(
    files: &[PathBuf],
    mut each: impl FnMut(RawDocument<'_>) -> Result<Flow, PrepareError>,
) -> Result<(), PrepareError> {
    for (source, file) in files.iter().enumerate() {
        let source = source as u64;
        let flow = match Kind::of(file)? {
            Kind::Text => {
                let text = std::fs::read(file).map_err(DataError::io(file, "read"))?;
                each(RawDocument { source, record: 1, text: &text })?
            }
            Kind::JsonLines => {
                for_each_line(file, |record, text| each(RawDocument { source, record, text }))?
            }
        };
        if flow == Flow::Stop {
            break;
        }
    }
    Ok(())
}

/// Whether to go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Flow {
    /// Show the next document.
    Continue,
    /// That was enough.
    Stop,
}

fn for_each_line(
    file: &Path,
    mut each: impl FnMut(u64, &[u8]) -> Result<Flow, PrepareError>,
) -> Result<Flow, PrepareError> {
    let open = File::open(file).map_err(DataError::io(file, "read"))?;
    let mut lines = BufReader::with_capacity(1 << 20, open);
    let mut line = Vec::new();
    for number in 1.. {
        line.clear();
        if lines.read_until(b'\n', &mut line).map_err(DataError::io(file, "read"))? == 0 {
            break;
        }
        if line.trim_ascii().is_empty() {
            continue;
        }
        let bad = |what| PrepareError::BadLine { file: file.into(), line: number, what };
        let text = text_of(&line).map_err(bad)?;
        if each(number, text.as_bytes())? == Flow::Stop {
            return Ok(Flow::Stop);
        }
    }
    Ok(Flow::Continue)
}

/// The `text` of a line's object; other keys are passed over.
fn text_of(line: &[u8]) -> Result<Cow<'_, str>, String> {
    #[derive(Deserialize)]
    struct Record<'a> {
        #[serde(borrow)]
        text: Option<Cow<'a, str>>,
    }
    let record: Record<'_> = serde_json::from_slice(line).map_err(|error| {
        let what = error.to_string();
        let what = what.rsplit_once(" at line ").map_or(what.as_str(), |(what, _)| what);
        format!("{what}, at column {}", error.column())
    })?;
    record.text.ok_or_else(|| "the object has no \"text\"".to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_gives_its_text_with_escapes_resolved() {
        assert_eq!(text_of(br#"{"id": 7, "text": "one\ntwo \u00e4"}"#).unwrap(), "one\ntwo \u{e4}");
    }

    #[test]
    fn a_bad_line_says_what_is_wrong_with_it() {
        for (line, what) in [
            (&b"{\"id\": 7}"[..], "no \"text\""),
            (b"{\"text\": null}", "no \"text\""),
            (b"{\"text\": 3}", "expected a string"),
            (b"{\"text\": \"open", "EOF"),
            (b"[1, 2]", "invalid"),
            (b"{\"text\": \"\xff\"}", "unicode"),
            (b"{\"text\": \"a\"} {}", "trailing"),
            (b"{\"text\": \"\\ud800\"}", "escape"),
        ] {
            let error = text_of(line).unwrap_err();
            assert!(error.contains(what), "{}: {error}", String::from_utf8_lossy(line));
        }
    }
}
