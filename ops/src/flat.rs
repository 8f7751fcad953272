//! Flat buffers: a segment's tensors as views into one buffer, and what is in them at first.
//! Knows nothing of what a segment computes.

use crate::{OpsError, shim};
use configs::{Init, Philox, SegmentSpec, TensorSpec};
use std::ops::Range;
use std::sync::Arc;
use tch::{Device, Kind, Tensor};

/// A segment's whole weights in the precision that computes, as leaves that require a gradient: views
/// of one flat buffer, so that they see its updates and the whole can be gathered in one message.
#[derive(Debug)]
pub struct Weights {
    spec: Arc<SegmentSpec>,
    flat: Tensor,
    tensors: Vec<Tensor>,
}

impl Weights {
    /// Views of `flat`, `[numel]`, with the layout of `spec`.
    ///
    /// # Errors
    /// A buffer of another length.
    pub fn over(spec: &Arc<SegmentSpec>, flat: Tensor) -> Result<Weights, OpsError> {
        let mut tensors = Vec::with_capacity(spec.tensors.len());
        for tensor in &spec.tensors {
            tensors.push(view(&flat, tensor)?.f_detach()?.f_set_requires_grad(true)?);
        }
        Ok(Weights { spec: Arc::clone(spec), flat, tensors })
    }

    /// Lets go of the gradients.
    ///
    /// # Errors
    /// What libtorch says.
    pub fn forget_gradients(&self) -> Result<(), OpsError> {
        let undefined = Tensor::new();
        self.tensors.iter().try_for_each(|leaf| shim::set_grad(&mut leaf.shallow_clone(), &undefined))
    }

    /// The flat buffer, `[numel]`.
    pub fn flat(&self) -> &Tensor {
        &self.flat
    }

    /// The tensor that is called `name` within its segment, such as `mlp.c_fc.weight`.
    ///
    /// # Panics
    /// There is none: layouts are data, but what computes on them is not.
    pub fn tensor(&self, name: &str) -> &Tensor {
        self.get(name).unwrap_or_else(|| panic!("segment {} has no tensor {name}", self.spec.name))
    }

    /// The tensor of that name, if the segment has one.
    pub fn get(&self, name: &str) -> Option<&Tensor> {
        let segment = self.spec.name.as_str();
        let within =
            |full: &str| full.strip_prefix(segment).and_then(|rest| rest.strip_prefix('.')) == Some(name);
        let i = self.spec.tensors.iter().position(|tensor| within(&tensor.name))?;
        Some(&self.tensors[i])
    }

    /// Makes views of `grad`, `[numel]` of the same kind, the gradients of the tensors: the next
    /// backward adds to them in place.
    ///
    /// # Errors
    /// A buffer of another length.
    pub fn accumulate_into(&self, grad: &Tensor) -> Result<(), OpsError> {
        for (leaf, spec) in self.tensors.iter().zip(&self.spec.tensors) {
            shim::set_grad(&mut leaf.shallow_clone(), &view(grad, spec)?)?;
        }
        Ok(())
    }
}

/// The part of a flat buffer that is a tensor, in its shape.
///
/// # Errors
/// A buffer that is too short.
pub fn view(flat: &Tensor, tensor: &TensorSpec) -> Result<Tensor, OpsError> {
    Ok(flat.f_narrow(0, tensor.offset as i64, tensor.numel() as i64)?.f_view(tensor.shape.as_slice())?)
}

/// The initial values of elements `range` of a segment, fp32 in host memory: each a pure function of
/// the seed, its tensor's name and its place in it.
pub fn initial_values(spec: &SegmentSpec, seed: u64, range: Range<usize>) -> Tensor {
    let mut values = vec![0f32; range.len()];
    for tensor in &spec.tensors {
        let (start, end) = (tensor.offset, tensor.offset + tensor.numel());
        let part = start.max(range.start)..end.min(range.end);
        if part.is_empty() {
            continue;
        }
        let out = &mut values[part.start - range.start..part.end - range.start];
        match tensor.init {
            Init::Zeros => {}
            Init::Ones => out.fill(1.0),
            Init::Normal(std) => {
                Philox::new(seed).normals(stream(&tensor.name), part.start - start, out);
                out.iter_mut().for_each(|value| *value *= std as f32);
            }
        }
    }
    Tensor::from_slice(&values)
}

