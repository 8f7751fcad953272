//! Bias and GELU in one pass, and their backward in one, with the bias's gradient. On GPUs; [`by_torch`] has
//! the same anywhere.

use super::{Argument, GELU, Launch, Runner, at_once, check, device, named, rows_of};
use crate::OpsError;
use tch::{Kind, Tensor};

/// Threads of a block.
const THREADS: i64 = 128;

/// A product without its bias, and which GELU follows.
#[derive(Debug, Clone, Copy)]
pub struct Input<'a> {
    /// `[..., F]`, fp32 or bf16.
    pub x: &'a Tensor,
    /// `[F]`.
    pub bias: &'a Tensor,
    /// By tanh (Hendrycks & Gimpel 2016), as GPT has it; else exact, as BERT has it.
    pub by_tanh: bool,
}

/// Whether the kernels are to be had for numbers like those of `x`: fp32 or bf16.
pub fn takes(x: &Tensor) -> bool {
    matches!(x.kind(), Kind::Float | Kind::BFloat16) && device::there(GELU, x.device())
}

/// gelu(x + bias), `[..., F]`; the sum is not rounded in between. `None` where the kernel is not to be had.
///
/// # Errors
/// Tensors that do not fit each other, what CUDA says.
pub fn forward(input: Input<'_>) -> Result<Option<Tensor>, OpsError> {
    device::with(GELU, input.x.device(), |runner| forward_on(runner, input))
}

/// The gradient of x, `[..., F]`, given that of the output; that of the bias is added to `bias_grad`, `[F]`
/// fp32. `None` where the kernel is not to be had.
///
/// # Errors
/// As [`forward`].
pub fn backward(input: Input<'_>, grad: &Tensor, bias_grad: &Tensor) -> Result<Option<Tensor>, OpsError> {
    device::with(GELU, input.x.device(), |runner| backward_on(runner, input, grad, bias_grad))
}

fn forward_on(runner: &dyn Runner, input: Input<'_>) -> Result<Tensor, OpsError> {
    let Input { x, bias, by_tanh } = input;
    let [rows, width] = rows_of(x);
    check("gelu::forward", x, &[(bias, &[width], x.kind())])?;
    let out = x.f_empty_like()?;
    if x.numel() > 0 {
        let at_once = at_once(width, &[x, bias, &out]);
        runner.run(&Launch {
            kernel: named("gelu_forward", x.kind(), at_once),
            grid: grid(runner, rows, width, at_once),
            threads: THREADS as usize,
            shared_bytes: 0,
            arguments: vec![
                Argument::Of(x),
                Argument::Of(bias),
                Argument::Of(&out),
                Argument::Long(rows),
                Argument::Long(width),
                Argument::Long(i64::from(by_tanh)),
            ],
        })?;
    }
    Ok(out)
}

fn backward_on(
    runner: &dyn Runner,
    input: Input<'_>,
    grad: &Tensor,
    bias_grad: &Tensor,
) -> Result<Tensor, OpsError> {
    let Input { x, bias, by_tanh } = input;
    let ([rows, width], size) = (rows_of(x), x.size());
    let others: [(&Tensor, &[i64], Kind); 3] =
        [(bias, &[width], x.kind()), (grad, &size, x.kind()), (bias_grad, &[width], Kind::Float)];
    check("gelu::backward", x, &others)?;
    let x_grad = x.f_empty_like()?;
    if x.numel() == 0 {
        return Ok(x_grad);
    }
    let at_once = at_once(width, &[x, bias, grad, &x_grad]);
    let grid = grid(runner, rows, width, at_once);
    let parts = Tensor::f_empty([grid[1] as i64, width], (Kind::Float, x.device()))?;
    runner.run(&Launch {
        kernel: named("gelu_backward", x.kind(), at_once),
        grid,
        threads: THREADS as usize,
        shared_bytes: 0,
        arguments: vec![
            Argument::Of(grad),
            Argument::Of(x),
            Argument::Of(bias),
            Argument::Of(&x_grad),
            Argument::Of(&parts),
            Argument::Long(rows),
            Argument::Long(width),
            Argument::Long(i64::from(by_tanh)),
        ],
    })?;
    runner.run(&Launch {
        kernel: "gelu_columns".into(),
        grid: [(width as usize).div_ceil(32), 1],
        threads: 256,
        shared_bytes: 0,
        arguments: vec![
            Argument::Of(&parts),
            Argument::Of(bias_grad),
            Argument::Long(grid[1] as i64),
            Argument::Long(width),
        ],
    })?;
    Ok(x_grad)
}

