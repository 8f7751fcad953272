//! What ranks do together: sum, scatter, gather, broadcast, wait, and end.
//!
//! Owns the contract ([`Communicator`]), its backends and the behaviour suite they all pass.
//! Refuses to know what the numbers mean: segments, steps and checkpoints are its callers'.
//!
//! Sums are fp32 and taken in one order, the balanced binary tree over the rank index
//! ([`tree_sum`]), whatever the network looks like. So every rank ends with the same bits, and with
//! contiguous leaves per rank the sum over ranks is the top of the tree over micro-batches.

mod activity;
mod end;
mod error;
mod flat;
mod machine;
mod mpi;
mod nccl;
mod operation;
mod serve;
mod solo;
mod staged;
mod start;
pub mod suite;
mod traffic;
mod tree;

pub use activity::Activity;
pub use end::{abort, abort_on_panic};
pub use error::CommError;
pub use operation::{Operation, Wire, shard};
pub use serve::{DeviceSums, Way, nccl_version, serve};
pub use solo::Solo;
pub use staged::Staged;
pub use traffic::{Moved, Traffic};
pub use tree::tree_sum;

use std::sync::mpsc::Receiver;
use tch::{Device, Kind, Tensor};

/// Joins the ranks this process was started with: MPI's under mpirun or `srun --mpi=pmix`, else one
/// rank on its own, which never touches MPI.
///
/// # Errors
/// [`CommError::NoCommonWorld`] when several processes were started without an MPI world in common,
/// [`CommError::Twice`] on a second call in a process that has joined MPI, and what MPI says.
pub fn init() -> Result<Box<dyn Communicator>, CommError> {
    init_with(&Options::default())
}

/// As [`init`], with the way the ranks talk chosen. Results are the same bits whatever the options.
///
/// # Errors
/// As [`init`].
pub fn init_with(options: &Options) -> Result<Box<dyn Communicator>, CommError> {
    match start::how(|name| std::env::var(name).ok())? {
        start::How::Alone => Ok(Box::new(Solo::new())),
        start::How::Mpi { tasks } => Ok(Box::new(mpi::Mpi::join(options, tasks)?)),
    }
}

/// How ranks talk. Every rank must pass the same.
#[derive(Debug, Clone)]
pub struct Options {
    /// Bytes of a buffer that are worked on at a time; each rank holds about four times as much in
    /// scratch and shared memory. `None`: 1 MiB on one node, so that a piece stays in cache from one
    /// rank's copy to the other's sum; 8 MiB between nodes, where a message has to pay for its latency, or
    /// less where a buffer would make fewer than four.
    pub piece_bytes: Option<usize>,
    /// Whether the ranks of a node reduce through shared memory; without, they are sent messages.
    pub shared_memory: bool,
    /// Takes each run of so many consecutive ranks for a node, to try the path between nodes on
    /// one machine. `None`: MPI says who shares memory with whom.
    pub ranks_per_node: Option<usize>,
}

impl Default for Options {
    fn default() -> Options {
        Options { piece_bytes: None, shared_memory: true, ranks_per_node: None }
    }
}

/// Where a rank is among the ranks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Index of this process, `0..world_size`.
    pub rank: usize,
    /// Number of ranks.
    pub world_size: usize,
    /// Index among the ranks of this node, in rank order.
    pub local_rank: usize,
    /// Number of ranks on this node.
    pub local_size: usize,
    /// Index of this node, nodes being ordered by their lowest rank.
    pub node: usize,
    /// Number of nodes.
    pub nodes: usize,
    /// Name of this node.
    pub host: String,
}

/// The collectives a data-parallel run needs, and nothing else.
///
/// Every method but `place`, its shorthands, `device`, `traffic`, `activity` and `abort` is collective: all ranks call
/// it, in the same
/// order, with the same operation and sizes, one thread at a time. A failed collective leaves the
/// group unusable; the only correct reaction is `abort`. An MPI error or the death of a peer ends the
/// rank by itself.
///
/// Buffers are flat: one dimension, contiguous, on the CPU, or on the device that the group was made to
/// [`serve`]; views of a larger buffer will do. Sums take
/// fp32, copies fp32 and bf16. They are changed in place although borrowed shared, as everywhere in tch.
/// Any tensor will do; those that [`buffer`](Communicator::buffer) gives travel with fewer copies.
///
/// Dropping a communicator does nothing collective: a rank that ends without `finalize` is taken for
/// a failed one, and ends the job.
pub trait Communicator: Send + Sync {
    /// Where this rank is.
    fn place(&self) -> &Place;

