//! The AdamW update and the sum of squares of a gradient, on slices of flat buffers. Knows no schedule
//! and no ranks.

use crate::device_adamw::{self, Buffers, Update};
use crate::flat::{slice, slice_mut};
use crate::shim::{self, AdamWPass};
use crate::{ExactSum, OpsError};
use configs::{OptimConfig, SegmentSpec};
use std::ops::Range;
use tch::{Device, Kind, Tensor};

/// Sums of squares are taken over chunks of this many elements. Slices are cut at multiples of it, so
/// that the norm depends neither on threads nor on ranks.
pub const NORM_CHUNK: usize = configs::SLICE_ALIGN;

/// Moments of a slice of a segment, flat fp32 buffers.
#[derive(Debug)]
pub struct Moments {
    /// Running mean of the gradient.
    pub exp_avg: Tensor,
    /// Running mean of its square.
    pub exp_avg_sq: Tensor,
}

impl Moments {
    /// Zeros for `numel` elements.
    ///
    /// # Errors
    /// What libtorch says, such as out of memory.
    pub fn zeros(numel: usize, device: Device) -> Result<Moments, OpsError> {
        let zeros = || Tensor::f_zeros([numel as i64], (Kind::Float, device));
        Ok(Moments { exp_avg: zeros()?, exp_avg_sq: zeros()? })
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

/// Elements `range` of a segment, for an update: fp32 flat buffers of `range.len()` elements each.
#[derive(Debug)]
pub struct AdamWSlice<'a> {
    /// The segment's layout: which elements decay.
    pub spec: &'a SegmentSpec,
    /// Where the slice lies in the segment.
    pub range: Range<usize>,
    /// The parameters.
    pub param: &'a Tensor,
    /// Their gradients.
    pub grad: &'a Tensor,
    /// Their moments.
    pub moments: &'a mut Moments,
}

/// Updates a slice of a segment from its gradient: AdamW with decoupled decay of matrices (Loshchilov &
/// Hutter 2019), the arithmetic of `torch.optim.AdamW`. Elements do not depend on how slices are cut. On a
/// GPU the gradient is left multiplied by `grad_scale`.
///
/// # Errors
/// Buffers that are not flat or not fp32, what libtorch says.
pub fn adamw(slice_of: &mut AdamWSlice<'_>, optim: &OptimConfig, step: AdamWStep) -> Result<(), OpsError> {
    let [beta1, beta2] = optim.betas;
    let (t, range) = (step.t as f64, slice_of.range.clone());
    for tensor in &slice_of.spec.tensors {
        let start = tensor.offset.max(range.start);
        let end = (tensor.offset + tensor.numel()).min(range.end);
        if start >= end {
            continue;
        }
        let decay = if tensor.decay { optim.weight_decay } else { 0.0 };
        let part = |flat: &Tensor| flat.narrow(0, (start - range.start) as i64, (end - start) as i64);
        let (mut param, grad) = (part(slice_of.param), part(slice_of.grad));
        let (mut exp_avg, mut exp_avg_sq) =
            (part(&slice_of.moments.exp_avg), part(&slice_of.moments.exp_avg_sq));
        if param.device().is_cuda() {
            let AdamWStep { lr, t, grad_scale } = step;
            let update = Update { t, lr, betas: optim.betas, decay, eps: optim.eps, grad_scale };
            let buffers = Buffers { param: &param, grad: &grad, exp_avg: &exp_avg, exp_avg_sq: &exp_avg_sq };
            device_adamw::adamw(buffers, update)?;
            continue;
        }
        let pass = AdamWPass {
            grad_scale: step.grad_scale as f32,
            keep: (1.0 - step.lr * decay) as f32,
            betas: optim.betas,
            step_size: (step.lr / (1.0 - beta1.powf(t))) as f32,
            root_scale: (1.0 / (1.0 - beta2.powf(t)).sqrt()) as f32,
            eps: optim.eps as f32,
        };
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

/// Adds to `sum` the squares of a flat fp32 buffer that starts at a multiple of [`NORM_CHUNK`] of its
/// segment: chunk by chunk in f64, and the chunks exactly.
///
/// # Errors
/// A buffer that is not flat or not fp32, what libtorch says.
pub fn add_squares(sum: &mut ExactSum, flat: &Tensor) -> Result<(), OpsError> {
    let chunks = if flat.device().is_cuda() {
        device_adamw::chunk_squares(flat, NORM_CHUNK)?
    } else {
        shim::sum_squares(slice("add_squares", flat)?, NORM_CHUNK)
    };
    chunks.into_iter().for_each(|chunk| sum.add(chunk));
    Ok(())
}
