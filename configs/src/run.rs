//! The configuration as it is meant: every value present, derived and cross-checked.
//! The rest of Phalanx sees only this. Written to the run folder as `config.toml`, in the same keys
//! that it is read from.

use crate::batch::nearest;
use crate::data::{DataConfig, resolve_data};
use crate::load::Problem;
use crate::raw::{
    RawBatch, RawConfig, RawEval, RawGuard, RawMetrics, RawModel, RawOptim, RawParallel, RawRun, RawSchedule,
    RawTask,
};
use crate::{
    Activation, BatchError, BatchPlan, Batches, Budget, Device, Listen, ModelConfig, Norm, Objective,
    ParallelConfig, Pattern, Schedule, ScheduleKind, TaskConfig,
};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// A run, resolved.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunConfig {
    /// Name, folder and seed.
    pub run: RunSection,
    /// Shape of the model.
    pub model: ModelConfig,
    /// Token folders.
    pub data: DataConfig,
    /// Batch in tokens.
    pub batch: BatchConfig,
    /// AdamW and clipping.
    pub optim: OptimConfig,
    /// Learning rate and end.
    pub schedule: Schedule,
    /// Device, precision, and what ranks share out.
    pub parallel: ParallelConfig,
    /// When to save and how many to keep.
    pub checkpoint: CheckpointConfig,
    /// When to validate and on how much.
    pub eval: EvalConfig,
    /// What is watched for beside numbers that are not finite.
    #[serde(default)]
    pub guard: GuardConfig,
    /// How often a step is reported, and where to whoever asks.
    pub metrics: MetricsConfig,
    /// What the model is fine-tuned to; none in pre-training.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub task: Option<TaskConfig>,
}

/// `[run]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunSection {
    /// Name of the run; the file's name by default.
    pub name: String,
    /// Run folder; `runs/NAME` by default.
    pub dir: PathBuf,
    /// Seed of the weights and the data order; 1337 by default.
    pub seed: u64,
}

/// `[batch]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BatchConfig {
    /// Tokens per optimizer update, over all ranks.
    pub global_batch_tokens: u64,
    /// Sequences per rank and pass.
    pub micro_batch: usize,
    /// Smaller batches at the start of the run.
    #[serde(flatten)]
    pub ramp: Option<BatchRamp>,
}

/// `[batch]`, its ramp: the batch grows with the tokens seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct BatchRamp {
    /// Tokens of the first updates.
    pub ramp_start_tokens: u64,
    /// Tokens after which the batch has its full size.
    pub ramp_tokens: u64,
}

/// `[optim]`: AdamW (Loshchilov & Hutter 2019) with clipping by the global norm.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OptimConfig {
    /// Peak learning rate.
    pub lr: f64,
    /// Decay rates of the two moments.
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled decay of matrices, times the learning rate.
    pub weight_decay: f64,
    /// Largest global L2 norm of the gradient; 0 turns clipping off.
    pub grad_clip: f64,
}

/// `[checkpoint]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CheckpointConfig {
    /// Steps between checkpoints; 0 for one at the end only.
    pub every_steps: u64,
    /// How many of the newest to keep.
    pub keep_last: usize,
    /// Those of multiples of this are kept too; 0 for none.
    pub keep_every_steps: u64,
}

impl CheckpointConfig {
    /// Of the steps that have a checkpoint, ascending, those that need not be kept.
    pub fn surplus(&self, steps: &[u64]) -> Vec<u64> {
        let older = &steps[..steps.len().saturating_sub(self.keep_last.max(1))];
        let stays = |step: u64| self.keep_every_steps > 0 && step.is_multiple_of(self.keep_every_steps);
        older.iter().copied().filter(|&step| !stays(step)).collect()
    }
}

/// `[eval]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EvalConfig {
    /// Steps between validations; 0 for the first and the last only.
    pub every_steps: u64,
    /// Validation tokens used; all of them when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_tokens: Option<u64>,
    /// The suite that the model is measured on too; none when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub suite: Option<PathBuf>,
    /// Steps between these; 0 for the first and the last only.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub suite_every_steps: u64,
}

fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// `[guard]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct GuardConfig {
    /// A loss this many times the usual one is a spike; off when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub spike_factor: Option<f64>,
    /// Steps between comparisons of the ranks' weights; 0 for never.
    pub replica_check_steps: u64,
    /// Seconds without a sign of life after which ranks hang; ten times as many before the first step.
    pub hang_timeout_s: u64,
}

impl Default for GuardConfig {
    fn default() -> GuardConfig {
        GuardConfig { spike_factor: None, replica_check_steps: 0, hang_timeout_s: 60 }
    }
}

/// `[metrics]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MetricsConfig {
    /// Steps between reported steps.
    pub every_steps: u64,
    /// Where ranks and launcher serve what is measured.
    #[serde(default)]
    pub listen: Listen,
}

/// Finds the vocabulary size of a prepared data folder, or says why it cannot.
pub(crate) type VocabularyOf<'a> = &'a dyn Fn(&Path) -> Result<usize, String>;

impl RunConfig {
    /// Derives a run from what was typed. `stem` names the run when the file does not. Returns every
    /// problem that can be known, not the first.
    pub(crate) fn resolve(
        raw: RawConfig,
        stem: &str,
        vocabulary_of: VocabularyOf<'_>,
    ) -> Result<RunConfig, Vec<Problem>> {
        let mut problems = Vec::new();
        let run = resolve_run(raw.run, stem, &mut problems);
        if raw.task != RawTask::default() {
            let what = "is for `phalanx finetune`, which takes the model from a checkpoint";
            problems.push(Problem::key("task", what.into()));
        }

        let data = resolve_data(raw.data, &mut problems);
        let model = resolve_model(raw.model, &data, vocabulary_of, &mut problems);
        let batch = resolve_batch(&raw.batch, model.seq_len, &mut problems);
        let optim = resolve_optim(raw.optim, &mut problems);
        let parallel = resolve_parallel(&raw.parallel, &mut problems);
        let batches = Batches::new(&batch, model.seq_len, parallel.shard);
        let schedule = resolve_schedule(raw.schedule, &batches, &mut problems);
        if parallel.may_be_reproducible() {
            power_of_two(&batch, model.seq_len, &mut problems);
        }
        let checkpoint = CheckpointConfig {
            every_steps: raw.checkpoint.every_steps.unwrap_or(1000),
            keep_last: raw.checkpoint.keep_last.unwrap_or(3),
            keep_every_steps: raw.checkpoint.keep_every_steps.unwrap_or(0),
        };
        at_least_one(checkpoint.keep_last as u64, "checkpoint.keep_last", &mut problems);
        let eval = resolve_eval(raw.eval, &mut problems);
        let guard = resolve_guard(&raw.guard, &mut problems);
        let metrics = resolve_metrics(&raw.metrics, &mut problems);

        if !problems.is_empty() {
            return Err(problems);
        }
        let task = None;
        Ok(RunConfig {
            run,
            model,
            data,
            batch,
            optim,
            schedule,
            parallel,
            checkpoint,
            eval,
            guard,
            metrics,
            task,
        })
    }

    /// Whether the result may not depend, in any bit, on how many ranks make it.
    pub fn reproducible(&self, on_cpu: bool) -> bool {
        self.parallel.reproducible(on_cpu)
    }

    /// The batch of each step.
    pub fn batches(&self) -> Batches {
        Batches::new(&self.batch, self.model.seq_len, self.parallel.shard)
    }

    /// How a step with the full batch falls on `world_size` ranks.
    ///
    /// # Errors
    /// A batch that they cannot share evenly.
    pub fn batch_plan(&self, world_size: usize) -> Result<BatchPlan, BatchError> {
        self.batches().full(world_size)
    }

    /// Steps after which the run is over.
    pub fn max_steps(&self) -> u64 {
        match self.schedule.budget {
            Budget::MaxSteps(steps) => steps,
            Budget::MaxTokens(tokens) => self.batches().steps_for(tokens),
        }
    }

