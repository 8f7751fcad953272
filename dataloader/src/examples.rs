//! Labelled examples as files have them: rows to texts and an answer, each problem told with file, line and
//! field. Refuses to know tokens.

use crate::DataError;
use crate::documents::Fields;
use crate::rows::{missing, read_rows, wrong};
use configs::{TaskConfig, TaskKind};
use serde_json::Value;
use std::path::Path;

/// What is right about an example.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Answer {
    /// The number of a class or choice, from 0.
    Class(usize),
    /// A number.
    Number(f64),
}

/// One example: its texts in the order of the task's fields (of a multiple choice, the context and then the
/// choices), and its answer if it has one.
#[derive(Debug, Clone, PartialEq)]
pub struct TaskExample {
    /// In order.
    pub texts: Vec<String>,
    /// The answer.
    pub answer: Option<Answer>,
    /// Where in the file it begins, from 1.
    pub line: u64,
}

/// Reads all examples of a file, as [`read_rows`] does. Where `answers` is false an example may lack its answer.
///
/// # Errors
/// A file of another kind, what cannot be read, and the first example that is not what the task says.
pub fn read_examples(file: &Path, task: &TaskConfig, answers: bool) -> Result<Vec<TaskExample>, DataError> {
    let rows = read_rows(file)?;
    let mut examples = Vec::with_capacity(rows.len());
    for (line, fields) in rows {
        let example = example_of(&fields, line, task, answers);
        examples.push(example.map_err(|(field, what)| wrong(file, line, &field, what))?);
    }
    if let Some(first) = examples.first() {
        let differs = |example: &&TaskExample| example.texts.len() != first.texts.len();
        if let Some(other) = examples.iter().find(differs) {
            let (got, expected) = (other.texts.len() - 1, first.texts.len() - 1);
            let field = task.fields.last().map_or("", String::as_str);
            let what = format!("got {got} choices, expected {expected} as the first example has");
            return Err(wrong(file, other.line, field, what));
        }
        return Ok(examples);
    }
    Err(DataError::NoExamples { file: file.into() })
}

type Wrong = (String, String);

fn example_of(fields: &Fields, line: u64, task: &TaskConfig, answers: bool) -> Result<TaskExample, Wrong> {
    let mut texts = Vec::new();
    for (number, name) in task.fields.iter().enumerate() {
        match fields.get(name) {
            Some(Value::String(text)) => texts.push(text.clone()),
            Some(Value::Array(list)) if task.kind == TaskKind::MultipleChoice && number > 0 => {
                for item in list {
                    let text = item.as_str().ok_or_else(|| (name.clone(), format!("{item} is no text")))?;
                    texts.push(text.to_string());
                }
            }
            Some(other) => return Err((name.clone(), format!("got {other}, expected text"))),
            None => return Err((name.clone(), missing(fields))),
        }
    }
    if task.kind == TaskKind::MultipleChoice && texts.len() < 3 {
        let name = task.fields.last().cloned().unwrap_or_default();
        return Err((name, format!("got {} choices, expected at least two", texts.len() - 1)));
    }
    let answer = match fields.get(&task.label) {
        None | Some(Value::Null) if !answers => None,
        None | Some(Value::Null) => return Err((task.label.clone(), missing(fields))),
        Some(value) => {
            let found = answer_of(value, task, texts.len()).map_err(|what| (task.label.clone(), what));
            if answers { Some(found?) } else { found.ok() }
        }
    };
    Ok(TaskExample { texts, answer, line })
}

