//! Flat buffers: one parameter buffer and one gradient buffer per segment, tensors as views into them.
//! Knows nothing of what a segment computes.

use crate::{OpsError, shim};
use configs::{Init, Philox, SegmentSpec};
use tch::{Device, Kind, Tensor};

/// A segment's parameters and gradients, fp32, on one device.
///
/// The tensors are leaves that require a gradient; their gradients are views of the gradient buffer,
/// so that backward accumulates there and the whole leaves in one message.
#[derive(Debug)]
pub struct FlatSegment {
    spec: SegmentSpec,
    param: Tensor,
    grad: Tensor,
    tensors: Vec<Tensor>,
    grads: Vec<Tensor>,
}

impl FlatSegment {
    /// Buffers of zeros with the layout of `spec`.
    ///
    /// # Errors
    /// What libtorch says, such as out of memory.
    pub fn zeros(spec: SegmentSpec, device: Device) -> Result<FlatSegment, OpsError> {
        let options = (Kind::Float, device);
        let param = Tensor::f_zeros([spec.numel as i64], options)?;
        let grad = Tensor::f_zeros([spec.numel as i64], options)?;
        let (mut tensors, mut grads) = (Vec::new(), Vec::new());
        for tensor in &spec.tensors {
            let view = |flat: &Tensor| -> Result<Tensor, tch::TchError> {
                flat.f_narrow(0, tensor.offset as i64, tensor.numel() as i64)?.f_view(tensor.shape.as_slice())
            };
            let mut leaf = view(&param)?.f_detach()?.f_set_requires_grad(true)?;
            let leaf_grad = view(&grad)?;
            shim::set_grad(&mut leaf, &leaf_grad)?;
            tensors.push(leaf);
            grads.push(leaf_grad);
        }
        Ok(FlatSegment { spec, param, grad, tensors, grads })
    }

    /// Fills the parameters with their initial values: a pure function of the seed, the tensor's name
    /// and the element.
    pub fn init(&mut self, seed: u64) {
        for tensor in &self.spec.tensors {
            let mut view = self.param.narrow(0, tensor.offset as i64, tensor.numel() as i64);
            match tensor.init {
                Init::Zeros => drop(view.zero_()),
                Init::Ones => drop(view.fill_(1.0)),
                Init::Normal(std) => {
                    let mut normals = vec![0f32; tensor.numel()];
                    Philox::new(seed).normals(stream(&tensor.name), &mut normals);
                    let normals = Tensor::from_slice(&normals) * std;
                    view.copy_(&normals);
                }
            }
        }
    }

    /// Names, shapes and offsets.
    pub fn spec(&self) -> &SegmentSpec {
        &self.spec
    }

    /// The flat parameter buffer, `[numel]` fp32.
    pub fn param(&self) -> &Tensor {
        &self.param
    }

    /// The flat gradient buffer, `[numel]` fp32.
    pub fn grad(&self) -> &Tensor {
        &self.grad
    }

    /// The i-th tensor of the layout, a leaf view of the parameters.
    pub fn tensor(&self, i: usize) -> &Tensor {
        &self.tensors[i]
    }

    /// The gradient of the i-th tensor, a view of the gradient buffer.
    pub fn tensor_grad(&self, i: usize) -> &Tensor {
        &self.grads[i]
    }

    /// Sets the gradient buffer to zero.
    pub fn zero_grad(&mut self) {
        let _ = self.grad.zero_();
    }

    /// Copies the parameters from `values`, `[numel]`.
    pub fn set_param(&mut self, values: &Tensor) {
        self.param.copy_(values);
    }
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

fn check_flat(op: &'static str, tensor: &Tensor) -> Result<(), OpsError> {
    if tensor.kind() == Kind::Float && tensor.device() == Device::Cpu && tensor.is_contiguous() {
        return Ok(());
    }
    let got = format!("{:?} {:?} on {:?}", tensor.kind(), tensor.size(), tensor.device());
    Err(OpsError::Argument { op, expected: "a contiguous fp32 tensor on the CPU", got })
}

#[cfg(test)]
mod tests {
    use super::*;
    use configs::{ModelConfig, segments};

    fn block() -> FlatSegment {
        let model = ModelConfig {
            n_layer: 1,
            n_head: 1,
            n_embd: 8,
            seq_len: 4,
            vocab_size: 10,
            ..ModelConfig::default()
        };
        FlatSegment::zeros(segments(&model)[2].clone(), Device::Cpu).unwrap()
    }

    #[test]
    fn backward_accumulates_into_the_flat_gradient() {
        let segment = block();
        let weight = segment.tensor(2); // c_attn.weight [24, 8]
        let x = Tensor::randn([3, 8], (Kind::Float, Device::Cpu));
        let dy = Tensor::randn([3, 24], (Kind::Float, Device::Cpu));
        for _ in 0..2 {
            crate::backward(&x.linear::<&Tensor>(weight, None), &dy).unwrap();
        }
        let offset = segment.spec().tensors[2].offset as i64;
        let flat = segment.grad().narrow(0, offset, 24 * 8).view([24, 8]);
        let expected = dy.transpose(0, 1).matmul(&x) * 2.0;
        assert!((flat - expected).abs().max().double_value(&[]) < 1e-4);
    }

    #[test]
    fn tensors_see_updates_of_the_flat_parameters() {
        let mut segment = block();
        let values: Vec<f32> = (0..segment.spec().numel).map(|i| i as f32).collect();
        segment.set_param(&Tensor::from_slice(&values));
        let offset = segment.spec().tensors[3].offset;
        assert_eq!(segment.tensor(3).double_value(&[5]) as usize, offset + 5);
    }

    #[test]
    fn initial_values_are_a_function_of_seed_and_name() {
        let (mut a, mut b) = (block(), block());
        a.init(1);
        b.init(1);
        assert_eq!(a.param(), b.param());
        b.init(2);
        assert_ne!(a.param(), b.param());
        let c_fc = a.tensor(8);
        assert!((c_fc.std(true).double_value(&[]) - 0.02).abs() < 0.003);
    }
}
