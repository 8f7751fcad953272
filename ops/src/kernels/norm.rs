//! Residual addition and layer norm in one pass, and their backward in one, with the residual's join and the
//! sums for gamma and beta. On GPUs; [`by_torch`] has the same anywhere.

use super::{Argument, Launch, NORM, Runner, at_once, check, device, named, rows_of};
use crate::OpsError;
use tch::{Kind, Tensor};

/// What is normalised: rows `[..., C]`, fp32 or bf16.
#[derive(Debug, Clone, Copy)]
pub struct Input<'a> {
    /// The residual stream, `[..., C]`.
    pub x: &'a Tensor,
    /// What is added to it, `[..., C]`, if anything is.
    pub y: Option<&'a Tensor>,
    /// The scale, `[C]`.
    pub gamma: &'a Tensor,
    /// The shift, `[C]`.
    pub beta: &'a Tensor,
    /// Added to the variance.
    pub eps: f64,
}

/// What forward gives.
#[derive(Debug)]
pub struct Normed {
    /// The norm of the sum, `[..., C]`.
    pub out: Tensor,
    /// What backward needs.
    pub kept: Kept,
}

/// What is kept for backward.
#[derive(Debug)]
pub struct Kept {
    /// x + y, `[..., C]`, rounded to the dtype; a handle of x where there is no y.
    pub sum: Tensor,
    /// The mean of each row, fp32, flat.
    pub mean: Tensor,
    /// 1 / sqrt(variance + eps) of each row, fp32, flat.
    pub rstd: Tensor,
}

/// What backward is given.
#[derive(Debug, Clone, Copy)]
pub struct Arrived<'a> {
    /// The gradient of the norm's output, `[..., C]`.
    pub out: &'a Tensor,
    /// What arrives at the sum beside it, `[..., C]`, if anything does.
    pub sum: Option<&'a Tensor>,
    /// To which gamma's gradient is added, `[C]` fp32.
    pub gamma: &'a Tensor,
    /// To which beta's is, `[C]` fp32.
    pub beta: &'a Tensor,
}

/// Whether the kernels are to be had for rows like `x`, `[..., C]`: fp32 or bf16, and no wider than the sums of
/// their columns have room for.
pub fn takes(x: &Tensor) -> bool {
    let fits = |runner: &dyn Runner| Ok(shared_bytes(rows_of(x)[1]) <= runner.most_shared_bytes());
    matches!(x.kind(), Kind::Float | Kind::BFloat16)
        && matches!(device::with(NORM, x.device(), fits), Ok(Some(true)))
}

/// Adds and normalises. `None` where the kernel is not to be had.
///
/// # Errors
/// Tensors that do not fit each other, what CUDA says.
pub fn forward(input: Input<'_>) -> Result<Option<Normed>, OpsError> {
    device::with(NORM, input.x.device(), |runner| forward_on(runner, input))
}

/// The gradient of the sum, `[..., C]`, which is that of x and of y: what goes through the norm, and what
/// arrives beside it. `kept` is what forward gave. `None` where the kernel is not to be had.
///
/// # Errors
/// As [`forward`].
pub fn backward(gamma: &Tensor, kept: &Kept, arrived: Arrived<'_>) -> Result<Option<Tensor>, OpsError> {
    device::with(NORM, gamma.device(), |runner| backward_on(runner, gamma, kept, arrived))
}

fn forward_on(runner: &dyn Runner, input: Input<'_>) -> Result<Normed, OpsError> {
    let Input { x, y, gamma, beta, eps } = input;
    let ([rows, width], size, kind) = (rows_of(x), x.size(), x.kind());
    let of_columns = [width];
    let mut others: Vec<(&Tensor, &[i64], Kind)> =
        vec![(gamma, &of_columns, kind), (beta, &of_columns, kind)];
    others.extend(y.map(|y| (y, size.as_slice(), kind)));
    check("norm::forward", x, &others)?;
    let sum = if y.is_some() { x.f_empty_like()? } else { x.shallow_clone() };
    let out = x.f_empty_like()?;
    let per_row = || Tensor::f_empty([rows], (Kind::Float, x.device()));
    let (mean, rstd) = (per_row()?, per_row()?);
    if rows > 0 {
        let mut read = vec![x, gamma, beta, &sum, &out];
        read.extend(y);
        let at_once = at_once(width, &read);
        runner.run(&Launch {
            kernel: named("norm_forward", kind, at_once),
            grid: [rows.min(i64::from(i32::MAX)) as usize, 1],
            threads: threads(width / at_once),
            shared_bytes: 0,
            arguments: vec![
                Argument::Of(x),
                Argument::maybe(y),
                Argument::Of(gamma),
                Argument::Of(beta),
                Argument::Of(&sum),
                Argument::Of(&out),
                Argument::Of(&mean),
                Argument::Of(&rstd),
                Argument::Long(rows),
                Argument::Long(width),
                Argument::Float(eps as f32),
            ],
        })?;
    }
    Ok(Normed { out, kept: Kept { sum, mean, rstd } })
}

