//! What a run is, as data, and all that follows from it by arithmetic.
//!
//! Owns the typed configuration, batch arithmetic, attention patterns, the model's
//! layout in segments, memory, traffic and the acts of a step, plans of runs, what data sheets say of GPUs, the
//! learning-rate schedule, counted random numbers, exit codes, and what ranks and launcher tell each other.
//! Refuses to know tensors, processes and networks: no torch, no MPI, and no I/O but
//! reading TOML.

mod arguments;
mod batch;
mod data;
mod data_sheets;
mod exit;
mod fault;
mod heartbeat;
mod listen;
mod load;
mod memory;
mod model;
mod parallel;
mod pattern;
mod pieces;
pub mod plan;
mod ramp;
mod random;
mod raw;
mod run;
mod schedule;
mod segments;
mod shards;
mod step;
mod suite;
mod task;
mod template;
mod traffic;

pub use arguments::{HANDED_ON, HandedOnArgument, HandedOnCommand};
pub use batch::{BatchError, BatchPlan, Leaves};
pub use data::{DataConfig, SourceConfig};
pub use data_sheets::data_sheet_bf16;
pub use exit::{Exit, last_words, read_last_words};
pub use fault::{Fault, FaultError};
pub use heartbeat::{
    Doing, Heartbeat, LAUNCHER_VARIABLE, MOST_MESSAGE_BYTES, SECRET_VARIABLE, START_VARIABLE, Secret,
};
pub use listen::Listen;
pub use load::{ConfigError, Problem, load, load_task, parse};
pub use memory::{Memory, Setup, logits_at_once};
pub use model::{Activation, MASKED_SHARE, ModelConfig, Norm, Objective};
pub use parallel::{Device, Dtype, ParallelConfig, Recompute, Shard};
pub use pattern::{Pattern, PatternError};
pub use pieces::{Documents, Piece};
pub use ramp::{Batches, Stage};
pub use random::Philox;
pub use raw::RawConfig;
pub use run::{
    BatchConfig, BatchRamp, CheckpointConfig, EvalConfig, GuardConfig, MetricsConfig, OptimConfig, RunConfig,
    RunSection,
};
pub use schedule::{Budget, Schedule, ScheduleKind};
pub use segments::{Init, SegmentSpec, TensorSpec, segments, task_segment};
pub use shards::{SLICE_ALIGN, owned_range, slice_numel};
pub use step::{Act, Call, Cargo, Collective, Work, step_acts};
pub use suite::{Overlong, Suite, SuiteKind, SuiteTask, load_suite};
pub use task::{Metric, TASK_TOKENS, TaskConfig, TaskFile, TaskKind};
pub use template::Template;
pub use traffic::StepTraffic;