/// The stream of random numbers of a tensor: FNV-1a of its name, so that adding a layer moves no other.
fn stream(name: &str) -> u32 {
    name.bytes().fold(0x811C_9DC5, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}

/// The elements of a CPU fp32 contiguous tensor.
pub(crate) fn slice<'a>(op: &'static str, tensor: &'a Tensor) -> Result<&'a [f32], OpsError> {
    check_flat(op, tensor)?;
    // SAFETY: the tensor is contiguous fp32 in host memory (checked), so its pointer addresses numel
    // elements, alive as long as the borrow of the tensor. Nobody writes meanwhile: the buffers of a
    // segment are changed only by this crate's passes and by backward, on the thread that calls both.
    Ok(unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast::<f32>(), tensor.numel()) })
}

/// The elements of a CPU fp32 contiguous tensor, to be changed.
pub(crate) fn slice_mut<'a>(op: &'static str, tensor: &'a mut Tensor) -> Result<&'a mut [f32], OpsError> {
    check_flat(op, tensor)?;
    // SAFETY: as in `slice`. The exclusive borrow does not stop another handle from sharing the storage;
    // callers pass buffers of which no other view is read or written during the call.
    Ok(unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr().cast::<f32>(), tensor.numel()) })
}

/// The bits of the elements of a CPU bf16 contiguous tensor, to be changed.
pub(crate) fn halves_mut<'a>(op: &'static str, tensor: &'a mut Tensor) -> Result<&'a mut [u16], OpsError> {
    check(op, tensor, Kind::BFloat16, "a contiguous bf16 tensor on the CPU")?;
    // SAFETY: as in `slice_mut`; any 16 bits are a bf16 number.
    Ok(unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr().cast::<u16>(), tensor.numel()) })
}

fn check_flat(op: &'static str, tensor: &Tensor) -> Result<(), OpsError> {
    check(op, tensor, Kind::Float, "a contiguous fp32 tensor on the CPU")
}

fn check(op: &'static str, tensor: &Tensor, kind: Kind, expected: &'static str) -> Result<(), OpsError> {
    if tensor.kind() == kind && tensor.device() == Device::Cpu && tensor.is_contiguous() {
        return Ok(());
    }
    let got = format!("{:?} {:?} on {:?}", tensor.kind(), tensor.size(), tensor.device());
    Err(OpsError::Argument { op, expected, got })
}

#[cfg(test)]
mod tests {
    use super::*;
    use configs::segments;

    fn block() -> Arc<SegmentSpec> {
        Arc::new(segments(&crate::tests::small_model())[2].clone())
    }

    fn zeros(spec: &SegmentSpec) -> Tensor {
        Tensor::zeros([spec.numel as i64], (Kind::Float, Device::Cpu))
    }

    #[test]
    fn backward_accumulates_into_the_flat_gradient() {
        let spec = block();
        let (weights, grad) = (Weights::over(&spec, zeros(&spec)).unwrap(), zeros(&spec));
        weights.accumulate_into(&grad).unwrap();
        let x = Tensor::randn([3, 8], (Kind::Float, Device::Cpu));
        let dy = Tensor::randn([3, 24], (Kind::Float, Device::Cpu));
        for _ in 0..2 {
            let y = x.linear::<&Tensor>(weights.tensor("attn.c_attn.weight"), None);
            crate::backward(&y, &dy).unwrap();
        }
        let flat = view(&grad, &spec.tensors[2]).unwrap();
        let expected = dy.transpose(0, 1).matmul(&x) * 2.0;
        assert!((flat - expected).abs().max().double_value(&[]) < 1e-4);
    }

    #[test]
    fn tensors_see_updates_of_the_flat_weights() {
        let spec = block();
        let weights = Weights::over(&spec, zeros(&spec)).unwrap();
        let values: Vec<f32> = (0..spec.numel).map(|i| i as f32).collect();
        weights.flat().shallow_clone().copy_(&Tensor::from_slice(&values));
        let seen = weights.tensor("attn.c_attn.bias").double_value(&[5]);
        assert_eq!(seen as usize, spec.tensors[3].offset + 5);
    }

    #[test]
    fn initial_values_are_a_function_of_seed_name_and_place() {
        let spec = block();
        let whole = initial_values(&spec, 1, 0..spec.numel);
        assert_eq!(whole, initial_values(&spec, 1, 0..spec.numel));
        assert_ne!(whole, initial_values(&spec, 2, 0..spec.numel));
        for (start, end) in [(0, 100), (7, 93), (95, spec.numel - 3), (spec.numel, spec.numel)] {
            let part = initial_values(&spec, 1, start..end);
            assert_eq!(part, whole.narrow(0, start as i64, (end - start) as i64), "{start}..{end}");
        }
        let c_fc = view(&whole, &spec.tensors[8]).unwrap();
        assert!((c_fc.std(true).double_value(&[]) - 0.02).abs() < 0.003);
    }
}
