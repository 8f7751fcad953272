//! Examples as tensors: padded to the longest of a micro-batch, with what the language model and the task have to
//! predict. Knows no order and no ranks.

use super::head::{Form, TaskBatch};
use crate::engine::MicroBatch;
use configs::{Documents, ModelConfig, TaskConfig, TaskKind};
use dataloader::{Answer, LaidOut, TaskSequence};
use tch::{Device, Tensor};

/// A micro-batch of examples; with `language` each sequence's tokens are predicted too, all but the first. The
/// task's loss is multiplied by `scale`.
pub(crate) fn micro_batch(
    examples: &[&LaidOut],
    task: &TaskConfig,
    language: bool,
    scale: f64,
    device: Device,
) -> MicroBatch {
    let sequences: Vec<&TaskSequence> = examples.iter().flat_map(|example| &example.sequences).collect();
    let t = sequences.iter().map(|sequence| sequence.tokens.len()).max().unwrap_or(1);
    let mut inputs = vec![0i64; sequences.len() * t];
    let mut types = vec![0i64; sequences.len() * t];
    let (mut extract, mut targets, mut rows) = (Vec::new(), Vec::new(), Vec::new());
    for (sequence, (first, row)) in sequences.iter().zip((0..).step_by(t).zip(inputs.chunks_mut(t))) {
        for (input, &token) in row.iter_mut().zip(&sequence.tokens) {
            *input = i64::from(token);
        }
        types[first as usize + sequence.second..first as usize + sequence.tokens.len()].fill(1);
        extract.push(first + sequence.tokens.len() as i64 - 1);
        if language {
            targets.extend(sequence.tokens[1..].iter().map(|&token| i64::from(token)));
            rows.extend(first..first + sequence.tokens.len() as i64 - 1);
        }
    }
    let on_device = |values: &[i64]| ops::device::sent(&Tensor::from_slice(values), device);
    MicroBatch {
        inputs: on_device(&inputs).view([-1, t as i64]),
        targets: on_device(&targets),
        target_rows: Some(on_device(&rows)),
        task: Some(TaskBatch {
            extract: on_device(&extract),
            form: form(task, examples),
            answers: answers(task, examples).to_device(device),
            scale,
        }),
        types: Some(on_device(&types).view([-1, t as i64])),
        dropout: None,
        documents: None,
    }
}

/// What keeps a model that looks ahead from the padding of a micro-batch: a sequence is a document, its padding
/// another. One that looks back sees none of it.
pub(crate) fn apart_from_padding(examples: &[&LaidOut], model: &ModelConfig) -> Option<Vec<Documents>> {
    let lengths = || {
        let sequences = examples.iter().flat_map(|example| &example.sequences);
        sequences.map(|sequence| sequence.tokens.len())
    };
    let t = lengths().max().unwrap_or(1);
    let documents = || lengths().map(|length| Documents::beginning(t, |i| i == length)).collect();
    model.is_masked().then(documents)
}

fn form(task: &TaskConfig, examples: &[&LaidOut]) -> Form {
    match task.kind {
        TaskKind::Classification | TaskKind::Entailment => Form::Single,
        TaskKind::Similarity => Form::BothOrders,
        TaskKind::MultipleChoice => {
            Form::Choices(examples.first().map_or(1, |example| example.sequences.len()) as i64)
        }
    }
}

/// `[E]`; where an answer is not known, whatever: nobody asks for a loss then.
fn answers(task: &TaskConfig, examples: &[&LaidOut]) -> Tensor {
    if task.is_of_numbers() {
        let number = |example: &&LaidOut| match example.answer {
            Some(Answer::Number(number)) => number as f32,
            _ => 0.0,
        };
        return Tensor::from_slice(&examples.iter().map(number).collect::<Vec<f32>>());
    }
    let class = |example: &&LaidOut| match example.answer {
        Some(Answer::Class(class)) => class as i64,
        _ => 0,
    };
    Tensor::from_slice(&examples.iter().map(class).collect::<Vec<i64>>())
}

/// What the language model predicts of a sequence: every token but the first.
pub(crate) fn language_targets(examples: &[&LaidOut]) -> u64 {
    let sequences = examples.iter().flat_map(|example| &example.sequences);
    sequences.map(|sequence| sequence.tokens.len() as u64 - 1).sum()
}
