//! The thread that owns MPI: joins the world, then does one job after the other.
//!
//! Every job begins with the ranks agreeing on what it is. That costs a small message, and turns ranks
//! that call different things from a hang, or a wrong sum, into an error that names the rank.

use super::grid::{Grid, Pass};
use super::layout::Layout;
use super::raw::{self, Comm, Shared};
use crate::collectives::flat::Flat;
use crate::collectives::traffic::Counters;
use crate::collectives::{CommError, Operation, Options, Place, Wire, end, machine, shard};
use std::fmt;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};
use std::time::Instant;
use tch::{Kind, Tensor};

/// Elements broadcast in one message: 1 GiB, well within what MPI counts.
const BROADCAST_PIECE: usize = 1 << 28;
/// The smallest piece worth a barrier; less shared memory than for this is none.
const SMALLEST_PIECE_BYTES: usize = 128 << 10;

/// Work for the thread, and where its outcome goes. Nobody may be waiting for it any more.
pub(super) enum Job {
    Flat { operation: Operation, flat: Flat, done: Sender<Result<(), CommError>> },
    Bytes { bytes: Vec<u8>, done: Sender<Result<Vec<Vec<u8>>, CommError>> },
    Barrier { done: Sender<Result<(), CommError>> },
    Finalize { done: Sender<Result<(), CommError>> },
}

/// Joins the world, says where this rank is, and works until told to finalize, or until nobody is
/// left to hand it work; then it ends without finalizing, which would wait for the others.
pub(super) fn run(
    options: &Options,
    tasks: Option<usize>,
    counters: &Arc<Counters>,
    placed: &Sender<Result<Place, CommError>>,
    queue: &Receiver<Job>,
) {
    let mut worker = match Worker::join(options, tasks, Arc::clone(counters)) {
        Ok(worker) => worker,
        Err(error) => return drop(placed.send(Err(error))),
    };
    let rank = worker.place.rank;
    let _ = placed.send(Ok(worker.place.clone()));
    while let Ok(job) = queue.recv() {
        match job {
            Job::Flat { operation, flat, done } => {
                let outcome = or_abort(rank, worker.flat(operation, &flat));
                drop(flat);
                let _ = done.send(outcome);
            }
            Job::Bytes { bytes, done } => drop(done.send(or_abort(rank, worker.bytes(&bytes)))),
            Job::Barrier { done } => drop(done.send(or_abort(rank, worker.agree(Call::BARRIER).map(drop)))),
            Job::Finalize { done } => return drop(done.send(or_abort(rank, worker.finalize()))),
        }
    }
}

/// Where MPI itself failed no other rank can be told: this one ends, and takes them with it.
fn or_abort<T>(rank: usize, outcome: Result<T, CommError>) -> Result<T, CommError> {
    match outcome {
        Err(error @ CommError::Mpi { .. }) => end::abort(rank, 1, &error.to_string()),
        outcome => outcome,
    }
}

struct Worker {
    place: Place,
    world: Comm,
    grid: Grid,
    counters: Arc<Counters>,
}

impl Worker {
    fn join(options: &Options, tasks: Option<usize>, counters: Arc<Counters>) -> Result<Worker, CommError> {
        let any_thread = raw::init()?;
        let world = Comm::world()?;
        let (rank, world_size) = world.rank_and_size()?;
        if let Some(tasks) = tasks.filter(|&tasks| tasks > world_size) {
            if world_size == 1 {
                raw::finalize()?; // nobody to wait for
            }
            let evidence = format!("the launcher says {tasks}, MPI {world_size}");
            return Err(CommError::NoCommonWorld { tasks, evidence });
        }
        if !any_thread {
            tracing::warn!("MPI grants no calls from several threads; an abort may leave no clean message");
        }
        let node_comm = match options.ranks_per_node {
            Some(ranks) => world.split(rank / ranks.max(1))?,
            None => world.split_shared()?,
        };
        let leader = node_comm.all_gather_u64([rank as u64])?[0][0];
        let leaders = world.all_gather_u64([leader])?;
        let leaders: Vec<usize> = leaders.iter().map(|[leader]| *leader as usize).collect();
        let layout = Layout::new(&leaders, rank);
        let grid = Worker::grid(options, world, node_comm, &layout)?;
        let place = Place {
            rank,
            world_size,
            local_rank: layout.local_rank,
            local_size: layout.local_size,
            node: layout.node,
            nodes: layout.nodes,
            host: machine::host_name(),
        };
        Ok(Worker { place, world, grid, counters })
    }

