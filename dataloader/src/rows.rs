//! Rows of a file with named values: JSON lines, or a table. Owns the two forms; knows nothing of what the values
//! mean.

use crate::DataError;
use crate::documents::Fields;
use serde_json::Value;
use std::path::Path;

/// Each row with the line at which it begins, from 1.
pub(crate) type Rows = Vec<(u64, Fields)>;

/// All rows of a file of JSON lines (`.jsonl`, `.json`) or of a table whose first row has the names (`.csv`,
/// `.tsv`).
///
/// # Errors
/// A file of another kind, what cannot be read, and the first row that is none.
pub(crate) fn read_rows(file: &Path) -> Result<Rows, DataError> {
    let extension = file.extension().map(|extension| extension.to_string_lossy().to_lowercase());
    match extension.as_deref() {
        Some("jsonl" | "json") => json_rows(file),
        Some("csv") => table_rows(file, b','),
        Some("tsv") => table_rows(file, b'\t'),
        _ => Err(DataError::ExamplesKind { file: file.into() }),
    }
}

/// What is wrong with a row, or with a field of it.
pub(crate) fn wrong(file: &Path, line: u64, field: &str, what: String) -> DataError {
    DataError::Example { file: file.into(), line, field: field.to_string(), what }
}

fn json_rows(file: &Path) -> Result<Rows, DataError> {
    let text = std::fs::read(file).map_err(DataError::io(file, "read"))?;
    let mut rows = Vec::new();
    for (line, bytes) in (1..).zip(text.split(|&byte| byte == b'\n')) {
        if bytes.trim_ascii().is_empty() {
            continue;
        }
        match serde_json::from_slice(bytes) {
            Ok(Value::Object(fields)) => rows.push((line, fields)),
            Ok(_) => return Err(wrong(file, line, "", "expected an object".into())),
            Err(error) => return Err(wrong(file, line, "", error.to_string())),
        }
    }
    Ok(rows)
}

fn table_rows(file: &Path, delimiter: u8) -> Result<Rows, DataError> {
    let opened = std::fs::File::open(file).map_err(DataError::io(file, "read"))?;
    let mut reader = csv::ReaderBuilder::new().delimiter(delimiter).from_reader(opened);
    let told = |error: csv::Error| {
        let line = error.position().map_or(1, csv::Position::line);
        wrong(file, line, "", error.to_string())
    };
    let names = reader.headers().map_err(told)?.clone();
    let mut rows = Vec::new();
    for record in reader.records() {
        let record = record.map_err(told)?;
        let line = record.position().map_or(0, csv::Position::line);
        let cells = record.iter().map(|cell| Value::String(cell.to_string()));
        rows.push((line, names.iter().map(ToString::to_string).zip(cells).collect()));
    }
    Ok(rows)
}

/// What is said of a field that a row has not.
pub(crate) fn missing(fields: &Fields) -> String {
    let there: Vec<&str> = fields.keys().map(String::as_str).collect();
    format!("is not there; there are {}", there.join(", "))
}
