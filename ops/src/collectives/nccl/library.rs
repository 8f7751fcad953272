//! What is asked of NCCL and of CUDA's streams for one rank, one call after the other: the seam at which tests
//! put a group of threads in their place. Knows which calls there are; not what for.

use super::super::CommError;
use super::api::Api;
use crate::cuda_stream::{CudaEvent, CudaStream, set_device};
use cudarc::nccl::sys::{ncclComm_t, ncclDataType_t, ncclRedOp_t, ncclResult_t};
use std::ffi::{c_int, c_void};
use tch::{Device, Kind, Tensor};

/// Elements of a flat buffer, by their address.
#[derive(Debug, Clone, Copy)]
pub(super) struct Span {
    pub(super) data: *mut c_void,
    pub(super) numel: usize,
    /// fp32 or bf16.
    pub(super) kind: Kind,
}

impl Span {
    /// All of a flat tensor.
    pub(super) fn of(flat: &Tensor) -> Span {
        Span { data: flat.data_ptr(), numel: flat.numel(), kind: flat.kind() }
    }

    /// The elements `range` of it.
    pub(super) fn part(self, range: &std::ops::Range<usize>) -> Span {
        let data = self.data.cast::<u8>().wrapping_add(range.start * self.width()).cast();
        Span { data, numel: range.len(), kind: self.kind }
    }

    /// Bytes of an element.
    pub(super) fn width(self) -> usize {
        super::super::flat::width(self.kind)
    }
}

/// A call of NCCL's, on the group's stream.
#[derive(Debug, Clone, Copy)]
pub(super) enum Call {
    /// The sum of all ranks' spans to all, in place.
    AllReduce(Span),
    /// The root's span to all, in place.
    Broadcast { span: Span, root: usize },
    /// The sum of all ranks' spans to the root, in place.
    Reduce { span: Span, root: usize },
    /// Of the sum of all ranks' `from`, in as many parts as ranks, this rank's to `to`.
    ReduceScatter { from: Span, to: Span },
    /// All ranks' `from`, one after the other, to `to`.
    AllGather { from: Span, to: Span },
    /// A span to a rank that receives it.
    Send { span: Span, to: usize },
    /// What a rank sends.
    Receive { span: Span, from: usize },
}

impl Call {
    /// Of the numbers that travel.
    fn kind(self) -> Kind {
        match self {
            Call::AllReduce(span)
            | Call::Broadcast { span, .. }
            | Call::Reduce { span, .. }
            | Call::ReduceScatter { to: span, .. }
            | Call::AllGather { from: span, .. }
            | Call::Send { span, .. }
            | Call::Receive { span, .. } => span.kind,
        }
    }
}

/// A point of the stream's work.
pub(super) trait Event: Send {
    /// libtorch's stream goes on after it.
    fn block_current(&self) -> Result<(), CommError>;

    /// Returns when it has passed.
    fn synchronize(&self) -> Result<(), CommError>;
}

/// NCCL and the stream that it works on, for one rank.
pub(super) trait Library: Send + Sync {
    /// Where buffers are.
    fn device(&self) -> Device;

    /// The stream goes on after all that libtorch's has been given so far.
    fn follow(&self) -> Result<(), CommError>;

    /// What libtorch is given in `work` it gives to the stream.
    fn within(&self, work: &mut dyn FnMut() -> Result<(), CommError>) -> Result<(), CommError>;

    /// Calls that run together where there are several.
    fn call(&self, calls: &[Call]) -> Result<(), CommError>;

    /// An event after all that the stream was given.
    fn event(&self) -> Result<Box<dyn Event>, CommError>;

    /// Whether NCCL has failed since, on this rank or for want of another.
    fn healthy(&self) -> Result<(), CommError>;

    /// Leaves the group; nothing is under way, and nothing is called after it.
    fn destroy(&self) -> Result<(), CommError>;
}

/// NCCL itself.
pub(super) struct Joined {
    pub(super) api: Api,
    pub(super) raw: ncclComm_t,
    pub(super) stream: CudaStream,
    pub(super) gpu: usize,
}

// SAFETY: NCCL's communicator may be used by one thread after another; that it is one at a time is the
// contract of `Communicator`, and asking for asynchronous errors is allowed beside it.
unsafe impl Send for Joined {}
// SAFETY: as above.
unsafe impl Sync for Joined {}

