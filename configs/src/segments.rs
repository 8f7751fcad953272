//! The model as a list of segments: names, shapes and offsets in each flat buffer.
//!
//! One segment is one flat parameter buffer, one gradient buffer, one message between ranks and one
//! unit of a checkpoint. Offsets depend on the model alone, never on the number of ranks.

use crate::{ModelConfig, Norm};
use serde::{Deserialize, Serialize};

/// How a tensor starts.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Init {
    /// Normal with mean 0 and this standard deviation.
    Normal(f64),
    /// All zero.
    Zeros,
    /// All one.
    Ones,
}

/// One parameter tensor within its segment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TensorSpec {
    /// Full name as GPT-2 checkpoints have it, such as `h.0.attn.c_attn.weight`.
    pub name: String,
    /// Shape; matrices are `[out, in]`.
    pub shape: Vec<i64>,
    /// Elements before it in the segment's buffer.
    pub offset: usize,
    /// Initial values.
    pub init: Init,
    /// Whether weight decay applies: matrices yes, biases and gains no.
    pub decay: bool,
}

impl TensorSpec {
    /// Elements.
    pub fn numel(&self) -> usize {
        self.shape.iter().product::<i64>() as usize
    }
}

/// One segment: its tensors and the length of its flat buffer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SegmentSpec {
    /// `wte`, `wpe`, `h.0` ..., and `ln_f` where there is a norm after the last block, or `mlm`, what a
    /// masked model has before its head.
    pub name: String,
    /// In the order of their offsets.
    pub tensors: Vec<TensorSpec>,
    /// Elements of the flat buffer, padding included.
    pub numel: usize,
}

/// Tensors start at multiples of this many elements: 64 bytes in bf16, 128 in fp32.
const ALIGN_ELEMENTS: usize = 32;

/// The segments of a model, in the order of the forward pass. The token embedding comes first and is
/// used again as the head; a post-norm model ends with its last block, whose norms have the same names.
///
/// Initial values follow the GPT-2 release: 0.02 for matrices and tokens, 0.01 for positions, and
/// projections into the residual stream scaled by 1/sqrt(2 n_layer). A post-norm model, in which the
/// stream does not grow, has 0.02 throughout, as GPT-1.
pub fn segments(model: &ModelConfig) -> Vec<SegmentSpec> {
    let c = model.n_embd as i64;
    let matrix = Init::Normal(0.02);
    let (positions, residual) = match model.norm {
        Norm::Pre => (Init::Normal(0.01), Init::Normal(0.02 / (2.0 * model.n_layer as f64).sqrt())),
        Norm::Post => (matrix, matrix),
    };

    let v = model.padded_vocab_size() as i64;
    let mut embedding = vec![("weight", vec![model.seq_len as i64, c], positions)];
    if model.token_types > 0 {
        embedding.push(("type.weight", vec![model.token_types as i64, c], matrix));
    }
    if model.embedding_norm {
        embedding.extend([("ln_0.weight", vec![c], Init::Ones), ("ln_0.bias", vec![c], Init::Zeros)]);
    }
    let mut all = vec![segment("wte", vec![("weight", vec![v, c], matrix)]), segment("wpe", embedding)];
    for layer in 0..model.n_layer {
        let mut tensors = vec![
            ("ln_1.weight", vec![c], Init::Ones),
            ("ln_1.bias", vec![c], Init::Zeros),
            ("attn.c_attn.weight", vec![3 * c, c], matrix),
            ("attn.c_attn.bias", vec![3 * c], Init::Zeros),
            ("attn.c_proj.weight", vec![c, c], residual),
            ("attn.c_proj.bias", vec![c], Init::Zeros),
            ("ln_2.weight", vec![c], Init::Ones),
            ("ln_2.bias", vec![c], Init::Zeros),
            ("mlp.c_fc.weight", vec![4 * c, c], matrix),
            ("mlp.c_fc.bias", vec![4 * c], Init::Zeros),
            ("mlp.c_proj.weight", vec![c, 4 * c], residual),
            ("mlp.c_proj.bias", vec![c], Init::Zeros),
        ];
        tensors.retain(|(name, ..)| model.qkv_bias || *name != "attn.c_attn.bias");
        all.push(segment(&format!("h.{layer}"), tensors));
    }
    if model.norm == Norm::Pre {
        all.push(segment("ln_f", vec![("weight", vec![c], Init::Ones), ("bias", vec![c], Init::Zeros)]));
    }
    if model.is_masked() {
        let tensors = vec![
            ("dense.weight", vec![c, c], matrix),
            ("dense.bias", vec![c], Init::Zeros),
            ("ln_f.weight", vec![c], Init::Ones),
            ("ln_f.bias", vec![c], Init::Zeros),
            // The last, so that a larger vocabulary moves nothing else.
            ("head.bias", vec![v], Init::Zeros),
        ];
        all.push(segment("mlm", tensors));
    }
    all
}

