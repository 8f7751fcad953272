//! A run's `metrics.jsonl` as an event file of TensorBoard: records of a length, a checksum of it, a protocol
//! buffer `Event`, and a checksum of that (tensorflow/core/lib/io/record_writer.h, core/util/event.proto).
//! Five fields of two messages are written here by hand; a library for protocol buffers would be larger than they are.

use crate::history::COLUMNS;
use serde_json::Value;
use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exported {
    /// The event file.
    pub file: PathBuf,
    /// Steps in it, each as it was done last.
    pub steps: usize,
    /// Validations in it.
    pub evals: usize,
    /// Numbers in it.
    pub values: usize,
}

/// Why a run cannot be exported.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// A file that cannot be read or written.
    #[error("{}: {error}\nhint: a run has a folder like runs/demo, with metrics.jsonl in it", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// A line that is no event.
    #[error("{}:{line}: no event: {error}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// From 1.
        line: usize,
        /// Why.
        error: serde_json::Error,
    },
}

/// By step, its time and, by tag, numbers.
type Rows = BTreeMap<u64, (f64, Vec<(String, f64)>)>;

/// Writes the event file of the run in `run` into `folder`, replacing one of an earlier export.
///
/// # Errors
/// Files that cannot be read or written, and lines that are no events.
pub fn export(run: &Path, folder: &Path) -> Result<Exported, ExportError> {
    let path = run.join("metrics.jsonl");
    let (steps, evals) = read(&path)?;
    let file = folder.join("events.out.tfevents.0.phalanx");
    let failed = |error| ExportError::File { path: file.clone(), error };
    let mut bytes = Vec::new();
    let began = steps.values().chain(evals.values()).map(|(time, _)| *time).fold(f64::INFINITY, f64::min);
    let version = [
        field(1, Wire::Double(if began.is_finite() { began } else { 0.0 })),
        field(3, Wire::Bytes(b"brain.Event:2")),
    ];
    record(&mut bytes, &version.concat());
    let mut values = 0;
    for (step, (time, numbers)) in steps.iter().chain(&evals) {
        let summary: Vec<u8> = numbers
            .iter()
            .flat_map(|(tag, number)| {
                let value =
                    [field(1, Wire::Bytes(tag.as_bytes())), field(2, Wire::Float(*number as f32))].concat();
                field(1, Wire::Bytes(&value))
            })
            .collect();
        let event =
            [field(1, Wire::Double(*time)), field(2, Wire::Varint(*step)), field(5, Wire::Bytes(&summary))];
        record(&mut bytes, &event.concat());
        values += numbers.len();
    }
    std::fs::create_dir_all(folder).map_err(failed)?;
    let temporary = file.with_extension("tmp");
    let written = std::fs::File::create(&temporary).and_then(|mut file| file.write_all(&bytes));
    written.and_then(|()| std::fs::rename(&temporary, &file)).map_err(failed)?;
    Ok(Exported { steps: steps.len(), evals: evals.len(), values, file })
}

/// Steps and validations, with what was done again as it was done last.
fn read(path: &Path) -> Result<(Rows, Rows), ExportError> {
    let failed = |error| ExportError::File { path: path.to_path_buf(), error };
    let file = std::fs::File::open(path).map_err(failed)?;
    let (mut steps, mut evals): (Rows, Rows) = Default::default();
    // Time of an event: that of the start, and the seconds of the steps since.
    let mut time = file.metadata().and_then(|file| file.modified()).map_or(0.0, unix_s);
    for (index, line) in BufReader::new(file).split(b'\n').enumerate() {
        let line = line.map_err(failed)?;
        let wrong = |error| ExportError::Line { path: path.to_path_buf(), line: index + 1, error };
        let event: Value = serde_json::from_slice(&line).map_err(wrong)?;
        let step = event["step"].as_u64().unwrap_or(0);
        let numbers = |names: &[&str], prefix: &str, of: &Value| -> Vec<(String, f64)> {
            names.iter().filter_map(|name| Some((format!("{prefix}{name}"), number(&of[*name])?))).collect()
        };
        let back_to = match event["kind"].as_str() {
            Some("step") => {
                time += event["seconds"].as_f64().unwrap_or(0.0);
                let mut row = numbers(&COLUMNS[2..8], "train/", &event);
                row.extend(numbers(&COLUMNS[8..], "phases/", &event["phases"]));
                steps.insert(step, (time, row));
                None
            }
            Some("eval") => {
                evals.insert(step, (time, numbers(&["val_loss", "bits_per_byte"], "eval/", &event)));
                None
            }
            Some("start") => {
                time = event["unix_s"].as_f64().unwrap_or(time);
                Some(step)
            }
            Some("rewind") => event["checkpoint_step"].as_u64(),
            _ => None,
        };
        if let Some(step) = back_to {
            steps.split_off(&(step + 1));
            evals.split_off(&(step + 1));
        }
    }
    Ok((steps, evals))
}

