//! The MLP of a block: by libtorch, in bf16 on a CPU with a matrix unit with the GELU taken while the products'
//! sums are written, on a GPU with a kernel that adds the bias and takes the GELU in one pass. Backward takes the
//! GELU again: what comes of it is a third of what else autograd would keep of a block. Knows no model.

use crate::linear::{Layer, computes, has_products, rows_of, shaped, wide, with_width};
use crate::outside::{Backward, ParameterGrad, differentiable, none};
use crate::{OpsError, kernels, shim};
use tch::Tensor;

/// Which GELU (Hendrycks & Gimpel 2016).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gelu {
    /// By its tanh, as in GPT.
    Tanh,
    /// As it is defined, as in BERT.
    Exact,
}

impl Layer<'_> {
    /// The GELU of what [`Layer::of`] gives of `x` `[..., K]`: `[..., N]`. Differentiable.
    ///
    /// # Panics
    /// As [`Layer::of`].
    pub fn gelu(self, x: &Tensor, kind: Gelu) -> Tensor {
        match self.bias {
            Some(bias) if kernels::gelu::takes(x) && bias.kind() == x.kind() => {
                let product = x.linear::<&Tensor>(self.weight, None);
                by_kernel(&product, bias, kind).unwrap_or_else(|error| panic!("bias and GELU: {error}"))
            }
            _ => gelu(&self.of(x), kind),
        }
    }
}

/// The GELU of `x + bias`, `[..., N]` and `[N]`.
fn by_kernel(x: &Tensor, bias: &Tensor, kind: Gelu) -> Result<Tensor, OpsError> {
    use kernels::gelu;
    let (rows, by_tanh) = (x.detach().contiguous(), kind == Gelu::Tanh);
    let (values, of_bias) = (bias.detach(), bias.shallow_clone());
    let input = gelu::Input { x: &rows, bias: &values, by_tanh };
    let out = tch::no_grad(|| gelu::forward(input))?.expect("the kernel was there just now");
    let backward: Backward = Box::new(move |arrived| {
        let Some(grad) = &arrived[0] else { return Ok(vec![None, None]) };
        let (input, sums) = (gelu::Input { x: &rows, bias: &values, by_tanh }, ParameterGrad::of(&of_bias)?);
        let grad = gelu::backward(input, &grad.contiguous(), &sums.sums)?;
        Ok(vec![Some(grad.expect("the kernel was there in forward")), sums.rest()?])
    });
    differentiable(&[x, bias], &[&out], backward)?;
    Ok(out)
}

impl Gelu {
    /// As libtorch calls it.
    fn name(self) -> &'static str {
        match self {
            Gelu::Tanh => "tanh",
            Gelu::Exact => "none",
        }
    }
}

/// `x` to its GELU, of any shape. Differentiable.
pub fn gelu(x: &Tensor, kind: Gelu) -> Tensor {
    x.gelu(kind.name())
}

/// `x` `[..., C]` through the layer `up`, `[H, C]`, a GELU, and the layer `down`, `[C, H]`: `[..., C]`.
/// Differentiable; keeps `x` and what the GELU is taken of. A parameter whose `grad()` is fp32 may have it added
/// to in place.
///
/// # Panics
/// As tch's operations do: shapes or kinds that differ, no memory.
pub fn mlp(x: &Tensor, up: Layer<'_>, kind: Gelu, down: Layer<'_>) -> Tensor {
    let (Some(b1), Some(b2)) = (up.bias, down.bias) else { return down.of(&up.gelu(x, kind)) };
    let parameters = [up.weight, b1, down.weight, b2];
    let y = if has_products(x) && up.is_half() && down.is_half() {
        up.expect_fits(x.size().last().copied());
        down.expect_fits(up.weight.size().first().copied());
        shim::mlp(x, parameters, kind == Gelu::Exact)
    } else if computes(x) && parameters.iter().all(|parameter| parameter.kind() == x.kind()) {
        by_libtorch(x, parameters, kind)
    } else {
        return down.of(&up.gelu(x, kind));
    };
    y.unwrap_or_else(|error| panic!("mlp: {error}"))
}