fn backward_on(
    runner: &dyn Runner,
    gamma: &Tensor,
    kept: &Kept,
    arrived: Arrived<'_>,
) -> Result<Tensor, OpsError> {
    let Kept { sum, mean, rstd } = kept;
    let ([rows, width], size, kind) = (rows_of(sum), sum.size(), sum.kind());
    let (of_rows, of_columns) = ([rows], [width]);
    let mut others: Vec<(&Tensor, &[i64], Kind)> = vec![
        (arrived.out, &size, kind),
        (gamma, &of_columns, kind),
        (mean, &of_rows, Kind::Float),
        (rstd, &of_rows, Kind::Float),
        (arrived.gamma, &of_columns, Kind::Float),
        (arrived.beta, &of_columns, Kind::Float),
    ];
    others.extend(arrived.sum.map(|beside| (beside, size.as_slice(), kind)));
    check("norm::backward", sum, &others)?;
    let shared_bytes = shared_bytes(width);
    if shared_bytes > runner.most_shared_bytes() {
        let got = format!("rows of {width}");
        let expected = "rows whose sums for gamma and beta fit into a block's shared memory";
        return Err(OpsError::Argument { op: "norm::backward", expected, got });
    }
    let grad = sum.f_empty_like()?;
    if rows == 0 {
        return Ok(grad);
    }
    let blocks = (rows as usize).min(runner.blocks());
    let parts = Tensor::f_empty([blocks as i64, 2 * width], (Kind::Float, sum.device()))?;
    let mut read = vec![sum, arrived.out, gamma, &grad];
    read.extend(arrived.sum);
    let at_once = at_once(width, &read);
    runner.run(&Launch {
        kernel: named("norm_backward", kind, at_once),
        grid: [blocks, 1],
        threads: threads(width / at_once),
        shared_bytes,
        arguments: vec![
            Argument::Of(arrived.out),
            Argument::maybe(arrived.sum),
            Argument::Of(sum),
            Argument::Of(gamma),
            Argument::Of(mean),
            Argument::Of(rstd),
            Argument::Of(&grad),
            Argument::Of(&parts),
            Argument::Long(rows),
            Argument::Long(width),
        ],
    })?;
    runner.run(&Launch {
        kernel: "norm_columns".into(),
        grid: [(2 * width as usize).div_ceil(32), 1],
        threads: 256,
        shared_bytes: 0,
        arguments: vec![
            Argument::Of(&parts),
            Argument::Of(arrived.gamma),
            Argument::Of(arrived.beta),
            Argument::Long(blocks as i64),
            Argument::Long(2 * width),
            Argument::Long(width),
        ],
    })?;
    Ok(grad)
}

/// Of two sums for each column.
fn shared_bytes(width: i64) -> usize {
    8 * width as usize
}

/// Threads for rows of so many packs.
fn threads(packs: i64) -> usize {
    (packs as usize).next_multiple_of(32).clamp(32, 256)
}

/// The same by libtorch's operations, on any device.
pub mod by_torch {
    use super::{Arrived, Input, Kept, Normed};
    use tch::{Kind, Tensor};

    /// As [`forward`](super::forward).
    pub fn forward(input: Input<'_>) -> Normed {
        let Input { x, y, gamma, beta, eps } = input;
        let sum = y.map_or_else(|| x.shallow_clone(), |y| x + y);
        let shape = gamma.size();
        let (out, mean, rstd) = sum.native_layer_norm(shape, Some(gamma), Some(beta), eps);
        let flat = |of_rows: Tensor| of_rows.reshape([-1]).to_kind(Kind::Float);
        Normed { out, kept: Kept { sum, mean: flat(mean), rstd: flat(rstd) } }
    }

    /// As [`backward`](super::backward).
    pub fn backward(gamma: &Tensor, kept: &Kept, arrived: Arrived<'_>) -> Tensor {
        let Kept { sum, mean, rstd } = kept;
        let shape: Vec<i64> = sum.size()[..sum.dim() - 1].iter().copied().chain([1]).collect();
        let of_rows = |tensor: &Tensor| tensor.view(shape.as_slice());
        let normal = (sum.to_kind(Kind::Float) - of_rows(mean)) * of_rows(rstd);
        let out = arrived.out.to_kind(Kind::Float);
        let through = &out * gamma.to_kind(Kind::Float);
        let mean_of = |tensor: Tensor| tensor.mean_dim([-1i64].as_slice(), true, Kind::Float);
        let along_normal = mean_of(&through * &normal) * &normal;
        let mut grad = (&through - mean_of(through.shallow_clone()) - along_normal) * of_rows(rstd);
        if let Some(beside) = arrived.sum {
            grad += beside;
        }
        let columns = |tensor: Tensor| {
            let rows = tensor.flatten(0, -2);
            rows.sum_dim_intlist([0i64].as_slice(), false, Kind::Float)
        };
        let _ = arrived.gamma.shallow_clone().g_add_(&columns(&out * &normal));
        let _ = arrived.beta.shallow_clone().g_add_(&columns(out));
        grad.to_kind(sum.kind())
    }
}

