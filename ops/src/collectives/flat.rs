//! Which tensors and arguments a collective takes: checked before anything is sent.

use super::{CommError, Operation};
use tch::{Device, Kind, Tensor};

/// A flat fp32 buffer in host memory, kept alive by a handle of its own.
#[derive(Debug)]
pub(super) struct Flat {
    /// Keeps the storage alive while the operation is in flight.
    _owner: Tensor,
    data: *mut f32,
    numel: usize,
}

// SAFETY: the pointer is to the storage that `_owner` keeps alive, and a tensor's storage may be used
// and released by any thread. Who may touch it when is the contract of `Communicator::start`.
unsafe impl Send for Flat {}

impl Flat {
    /// The buffer of a tensor, if `operation` can work on it among `world_size` ranks.
    pub(super) fn new(operation: Operation, buffer: &Tensor, world_size: usize) -> Result<Flat, CommError> {
        let flat = buffer.defined()
            && buffer.kind() == Kind::Float
            && buffer.device() == Device::Cpu
            && buffer.dim() == 1
            && buffer.is_contiguous();
        if !flat {
            return Err(CommError::Buffer { operation: operation.name(), got: describe(buffer) });
        }
        operation.check(buffer.numel(), world_size)?;
        let owner = buffer.shallow_clone();
        Ok(Flat { data: owner.data_ptr().cast(), numel: owner.numel(), _owner: owner })
    }

    /// Elements.
    pub(super) fn numel(&self) -> usize {
        self.numel
    }

    /// The first element; may be null if there is none.
    pub(super) fn data(&self) -> *mut f32 {
        self.data
    }
}

fn describe(tensor: &Tensor) -> String {
    if !tensor.defined() {
        return "an undefined tensor".to_owned();
    }
    let layout = if tensor.is_contiguous() { "" } else { ", not contiguous" };
    format!("{:?} {:?} on {:?}{layout}", tensor.kind(), tensor.size(), tensor.device())
}

impl Operation {
    /// MPI's word for it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Operation::AllReduce => "all_reduce",
            Operation::ReduceScatter { .. } => "reduce_scatter",
            Operation::AllGather { .. } => "all_gather",
            Operation::Broadcast { .. } => "broadcast",
        }
    }

    fn check(self, numel: usize, world_size: usize) -> Result<(), CommError> {
        match self {
            Operation::AllReduce => Ok(()),
            Operation::Broadcast { root } => check_root(self.name(), root, world_size),
            Operation::ReduceScatter { shard_numel } | Operation::AllGather { shard_numel } => {
                if shard_numel.saturating_mul(world_size) >= numel {
                    return Ok(());
                }
                let least = numel.div_ceil(world_size);
                let what = format!(
                    "shards of {shard_numel} elements on {world_size} ranks do not cover {numel} elements\n\
                     hint: shards of at least {least} do"
                );
                Err(CommError::Argument { operation: self.name(), what })
            }
        }
    }
}

/// Refuses a root that is no rank.
pub(super) fn check_root(operation: &'static str, root: usize, world_size: usize) -> Result<(), CommError> {
    if root < world_size {
        return Ok(());
    }
    let what = format!("root {root} is no rank; there are {world_size}");
    Err(CommError::Argument { operation, what })
}