    /// The learning rate of the update that takes the run from `step` to `step + 1`.
    pub fn lr(&self, step: u64) -> f64 {
        let batches = self.batches();
        let end_tokens = batches.tokens_before(self.max_steps());
        self.optim.lr * self.schedule.fraction(batches.tokens_before(step + 1), end_tokens)
    }

    /// The configuration as TOML, in the keys that it is read from.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("every value of a RunConfig has a TOML form")
    }

    /// What may not change when a run goes on, and does between `earlier` and this: one line each.
    /// Ranks and what they share out, the schedule's end, evaluation, checkpoints, guard, metrics and
    /// folders are free; data is compared by its digest where the checkpoint is read.
    pub fn fixed_differences(&self, earlier: &RunConfig) -> Vec<String> {
        let (new, old) = (self.fixed(), earlier.fixed());
        let keys: BTreeSet<&String> = new.keys().chain(old.keys()).collect();
        let shown = |value: Option<&toml::Value>| value.map_or("nothing".to_string(), ToString::to_string);
        keys.into_iter()
            .filter(|&key| new.get(key) != old.get(key))
            .map(|key| {
                let (now, then) = (shown(new.get(key)), shown(old.get(key)));
                format!("{key} is {now}, the checkpoint was made with {then}")
            })
            .collect()
    }

    /// The values that may not change, by `section.key`.
    fn fixed(&self) -> BTreeMap<String, toml::Value> {
        let table = toml::Table::try_from(self).expect("every value of a RunConfig has a TOML form");
        let free =
            ["run.name", "run.dir", "schedule.max_steps", "schedule.max_tokens", "schedule.decay_tokens"];
        // Of the data, what is done with it; what it is has its digest in the checkpoint.
        let of_data = |key: &str| key == "data.document_mask";
        ["run", "model", "data", "batch", "optim", "schedule", "task"]
            .into_iter()
            .flat_map(|section| {
                let values = table.get(section).and_then(toml::Value::as_table).into_iter().flatten();
                values.map(move |(key, value)| (format!("{section}.{key}"), value.clone()))
            })
            .filter(|(key, _)| !free.contains(&key.as_str()) && (!key.starts_with("data.") || of_data(key)))
            .collect()
    }
}

pub(crate) fn resolve_run(raw: RawRun, stem: &str, problems: &mut Vec<Problem>) -> RunSection {
    let name = raw.name.unwrap_or_else(|| stem.to_string());
    if name.is_empty() || name.contains(['/', '\\']) || name.starts_with('.') {
        problems.push(Problem::key("run.name", format!("\"{name}\" cannot name a folder")));
    }
    RunSection {
        dir: raw.dir.map_or_else(|| Path::new("runs").join(&name), PathBuf::from),
        name,
        seed: raw.seed.unwrap_or(1337),
    }
}

