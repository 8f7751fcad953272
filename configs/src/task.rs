//! What a model is fine-tuned to: a task file, typed and checked like a run's, and the run that follows from it
//! once the model it starts from and the number of its examples are known. Opens no data.
//!
//! Radford et al. 2018, section 3.3 (the four input forms) and 4.1 (the values that are defaults here).

use crate::load::Problem;
use crate::raw::{RawConfig, RawData, RawModel, RawTask};
use crate::run::{
    at_least_one, required, resolve_guard, resolve_metrics, resolve_optim, resolve_parallel, resolve_run,
};
use crate::{
    BatchConfig, Batches, Budget, CheckpointConfig, DataConfig, EvalConfig, GuardConfig, MetricsConfig,
    ModelConfig, OptimConfig, ParallelConfig, RunConfig, RunSection, Schedule, ScheduleKind,
};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Tokens that fine-tuning adds to the vocabulary: start, delimiter and extract.
pub const TASK_TOKENS: usize = 3;

/// What is asked about the texts of an example.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TaskKind {
    /// Which of some classes a text has.
    Classification,
    /// How a second text, the hypothesis, stands to a first, the premise: which of some classes.
    Entailment,
    /// How alike two texts are, whichever comes first: a class, or a number.
    Similarity,
    /// Which of some texts goes on from a context.
    MultipleChoice,
}

/// How predictions are scored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// The share that is right.
    Accuracy,
    /// F1 of the last of two classes, or its mean over more than two.
    F1,
    /// Matthews' correlation of classes.
    Matthews,
    /// Pearson's correlation of numbers.
    Pearson,
    /// Spearman's correlation of the ranks of numbers.
    Spearman,
}

impl Metric {
    /// As it is typed.
    pub fn name(self) -> &'static str {
        match self {
            Metric::Accuracy => "accuracy",
            Metric::F1 => "f1",
            Metric::Matthews => "matthews",
            Metric::Pearson => "pearson",
            Metric::Spearman => "spearman",
        }
    }

    fn is_of_numbers(self) -> bool {
        matches!(self, Metric::Pearson | Metric::Spearman)
    }
}

/// `[task]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TaskConfig {
    /// What is asked.
    pub kind: TaskKind,
    /// Names of the fields that hold an example's texts, in order. Of a multiple choice the first is the
    /// context, the others are the choices, or one is a list of them.
    pub fields: Vec<String>,
    /// Name of the field that holds the answer.
    pub label: String,
    /// The classes; none where the answer is a number or a choice.
    pub labels: Vec<String>,
    /// How validation is scored.
    pub metrics: Vec<Metric>,
    /// Passes over the training examples.
    pub epochs: u64,
    /// Examples of an update, over all ranks.
    pub batch_examples: u64,
    /// Weight of the language model's loss beside the task's.
    pub lambda: f64,
    /// Share of all updates over which the learning rate rises.
    pub warmup_fraction: f64,
    /// Which checkpoint it starts from; empty until that is known.
    #[serde(default)]
    pub base: String,
}

impl TaskConfig {
    /// Whether the answer is a number, and not one of some classes.
    pub fn is_of_numbers(&self) -> bool {
        self.kind == TaskKind::Similarity && self.labels.is_empty()
    }

    /// Rows of the linear layer: one for each class; one alone scores a number or a choice.
    pub fn outputs(&self) -> usize {
        self.labels.len().max(1)
    }
}

/// A task file, checked as far as it can be without the model and the data that it names.
#[derive(Debug, Clone, PartialEq)]
pub struct TaskFile {
    /// Name, folder and seed.
    pub run: RunSection,
    /// The task.
    pub task: TaskConfig,
    /// The files of training and validation examples.
    pub data: DataConfig,
    /// Examples per rank and pass.
    pub micro_batch: usize,
    /// Device, precision, and what ranks share out.
    pub parallel: ParallelConfig,
    /// What is watched for.
    pub guard: GuardConfig,
    dropout: f64,
    optim: OptimConfig,
    checkpoint: CheckpointConfig,
    eval_every_steps: Option<u64>,
    metrics: MetricsConfig,
}

