//! The AdamW update and the sum of squares of a gradient, on slices of flat buffers. Knows no schedule
//! and no ranks.

use crate::device_adamw::{self, Buffers, Update};
use crate::flat::{halves_mut, slice, slice_mut};
use crate::kernels;
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
    /// What computes, bf16: gets the parameters rounded, if it is here.
    pub weights: Option<&'a Tensor>,
}

/// Updates a slice of a segment from its gradient: AdamW with decoupled decay of matrices (Loshchilov &
/// Hutter 2019), the arithmetic of `torch.optim.AdamW`. Elements do not depend on how slices are cut. On a
/// GPU the gradient may be left multiplied by `grad_scale`.
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
        let (param, grad) = (part(slice_of.param), part(slice_of.grad));
        let [exp_avg, exp_avg_sq] = [&slice_of.moments.exp_avg, &slice_of.moments.exp_avg_sq].map(part);
        let weights = slice_of.weights.map(part);
        let pass = AdamWPass {
            grad_scale: step.grad_scale as f32,
            keep: (1.0 - step.lr * decay) as f32,
            betas: optim.betas,
            step_size: (step.lr / (1.0 - beta1.powf(t))) as f32,
            root_scale: (1.0 / (1.0 - beta2.powf(t)).sqrt()) as f32,
            eps: optim.eps as f32,
        };
        let buffers = Buffers { param: &param, grad: &grad, exp_avg: &exp_avg, exp_avg_sq: &exp_avg_sq };
        if kernels::adamw::update(buffers, weights.as_ref(), pass)?.is_some() {
            continue;
        }
        if param.device().is_cuda() {
            let AdamWStep { lr, t, grad_scale } = step;
            device_adamw::adamw(
                buffers,
                Update { t, lr, betas: optim.betas, decay, eps: optim.eps, grad_scale },
            )?;
            weights.map_or(Ok(()), |mut weights| weights.f_copy_(&param).map(drop))?;
        } else {
            in_host_memory(buffers, weights, pass)?;
        }
    }
    Ok(())
}

fn in_host_memory(
    buffers: Buffers<'_>,
    mut weights: Option<Tensor>,
    pass: AdamWPass,
) -> Result<(), OpsError> {
    let Buffers { param, grad, exp_avg, exp_avg_sq } = buffers;
    let [mut param, mut exp_avg, mut exp_avg_sq] = [param, exp_avg, exp_avg_sq].map(Tensor::shallow_clone);
    shim::adamw(
        slice_mut("adamw", &mut param)?,
        slice("adamw", grad)?,
        slice_mut("adamw", &mut exp_avg)?,
        slice_mut("adamw", &mut exp_avg_sq)?,
        weights.as_mut().map(|weights| halves_mut("adamw", weights)).transpose()?,
        pass,
    );
    Ok(())
}

/// A sum of squares of buffers in the making. On a GPU nobody waits for it before it is read.
#[derive(Debug, Default)]
pub struct Squares {
    sum: ExactSum,
    /// Sums of chunks that are still on a device, f64.
    on_device: Vec<Tensor>,
}

impl Squares {
    /// Adds the squares of a flat fp32 buffer that starts at a multiple of [`NORM_CHUNK`] of its segment:
    /// chunk by chunk in f64, and the chunks exactly.
    ///
    /// # Errors
    /// A buffer that is not flat or not fp32, what libtorch says.
    pub fn add(&mut self, flat: &Tensor) -> Result<(), OpsError> {
        if flat.device().is_cuda() {
            let chunks = kernels::adamw::chunk_squares(flat, NORM_CHUNK)?;
            self.on_device.push(chunks.map_or_else(|| device_adamw::chunk_squares(flat, NORM_CHUNK), Ok)?);
        } else {
            let chunks = shim::sum_squares(slice("a sum of squares", flat)?, NORM_CHUNK);
            chunks.into_iter().for_each(|chunk| self.sum.add(chunk));
        }
        Ok(())
    }

    /// The sum of all that was added; waits for the device.
    ///
    /// # Errors
    /// What libtorch says, also of earlier work of the device.
    pub fn read(mut self) -> Result<ExactSum, OpsError> {
        if !self.on_device.is_empty() {
            let chunks = Vec::<f64>::try_from(Tensor::f_cat(&self.on_device, 0)?)?;
            chunks.into_iter().for_each(|chunk| self.sum.add(chunk));
        }
        Ok(self.sum)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::small_model;

    #[test]
    fn weights_that_compute_follow_the_update_rounded() {
        let spec = configs::segments(&small_model()).swap_remove(2);
        let flat = || Tensor::randn([spec.numel as i64], (Kind::Float, Device::Cpu));
        let (param, grad) = (flat(), flat());
        let mut weights = flat().to_kind(Kind::BFloat16);
        let before = weights.copy();
        let mut moments = Moments::zeros(spec.numel, Device::Cpu).unwrap();
        let optim = OptimConfig { lr: 0.1, betas: [0.9, 0.95], eps: 1e-8, weight_decay: 0.1, grad_clip: 0.0 };
        let mut slice = AdamWSlice {
            spec: &spec,
            range: 0..spec.numel,
            param: &param,
            grad: &grad,
            moments: &mut moments,
            weights: Some(&weights),
        };
        adamw(&mut slice, &optim, AdamWStep { lr: 0.1, t: 1, grad_scale: 1.0 }).unwrap();
        for tensor in &spec.tensors {
            let part = |flat: &Tensor| flat.narrow(0, tensor.offset as i64, tensor.numel() as i64);
            assert_eq!(part(&weights), part(&param).to_kind(Kind::BFloat16), "{}", tensor.name);
        }
        assert_ne!(weights, before);
        let _ = weights.zero_();
    }

    #[test]
    fn squares_are_those_of_all_that_was_added_in_any_order() {
        let [a, b] = [5000, 77].map(|numel| Tensor::randn([numel], (Kind::Float, Device::Cpu)));
        let sum = |buffers: [&Tensor; 2]| {
            let mut squares = Squares::default();
            buffers.iter().for_each(|buffer| squares.add(buffer).unwrap());
            squares.read().unwrap().value()
        };
        let exact = [&a, &b].map(|x| x.to_kind(Kind::Double).square().sum(Kind::Double).double_value(&[]));
        assert!((sum([&a, &b]) / (exact[0] + exact[1]) - 1.0).abs() < 1e-12);
        assert_eq!(sum([&a, &b]).to_bits(), sum([&b, &a]).to_bits());
    }
}
