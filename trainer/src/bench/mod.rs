//! Measurements against a reference taken in the same run: their form, as a table and as JSON.
//! Knows nothing of what is measured; each kind has a module of its own.

mod attention;
mod collectives;
mod memory;

pub use attention::AttentionBench;
pub use collectives::collectives;
pub use memory::memory;

use crate::error::TrainError;
use serde::Serialize;
use std::fmt::Write;
use std::path::PathBuf;

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
