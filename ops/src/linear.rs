//! Linear layers: by libtorch, or in bf16 on a CPU with a matrix unit by a product of our own. On CPUs the product
//! itself adds a weight's gradient where it belongs, and without a matrix unit bf16 is widened to fp32 for it, which
//! multiplies faster there. Knows no model.

use crate::outside::{Backward, ParameterGrad, differentiable, none};
use crate::{OpsError, shim};
use tch::{Device, Kind, Tensor};

/// A linear layer's parameters.
#[derive(Debug, Clone, Copy)]
pub struct Layer<'a> {
    /// `[N, K]`.
    pub weight: &'a Tensor,
    /// `[N]`.
    pub bias: Option<&'a Tensor>,
}

impl Layer<'_> {
    /// `x` `[..., K]` times the weight turned over, plus the bias: `[..., N]`. Differentiable; where
    /// `weight.grad()` is fp32, it is added to in place.
    ///
    /// # Panics
    /// As tch's operations do: shapes or kinds that differ, no memory.
    pub fn of(self, x: &Tensor) -> Tensor {
        let y = if has_products(x) && self.is_half() {
            self.expect_fits(x.size().last().copied());
            shim::linear(x, self.weight, self.bias)
        } else if x.device() == Device::Cpu && computes(x) && self.weight.kind() == x.kind() {
            self.on_cpu(x)
        } else {
            return x.linear(self.weight, self.bias);
        };
        y.unwrap_or_else(|error| panic!("linear: {error}"))
    }

    /// The same by libtorch's products of fp32.
    fn on_cpu(self, x: &Tensor) -> Result<Tensor, OpsError> {
        let (rows, weight, kind, size) = (rows_of(x)?, self.weight.detach(), x.kind(), x.size());
        let bias = self.bias.map(|bias| wide(&bias.detach())).transpose()?;
        let y = wide(&rows)?.f_linear(&wide(&weight)?, bias.as_ref())?;
        let y = shaped(&y, &with_width(&size, weight.size()[0]), kind)?;

        let (of_weight, of_bias) = (self.weight.shallow_clone(), self.bias.map(Tensor::shallow_clone));
        let backward: Backward = Box::new(move |arrived| {
            let Some(grad) = &arrived[0] else { return Ok(none(2 + usize::from(of_bias.is_some()))) };
            let grad = wide(&rows_of(grad)?)?;
            let weight_grad = ParameterGrad::of(&of_weight)?;
            weight_grad.add_product(&grad, &wide(&rows)?)?;
            let x_grad = shaped(&grad.f_mm(&wide(&weight)?)?, &size, kind)?;
            let bias_grad =
                of_bias.as_ref().map(|bias| ParameterGrad::of(bias)?.with_columns(&grad)).transpose()?;
            Ok([Some(x_grad), weight_grad.rest()?].into_iter().chain(bias_grad).collect())
        });
        let inputs: Vec<&Tensor> = [x, self.weight].into_iter().chain(self.bias).collect();
        differentiable(&inputs, &[&y], backward)?;
        Ok(y)
    }

    pub(crate) fn is_half(self) -> bool {
        self.weight.kind() == Kind::BFloat16
    }

    /// Stops where the shim would read what is not there.
    pub(crate) fn expect_fits(self, k: Option<i64>) {
        let (n, deep) = self.weight.size2().expect("a weight is a matrix");
        assert!(
            k == Some(deep) && self.bias.is_none_or(|bias| bias.size() == [n]),
            "a linear layer's shapes"
        );
        let contiguous = self.weight.is_contiguous() && self.bias.is_none_or(Tensor::is_contiguous);
        let half = self.bias.is_none_or(|bias| bias.kind() == Kind::BFloat16);
        assert!(contiguous && half, "parameters lie in order, and are of one kind");
    }
}

/// Whether it is of a kind that models compute in.
pub(crate) fn computes(x: &Tensor) -> bool {
    matches!(x.kind(), Kind::Float | Kind::BFloat16)
}

