//! The configuration as it is typed: every key optional, nothing derived.
//! Also the list of keys that exist, which is what typos are measured against.

use crate::{
    Activation, Device, Dtype, Metric, Norm, Objective, Pattern, Recompute, ScheduleKind, Shard, TaskKind,
};
use serde::Deserialize;

/// A configuration file, as typed.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct RawConfig {
    /// A file, relative to this one, whose keys hold where this one has none.
    pub extends: Option<String>,
    /// `[run]`
    pub run: RawRun,
    /// `[model]`
    pub model: RawModel,
    /// `[data]`
    pub data: RawData,
    /// `[batch]`
    pub batch: RawBatch,
    /// `[optim]`
    pub optim: RawOptim,
    /// `[schedule]`
    pub schedule: RawSchedule,
    /// `[parallel]`
    pub parallel: RawParallel,
    /// `[checkpoint]`
    pub checkpoint: RawCheckpoint,
    /// `[eval]`
    pub eval: RawEval,
    /// `[guard]`
    pub guard: RawGuard,
    /// `[metrics]`
    pub metrics: RawMetrics,
    /// `[task]`
    pub task: RawTask,
}

/// Declares a section: the struct that reads it and the list of its keys, in one place.
macro_rules! section {
    ($(#[$doc:meta])* $name:ident { $($key:ident: $type:ty),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Default, PartialEq, Deserialize)]
        #[serde(default)]
        #[allow(missing_docs, unreachable_pub)] // each key is described where it is resolved
        pub struct $name { $(pub $key: Option<$type>),* }

        impl $name {
            pub(crate) const KEYS: &'static [&'static str] = &[$(stringify!($key)),*];
        }
    };
}

section! {
    /// `[run]` as typed.
    RawRun { name: String, dir: String, seed: u64 }
}
section! {
    /// `[model]` as typed.
    RawModel {
        n_layer: usize, n_head: usize, n_embd: usize, seq_len: usize, vocab_size: usize,
        attention: Vec<Pattern>, norm: Norm, dropout: f64, qkv_bias: bool,
        objective: Objective, activation: Activation, norm_eps: f64, embedding_norm: bool, token_types: usize,
    }
}
section! {
    /// `[data]` as typed.
    RawData { train: String, val: String, document_mask: bool, source: Vec<RawSource> }
}
section! {
    /// One `[[data.source]]` as typed.
    RawSource { path: String, weight: f64 }
}
section! {
    /// `[batch]` as typed.
    RawBatch { global_batch_tokens: u64, micro_batch: usize, ramp_start_tokens: u64, ramp_tokens: u64 }
}
section! {
    /// `[optim]` as typed.
    RawOptim { lr: f64, betas: [f64; 2], eps: f64, weight_decay: f64, grad_clip: f64 }
}
section! {
    /// `[schedule]` as typed.
    RawSchedule {
        kind: ScheduleKind, warmup_tokens: u64, decay_tokens: u64, min_lr_fraction: f64,
        max_steps: u64, max_tokens: u64,
    }
}
section! {
    /// `[parallel]` as typed.
    RawParallel {
        device: Device, threads: usize, shard: Shard, recompute: Recompute, dtype: Dtype,
        reproducible: bool,
    }
}
section! {
    /// `[checkpoint]` as typed.
    RawCheckpoint { every_steps: u64, keep_last: usize, keep_every_steps: u64 }
}
section! {
    /// `[eval]` as typed.
    RawEval { every_steps: u64, max_tokens: u64, suite: String, suite_every_steps: u64 }
}
section! {
    /// `[guard]` as typed.
    RawGuard { spike_factor: f64, replica_check_steps: u64, hang_timeout_s: u64 }
}
section! {
    /// `[metrics]` as typed.
    RawMetrics { every_steps: u64, listen: String }
}
section! {
    /// `[task]` as typed.
    RawTask {
        kind: TaskKind, fields: Vec<String>, label: String, labels: Vec<String>, metrics: Vec<Metric>,
        epochs: u64, batch_examples: u64, micro_batch: usize, lambda: f64, warmup_fraction: f64,
    }
}

pub(crate) use section;

/// Every section with its keys.
pub(crate) const SECTIONS: &[(&str, &[&str])] = &[
    ("run", RawRun::KEYS),
    ("model", RawModel::KEYS),
    ("data", RawData::KEYS),
    ("batch", RawBatch::KEYS),
    ("optim", RawOptim::KEYS),
    ("schedule", RawSchedule::KEYS),
    ("parallel", RawParallel::KEYS),
    ("checkpoint", RawCheckpoint::KEYS),
    ("eval", RawEval::KEYS),
    ("guard", RawGuard::KEYS),
    ("metrics", RawMetrics::KEYS),
    ("task", RawTask::KEYS),
];

/// Keys that hold a list of tables, by section and key, with the keys of these.
pub(crate) const LISTS: &[(&str, &str, &[&str])] = &[("data", "source", RawSource::KEYS)];