    /// The grid of nodes if ranks can share memory on each, else every rank a node of its own.
    fn grid(options: &Options, world: Comm, node_comm: Comm, layout: &Layout) -> Result<Grid, CommError> {
        let piece_bytes = options.piece_bytes.unwrap_or(if layout.nodes == 1 { 1 << 20 } else { 4 << 20 });
        let several = layout.nodes < world.rank_and_size()?.1;
        if several && options.shared_memory && layout.nested {
            if let Some((shared, piece_bytes)) = share(piece_bytes, world, node_comm, layout)? {
                let peers = world.split(layout.local_rank)?;
                return Grid::new(node_comm, peers, Some(shared), piece_bytes);
            }
        } else if several && options.shared_memory && layout.local_rank == 0 {
            tracing::warn!(
                "ranks are not spread over nodes in equal runs of a power of two: sums go by messages, not \
                 through shared memory, which is slower\nhint: give each host the same number of slots, \
                 and let mpirun fill one host after the other (--map-by slot)"
            );
        }
        let alone = world.split(world.rank_and_size()?.0)?;
        Grid::new(alone, world, None, piece_bytes)
    }

    /// All ranks tell what they are about to do, and go on if it is the same. Also a barrier.
    fn agree(&self, call: Call) -> Result<Vec<Call>, CommError> {
        self.counters.add_control(size_of::<Call>() * (self.place.world_size - 1));
        let calls: Vec<Call> = self.world.all_gather_u64(call.0)?.into_iter().map(Call).collect();
        match calls.iter().position(|other| !other.agrees(calls[0])) {
            None => Ok(calls),
            Some(rank) => {
                let (got, expected) = (calls[rank].to_string(), calls[0].to_string());
                Err(CommError::Mismatch { rank, got, by: 0, expected })
            }
        }
    }

    fn flat(&mut self, operation: Operation, flat: &Flat) -> Result<(), CommError> {
        self.agree(Call::flat(operation, flat))?;
        let began = Instant::now();
        let rounded = |tensor: &Tensor| tensor.to_kind(Kind::BFloat16).to_kind(Kind::Float);
        let mut buffer = flat.tensor();
        if self.place.world_size == 1 {
            return Ok(());
        }
        if flat.kind() == Kind::BFloat16 {
            let wide = buffer.to_kind(Kind::Float);
            self.fp32(operation, &wide)?;
            buffer.copy_(&wide);
        } else {
            let half = operation.wire() == Wire::Bf16;
            if half {
                buffer.copy_(&rounded(&buffer));
            }
            self.fp32(operation, &buffer)?;
            if half && matches!(operation, Operation::AllReduce { .. }) {
                buffer.copy_(&rounded(&buffer));
            }
        }
        self.counters.add(operation, self.bytes_of(operation, flat), began.elapsed());
        Ok(())
    }

    /// Bytes that an operation sends from this rank.
    fn bytes_of(&self, operation: Operation, flat: &Flat) -> u64 {
        let (numel, rank, others) = (flat.numel(), self.place.rank, self.place.world_size - 1);
        let of_shards = |shard_numel, reduce, gather| {
            let own = shard(numel, shard_numel, rank).len();
            usize::from(reduce) * (numel - own) + usize::from(gather) * own * others
        };
        let elements = match operation {
            Operation::AllReduce { .. } => of_shards(self.slice_numel(numel), true, true),
            Operation::ReduceScatter { shard_numel, .. } => of_shards(shard_numel, true, false),
            Operation::AllGather { shard_numel } => of_shards(shard_numel, false, true),
            Operation::Broadcast { root } => {
                if root == rank {
                    numel * others
                } else {
                    0
                }
            }
        };
        let half = flat.kind() == Kind::BFloat16 || operation.wire() == Wire::Bf16;
        (elements * if half { 2 } else { 4 }) as u64
    }

    /// Elements of a rank's slice of an all-reduce: whole cache lines.
    fn slice_numel(&self, numel: usize) -> usize {
        numel.div_ceil(self.place.world_size).next_multiple_of(16)
    }

    fn fp32(&mut self, operation: Operation, buffer: &Tensor) -> Result<(), CommError> {
        let (data, numel) = (buffer.data_ptr().cast(), buffer.numel());
        let pass = |slice_numel, reduce, gather| Pass { data, numel, slice_numel, reduce, gather };
        let pass = match operation {
            Operation::Broadcast { root } => return self.broadcast(buffer, root),
            Operation::AllReduce { .. } => pass(self.slice_numel(numel), true, true),
            Operation::ReduceScatter { shard_numel, .. } => pass(shard_numel, true, false),
            Operation::AllGather { shard_numel } => pass(shard_numel, false, true),
        };
        // SAFETY: `buffer` keeps its `numel` floats alive; the contract of `Communicator::start` keeps
        // others off them until the outcome of this job is told.
        unsafe { self.grid.run(pass) }
    }

