//! Cross-entropy of a chunk of logits, with the gradient written over them. On GPUs; [`by_torch`] has the same
//! anywhere.

use super::{Argument, CROSS_ENTROPY, Launch, Runner, at_once, check, device, named};
use crate::OpsError;
use tch::{Kind, Tensor};

/// A chunk of logits and what they are to predict.
#[derive(Debug, Clone, Copy)]
pub struct Input<'a> {
    /// `[N, V padded]`, fp32 or bf16; becomes the gradient.
    pub logits: &'a Tensor,
    /// Added to every row, `[V padded]`, if there is one.
    pub bias: Option<&'a Tensor>,
    /// `[N]` i64, below `vocab_size`; a row whose target is not has a loss of NaN.
    pub targets: &'a Tensor,
    /// Columns that are tokens, V; the others get no probability and a gradient of 0.
    pub vocab_size: i64,
    /// What the gradient is multiplied by.
    pub scale: f64,
}

/// The cross-entropy of each row in nats, `[N]` fp32; the logits become (probabilities - one at the target)
/// times `scale`. `None` where the kernel is not to be had, and then they are left alone.
///
/// # Errors
/// Tensors that do not fit each other, what CUDA says.
pub fn loss_and_grad(input: Input<'_>) -> Result<Option<Tensor>, OpsError> {
    device::with(CROSS_ENTROPY, input.logits.device(), |runner| loss_and_grad_on(runner, input))
}

fn loss_and_grad_on(runner: &dyn Runner, input: Input<'_>) -> Result<Tensor, OpsError> {
    let Input { logits, bias, targets, vocab_size, scale } = input;
    let (rows, stride) = logits.size2()?;
    let (of_rows, of_columns) = ([rows], [stride]);
    let mut others: Vec<(&Tensor, &[i64], Kind)> = vec![(targets, &of_rows, Kind::Int64)];
    others.extend(bias.map(|bias| (bias, of_columns.as_slice(), logits.kind())));
    check("cross_entropy", logits, &others)?;
    if vocab_size < 1 || vocab_size > stride {
        let (expected, got) = ("a vocabulary within the logits", format!("{vocab_size} of {stride}"));
        return Err(OpsError::Argument { op: "cross_entropy", expected, got });
    }
    let losses = Tensor::f_empty([rows], (Kind::Float, logits.device()))?;
    if rows > 0 {
        runner.run(&Launch {
            kernel: named("cross_entropy", logits.kind(), at_once(stride, &[logits])),
            grid: [rows as usize, 1],
            threads: if stride >= 4096 { 512 } else { 64 },
            shared_bytes: 0,
            arguments: vec![
                Argument::Of(logits),
                Argument::maybe(bias),
                Argument::Of(targets),
                Argument::Of(&losses),
                Argument::Long(rows),
                Argument::Long(vocab_size),
                Argument::Long(stride),
                Argument::Float(scale as f32),
            ],
        })?;
    }
    Ok(losses)
}

/// The same by libtorch's operations, on any device.
pub mod by_torch {
    use super::Input;
    use tch::{Kind, Tensor};

    /// As [`loss_and_grad`](super::loss_and_grad); targets are tokens.
    pub fn loss_and_grad(input: Input<'_>) -> Tensor {
        let Input { logits, bias, targets, vocab_size, scale } = input;
        let mut exact = logits.to_kind(Kind::Float);
        if let Some(bias) = bias {
            exact += bias.to_kind(Kind::Float);
        }
        let exact = exact.narrow(1, 0, vocab_size);
        let targets = targets.unsqueeze(1);
        let lse = exact.logsumexp([1], true);
        let losses = (&lse - exact.gather(1, &targets, false)).squeeze_dim(1);
        let mut grad = (exact - lse).exp();
        let _ = grad.scatter_add_(1, &targets, &targets.full_like(-1.0).to_kind(Kind::Float));
        let mut all = logits.shallow_clone();
        let _ = all.zero_();
        all.narrow(1, 0, vocab_size).copy_(&(grad * scale));
        losses
    }
}

#[cfg(test)]
mod tests {
    use super::super::host::{Host, off, random};
    use super::*;
    use tch::Device;

    #[test]
    fn the_kernel_on_the_host_is_cross_entropy_and_its_gradient() {
        let cases = [(3, 5, 5), (7, 50, 128), (5, 257, 384), (2, 4099, 4104), (4, 1, 8)];
        for ((rows, vocab_size, stride), kind) in
            cases.into_iter().flat_map(|case| [(case, Kind::Float), (case, Kind::BFloat16)])
        {
            tch::manual_seed(vocab_size);
            let logits = random(&[rows, stride], kind) * 4.0;
            let values = random(&[stride], kind);
            let targets = Tensor::randint(vocab_size, [rows], (Kind::Int64, Device::Cpu));
            for bias in [None, Some(&values)] {
                let run = |loss: &dyn Fn(Input<'_>) -> Tensor| {
                    let logits = logits.copy();
                    let input = Input { logits: &logits, bias, targets: &targets, vocab_size, scale: 0.25 };
                    (loss(input), logits)
                };
                let (got, got_grad) = run(&|input| loss_and_grad_on(&Host, input).unwrap());
                let (expected, expected_grad) = run(&by_torch::loss_and_grad);
                let case = format!("{rows} x {vocab_size} of {stride} {kind:?} {}", bias.is_some());
                assert!(off(&got, &expected) < 1e-6, "{case}: {}", off(&got, &expected));
                let limit = if kind == Kind::Float { 2e-6 } else { 4e-3 };
                assert!(off(&got_grad, &expected_grad) < limit, "{case}: {}", off(&got_grad, &expected_grad));
                let padding = got_grad.narrow(1, vocab_size, stride - vocab_size);
                assert_eq!(padding.abs().sum(Kind::Double).double_value(&[]), 0.0, "{case}");
            }
        }
    }

    #[test]
    fn a_target_that_is_no_token_spoils_its_row_and_no_other() {
        let logits = random(&[3, 16], Kind::Float);
        let targets = Tensor::from_slice(&[1i64, 16, -1]);
        let input = Input { logits: &logits, bias: None, targets: &targets, vocab_size: 10, scale: 1.0 };
        let losses = Vec::<f32>::try_from(loss_and_grad_on(&Host, input).unwrap()).unwrap();
        assert!(losses[0].is_finite() && losses[1].is_nan() && losses[2].is_nan(), "{losses:?}");
        let error = loss_and_grad_on(&Host, Input { vocab_size: 17, ..input }).unwrap_err().to_string();
        assert!(error.contains("17 of 16"), "{error}");
    }
}
