//! The shape of the model and what follows from it: parameters and FLOPs.

use crate::Pattern;
use serde::{Deserialize, Serialize};

/// A GPT-2/3 decoder: learned positions, pre-LN blocks, tanh-GELU, tied head.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelConfig {
    /// Blocks.
    pub n_layer: usize,
    /// Attention heads per block, H.
    pub n_head: usize,
    /// Width of the residual stream, C.
    pub n_embd: usize,
    /// Positions, T.
    pub seq_len: usize,
    /// Token ids that get probability, V.
    pub vocab_size: usize,
    /// Cycled over the blocks.
    pub attention: Vec<Pattern>,
}

impl ModelConfig {
    /// Width of a head, D.
    pub fn head_dim(&self) -> usize {
        self.n_embd / self.n_head
    }

    /// Rows of the embedding: the vocabulary rounded up to a multiple of 128. Padded ids are never
    /// targets, get no probability and are cut on export.
    pub fn padded_vocab_size(&self) -> usize {
        self.vocab_size.next_multiple_of(128)
    }

    /// The attention pattern of a block.
    pub fn pattern(&self, layer: usize) -> Pattern {
        self.attention[layer % self.attention.len()]
    }

    /// Trained parameters, without the padding of the vocabulary.
    pub fn parameters(&self) -> u64 {
        let c = self.n_embd as u64;
        let block = 12 * c * c + 13 * c;
        (self.vocab_size + self.seq_len) as u64 * c + self.n_layer as u64 * block + 2 * c
    }

    /// Floating-point operations of forward and backward over one sequence: the matrix products,
    /// head included, attention by the pairs its pattern keeps, nothing for recomputation.
    /// A multiply-add counts 2, the backward pass twice the forward.
    pub fn flops_per_sequence(&self) -> f64 {
        let (c, t) = (self.n_embd as f64, self.seq_len as f64);
        let products = 2.0 * t * (12.0 * c * c * self.n_layer as f64 + c * self.vocab_size as f64);
        let pairs: u64 = (0..self.n_layer).map(|layer| self.pattern(layer).pairs(self.seq_len)).sum();
        // Two products per pair (scores, weighted values), each 2 C over all heads.
        let attention = 4.0 * c * pairs as f64;
        3.0 * (products + attention)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gpt2_124m() -> ModelConfig {
        ModelConfig {
            n_layer: 12,
            n_head: 12,
            n_embd: 768,
            seq_len: 1024,
            vocab_size: 50257,
            attention: vec![Pattern::Dense],
        }
    }

    #[test]
    fn gpt2_small_has_124_439_808_parameters() {
        assert_eq!(gpt2_124m().parameters(), 124_439_808);
        assert_eq!(gpt2_124m().padded_vocab_size(), 50_304);
    }

    #[test]
    fn flops_are_six_per_matrix_weight_and_token_plus_attention() {
        let model = gpt2_124m();
        let weights = 12.0 * 12.0 * 768.0 * 768.0 + 768.0 * 50257.0;
        let attention = 12.0 * 12.0 * 768.0 * (1024.0 * 1025.0 / 2.0);
        assert_eq!(model.flops_per_sequence(), 6.0 * 1024.0 * weights + attention);
    }

    #[test]
    fn patterns_are_cycled_over_the_layers() {
        let model = ModelConfig { attention: vec![Pattern::Dense, Pattern::Banded(8)], ..gpt2_124m() };
        assert_eq!(
            [0, 1, 2, 11].map(|l| model.pattern(l).to_string()),
            ["dense", "banded:8", "dense", "banded:8"]
        );
    }
}
