//! Layer norm, alone and of a sum: by libtorch, or on a GPU by a kernel that adds and normalises in one pass, and
//! goes back in one. Knows no model.

use crate::OpsError;
use crate::kernels::norm::{self, Arrived, Input};
use crate::outside::{Backward, ParameterGrad, differentiable};
use tch::Tensor;

/// A layer norm's parameters (Ba et al. 2016).
#[derive(Debug, Clone, Copy)]
pub struct LayerNorm<'a> {
    /// The gain, `[C]`.
    pub weight: &'a Tensor,
    /// `[C]`.
    pub bias: &'a Tensor,
    /// Added to the variance.
    pub eps: f64,
}

impl LayerNorm<'_> {
    /// Rows `[..., C]` normalised. Differentiable; a parameter whose `grad()` is fp32 may have it added to in
    /// place.
    ///
    /// # Panics
    /// As tch's operations do: shapes or kinds that differ, no memory.
    pub fn of(self, x: &Tensor) -> Tensor {
        if self.has_kernel(x) {
            let [_, out] = self.by_kernel(x, None).unwrap_or_else(|error| panic!("a layer norm: {error}"));
            return out;
        }
        x.layer_norm(self.weight.size(), Some(self.weight), Some(self.bias), self.eps, false)
    }

    fn has_kernel(self, x: &Tensor) -> bool {
        norm::takes(x) && [self.weight, self.bias].iter().all(|parameter| parameter.kind() == x.kind())
    }

    /// The sum, or `x` where nothing is added, and its norm.
    fn by_kernel(self, x: &Tensor, y: Option<&Tensor>) -> Result<[Tensor; 2], OpsError> {
        let of = |tensor: &Tensor| tensor.detach().contiguous();
        let (rows, added) = (of(x), y.map(of));
        let (gamma, beta, eps) = (self.weight.detach(), self.bias.detach(), self.eps);
        let input = Input { x: &rows, y: added.as_ref(), gamma: &gamma, beta: &beta, eps };
        let normed = tch::no_grad(|| norm::forward(input))?.expect("the kernel was there just now");
        let (out, sum) = (normed.out, normed.kept.sum.shallow_clone());
        // Of the sum backward has a handle of its own: that which leaves has a graph, which holds backward.
        let kept = norm::Kept { sum: sum.detach(), ..normed.kept };
        let (adds, of_weight, of_bias) =
            (y.is_some(), self.weight.shallow_clone(), self.bias.shallow_clone());
        let backward: Backward = Box::new(move |arrived| {
            let [beside, out] = if adds { [&arrived[0], &arrived[1]] } else { [&None, &arrived[0]] };
            let out = out.as_ref().map_or_else(|| kept.sum.zeros_like(), Tensor::contiguous);
            let beside = beside.as_ref().map(Tensor::contiguous);
            let (gammas, betas) = (ParameterGrad::of(&of_weight)?, ParameterGrad::of(&of_bias)?);
            let arrived = Arrived { out: &out, sum: beside.as_ref(), gamma: &gammas.sums, beta: &betas.sums };
            let grad = norm::backward(&gamma, &kept, arrived)?.expect("the kernel was there in forward");
            let mut grads = vec![Some(grad.shallow_clone())];
            grads.extend(adds.then_some(Some(grad)));
            grads.extend([gammas.rest()?, betas.rest()?]);
            Ok(grads)
        });
        match y {
            Some(y) => differentiable(&[x, y, self.weight, self.bias], &[&sum, &out], backward)?,
            None => differentiable(&[x, self.weight, self.bias], &[&out], backward)?,
        }
        Ok([sum, out])
    }
}

