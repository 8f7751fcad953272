//! Measurements against a reference taken in the same run: their form, as a table and as JSON.
//! Knows nothing of what is measured; each kind has a module of its own.

mod attention;
mod calibrate;
mod collectives;
mod decode;
mod memory;
mod overlap;
mod planned;
mod primitives;
#[cfg(test)]
mod recorder;
mod save;
mod speed;
mod steps;
mod switch;

pub use attention::{AttentionBench, band_memory};
pub use calibrate::Calibration;
pub use collectives::collectives;
pub use decode::decode;
pub use memory::memory;
pub use overlap::overlap;
pub use planned::{Compared, planned};
pub use save::save;
pub use speed::{Speed, speed};

use crate::error::TrainError;
use ops::collectives::{CommError, Communicator};
use serde::Serialize;
use std::fmt::Write;
use std::path::PathBuf;
use std::time::Instant;

/// One measurement.
#[derive(Debug, Clone, Serialize)]
pub struct Case {
    /// What was measured.
    pub case: String,
    /// How much of `unit`.
    pub value: f64,
    /// The unit of value and reference.
    pub unit: &'static str,
    /// The same of what it is compared with.
    pub reference: f64,
    /// Above 1: better than the reference.
    pub ratio: f64,
}

impl Case {
    /// A case in which more is better.
    pub fn more_is_better(case: impl Into<String>, unit: &'static str, value: f64, reference: f64) -> Case {
        Case { case: case.into(), value, unit, reference, ratio: value / reference }
    }

    /// A case in which less is better.
    pub fn less_is_better(case: impl Into<String>, unit: &'static str, value: f64, reference: f64) -> Case {
        Case { case: case.into(), value, unit, reference, ratio: reference / value }
    }
}

/// Writes `target/bench/NAME.json`, a list of cases; returns the table that a person reads.
///
/// # Errors
/// [`TrainError::Io`].
pub fn report(name: &str, cases: &[Case]) -> Result<String, TrainError> {
    let folder = PathBuf::from("target/bench");
    std::fs::create_dir_all(&folder).map_err(TrainError::io(&folder))?;
    let path = folder.join(format!("{name}.json"));
    let json = serde_json::to_string_pretty(cases).map_err(std::io::Error::from);
    json.and_then(|json| std::fs::write(&path, json + "\n")).map_err(TrainError::io(&path))?;
    Ok(table(cases))
}

fn table(cases: &[Case]) -> String {
    let width = cases.iter().map(|case| case.case.len()).max().unwrap_or(0).max("case".len());
    let mut table =
        format!("{:width$}  {:>10}  {:>10}  {:10}  {:>6}\n", "case", "value", "reference", "unit", "ratio");
    for Case { case, value, unit, reference, ratio } in cases {
        let _ = writeln!(table, "{case:width$}  {value:>10.3}  {reference:>10.3}  {unit:10}  {ratio:>6.3}");
    }
    table
}

/// Seconds of `body`, which all ranks begin together, on the slowest of them; the same on all. Collective.
pub(crate) fn slowest<E: From<CommError>>(
    comm: &dyn Communicator,
    body: impl FnOnce() -> Result<(), E>,
) -> Result<f64, E> {
    comm.barrier()?;
    let began = Instant::now();
    body()?;
    Ok(most(comm, began.elapsed().as_secs_f64())?)
}

/// The largest of the ranks' values. Collective.
pub(crate) fn most(comm: &dyn Communicator, mine: f64) -> Result<f64, CommError> {
    let all = comm.all_gather_bytes(&mine.to_ne_bytes())?;
    let value = |bytes: &Vec<u8>| bytes.as_slice().try_into().map_or(0.0, f64::from_ne_bytes);
    Ok(all.iter().map(value).fold(0.0, f64::max))
}

/// The middle one of some measurements; 0 without any.
pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_has_a_line_for_each_case() {
        let table = table(&[Case::more_is_better("all_reduce 2 ranks fp32", "GB/s", 6.0, 6.4)]);
        assert_eq!(table.lines().count(), 2);
        assert!(
            table.contains("all_reduce 2 ranks fp32       6.000       6.400  GB/s         0.938"),
            "{table}"
        );
    }

    #[test]
    fn the_middle_of_an_odd_number_is_found() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(Vec::new()), 0.0);
    }
}
