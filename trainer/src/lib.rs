//! The run: model, engine, checkpoints, metrics, evaluation and generation.
//!
//! The loop is [`train`], in `train.rs`. Refuses to know MPI and kernels (both are `ops`'), text and
//! shards (`dataloader`'s), and how ranks are started (the launcher's).

mod train;

mod engine;
mod evaluation;
mod gradients;
mod guard;
mod inject;
mod masked;
mod masking;
mod model;
mod noise_scale;
mod optimizer;
mod replicas;
mod stop;
mod timing;
mod trained;
mod weights;

mod alike;
pub mod checkpoint;
mod resume;
mod run;
pub mod run_folder;
mod saving;
mod start;

pub mod heartbeat;
mod pulse;

mod gauges;
mod log;
mod metrics;
mod report;

pub mod arguments;
mod error;
pub mod exchange;
mod finetune;
pub mod generate;
mod gpu_check;
pub mod suite;

pub mod bench;
mod doctor;

pub use doctor::doctor;
pub use engine::{Engine, Gradient, MicroBatch};
pub use error::TrainError;
pub use finetune::{Form, PredictOptions, Prediction, TaskBatch, finetune, predict, scores};
pub use gpu_check::{Part, gpu_check, gpu_check_report};
pub use gradients::{Gradients, OwnSquares};
pub use inject::Faults;
pub use log::Log;
pub use model::Gpt;
pub use optimizer::Optimizer;
pub use pulse::Pulse;
pub use stop::StopFlag;
pub use timing::{Phase, PhaseSeconds, Timing};
pub use train::{Process, train};
pub use trained::{NO_TOKENIZER, Trained};
pub use weights::Parameters;