    /// Where the buffers are that this group is for. Those in host memory will do on any.
    fn device(&self) -> Device {
        Device::Cpu
    }

    /// Whether sums of buffers are taken in the tree. NCCL has its own order, the same on all ranks, but where
    /// they travel as bf16.
    fn sums_in_tree(&self) -> bool {
        true
    }

    /// A flat buffer of zeros, `[numel]`, fp32 or bf16, for collectives to work on: where ranks of a node
    /// can share memory, they reach into each other's directly. That takes the same buffer on all
    /// ranks, or views of it at the same offset; elsewhere it is a tensor like any other. Its memory is
    /// kept until the process ends. Collective: all ranks ask for the same sizes in the same order.
    ///
    /// # Errors
    /// [`CommError::Kind`] for another dtype; [`CommError::Mismatch`] if ranks called different things.
    fn buffer(&self, numel: usize, kind: Kind) -> Result<Tensor, CommError> {
        flat::plain_buffer(numel, kind, Device::Cpu)
    }

    /// What this rank's collectives have sent so far. Not collective; zeros where nothing travels.
    fn traffic(&self) -> Traffic {
        Traffic::default()
    }

    /// What this rank's collectives are doing, to be looked at from any thread. Not collective.
    fn activity(&self) -> Activity {
        Activity::default()
    }

    /// Starts an operation on a buffer and returns at once; operations complete in the order they
    /// were started. Until [`Pending::wait`] has returned, nobody may read or write the buffer. On a GPU
    /// both begin after what libtorch has been given to compute before, without the thread waiting.
    ///
    /// # Errors
    /// [`CommError::Buffer`] and [`CommError::Argument`], before anything is sent.
    fn start(&self, operation: Operation, buffer: &Tensor) -> Result<Pending, CommError>;

    /// Every rank's bytes, by rank; their lengths may differ. For control data, not for tensors.
    ///
    /// # Errors
    /// [`CommError::Mismatch`] if ranks called different things; [`CommError::TooLong`].
    fn all_gather_bytes(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, CommError>;

    /// Returns when every rank has called it.
    ///
    /// # Errors
    /// [`CommError::Mismatch`] if ranks called different things.
    fn barrier(&self) -> Result<(), CommError>;

    /// Ends all ranks at once with an exit code, from any thread, whatever the others are doing.
    /// `why` goes to stderr.
    fn abort(&self, code: i32, why: &str) -> !;

    /// Leaves the group in order: waits for every rank, then shuts MPI down. To be called before the
    /// process ends well; never after a failure.
    ///
    /// # Errors
    /// [`CommError::Mismatch`] if ranks called different things.
    fn finalize(self: Box<Self>) -> Result<(), CommError>;

    /// Index of this rank.
    fn rank(&self) -> usize {
        self.place().rank
    }

    /// Number of ranks.
    fn world_size(&self) -> usize {
        self.place().world_size
    }

    /// Index of this rank on its node.
    fn local_rank(&self) -> usize {
        self.place().local_rank
    }

    /// Sums the buffer over ranks; all ranks get the sum.
    ///
    /// # Errors
    /// As [`start`](Communicator::start), and [`CommError::Mismatch`].
    fn all_reduce(&self, buffer: &Tensor) -> Result<(), CommError> {
        self.start(Operation::AllReduce { wire: Wire::Fp32 }, buffer)?.wait()
    }

    /// Sums the buffer over ranks; each rank gets the sum in its [`shard`], the rest is unspecified.
    ///
    /// # Errors
    /// As [`start`](Communicator::start), and [`CommError::Mismatch`].
    fn reduce_scatter(&self, buffer: &Tensor, shard_numel: usize) -> Result<(), CommError> {
        self.start(Operation::ReduceScatter { shard_numel, wire: Wire::Fp32 }, buffer)?.wait()
    }

    /// Fills the buffer with every rank's [`shard`] of it.
    ///
    /// # Errors
    /// As [`start`](Communicator::start), and [`CommError::Mismatch`].
    fn all_gather(&self, buffer: &Tensor, shard_numel: usize) -> Result<(), CommError> {
        self.start(Operation::AllGather { shard_numel }, buffer)?.wait()
    }

    /// Copies the root's buffer to all.
    ///
    /// # Errors
    /// As [`start`](Communicator::start), and [`CommError::Mismatch`].
    fn broadcast(&self, buffer: &Tensor, root: usize) -> Result<(), CommError> {
        self.start(Operation::Broadcast { root }, buffer)?.wait()
    }

    /// Sums a few numbers over ranks, in the same tree: losses, counts, flags.
    ///
    /// # Errors
    /// [`CommError::Mismatch`] if ranks called different things or with different lengths.
    fn all_reduce_f64(&self, values: &mut [f64]) -> Result<(), CommError> {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_ne_bytes()).collect();
        let rows = self.all_gather_bytes(&bytes)?;
        if let Some(rank) = rows.iter().position(|row| row.len() != bytes.len()) {
            let got = format!("all_reduce_f64 of {} values", rows[rank].len() / 8);
            let expected = format!("all_reduce_f64 of {} values", values.len());
            return Err(CommError::Mismatch { rank, got, by: self.rank(), expected });
        }
        let rows: Vec<Vec<f64>> = rows.iter().map(|row| f64s(row)).collect();
        let rows: Vec<&[f64]> = rows.iter().map(Vec::as_slice).collect();
        tree_sum(&rows, values);
        Ok(())
    }