/// The same by libtorch's products.
fn by_libtorch(x: &Tensor, parameters: [&Tensor; 4], gelu: Gelu) -> Result<Tensor, OpsError> {
    let [w1, b1, w2, b2] = parameters.map(Tensor::detach);
    let (rows, kind, size) = (rows_of(x)?, x.kind(), x.size());
    let by_kernel = kernels::gelu::takes(&rows);
    let bias = if by_kernel { None } else { Some(wide(&b1)?) };
    let between = Between { gelu, bias: by_kernel.then_some(b1) };

    let hidden = wide(&rows)?.f_linear(&wide(&w1)?, bias.as_ref())?.f_to_kind(kind)?;
    let y = between.value(&hidden)?.f_linear(&wide(&w2)?, Some(wide(&b2)?))?;
    let y = shaped(&y, &with_width(&size, w2.size()[0]), kind)?;

    let of = parameters.map(Tensor::shallow_clone);
    let backward: Backward = Box::new(move |arrived| {
        let Some(grad) = &arrived[0] else { return Ok(none(5)) };
        let grad = wide(&rows_of(grad)?)?;
        let w2_grad = ParameterGrad::of(&of[2])?;
        w2_grad.add_product(&grad, &between.value(&hidden)?)?;
        let (hidden_grad, b1_grad) = between.backward(&hidden, &grad.f_mm(&wide(&w2)?)?, &of[1])?;
        let w1_grad = ParameterGrad::of(&of[0])?;
        w1_grad.add_product(&hidden_grad, &wide(&rows)?)?;
        let x_grad = shaped(&hidden_grad.f_mm(&wide(&w1)?)?, &size, kind)?;
        let b2_grad = ParameterGrad::of(&of[3])?.with_columns(&grad)?;
        Ok(vec![Some(x_grad), w1_grad.rest()?, b1_grad, w2_grad.rest()?, b2_grad])
    });
    let [w1, b1, w2, b2] = parameters;
    differentiable(&[x, w1, b1, w2, b2], &[&y], backward)?;
    Ok(y)
}

/// The GELU between two layers, with the first one's bias where a kernel adds it.
struct Between {
    gelu: Gelu,
    bias: Option<Tensor>,
}

impl Between {
    fn input<'a>(&self, hidden: &'a Tensor, bias: &'a Tensor) -> kernels::gelu::Input<'a> {
        kernels::gelu::Input { x: hidden, bias, by_tanh: self.gelu == Gelu::Tanh }
    }

    /// As it is multiplied.
    fn value(&self, hidden: &Tensor) -> Result<Tensor, OpsError> {
        let Some(bias) = &self.bias else { return Ok(wide(hidden)?.f_gelu(self.gelu.name())?) };
        wide(&kernels::gelu::forward(self.input(hidden, bias))?.expect("the kernel was there just now"))
    }