#[cfg(test)]
mod tests {
    use super::super::host::{CASES, Host, off, random};
    use super::*;
    use tch::Device;

    /// What backward gives, and the sums for gamma and beta.
    type Gradients = [Tensor; 3];

    fn through(
        input: Input<'_>,
        beside: bool,
        run: impl Fn(Input<'_>, Arrived<'_>) -> (Normed, Tensor),
    ) -> (Normed, Gradients) {
        tch::manual_seed(11);
        let kind = input.x.kind();
        let [out, sum] = [0, 1].map(|_| random(&input.x.size(), kind));
        let columns = || Tensor::ones(input.gamma.size(), (Kind::Float, Device::Cpu));
        let (gamma, beta) = (columns(), columns());
        let arrived = Arrived { out: &out, sum: beside.then_some(&sum), gamma: &gamma, beta: &beta };
        let (normed, grad) = run(input, arrived);
        (normed, [grad, gamma, beta])
    }

    #[test]
    fn the_kernels_on_the_host_are_layer_norm_and_its_gradient() {
        for (rows, width, kind) in CASES {
            tch::manual_seed(rows * 1000 + width);
            let [x, y] = [0, 1].map(|_| random(&[rows, width], kind));
            let (gamma, beta) = (random(&[width], kind), random(&[width], kind));
            for (residual, beside) in [(true, true), (false, false), (true, false)] {
                let y = residual.then_some(&y);
                let input = Input { x: &x, y, gamma: &gamma, beta: &beta, eps: 1e-5 };
                let (got, grads) = through(input, beside, |input, arrived| {
                    let normed = forward_on(&Host, input).unwrap();
                    let grad = backward_on(&Host, input.gamma, &normed.kept, arrived).unwrap();
                    (normed, grad)
                });
                let (expected, expected_grads) = through(input, beside, |input, arrived| {
                    let normed = by_torch::forward(input);
                    let grad = by_torch::backward(input.gamma, &normed.kept, arrived);
                    (normed, grad)
                });
                let case = format!("{rows} x {width} {kind:?} {residual} {beside}");
                assert_eq!(got.kept.sum, expected.kept.sum, "{case}");
                let limit = if kind == Kind::Float { 3e-6 } else { 4e-3 };
                let pairs = [
                    ("out", &got.out, &expected.out),
                    ("mean", &got.kept.mean, &expected.kept.mean),
                    ("rstd", &got.kept.rstd, &expected.kept.rstd),
                    ("grad", &grads[0], &expected_grads[0]),
                    ("gamma", &grads[1], &expected_grads[1]),
                    ("beta", &grads[2], &expected_grads[2]),
                ];
                for (name, got, expected) in pairs {
                    assert!(off(got, expected) < limit, "{name} of {case}: {}", off(got, expected));
                }
            }
        }
    }

    #[test]
    fn the_reference_is_autograds_gradient() {
        tch::manual_seed(3);
        let leaf = |size: &[i64]| random(size, Kind::Float).set_requires_grad(true);
        let (x, y, gamma, beta) = (leaf(&[2, 5, 24]), leaf(&[2, 5, 24]), leaf(&[24]), leaf(&[24]));
        let (out_grad, sum_grad) = (random(&[2, 5, 24], Kind::Float), random(&[2, 5, 24], Kind::Float));
        let sum = &x + &y;
        let out = sum.layer_norm([24], Some(&gamma), Some(&beta), 1e-5, false);
        ((&out * &out_grad).sum(Kind::Float) + (&sum * &sum_grad).sum(Kind::Float)).backward();

        let detached = [&x, &y, &gamma, &beta].map(Tensor::detach);
        let [dx, dy, dgamma, dbeta] = &detached;
        let normed = by_torch::forward(Input { x: dx, y: Some(dy), gamma: dgamma, beta: dbeta, eps: 1e-5 });
        let (gammas, betas) = (dgamma.zeros_like(), dbeta.zeros_like());
        let arrived = Arrived { out: &out_grad, sum: Some(&sum_grad), gamma: &gammas, beta: &betas };
        let grad = by_torch::backward(dgamma, &normed.kept, arrived);
        for (got, expected) in
            [(&grad, x.grad()), (&grad, y.grad()), (&gammas, gamma.grad()), (&betas, beta.grad())]
        {
            assert!(off(got, &expected) < 1e-5, "{}", off(got, &expected));
        }
    }

    #[test]
    fn rows_that_do_not_fit_are_refused() {
        let x = |size: &[i64]| random(size, Kind::Float);
        let input =
            Input { x: &x(&[3, 8]), y: Some(&x(&[3, 7])), gamma: &x(&[8]), beta: &x(&[8]), eps: 1e-5 };
        let error = forward_on(&Host, input).unwrap_err().to_string();
        assert!(error.contains("norm::forward") && error.contains("[3, 7]"), "{error}");
    }
}
