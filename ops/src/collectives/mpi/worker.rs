//! The thread that owns MPI: joins the world, then does one job after the other.
//!
//! Every job begins with the ranks agreeing on what it is. That costs a small message, and turns ranks
//! that call different things from a hang, or a wrong sum, into an error that names the rank.

use super::buffers::Buffers;
use super::call::Call;
use super::grid::Grid;
use super::layout::Layout;
use super::pass::Pass;
use super::raw::{self, Comm};
use super::shared::Shared;
use crate::collectives::flat::{Flat, plain_buffer, width};
use crate::collectives::traffic::Counters;
use crate::collectives::{Activity, CommError, Operation, Options, Place, Wire, end, machine};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};
use std::time::{Duration, Instant};
use tch::{Kind, Tensor};

/// Bytes broadcast in one message, well within what MPI counts.
const BROADCAST_PIECE_BYTES: usize = 1 << 30;
/// The smallest piece worth a barrier; less shared memory than for this is none.
const SMALLEST_PIECE_BYTES: usize = 128 << 10;

/// Work for the thread, and where its outcome goes. Nobody may be waiting for it any more.
pub(super) enum Job {
    Flat { operation: Operation, flat: Flat, done: Sender<Result<(), CommError>> },
    Buffer { numel: usize, kind: Kind, done: Sender<Result<Tensor, CommError>> },
    Bytes { bytes: Vec<u8>, done: Sender<Result<Vec<Vec<u8>>, CommError>> },
    Barrier { done: Sender<Result<(), CommError>> },
    Finalize { done: Sender<Result<(), CommError>> },
}

impl Job {
    fn name(&self) -> &'static str {
        match self {
            Job::Flat { operation, .. } => operation.name(),
            Job::Buffer { .. } => "buffer",
            Job::Bytes { .. } => "all_gather_bytes",
            Job::Barrier { .. } => "barrier",
            Job::Finalize { .. } => "finalize",
        }
    }
}

/// Joins the world, says where this rank is, and works until told to finalize, or until nobody is
/// left to hand it work; then it ends without finalizing, which would wait for the others.
pub(super) fn run(
    options: &Options,
    tasks: Option<usize>,
    counters: &Arc<Counters>,
    activity: &Activity,
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
        activity.begin(job.name());
        // What has ended is counted before it is told, so that nobody who was told sees it under way.
        match job {
            Job::Flat { operation, flat, done } => {
                let outcome = or_abort(rank, worker.flat(operation, &flat));
                drop(flat);
                activity.end();
                let _ = done.send(outcome);
            }
            Job::Buffer { numel, kind, done } => {
                let outcome = or_abort(rank, worker.buffer(numel, kind));
                activity.end();
                let _ = done.send(outcome);
            }
            Job::Bytes { bytes, done } => {
                let outcome = or_abort(rank, worker.bytes(&bytes));
                activity.end();
                let _ = done.send(outcome);
            }
            Job::Barrier { done } => {
                let outcome = or_abort(rank, worker.agree(Call::BARRIER).map(drop));
                activity.end();
                let _ = done.send(outcome);
            }
            Job::Finalize { done } => return drop(done.send(or_abort(rank, worker.finalize()))),
        }
    }
}

/// How long mpirun may take to end this process because another one has died. A rank that is faster than
/// it would be taken for the culprit.
const CULPRIT_FIRST: Duration = Duration::from_secs(5);

/// Where MPI itself failed no other rank can be told: this one ends, and takes them with it; most likely
/// because one of them is dead, which mpirun tells better.
fn or_abort<T>(rank: usize, outcome: Result<T, CommError>) -> Result<T, CommError> {
    match outcome {
        Err(error @ CommError::Mpi { .. }) => {
            std::thread::sleep(CULPRIT_FIRST);
            end::abort(rank, 1, &error.to_string())
        }
        outcome => outcome,
    }
}

