//! The GPT decoder, and the blocks of BERT's encoder, which are its own: what each segment computes from its weights, and nothing of where these are, how a
//! step runs it, or how it is differentiated.
//!
//! Radford et al. 2018, 2019 and Brown et al. 2020: learned positions, tanh-GELU, tied head; layer
//! norms before the sublayers (GPT-2, GPT-3) or after them (GPT-1). What BERT has beside is in `masked`.
//! Shapes: B sequences, T positions, C = n_embd, H heads of D = C / H, V tokens.

use configs::{Activation, Documents, ModelConfig, Norm};
use ops::{Dropout, Gelu, Head, Layer, LayerNorm, Weights, add_norm, dropped};
use tch::{Kind, Tensor};

/// The segment of the token embedding, which is also the head's.
pub(crate) const TOKENS: usize = 0;

/// The segment of the position embedding.
pub(crate) const POSITIONS: usize = 1;

/// Where a block drops out: part of the counter of dropout's random numbers.
mod place {
    pub(super) const EMBEDDING: u32 = 0;
    pub(super) const ATTENTION: u32 = 1;
    pub(super) const AFTER_ATTENTION: u32 = 2;
    pub(super) const AFTER_MLP: u32 = 3;
    pub(super) const TASK: u32 = 4;
}

/// What blocks are told of a pass beside weights and activations.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Pass<'a> {
    /// What is dropped.
    pub(crate) dropout: Option<&'a Dropout>,
    /// The documents of each row, where attention keeps to them.
    pub(crate) documents: Option<&'a [Documents]>,
    /// The text that each token is of, `[B, T]` i64; where there is none, the first.
    pub(crate) types: Option<&'a Tensor>,
}

/// A decoder's shape, and what follows from it.
#[derive(Debug, Clone)]
pub struct Gpt {
    config: ModelConfig,
}

impl Gpt {
    /// A decoder of this shape.
    pub fn new(config: &ModelConfig) -> Gpt {
        Gpt { config: config.clone() }
    }

    /// The shape.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The segment of a block.
    pub(crate) fn block_segment(&self, layer: usize) -> usize {
        2 + layer
    }

    /// The segment of the norm before the head; none where each block ends in one.
    pub(crate) fn norm_segment(&self) -> Option<usize> {
        (self.config.norm == Norm::Pre).then_some(2 + self.config.n_layer)
    }

    /// The rows of tokens `[B, T]` i64, `[B, T, C]`.
    pub(crate) fn token_rows(wte: &Weights, tokens: &Tensor) -> Tensor {
        Tensor::embedding(wte.tensor("weight"), tokens, -1, false, false)
    }

    /// The rows of tokens to the residual stream, `[B, T, C]` both: positions are added, and what else the
    /// embedding does.
    pub(crate) fn embed(&self, wpe: &Weights, rows: &Tensor, types: Option<&Tensor>) -> Tensor {
        self.embedded(wpe, rows + wpe.tensor("weight").narrow(0, 0, rows.size()[1]), types)
    }

    /// The dropout of the embedding's output, by which it is multiplied.
    pub(crate) fn embedding_mask(dropout: Option<&Dropout>, x: &Tensor) -> Option<Tensor> {
        dropout.map(|dropout| dropout.mask(0, place::EMBEDDING, x))
    }

    /// Tokens to the residual stream, with the position of every token, `[B, T]` i64 both.
    pub(crate) fn embed_at(&self, wte: &Weights, wpe: &Weights, tokens: &Tensor, at: &Tensor) -> Tensor {
        self.embedded(wpe, Gpt::token_rows(wte, tokens) + Gpt::token_rows(wpe, at), None)
    }

    /// The dropout of the hidden states `[S, C]` that a task's layer reads, by which they are multiplied.
    pub(crate) fn task_dropout(&self, dropout: Option<&Dropout>, rows: &Tensor) -> Option<Tensor> {
        let after_all_blocks = self.config.n_layer as u32;
        dropout.map(|dropout| tch::no_grad(|| dropout.mask(after_all_blocks, place::TASK, rows)))
    }

    /// One block: `[B, T, C]` to `[B, T, C]`.
    pub(crate) fn block(&self, layer: usize, p: &Weights, x: &Tensor, pass: Pass<'_>) -> Tensor {
        let after = |y: Tensor, place: u32| dropped(y, pass.dropout, layer as u32, place);
        self.block_around(p, x, |[q, k, v]| self.attend(layer, &q, &k, &v, pass), after)
    }

