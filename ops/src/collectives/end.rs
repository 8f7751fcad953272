//! How a rank ends when it must: at once, taking the others with it, from any thread.
//!
//! Dropping MPI in order (`MPI_Finalize`) waits for the other ranks, which wait for this one. So a
//! failed rank never unwinds to the end of `main`: it prints why and aborts.

use super::{Communicator, mpi};
use std::backtrace::Backtrace;
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// How long MPI may take to end the others before this process ends by itself.
const ABORT_DEADLINE: Duration = Duration::from_secs(10);

/// Makes a panic in any thread of this process end all ranks: prints `[rank r]`, the message and a
/// backtrace to stderr, and aborts with exit code 1. To be called right after `init`.
pub fn abort_on_panic(comm: &dyn Communicator) {
    let rank = comm.rank();
    std::panic::set_hook(Box::new(move |info| {
        let thread = std::thread::current();
        let name = thread.name().unwrap_or("unnamed").to_owned();
        let backtrace = Backtrace::force_capture();
        abort(rank, 1, &format!("thread '{name}': {info}\n{backtrace}"));
    }));
}

/// Prints why, ends every rank with `code`, and this process whatever happens. From any thread, also
/// before the ranks have joined; [`Communicator::abort`] where there is one.
pub fn abort(rank: usize, code: i32, why: &str) -> ! {
    static ENDING: AtomicBool = AtomicBool::new(false);
    if ENDING.swap(true, Ordering::SeqCst) {
        // Another thread is at it: this one only keeps out of its way.
        std::thread::sleep(ABORT_DEADLINE);
        exit_now(code);
    }
    let _ = std::thread::Builder::new().spawn(move || {
        std::thread::sleep(ABORT_DEADLINE);
        exit_now(code)
    });
    // Straight to stderr: whether or not logs go anywhere, these must be seen.
    // In one piece: mpirun marks what it reads, and would mark each part.
    let text = format!("[rank {rank}] {why}\n{}\n", configs::last_words(rank, code));
    let _ = std::io::stderr().lock().write_all(text.as_bytes());
    let _ = std::io::stdout().flush();
    mpi::abort_world(code);
    exit_now(code)
}

/// Ends the process without running destructors of libraries whose threads may still be at work.
fn exit_now(code: i32) -> ! {
    // SAFETY: `_exit` takes any value and does not return; nothing of this process is used after.
    unsafe { libc::_exit(code) }
}