/// As what it is multiplied where no product is our own: fp32 of bf16 on a CPU.
pub(crate) fn wide(x: &Tensor) -> Result<Tensor, OpsError> {
    let widens = x.device() == Device::Cpu && x.kind() == Kind::BFloat16;
    Ok(if widens { x.f_to_kind(Kind::Float)? } else { x.shallow_clone() })
}

/// `[..., K]` as rows, `[M, K]`, without a graph.
pub(crate) fn rows_of(x: &Tensor) -> Result<Tensor, OpsError> {
    Ok(x.detach().f_reshape([-1, x.size().last().copied().unwrap_or(1)])?)
}

/// The size `[..., K]` with another width.
pub(crate) fn with_width(size: &[i64], width: i64) -> Vec<i64> {
    let (_, leading) = size.split_last().expect("rows have a width");
    leading.iter().copied().chain([width]).collect()
}

/// Rows in another size and kind.
pub(crate) fn shaped(rows: &Tensor, size: &[i64], kind: Kind) -> Result<Tensor, OpsError> {
    Ok(rows.f_to_kind(kind)?.f_view(size)?)
}

/// Whether products of this tensor are our own.
pub(crate) fn has_products(x: &Tensor) -> bool {
    x.device() == Device::Cpu && x.kind() == Kind::BFloat16 && x.numel() > 0 && shim::has_products()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::io::Write;

    fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Tensor {
        Layer { weight, bias }.of(x)
    }

    pub(crate) fn random(size: &[i64]) -> Tensor {
        Tensor::randn(size, (Kind::Float, Device::Cpu)).to_kind(Kind::BFloat16)
    }

    pub(crate) fn off(a: &Tensor, exact: &Tensor) -> f64 {
        ((a.to_kind(Kind::Double) - exact).norm() / exact.norm()).double_value(&[])
    }

    pub(crate) fn leaf(x: &Tensor) -> Tensor {
        x.detach().copy().set_requires_grad(true)
    }

    /// y, dx, dw and db in float64.
    fn exact(x: &Tensor, w: &Tensor, b: &Tensor, dy: &Tensor) -> [Tensor; 4] {
        let [x, w, b, dy] = [x, w, b, dy].map(|tensor| tensor.to_kind(Kind::Double));
        let y = x.matmul(&w.transpose(0, 1)) + b;
        let dw = dy.transpose(0, 1).matmul(&x);
        [y, dy.matmul(&w), dw, dy.sum_dim_intlist([0i64].as_slice(), false, Kind::Double)]
    }

    #[test]
    fn a_layer_and_its_gradients_are_exact_to_bf16_at_any_shape() {
        tch::manual_seed(1); // of one number the exact sum may be zero, which nothing is relative to
        for (m, n, k) in [(1, 1, 1), (3, 5, 7), (33, 65, 31), (64, 96, 32), (70, 130, 100), (130, 40, 4500)] {
            let (x, w, b, dy) = (random(&[m, k]), random(&[n, k]), random(&[n]), random(&[m, n]));
            let [y, dx, dw, db] = exact(&x, &w, &b, &dy);
            let [x, w, b] = [&x, &w, &b].map(leaf);
            let out = linear(&x, &w, Some(&b));
            crate::backward(&out, &dy).unwrap();
            for (name, got, exact) in
                [("y", &out, &y), ("dx", &x.grad(), &dx), ("dw", &w.grad(), &dw), ("db", &b.grad(), &db)]
            {
                assert!(off(got, exact) < 6e-3, "{name} of {m} x {n} x {k}: {}", off(got, exact));
            }
        }
    }

    #[test]
    fn an_fp32_gradient_is_added_to_in_place_and_loses_nothing() {
        let (m, n, k) = (100, 64, 96);
        let (x, w, b, dy) = (random(&[m, k]), random(&[n, k]), random(&[n]), random(&[m, n]));
        let [_, _, dw, db] = exact(&x, &w, &b, &dy);
        let [x, mut w, mut b] = [&x, &w, &b].map(leaf);
        let sums = [
            Tensor::zeros([n, k], (Kind::Float, Device::Cpu)),
            Tensor::zeros([n], (Kind::Float, Device::Cpu)),
        ];
        crate::shim::set_grad(&mut w, &sums[0]).unwrap();
        crate::shim::set_grad(&mut b, &sums[1]).unwrap();
        for _ in 0..2 {
            crate::backward(&linear(&x, &w, Some(&b)), &dy).unwrap();
        }
        assert!(off(&sums[0], &(dw * 2.0)) < 1e-6 && off(&sums[1], &(db * 2.0)) < 1e-6);
    }

    #[test]
    fn in_fp32_a_layer_has_the_bits_that_autograd_gives() {
        let [x, w, b, dy] = [&[5, 7, 96][..], &[384, 96], &[384], &[5, 7, 384]]
            .map(|size| Tensor::randn(size, (Kind::Float, Device::Cpu)));
        for bias in [Some(&b), None] {
            let through = |layer: fn(&Tensor, &Tensor, Option<&Tensor>) -> Tensor| {
                let (x, w, b) = (leaf(&x), leaf(&w), bias.map(leaf));
                let y = layer(&x, &w, b.as_ref());
                crate::backward(&y, &dy).unwrap();
                let grads = [x.grad(), w.grad()].into_iter().chain(b.map(|b| b.grad()));
                std::iter::once(y.detach()).chain(grads).collect::<Vec<_>>()
            };
            assert_eq!(through(linear), through(|x, w, b| x.linear(w, b)));
        }
    }

    #[test]
    fn the_loss_alone_is_the_cross_entropy_and_leaves_its_gradient() {
        if !crate::shim::has_products() {
            writeln!(std::io::stderr(), "skipped: this CPU has no matrix unit for bf16").unwrap();
            return;
        }
        let (logits, targets) = (random(&[5, 64]), Tensor::from_slice(&[0i64, 49, 7, 7, 30]));
        let exact = logits.narrow(1, 0, 50).to_kind(Kind::Double).set_requires_grad(true);
        let loss = exact.cross_entropy_loss::<Tensor>(&targets, None, tch::Reduction::Sum, -100, 0.0);
        loss.backward();
        let nats = crate::cross_entropy(&logits, &targets, 50, 1.0).unwrap();
        assert!((nats / loss.double_value(&[]) - 1.0).abs() < 1e-3);
        assert!(off(&logits.narrow(1, 0, 50), &exact.grad()) < 6e-3);
        assert_eq!(logits.narrow(1, 50, 14).abs().sum(Kind::Double).double_value(&[]), 0.0);
    }

    #[test]
    fn rows_of_any_shape_and_order_are_taken() {
        let (x, w) = (random(&[6, 4, 32]).transpose(0, 1), random(&[16, 32]));
        let got = linear(&x, &w, None);
        assert_eq!(got.size(), [4, 6, 16]);
        let exact = x.to_kind(Kind::Double).matmul(&w.to_kind(Kind::Double).transpose(0, 1));
        assert!(off(&got, &exact) < 6e-3);
    }

    #[test]
    fn the_number_of_threads_changes_no_bit() {
        let (x, w, dy) = (leaf(&random(&[200, 96])), leaf(&random(&[150, 96])), random(&[200, 150]));
        let mut seen = Vec::new();
        for threads in [1, 2, 3] {
            tch::set_num_threads(threads);
            let y = linear(&x, &w, None);
            crate::backward(&y, &dy).unwrap();
            seen.push((y.detach(), x.grad().copy(), w.grad().copy()));
            let (mut x, mut w) = (x.shallow_clone(), w.shallow_clone());
            x.zero_grad();
            w.zero_grad();
        }
        tch::set_num_threads(1);
        assert!(seen.windows(2).all(|pair| pair[0] == pair[1]));
    }
}