fn resolve_model(
    raw: RawModel,
    data: &DataConfig,
    vocabulary_of: VocabularyOf<'_>,
    problems: &mut Vec<Problem>,
) -> ModelConfig {
    let objective = raw.objective.unwrap_or_default();
    let masked = objective == Objective::Masked;
    // One more than the tokenizer has: room for the mask, where the tokenizer has none.
    let of_data = |problems: &mut _| data.vocab_size(vocabulary_of, problems) + usize::from(masked);
    let model = ModelConfig {
        n_layer: required(raw.n_layer, "model.n_layer", problems),
        n_head: required(raw.n_head, "model.n_head", problems),
        n_embd: required(raw.n_embd, "model.n_embd", problems),
        seq_len: required(raw.seq_len, "model.seq_len", problems),
        vocab_size: raw.vocab_size.unwrap_or_else(|| of_data(problems)),
        attention: raw
            .attention
            .unwrap_or_else(|| vec![if masked { Pattern::Bidirectional } else { Pattern::Dense }]),
        norm: raw.norm.unwrap_or(if masked { Norm::Post } else { Norm::Pre }),
        dropout: raw.dropout.unwrap_or(0.0),
        qkv_bias: raw.qkv_bias.unwrap_or(true),
        objective,
        activation: raw.activation.unwrap_or(if masked { Activation::Gelu } else { Activation::GeluTanh }),
        norm_eps: raw.norm_eps.unwrap_or(if masked { 1e-12 } else { 1e-5 }),
        embedding_norm: raw.embedding_norm.unwrap_or(masked),
        token_types: raw.token_types.unwrap_or(if masked { 2 } else { 0 }),
    };
    for (key, value) in [
        ("model.n_layer", raw.n_layer),
        ("model.n_head", raw.n_head),
        ("model.n_embd", raw.n_embd),
        ("model.seq_len", raw.seq_len),
        ("model.vocab_size", raw.vocab_size),
    ] {
        at_least_one(value.unwrap_or(1) as u64, key, problems);
    }
    if model.n_head > 0 && !model.n_embd.is_multiple_of(model.n_head) {
        let (c, h) = (model.n_embd, model.n_head);
        let below = c / h * h;
        let near = if below == 0 { format!("{h} works") } else { format!("{below} and {} work", below + h) };
        problems
            .push(Problem::key("model.n_embd", format!("{c} is no multiple of model.n_head = {h}; {near}")));
    }
    if model.attention.is_empty() {
        problems
            .push(Problem::key("model.attention", "an empty list; [\"dense\"] is the plain decoder".into()));
    }
    check_objective(&model, problems);
    if !(0.0..1.0).contains(&model.dropout) {
        problems.push(Problem::key("model.dropout", format!("{} does not lie in [0, 1)", model.dropout)));
    }
    model
}

/// Refuses what does not go with the objective.
fn check_objective(model: &ModelConfig, problems: &mut Vec<Problem>) {
    let masked = model.is_masked();
    if let Some(pattern) = model.attention.iter().find(|pattern| pattern.is_causal() == masked) {
        let what = if masked {
            format!(
                "\"{pattern}\" sees no later tokens; with model.objective = \"masked\" it is \"bidirectional\""
            )
        } else {
            format!(
                "\"{pattern}\" sees the tokens that it is asked to predict, unless model.objective = \"masked\""
            )
        };
        problems.push(Problem::key("model.attention", what));
    }
    if masked && model.norm == Norm::Pre {
        let what = "\"pre\" has no masked form here; leave it out, or take \"post\", as BERT does";
        problems.push(Problem::key("model.norm", what.into()));
    }
    if !(model.norm_eps > 0.0 && model.norm_eps.is_finite()) {
        problems.push(Problem::key("model.norm_eps", "must be a positive number".into()));
    }
    if ![0, 2].contains(&model.token_types) {
        let what =
            format!("{} is neither 0, for none, nor 2, for the first text and the second", model.token_types);
        problems.push(Problem::key("model.token_types", what));
    }
}

fn resolve_batch(raw: &RawBatch, seq_len: usize, problems: &mut Vec<Problem>) -> BatchConfig {
    let ramp = match (raw.ramp_start_tokens, raw.ramp_tokens) {
        (Some(ramp_start_tokens), Some(ramp_tokens)) => {
            at_least_one(ramp_start_tokens, "batch.ramp_start_tokens", problems);
            Some(BatchRamp { ramp_start_tokens, ramp_tokens })
        }
        (None, None) => None,
        (start, _) => {
            let missing = if start.is_none() { "batch.ramp_start_tokens" } else { "batch.ramp_tokens" };
            problems.push(Problem::key(
                missing,
                "is missing; a ramp has a start and a length, or there is none".into(),
            ));
            None
        }
    };
    let mut batch = BatchConfig {
        global_batch_tokens: required(raw.global_batch_tokens, "batch.global_batch_tokens", problems),
        micro_batch: raw.micro_batch.unwrap_or(1),
        ramp,
    };
    at_least_one(batch.micro_batch as u64, "batch.micro_batch", problems);
    if let Some(what) = batch.ramp.and_then(|ramp| not_doubled(&batch, ramp.ramp_start_tokens, seq_len)) {
        problems.push(Problem::key("batch.ramp_start_tokens", what));
        batch.ramp = None;
    }
    batch
}

