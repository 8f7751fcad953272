//! What BERT's encoder has beside a decoder's blocks: the rest of its embedding, and what stands between the last
//! block and the head. Knows neither which tokens are hidden nor who differentiates.
//!
//! Devlin et al. 2018. Shapes: B sequences, T positions, n positions that are predicted, C = n_embd, V tokens.

use crate::model::{Gpt, layer};
use ops::{Bias, Head, Weights};
use tch::{Kind, Tensor};

/// The loss of a masked model, and what its transform's segment is differentiated from.
pub(crate) struct MaskedLoss {
    /// Summed over the targets, nats.
    pub(crate) loss: Tensor,
    /// The transformed hidden states and the head's bias, end to end, with their graph.
    pub(crate) output: Tensor,
    /// The gradient of the scaled loss of it.
    pub(crate) output_grad: Tensor,
}

impl Gpt {
    /// The segment of the transform before a masked model's head.
    pub(crate) fn masked_segment(&self) -> Option<usize> {
        self.config().is_masked().then_some(2 + self.config().n_layer)
    }

    /// The sum of token and position `[B, T, C]` to the residual stream: the text that each token is of is
    /// added, and the sum normalised, as far as the model does.
    pub(crate) fn embedded(&self, wpe: &Weights, mut sum: Tensor, types: Option<&Tensor>) -> Tensor {
        if let Some(texts) = wpe.get("type.weight") {
            sum += match types {
                Some(types) => Tensor::embedding(texts, types, -1, false, false),
                None => texts.get(0),
            };
        }
        if self.config().embedding_norm { self.norm(wpe, "ln_0.").of(&sum) } else { sum }
    }

    /// Hidden states of the last block to those that the head reads, `[n, C]` both.
    pub(crate) fn transform(&self, mlm: &Weights, hidden: &Tensor) -> Tensor {
        self.norm(mlm, "ln_f.").of(&layer(mlm, "dense").gelu(hidden, self.gelu()))
    }

    /// The head, tied to the token embedding, with its bias.
    pub(crate) fn masked_head<'a>(
        &self,
        wte: &'a Weights,
        mlm: &'a Weights,
        grad: Option<&'a Tensor>,
    ) -> Head<'a> {
        Head { bias: Some(Bias { values: mlm.tensor("head.bias"), grad }), ..self.head(wte) }
    }

    /// The loss of transformed hidden states `[n, C]` against their targets `[n]`, of which there may be none.
    /// The token embedding's gradient is added to `wte_grad`. Of the weights the tokens' come first, then the head's.
    pub(crate) fn masked_loss(
        &self,
        [wte, mlm]: [&Weights; 2],
        hidden: &Tensor,
        targets: &Tensor,
        wte_grad: &Tensor,
        scale: f64,
    ) -> MaskedLoss {
        let v = self.config().vocab_size as i64;
        let bias_grad = Tensor::zeros([v], (Kind::Float, hidden.device()));
        let (loss, hidden_grad) = tch::no_grad(|| {
            if targets.numel() == 0 {
                return (Tensor::from(0.0), hidden.zeros_like());
            }
            let head = self.masked_head(wte, mlm, Some(&bias_grad));
            head.loss_and_grad(&hidden.detach(), targets, wte_grad, scale)
        });
        // One output, so that one backward fills the segment: the bias is a part of it that is nothing else.
        let bias = mlm.tensor("head.bias").narrow(0, 0, v);
        let output = Tensor::cat(&[hidden.reshape([-1]), bias], 0);
        let output_grad = Tensor::cat(&[hidden_grad.reshape([-1]), bias_grad.to_kind(hidden.kind())], 0);
        MaskedLoss { loss, output, output_grad }
    }
}