    /// The gradient of `hidden`, as it is multiplied, given the value's; and what autograd is given for the first
    /// layer's bias.
    fn backward(
        &self,
        hidden: &Tensor,
        grad: &Tensor,
        of_bias: &Tensor,
    ) -> Result<(Tensor, Option<Tensor>), OpsError> {
        let sums = ParameterGrad::of(of_bias)?;
        let Some(bias) = &self.bias else {
            let grad = wide(hidden)?.f_gelu_backward(grad, self.gelu.name())?;
            let bias_grad = sums.with_columns(&grad)?;
            return Ok((grad, bias_grad));
        };
        let grad = grad.f_to_kind(hidden.kind())?.contiguous();
        let grad = kernels::gelu::backward(self.input(hidden, bias), &grad, &sums.sums)?;
        Ok((wide(&grad.expect("the kernel was there in forward"))?, sums.rest()?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::host::in_place_of_a_gpu;
    use crate::linear::tests::{leaf, off, random};
    use std::io::Write;
    use tch::Kind;

    fn through(x: &Tensor, [w1, b1, w2, b2]: &[Tensor; 4], kind: Gelu) -> Tensor {
        let up = Layer { weight: w1, bias: Some(b1) };
        mlp(x, up, kind, Layer { weight: w2, bias: Some(b2) })
    }

    #[test]
    fn an_mlp_and_its_gradients_are_exact_to_bf16_at_any_shape() {
        // Of one number nothing averages out: a sum that happens to be near zero is rounding alone.
        tch::manual_seed(1);
        for (kind, [m, c, h]) in [
            (Gelu::Tanh, [1, 1, 1]),
            (Gelu::Exact, [7, 33, 65]),
            (Gelu::Tanh, [130, 96, 384]),
            (Gelu::Exact, [64, 32, 128]),
        ] {
            let parameters = [&[h, c][..], &[h], &[c, h], &[c]].map(random);
            let (x, dy) = (random(&[m, c]), random(&[m, c]));
            let in_full = |x: &Tensor| leaf(&x.to_kind(Kind::Double));
            let (exact_x, exact_parameters) = (in_full(&x), parameters.each_ref().map(in_full));
            let exact = through(&exact_x, &exact_parameters, kind);
            crate::backward(&exact, &dy.to_kind(Kind::Double)).unwrap();
            let (x, parameters) = (leaf(&x), parameters.each_ref().map(leaf));
            let got = through(&x, &parameters, kind);
            crate::backward(&got, &dy).unwrap();
            assert!(off(&got, &exact.detach()) < 1e-2, "{kind:?} of {m} x {c} x {h}: {}", off(&got, &exact));
            assert!(off(&x.grad(), &exact_x.grad()) < 1e-2, "dx: {}", off(&x.grad(), &exact_x.grad()));
            for (got, exact) in parameters.iter().zip(&exact_parameters) {
                assert!(
                    off(&got.grad(), &exact.grad()) < 1e-2,
                    "{:?}: {}",
                    got.size(),
                    off(&got.grad(), &exact.grad())
                );
            }
        }
    }

    /// Output and gradients of an MLP of leaves of `kind`: of x and of its four parameters.
    fn differentiated(given: &[Tensor; 6], kind: Kind, which: Gelu) -> Vec<Tensor> {
        differentiated_by(given, kind, |x, parameters| through(x, parameters, which))
    }

    fn differentiated_by(
        given: &[Tensor; 6],
        kind: Kind,
        mlp: impl Fn(&Tensor, &[Tensor; 4]) -> Tensor,
    ) -> Vec<Tensor> {
        let [x, w1, b1, w2, b2, dy] = given.each_ref().map(|x| leaf(&x.to_kind(kind)));
        let parameters = [w1, b1, w2, b2];
        let y = mlp(&x, &parameters);
        crate::backward(&y, &dy.detach()).unwrap();
        [y.detach(), x.grad()].into_iter().chain(parameters.iter().map(Tensor::grad)).collect()
    }

    /// x, both layers' parameters, and what arrives.
    fn given([b, t, c, h]: [i64; 4], kind: Kind) -> [Tensor; 6] {
        tch::manual_seed(c);
        let sizes: [&[i64]; 6] = [&[b, t, c], &[h, c], &[h], &[c, h], &[c], &[b, t, c]];
        sizes.map(|size| random(size).to_kind(kind))
    }

    #[test]
    fn in_fp32_an_mlp_has_the_bits_that_autograd_gives() {
        for (which, sizes) in [(Gelu::Exact, [2, 5, 9, 33]), (Gelu::Tanh, [2, 64, 96, 384])] {
            let given = given(sizes, Kind::Float);
            let by_autograd = |x: &Tensor, [w1, b1, w2, b2]: &[Tensor; 4]| {
                gelu(&x.linear(w1, Some(b1)), which).linear(w2, Some(b2))
            };
            let expected = differentiated_by(&given, Kind::Float, by_autograd);
            assert_eq!(differentiated(&given, Kind::Float, which), expected, "{which:?}");
        }
    }

    #[test]
    fn by_kernels_an_mlp_and_all_its_gradients_are_float64s() {
        for kind in [Kind::Float, Kind::BFloat16] {
            for (which, [b, t, c, h]) in
                [(Gelu::Tanh, [1, 1, 1, 1]), (Gelu::Exact, [2, 5, 9, 33]), (Gelu::Tanh, [3, 4, 16, 64])]
            {
                let given = given([b, t, c, h], kind);
                let exact = differentiated(&given, Kind::Double, which);
                let got = in_place_of_a_gpu(|| differentiated(&given, kind, which));
                let limit = if kind == Kind::Float { 1e-5 } else { 2e-2 };
                for (i, (got, exact)) in got.iter().zip(&exact).enumerate() {
                    assert!(off(got, exact) < limit, "{i} of {c} to {h} in {kind:?}: {}", off(got, exact));
                }
            }
        }
    }

    #[test]
    fn by_kernels_the_bias_has_its_fp32_gradient_added_to_in_place() {
        let (x, w, dy) = (random(&[6, 8]), random(&[16, 8]), random(&[6, 16]));
        let (mut b, sums) = (leaf(&random(&[16])), Tensor::ones([16], (Kind::Float, tch::Device::Cpu)));
        crate::shim::set_grad(&mut b, &sums).unwrap();
        let exact_b = leaf(&b.detach().to_kind(Kind::Double));
        let through = |x: &Tensor, w: &Tensor, b: &Tensor, dy: &Tensor| {
            crate::backward(&Layer { weight: w, bias: Some(b) }.gelu(x, Gelu::Tanh), dy).unwrap();
        };
        in_place_of_a_gpu(|| through(&x, &w, &b, &dy));
        let [x, w, dy] = [x, w, dy].map(|tensor| tensor.to_kind(Kind::Double));
        through(&x, &w, &exact_b, &dy);
        assert!(off(&(&sums - 1.0), &exact_b.grad()) < 1e-2, "{}", off(&(&sums - 1.0), &exact_b.grad()));
        assert_eq!(b.grad().data_ptr(), sums.data_ptr());
    }

    /// A layer that gives each number as it is.
    fn identity(n: i64) -> [Tensor; 2] {
        let kind = (Kind::BFloat16, tch::Device::Cpu);
        [Tensor::eye(n, kind), Tensor::zeros([n], kind)]
    }

    #[test]
    fn the_gelu_and_its_slope_hold_over_all_numbers() {
        let n = 32;
        let far = [-1e30, -3e4, -100.0, -20.5, -13.5, -9.0, 0.0, 9.0, 13.5, 20.5, 100.0, 3e4, 1e30];
        let near = (0..32 * 8 - far.len()).map(|i| (i as f64 - 121.0) * 0.05);
        let numbers: Vec<f64> = far.into_iter().chain(near).collect();
        let [w, b] = identity(n);
        let parameters = [&w, &b, &w, &b].map(Tensor::shallow_clone);
        for kind in [Gelu::Tanh, Gelu::Exact] {
            let x = leaf(&Tensor::from_slice(&numbers).view([-1, n]).to_kind(Kind::BFloat16));
            let got = through(&x, &parameters, kind);
            crate::backward(&got, &got.ones_like()).unwrap();
            let exact_x = leaf(&x.detach().to_kind(Kind::Double).clamp(-1e4, 1e4));
            let exact = gelu(&exact_x, kind);
            crate::backward(&exact, &exact.ones_like()).unwrap();
            let moderate = x.detach().abs().le(1e4);
            let apart = |got: &Tensor, exact: &Tensor| {
                let (got, exact) = (got.to_kind(Kind::Double), exact.detach());
                let within = (&got - &exact).abs() - exact.abs() * 4e-3 - 1e-6;
                within.masked_select(&moderate).max().double_value(&[])
            };
            assert!(apart(&got, &exact) <= 0.0, "{kind:?}: {}", apart(&got, &exact));
            if !shim::has_products() {
                // The slope of libtorch's is no number from about 1e20 on.
                writeln!(std::io::stderr(), "slope skipped: this CPU has no matrix unit for bf16").unwrap();
                continue;
            }
            assert!(
                apart(&x.grad(), &exact_x.grad()) <= 0.0,
                "slope, {kind:?}: {}",
                apart(&x.grad(), &exact_x.grad())
            );
            assert!(x.grad().isfinite().all().int64_value(&[]) == 1, "{kind:?}");
        }
    }
}