/// What is wrong with a ramp's start that, doubled and doubled again, misses the full batch.
fn not_doubled(batch: &BatchConfig, start: u64, seq_len: usize) -> Option<String> {
    let (full, micro_tokens) = (batch.global_batch_tokens, batch.micro_batch as u64 * seq_len as u64);
    let halves = || (0..=full.trailing_zeros().min(63)).map(|times| full >> times);
    if start == 0 || full == 0 || halves().any(|tokens| tokens == start) {
        return None;
    }
    let works = || halves().filter(|tokens| tokens.is_multiple_of(micro_tokens.max(1)));
    let hint = nearest(works().find(|&tokens| tokens < start), works().rfind(|&tokens| tokens > start));
    Some(format!("{start} times a power of two is not batch.global_batch_tokens = {full}\nhint: {hint}"))
}

pub(crate) fn resolve_parallel(raw: &RawParallel, problems: &mut Vec<Problem>) -> ParallelConfig {
    let parallel = ParallelConfig {
        device: raw.device.unwrap_or(Device::Auto),
        threads: raw.threads.unwrap_or(1),
        shard: raw.shard.unwrap_or_default(),
        recompute: raw.recompute.unwrap_or_default(),
        dtype: raw.dtype.unwrap_or_default(),
        reproducible: raw.reproducible,
    };
    at_least_one(parallel.threads as u64, "parallel.threads", problems);
    parallel
}

pub(crate) fn resolve_guard(raw: &RawGuard, problems: &mut Vec<Problem>) -> GuardConfig {
    if let Some(factor) = raw.spike_factor.filter(|factor| !(*factor > 1.0 && factor.is_finite())) {
        let what = format!("{factor} is not above 1; leave it out to turn it off");
        problems.push(Problem::key("guard.spike_factor", what));
    }
    let default = GuardConfig::default();
    let guard = GuardConfig {
        spike_factor: raw.spike_factor,
        replica_check_steps: raw.replica_check_steps.unwrap_or(default.replica_check_steps),
        hang_timeout_s: raw.hang_timeout_s.unwrap_or(default.hang_timeout_s),
    };
    at_least_one(guard.hang_timeout_s, "guard.hang_timeout_s", problems);
    guard
}

pub(crate) fn resolve_metrics(raw: &RawMetrics, problems: &mut Vec<Problem>) -> MetricsConfig {
    let listen = raw.listen.as_deref().map(str::parse).transpose().unwrap_or_else(|what| {
        problems.push(Problem::key("metrics.listen", what));
        None
    });
    let every_steps = raw.every_steps.unwrap_or(1);
    at_least_one(every_steps, "metrics.every_steps", problems);
    MetricsConfig { every_steps, listen: listen.unwrap_or_default() }
}

pub(crate) fn resolve_optim(raw: RawOptim, problems: &mut Vec<Problem>) -> OptimConfig {
    let optim = OptimConfig {
        lr: required(raw.lr, "optim.lr", problems),
        betas: raw.betas.unwrap_or([0.9, 0.95]),
        eps: raw.eps.unwrap_or(1e-8),
        weight_decay: raw.weight_decay.unwrap_or(0.1),
        grad_clip: raw.grad_clip.unwrap_or(1.0),
    };
    let mut check = |good: bool, key: &str, what: &str| {
        if !good {
            problems.push(Problem::key(key, what.to_string()));
        }
    };
    check(raw.lr.is_none_or(|lr| lr > 0.0 && lr.is_finite()), "optim.lr", "must be a positive number");
    check(optim.betas.iter().all(|beta| (0.0..1.0).contains(beta)), "optim.betas", "must both lie in [0, 1)");
    check(optim.eps > 0.0 && optim.eps.is_finite(), "optim.eps", "must be a positive number");
    check(
        optim.weight_decay >= 0.0 && optim.weight_decay.is_finite(),
        "optim.weight_decay",
        "must not be negative",
    );
    check(
        optim.grad_clip >= 0.0 && optim.grad_clip.is_finite(),
        "optim.grad_clip",
        "must not be negative; 0 turns it off",
    );
    optim
}

