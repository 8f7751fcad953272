//! The MLP of a block: by libtorch, in bf16 on a CPU with a matrix unit with the GELU taken while the products'
//! sums are written, on a GPU with a kernel that adds the bias and takes the GELU in one pass. Backward takes the
//! GELU again: what comes of it is a third of what else autograd would keep of a block. Knows no model.

use crate::linear::{Layer, has_products};
use crate::outside::{Backward, ParameterGrad, differentiable};
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
    let parts = [up.weight, b1, down.weight, b2];
    let y = if has_products(x) && up.is_half() && down.is_half() {
        up.expect_fits(x.size().last().copied());
        down.expect_fits(up.weight.size().first().copied());
        shim::mlp(x, parts, kind == Gelu::Exact)
    } else {
        by_libtorch(x, parts, kind)
    };
    y.unwrap_or_else(|error| panic!("mlp: {error}"))
}

/// The same by libtorch's products.
fn by_libtorch(x: &Tensor, parameters: [&Tensor; 4], kind: Gelu) -> Result<Tensor, OpsError> {
    let [w1, b1, w2, b2] = parameters.map(Tensor::detach);
    let of_b1 = parameters[1].shallow_clone();
    let rows = x.detach().f_reshape([-1, w1.size()[1]])?;
    let by_kernel = kernels::gelu::takes(&rows) && b1.kind() == rows.kind();
    let between = Between { kind, bias: by_kernel.then(|| b1.shallow_clone()) };

    let hidden = rows.f_linear(&w1, (!by_kernel).then_some(&b1))?;
    let mut size = x.size();
    *size.last_mut().expect("rows have a width") = w2.size()[0];
    let y = between.value(&hidden)?.f_linear(&w2, Some(&b2))?.f_view(size.as_slice())?;

    let x_size = x.size();
    let backward: Backward = Box::new(move |arrived| {
        let Some(grad) = &arrived[0] else { return Ok((0..5).map(|_| None).collect()) };
        let grad = grad.f_reshape([-1, w2.size()[0]])?;
        let w2_grad = grad.f_tr()?.f_mm(&between.value(&hidden)?)?;
        let (hidden_grad, b1_grad) = between.backward(&hidden, &grad.f_mm(&w2)?, &of_b1)?;
        let w1_grad = hidden_grad.f_tr()?.f_mm(&rows)?;
        let x_grad = hidden_grad.f_mm(&w1)?.f_view(x_size.as_slice())?;
        let b2_grad = column_sums(&grad)?;
        Ok(vec![Some(x_grad), Some(w1_grad), b1_grad, Some(w2_grad), Some(b2_grad)])
    });
    let [w1, b1, w2, b2] = parameters;
    differentiable(&[x, w1, b1, w2, b2], &[&y], backward)?;
    Ok(y)
}

/// The GELU between two layers, with the first one's bias where a kernel adds it.
struct Between {
    kind: Gelu,
    bias: Option<Tensor>,
}

impl Between {
    fn value(&self, hidden: &Tensor) -> Result<Tensor, OpsError> {
        let Some(bias) = &self.bias else { return Ok(hidden.f_gelu(self.kind.name())?) };
        let input = kernels::gelu::Input { x: hidden, bias, by_tanh: self.kind == Gelu::Tanh };
        Ok(kernels::gelu::forward(input)?.expect("the kernel was there just now"))
    }

    /// The gradient of `hidden` given the value's, and what autograd is given for the first layer's bias.
    fn backward(
        &self,
        hidden: &Tensor,
        grad: &Tensor,
        of_bias: &Tensor,
    ) -> Result<(Tensor, Option<Tensor>), OpsError> {
        let Some(bias) = &self.bias else {
            let grad = hidden.f_gelu_backward(grad, self.kind.name())?;
            let sums = column_sums(&grad)?;
            return Ok((grad, Some(sums)));
        };
        let input = kernels::gelu::Input { x: hidden, bias, by_tanh: self.kind == Gelu::Tanh };
        let sums = ParameterGrad::of(of_bias)?;
        let grad = kernels::gelu::backward(input, &grad.contiguous(), &sums.sums)?;
        Ok((grad.expect("the kernel was there in forward"), sums.rest()?))
    }
}

/// The sums of a matrix's columns, of its kind.
fn column_sums(x: &Tensor) -> Result<Tensor, OpsError> {
    Ok(x.f_sum_dim_intlist([0i64].as_slice(), false, x.kind())?)
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
    fn by_libtorch_an_mlp_has_the_bits_that_autograd_gives() {
        let kinds = if shim::has_products() { vec![Kind::Float] } else { vec![Kind::Float, Kind::BFloat16] };
        for kind in kinds {
            for (which, sizes) in [(Gelu::Exact, [2, 5, 9, 33]), (Gelu::Tanh, [2, 64, 96, 384])] {
                let given = given(sizes, kind);
                let by_autograd = |x: &Tensor, [w1, b1, w2, b2]: &[Tensor; 4]| {
                    gelu(&x.linear(w1, Some(b1)), which).linear(w2, Some(b2))
                };
                let expected = differentiated_by(&given, kind, by_autograd);
                assert_eq!(differentiated(&given, kind, which), expected, "{which:?} in {kind:?}");
            }
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
