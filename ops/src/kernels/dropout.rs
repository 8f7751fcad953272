//! Masks of dropout made where they are used, on GPUs: the bits that the host would make and send.

use super::{Argument, DROPOUT, Launch, Runner, device};
use crate::{Dropout, OpsError};
use tch::{Kind, Tensor};

/// Threads of a block.
const THREADS: usize = 256;

/// As [`Dropout::mask`]. `None` where the kernel is not to be had.
///
/// # Errors
/// No memory, what CUDA says.
pub(crate) fn mask(
    dropout: &Dropout,
    layer: u32,
    place: u32,
    like: &Tensor,
) -> Result<Option<Tensor>, OpsError> {
    if !matches!(like.kind(), Kind::Float | Kind::BFloat16) {
        return Ok(None);
    }
    device::with(DROPOUT, like.device(), |runner| mask_on(runner, dropout, [layer, place], like))
}

fn mask_on(
    runner: &dyn Runner,
    dropout: &Dropout,
    [layer, place]: [u32; 2],
    like: &Tensor,
) -> Result<Tensor, OpsError> {
    let (size, kind) = (like.size(), like.kind());
    let mask = Tensor::f_empty(size.as_slice(), (kind, like.device()))?;
    if mask.numel() == 0 {
        return Ok(mask);
    }
    let samples = size[0] as usize;
    let width = mask.numel() / samples;
    runner.run(&Launch {
        kernel: format!("dropout_{}", if kind == Kind::BFloat16 { "bf16" } else { "f32" }),
        grid: [width.div_ceil(4 * THREADS).min(8 * runner.blocks()), samples],
        threads: THREADS,
        shared_bytes: 0,
        arguments: vec![
            Argument::Of(&mask),
            Argument::Long(width as i64),
            Argument::Long(dropout.key().cast_signed()),
            Argument::Long(dropout.step.cast_signed()),
            Argument::Long(dropout.first_sample.cast_signed()),
            Argument::Long(i64::from(layer)),
            Argument::Long(i64::from(place)),
            Argument::Long(i64::from(dropout.dropped_below())),
            Argument::Float(dropout.kept()),
        ],
    })?;
    Ok(mask)
}

#[cfg(test)]
mod tests {
    use super::super::host::Host;
    use super::*;
    use tch::Device;

    #[test]
    fn masks_have_the_bits_that_the_host_makes() {
        let dropout =
            Dropout { p: 0.3, seed: u64::MAX - 5, step: (1 << 40) + 9, first_sample: (7 << 32) - 2 };
        for size in [vec![4, 1], vec![3, 10, 101], vec![1, 5000], vec![2, 4099], vec![2, 0]] {
            for kind in [Kind::Float, Kind::BFloat16] {
                let like = Tensor::zeros(size.as_slice(), (kind, Device::Cpu));
                let got = mask_on(&Host, &dropout, [2, 3], &like).unwrap();
                assert_eq!(got, dropout.mask(2, 3, &like), "{size:?} {kind:?}");
            }
        }
    }
}