fn resolve_schedule(raw: RawSchedule, batches: &Batches, problems: &mut Vec<Problem>) -> Schedule {
    let budget = match (raw.max_steps, raw.max_tokens) {
        (Some(steps), None) => Budget::MaxSteps(steps),
        (None, Some(tokens)) => Budget::MaxTokens(tokens),
        (None, None) => {
            problems.push(Problem::key(
                "schedule",
                "needs max_steps or max_tokens: when is the run over?".into(),
            ));
            Budget::MaxSteps(0)
        }
        (Some(_), Some(_)) => {
            problems.push(Problem::key("schedule", "has both max_steps and max_tokens; keep one".into()));
            Budget::MaxSteps(0)
        }
    };
    let end_tokens = match budget {
        Budget::MaxSteps(steps) => batches.tokens_before(steps),
        Budget::MaxTokens(tokens) => tokens,
    };
    let kind = raw.kind.unwrap_or(ScheduleKind::Cosine);
    let schedule = Schedule {
        kind,
        warmup_tokens: raw.warmup_tokens.unwrap_or(0),
        decay_tokens: raw.decay_tokens.unwrap_or(match kind {
            ScheduleKind::Cosine => end_tokens,
            ScheduleKind::Wsd => end_tokens / 10,
            ScheduleKind::Constant => 0,
        }),
        min_lr_fraction: raw.min_lr_fraction.unwrap_or(0.1),
        budget,
    };
    if !(0.0..=1.0).contains(&schedule.min_lr_fraction) {
        problems.push(Problem::key("schedule.min_lr_fraction", "must lie in [0, 1]".into()));
    }
    if kind == ScheduleKind::Cosine && schedule.decay_tokens < schedule.warmup_tokens {
        let (decay, warmup) = (schedule.decay_tokens, schedule.warmup_tokens);
        let what =
            format!("{decay} ends before warmup_tokens = {warmup}; it counts from the start of the run");
        problems.push(Problem::key("schedule.decay_tokens", what));
    }
    schedule
}

pub(crate) fn required<T: Default>(value: Option<T>, key: &str, problems: &mut Vec<Problem>) -> T {
    value.unwrap_or_else(|| {
        problems.push(Problem::key(key, "is missing and has no default".into()));
        T::default()
    })
}

/// A sum that does not depend on the number of ranks is a perfect binary tree over the micro-batches.
fn power_of_two(batch: &BatchConfig, seq_len: usize, problems: &mut Vec<Problem>) {
    let Ok(plan) = BatchPlan::new(batch.global_batch_tokens, batch.micro_batch.max(1), seq_len.max(1), 1)
    else {
        return; // refused where the number of ranks is known
    };
    let (m, odd) = (plan.micro_batches, plan.micro_batches >> plan.micro_batches.trailing_zeros());
    if odd > 1 {
        let larger = batch.micro_batch as u64 * odd;
        let what = format!(
            "{m} micro-batches a step (batch.global_batch_tokens / micro_batch / seq_len) are no power of two\n\
             hint: batch.micro_batch = {larger} makes {} of them; or set parallel.reproducible = false",
            m / odd
        );
        problems.push(Problem::key("parallel.reproducible", what));
    }
}

fn resolve_eval(raw: RawEval, problems: &mut Vec<Problem>) -> EvalConfig {
    if raw.suite.is_none() && raw.suite_every_steps.is_some() {
        problems
            .push(Problem::key("eval.suite_every_steps", "there is no eval.suite to be measured on".into()));
    }
    EvalConfig {
        every_steps: raw.every_steps.unwrap_or(1000),
        max_tokens: raw.max_tokens,
        suite: raw.suite.map(PathBuf::from),
        suite_every_steps: raw.suite_every_steps.unwrap_or(0),
    }
}

pub(crate) fn at_least_one(value: u64, key: &str, problems: &mut Vec<Problem>) {
    if value == 0 {
        problems.push(Problem::key(key, "must be at least 1".into()));
    }
}