    /// Replaces `bytes` by the root's. For control data, not for tensors.
    ///
    /// # Errors
    /// As [`all_gather_bytes`](Communicator::all_gather_bytes), and [`CommError::Argument`] for a
    /// root that is no rank.
    fn broadcast_bytes(&self, bytes: &mut Vec<u8>, root: usize) -> Result<(), CommError> {
        operation::check_root("broadcast_bytes", root, self.world_size())?;
        let mine: &[u8] = if self.rank() == root { bytes } else { &[] };
        let mut rows = self.all_gather_bytes(mine)?;
        *bytes = std::mem::take(&mut rows[root]);
        Ok(())
    }
}

fn f64s(bytes: &[u8]) -> Vec<f64> {
    bytes.as_chunks().0.iter().map(|eight| f64::from_ne_bytes(*eight)).collect()
}

/// An operation under way.
#[must_use = "the buffer may not be touched before `wait` has returned"]
pub struct Pending {
    outcome: Outcome,
}

enum Outcome {
    Known,
    Told(Receiver<Result<(), CommError>>),
    Asked(Box<dyn FnOnce() -> Result<(), CommError> + Send>),
}

impl Pending {
    fn done() -> Pending {
        Pending { outcome: Outcome::Known }
    }

    /// Complete when the outcome is sent.
    fn until(outcome: Receiver<Result<(), CommError>>) -> Pending {
        Pending { outcome: Outcome::Told(outcome) }
    }

    /// Complete when `ask` has returned.
    fn when(ask: impl FnOnce() -> Result<(), CommError> + Send + 'static) -> Pending {
        Pending { outcome: Outcome::Asked(Box::new(ask)) }
    }

    /// Returns when the operation is complete on this rank; on a GPU, when all that libtorch is given to
    /// compute from now on will begin after it.
    ///
    /// # Errors
    /// [`CommError::Mismatch`] if ranks called different things; [`CommError::Ended`] if the thread
    /// that talks to the others is gone.
    pub fn wait(self) -> Result<(), CommError> {
        match self.outcome {
            Outcome::Known => Ok(()),
            Outcome::Told(outcome) => outcome.recv().unwrap_or(Err(CommError::Ended)),
            Outcome::Asked(ask) => ask(),
        }
    }
}

impl std::fmt::Debug for Pending {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let state = if matches!(self.outcome, Outcome::Known) { "done" } else { "under way" };
        write!(f, "Pending({state})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_communicator_can_be_held_as_a_trait_object() {
        let comm: Box<dyn Communicator> = Box::new(Solo::new());
        comm.barrier().unwrap();
        comm.finalize().unwrap();
    }

    #[test]
    fn one_rank_alone_passes_the_behaviour_suite() {
        let failed: Vec<_> = suite::suite(&Solo::new()).into_iter().filter(|c| c.outcome.is_err()).collect();
        assert!(failed.is_empty(), "{failed:?}");
    }
}