impl Joined {
    fn one(&self, call: Call) -> Result<(), CommError> {
        let (api, raw, stream, sum) =
            (&self.api, self.raw, self.stream.native().cast(), ncclRedOp_t::ncclSum);
        let kind = match call.kind() {
            Kind::BFloat16 => ncclDataType_t::ncclBfloat16,
            _ => ncclDataType_t::ncclFloat32,
        };
        // SAFETY: spans are elements of buffers on this rank's GPU, which live and are left alone until the
        // stream has come past the call: `Flight` holds the caller's, and libtorch gives what was allocated
        // `within` the stream to nothing but later work of it. Where a buffer is both read and written it is in
        // place, in the way that NCCL allows. Peers and roots are ranks of the group.
        let (name, result) = unsafe {
            match call {
                Call::AllReduce(Span { data, numel, .. }) => {
                    ("ncclAllReduce", (api.all_reduce)(data, data, numel, kind, sum, raw, stream))
                }
                Call::Broadcast { span: Span { data, numel, .. }, root } => {
                    let root = root as c_int;
                    ("ncclBroadcast", (api.broadcast)(data, data, numel, kind, root, raw, stream))
                }
                Call::Reduce { span: Span { data, numel, .. }, root } => {
                    let root = root as c_int;
                    ("ncclReduce", (api.reduce)(data, data, numel, kind, sum, root, raw, stream))
                }
                Call::ReduceScatter { from, to } => {
                    let (from, Span { data, numel, .. }) = (from.data, to);
                    ("ncclReduceScatter", (api.reduce_scatter)(from, data, numel, kind, sum, raw, stream))
                }
                Call::AllGather { from: Span { data, numel, .. }, to } => {
                    ("ncclAllGather", (api.all_gather)(data, to.data, numel, kind, raw, stream))
                }
                Call::Send { span: Span { data, numel, .. }, to } => {
                    ("ncclSend", (api.send)(data, numel, kind, to as c_int, raw, stream))
                }
                Call::Receive { span: Span { data, numel, .. }, from } => {
                    ("ncclRecv", (api.receive)(data, numel, kind, from as c_int, raw, stream))
                }
            }
        };
        api.checked(name, result)
    }
}

impl Library for Joined {
    fn device(&self) -> Device {
        Device::Cuda(self.gpu)
    }

    fn follow(&self) -> Result<(), CommError> {
        set_device(self.gpu)?;
        Ok(self.stream.follow_current()?)
    }

    fn within(&self, work: &mut dyn FnMut() -> Result<(), CommError>) -> Result<(), CommError> {
        self.stream.within(work)
    }

    fn call(&self, calls: &[Call]) -> Result<(), CommError> {
        if let [only] = calls {
            return self.one(*only);
        }
        // SAFETY: takes nothing; ended below whatever happens in between.
        self.api.checked("ncclGroupStart", unsafe { (self.api.group_start)() })?;
        let outcome = calls.iter().try_for_each(|call| self.one(*call));
        // SAFETY: ends what was started above.
        let ended = self.api.checked("ncclGroupEnd", unsafe { (self.api.group_end)() });
        outcome.and(ended)
    }

    fn event(&self) -> Result<Box<dyn Event>, CommError> {
        Ok(Box::new(self.stream.event()?))
    }

    fn healthy(&self) -> Result<(), CommError> {
        let mut state = ncclResult_t::ncclSuccess;
        // SAFETY: the communicator lives as long as this value; one number is written.
        let asked = unsafe { (self.api.async_error)(self.raw, &mut state) };
        self.api.checked("ncclCommGetAsyncError", asked)?;
        self.api.checked("a sum over NCCL", state)
    }

    fn destroy(&self) -> Result<(), CommError> {
        // SAFETY: nothing is under way and nobody uses the group after this, as the caller has seen to:
        // whatever still holds it only asks for nothing.
        self.api.checked("ncclCommDestroy", unsafe { (self.api.destroy)(self.raw) })
    }
}

impl Event for CudaEvent {
    fn block_current(&self) -> Result<(), CommError> {
        Ok(CudaEvent::block_current(self)?)
    }

    fn synchronize(&self) -> Result<(), CommError> {
        Ok(CudaEvent::synchronize(self)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_of_a_buffer_has_its_address() {
        let span = Span { data: 64 as *mut c_void, numel: 10, kind: Kind::BFloat16 };
        let part = span.part(&(3..7));
        assert_eq!((part.data as usize, part.numel), (70, 4));
    }
}