impl TaskFile {
    /// Derives what can be. Returns every problem that can be known, not the first.
    pub(crate) fn resolve(raw: RawConfig, stem: &str) -> Result<TaskFile, Vec<Problem>> {
        let mut problems = Vec::new();
        only_what_a_task_has(&raw, &mut problems);
        let run = resolve_run(raw.run, stem, &mut problems);
        let dropout = raw.model.dropout.unwrap_or(0.1);
        if !(0.0..1.0).contains(&dropout) {
            problems.push(Problem::key("model.dropout", format!("{dropout} does not lie in [0, 1)")));
        }
        let data = DataConfig {
            train: Some(required(raw.data.train, "data.train", &mut problems).into()),
            val: raw.data.val.map(PathBuf::from),
            document_mask: false,
            source: Vec::new(),
        };
        let parallel = resolve_parallel(&raw.parallel, &mut problems);
        let (task, micro_batch) = resolve_task(raw.task, &parallel, &mut problems);
        let mut optim = raw.optim;
        optim.lr = optim.lr.or(Some(6.25e-5));
        optim.betas = optim.betas.or(Some([0.9, 0.999]));
        optim.weight_decay = optim.weight_decay.or(Some(0.01));
        let optim = resolve_optim(optim, &mut problems);
        let guard = resolve_guard(&raw.guard, &mut problems);
        let checkpoint = CheckpointConfig {
            every_steps: raw.checkpoint.every_steps.unwrap_or(1000),
            keep_last: raw.checkpoint.keep_last.unwrap_or(1),
            keep_every_steps: raw.checkpoint.keep_every_steps.unwrap_or(0),
        };
        at_least_one(checkpoint.keep_last as u64, "checkpoint.keep_last", &mut problems);
        let metrics = resolve_metrics(&raw.metrics, &mut problems);
        if !problems.is_empty() {
            return Err(problems);
        }
        let eval_every_steps = raw.eval.every_steps;
        Ok(TaskFile {
            run,
            task,
            data,
            micro_batch,
            parallel,
            guard,
            dropout,
            optim,
            checkpoint,
            eval_every_steps,
            metrics,
        })
    }

    /// The updates of a run over `n_examples` examples: as many as see each of them `task.epochs` times.
    pub fn steps(&self, n_examples: u64) -> u64 {
        (n_examples * self.task.epochs).div_ceil(self.task.batch_examples).max(1)
    }

    /// How many micro-batches an update has, which ranks share out.
    pub fn micro_batches(&self) -> u64 {
        self.task.batch_examples / self.micro_batch as u64
    }

    /// The run: `base`, the model of the checkpoint `name`, with the three new tokens, over `n_examples` training examples. A batch counts as many
    /// tokens as its examples would have at the full length of the context, one sequence each.
    pub fn run_config(&self, base: &ModelConfig, n_examples: u64, name: String) -> RunConfig {
        // A masked model has no loss of the next token that could stand beside the task's.
        let lambda = if base.is_masked() { 0.0 } else { self.task.lambda };
        let model =
            ModelConfig { vocab_size: base.vocab_size + TASK_TOKENS, dropout: self.dropout, ..base.clone() };
        let tokens = self.task.batch_examples * model.seq_len as u64;
        let batch = BatchConfig { global_batch_tokens: tokens, micro_batch: self.micro_batch, ramp: None };
        let steps = self.steps(n_examples);
        let end = Batches::new(&batch, model.seq_len, self.parallel.shard).tokens_before(steps);
        let warmup_tokens = (self.task.warmup_fraction * end as f64).round() as u64;
        let schedule = Schedule {
            // A fall that begins where the rise ends: a straight line down to 0.
            kind: ScheduleKind::Wsd,
            warmup_tokens,
            decay_tokens: end - warmup_tokens,
            min_lr_fraction: 0.0,
            budget: Budget::MaxSteps(steps),
        };
        let every_steps = self.eval_every_steps.unwrap_or((steps / self.task.epochs).max(1));
        RunConfig {
            run: self.run.clone(),
            model,
            data: self.data.clone(),
            batch,
            optim: self.optim.clone(),
            schedule,
            parallel: self.parallel.clone(),
            checkpoint: self.checkpoint.clone(),
            eval: EvalConfig { every_steps, max_tokens: None, suite: None, suite_every_steps: 0 },
            guard: self.guard.clone(),
            metrics: self.metrics.clone(),
            task: Some(TaskConfig { base: name, lambda, ..self.task.clone() }),
        }
    }
}

