//! Attention as libtorch's operations, where that is the faster way or the only one: dense as its
//! scaled-dot-product attention is, banded by that in blocks that see themselves and the block before, anything with
//! dropout written out. Differentiated by autograd. Knows no model.

use configs::{Documents, Pattern};
use tch::{Kind, Tensor};

/// Every pair, or every one that looks back.
pub(super) fn dense(q: &Tensor, k: &Tensor, v: &Tensor, causal: bool) -> Tensor {
    Tensor::scaled_dot_product_attention::<&Tensor>(q, k, v, None, 0.0, causal, None, false)
}

/// As [`attention`](super::attention), with the probabilities multiplied by `mask`, `[B, H, T, T]`: dropout
/// of attention (Vaswani et al. 2017). Holds all T x T probabilities, so it is for short contexts.
pub fn attention_with_mask(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    pattern: Pattern,
    documents: Option<&[Documents]>,
    mask: &Tensor,
) -> Tensor {
    let scores = (q / (q.size()[3] as f64).sqrt()).matmul(&k.transpose(2, 3));
    let unseen = unseen(q, pattern, documents);
    let probabilities = scores.masked_fill(&unseen, f64::NEG_INFINITY).softmax(-1, q.kind());
    (probabilities * mask).matmul(v)
}

/// The pairs that are not kept, true: `[1, 1, T, T]`, or with documents `[B, 1, T, T]`.
pub(super) fn unseen(q: &Tensor, pattern: Pattern, documents: Option<&[Documents]>) -> Tensor {
    let t = q.size()[2];
    let pairs = |of: Option<&Documents>| -> Vec<bool> {
        let all = (0..t as usize).flat_map(|i| (0..t as usize).map(move |j| (i, j)));
        all.map(|(i, j)| !(pattern.allows(i, j) && of.is_none_or(|of| of.together(i, j)))).collect()
    };
    let unseen = match documents {
        None => pairs(None),
        Some(documents) => documents.iter().flat_map(|of| pairs(Some(of))).collect(),
    };
    Tensor::from_slice(&unseen).view([-1, 1, t, t]).to_device(q.device())
}

/// Blocks of w queries, each against its own keys and those of the block before: 2w keys hold every
/// key of the band, and work grows with T w instead of T squared.
pub(super) fn banded(q: &Tensor, k: &Tensor, v: &Tensor, w: i64) -> Tensor {
    let size = q.size();
    let [b, h, t, d] = size[..] else { panic!("attention takes [B, H, T, D], got {size:?}") };
    let n_blocks = (t + w - 1) / w;
    let blocks = |x: &Tensor| {
        let padded =
            if t % w == 0 { x.shallow_clone() } else { x.constant_pad_nd([0, 0, 0, n_blocks * w - t]) };
        padded.reshape([b * h, n_blocks, w, d])
    };
    let with_previous = |x: &Tensor| {
        let own = blocks(x);
        let previous = own.narrow(1, 0, n_blocks - 1).constant_pad_nd([0, 0, 0, 0, 1, 0]);
        Tensor::cat(&[previous, own], 2) // [B H, blocks, 2w, D]
    };
    let mask = band_mask(n_blocks, w, q);
    let out = Tensor::scaled_dot_product_attention(
        &blocks(q),
        &with_previous(k),
        &with_previous(v),
        Some(&mask),
        0.0,
        false,
        None,
        false,
    );
    out.reshape([b, h, n_blocks * w, d]).narrow(2, 0, t)
}

/// `[1, blocks, w, 2w]`, 0 where a query sees a key and -inf elsewhere. Query i of a block stands at
/// column w + i; the first block has none before it.
fn band_mask(n_blocks: i64, w: i64, like: &Tensor) -> Tensor {
    let device = like.device();
    let i = Tensor::arange(w, (Kind::Int64, device)).unsqueeze(1);
    let j = Tensor::arange(2 * w, (Kind::Int64, device)).unsqueeze(0);
    let seen = j.le_tensor(&(&i + w)).logical_and(&j.gt_tensor(&i)); // [w, 2w]
    let first = seen.logical_and(&j.ge(w));
    let rest = seen.unsqueeze(0).expand([n_blocks - 1, w, 2 * w], false);
    let seen = Tensor::cat(&[first.unsqueeze(0), rest], 0).unsqueeze(0);
    Tensor::zeros([1, n_blocks, w, 2 * w], (like.kind(), device))
        .masked_fill(&seen.logical_not(), f64::NEG_INFINITY)
}