fn answer_of(value: &Value, task: &TaskConfig, n_texts: usize) -> Result<Answer, String> {
    let word = match value {
        Value::String(word) => word.trim().to_string(),
        Value::Number(number) => number.to_string(),
        Value::Bool(yes) => yes.to_string(),
        other => return Err(format!("got {other}, expected a word or a number")),
    };
    if task.kind == TaskKind::MultipleChoice {
        let choices = n_texts - 1;
        let number = word.parse().ok().filter(|&number: &usize| number < choices);
        return number
            .map(Answer::Class)
            .ok_or_else(|| format!("got {word:?}, expected the number of a choice, 0 to {}", choices - 1));
    }
    if task.is_of_numbers() {
        let number = word.parse().ok().filter(|number: &f64| number.is_finite());
        return number.map(Answer::Number).ok_or_else(|| format!("got {word:?}, expected a number"));
    }
    let class = task.labels.iter().position(|label| *label == word);
    class
        .map(Answer::Class)
        .ok_or_else(|| format!("got {word:?}, expected one of task.labels: {}", task.labels.join(", ")))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use configs::Metric;

    pub(crate) fn task(kind: TaskKind, fields: &[&str], labels: &[&str]) -> TaskConfig {
        TaskConfig {
            kind,
            fields: fields.iter().map(ToString::to_string).collect(),
            label: "label".into(),
            labels: labels.iter().map(ToString::to_string).collect(),
            metrics: vec![Metric::Accuracy],
            epochs: 3,
            batch_examples: 32,
            lambda: 0.5,
            warmup_fraction: 0.002,
            base: String::new(),
        }
    }

    fn read(name: &str, text: &str, task: &TaskConfig) -> Result<Vec<TaskExample>, String> {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join(name);
        std::fs::write(&file, text).unwrap();
        read_examples(&file, task, true).map_err(|error| error.to_string())
    }

    #[test]
    fn json_lines_and_tables_give_the_same_examples() {
        let task = task(TaskKind::Entailment, &["premise", "hypothesis"], &["no", "yes"]);
        let json = "{\"premise\": \"a, \\\"b\\\"\", \"hypothesis\": \"c\\nd\", \"label\": \"yes\"}\n\n\
                    {\"label\": \"no\", \"premise\": \"e\", \"hypothesis\": \"\"}\n";
        let table = "premise,hypothesis,label\n\"a, \"\"b\"\"\",\"c\nd\",yes\ne,,no\n";
        let [json, table] =
            [("x.jsonl", json), ("x.csv", table)].map(|(name, text)| read(name, text, &task).unwrap());
        let parts = |examples: &[TaskExample]| -> Vec<_> {
            examples.iter().map(|example| (example.texts.clone(), example.answer)).collect()
        };
        assert_eq!(parts(&json), parts(&table));
        assert_eq!(json[0].texts, ["a, \"b\"", "c\nd"]);
        assert_eq!(
            json.iter().map(|e| e.answer).collect::<Vec<_>>(),
            [Some(Answer::Class(1)), Some(Answer::Class(0))]
        );
        assert_eq!([&json, &table].map(|examples| examples[1].line), [3, 4]);
    }

    #[test]
    fn choices_are_a_list_or_fields_of_their_own() {
        let list = task(TaskKind::MultipleChoice, &["context", "choices"], &[]);
        let json = r#"{"context": "q", "choices": ["a", "b", "c"], "label": 2}"#;
        let one = read("x.jsonl", json, &list).unwrap();
        let own = task(TaskKind::MultipleChoice, &["context", "a", "b", "c"], &[]);
        let two = read("x.tsv", "context\ta\tb\tc\tlabel\nq\ta\tb\tc\t2\n", &own).unwrap();
        assert_eq!((&one[0].texts, one[0].answer), (&two[0].texts, two[0].answer));
        assert_eq!(one[0].answer, Some(Answer::Class(2)));
    }

    #[test]
    fn what_is_wrong_is_told_with_file_line_and_field() {
        let classes = task(TaskKind::Classification, &["text"], &["ham", "spam"]);
        let good = "{\"text\": \"t\", \"label\": \"ham\"}\n";
        for (second, told) in [
            (
                r#"{"text": "t", "label": "eggs"}"#,
                "x.jsonl:2: field \"label\": got \"eggs\", expected one of task.labels: ham, spam",
            ),
            (
                r#"{"body": "t", "label": "ham"}"#,
                "x.jsonl:2: field \"text\": is not there; there are body, label",
            ),
            (r#"{"text": 7, "label": "ham"}"#, "x.jsonl:2: field \"text\": got 7, expected text"),
            (r#"{"text": "t"}"#, "x.jsonl:2: field \"label\": is not there"),
            (r#"{"text": "t", "#, "x.jsonl:2: EOF"),
            ("[]", "x.jsonl:2: expected an object"),
        ] {
            let error = read("x.jsonl", &format!("{good}{second}\n"), &classes).unwrap_err();
            assert!(error.contains(told), "{error}");
        }
        let error = read("x.csv", "text,label\nt,ham\nt,ham,more\n", &classes).unwrap_err();
        assert!(error.contains("x.csv:3:"), "{error}");
        let error = read("x.parquet", "", &classes).unwrap_err();
        assert!(error.contains("expected .jsonl, .csv or .tsv"), "{error}");
        let error = read("x.jsonl", "\n", &classes).unwrap_err();
        assert!(error.contains("no examples"), "{error}");
        let numbers = task(TaskKind::Similarity, &["text", "other"], &[]);
        let error = read("x.jsonl", r#"{"text": "a", "other": "b", "label": "high"}"#, &numbers).unwrap_err();
        assert!(error.contains("expected a number"), "{error}");
        let choice = task(TaskKind::MultipleChoice, &["text", "choices"], &[]);
        let rows = [
            r#"{"text": "a", "choices": ["b"], "label": 0}"#,
            r#"{"text": "a", "choices": ["b", "c"], "label": 2}"#,
            "{\"text\": \"a\", \"choices\": [\"b\", \"c\"], \"label\": 1}\n{\"text\": \"a\", \"choices\": [\"b\", \"c\", \"d\"], \"label\": 1}",
        ];
        let told = rows.map(|row| read("x.jsonl", row, &choice).unwrap_err());
        assert!(
            told[0].contains("at least two") && told[1].contains("0 to 1") && told[2].contains(":2:"),
            "{told:?}"
        );
    }
}