/// Refuses keys that a run has and a task has not.
fn only_what_a_task_has(raw: &RawConfig, problems: &mut Vec<Problem>) {
    let mut refuse = |foreign: bool, key: &str, what: &str| {
        if foreign {
            problems.push(Problem::key(key, what.to_string()));
        }
    };
    let model = RawModel { dropout: None, ..raw.model.clone() };
    refuse(
        model != RawModel::default(),
        "model",
        "comes from the checkpoint; a task sets model.dropout only",
    );
    let data = RawData { train: None, val: None, ..raw.data.clone() };
    refuse(data != RawData::default(), "data", "a task has data.train and data.val, and no more of it");
    refuse(raw.batch != Default::default(), "batch", "a task has task.batch_examples and task.micro_batch");
    let schedule = "of a task follows from task.epochs and task.warmup_fraction: up, and in a line down to 0";
    refuse(raw.schedule != Default::default(), "schedule", schedule);
    refuse(raw.eval.max_tokens.is_some(), "eval.max_tokens", "a task is scored on all of data.val");
    let suite = raw.eval.suite.is_some() || raw.eval.suite_every_steps.is_some();
    refuse(suite, "eval.suite", "a task is scored by task.metrics; phalanx eval measures models of text");
    refuse(raw.guard.spike_factor.is_some(), "guard.spike_factor", "a task has too few updates to judge by");
}

fn resolve_task(raw: RawTask, parallel: &ParallelConfig, problems: &mut Vec<Problem>) -> (TaskConfig, usize) {
    let kind = raw.kind.unwrap_or_else(|| {
        problems.push(Problem::key(
            "task.kind",
            "is missing; there are classification, entailment, similarity, multiple_choice".into(),
        ));
        TaskKind::Classification
    });
    let names: &[&str] = match kind {
        TaskKind::Classification => &["text"],
        TaskKind::Entailment => &["premise", "hypothesis"],
        TaskKind::Similarity => &["first", "second"],
        TaskKind::MultipleChoice => &["context", "choices"],
    };
    let batch_examples = raw.batch_examples.unwrap_or(32);
    let micro_batch = raw.micro_batch.unwrap_or_else(|| default_micro_batch(batch_examples));
    let mut task = TaskConfig {
        kind,
        fields: raw.fields.unwrap_or_else(|| names.iter().map(ToString::to_string).collect()),
        label: raw.label.unwrap_or_else(|| "label".into()),
        labels: raw.labels.unwrap_or_default(),
        metrics: Vec::new(),
        epochs: raw.epochs.unwrap_or(3),
        batch_examples,
        lambda: raw.lambda.unwrap_or(0.5),
        warmup_fraction: raw.warmup_fraction.unwrap_or(0.002),
        base: String::new(),
    };
    let default = if task.is_of_numbers() { Metric::Pearson } else { Metric::Accuracy };
    task.metrics = raw.metrics.unwrap_or_else(|| vec![default]);
    check_fields_and_labels(&task, names.len(), problems);
    check_metrics(&task, problems);
    at_least_one(task.epochs, "task.epochs", problems);
    at_least_one(batch_examples, "task.batch_examples", problems);
    at_least_one(micro_batch as u64, "task.micro_batch", problems);
    check_batch(batch_examples, micro_batch as u64, parallel, problems);
    if !(task.lambda >= 0.0 && task.lambda.is_finite()) {
        problems
            .push(Problem::key("task.lambda", "must not be negative; 0 leaves the language loss out".into()));
    }
    if !(0.0..=1.0).contains(&task.warmup_fraction) {
        problems.push(Problem::key("task.warmup_fraction", "must lie in [0, 1]".into()));
    }
    (task, micro_batch)
}

