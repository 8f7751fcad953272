//! Ranks over MPI: one thread per rank initialises MPI, owns it, and does what it is handed.
//!
//! Owns that thread and its queue. Refuses to know how a buffer travels (`grid`) and which function
//! of MPI does it (`raw`).

mod bf16;
mod buffers;
mod call;
mod grid;
mod layout;
mod pass;
mod raw;
mod shared;
mod sums;
mod worker;

pub(super) use raw::abort_world;

use super::flat::{Flat, check_kind};
use super::traffic::{Counters, Traffic};
use super::{Activity, CommError, Communicator, Operation, Options, Pending, Place, end};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use tch::{Kind, Tensor};
use worker::Job;

/// The group of all ranks of MPI's world.
pub(super) struct Mpi {
    place: Place,
    jobs: Sender<Job>,
    counters: Arc<Counters>,
    activity: Activity,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Mpi {
    /// Joins the world. `tasks`: how many processes the environment says were started together.
    pub(super) fn join(options: &Options, tasks: Option<usize>) -> Result<Mpi, CommError> {
        let (jobs, queue) = channel();
        let (placed, place) = channel();
        let (options, counters) = (options.clone(), Arc::new(Counters::default()));
        let (counted, activity) = (Arc::clone(&counters), Activity::default());
        let watched = activity.clone();
        let thread = std::thread::Builder::new()
            .name("mpi".to_owned())
            .spawn(move || worker::run(&options, tasks, &counted, &watched, &placed, &queue))?;
        let place = place.recv().unwrap_or(Err(CommError::Ended))?;
        Ok(Mpi { place, jobs, counters, activity, thread: Mutex::new(Some(thread)) })
    }

    /// Hands a job to the thread, and the way its outcome comes back.
    fn hand<T>(&self, job: impl FnOnce(Sender<T>) -> Job) -> Result<Receiver<T>, CommError> {
        let (done, outcome) = channel();
        self.jobs.send(job(done)).map_err(|_| CommError::Ended)?;
        Ok(outcome)
    }
}

impl Communicator for Mpi {
    fn place(&self) -> &Place {
        &self.place
    }

    fn buffer(&self, numel: usize, kind: Kind) -> Result<Tensor, CommError> {
        check_kind(kind)?;
        self.hand(|done| Job::Buffer { numel, kind, done })?.recv().unwrap_or(Err(CommError::Ended))
    }

    fn traffic(&self) -> Traffic {
        self.counters.traffic()
    }

    fn activity(&self) -> Activity {
        self.activity.clone()
    }

    fn start(&self, operation: Operation, buffer: &Tensor) -> Result<Pending, CommError> {
        let flat = Flat::new(operation, buffer, self.place.world_size)?;
        Ok(Pending::until(self.hand(|done| Job::Flat { operation, flat, done })?))
    }

    fn all_gather_bytes(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, CommError> {
        let outcome = self.hand(|done| Job::Bytes { bytes: bytes.to_vec(), done })?;
        outcome.recv().unwrap_or(Err(CommError::Ended))
    }

    fn barrier(&self) -> Result<(), CommError> {
        self.hand(|done| Job::Barrier { done })?.recv().unwrap_or(Err(CommError::Ended))
    }

    fn abort(&self, code: i32, why: &str) -> ! {
        end::abort(self.place.rank, code, why)
    }

    fn finalize(self: Box<Self>) -> Result<(), CommError> {
        self.hand(|done| Job::Finalize { done })?.recv().unwrap_or(Err(CommError::Ended))?;
        let thread = self.thread.lock().map_or(None, |mut thread| thread.take());
        thread.map_or(Ok(()), |thread| thread.join().map_err(|_| CommError::Ended))
    }
}
