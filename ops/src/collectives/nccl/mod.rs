//! Ranks with a GPU each, over NCCL: on a stream of its own, so that sums run while libtorch computes.
//!
//! Owns which calls of NCCL an operation is, and their order among libtorch's work. Control data, barriers,
//! the end, and buffers in host memory stay with the group inside. Sums of fp32 are taken in NCCL's order,
//! the same on every rank, but not the tree's; on a bf16 wire NCCL only carries, and sums are taken here, in
//! fp32 and in the tree.

mod api;
mod library;
#[cfg(test)]
mod pretend;

use super::flat;
use super::traffic::Counters;
use super::{Activity, CommError, Communicator, Operation, Pending, Place, Traffic, Wire, shard};
use crate::cuda_stream::{CudaStream, set_device};
use api::Api;
use cudarc::nccl::sys::{ncclComm_t, ncclUniqueId};
use library::{Call, Event, Joined, Library, Span};
use std::ffi::c_int;
use std::sync::Arc;
use std::time::Duration;
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
        let joined = Joined { api: self.api, raw, stream: CudaStream::new(gpu)?, gpu };
        Ok(Group { library: Box::new(joined), rank: comm.rank(), world_size: comm.world_size() })
    }
}

/// A rank of NCCL's group.
pub(super) struct Group {
    library: Box<dyn Library>,
    rank: usize,
    world_size: usize,
}

impl Group {
    /// Puts an operation on the stream, after all that libtorch has been given so far.
    fn start(&self, operation: Operation, buffer: &Tensor) -> Result<Box<dyn Event>, CommError> {
        self.library.follow()?;
        if buffer.numel() > 0 {
            match (operation, operation.wire()) {
                (Operation::AllReduce { .. }, Wire::Bf16) if self.world_size > 1 => {
                    let shard_numel = buffer.numel().div_ceil(self.world_size);
                    self.sum_of_rounded(buffer, shard_numel, true)?;
                }
                (Operation::ReduceScatter { shard_numel, .. }, Wire::Bf16) if self.world_size > 1 => {
                    self.sum_of_rounded(buffer, shard_numel, false)?;
                }
                _ => self.library.call(&self.calls(operation, Span::of(buffer)))?,
            }
        }
        self.library.event()
    }

    /// The calls that an operation is, numbers travelling as they are: one where shards are even, else one for
    /// each shard that is not empty.
    fn calls(&self, operation: Operation, whole: Span) -> Vec<Call> {
        let even = |shard_numel: usize| whole.numel == shard_numel * self.world_size;
        let own = |shard_numel: usize| whole.part(&shard(whole.numel, shard_numel, self.rank));
        let each = |shard_numel: usize, call: fn(Span, usize) -> Call| {
            let shards = (0..self.world_size).map(|owner| (shard(whole.numel, shard_numel, owner), owner));
            let shards = shards.filter(|(elements, _)| !elements.is_empty());
            shards.map(|(elements, owner)| call(whole.part(&elements), owner)).collect()
        };
        match operation {
            Operation::AllReduce { .. } => vec![Call::AllReduce(whole)],
            Operation::Broadcast { root } => vec![Call::Broadcast { span: whole, root }],
            Operation::ReduceScatter { shard_numel, .. } if even(shard_numel) => {
                vec![Call::ReduceScatter { from: whole, to: own(shard_numel) }]
            }
            Operation::ReduceScatter { shard_numel, .. } => {
                each(shard_numel, |span, root| Call::Reduce { span, root })
            }
            Operation::AllGather { shard_numel } if even(shard_numel) => {
                vec![Call::AllGather { from: own(shard_numel), to: whole }]
            }
            Operation::AllGather { shard_numel } => {
                each(shard_numel, |span, root| Call::Broadcast { span, root })
            }
        }
    }

    /// Sums what every rank has rounded to bf16: each gets the others' parts of its shard and adds them up in
    /// fp32, in the tree. With `for_all`, the sums are rounded once more and given to all.
    fn sum_of_rounded(&self, buffer: &Tensor, shard_numel: usize, for_all: bool) -> Result<(), CommError> {
        let numel = buffer.numel();
        let own = shard(numel, shard_numel, self.rank);
        self.library.within(&mut || {
            tch::no_grad(|| {
                let rounded = buffer.f_to_kind(Kind::BFloat16)?;
                let rows = [self.world_size as i64, own.len() as i64];
                let arrived = Tensor::f_empty(rows, (Kind::BFloat16, buffer.device()))?;
                arrived.f_select(0, self.rank as i64)?.f_copy_(&part(&rounded, &own)?)?;
                self.library.call(&self.exchange(&rounded, &arrived, shard_numel))?;
                if own.is_empty() && !for_all {
                    return Ok(());
                }
                let sum = tree(&arrived, 0, self.world_size)?;
                if !for_all {
                    part(buffer, &own)?.f_copy_(&sum)?;
                    return Ok(());
                }
                // What was rounded has left: its memory takes the sums.
                part(&rounded, &own)?.f_copy_(&sum)?;
                let gathering = Operation::AllGather { shard_numel };
                self.library.call(&self.calls(gathering, Span::of(&rounded)))?;
                buffer.shallow_clone().f_copy_(&rounded)?;
                Ok(())
            })
        })
    }

