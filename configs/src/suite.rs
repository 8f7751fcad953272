//! What a trained model is measured on: a suite of tasks, typed and checked line by line. Opens no data and
//! knows no scores.
//!
//! Brown et al. 2020, section 2.4 (how tasks are put to a model, and how choices are scored).

use crate::load::{ConfigError, Problem, place, typed_problem, unknown};
use crate::raw::section;
use crate::template::Template;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::ops::Range;
use std::path::{Path, PathBuf};
use toml::de::DeTable;

/// What is asked of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SuiteKind {
    /// How likely whole documents are.
    Perplexity,
    /// How likely the last word of a text is, and whether it is what the model would write (LAMBADA).
    LastWord,
    /// Which of some texts is the likeliest.
    MultipleChoice,
    /// What the model writes, against what is right.
    Generate,
}

impl SuiteKind {
    /// As it is typed.
    pub fn name(self) -> &'static str {
        match self {
            SuiteKind::Perplexity => "perplexity",
            SuiteKind::LastWord => "last_word",
            SuiteKind::MultipleChoice => "multiple_choice",
            SuiteKind::Generate => "generate",
        }
    }

    /// The keys that say something of this kind, beside those of every kind.
    fn keys(self) -> &'static [&'static str] {
        match self {
            SuiteKind::Perplexity => &["text", "stride"],
            SuiteKind::LastWord => &["text", "prompt", "answer"],
            SuiteKind::MultipleChoice => &["prompt", "answer", "choices", "labels", "label", "unconditional"],
            SuiteKind::Generate => &["prompt", "answer", "stop", "max_tokens", "temperature"],
        }
    }
}

/// Keys of all kinds, and of those that take shots.
const OF_ALL: [&str; 4] = ["name", "kind", "data", "max_examples"];
const OF_SHOTS: [&str; 5] = ["train", "shots", "description", "separator", "overlong"];

/// What becomes of a prompt that is longer than the context.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Overlong {
    /// Its first shots go, and where none are left its first tokens; both are counted.
    #[default]
    Cut,
    /// The suite is refused.
    Refuse,
}

/// One task of a suite.
#[derive(Debug, Clone, PartialEq)]
pub struct SuiteTask {
    /// Unique in the suite.
    pub name: String,
    /// What is asked.
    pub kind: SuiteKind,
    /// Examples; of a perplexity, documents, or a folder of tokens.
    pub data: PathBuf,
    /// Where shots are drawn from; none for the examples themselves, but for the one that is asked.
    pub train: Option<PathBuf>,
    /// Numbers of shots, each measured by itself.
    pub shots: Vec<usize>,
    /// Name of the field with the text, where the kind has one.
    pub text: String,
    /// Targets by which a perplexity's window moves on; none for the whole context.
    pub stride: Option<usize>,
    /// What stands before all shots.
    pub description: String,
    /// How an example is asked.
    pub prompt: Template,
    /// How it is answered.
    pub answer: Template,
    /// What stands between shots, and between description and shots.
    pub separator: String,
    /// Names of the fields that hold choices; one may hold a list.
    pub choices: Vec<String>,
    /// The choices, where all examples have the same.
    pub labels: Vec<String>,
    /// Name of the field with the number of the right choice, from 0, or with one of the labels.
    pub label: String,
    /// The context by which likelihoods without the question are taken.
    pub unconditional: String,
    /// Texts that end what a model writes.
    pub stop: Vec<String>,
    /// Tokens after which it ends in any case.
    pub max_tokens: usize,
    /// Divides the logits; 0 takes the likeliest token.
    pub temperature: f64,
    /// What becomes of long prompts.
    pub overlong: Overlong,
    /// How many examples are taken from the beginning of the data; none for all.
    pub max_examples: Option<usize>,
}

/// A suite of tasks.
#[derive(Debug, Clone, PartialEq)]
pub struct Suite {
    /// Of the choice of shots, and of what is drawn.
    pub seed: u64,
    /// Tokens of a forward pass, about.
    pub batch_tokens: usize,
    /// At least one.
    pub tasks: Vec<SuiteTask>,
}

