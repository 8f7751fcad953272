//! The AdamW update and the global gradient norm, on flat buffers. Knows no schedule and no ranks.

use crate::flat::{slice, slice_mut};
use crate::shim::{self, AdamWPass};
use crate::{FlatSegment, OpsError};
use configs::OptimConfig;
use tch::Tensor;

/// Sums of squares are taken over chunks of this many elements and added in order, so that the norm
/// does not depend on threads. Shards are cut at multiples of it.
pub const NORM_CHUNK: usize = 4096;

/// Moments of one segment, flat fp32 buffers as long as its parameters.
#[derive(Debug)]
pub struct Moments {
    /// Running mean of the gradient.
    pub exp_avg: Tensor,
    /// Running mean of its square.
    pub exp_avg_sq: Tensor,
}

impl Moments {
    /// Zeros for a segment.
    pub fn zeros(segment: &FlatSegment) -> Moments {
        Moments { exp_avg: segment.param().zeros_like(), exp_avg_sq: segment.param().zeros_like() }
    }
}

/// One update's numbers beside the gradient.
#[derive(Debug, Clone, Copy)]
pub struct AdamWStep {
    /// Learning rate.
    pub lr: f64,
    /// Updates done before, plus one.
    pub t: u64,
    /// Multiplies the gradient: the clipping factor.
    pub grad_scale: f64,
}

/// Updates a segment from its gradient: AdamW with decoupled decay of matrices (Loshchilov & Hutter
/// 2019), the arithmetic of `torch.optim.AdamW`.
///
/// # Errors
/// Buffers that are not on the CPU.
pub fn adamw(
    segment: &FlatSegment,
    moments: &mut Moments,
    optim: &OptimConfig,
    step: AdamWStep,
) -> Result<(), OpsError> {
    let [beta1, beta2] = optim.betas;
    let t = step.t as f64;
    for tensor in &segment.spec().tensors {
        let decay = if tensor.decay { optim.weight_decay } else { 0.0 };
        let pass = AdamWPass {
            grad_scale: step.grad_scale as f32,
            keep: (1.0 - step.lr * decay) as f32,
            betas: optim.betas,
            step_size: (step.lr / (1.0 - beta1.powf(t))) as f32,
            root_scale: (1.0 / (1.0 - beta2.powf(t)).sqrt()) as f32,
            eps: optim.eps as f32,
        };
        let part = |flat: &Tensor| flat.narrow(0, tensor.offset as i64, tensor.numel() as i64);
        let (mut param, grad) = (part(segment.param()), part(segment.grad()));
        let (mut exp_avg, mut exp_avg_sq) = (part(&moments.exp_avg), part(&moments.exp_avg_sq));
        shim::adamw(
            slice_mut("adamw", &mut param)?,
            slice("adamw", &grad)?,
            slice_mut("adamw", &mut exp_avg)?,
            slice_mut("adamw", &mut exp_avg_sq)?,
            pass,
        );
    }
    Ok(())
}

/// The square of the L2 norm of a flat fp32 buffer, summed in f64 by chunks in order.
///
/// # Errors
/// A buffer that is not on the CPU.
pub fn sum_squares(flat: &Tensor) -> Result<f64, OpsError> {
    Ok(shim::sum_squares(slice("sum_squares", flat)?, NORM_CHUNK).iter().sum())
}