    /// To each other rank its shard of `rounded`, `[numel]`, and from each its row of `arrived`, `[W, shard]`.
    fn exchange(&self, rounded: &Tensor, arrived: &Tensor, shard_numel: usize) -> Vec<Call> {
        let (rounded, arrived) = (Span::of(rounded), Span::of(arrived));
        let own = arrived.numel / self.world_size;
        let mut calls = Vec::with_capacity(2 * self.world_size);
        for peer in (0..self.world_size).filter(|&peer| peer != self.rank) {
            let theirs = shard(rounded.numel, shard_numel, peer);
            if !theirs.is_empty() {
                calls.push(Call::Send { span: rounded.part(&theirs), to: peer });
            }
            if own > 0 {
                calls.push(Call::Receive { span: arrived.part(&(peer * own..(peer + 1) * own)), from: peer });
            }
        }
        calls
    }

    /// Bytes that an operation makes this rank send, by theory.
    fn sent_bytes(&self, operation: Operation, numel: usize, kind: Kind) -> u64 {
        let others = self.world_size - 1;
        let own = |shard_numel: usize| shard(numel, shard_numel, self.rank).len();
        let width = if operation.wire() == Wire::Bf16 { 2 } else { flat::width(kind) };
        let elements = match operation {
            Operation::AllReduce { .. } => {
                let own = own(numel.div_ceil(self.world_size));
                numel - own + others * own
            }
            Operation::ReduceScatter { shard_numel, .. } => numel - own(shard_numel),
            Operation::AllGather { shard_numel } => others * own(shard_numel),
            Operation::Broadcast { root } if root == self.rank => others * numel,
            Operation::Broadcast { .. } => 0,
        };
        (elements * width) as u64
    }
}

fn part(flat: &Tensor, elements: &std::ops::Range<usize>) -> Result<Tensor, CommError> {
    Ok(flat.f_narrow(0, elements.start as i64, elements.len() as i64)?)
}

/// The sum of `n` rows from `first` on in fp32, in the balanced tree.
fn tree(rows: &Tensor, first: usize, n: usize) -> Result<Tensor, CommError> {
    if n == 1 {
        return Ok(rows.f_select(0, first as i64)?.f_to_kind(Kind::Float)?);
    }
    let left = n.next_power_of_two() / 2;
    let mut sum = tree(rows, first, left)?;
    let right = tree(rows, first + left, n - left)?;
    Ok(sum.f_add_(&right)?)
}

/// An operation on the stream, and the buffer it works on.
struct Flight {
    event: Box<dyn Event>,
    group: Arc<Group>,
    _buffer: Tensor,
}

impl Flight {
    /// Has libtorch's stream wait for it; the thread goes on at once.
    fn finish(self) -> Result<(), CommError> {
        self.event.block_current()?;
        self.group.library.healthy()
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
    counters: Counters,
}

impl Nccl {
    /// A joined group, and the one that it was joined through.
    pub(super) fn new(inner: Box<dyn Communicator>, group: Group) -> Nccl {
        Nccl { inner, group: Arc::new(group), counters: Counters::default() }
    }
}

impl Communicator for Nccl {
    fn place(&self) -> &Place {
        self.inner.place()
    }

    fn device(&self) -> Device {
        self.group.library.device()
    }

    fn sums_in_tree(&self) -> bool {
        self.inner.world_size() == 1
    }

    fn buffer(&self, numel: usize, kind: Kind) -> Result<Tensor, CommError> {
        flat::plain_buffer(numel, kind, self.device())
    }

    fn traffic(&self) -> Traffic {
        self.counters.traffic().plus(self.inner.traffic())
    }

    fn activity(&self) -> Activity {
        self.inner.activity()
    }

    fn start(&self, operation: Operation, buffer: &Tensor) -> Result<Pending, CommError> {
        if buffer.defined() && buffer.device() != self.device() {
            return self.inner.start(operation, buffer);
        }
        flat::check(operation, buffer, self.inner.world_size(), self.device())?;
        let event = self.group.start(operation, buffer)?;
        let sent = self.group.sent_bytes(operation, buffer.numel(), buffer.kind());
        self.counters.add(operation, sent, Duration::ZERO);
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
        self.group.library.event()?.synchronize()?;
        self.group.library.destroy()?;
        self.inner.finalize()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nccl_is_found_or_its_absence_has_a_reason() {
        match Found::look() {
            Ok(found) => assert!(found.version().unwrap() > 20_000),
            Err(why) => assert!(why.contains("nccl"), "{why}"),
        }
    }
}