section! {
    /// `[suite]` as typed.
    RawSection { seed: u64, batch_tokens: usize }
}
section! {
    /// One `[[task]]` as typed.
    RawSuiteTask {
        name: String, kind: SuiteKind, data: String, train: String, shots: Vec<usize>, text: String,
        stride: usize, description: String, prompt: Template, answer: Template, separator: String,
        choices: Vec<String>, labels: Vec<String>, label: String, unconditional: String,
        stop: Vec<String>, max_tokens: usize, temperature: f64, overlong: Overlong, max_examples: usize,
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct RawSuite {
    suite: RawSection,
    task: Vec<RawSuiteTask>,
}

/// Reads a suite.
///
/// # Errors
/// Every problem that can be known, with its line: unknown keys with a suggestion, keys that are of another kind
/// of task, values of a wrong type or range.
pub fn load_suite(file: &Path) -> Result<Suite, ConfigError> {
    let told = |problems| ConfigError { file: file.to_path_buf(), problems };
    let text = std::fs::read_to_string(file).map_err(|error| {
        let place = Some(file.display().to_string());
        told(vec![Problem { place, what: format!("cannot be read: {error}") }])
    })?;
    let document = DeTable::parse(&text).map_err(|error| told(vec![typed_problem(file, &text, &error)]))?;
    let source = Source { file, text: &text, document: document.get_ref() };
    source.check_keys().map_err(told)?;
    let raw: RawSuite =
        toml::from_str(&text).map_err(|error| told(vec![typed_problem(file, &text, &error)]))?;
    source.resolve(raw).map_err(told)
}

/// The file, to tell lines by.
struct Source<'a> {
    file: &'a Path,
    text: &'a str,
    document: &'a DeTable<'a>,
}

impl<'a> Source<'a> {
    fn at(&self, span: &Range<usize>) -> Option<String> {
        Some(place(self.file, self.text, span.start))
    }

    /// The tables `[[task]]`, in order.
    fn tasks(&self) -> Vec<&'a toml::Spanned<toml::de::DeValue<'a>>> {
        let found = self.document.iter().find(|(name, _)| name.get_ref() == "task");
        found
            .and_then(|(_, value)| value.get_ref().as_array())
            .map_or(Vec::new(), |list| list.iter().collect())
    }

    fn check_keys(&self) -> Result<(), Vec<Problem>> {
        let mut problems = Vec::new();
        let mut refuse = |span: Range<usize>, what: String| {
            problems.push((span.start, Problem { place: self.at(&span), what }));
        };
        for (name, value) in self.document {
            let known = match name.get_ref().as_ref() {
                "suite" => value.get_ref().as_table().is_some(),
                "task" => value.get_ref().as_array().is_some(),
                other => {
                    refuse(name.span(), unknown("section", other, other, ["suite", "task"].into_iter()));
                    continue;
                }
            };
            if !known {
                refuse(name.span(), "a suite has one [suite] and a [[task]] for each task".into());
            }
            let keys = value.get_ref().as_table().into_iter().flat_map(|table| table.keys());
            for key in keys.filter(|key| !RawSection::KEYS.contains(&key.get_ref().as_ref())) {
                let (word, known) = (key.get_ref(), RawSection::KEYS.iter().copied());
                refuse(key.span(), unknown("key", &format!("suite.{word}"), word, known));
            }
        }
        for key in
            self.tasks().iter().filter_map(|task| task.get_ref().as_table()).flat_map(|task| task.keys())
        {
            let (word, known) = (key.get_ref(), RawSuiteTask::KEYS.iter().copied());
            if !RawSuiteTask::KEYS.contains(&word.as_ref()) {
                refuse(key.span(), unknown("key", &format!("{word} of [[task]]"), word, known));
            }
        }
        problems.sort_by_key(|(start, _)| *start);
        if problems.is_empty() {
            Ok(())
        } else {
            Err(problems.into_iter().map(|(_, problem)| problem).collect())
        }
    }

    fn resolve(&self, raw: RawSuite) -> Result<Suite, Vec<Problem>> {
        let mut problems = Vec::new();
        let suite = Suite {
            seed: raw.suite.seed.unwrap_or(1337),
            batch_tokens: raw.suite.batch_tokens.unwrap_or(4096),
            tasks: Vec::new(),
        };
        let mut whole = |what: &str| problems.push(Problem { place: None, what: what.into() });
        if suite.batch_tokens == 0 {
            whole("suite.batch_tokens: must be at least 1");
        }
        if raw.task.is_empty() {
            whole("there is no [[task]] in it");
        }
        let (mut names, mut tasks) = (BTreeSet::new(), Vec::new());
        for (task, item) in raw.task.into_iter().zip(self.tasks()) {
            let given: Vec<(&str, Range<usize>)> = item.get_ref().as_table().map_or(Vec::new(), |table| {
                table.keys().map(|key| (key.get_ref().as_ref(), key.span())).collect()
            });
            let mut told = Told { source: self, given, table: item.span(), problems: &mut problems };
            let task = resolve_task(task, &mut told);
            if !names.insert(task.name.clone()) && !task.name.is_empty() {
                told.tell("name", format!("{:?} is the name of another task too", task.name));
            }
            tasks.push(task);
        }
        if problems.is_empty() { Ok(Suite { tasks, ..suite }) } else { Err(problems) }
    }
}

/// Problems of one task, each with the line of its key.
struct Told<'a> {
    source: &'a Source<'a>,
    given: Vec<(&'a str, Range<usize>)>,
    table: Range<usize>,
    problems: &'a mut Vec<Problem>,
}

impl Told<'_> {
    fn tell(&mut self, key: &str, what: String) {
        let span = self.given.iter().find(|(name, _)| *name == key).map_or(&self.table, |(_, span)| span);
        let place = self.source.at(span);
        self.problems.push(Problem { place, what: format!("task.{key}: {what}") });
    }
}