struct Worker {
    place: Place,
    world: Comm,
    grid: Grid,
    buffers: Buffers,
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
        Ok(Worker { place, world, grid, buffers: Buffers::default(), counters })
    }

    /// The grid of nodes if ranks can share memory on each, else every rank a node of its own.
    fn grid(options: &Options, world: Comm, node_comm: Comm, layout: &Layout) -> Result<Grid, CommError> {
        let piece_bytes = options.piece_bytes.unwrap_or(if layout.nodes == 1 { 1 << 20 } else { 8 << 20 });
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
        let calls = self.world.all_gather_u64(call.numbers())?;
        let calls: Vec<Call> = calls.into_iter().map(Call::from_numbers).collect();
        Call::compare(&calls)?;
        Ok(calls)
    }

    fn buffer(&mut self, numel: usize, kind: Kind) -> Result<Tensor, CommError> {
        self.agree(Call::buffer(numel, kind))?;
        match self.grid.shares() {
            Some(node) => self.buffers.make(self.world, node, numel, kind),
            None => plain_buffer(numel, kind, tch::Device::Cpu),
        }
    }

    fn flat(&mut self, operation: Operation, flat: &Flat) -> Result<(), CommError> {
        let place = self.buffers.find(flat, self.place.local_rank);
        let calls = self.agree(Call::flat(operation, flat, place))?;
        let began = Instant::now();
        let reached = Call::same_place(&calls).and_then(|at| self.buffers.reach(at, self.place.local_size));
        let buffers = reached.unwrap_or_else(|| vec![flat.data()]);
        let sent_bytes = match operation {
            Operation::Broadcast { root } => self.broadcast(flat, root)?,
            _ => {
                let pass = self.pass(operation, flat, buffers);
                // SAFETY: `flat` keeps its elements alive on every rank, and shared memory stays; the
                // contract of `Communicator::start` keeps others off them until each rank's outcome is told.
                unsafe { self.grid.run(&pass) }?
            }
        };
        self.counters.add(operation, sent_bytes, began.elapsed());
        Ok(())
    }

    fn pass(&self, operation: Operation, flat: &Flat, buffers: Vec<*mut u8>) -> Pass {
        let (numel, width) = (flat.numel(), width(flat.kind()));
        let (slice_numel, reduce, gather) = match operation {
            Operation::ReduceScatter { shard_numel, .. } => (shard_numel, true, false),
            Operation::AllGather { shard_numel } => (shard_numel, false, true),
            // Whole cache lines.
            _ => (numel.div_ceil(self.place.world_size).next_multiple_of(16), true, true),
        };
        let wire_width = if operation.wire() == Wire::Bf16 { 2 } else { width };
        Pass { buffers, numel, slice_numel, reduce, gather, width, wire_width }
    }

    fn broadcast(&self, flat: &Flat, root: usize) -> Result<u64, CommError> {
        let bytes = flat.numel() * width(flat.kind());
        for start in (0..bytes).step_by(BROADCAST_PIECE_BYTES) {
            let piece = BROADCAST_PIECE_BYTES.min(bytes - start);
            // SAFETY: as in `flat`; the wait below completes the request.
            let request = unsafe { self.world.start_broadcast(flat.data().add(start), piece, root) }?;
            raw::wait(&mut vec![request])?;
        }
        let given = if root == self.place.rank { self.place.world_size - 1 } else { 0 };
        Ok((bytes * given) as u64)
    }

    fn bytes(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, CommError> {
        let lengths: Vec<usize> =
            self.agree(Call::bytes(bytes.len()))?.into_iter().map(Call::length).collect();
        let (total, limit) = (lengths.iter().sum(), i32::MAX as usize);
        if total > limit {
            return Err(CommError::TooLong { total, limit }); // on every rank
        }
        self.counters.add_control(bytes.len() * (self.place.world_size - 1));
        self.world.all_gather_bytes(bytes, &lengths)
    }

    fn finalize(self) -> Result<(), CommError> {
        self.agree(Call::FINALIZE)?;
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
    let bytes = |piece_bytes| Grid::shared_bytes(piece_bytes, layout.nodes, layout.local_size);
    // Halves the pieces until they fit; half of what is free stays free, for MPI and others.
    let (free, _) = machine::shared_memory();
    let fits_now = |piece_bytes| layout.local_size * bytes(piece_bytes) <= free / 2;
    let mut fits = piece_bytes;
    while fits > SMALLEST_PIECE_BYTES && !fits_now(fits) {
        fits /= 2;
    }
    let fits = if fits_now(fits) { fits } else { 0 };
    let agreed = world.all_gather_u64([fits as u64])?.iter().map(|[fits]| *fits as usize).min().unwrap_or(0);
    let shared = if agreed > 0 {
        Shared::allocate(node_comm, bytes(agreed))?
    } else {
        let need = 2 * layout.local_size * bytes(SMALLEST_PIECE_BYTES);
        Err(format!("/dev/shm has {free} bytes free, {need} are needed"))
    };
    let everywhere = world.all_gather_u64([u64::from(shared.is_ok())])?.iter().all(|[ok]| *ok == 1);
    match shared {
        Ok(shared) if everywhere => return Ok(Some((shared, agreed))),
        Err(why) if layout.local_rank == 0 && (fits == 0 || agreed > 0) => tracing::warn!(
            "{}: {why}; sums go by messages on all nodes, which is slower\nhint: make /dev/shm larger \
             (docker run --shm-size)",
            machine::host_name()
        ),
        _ => {}
    }
    Ok(None)
}
