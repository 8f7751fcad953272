//! Answers of a fine-tuned model for examples of a file, one JSON object a line. Trains nothing and needs nothing
//! but the run's folder.

use super::base::Base;
use super::run::outputs;
use super::scores::{Prediction, scores};
use crate::checkpoint::StateKind;
use crate::engine::Engine;
use crate::error::TrainError;
use crate::gradients::Gradients;
use crate::model::Gpt;
use crate::resume::fill;
use crate::weights::Parameters;
use configs::{Recompute, Shard, TaskConfig, TaskKind};
use dataloader::{Answer, TaskSet};
use ops::collectives::Communicator;
use serde_json::{Map, Value, json};
use std::io::Write;
use std::path::Path;
use tch::Device;
use tracing::info;

/// How predictions are made.
#[derive(Debug, Clone, Copy)]
pub struct PredictOptions {
    /// Examples of a pass.
    pub batch: usize,
    /// Where tensors live.
    pub device: Device,
}

/// Writes the answer for each example of `file`, in its order; where the file has all answers, says how many are
/// right. Collective; rank 0 writes.
///
/// # Errors
/// A checkpoint that is of no task, a file that is not what the task says, output that cannot be written.
pub fn predict(
    checkpoint: &Path,
    file: &Path,
    options: PredictOptions,
    out: &mut dyn Write,
    comm: &dyn Communicator,
) -> Result<(), TrainError> {
    let base = Base::open(checkpoint, comm)?;
    let Some(task) = &base.config.task else {
        let what =
            "it is of no task; `phalanx finetune TASK.toml --from CHECKPOINT` makes one that is".into();
        return Err(TrainError::Base { checkpoint: base.loaded.folder().to_path_buf(), what });
    };
    let model = &base.config.model;
    let vocabulary = model.vocab_size - configs::TASK_TOKENS;
    let set = TaskSet::open(file, task, &base.tokenizer()?, vocabulary, model.seq_len, false)?;
    let mut engine = engine_of(&base, options.device, comm)?;
    let predictions = outputs(&mut engine, &set, task, options.batch, comm)?;
    if comm.rank() > 0 {
        return Ok(());
    }
    for (number, prediction) in predictions.iter().enumerate() {
        writeln!(out, "{}", line(number, prediction, task)).map_err(TrainError::io("predictions"))?;
    }
    let answers: Vec<Answer> = set.examples().iter().filter_map(|example| example.answer).collect();
    if answers.len() == set.len() {
        let (loss, scores) = scores(task, &predictions, &answers);
        let told: Vec<String> = scores.iter().map(|(name, value)| format!("{name} {value:.4}")).collect();
        info!("{} examples: loss {loss:.4}, {}", set.len(), told.join(", "));
    }
    Ok(())
}

/// The fine-tuned model, to be run.
fn engine_of<'a>(base: &Base, device: Device, comm: &'a dyn Communicator) -> Result<Engine<'a>, TrainError> {
    let config = &base.config;
    let kind = ops::device::dtype(config.parallel.dtype, device);
    let segments = base.loaded.state().segments.clone();
    let mut parameters = Parameters::zeros(segments, Shard::None, kind, device, comm)?;
    for index in 0..parameters.len() {
        let (spec, held) = (parameters.spec(index), parameters.held(index));
        fill(&base.loaded, (&spec.name, StateKind::Param), held, parameters.master(index))?;
    }
    parameters.share()?;
    let gradients = Gradients::new(&parameters, 1, false, comm)?;
    Ok(Engine::new(Gpt::new(&config.model), parameters, gradients, Recompute::None))
}

fn line(number: usize, prediction: &Prediction, task: &TaskConfig) -> Value {
    if task.is_of_numbers() {
        return json!({ "example": number, "value": prediction.outputs[0] });
    }
    let (class, probabilities) = (prediction.class(), prediction.probabilities());
    if task.kind == TaskKind::MultipleChoice {
        return json!({ "example": number, "choice": class, "probabilities": probabilities });
    }
    let by_label = task.labels.iter().cloned().zip(probabilities.iter().map(|&share| json!(share)));
    let by_label: Map<String, Value> = by_label.collect();
    json!({ "example": number, "label": task.labels[class], "probabilities": by_label })
}
