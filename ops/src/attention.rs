//! Causal attention by pattern, on libtorch's scaled-dot-product attention: dense as it is, banded in
//! blocks that see themselves and the block before; with dropout step by step. Differentiated by
//! autograd. Knows no model.

use configs::Pattern;
use tch::{Kind, Tensor};

/// Attention of queries, keys and values `[B, H, T, D]`, scaled by 1/sqrt(D): `[B, H, T, D]`.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, pattern: Pattern) -> Tensor {
    let t = q.size()[2] as usize;
    match pattern {
        Pattern::Banded(w) if w < t => banded(q, k, v, w as i64),
        Pattern::Dense | Pattern::Banded(_) => {
            Tensor::scaled_dot_product_attention::<&Tensor>(q, k, v, None, 0.0, true, None, false)
        }
    }
}

/// As [`attention`], with the probabilities multiplied by `mask`, `[B, H, T, T]`: dropout of attention
/// (Vaswani et al. 2017). Holds all T x T probabilities, so it is for short contexts.
pub fn attention_with_mask(q: &Tensor, k: &Tensor, v: &Tensor, pattern: Pattern, mask: &Tensor) -> Tensor {
    let size = q.size();
    let (t, d) = (size[2], size[3]);
    let i = Tensor::arange(t, (Kind::Int64, q.device())).unsqueeze(1);
    let j = Tensor::arange(t, (Kind::Int64, q.device())).unsqueeze(0);
    let later = j.gt_tensor(&i);
    let unseen = match pattern {
        Pattern::Dense => later,
        Pattern::Banded(w) => later.logical_or(&j.le_tensor(&(i - w as i64))),
    };
    let scores = (q / (d as f64).sqrt()).matmul(&k.transpose(2, 3));
    let probabilities = scores.masked_fill(&unseen, f64::NEG_INFINITY).softmax(-1, q.kind());
    (probabilities * mask).matmul(v)
}

/// Blocks of w queries, each against its own keys and those of the block before: 2w keys hold every
/// key of the band, and work grows with T w instead of T squared.
fn banded(q: &Tensor, k: &Tensor, v: &Tensor, w: i64) -> Tensor {
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tch::Device;

    /// The definition, in f64: softmax over the pairs that the pattern allows.
    fn reference(q: &Tensor, k: &Tensor, v: &Tensor, pattern: Pattern) -> Tensor {
        let t = q.size()[2] as usize;
        let masked: Vec<bool> = (0..t * t).map(|p| !pattern.allows(p / t, p % t)).collect();
        let masked = Tensor::from_slice(&masked).view([t as i64, t as i64]);
        let scores = q.matmul(&k.transpose(2, 3)) / (q.size()[3] as f64).sqrt();
        scores.masked_fill(&masked, f64::NEG_INFINITY).softmax(-1, Kind::Double).matmul(v)
    }

    fn check(shape: [i64; 4], pattern: Pattern, seed: i64) {
        tch::manual_seed(seed);
        let exact: Vec<Tensor> = (0..4)
            .map(|_| Tensor::randn(shape, (Kind::Double, Device::Cpu)).set_requires_grad(true))
            .collect();
        let inputs: Vec<Tensor> =
            exact.iter().map(|x| x.detach().to_kind(Kind::Float).set_requires_grad(true)).collect();
        let expected = reference(&exact[0], &exact[1], &exact[2], pattern);
        let got = attention(&inputs[0], &inputs[1], &inputs[2], pattern);
        crate::backward(&expected, &exact[3].detach()).unwrap();
        crate::backward(&got, &inputs[3].detach()).unwrap();
        let close = |name: &str, a: &Tensor, b: &Tensor| {
            let distance = (a.to_kind(Kind::Double) - b).norm().double_value(&[]);
            let scale = b.norm().double_value(&[]);
            assert!(
                distance <= 1e-5 * scale + 1e-12,
                "{name} of {pattern} at {shape:?}: {distance} of {scale}"
            );
        };
        close("output", &got, &expected);
        for (name, i) in [("dq", 0), ("dk", 1), ("dv", 2)] {
            close(name, &inputs[i].grad(), &exact[i].grad());
        }
    }

    #[test]
    fn patterns_equal_the_masked_softmax_at_their_edges() {
        for w in [1, 2, 3, 6, 7, 8, 100] {
            check([2, 3, 7, 4], Pattern::Banded(w), 1);
        }
        check([1, 1, 1, 8], Pattern::Banded(1), 2);
        check([2, 2, 64, 16], Pattern::Banded(16), 3);
        check([2, 3, 33, 4], Pattern::Dense, 4);
    }

    #[test]
    fn attention_with_a_mask_of_ones_is_attention() {
        for pattern in [Pattern::Dense, Pattern::Banded(3), Pattern::Banded(50)] {
            let [q, k, v] = [0; 3].map(|_| Tensor::randn([2, 3, 9, 4], (Kind::Double, Device::Cpu)));
            let ones = Tensor::ones([2, 3, 9, 9], (Kind::Double, Device::Cpu));
            let got = attention_with_mask(&q, &k, &v, pattern, &ones);
            assert!((got - reference(&q, &k, &v, pattern)).abs().max().double_value(&[]) < 1e-12);
            let none = attention_with_mask(&q, &k, &v, pattern, &ones.zeros_like());
            assert_eq!(none.abs().max().double_value(&[]), 0.0);
        }
    }

    #[test]
    fn in_bf16_every_pattern_stays_within_its_rounding() {
        for pattern in [Pattern::Dense, Pattern::Banded(5)] {
            let [q, k, v] = [0; 3]
                .map(|_| Tensor::randn([2, 3, 33, 16], (Kind::Float, Device::Cpu)).to_kind(Kind::BFloat16));
            let [x, y, z] = [&q, &k, &v].map(|t| t.to_kind(Kind::Double));
            let expected = reference(&x, &y, &z, pattern);
            let got = attention(&q, &k, &v, pattern).to_kind(Kind::Double);
            let off = ((got - &expected).norm() / expected.norm()).double_value(&[]);
            assert!(off < 2e-2, "{pattern}: {off}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]
        #[test]
        fn banded_equals_the_masked_softmax_for_any_shape(
            b in 1i64..3, h in 1i64..4, t in 1i64..70, d in 1i64..9, w in 1usize..80, seed in 0i64..1000,
        ) {
            check([b, h, t, d], Pattern::Banded(w), seed);
        }
    }
}