    fn broadcast(&self, buffer: &Tensor, root: usize) -> Result<(), CommError> {
        let data: *mut f32 = buffer.data_ptr().cast();
        for start in (0..buffer.numel()).step_by(BROADCAST_PIECE) {
            let numel = BROADCAST_PIECE.min(buffer.numel() - start);
            // SAFETY: as in `fp32`; the wait below completes the request.
            let request = unsafe { self.world.start_broadcast(data.add(start), numel, root) }?;
            raw::wait(&mut vec![request])?;
        }
        Ok(())
    }

    fn bytes(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, CommError> {
        let lengths: Vec<usize> =
            self.agree(Call::bytes(bytes.len()))?.iter().map(|call| call.0[2] as usize).collect();
        let (total, limit) = (lengths.iter().sum(), i32::MAX as usize);
        if total > limit {
            return Err(CommError::TooLong { total, limit }); // on every rank
        }
        self.counters.add_control(bytes.len() * (self.place.world_size - 1));
        self.world.all_gather_bytes(bytes, &lengths)
    }

    fn finalize(self) -> Result<(), CommError> {
        self.agree(Call::FINALIZE)?;
        self.grid.free()?;
        raw::finalize()
    }
}

/// Shared memory for the grid and the size of its pieces, if every node has enough of it.
fn share(
    piece_bytes: usize,
    world: Comm,
    node_comm: Comm,
    layout: &Layout,
) -> Result<Option<(Shared, usize)>, CommError> {
    let need = |piece_bytes| {
        layout.local_size
            * size_of::<f32>()
            * Grid::shared_numel(piece_bytes, layout.nodes, layout.local_size)
    };
    // Halves the pieces until they fit; half of what is free stays free, for MPI and others.
    let free = machine::free_shared_memory();
    let mut fits = piece_bytes;
    while fits >= SMALLEST_PIECE_BYTES && need(fits) > free / 2 {
        fits /= 2;
    }
    let fits = if need(fits) > free / 2 { 0 } else { fits };
    let agreed = world.all_gather_u64([fits as u64])?.iter().map(|[fits]| *fits as usize).min().unwrap_or(0);
    let shared = if agreed > 0 {
        Shared::allocate(node_comm, Grid::shared_numel(agreed, layout.nodes, layout.local_size))
    } else {
        let text = format!("/dev/shm has {free} bytes free, {} are needed", 2 * need(SMALLEST_PIECE_BYTES));
        Err(CommError::Mpi { call: "sharing memory", text })
    };
    let everywhere = world.all_gather_u64([u64::from(shared.is_ok())])?.iter().all(|[ok]| *ok == 1);
    match shared {
        Ok(shared) if everywhere => return Ok(Some((shared, agreed))),
        Ok(shared) => shared.free()?,
        Err(error) if layout.local_rank == 0 && (fits == 0 || agreed > 0) => tracing::warn!(
            "{}: {error}; sums go by messages on all nodes, which is slower\nhint: make /dev/shm larger \
             (docker run --shm-size)",
            machine::host_name()
        ),
        Err(_) => {}
    }
    Ok(None)
}

/// What a rank is about to do: kind, elements, a number more, and bytes of an element on the wire.
#[derive(Clone, Copy)]
struct Call([u64; 4]);

const BYTES: u64 = 0;

impl Call {
    const BARRIER: Call = Call([1, 0, 0, 0]);
    const FINALIZE: Call = Call([2, 0, 0, 0]);

    fn bytes(length: usize) -> Call {
        Call([BYTES, 0, length as u64, 0])
    }

    fn flat(operation: Operation, flat: &Flat) -> Call {
        let (kind, more) = match operation {
            Operation::AllReduce { .. } => (3, 0),
            Operation::ReduceScatter { shard_numel, .. } => (4, shard_numel),
            Operation::AllGather { shard_numel } => (5, shard_numel),
            Operation::Broadcast { root } => (6, root),
        };
        let half = flat.kind() == Kind::BFloat16 || operation.wire() == Wire::Bf16;
        Call([kind, flat.numel() as u64, more as u64, if half { 2 } else { 4 }])
    }

    /// Lengths of bytes may differ, all else may not.
    fn agrees(self, other: Call) -> bool {
        self.0 == other.0 || self.0[0] == BYTES && other.0[0] == BYTES
    }
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [kind, numel, more, width] = self.0;
        let dtype = if width == 2 { "bf16" } else { "fp32" };
        match kind {
            BYTES => write!(f, "all_gather_bytes of {more} bytes"),
            1 => write!(f, "barrier"),
            2 => write!(f, "finalize"),
            3 => write!(f, "all_reduce of {numel} elements in {dtype}"),
            4 => write!(f, "reduce_scatter of {numel} elements in {dtype} in shards of {more}"),
            5 => write!(f, "all_gather of {numel} elements in {dtype} in shards of {more}"),
            _ => write!(f, "broadcast of {numel} elements in {dtype} from rank {more}"),
        }
    }
}