/// `x + y`, and its norm: `[..., C]` each. Differentiable, as [`LayerNorm::of`].
///
/// # Panics
/// As tch's operations do: shapes or kinds that differ, no memory.
pub fn add_norm(x: &Tensor, y: &Tensor, norm: LayerNorm<'_>) -> [Tensor; 2] {
    if norm.has_kernel(x) && x.kind() == y.kind() && x.size() == y.size() {
        return norm.by_kernel(x, Some(y)).unwrap_or_else(|error| panic!("a sum and its norm: {error}"));
    }
    let sum = x + y;
    let out = norm.of(&sum);
    [sum, out]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::host::{CASES, in_place_of_a_gpu, off, random};
    use crate::linear::tests::leaf;
    use tch::{Device, Kind};

    /// x, y, gain and bias.
    type Given = [Tensor; 4];

    fn given(size: &[i64], kind: Kind) -> Given {
        let width = &size[size.len() - 1..];
        [random(size, kind), random(size, kind), random(width, kind), random(width, kind)]
    }

    /// What a way makes of leaves of `kind`, and their gradients, where both a sum and its norm are used after.
    fn through(given: &Given, kind: Kind, way: impl Fn(&Given) -> [Tensor; 2]) -> Vec<Tensor> {
        let leaves = given.each_ref().map(|x| leaf(&x.to_kind(kind)));
        let [sum, out] = way(&leaves);
        let [weights, arrived] = [1, 0].map(|i: usize| given[i].to_kind(kind));
        crate::backward(&(&sum * 0.5 + &out * weights), &arrived).unwrap();
        let grads = leaves.iter().map(Tensor::grad).filter(Tensor::defined);
        [sum.detach(), out.detach()].into_iter().chain(grads).collect()
    }

    fn sum_and_norm([x, y, weight, bias]: &Given) -> [Tensor; 2] {
        add_norm(x, y, LayerNorm { weight, bias, eps: 1e-5 })
    }

    fn norm_alone([x, _, weight, bias]: &Given) -> [Tensor; 2] {
        [x.shallow_clone(), LayerNorm { weight, bias, eps: 1e-5 }.of(x)]
    }

    #[test]
    fn by_kernels_a_sum_its_norm_and_all_gradients_are_float64s() {
        for (rows, width, kind) in CASES.into_iter().filter(|(_, width, _)| *width > 1) {
            tch::manual_seed(rows + width);
            let given = given(&[rows, width], kind);
            for way in [sum_and_norm, norm_alone] {
                let exact = through(&given, Kind::Double, way);
                let got = in_place_of_a_gpu(|| through(&given, kind, way));
                assert_eq!(got.len(), exact.len());
                let limit = if kind == Kind::Float { 1e-5 } else { 2e-2 };
                for (i, (got, exact)) in got.iter().zip(&exact).enumerate() {
                    assert_eq!(got.kind(), kind);
                    assert!(off(got, exact) < limit, "{i} of {rows} x {width}: {}", off(got, exact));
                }
            }
        }
    }

    #[test]
    fn on_a_cpu_they_are_libtorchs_bit_by_bit() {
        let given = given(&[2, 5, 24], Kind::Float);
        let by_torch = |[x, y, weight, bias]: &Given| {
            let sum = x + y;
            let out = sum.layer_norm([24], Some(weight), Some(bias), 1e-5, false);
            [sum, out]
        };
        assert_eq!(through(&given, Kind::Float, sum_and_norm), through(&given, Kind::Float, by_torch));
    }

    #[test]
    fn parameters_have_fp32_gradients_added_to_in_place() {
        let given = given(&[3, 7, 16], Kind::BFloat16);
        let exact = through(&given, Kind::Double, sum_and_norm);
        let sums = [0, 1].map(|_| Tensor::zeros([16], (Kind::Float, Device::Cpu)));
        in_place_of_a_gpu(|| {
            for _ in 0..2 {
                through(&given, Kind::BFloat16, |[x, y, weight, bias]| {
                    for (parameter, sums) in [weight, bias].iter().zip(&sums) {
                        crate::shim::set_grad(&mut parameter.shallow_clone(), sums).unwrap();
                    }
                    sum_and_norm(&[x, y, weight, bias].map(Tensor::shallow_clone))
                });
            }
        });
        for (sums, exact) in sums.iter().zip(&exact[4..]) {
            assert!(off(sums, &(exact * 2.0)) < 1e-2, "{}", off(sums, &(exact * 2.0)));
        }
    }

    #[test]
    fn rows_that_lie_in_any_order_and_a_sum_that_nobody_uses_are_taken() {
        let [x, y, weight, bias] = given(&[4, 6, 8], Kind::Float);
        let given = [x.transpose(0, 1), y.transpose(0, 1), weight, bias];
        let of_norm = |given: &Given| {
            let [x, y, weight, bias] = given.each_ref().map(leaf);
            let [_, out] = sum_and_norm(&[&x, &y, &weight, &bias].map(Tensor::shallow_clone));
            crate::backward(&out.transpose(0, 1), &out.detach().transpose(0, 1).sin()).unwrap();
            [x, y, weight, bias].map(|leaf| leaf.grad())
        };
        let (got, expected) = (in_place_of_a_gpu(|| of_norm(&given)), of_norm(&given));
        for (got, expected) in got.iter().zip(&expected) {
            assert!(off(got, expected) < 1e-5, "{}", off(got, expected));
        }
    }

    #[test]
    fn rows_too_wide_for_the_kernel_go_libtorchs_way() {
        let given = given(&[1, 8192], Kind::Float);
        let [got, expected] = [
            in_place_of_a_gpu(|| through(&given, Kind::Float, sum_and_norm)),
            through(&given, Kind::Float, sum_and_norm),
        ];
        assert_eq!(got, expected);
    }
}
