//! The rows of a Parquet table as documents. Owns the way from a row to an object; what is in the object
//! is read like a line of JSON. Columns that hold no text, number or truth are passed over.

use crate::{DataError, PrepareError};
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::reader::RowIter;
use parquet::record::{Field, Row};
use std::fs::File;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A table that is read row by row, one group of rows in memory at a time.
pub(super) struct Rows {
    file: PathBuf,
    rows: RowIter<'static>,
    n_rows: u64,
    bytes: u64,
    meter: Arc<AtomicU64>,
    /// The number of the last row, from 1.
    record: u64,
}

impl Rows {
    /// Opens a table that has the column.
    pub(super) fn open(
        file: &Path,
        open: File,
        column: &str,
        meter: Arc<AtomicU64>,
    ) -> Result<Rows, PrepareError> {
        let invalid = |what: String| DataError::TableInvalid { file: file.into(), what };
        let bytes = open.metadata().map_err(DataError::io(file, "read"))?.len();
        let reader = caught(|| SerializedFileReader::new(open).map_err(|error| error.to_string()));
        let reader = reader.map_err(invalid)?;
        let metadata = reader.metadata().file_metadata();
        let fields = metadata.schema().get_fields();
        if !fields.iter().any(|field| field.name() == column) {
            let names: Vec<&str> = fields.iter().map(|field| field.name()).collect();
            let what = format!("has no column {column:?}, there are {}", names.join(", "));
            return Err(invalid(what).into());
        }
        let n_rows = metadata.num_rows().max(0) as u64;
        let rows = caught(|| Ok(RowIter::from_file_into(Box::new(reader)))).map_err(invalid)?;
        Ok(Rows { file: file.into(), rows, n_rows, bytes, meter, record: 0 })
    }

    /// The next row as a JSON object, with its number from 1.
    pub(super) fn next_row(&mut self) -> Result<Option<(u64, Vec<u8>)>, PrepareError> {
        let row = caught(|| self.rows.next().transpose().map_err(|error| error.to_string()));
        let (file, line) = (&self.file, self.record + 1);
        let row = row.map_err(|what| PrepareError::BadLine { file: file.into(), line, what })?;
        let Some(row) = row else { return Ok(None) };
        self.record = line;
        let share =
            |rows: u64| (u128::from(self.bytes) * u128::from(rows) / u128::from(self.n_rows.max(1))) as u64;
        self.meter.fetch_add(share(line) - share(line - 1), Ordering::Relaxed);
        Ok(Some((line, object(&row))))
    }
}

/// What the library says of a table. It panics over some that contradict themselves, such as one whose pages
/// refer to a dictionary that is not there; what it was doing is not gone on with.
fn caught<T>(read: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    let read = std::panic::catch_unwind(AssertUnwindSafe(read));
    read.unwrap_or_else(|panic| {
        let told = panic.downcast_ref::<String>().map(String::as_str);
        let told = told.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no reason given");
        Err(format!("the table contradicts itself: {told}"))
    })
}

fn object(row: &Row) -> Vec<u8> {
    let value = |field: &Field| -> Option<serde_json::Value> {
        Some(match field {
            Field::Str(text) => text.as_str().into(),
            Field::Bytes(bytes) => String::from_utf8_lossy(bytes.data()).into_owned().into(),
            Field::Bool(truth) => (*truth).into(),
            Field::Byte(number) => (*number).into(),
            Field::Short(number) => (*number).into(),
            Field::Int(number) => (*number).into(),
            Field::Long(number) => (*number).into(),
            Field::UByte(number) => (*number).into(),
            Field::UShort(number) => (*number).into(),
            Field::UInt(number) => (*number).into(),
            Field::ULong(number) => (*number).into(),
            Field::Float(number) => (*number).into(),
            Field::Double(number) => (*number).into(),
            _ => return None,
        })
    };
    let fields = row.get_column_iter().filter_map(|(name, field)| Some((name.clone(), value(field)?)));
    let object: super::Fields = fields.collect();
    serde_json::to_vec(&object).expect("strings and numbers have a JSON form")
}
