//! What a task asks of hidden states: one linear layer over those of the extract tokens, and its loss. Knows
//! tensors; knows neither where the sequences come from nor who differentiates.
//!
//! Radford et al. 2018, section 3.3: both orders of a similarity are summed before the layer, choices are
//! compared by a softmax over them. Shapes: S sequences, E examples, K outputs, C channels.

use ops::Weights;
use tch::{Kind, Reduction, Tensor};

/// How the sequences of an example become its outputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// One sequence.
    Single,
    /// Two, summed before the layer.
    BothOrders,
    /// So many, one output each.
    Choices(i64),
}

/// What a task asks of a micro-batch.
#[derive(Debug)]
pub struct TaskBatch {
    /// Where the sequences have their extract tokens, as rows of `[B T]`: `[S]` i64.
    pub extract: Tensor,
    /// How sequences become examples.
    pub form: Form,
    /// Classes or choices `[E]` i64, or numbers `[E]` fp32.
    pub answers: Tensor,
    /// What the summed loss is multiplied by.
    pub scale: f64,
}

impl TaskBatch {
    /// Of hidden states `[B, T, C]` those of the extract tokens, `[S, C]`.
    pub(crate) fn pick(&self, hidden: &Tensor) -> Tensor {
        hidden.flatten(0, 1).index_select(0, &self.extract)
    }

    /// The layer's outputs for picked hidden states `[S, C]`: `[E, K]` fp32.
    pub(crate) fn outputs(&self, weights: &Weights, rows: &Tensor) -> Tensor {
        let (weight, bias) = (weights.tensor("weight"), Some(weights.tensor("bias")));
        let linear = |rows: &Tensor| rows.linear(weight, bias).to_kind(Kind::Float);
        match self.form {
            Form::Single => linear(rows),
            Form::BothOrders => {
                linear(&rows.view([-1, 2, rows.size()[1]]).sum_dim_intlist(1, false, rows.kind()))
            }
            Form::Choices(n) => linear(rows).view([-1, n]),
        }
    }

    /// The summed loss of all examples, a scalar with its graph: cross-entropy of classes and choices, squared
    /// error of numbers. `mask` is the dropout of the rows.
    pub(crate) fn loss(&self, weights: &Weights, rows: &Tensor, mask: Option<Tensor>) -> Tensor {
        let outputs = match mask {
            Some(mask) => self.outputs(weights, &(rows * mask)),
            None => self.outputs(weights, rows),
        };
        if self.answers.kind() == Kind::Float {
            return (outputs.squeeze_dim(1) - &self.answers).square().sum(Kind::Float);
        }
        outputs.cross_entropy_loss::<Tensor>(&self.answers, None, Reduction::Sum, -100, 0.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use configs::{ModelConfig, task_segment};
    use std::sync::Arc;
    use tch::Device;

    fn weights(outputs: usize) -> Weights {
        let model = ModelConfig { n_embd: 4, ..ModelConfig::default() };
        let spec = Arc::new(task_segment(&model, outputs));
        Weights::over(&spec, Tensor::randn([spec.numel as i64], (Kind::Float, Device::Cpu))).unwrap()
    }

    fn batch(form: Form, answers: Tensor) -> TaskBatch {
        TaskBatch { extract: Tensor::from_slice(&[2i64, 5]), form, answers, scale: 1.0 }
    }

    fn off(a: &Tensor, b: &Tensor) -> f64 {
        (a - b).abs().max().double_value(&[])
    }

    #[test]
    fn the_states_of_the_extract_tokens_are_picked() {
        let hidden = Tensor::arange(24, (Kind::Float, Device::Cpu)).view([2, 3, 4]);
        let picked = batch(Form::Single, Tensor::from_slice(&[0i64])).pick(&hidden);
        assert_eq!(picked, Tensor::stack(&[hidden.get(0).get(2), hidden.get(1).get(2)], 0));
    }

    #[test]
    fn a_similarity_does_not_change_when_its_texts_change_places() {
        let (rows, weights) = (Tensor::randn([4, 4], (Kind::Float, Device::Cpu)), weights(3));
        let both = batch(Form::BothOrders, Tensor::from_slice(&[0i64, 1]));
        let swapped = rows.index_select(0, &Tensor::from_slice(&[1i64, 0, 3, 2]));
        let outputs = both.outputs(&weights, &rows);
        assert_eq!(outputs.size(), [2, 3]);
        assert!(off(&outputs, &both.outputs(&weights, &swapped)) < 1e-5);
    }

    #[test]
    fn choices_are_compared_by_a_softmax_over_them_and_numbers_by_their_squared_error() {
        let (rows, weights) = (Tensor::randn([6, 4], (Kind::Float, Device::Cpu)), weights(1));
        let choices = batch(Form::Choices(3), Tensor::from_slice(&[2i64, 0]));
        let scores = choices.outputs(&weights, &rows);
        let expected = scores.log_softmax(1, Kind::Float);
        let expected = -(expected.double_value(&[0, 2]) + expected.double_value(&[1, 0]));
        assert!((choices.loss(&weights, &rows, None).double_value(&[]) - expected).abs() < 1e-5);

        let numbers = batch(Form::Single, Tensor::from_slice(&[1.5f32, -2.0, 0.0, 0.0, 3.0, 1.0]));
        let error = numbers.outputs(&weights, &rows).squeeze_dim(1) - &numbers.answers;
        let expected = error.square().sum(Kind::Double).double_value(&[]);
        assert!((numbers.loss(&weights, &rows, None).double_value(&[]) - expected).abs() < 1e-4);
    }
}
