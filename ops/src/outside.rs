//! What is computed outside of autograd, as it sees it: a function whose backward is given. Knows no function.

use crate::OpsError;
use crate::shim::checked;
use std::ffi::{CString, c_char, c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use tch::{Kind, Tensor};
use torch_sys::C_tensor;

type Call = unsafe extern "C" fn(
    *mut c_void,
    *const *const C_tensor,
    i64,
    *mut *mut C_tensor,
    i64,
    *mut c_void,
) -> c_int;

unsafe extern "C" {
    fn phx_say(trouble: *mut c_void, text: *const c_char);
    fn phx_differentiable(
        inputs: *const *const C_tensor,
        n_inputs: i64,
        outputs: *const *const C_tensor,
        n_outputs: i64,
        backward: Call,
        context: *mut c_void,
        drop: unsafe extern "C" fn(*mut c_void),
    ) -> c_int;
}

/// The gradients of the inputs, given those that arrive at the outputs; none where there is none. What it holds
/// has no graph: else nothing of it would ever be let go of. It may run on another thread.
pub(crate) type Backward = Box<dyn Fn(&[Option<Tensor>]) -> Result<Vec<Option<Tensor>>, OpsError> + Send>;

/// No gradients of so many inputs.
pub(crate) fn none(inputs: usize) -> Vec<Option<Tensor>> {
    (0..inputs).map(|_| None).collect()
}

/// Makes `outputs`, new tensors that were computed without a graph, functions of `inputs`, if anybody
/// differentiates. `backward` is let go of once it has run.
pub(crate) fn differentiable(
    inputs: &[&Tensor],
    outputs: &[&Tensor],
    backward: Backward,
) -> Result<(), OpsError> {
    let pointers = |of: &[&Tensor]| -> Vec<*const C_tensor> { of.iter().map(|x| x.as_ptr()).collect() };
    let (inputs, outputs) = (pointers(inputs), pointers(outputs));
    let context = Box::into_raw(Box::new(backward)).cast();
    // SAFETY: the tensors outlive the call, and the shim keeps handles of its own. The context is a
    // `Box<Backward>`, whose ownership passes to the shim: it gives it to `call`, one call at a time, and in the
    // end once to `let_go`, both of which take it for that.
    checked(unsafe {
        phx_differentiable(
            inputs.as_ptr(),
            inputs.len() as i64,
            outputs.as_ptr(),
            outputs.len() as i64,
            call,
            context,
            let_go,
        )
    })
}

/// # Safety
/// As `differentiable` has the shim call it: a live `Box<Backward>`, `n_arrived` pointers to tensors or null, and
/// room for `n_grads`.
unsafe extern "C" fn call(
    context: *mut c_void,
    arrived: *const *const C_tensor,
    n_arrived: i64,
    grads: *mut *mut C_tensor,
    n_grads: i64,
    trouble: *mut c_void,
) -> c_int {
    let run = || -> Result<(), String> {
        // SAFETY: the caller's; the tensors live through the call, and what is made here are handles of their own.
        let (backward, arrived, grads) = unsafe {
            (
                &*context.cast::<Backward>(),
                std::slice::from_raw_parts(arrived, n_arrived as usize),
                std::slice::from_raw_parts_mut(grads, n_grads as usize),
            )
        };
        let handle = |pointer: &*const C_tensor| {
            // SAFETY: as above.
            (!pointer.is_null()).then(|| unsafe { Tensor::clone_from_ptr(pointer.cast_mut()) })
        };
        let arrived: Vec<Option<Tensor>> = arrived.iter().map(handle).collect();
        let made = backward(&arrived).map_err(|error| error.to_string())?;
        assert_eq!(made.len(), grads.len(), "a gradient for each input");
        for (place, grad) in grads.iter_mut().zip(made) {
            if let Some(mut grad) = grad {
                *place = grad.as_mut_ptr();
                std::mem::forget(grad); // the shim deletes it
            }
        }
        Ok(())
    };
    let panicked = || Err("backward panicked".to_owned()); // what it said is in the log
    let Err(why) = catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|_| panicked()) else { return 0 };
    let why = CString::new(why.replace('\0', " ")).unwrap_or_default();
    // SAFETY: the shim's own string, and a text that ends in a NUL, which it copies.
    unsafe { phx_say(trouble, why.as_ptr()) };
    1
}

/// # Safety
/// A `Box<Backward>` that nobody uses afterwards.
unsafe extern "C" fn let_go(context: *mut c_void) {
    // SAFETY: the caller's.
    drop(unsafe { Box::from_raw(context.cast::<Backward>()) });
}

/// Where a parameter's gradient is added up, fp32: in its own, if that is fp32, and autograd has nothing left to
/// do; else in a tensor that autograd is given.
pub(crate) struct ParameterGrad {
    pub(crate) sums: Tensor,
    /// In which autograd is given it.
    kind: Option<Kind>,
}

impl ParameterGrad {
    pub(crate) fn of(parameter: &Tensor) -> Result<ParameterGrad, OpsError> {
        let own = parameter.f_grad()?;
        if parameter.requires_grad() && own.defined() && own.kind() == Kind::Float && own.is_contiguous() {
            return Ok(ParameterGrad { sums: own, kind: None });
        }
        let sums = Tensor::f_zeros(parameter.size(), (Kind::Float, parameter.device()))?;
        Ok(ParameterGrad { sums, kind: Some(parameter.kind()) })
    }

