//! What a suite's scores are told as: a table for people, an object for programs.

use super::scores::TaskScores;
use serde::Serialize;
use std::fmt::Write;

/// The scores of a model on a suite.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// The checkpoint's folder.
    pub checkpoint: String,
    /// Updates that it has seen.
    pub step: u64,
    /// Tokens that it was trained on.
    pub tokens: u64,
    /// Trained parameters.
    pub parameters: u64,
    /// The suite's file.
    pub suite: String,
    /// Its seed.
    pub seed: u64,
    /// In the order of the suite, each task by its shots.
    pub results: Vec<TaskScores>,
}

impl Report {
    /// A table, with a line of its own for what had to give way.
    pub fn table(&self) -> String {
        let mut rows = vec![["task", "shots", "examples", "score", "value", "stderr"].map(String::from)];
        for result in &self.results {
            for score in &result.scores {
                rows.push([
                    result.task.clone(),
                    result.shots.to_string(),
                    result.examples.to_string(),
                    score.name.to_string(),
                    number(score.value),
                    score.stderr.map_or(String::new(), number),
                ]);
            }
        }
        let widths: Vec<usize> = (0..6)
            .map(|column| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0))
            .collect();
        let mut text = String::new();
        for row in rows {
            let mut line = String::new();
            for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
                let _ = match column {
                    0 | 3 => write!(line, "{cell:<width$}  "),
                    _ => write!(line, "{cell:>width$}  "),
                };
            }
            let _ = writeln!(text, "{}", line.trim_end());
        }
        for result in &self.results {
            if result.shots_dropped + result.prompts_cut > 0 {
                let _ = writeln!(
                    text,
                    "{} with {} shots: {} shots left out of {} prompts that were too long, {} prompts cut at their \
                     beginning",
                    result.task, result.shots, result.shots_dropped, result.examples, result.prompts_cut
                );
            }
        }
        text
    }
}

/// Six digits, as many of them after the point as are left.
fn number(value: f64) -> String {
    if value.abs() < 100.0 { format!("{value:.4}") } else { format!("{value:.2}") }
}
