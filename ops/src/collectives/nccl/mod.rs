//! Ranks with a GPU each, over NCCL: on a stream of its own, so that sums run while libtorch computes.
//!
//! Owns NCCL's communicator, its stream, and the order between that and libtorch's stream. Control data,
//! barriers, the end, and buffers in host memory stay with the group inside. Sums are taken in NCCL's
//! order, the same on every rank, but not the tree's; a bf16 wire is taken for a permission, and not
//! used: NCCL would add in bf16.

mod api;

use super::flat;
use super::{Activity, CommError, Communicator, Operation, Pending, Place, Traffic, shard};
use crate::cuda_stream::{CudaEvent, CudaStream, set_device};
use api::Api;
use cudarc::nccl::sys::{ncclComm_t, ncclDataType_t, ncclRedOp_t, ncclResult_t, ncclUniqueId};
use std::ffi::{c_int, c_void};
use std::sync::Arc;
use tch::{Device, Kind, Tensor};

/// NCCL, found but not joined.
pub(super) struct Found {
    api: Api,
}

impl Found {
    /// Looks for it.
    ///
    /// # Errors
    /// Why there is none.
    pub(super) fn look() -> Result<Found, String> {
        Api::open().map(|api| Found { api })
    }

    /// Which it is, such as 22809; ranks can only talk through the same.
    pub(super) fn version(&self) -> Result<i32, CommError> {
        self.api.version()
    }

    /// Joins the ranks of `comm` into a group of NCCL's, this one with the given GPU. Collective.
    ///
    /// # Errors
    /// What NCCL and CUDA say.
    pub(super) fn join(self, comm: &dyn Communicator, gpu: usize) -> Result<Group, CommError> {
        let mut id = ncclUniqueId { internal: [0; 128] };
        if comm.rank() == 0 {
            // SAFETY: writes one id.
            self.api.checked("ncclGetUniqueId", unsafe { (self.api.get_unique_id)(&mut id) })?;
        }
        let mut bytes = id.internal.map(|byte| byte as u8).to_vec();
        comm.broadcast_bytes(&mut bytes, 0)?;
        id.internal.iter_mut().zip(&bytes).for_each(|(to, from)| *to = from.cast_signed());

        set_device(gpu)?;
        let (world_size, rank) = (comm.world_size() as c_int, comm.rank() as c_int);
        let mut raw: ncclComm_t = std::ptr::null_mut();
        // SAFETY: `raw` is written to before the call returns; the id is rank 0's on every rank, and the
        // current device is the one that this rank's buffers will be on.
        let result = unsafe { (self.api.init_rank)(&mut raw, world_size, id, rank) };
        self.api.checked("ncclCommInitRank", result)?;
        Ok(Group { api: self.api, raw, stream: CudaStream::new(gpu)?, gpu, rank: comm.rank() })
    }
}

/// A rank of NCCL's group.
pub(super) struct Group {
    api: Api,
    raw: ncclComm_t,
    stream: CudaStream,
    gpu: usize,
    rank: usize,
}

// SAFETY: NCCL's communicator may be used by one thread after another; that it is one at a time is the
// contract of `Communicator`, and asking for asynchronous errors is allowed beside it.
unsafe impl Send for Group {}
// SAFETY: as above.
unsafe impl Sync for Group {}

impl Group {
    /// Puts an operation on the stream, after all that libtorch has been given so far.
    fn start(
        &self,
        operation: Operation,
        buffer: &Tensor,
        world_size: usize,
    ) -> Result<CudaEvent, CommError> {
        set_device(self.gpu)?;
        self.stream.follow_current()?;
        let (numel, data) = (buffer.numel(), buffer.data_ptr());
        let kind = match buffer.kind() {
            Kind::BFloat16 => (ncclDataType_t::ncclBfloat16, 2),
            _ => (ncclDataType_t::ncclFloat32, 4),
        };
        let flat = NcclFlat { data, numel, kind };
        match operation {
            _ if numel == 0 => {}
            Operation::AllReduce { .. } => self.all_reduce(flat)?,
            Operation::Broadcast { root } => self.broadcast(flat, root)?,
            Operation::ReduceScatter { shard_numel, .. } => {
                self.reduce_scatter(flat, shard_numel, world_size)?;
            }
            Operation::AllGather { shard_numel } => self.all_gather(flat, shard_numel, world_size)?,
        }
        Ok(self.stream.event()?)
    }

