//! Documents through many threads and out again in order. Owns the threads and how much is in memory at
//! a time; refuses to know what is done to a document.

use crate::PrepareError;
use crate::documents::{Raw, Reader};
use std::collections::BTreeMap;
use std::num::NonZero;
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, Sender, channel};

/// Bytes of text that a thread takes at a time, and documents, if these are short.
const BATCH_BYTES: usize = 1 << 20;
const BATCH_DOCUMENTS: usize = 4096;

/// Batches in memory at a time, for each thread: being read, worked on, or waiting for one before.
const BATCHES_PER_THREAD: usize = 4;

/// Whether to go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Flow {
    /// Show what is next.
    Continue,
    /// That was enough.
    Stop,
}

/// All cores of this machine.
pub fn all_threads() -> usize {
    std::thread::available_parallelism().map_or(1, NonZero::get)
}

type Batch = Result<Vec<Raw>, PrepareError>;

/// Reads documents, gives them batch by batch to `threads` workers, each made by `worker`, and calls
/// `each` with what became of each batch, in the order of the documents.
///
/// # Errors
/// The first error in that order: of reading, of a worker, or of `each`.
pub(crate) fn run<T: Send, W: FnMut(Vec<Raw>) -> Result<T, PrepareError>>(
    reader: Reader<'_>,
    threads: usize,
    worker: impl Fn() -> W + Sync,
    mut each: impl FnMut(T) -> Result<Flow, PrepareError>,
) -> Result<(), PrepareError> {
    let threads = threads.max(1);
    let (give_ticket, tickets) = channel();
    let (give_batch, batches) = channel();
    let (give_result, results) = channel();
    let batches = Mutex::new(batches);
    for _ in 0..threads * BATCHES_PER_THREAD {
        let _ = give_ticket.send(()); // the other end is here
    }
    std::thread::scope(|scope| {
        scope.spawn(move || read(reader, &tickets, &give_batch));
        for _ in 0..threads {
            let (give_result, batches, worker) = (give_result.clone(), &batches, &worker);
            scope.spawn(move || work(batches, &give_result, worker()));
        }
        drop(give_result);
        // Dropping tickets and results, on the way out, ends the threads.
        let (results, give_ticket) = (results, give_ticket);
        let mut waiting = BTreeMap::new();
        let mut next = 0;
        for (number, result) in results {
            waiting.insert(number, result);
            while let Some(result) = waiting.remove(&next) {
                next += 1;
                if each(result?)? == Flow::Stop {
                    return Ok(());
                }
                let _ = give_ticket.send(()); // the reader may have come to the end
            }
        }
        Ok(())
    })
}

/// Reads batches, one for each ticket.
fn read(mut reader: Reader<'_>, tickets: &Receiver<()>, give: &Sender<(u64, Batch)>) {
    let mut number = 0;
    loop {
        if tickets.recv().is_err() {
            return;
        }
        let mut batch = Vec::new();
        let mut bytes = 0;
        let mut failure = None;
        while bytes < BATCH_BYTES && batch.len() < BATCH_DOCUMENTS {
            match reader.next() {
                Some(Ok(raw)) => {
                    bytes += raw.bytes();
                    batch.push(raw);
                }
                Some(Err(error)) => {
                    failure = Some(error);
                    break;
                }
                None => break,
            }
        }
        if batch.is_empty() && failure.is_none() {
            return;
        }
        // What was read before a failure comes before it.
        for item in std::iter::once(Ok(batch)).chain(failure.map(Err)) {
            if give.send((number, item)).is_err() {
                return;
            }
            number += 1;
        }
    }
}

fn work<T>(
    batches: &Mutex<Receiver<(u64, Batch)>>,
    give: &Sender<(u64, Result<T, PrepareError>)>,
    mut worker: impl FnMut(Vec<Raw>) -> Result<T, PrepareError>,
) {
    loop {
        // A thread that panicked while it waited has left the queue as it was.
        let next = batches.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).recv();
        let Ok((number, batch)) = next else { return };
        let result = batch.and_then(&mut worker);
        if give.send((number, result)).is_err() {
            return;
        }
    }
}
