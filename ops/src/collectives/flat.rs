//! Which tensors a collective takes: checked before anything is sent.

use super::{CommError, Operation};
use tch::{Device, Kind, Tensor};

/// A flat fp32 or bf16 buffer in host memory, kept alive by a handle of its own.
#[derive(Debug)]
pub(super) struct Flat {
    /// Keeps the storage alive while the operation is in flight.
    owner: Tensor,
    numel: usize,
    kind: Kind,
}

// SAFETY: a tensor's storage may be used and released by any thread. Who may touch it when is the
// contract of `Communicator::start`.
unsafe impl Send for Flat {}

impl Flat {
    /// The buffer of a tensor, if `operation` can work on it among `world_size` ranks.
    pub(super) fn new(operation: Operation, buffer: &Tensor, world_size: usize) -> Result<Flat, CommError> {
        check(operation, buffer, world_size, Device::Cpu)?;
        let owner = buffer.shallow_clone();
        Ok(Flat { numel: owner.numel(), kind: owner.kind(), owner })
    }

    /// Elements.
    pub(super) fn numel(&self) -> usize {
        self.numel
    }

    /// The first byte; may be null if there is none.
    pub(super) fn data(&self) -> *mut u8 {
        self.owner.data_ptr().cast()
    }

    /// Its dtype.
    pub(super) fn kind(&self) -> Kind {
        self.kind
    }
}

/// Bytes of an element of a buffer.
pub(super) fn width(kind: Kind) -> usize {
    if kind == Kind::BFloat16 { 2 } else { 4 }
}

/// Whether a tensor is a flat buffer on `device` that `operation` can work on among `world_size` ranks.
pub(super) fn check(
    operation: Operation,
    buffer: &Tensor,
    world_size: usize,
    device: Device,
) -> Result<(), CommError> {
    let flat = buffer.defined()
        && (buffer.kind() == Kind::Float || buffer.kind() == Kind::BFloat16 && !operation.adds())
        && buffer.device() == device
        && buffer.dim() == 1
        && buffer.is_contiguous();
    if !flat {
        let dtypes = if operation.adds() { "fp32" } else { "fp32 or bf16" };
        let (operation, got) = (operation.name(), describe(buffer));
        return Err(CommError::Buffer { operation, dtypes, device, got });
    }
    operation.check(buffer.numel(), world_size)
}

/// A buffer of zeros in memory of its own.
pub(super) fn plain_buffer(numel: usize, kind: Kind, device: Device) -> Result<Tensor, CommError> {
    check_kind(kind)?;
    Ok(Tensor::f_zeros([numel as i64], (kind, device))?)
}

/// Refuses a dtype that no collective takes.
pub(super) fn check_kind(kind: Kind) -> Result<(), CommError> {
    if matches!(kind, Kind::Float | Kind::BFloat16) { Ok(()) } else { Err(CommError::Kind { got: kind }) }
}

fn describe(tensor: &Tensor) -> String {
    if !tensor.defined() {
        return "an undefined tensor".to_owned();
    }
    let layout = if tensor.is_contiguous() { "" } else { ", not contiguous" };
    format!("{:?} {:?} on {:?}{layout}", tensor.kind(), tensor.size(), tensor.device())
}
