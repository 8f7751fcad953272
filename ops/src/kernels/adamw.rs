//! AdamW with the rounding to bf16 in one pass, and sums of squares by chunks, on GPUs: the bits of the passes
//! over host memory, `phx_adamw` and `phx_sum_squares`.

use super::{ADAMW, Argument, Launch, Runner, check, device};
use crate::OpsError;
use crate::device_adamw::Buffers;
use crate::shim::AdamWPass;
use tch::{Kind, Tensor};

/// Threads of a block.
const THREADS: usize = 256;

/// Chunks of a block of `chunk_squares`, with sixteen threads each.
const CHUNKS: usize = 8;

/// One update of flat fp32 buffers; `weights`, bf16 of the same length, gets the parameters rounded, if it is
/// there. `None` where the kernel is not to be had.
///
/// # Errors
/// Tensors that do not fit each other, what CUDA says.
pub(crate) fn update(
    buffers: Buffers<'_>,
    weights: Option<&Tensor>,
    pass: AdamWPass,
) -> Result<Option<()>, OpsError> {
    device::with(ADAMW, buffers.param.device(), |runner| update_on(runner, buffers, weights, pass))
}

/// The sum of squares of each chunk of `chunk` elements of a flat fp32 buffer, the last one shorter: f64, on
/// its device. `None` where the kernel is not to be had.
///
/// # Errors
/// As [`update`].
pub(crate) fn chunk_squares(flat: &Tensor, chunk: usize) -> Result<Option<Tensor>, OpsError> {
    device::with(ADAMW, flat.device(), |runner| chunk_squares_on(runner, flat, chunk))
}

fn update_on(
    runner: &dyn Runner,
    buffers: Buffers<'_>,
    weights: Option<&Tensor>,
    pass: AdamWPass,
) -> Result<(), OpsError> {
    let Buffers { param, grad, exp_avg, exp_avg_sq } = buffers;
    let size = param.size();
    let mut others: Vec<(&Tensor, &[i64], Kind)> =
        [param, grad, exp_avg, exp_avg_sq].map(|flat| (flat, size.as_slice(), Kind::Float)).to_vec();
    others.extend(weights.map(|weights| (weights, size.as_slice(), Kind::BFloat16)));
    check("adamw", param, &others)?;
    if param.numel() == 0 {
        return Ok(());
    }
    let AdamWPass { grad_scale, keep, betas, step_size, root_scale, eps } = pass;
    let [[beta1, rest1], [beta2, rest2]] = betas.map(|beta| [beta as f32, (1.0 - beta) as f32]);
    let numbers = [grad_scale, keep, beta1, rest1, beta2, rest2, step_size, root_scale, eps];
    let mut arguments = [param, grad, exp_avg, exp_avg_sq].map(Argument::Of).to_vec();
    arguments.extend([Argument::maybe(weights), Argument::Long(param.numel() as i64)]);
    arguments.extend(numbers.map(Argument::Float));
    runner.run(&Launch {
        kernel: "adamw".into(),
        grid: [param.numel().div_ceil(THREADS).min(8 * runner.blocks()), 1],
        threads: THREADS,
        shared_bytes: 0,
        arguments,
    })
}

fn chunk_squares_on(runner: &dyn Runner, flat: &Tensor, chunk: usize) -> Result<Tensor, OpsError> {
    let numel = flat.numel();
    check("add_squares", flat, &[(flat, &[numel as i64], Kind::Float)])?;
    let chunks = numel.div_ceil(chunk);
    let sums = Tensor::f_empty([chunks as i64], (Kind::Double, flat.device()))?;
    if chunks > 0 {
        runner.run(&Launch {
            kernel: "chunk_squares".into(),
            grid: [chunks.div_ceil(CHUNKS), 1],
            threads: 16 * CHUNKS,
            shared_bytes: 0,
            arguments: vec![
                Argument::Of(flat),
                Argument::Of(&sums),
                Argument::Long(numel as i64),
                Argument::Long(chunk as i64),
            ],
        })?;
    }
    Ok(sums)
}

#[cfg(test)]
mod tests {
    use super::super::host::{Host, random};
    use super::*;
    use crate::shim;

    fn vec(tensor: &Tensor) -> Vec<f32> {
        Vec::try_from(tensor).unwrap()
    }

    #[test]
    fn updates_have_the_bits_of_the_pass_over_host_memory_and_weights_those_of_libtorchs_rounding() {
        for numel in [1, 31, 1000, 5001] {
            tch::manual_seed(numel);
            let [param, exp_avg] = [0, 1].map(|_| random(&[numel], Kind::Float));
            let exp_avg_sq = random(&[numel], Kind::Float).square() * 1e-3;
            let weights = random(&[numel], Kind::BFloat16);
            let mut host = [vec(&param), vec(&exp_avg), vec(&exp_avg_sq)];
            for t in 1..=4 {
                let grad = random(&[numel], Kind::Float) * 1e-2;
                let pass = AdamWPass {
                    grad_scale: if t % 2 == 0 { 0.3 } else { 1.0 },
                    keep: 0.9999,
                    betas: [0.9, 0.95],
                    step_size: 1e-3 / (1.0 - 0.9f32.powi(t)),
                    root_scale: 1.0 / (1.0 - 0.95f32.powi(t)).sqrt(),
                    eps: 1e-8,
                };
                let [host_param, host_avg, host_sq] = &mut host;
                shim::adamw(host_param, &vec(&grad), host_avg, host_sq, None, pass);
                let buffers =
                    Buffers { param: &param, grad: &grad, exp_avg: &exp_avg, exp_avg_sq: &exp_avg_sq };
                update_on(&Host, buffers, Some(&weights), pass).unwrap();
                update_on(
                    &Host,
                    Buffers {
                        param: &param.copy(),
                        exp_avg: &exp_avg.copy(),
                        exp_avg_sq: &exp_avg_sq.copy(),
                        grad: &grad,
                    },
                    None,
                    pass,
                )
                .unwrap();
            }
            for (got, expected) in [&param, &exp_avg, &exp_avg_sq].into_iter().zip(&host) {
                let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
                assert_eq!(bits(&vec(got)), bits(expected), "{numel}");
            }
            assert_eq!(weights, param.to_kind(Kind::BFloat16), "{numel}");
        }
    }

    #[test]
    fn squares_of_chunks_have_the_bits_of_the_pass_over_host_memory() {
        for numel in [0, 1, 15, 64, 65, 1000, 5000] {
            let flat = random(&[numel], Kind::Float);
            let got = Vec::<f64>::try_from(chunk_squares_on(&Host, &flat, 64).unwrap()).unwrap();
            assert_eq!(got, shim::sum_squares(&vec(&flat), 64), "{numel}");
        }
    }
}
