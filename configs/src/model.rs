//! The shape of the model and what follows from it: parameters and FLOPs.

use crate::Pattern;
use serde::{Deserialize, Serialize};

/// Where a block normalises.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Norm {
    /// x + f(norm(x)), and one norm after the last block (GPT-2, GPT-3).
    #[default]
    Pre,
    /// norm(x + f(x)), and none after the last block (GPT-1).
    Post,
}

/// What a model is asked in pre-training.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Objective {
    /// The next token, from those before it (GPT).
    #[default]
    Causal,
    /// Tokens that are hidden, from all others (BERT).
    Masked,
}

/// What stands between the two matrices of an MLP.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// GELU by its tanh approximation (GPT).
    #[default]
    GeluTanh,
    /// GELU as it is defined, by the error function (BERT).
    Gelu,
}

/// The share of the tokens that a masked model has to predict (Devlin et al. 2018, section 3.1).
pub const MASKED_SHARE: f64 = 0.15;

/// A GPT decoder, or BERT's encoder: learned positions, tied head.
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
    /// Where blocks normalise.
    #[serde(default)]
    pub norm: Norm,
    /// Probability with which an activation is dropped in training: of the embeddings' sum, of the
    /// attention weights and of what each block adds to the residual stream.
    #[serde(default)]
    pub dropout: f64,
    /// Whether queries, keys and values have biases. GPT-Neo's have none, so that a banded model without
    /// them is one of its family.
    #[serde(default = "yes")]
    pub qkv_bias: bool,
    /// What is predicted. A masked model has a transform of its own and a bias before the head.
    #[serde(default)]
    pub objective: Objective,
    /// Of the MLPs, and of a masked model's transform.
    #[serde(default)]
    pub activation: Activation,
    /// Added to the variance in every layer norm.
    #[serde(default = "gpt_norm_eps")]
    pub norm_eps: f64,
    /// Whether the sum of the embeddings is normalised.
    #[serde(default)]
    pub embedding_norm: bool,
    /// Embeddings of the text that a token is of, the first or the second; 0 for none.
    #[serde(default)]
    pub token_types: usize,
}

fn yes() -> bool {
    true
}

fn gpt_norm_eps() -> f64 {
    1e-5
}

impl Default for ModelConfig {
    /// The smallest GPT-2.
    fn default() -> ModelConfig {
        ModelConfig {
            n_layer: 12,
            n_head: 12,
            n_embd: 768,
            seq_len: 1024,
            vocab_size: 50_257,
            attention: vec![Pattern::Dense],
            norm: Norm::Pre,
            dropout: 0.0,
            qkv_bias: true,
            objective: Objective::Causal,
            activation: Activation::GeluTanh,
            norm_eps: gpt_norm_eps(),
            embedding_norm: false,
            token_types: 0,
        }
    }
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

    /// Whether tokens are predicted that are hidden, and not those that come next.
    pub fn is_masked(&self) -> bool {
        self.objective == Objective::Masked
    }

    /// Whether tokens and positions are added up, and that is all.
    pub fn has_plain_embedding(&self) -> bool {
        !self.embedding_norm && self.token_types == 0
    }

    /// Trained parameters, without the padding of the vocabulary.
    pub fn parameters(&self) -> u64 {
        let c = self.n_embd as u64;
        let block = 12 * c * c + 13 * c - if self.qkv_bias { 0 } else { 3 * c };
        let last_norm = match self.norm {
            Norm::Pre => 2 * c,
            Norm::Post => 0,
        };
        let embedding = self.token_types as u64 * c + if self.embedding_norm { 2 * c } else { 0 };
        let transform = if self.is_masked() { c * c + 3 * c + self.vocab_size as u64 } else { 0 };
        let lookups = (self.vocab_size + self.seq_len) as u64 * c;
        lookups + embedding + self.n_layer as u64 * block + last_norm + transform
    }

    /// Floating-point operations of a block's forward pass over one sequence: its matrix products, and of
    /// attention two products for each pair that its pattern keeps (scores, weighted values), each 2 C over
    /// all heads. A multiply-add counts 2.
    pub fn block_flops(&self, layer: usize) -> f64 {
        let (c, t) = (self.n_embd as f64, self.seq_len as f64);
        24.0 * c * c * t + 4.0 * c * self.pattern(layer).pairs(self.seq_len) as f64
    }

    /// The same of the head; a masked model's computes the positions that are predicted, a share of all.
    pub fn head_flops(&self) -> f64 {
        let c = self.n_embd as f64;
        let row = 2.0 * c * self.vocab_size as f64;
        match self.objective {
            Objective::Causal => row * self.seq_len as f64,
            Objective::Masked => MASKED_SHARE * (row + 2.0 * c * c) * self.seq_len as f64,
        }
    }

    /// Floating-point operations of forward and backward over one sequence: the matrix products,
    /// head included, attention by the pairs its pattern keeps, nothing for recomputation.
    /// The backward pass counts twice the forward.
    pub fn flops_per_sequence(&self) -> f64 {
        let blocks: f64 = (0..self.n_layer).map(|layer| self.block_flops(layer)).sum();
        3.0 * (blocks + self.head_flops())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gpt2_small_has_124_439_808_parameters() {
        assert_eq!(ModelConfig::default().parameters(), 124_439_808);
        assert_eq!(ModelConfig::default().padded_vocab_size(), 50_304);
    }

    #[test]
    fn gpt1_has_116_534_784_parameters_of_which_none_norms_after_the_last_block() {
        // As `OpenAIGPTModel` of Hugging Face counts them.
        let gpt1 =
            ModelConfig { seq_len: 512, vocab_size: 40_478, norm: Norm::Post, ..ModelConfig::default() };
        assert_eq!(gpt1.parameters(), 116_534_784);
    }

    #[test]
    fn bert_base_has_the_109_514_298_parameters_of_transformers_bert_for_masked_lm() {
        let bert = ModelConfig {
            seq_len: 512,
            vocab_size: 30_522,
            norm: Norm::Post,
            objective: Objective::Masked,
            embedding_norm: true,
            token_types: 2,
            ..ModelConfig::default()
        };
        assert_eq!(bert.parameters(), 109_514_298);
    }

    #[test]
    fn flops_are_six_per_matrix_weight_and_token_plus_attention() {
        let model = ModelConfig::default();
        let weights = 12.0 * 12.0 * 768.0 * 768.0 + 768.0 * 50257.0;
        let attention = 12.0 * 12.0 * 768.0 * (1024.0 * 1025.0 / 2.0);
        assert_eq!(model.flops_per_sequence(), 6.0 * 1024.0 * weights + attention);
    }

    #[test]
    fn patterns_are_cycled_over_the_layers() {
        let model =
            ModelConfig { attention: vec![Pattern::Dense, Pattern::Banded(8)], ..ModelConfig::default() };
        assert_eq!(
            [0, 1, 2, 11].map(|l| model.pattern(l).to_string()),
            ["dense", "banded:8", "dense", "banded:8"]
        );
    }
}
