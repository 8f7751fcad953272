//! AdamW and sums of squares of buffers on a GPU by libtorch's operations, where the kernels of our own are not
//! to be had: the formulas of `adamw`, in another order of roundings. Works on the CPU as well, where it is tried.

use crate::OpsError;
use crate::shim::checked;
use std::ffi::c_int;
use tch::{Kind, Tensor};
use torch_sys::C_tensor;

mod ffi {
    use super::{C_tensor, c_int};

    unsafe extern "C" {
        pub(super) fn phx_fused_adamw(
            param: *const C_tensor,
            grad: *const C_tensor,
            exp_avg: *const C_tensor,
            exp_avg_sq: *const C_tensor,
            step: f64,
            lr: f64,
            beta1: f64,
            beta2: f64,
            decay: f64,
            eps: f64,
        ) -> c_int;
    }
}

/// The numbers of one update.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Update {
    /// Updates done before, plus one.
    pub(crate) t: u64,
    pub(crate) lr: f64,
    pub(crate) betas: [f64; 2],
    pub(crate) decay: f64,
    pub(crate) eps: f64,
    /// Multiplies the gradient, which is left multiplied.
    pub(crate) grad_scale: f64,
}

/// Four flat fp32 buffers of one length, on one device: parameters, gradients and both moments.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Buffers<'a> {
    pub(crate) param: &'a Tensor,
    pub(crate) grad: &'a Tensor,
    pub(crate) exp_avg: &'a Tensor,
    pub(crate) exp_avg_sq: &'a Tensor,
}

/// One update, in one pass but for the scaling of the gradient.
///
/// # Errors
/// Buffers that do not fit, what libtorch says.
pub(crate) fn adamw(buffers: Buffers<'_>, update: Update) -> Result<(), OpsError> {
    let Buffers { param, grad, exp_avg, exp_avg_sq } = buffers;
    for tensor in [param, grad, exp_avg, exp_avg_sq] {
        let fits = tensor.kind() == Kind::Float
            && tensor.is_contiguous()
            && (tensor.size(), tensor.device()) == (param.size(), param.device());
        if !fits {
            let got = format!("{:?} {:?} on {:?}", tensor.kind(), tensor.size(), tensor.device());
            let expected = "contiguous fp32 tensors of one length on one device";
            return Err(OpsError::Argument { op: "adamw", expected, got });
        }
    }
    let Update { t, lr, betas: [beta1, beta2], decay, eps, grad_scale } = update;
    if grad_scale != 1.0 {
        let _ = grad.shallow_clone().f_mul_scalar_(grad_scale)?;
    }
    // SAFETY: four pointers to live tensors that outlive the call; the shim changes their elements and
    // keeps none of them. That the four fit each other, which libtorch's kernel believes, is checked above.
    checked(unsafe {
        ffi::phx_fused_adamw(
            param.as_ptr(),
            grad.as_ptr(),
            exp_avg.as_ptr(),
            exp_avg_sq.as_ptr(),
            t as f64,
            lr,
            beta1,
            beta2,
            decay,
            eps,
        )
    })
}

/// Sums of squares of a flat fp32 buffer by chunks of `chunk` elements, the last one shorter: f64, on its device.
///
/// # Errors
/// What libtorch says.
pub(crate) fn chunk_squares(flat: &Tensor, chunk: usize) -> Result<Tensor, OpsError> {
    let (numel, chunk) = (flat.numel() as i64, chunk as i64);
    let (whole, rest) = (numel / chunk, numel % chunk);
    let squares = |part: Tensor| -> Result<Tensor, OpsError> {
        let norms = part.f_norm_scalaropt_dim_dtype(2.0, [1i64].as_slice(), false, Kind::Double)?;
        Ok(norms.f_square()?)
    };
    let wholes = squares(flat.f_narrow(0, 0, whole * chunk)?.f_view([whole, chunk])?)?;
    if rest == 0 {
        return Ok(wholes);
    }
    let last = squares(flat.f_narrow(0, whole * chunk, rest)?.f_view([1, rest])?)?;
    Ok(Tensor::f_cat(&[wholes, last], 0)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shim::{self, AdamWPass};
    use tch::Device;

    fn values(seed: i64) -> Tensor {
        tch::manual_seed(seed);
        Tensor::randn([5000], (Kind::Float, Device::Cpu))
    }

    fn vec(tensor: &Tensor) -> Vec<f32> {
        Vec::try_from(tensor).unwrap()
    }

    #[test]
    fn ten_updates_are_those_of_the_pass_over_host_memory() {
        let (lr, betas, decay, eps) = (1e-3, [0.9, 0.95], 0.1, 1e-8);
        let [param, exp_avg, exp_avg_sq] = [values(1), values(2) * 0.0, values(3) * 0.0];
        let mut host = [vec(&param), vec(&exp_avg), vec(&exp_avg_sq)];
        for t in 1..=10 {
            let grad = values(10 + t);
            let grad_scale = if t % 2 == 0 { 0.3 } else { 1.0 };
            let powers = betas.map(|beta: f64| 1.0 - beta.powf(t as f64));
            let pass = AdamWPass {
                grad_scale: grad_scale as f32,
                keep: (1.0 - lr * decay) as f32,
                betas,
                step_size: (lr / powers[0]) as f32,
                root_scale: (1.0 / powers[1].sqrt()) as f32,
                eps: eps as f32,
            };
            let [host_param, host_avg, host_sq] = &mut host;
            shim::adamw(host_param, &vec(&grad), host_avg, host_sq, None, pass);
            let buffers = Buffers { param: &param, grad: &grad, exp_avg: &exp_avg, exp_avg_sq: &exp_avg_sq };
            adamw(buffers, Update { t: t as u64, lr, betas, decay, eps, grad_scale }).unwrap();
        }
        for (name, got, expected) in [
            ("param", &param, &host[0]),
            ("exp_avg", &exp_avg, &host[1]),
            ("exp_avg_sq", &exp_avg_sq, &host[2]),
        ] {
            let expected = Tensor::from_slice(expected);
            let off = ((got - &expected).norm() / expected.norm()).double_value(&[]);
            assert!(off < 1e-6, "{name}: {off:e}");
        }
    }

    #[test]
    fn squares_of_chunks_are_those_of_the_pass_over_host_memory() {
        for numel in [0, 1, 4096, 5000] {
            let flat = values(4).narrow(0, 0, numel);
            let got = Vec::<f64>::try_from(chunk_squares(&flat, 4096).unwrap()).unwrap();
            let expected = shim::sum_squares(&vec(&flat), 4096);
            assert_eq!(got.len(), expected.len());
            for (got, expected) in got.iter().zip(expected) {
                assert!((got / expected - 1.0).abs() < 1e-12, "{got} {expected}");
            }
        }
    }

    #[test]
    fn buffers_that_do_not_fit_are_refused() {
        let (long, short) = (values(1), values(1).narrow(0, 0, 7));
        let update = Update { t: 1, lr: 1e-3, betas: [0.9, 0.95], decay: 0.0, eps: 1e-8, grad_scale: 1.0 };
        let buffers = Buffers { param: &long, grad: &short, exp_avg: &long, exp_avg_sq: &long };
        let error = adamw(buffers, update).unwrap_err().to_string();
        assert!(error.contains("of one length") && error.contains("[7]"), "{error}");
    }
}