/// Blocks over the columns, and over as many parts of the rows as keep the device busy.
fn grid(runner: &dyn Runner, rows: i64, width: i64, at_once: i64) -> [usize; 2] {
    let across = (width as usize).div_ceil((THREADS * at_once) as usize);
    [across, (2 * runner.blocks()).div_ceil(across).clamp(1, rows as usize)]
}

/// The same by libtorch's operations, on any device.
pub mod by_torch {
    use super::Input;
    use tch::{Kind, Tensor};

    /// As [`forward`](super::forward).
    pub fn forward(input: Input<'_>) -> Tensor {
        sum(input).gelu(name(input)).to_kind(input.x.kind())
    }

    /// As [`backward`](super::backward).
    pub fn backward(input: Input<'_>, grad: &Tensor, bias_grad: &Tensor) -> Tensor {
        let passed = sum(input).gelu_backward(&grad.to_kind(Kind::Float), name(input));
        let columns = passed.flatten(0, -2).sum_dim_intlist([0i64].as_slice(), false, Kind::Float);
        let _ = bias_grad.shallow_clone().g_add_(&columns);
        passed.to_kind(input.x.kind())
    }

    fn sum(input: Input<'_>) -> Tensor {
        input.x.to_kind(Kind::Float) + input.bias.to_kind(Kind::Float)
    }

    fn name(input: Input<'_>) -> &'static str {
        if input.by_tanh { "tanh" } else { "none" }
    }
}

#[cfg(test)]
mod tests {
    use super::super::host::{CASES, Host, off, random};
    use super::*;
    use tch::Device;

    #[test]
    fn the_kernels_on_the_host_are_gelu_and_its_gradient() {
        for ((rows, width, kind), by_tanh) in CASES.into_iter().flat_map(|case| [(case, true), (case, false)])
        {
            tch::manual_seed(rows * 1000 + width);
            let (x, grad) = (random(&[rows, width], kind) * 3.0, random(&[rows, width], kind));
            let bias = random(&[width], kind);
            let input = Input { x: &x, bias: &bias, by_tanh };
            let columns = || Tensor::ones([width], (Kind::Float, Device::Cpu));
            let (got_bias, expected_bias) = (columns(), columns());
            let got = backward_on(&Host, input, &grad, &got_bias).unwrap();
            let expected = by_torch::backward(input, &grad, &expected_bias);
            let limit = if kind == Kind::Float { 2e-6 } else { 4e-3 };
            let out = (forward_on(&Host, input).unwrap(), by_torch::forward(input));
            for (name, got, expected) in
                [("out", &out.0, &out.1), ("grad", &got, &expected), ("bias", &got_bias, &expected_bias)]
            {
                let off = off(got, expected);
                assert!(off < limit, "{name} of {rows} x {width} {kind:?} {by_tanh}: {off}");
            }
        }
    }

    #[test]
    fn the_reference_is_autograds_gradient() {
        tch::manual_seed(4);
        let leaf = |size: &[i64]| random(size, Kind::Float).set_requires_grad(true);
        let (x, bias, grad) = (leaf(&[2, 3, 20]), leaf(&[20]), random(&[2, 3, 20], Kind::Float));
        for (by_tanh, name) in [(true, "tanh"), (false, "none")] {
            let out = (&x + &bias).gelu(name);
            (&out * &grad).sum(Kind::Float).backward();
            let (dx, dbias) = (x.detach(), bias.detach());
            let input = Input { x: &dx, bias: &dbias, by_tanh };
            let bias_grad = dbias.zeros_like();
            let x_grad = by_torch::backward(input, &grad, &bias_grad);
            assert!(off(&by_torch::forward(input), &out) < 1e-6);
            assert!(off(&x_grad, &x.grad()) < 1e-5 && off(&bias_grad, &bias.grad()) < 1e-5);
            let (mut x, mut bias) = (x.shallow_clone(), bias.shallow_clone());
            x.zero_grad();
            bias.zero_grad();
        }
    }
}