    /// Adds that of a layer's weight, `[N, K]`: its outputs' gradient, rows `[M, N]`, turned over, times its inputs,
    /// `[M, K]`.
    pub(crate) fn add_product(&self, grad: &Tensor, rows: &Tensor) -> Result<(), OpsError> {
        let (mut sums, grad) = (self.sums.shallow_clone(), grad.f_tr()?);
        let _ = match rows.kind() {
            Kind::Float => sums.f_addmm_(&grad, rows)?,
            _ => sums.f_add_(&grad.f_mm(rows)?)?,
        };
        Ok(())
    }

    /// Adds that of a layer's bias, `[N]`, given its outputs' gradient, and returns what autograd is given.
    pub(crate) fn with_columns(self, grad: &Tensor) -> Result<Option<Tensor>, OpsError> {
        let _ = self.sums.shallow_clone().f_add_(&grad.f_sum_dim_intlist(
            [0i64].as_slice(),
            false,
            Kind::Float,
        )?)?;
        self.rest()
    }

    /// What autograd is given.
    pub(crate) fn rest(self) -> Result<Option<Tensor>, OpsError> {
        Ok(self.kind.map(|kind| self.sums.f_to_kind(kind)).transpose()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use tch::Device;

    fn leaf() -> Tensor {
        Tensor::from_slice(&[1f32, 2.0]).set_requires_grad(true)
    }

    /// `x` times three; how often `held` is held tells whether the function is.
    fn tripled(x: &Tensor, held: &Arc<()>) -> Tensor {
        let (out, held) = (tch::no_grad(|| x * 3.0), Arc::clone(held));
        let backward: Backward = Box::new(move |arrived| {
            let _ = &held;
            Ok(vec![arrived[0].as_ref().map(|grad| grad * 3.0)])
        });
        differentiable(&[x], &[&out], backward).unwrap();
        out
    }

    #[test]
    fn a_gradient_goes_through_and_what_was_held_for_it_is_let_go_of() {
        let (x, held) = (leaf(), Arc::new(()));
        let out = tripled(&tripled(&x, &held), &held);
        assert_eq!(Arc::strong_count(&held), 3);
        crate::backward(&out, &out.ones_like()).unwrap();
        assert_eq!(Vec::<f32>::try_from(x.grad()).unwrap(), [9.0, 9.0]);
        assert_eq!(Arc::strong_count(&held), 1, "before the output goes");
        let error = crate::backward(&out, &out.ones_like()).unwrap_err().to_string();
        assert!(error.contains("a second time"), "{error}");
        drop(tripled(&x, &held));
        assert_eq!(Arc::strong_count(&held), 1, "nobody differentiated");
    }

    #[test]
    fn nothing_is_held_where_nobody_differentiates() {
        let (x, held) = (leaf(), Arc::new(()));
        let outs = [tch::no_grad(|| tripled(&x, &held)), tripled(&x.detach(), &held)];
        assert_eq!(Arc::strong_count(&held), 1);
        assert!(outs.iter().all(|out| !out.requires_grad()));
    }

    #[test]
    fn an_output_at_which_nothing_arrives_has_no_gradient() {
        let x = leaf();
        let outs = tch::no_grad(|| [&x * 2.0, &x * 5.0]);
        let backward: Backward = Box::new(|arrived| {
            assert!(arrived[0].is_none());
            Ok(vec![arrived[1].as_ref().map(|grad| grad * 5.0)])
        });
        differentiable(&[&x], &[&outs[0], &outs[1]], backward).unwrap();
        crate::backward(&outs[1], &outs[1].ones_like()).unwrap();
        assert_eq!(Vec::<f32>::try_from(x.grad()).unwrap(), [5.0, 5.0]);
    }

    #[test]
    fn what_fails_in_backward_is_said_by_it() {
        let x = leaf();
        let out = tch::no_grad(|| &x * 1.0);
        let backward: Backward = Box::new(|_| Err(OpsError::Torch("the kernel tripped".into())));
        differentiable(&[&x], &[&out], backward).unwrap();
        let error = crate::backward(&out, &out.ones_like()).unwrap_err().to_string();
        assert!(error.contains("the kernel tripped"), "{error}");
    }

    #[test]
    fn a_parameters_own_fp32_gradient_is_added_to_and_any_other_is_made() {
        let mut parameter = Tensor::zeros([2], (Kind::BFloat16, Device::Cpu)).set_requires_grad(true);
        let made = ParameterGrad::of(&parameter).unwrap().rest().unwrap().unwrap();
        assert_eq!((made.kind(), made.size()), (Kind::BFloat16, vec![2]));
        let own = Tensor::from_slice(&[1f32, 1.0]);
        crate::shim::set_grad(&mut parameter, &own).unwrap();
        let added = ParameterGrad::of(&parameter).unwrap();
        let _ = added.sums.shallow_clone().g_add_scalar_(2.0);
        assert!(added.rest().unwrap().is_none());
        assert_eq!(Vec::<f32>::try_from(own).unwrap(), [3.0, 3.0]);
    }
}