    /// One block around an attention of the caller's, who is given queries, keys and values `[B, H, T, D]`
    /// and returns as much. `after` sees what each sublayer adds to the stream.
    pub(crate) fn block_around(
        &self,
        p: &Weights,
        x: &Tensor,
        attend: impl FnOnce([Tensor; 3]) -> Tensor,
        after: impl Fn(Tensor, u32) -> Tensor,
    ) -> Tensor {
        let attention = |x: &Tensor| after(self.attention(p, x, attend), place::AFTER_ATTENTION);
        let mlp = |x: &Tensor| {
            let y = ops::mlp(x, layer(p, "mlp.c_fc"), self.gelu(), layer(p, "mlp.c_proj"));
            after(y, place::AFTER_MLP)
        };
        match self.config.norm {
            Norm::Pre => {
                let y = attention(&self.norm(p, "ln_1.").of(x));
                let [x, normed] = add_norm(x, &y, self.norm(p, "ln_2."));
                x + mlp(&normed)
            }
            Norm::Post => {
                let [_, x] = add_norm(x, &attention(x), self.norm(p, "ln_1."));
                let [_, x] = add_norm(&x, &mlp(&x), self.norm(p, "ln_2."));
                x
            }
        }
    }

    fn attention(&self, p: &Weights, x: &Tensor, attend: impl FnOnce([Tensor; 3]) -> Tensor) -> Tensor {
        let [b, t, c] = x.size()[..] else { panic!("a residual stream is [B, T, C]") };
        let heads = [b, t, self.config.n_head as i64, self.config.head_dim() as i64];
        let qkv = layer(p, "attn.c_attn").of(x).split(c, 2); // three of [B, T, C]
        let y = attend([0, 1, 2].map(|i: usize| qkv[i].view(heads).transpose(1, 2))); // [B, H, T, D]
        layer(p, "attn.c_proj").of(&y.transpose(1, 2).reshape([b, t, c]))
    }

    /// Attention over a whole sequence, by the layer's pattern: `[B, H, T, D]` to the same.
    pub(crate) fn attend(&self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor, pass: Pass<'_>) -> Tensor {
        let pattern = self.config.pattern(layer);
        let Some(dropout) = pass.dropout else { return ops::attention(q, k, v, pattern, pass.documents) };
        let [b, h, t, _] = q.size()[..] else { panic!("queries are [B, H, T, D]") };
        let mask = dropout.mask(
            layer as u32,
            place::ATTENTION,
            &Tensor::empty([b, h, t, t], (q.kind(), q.device())),
        );
        ops::attention_with_mask(q, k, v, pattern, pass.documents, &mask)
    }

    /// The norm before the head: `[B, T, C]` to `[B, T, C]`.
    pub(crate) fn final_norm(&self, p: &Weights, x: &Tensor) -> Tensor {
        self.norm(p, "").of(x)
    }

    /// `prefix` is the norm's name and a dot, or nothing where the segment is the norm.
    pub(crate) fn norm<'a>(&self, p: &'a Weights, prefix: &str) -> LayerNorm<'a> {
        let parameter = |name: &str| p.tensor(&format!("{prefix}{name}"));
        LayerNorm { weight: parameter("weight"), bias: parameter("bias"), eps: self.config.norm_eps }
    }

    /// Of the MLPs and of a masked model's transform.
    pub(crate) fn gelu(&self) -> Gelu {
        match self.config.activation {
            Activation::GeluTanh => Gelu::Tanh,
            Activation::Gelu => Gelu::Exact,
        }
    }

    /// The head, tied to the token embedding.
    pub(crate) fn head<'a>(&self, wte: &'a Weights) -> Head<'a> {
        Head { weight: wte.tensor("weight"), vocab_size: self.config.vocab_size as i64, bias: None }
    }
}

/// Adds the token embedding's gradient, `[V padded, C]` fp32, given that of its rows `[B, T, C]`.
pub(crate) fn rows_backward(tokens: &Tensor, grad: &Tensor, wte_grad: &Tensor) {
    let rows = grad.flatten(0, 1).to_kind(Kind::Float);
    let _ = wte_grad.shallow_clone().index_add_(0, &tokens.reshape([-1]), &rows);
}

/// Adds the embeddings' gradients, `[V padded, C]` and `[T, C]` fp32, given that of their sum `[B, T, C]`:
/// rows of the tokens that occur, and sums over the batch for the positions.
pub(crate) fn embed_backward(tokens: &Tensor, grad: &Tensor, wte_grad: &Tensor, wpe_grad: &Tensor) {
    let size = grad.size();
    rows_backward(tokens, grad, wte_grad);
    let positions = grad.sum_dim_intlist([0i64].as_slice(), false, Kind::Float);
    let _ = wpe_grad.narrow(0, 0, size[1]).g_add_(&positions);
}

pub(crate) fn layer<'a>(p: &'a Weights, name: &str) -> Layer<'a> {
    Layer { weight: p.tensor(&format!("{name}.weight")), bias: p.get(&format!("{name}.bias")) }
}