    fn all_reduce(&self, flat: NcclFlat) -> Result<(), CommError> {
        let sum = ncclRedOp_t::ncclSum;
        let NcclFlat { data, numel, kind: (kind, _) } = flat;
        let stream = self.stream.native().cast();
        // SAFETY: `numel` elements of a buffer on this rank's GPU, in place, which NCCL allows. The buffer
        // lives and is left alone until the event has passed: `Flight` holds it.
        let result = unsafe { (self.api.all_reduce)(data, data, numel, kind, sum, self.raw, stream) };
        self.api.checked("ncclAllReduce", result)
    }

    fn broadcast(&self, flat: NcclFlat, root: usize) -> Result<(), CommError> {
        let NcclFlat { data, numel, kind: (kind, _) } = flat;
        let stream = self.stream.native().cast();
        // SAFETY: as in `all_reduce`; the root is one of the ranks (checked before).
        let result =
            unsafe { (self.api.broadcast)(data, data, numel, kind, root as c_int, self.raw, stream) };
        self.api.checked("ncclBroadcast", result)
    }

    /// In one piece where the shards are even; else as one reduction to each owner, in one group.
    fn reduce_scatter(&self, flat: NcclFlat, shard_numel: usize, world: usize) -> Result<(), CommError> {
        let (sum, kind, stream) = (ncclRedOp_t::ncclSum, flat.kind.0, self.stream.native().cast());
        if flat.numel == shard_numel * world {
            let own = flat.at(self.rank * shard_numel);
            // SAFETY: as in `all_reduce`; the sum goes to this rank's place in the buffer, the one in
            // which NCCL allows it.
            let result = unsafe {
                (self.api.reduce_scatter)(flat.data, own, shard_numel, kind, sum, self.raw, stream)
            };
            return self.api.checked("ncclReduceScatter", result);
        }
        self.grouped(flat, shard_numel, world, |at, numel, root| {
            // SAFETY: as in `all_reduce`, for the elements of one shard.
            let result =
                unsafe { (self.api.reduce)(at, at, numel, kind, sum, root as c_int, self.raw, stream) };
            self.api.checked("ncclReduce", result)
        })
    }

    /// In one piece where the shards are even; else as one broadcast from each owner, in one group.
    fn all_gather(&self, flat: NcclFlat, shard_numel: usize, world: usize) -> Result<(), CommError> {
        let (kind, stream) = (flat.kind.0, self.stream.native().cast());
        if flat.numel == shard_numel * world {
            let own = flat.at(self.rank * shard_numel);
            // SAFETY: as in `all_reduce`; this rank's shard lies in its place of the buffer, the one in
            // which NCCL allows it.
            let result =
                unsafe { (self.api.all_gather)(own, flat.data, shard_numel, kind, self.raw, stream) };
            return self.api.checked("ncclAllGather", result);
        }
        self.grouped(flat, shard_numel, world, |at, numel, root| {
            // SAFETY: as in `all_reduce`, for the elements of one shard.
            let result =
                unsafe { (self.api.broadcast)(at, at, numel, kind, root as c_int, self.raw, stream) };
            self.api.checked("ncclBroadcast", result)
        })
    }

    /// One call for each shard that is not empty, which NCCL runs together.
    fn grouped(
        &self,
        flat: NcclFlat,
        shard_numel: usize,
        world_size: usize,
        call: impl Fn(*mut c_void, usize, usize) -> Result<(), CommError>,
    ) -> Result<(), CommError> {
        // SAFETY: takes nothing; ended below whatever happens in between.
        self.api.checked("ncclGroupStart", unsafe { (self.api.group_start)() })?;
        let calls = (0..world_size).try_for_each(|owner| {
            let elements = shard(flat.numel, shard_numel, owner);
            if elements.is_empty() { Ok(()) } else { call(flat.at(elements.start), elements.len(), owner) }
        });
        // SAFETY: ends what was started above.
        let ended = self.api.checked("ncclGroupEnd", unsafe { (self.api.group_end)() });
        calls.and(ended)
    }