fn unix_s(time: SystemTime) -> f64 {
    time.duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

/// A number, or one of the words for those that are not finite.
fn number(value: &Value) -> Option<f64> {
    value.as_f64().or_else(|| value.as_str()?.parse().ok())
}

/// A value as protocol buffers lay it out.
enum Wire<'a> {
    Varint(u64),
    Double(f64),
    Float(f32),
    Bytes(&'a [u8]),
}

fn field(number: u64, value: Wire<'_>) -> Vec<u8> {
    let kind = match value {
        Wire::Varint(_) => 0,
        Wire::Double(_) => 1,
        Wire::Bytes(_) => 2,
        Wire::Float(_) => 5,
    };
    let mut bytes = varint(number << 3 | kind);
    match value {
        Wire::Varint(value) => bytes.extend(varint(value)),
        Wire::Double(value) => bytes.extend(value.to_le_bytes()),
        Wire::Float(value) => bytes.extend(value.to_le_bytes()),
        Wire::Bytes(value) => {
            bytes.extend(varint(value.len() as u64));
            bytes.extend(value);
        }
    }
    bytes
}

fn varint(mut value: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
    bytes
}

fn record(bytes: &mut Vec<u8>, event: &[u8]) {
    let length = (event.len() as u64).to_le_bytes();
    bytes.extend(length);
    bytes.extend(masked(&length).to_le_bytes());
    bytes.extend(event);
    bytes.extend(masked(event).to_le_bytes());
}

/// CRC-32C (Castagnoli), rotated and shifted, so that a checksum of bytes with checksums in them is no worse.
fn masked(bytes: &[u8]) -> u32 {
    crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// A bit at a time: files here have a few MB.
fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, &byte| {
        (0..8).fold(
            crc ^ u32::from(byte),
            |crc, _| if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 },
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_and_numbers_are_those_of_the_formats() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283); // the check value of RFC 3720
        assert_eq!(varint(300), [0xac, 0x02]); // the example of the encoding's own page
        assert_eq!(field(2, Wire::Float(1.0)), [0x15, 0, 0, 0x80, 0x3f]);
    }

    #[test]
    fn the_last_of_each_step_is_exported_and_half_a_line_refused() {
        let run = tempfile::tempdir().unwrap();
        let lines = "{\"kind\":\"start\",\"step\":0,\"unix_s\":1000}\n\
            {\"kind\":\"step\",\"step\":1,\"loss\":5.0,\"seconds\":2.0,\"phases\":{\"data\":0.5}}\n\
            {\"kind\":\"step\",\"step\":2,\"loss\":\"nan\",\"seconds\":2.0,\"phases\":{}}\n\
            {\"kind\":\"start\",\"step\":1,\"unix_s\":2000}\n\
            {\"kind\":\"eval\",\"step\":1,\"val_loss\":4.0,\"bits_per_byte\":5.0}\n";
        std::fs::write(run.path().join("metrics.jsonl"), lines).unwrap();
        let (steps, evals) = read(&run.path().join("metrics.jsonl")).unwrap();
        assert_eq!(steps.keys().copied().collect::<Vec<_>>(), [1]);
        assert_eq!(steps[&1].0, 1002.0);
        assert_eq!(steps[&1].1.len(), 3, "loss, seconds, data: {:?}", steps[&1]);
        assert_eq!((evals[&1].0, evals[&1].1.len()), (2000.0, 2));
        let done = export(run.path(), &run.path().join("board")).unwrap();
        assert_eq!((done.steps, done.evals, done.values), (1, 1, 5));
        assert!(std::fs::metadata(&done.file).unwrap().len() > 150);
        std::fs::write(run.path().join("metrics.jsonl"), "{\"kind\":\n").unwrap();
        let told = export(run.path(), run.path()).unwrap_err().to_string();
        assert!(told.contains("metrics.jsonl:1: no event"), "{told}");
        assert!(export(&run.path().join("none"), run.path()).unwrap_err().to_string().contains("hint:"));
    }
}
