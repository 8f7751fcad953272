//! Fine-tuning: a pre-trained model learns a task from labelled examples. Owns what a task adds to pre-training;
//! gradients, updates, checkpoints and reports are those of any run.
//!
//! Radford et al. 2018, section 3.2: L3 = L2 + lambda L1, the task's loss and the language model's beside it.

mod base;
mod batch;
mod head;
mod predict;
mod run;
mod scores;

pub use head::{Form, TaskBatch};
pub use predict::{PredictOptions, predict};
pub use run::finetune;
pub use scores::{Prediction, scores};