    /// Whether NCCL has failed since, on this rank or for want of another.
    fn healthy(&self) -> Result<(), CommError> {
        let mut state = ncclResult_t::ncclSuccess;
        // SAFETY: the communicator lives as long as this value; one number is written.
        let asked = unsafe { (self.api.async_error)(self.raw, &mut state) };
        self.api.checked("ncclCommGetAsyncError", asked)?;
        self.api.checked("a sum over NCCL", state)
    }
}

/// A flat buffer as NCCL takes it.
#[derive(Clone, Copy)]
struct NcclFlat {
    data: *mut c_void,
    numel: usize,
    /// NCCL's name of the dtype, and its bytes.
    kind: (ncclDataType_t, usize),
}

impl NcclFlat {
    /// The address of an element.
    fn at(self, element: usize) -> *mut c_void {
        self.data.cast::<u8>().wrapping_add(element * self.kind.1).cast()
    }
}

/// An operation on the stream, and the buffer it works on.
struct Flight {
    event: CudaEvent,
    group: Arc<Group>,
    _buffer: Tensor,
}

impl Flight {
    /// Has libtorch's stream wait for it; the thread goes on at once.
    fn finish(self) -> Result<(), CommError> {
        self.event.block_current()?;
        self.group.healthy()
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        // Nobody may have waited: libtorch must not give the buffer's memory to another tensor meanwhile.
        let _ = self.event.block_current();
    }
}

/// The group of all ranks, for buffers on each one's GPU.
pub(super) struct Nccl {
    inner: Box<dyn Communicator>,
    group: Arc<Group>,
}

impl Nccl {
    /// A joined group, and the one that it was joined through.
    pub(super) fn new(inner: Box<dyn Communicator>, group: Group) -> Nccl {
        Nccl { inner, group: Arc::new(group) }
    }
}

impl Communicator for Nccl {
    fn place(&self) -> &Place {
        self.inner.place()
    }

    fn device(&self) -> Device {
        Device::Cuda(self.group.gpu)
    }

    fn sums_in_tree(&self) -> bool {
        self.inner.world_size() == 1
    }

    fn buffer(&self, numel: usize, kind: Kind) -> Result<Tensor, CommError> {
        flat::plain_buffer(numel, kind, self.device())
    }

    fn traffic(&self) -> Traffic {
        self.inner.traffic()
    }

    fn activity(&self) -> Activity {
        self.inner.activity()
    }

    fn start(&self, operation: Operation, buffer: &Tensor) -> Result<Pending, CommError> {
        if buffer.defined() && buffer.device() == Device::Cpu {
            return self.inner.start(operation, buffer);
        }
        let world_size = self.inner.world_size();
        flat::check(operation, buffer, world_size, self.device())?;
        let event = self.group.start(operation, buffer, world_size)?;
        let group = Arc::clone(&self.group);
        let flight = Flight { event, group, _buffer: buffer.shallow_clone() };
        Ok(Pending::when(move || flight.finish()))
    }

    fn all_gather_bytes(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, CommError> {
        self.inner.all_gather_bytes(bytes)
    }

    fn barrier(&self) -> Result<(), CommError> {
        self.inner.barrier()
    }

    fn abort(&self, code: i32, why: &str) -> ! {
        self.inner.abort(code, why)
    }

    fn finalize(self: Box<Self>) -> Result<(), CommError> {
        self.inner.barrier()?; // all have started their last operation
        let group = &self.group;
        group.stream.event()?.synchronize()?;
        // SAFETY: nothing is under way (waited for just now), and nobody uses the group after this:
        // whatever still holds it only asks for nothing.
        group.api.checked("ncclCommDestroy", unsafe { (group.api.destroy)(group.raw) })?;
        self.inner.finalize()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_element_of_a_buffer_has_its_address() {
        let flat = NcclFlat { data: 64 as *mut c_void, numel: 10, kind: (ncclDataType_t::ncclBfloat16, 2) };
        assert_eq!(flat.at(3) as usize, 70);
    }

    #[test]
    fn nccl_is_found_or_its_absence_has_a_reason() {
        match Found::look() {
            Ok(found) => assert!(found.version().unwrap() > 20_000),
            Err(why) => assert!(why.contains("nccl"), "{why}"),
        }
    }
}
