//! Examples as a model is asked them: templates filled with the fields of rows, and which others stand before an
//! example as shots. Owns texts and the draw; refuses to know tokens.
//!
//! Brown et al. 2020, section 2.4: K examples drawn for each example that is asked, as conditioning.

use crate::documents::Fields;
use crate::rows::{missing, read_rows, wrong};
use crate::{DataError, Order};
use configs::{SuiteKind, SuiteTask, Template};
use serde_json::Value;
use std::path::{Path, PathBuf};

/// Examples of a file, ready to be asked.
#[derive(Debug, Clone)]
pub(crate) struct Examples {
    file: PathBuf,
    digest: [u8; 32],
    rows: Vec<Row>,
}

/// One example.
#[derive(Debug, Clone)]
pub(crate) struct Row {
    /// Where it begins, from 1.
    pub(crate) line: u64,
    fields: Fields,
    /// Its choices, if it has any.
    pub(crate) choices: Vec<String>,
    /// The number of the right one.
    pub(crate) right: usize,
}

impl Examples {
    /// Reads a file, at most `most` examples of it.
    ///
    /// # Errors
    /// As [`read_rows`]; the first example that is not what the task says.
    pub(crate) fn open(file: &Path, task: &SuiteTask, most: Option<usize>) -> Result<Examples, DataError> {
        let bytes = std::fs::read(file).map_err(DataError::io(file, "read"))?;
        let mut rows = Vec::new();
        for (line, fields) in read_rows(file)?.into_iter().take(most.unwrap_or(usize::MAX)) {
            let row = row_of(line, fields, task).map_err(|(field, what)| wrong(file, line, &field, what))?;
            for (template, choice) in [(&task.prompt, row.right), (&task.answer, row.right)] {
                row.fill(template, choice).map_err(|(field, what)| wrong(file, line, &field, what))?;
            }
            rows.push(row);
        }
        if rows.is_empty() {
            return Err(DataError::NoExamples { file: file.into() });
        }
        Ok(Examples { file: file.into(), digest: *blake3::hash(&bytes).as_bytes(), rows })
    }

    /// In the order of the file.
    pub(crate) fn rows(&self) -> &[Row] {
        &self.rows
    }

    /// What is wrong with one of them.
    pub(crate) fn wrong(&self, row: &Row, field: &str, what: String) -> DataError {
        wrong(&self.file, row.line, field, what)
    }

    /// The examples that stand before number `asked` as its shots: the first `shots` of a permutation of these
    /// that is a pure function of their file's content, the seed and `asked`. So more shots begin with those of
    /// fewer, and nothing depends on who computes it. `own` says that the asked one is one of these.
    ///
    /// # Errors
    /// There are not so many.
    pub(crate) fn shots(
        &self,
        (asked, own): (u64, bool),
        shots: usize,
        seed: u64,
    ) -> Result<Vec<&Row>, DataError> {
        let n = self.rows.len() as u64;
        let got = n - u64::from(own);
        if (shots as u64) > got {
            return Err(DataError::FewShots { file: self.file.clone(), got, shots });
        }
        let order = Order::new(self.digest, 1, n, seed);
        let drawn = (0..n).map(|i| order.sequence(asked * n + i)).filter(|&row| !(own && row == asked));
        Ok(drawn.take(shots).map(|row| &self.rows[row as usize]).collect())
    }
}

impl Row {
    /// The text of a template, with the choice of that number where it has one.
    pub(crate) fn fill(&self, template: &Template, choice: usize) -> Result<String, Wrong> {
        template.fill(|name| match (name, self.choices.get(choice)) {
            ("choice", Some(choice)) => Ok(choice.clone()),
            _ => text_of(&self.fields, name),
        })
    }
}

/// A field, and what is wrong with it.
type Wrong = (String, String);

fn text_of(fields: &Fields, name: &str) -> Result<String, Wrong> {
    match fields.get(name) {
        Some(Value::String(text)) => Ok(text.clone()),
        Some(value @ (Value::Number(_) | Value::Bool(_))) => Ok(value.to_string()),
        Some(other) => Err((name.to_string(), format!("got {other}, expected text"))),
        None => Err((name.to_string(), missing(fields))),
    }
}

fn row_of(line: u64, mut fields: Fields, task: &SuiteTask) -> Result<Row, Wrong> {
    let (mut choices, mut right) = (Vec::new(), 0);
    if task.kind == SuiteKind::LastWord {
        // As the task is made in lm-eval: whatever comes after the last space is the word.
        let text = text_of(&fields, &task.text)?;
        let (context, word) =
            text.rsplit_once(' ').filter(|(_, word)| !word.is_empty()).ok_or_else(|| {
                (task.text.clone(), format!("got {text:?}, expected words, and one at the end"))
            })?;
        fields.insert("context".into(), context.into());
        fields.insert("word".into(), word.into());
    }
    if task.kind == SuiteKind::MultipleChoice {
        choices = choices_of(&fields, task)?;
        right = right_of(&fields, task, choices.len())?;
    }
    Ok(Row { line, fields, choices, right })
}

fn choices_of(fields: &Fields, task: &SuiteTask) -> Result<Vec<String>, Wrong> {
    if !task.labels.is_empty() {
        return Ok(task.labels.clone());
    }
    let mut choices = Vec::new();
    for name in &task.choices {
        match fields.get(name) {
            Some(Value::Array(list)) => {
                for item in list {
                    let text = item.as_str().ok_or_else(|| (name.clone(), format!("{item} is no text")))?;
                    choices.push(text.to_string());
                }
            }
            _ => choices.push(text_of(fields, name)?),
        }
    }
    match choices.len() {
        0 | 1 => {
            let name = task.choices.last().cloned().unwrap_or_default();
            Err((name, format!("got {} choices, expected at least two", choices.len())))
        }
        _ => Ok(choices),
    }
}

fn right_of(fields: &Fields, task: &SuiteTask, choices: usize) -> Result<usize, Wrong> {
    let word = text_of(fields, &task.label)?;
    let (right, expected) = if task.labels.is_empty() {
        let expected = format!("the number of a choice, 0 to {}", choices - 1);
        (word.trim().parse().ok().filter(|&right: &usize| right < choices), expected)
    } else {
        let expected = format!("one of task.labels: {}", task.labels.join(", "));
        (task.labels.iter().position(|label| *label == word.trim()), expected)
    };
    right.ok_or_else(|| (task.label.clone(), format!("got {word:?}, expected {expected}")))
}