/// The segment of a task's linear layer, which comes after all of the model's: `outputs` rows against the
/// hidden state of an extract token. New, so it starts like a matrix of the model.
pub fn task_segment(model: &ModelConfig, outputs: usize) -> SegmentSpec {
    let (k, c) = (outputs as i64, model.n_embd as i64);
    segment("task", vec![("weight", vec![k, c], Init::Normal(0.02)), ("bias", vec![k], Init::Zeros)])
}

fn segment(name: &str, tensors: Vec<(&str, Vec<i64>, Init)>) -> SegmentSpec {
    let mut numel = 0;
    let tensors = tensors
        .into_iter()
        .map(|(tensor, shape, init)| {
            let decay = shape.len() > 1;
            let spec = TensorSpec { name: format!("{name}.{tensor}"), shape, offset: numel, init, decay };
            numel = (numel + spec.numel()).next_multiple_of(ALIGN_ELEMENTS);
            spec
        })
        .collect();
    SegmentSpec { name: name.to_string(), tensors, numel }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Objective;

    fn odd_model() -> ModelConfig {
        ModelConfig {
            n_layer: 3,
            n_head: 3,
            n_embd: 33,
            seq_len: 7,
            vocab_size: 257,
            ..ModelConfig::default()
        }
    }

    fn bert() -> ModelConfig {
        ModelConfig {
            norm: Norm::Post,
            objective: Objective::Masked,
            embedding_norm: true,
            token_types: 2,
            ..odd_model()
        }
    }

    #[test]
    fn tensors_are_aligned_and_do_not_overlap() {
        for segment in [odd_model(), bert()].iter().flat_map(segments) {
            let mut end = 0;
            for tensor in &segment.tensors {
                assert_eq!(tensor.offset % ALIGN_ELEMENTS, 0, "{}", tensor.name);
                assert!(tensor.offset >= end, "{}", tensor.name);
                end = tensor.offset + tensor.numel();
            }
            assert!(end <= segment.numel && segment.numel < end + ALIGN_ELEMENTS, "{}", segment.name);
        }
    }

    #[test]
    fn segments_hold_every_parameter_and_the_padded_rows() {
        let gpts = [(Norm::Pre, true), (Norm::Post, true), (Norm::Pre, false)]
            .map(|(norm, qkv_bias)| ModelConfig { norm, qkv_bias, ..odd_model() });
        for model in gpts.into_iter().chain([bert()]) {
            let held: usize = segments(&model).iter().flat_map(|s| &s.tensors).map(TensorSpec::numel).sum();
            let columns = model.n_embd + usize::from(model.is_masked());
            let padding = (model.padded_vocab_size() - model.vocab_size) * columns;
            assert_eq!(held as u64, model.parameters() + padding as u64);
        }
    }

    #[test]
    fn only_matrices_decay() {
        let all = [odd_model(), bert()];
        for tensor in all.iter().flat_map(segments).flat_map(|segment| segment.tensors) {
            assert_eq!(
                tensor.decay,
                tensor.name.ends_with(".weight") && !tensor.name.contains("ln_"),
                "{}",
                tensor.name
            );
        }
    }
}