fn resolve_task(raw: RawSuiteTask, told: &mut Told<'_>) -> SuiteTask {
    let kind = raw.kind.unwrap_or_else(|| {
        told.tell("kind", "is missing; there are perplexity, last_word, multiple_choice, generate".into());
        SuiteKind::Perplexity
    });
    let takes_shots = kind != SuiteKind::Perplexity;
    if raw.kind.is_some() {
        let is_of_kind = |key: &str| {
            OF_ALL.contains(&key) || takes_shots && OF_SHOTS.contains(&key) || kind.keys().contains(&key)
        };
        let foreign: Vec<&str> =
            told.given.iter().map(|(key, _)| *key).filter(|key| !is_of_kind(key)).collect();
        for key in foreign {
            told.tell(key, format!("says nothing of a task of kind {}", kind.name()));
        }
    }
    let [prompt, answer] = match kind {
        SuiteKind::Perplexity => ["", ""],
        SuiteKind::LastWord => ["{context}", " {word}"],
        SuiteKind::MultipleChoice => ["{context}", " {choice}"],
        SuiteKind::Generate => ["{question}", " {answer}"],
    };
    let template = |text: &str| text.parse().expect("the defaults are templates");
    let choices = raw.choices.unwrap_or_else(|| vec!["choices".into()]);
    let labels = raw.labels.unwrap_or_default();
    let task = SuiteTask {
        name: required(raw.name, "name", told),
        kind,
        data: required(raw.data, "data", told).into(),
        train: raw.train.map(PathBuf::from),
        shots: raw.shots.unwrap_or_else(|| vec![0]),
        text: raw.text.unwrap_or_else(|| "text".into()),
        stride: raw.stride,
        description: raw.description.unwrap_or_default(),
        prompt: raw.prompt.unwrap_or_else(|| template(prompt)),
        answer: raw.answer.unwrap_or_else(|| template(answer)),
        separator: raw.separator.unwrap_or_else(|| "\n\n".into()),
        choices: if labels.is_empty() { choices } else { Vec::new() },
        labels,
        label: raw.label.unwrap_or_else(|| "label".into()),
        unconditional: raw.unconditional.unwrap_or_else(|| "Answer:".into()),
        stop: raw.stop.unwrap_or_else(|| vec!["\n".into()]),
        max_tokens: raw.max_tokens.unwrap_or(32),
        temperature: raw.temperature.unwrap_or(0.0),
        overlong: raw.overlong.unwrap_or_default(),
        max_examples: raw.max_examples,
    };
    check_task(&task, told);
    task
}

fn required(value: Option<String>, key: &str, told: &mut Told<'_>) -> String {
    let value = value.unwrap_or_default();
    if value.is_empty() {
        told.tell(key, "is missing".into());
    }
    value
}

fn check_task(task: &SuiteTask, told: &mut Told<'_>) {
    for (key, number) in
        [("stride", task.stride), ("max_tokens", Some(task.max_tokens)), ("max_examples", task.max_examples)]
    {
        if number == Some(0) {
            told.tell(key, "must be at least 1".into());
        }
    }
    if task.shots.is_empty() || task.shots.windows(2).any(|pair| pair[0] >= pair[1]) {
        told.tell("shots", "expected numbers that rise, like [0, 1, 4, 16]".into());
    }
    if !(task.temperature >= 0.0 && task.temperature.is_finite()) {
        told.tell("temperature", format!("{} is not 0 or more", task.temperature));
    }
    if task.stop.iter().any(String::is_empty) {
        told.tell("stop", "an empty text would end every answer before it begins".into());
    }
    if task.kind == SuiteKind::MultipleChoice {
        if task.labels.len() == 1 {
            told.tell("labels", "got 1, expected all choices that there are, at least two".into());
        }
        if task.labels.is_empty() && task.choices.is_empty() {
            told.tell("choices", "names no field".into());
        }
        if task.unconditional.is_empty() {
            told.tell("unconditional", "must not be empty; \"Answer:\" is usual".into());
        }
        if !task.prompt.fields().chain(task.answer.fields()).any(|field| field == "choice") {
            told.tell(
                "answer",
                "{choice} is neither in it nor in task.prompt: all choices would be equal".into(),
            );
        }
    }
}
