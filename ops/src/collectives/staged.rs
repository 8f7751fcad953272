//! Ranks whose buffers are on a device and whose sums are taken in host memory: each buffer is copied
//! out, handed to the group inside, and copied back.
//!
//! Slower than NCCL, and with two things it has not: the sums have the bits of the tree, and ranks may
//! share a GPU. Owns the copies and their order; knows nothing of how the group inside talks.

use super::flat;
use super::{Activity, CommError, Communicator, Operation, Pending, Place, Traffic, shard};
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use tch::{Device, Kind, Tensor};

/// The group inside, for buffers on a device. Buffers in host memory go to it as they are, unless the
/// device is the CPU, which is how this is tried without one.
pub struct Staged {
    inner: Box<dyn Communicator>,
    device: Device,
    line: Arc<Mutex<Line>>,
}

/// Operations under way, the first started in front, and host memory to be used again.
#[derive(Default)]
struct Line {
    started: u64,
    waiting: VecDeque<Flight>,
    failed: bool,
    spare: Vec<Tensor>,
}

struct Flight {
    number: u64,
    inner: Pending,
    host: Tensor,
    buffer: Tensor,
    /// What comes back.
    back: Range<usize>,
}

impl Staged {
    /// Serves buffers on `device` through `inner`.
    pub fn new(inner: Box<dyn Communicator>, device: Device) -> Staged {
        Staged { inner, device, line: Arc::default() }
    }
}

impl Communicator for Staged {
    fn place(&self) -> &Place {
        self.inner.place()
    }

    fn device(&self) -> Device {
        self.device
    }

    fn buffer(&self, numel: usize, kind: Kind) -> Result<Tensor, CommError> {
        flat::plain_buffer(numel, kind, self.device)
    }

    fn traffic(&self) -> Traffic {
        self.inner.traffic()
    }

    fn activity(&self) -> Activity {
        self.inner.activity()
    }

    fn start(&self, operation: Operation, buffer: &Tensor) -> Result<Pending, CommError> {
        if buffer.defined() && buffer.device() != self.device {
            return self.inner.start(operation, buffer);
        }
        flat::check(operation, buffer, self.inner.world_size(), self.device)?;
        if self.inner.world_size() == 1 && self.device.is_cuda() {
            return Ok(Pending::done()); // nothing to add; on the CPU it is copied all the same, as a trial
        }
        let mut line = lock(&self.line);
        let host = line.host_memory(buffer, &*self.inner)?;
        let (out, back) = travels(operation, buffer.numel(), self.inner.rank());
        copy(&host, buffer, &out)?; // waits until the device has computed it
        let inner = self.inner.start(operation, &host)?;
        line.started += 1;
        let number = line.started;
        line.waiting.push_back(Flight { number, inner, host, buffer: buffer.shallow_clone(), back });
        let line = Arc::clone(&self.line);
        Ok(Pending::when(move || lock(&line).finish_to(number)))
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
        self.inner.finalize()
    }
}

impl Line {
    /// Host memory for a buffer: page-locked if that makes copies faster, else such as ranks reach into.
    fn host_memory(&mut self, like: &Tensor, inner: &dyn Communicator) -> Result<Tensor, CommError> {
        let fits = |spare: &Tensor| spare.numel() == like.numel() && spare.kind() == like.kind();
        if let Some(index) = self.spare.iter().position(fits) {
            return Ok(self.spare.swap_remove(index));
        }
        if !like.device().is_cuda() {
            return inner.buffer(like.numel(), like.kind());
        }
        let host = Tensor::f_empty([like.numel() as i64], (like.kind(), Device::Cpu))?;
        Ok(host.f_pin_memory(like.device())?)
    }

    /// Brings back what was started up to a number, in the order in which it was.
    fn finish_to(&mut self, number: u64) -> Result<(), CommError> {
        while self.waiting.front().is_some_and(|flight| flight.number <= number) {
            let Some(flight) = self.waiting.pop_front() else { break };
            let outcome = flight.inner.wait();
            self.failed |= outcome.is_err();
            outcome?;
            copy(&flight.buffer, &flight.host, &flight.back)?;
            self.spare.push(flight.host);
        }
        // Whoever waits after a failure may not take its buffer for complete.
        if self.failed { Err(CommError::Ended) } else { Ok(()) }
    }
}

/// The elements that have to be in host memory before an operation, and on the device after it.
fn travels(operation: Operation, numel: usize, rank: usize) -> (Range<usize>, Range<usize>) {
    let all = 0..numel;
    match operation {
        Operation::AllReduce { .. } => (all.clone(), all),
        Operation::ReduceScatter { shard_numel, .. } => (all, shard(numel, shard_numel, rank)),
        Operation::AllGather { shard_numel } => (shard(numel, shard_numel, rank), all),
        Operation::Broadcast { root } if root == rank => (all, 0..0),
        Operation::Broadcast { .. } => (0..0, all),
    }
}

fn copy(to: &Tensor, from: &Tensor, elements: &Range<usize>) -> Result<(), CommError> {
    if elements.is_empty() {
        return Ok(());
    }
    let part = |tensor: &Tensor| tensor.f_narrow(0, elements.start as i64, elements.len() as i64);
    tch::no_grad(|| part(to)?.f_copy_(&part(from)?))?;
    Ok(())
}

fn lock(line: &Mutex<Line>) -> std::sync::MutexGuard<'_, Line> {
    line.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::collectives::{Solo, Wire, suite};

    #[test]
    fn one_rank_through_host_memory_passes_the_behaviour_suite() {
        let staged = Staged::new(Box::new(Solo::new()), Device::Cpu);
        let failed: Vec<_> = suite::suite(&staged).into_iter().filter(|c| c.outcome.is_err()).collect();
        assert!(failed.is_empty(), "{failed:?}");
        Box::new(staged).finalize().unwrap();
    }

    #[test]
    fn only_what_an_operation_needs_is_copied() {
        let sum = Wire::Fp32;
        assert_eq!(travels(Operation::AllReduce { wire: sum }, 10, 1), (0..10, 0..10));
        let scatter = Operation::ReduceScatter { shard_numel: 4, wire: sum };
        assert_eq!(travels(scatter, 10, 2), (0..10, 8..10));
        assert_eq!(travels(Operation::AllGather { shard_numel: 4 }, 10, 3), (10..10, 0..10));
        assert_eq!(travels(Operation::Broadcast { root: 1 }, 10, 1), (0..10, 0..0));
        assert_eq!(travels(Operation::Broadcast { root: 1 }, 10, 0), (0..0, 0..10));
    }

    #[test]
    fn host_memory_is_used_again() {
        let staged = Staged::new(Box::new(Solo::new()), Device::Cpu);
        for _ in 0..3 {
            let buffers = [staged.buffer(8, Kind::Float).unwrap(), staged.buffer(8, Kind::Float).unwrap()];
            let pending: Vec<Pending> = buffers
                .iter()
                .map(|buffer| staged.start(Operation::AllReduce { wire: Wire::Fp32 }, buffer).unwrap())
                .collect();
            pending.into_iter().try_for_each(Pending::wait).unwrap();
        }
        assert_eq!(lock(&staged.line).spare.len(), 2);
    }
}
