//! Dropout that is counted, not drawn: who is dropped is a pure function of seed, step, sample, layer,
//! place in the layer and element, so that ranks, their order and recomputation change nothing.
//! Knows no model: where a mask is used is its caller's.

use crate::{device, kernels};
use configs::Philox;
use tch::Tensor;

/// Keeps dropout's random numbers apart from those of the initial weights, which have the same seed.
const DOMAIN: u64 = u64::from_be_bytes(*b"dropout\0");

/// The dropout of one micro-batch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dropout {
    /// The share that is dropped, in (0, 1).
    pub p: f64,
    /// The run's.
    pub seed: u64,
    /// Updates done before this one.
    pub step: u64,
    /// The sample in the first row; the others follow it.
    pub first_sample: u64,
}

impl Dropout {
    /// What to multiply a tensor like `like`, `[B, ...]`, by: 0 where an element is dropped and
    /// 1 / (1 - p) elsewhere, so that the expectation stays (Srivastava et al. 2014). The same shape,
    /// kind and device.
    pub fn mask(&self, layer: u32, place: u32, like: &Tensor) -> Tensor {
        let made = kernels::dropout::mask(self, layer, place, like);
        if let Some(mask) = made.unwrap_or_else(|error| panic!("dropout: {error}")) {
            return mask;
        }
        let size = like.size();
        let mut mask = vec![0f32; like.numel()];
        let rows = mask.chunks_mut((like.numel() / size[0].max(1) as usize).max(1));
        for (sample, row) in (self.first_sample..).zip(rows) {
            self.fill(sample, layer, place, row);
        }
        device::sent(&Tensor::from_slice(&mask).view(size.as_slice()), like.device()).to_kind(like.kind())
    }

    /// Of the random numbers that say which numbers a sample has.
    pub(crate) fn key(&self) -> u64 {
        self.seed ^ DOMAIN
    }

    /// An element is dropped whose word is below this.
    pub(crate) fn dropped_below(&self) -> u32 {
        (self.p * 4_294_967_296.0) as u32
    }

    /// What the others are multiplied by.
    pub(crate) fn kept(&self) -> f32 {
        (1.0 / (1.0 - self.p)) as f32
    }

    fn fill(&self, sample: u64, layer: u32, place: u32, row: &mut [f32]) {
        let [a, b, ..] = Philox::new(self.key()).at([
            self.step as u32,
            (self.step >> 32) as u32,
            sample as u32,
            (sample >> 32) as u32,
        ]);
        let random = Philox::new(u64::from(b) << 32 | u64::from(a));
        let (dropped_below, kept) = (self.dropped_below(), self.kept());
        for (block, four) in row.chunks_mut(4).enumerate() {
            let words = random.at([block as u32, (block as u64 >> 32) as u32, layer, place]);
            for (value, word) in four.iter_mut().zip(words) {
                *value = if word < dropped_below { 0.0 } else { kept };
            }
        }
    }
}

/// `x` with its dropout, if there is any.
pub fn dropped(x: Tensor, dropout: Option<&Dropout>, layer: u32, place: u32) -> Tensor {
    match dropout {
        Some(dropout) => &x * tch::no_grad(|| dropout.mask(layer, place, &x)),
        None => x,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind};

    const DROPOUT: Dropout = Dropout { p: 0.3, seed: 5, step: 9, first_sample: 100 };

    fn mask(dropout: Dropout, layer: u32, place: u32, rows: i64) -> Tensor {
        dropout.mask(layer, place, &Tensor::zeros([rows, 10, 101], (Kind::Float, Device::Cpu)))
    }

    #[test]
    fn a_sample_has_the_same_mask_wherever_it_is_computed() {
        let four = mask(DROPOUT, 2, 1, 4);
        for (row, first_sample) in (100..104).enumerate() {
            let alone = mask(Dropout { first_sample, ..DROPOUT }, 2, 1, 1);
            assert_eq!(four.narrow(0, row as i64, 1), alone);
        }
    }

    #[test]
    fn seed_step_sample_layer_and_place_each_give_another_mask() {
        let one = mask(DROPOUT, 2, 1, 1);
        let others = [
            mask(Dropout { seed: 6, ..DROPOUT }, 2, 1, 1),
            mask(Dropout { step: 10, ..DROPOUT }, 2, 1, 1),
            mask(Dropout { first_sample: 101, ..DROPOUT }, 2, 1, 1),
            mask(DROPOUT, 3, 1, 1),
            mask(DROPOUT, 2, 2, 1),
        ];
        assert!(others.iter().all(|other| *other != one));
    }

    #[test]
    fn the_share_that_is_dropped_is_p_and_the_mean_stays() {
        let mask = mask(DROPOUT, 0, 0, 50);
        let dropped = mask.eq(0.0).to_kind(Kind::Double).mean(Kind::Double).double_value(&[]);
        assert!((dropped - 0.3).abs() < 0.01, "{dropped}");
        assert!((mask.mean(Kind::Double).double_value(&[]) - 1.0).abs() < 0.01);
        assert_eq!(Tensor::from(1.0f32 / 0.7).double_value(&[]), mask.max().double_value(&[]));
    }
}