/// The largest part of a batch of at most 8 that is one of a power of two of parts.
fn default_micro_batch(batch_examples: u64) -> usize {
    let mut part = batch_examples.max(1);
    while part > 8 && part.is_multiple_of(2) {
        part /= 2;
    }
    part as usize
}

fn check_batch(batch: u64, micro: u64, parallel: &ParallelConfig, problems: &mut Vec<Problem>) {
    if batch == 0 || micro == 0 {
        return; // told already
    }
    if !batch.is_multiple_of(micro) {
        let what = format!("{micro} does not divide task.batch_examples = {batch}");
        problems.push(Problem::key("task.micro_batch", what));
    } else if parallel.may_be_reproducible() && !(batch / micro).is_power_of_two() {
        let what = format!(
            "{} micro-batches a step (task.batch_examples / task.micro_batch) are no power of two\n\
             hint: choose another task.micro_batch; or set parallel.reproducible = false",
            batch / micro
        );
        problems.push(Problem::key("task.micro_batch", what));
    }
}

fn check_fields_and_labels(task: &TaskConfig, n_fields: usize, problems: &mut Vec<Problem>) {
    let got = task.fields.len();
    let fits = if task.kind == TaskKind::MultipleChoice { got >= 2 } else { got == n_fields };
    if !fits {
        let expected = match task.kind {
            TaskKind::Classification => "one, that of the text",
            TaskKind::Entailment => "two, those of premise and hypothesis",
            TaskKind::Similarity => "two, those of the texts that are compared",
            TaskKind::MultipleChoice => "that of the context, and those of the choices or of a list of them",
        };
        problems.push(Problem::key("task.fields", format!("got {got}, expected {expected}")));
    }
    if task.fields.contains(&task.label) {
        problems.push(Problem::key("task.label", format!("{:?} is one of task.fields", task.label)));
    }
    let n = task.labels.len();
    let what = match task.kind {
        TaskKind::Classification | TaskKind::Entailment if n < 2 => {
            Some(format!("got {n}, expected all classes that there are, at least two"))
        }
        TaskKind::Similarity if n == 1 => Some("got 1, expected at least two, or none for numbers".into()),
        TaskKind::MultipleChoice if n > 0 => {
            Some("the answer is the number of a choice, from 0; leave them out".into())
        }
        _ => {
            let mut sorted = task.labels.clone();
            sorted.sort();
            let twice = sorted.windows(2).find(|pair| pair[0] == pair[1]);
            twice.map(|pair| format!("{:?} is there twice", pair[0]))
        }
    };
    problems.extend(what.map(|what| Problem::key("task.labels", what)));
}

fn check_metrics(task: &TaskConfig, problems: &mut Vec<Problem>) {
    for metric in &task.metrics {
        let (name, numbers) = (metric.name(), task.is_of_numbers());
        let what = match (metric.is_of_numbers(), numbers, task.kind) {
            (true, false, _) => format!("{name} compares numbers, and this task has classes"),
            (false, true, _) => {
                format!("{name} compares classes, and without task.labels this task has numbers")
            }
            (false, _, TaskKind::MultipleChoice) if *metric != Metric::Accuracy => {
                format!("{name} is of classes; a choice is right or wrong: accuracy")
            }
            _ => continue,
        };
        problems.push(Problem::key("task.metrics", what));
    }
}
