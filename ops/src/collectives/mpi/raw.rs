//! The functions of MPI that are used, each as one Rust function with its errors checked.
//! Knows nothing of what they are used for. Sections are those of the MPI 4.0 standard.
//!
//! Every function is called on the thread that initialised MPI, but for `abort_world`.

use crate::collectives::CommError;
use mpi::ffi;
use std::ffi::c_int;
use std::ptr;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

/// Whether `MPI_Abort` may be called.
static STATE: AtomicU8 = AtomicU8::new(UNTOUCHED);
const UNTOUCHED: u8 = 0;
const JOINED: u8 = 1;
const LEFT: u8 = 2;

/// How long a wait polls without sleeping.
const SPIN: Duration = Duration::from_millis(1);
const SHORTEST_SLEEP: Duration = Duration::from_micros(50);
const LONGEST_SLEEP: Duration = Duration::from_micros(250);

fn check(call: &'static str, code: c_int) -> Result<(), CommError> {
    if code == ffi::MPI_SUCCESS as c_int {
        return Ok(());
    }
    let mut text = [0u8; ffi::MPI_MAX_ERROR_STRING as usize];
    let mut length: c_int = 0;
    // SAFETY: the buffer has the size the standard asks for (9.4, MPI_Error_string).
    unsafe { ffi::MPI_Error_string(code, text.as_mut_ptr().cast(), &mut length) };
    let length = usize::try_from(length).unwrap_or(0).min(text.len());
    Err(CommError::Mpi { call, text: String::from_utf8_lossy(&text[..length]).into_owned() })
}

fn count(elements: usize) -> c_int {
    // Callers cut what they send into pieces far below this; control data is measured before.
    c_int::try_from(elements).expect("a message of less than 2^31 elements")
}

/// Initialises MPI for calls from any thread (11.2.1, MPI_Init_thread). Says whether that was granted.
pub(super) fn init() -> Result<bool, CommError> {
    if STATE.compare_exchange(UNTOUCHED, JOINED, Ordering::SeqCst, Ordering::SeqCst).is_err() {
        return Err(CommError::Twice);
    }
    let mut provided: c_int = 0;
    // SAFETY: null arguments are allowed; the exchange above lets only one call through.
    let code = unsafe {
        ffi::MPI_Init_thread(ptr::null_mut(), ptr::null_mut(), ffi::RSMPI_THREAD_MULTIPLE, &mut provided)
    };
    check("MPI_Init_thread", code)?;
    // SAFETY: a constant set by the C part of the bindings.
    Ok(provided >= unsafe { ffi::RSMPI_THREAD_MULTIPLE })
}

/// Shuts MPI down in order (11.2.2, MPI_Finalize); waits for the other ranks.
pub(super) fn finalize() -> Result<(), CommError> {
    STATE.store(LEFT, Ordering::SeqCst);
    // SAFETY: called once, by the thread that initialised, after its last operation completed.
    check("MPI_Finalize", unsafe { ffi::MPI_Finalize() })
}

/// Ends all ranks with `code` (11.4.2, MPI_Abort); returns if there is no MPI to do it.
///
/// From any thread. Where MPI granted less than MPI_THREAD_MULTIPLE this is outside the standard, and
/// still the better way: the process ends either way, and mpirun ends the others.
pub(in crate::collectives) fn abort_world(code: i32) {
    if STATE.load(Ordering::SeqCst) == JOINED {
        // SAFETY: MPI is initialised, or about to be, in which case MPI itself ends the process.
        unsafe { ffi::MPI_Abort(ffi::RSMPI_COMM_WORLD, code) };
    }
}

/// A group of ranks; copies name the same one. Lives until `MPI_Finalize`.
#[derive(Clone, Copy)]
pub(super) struct Comm(ffi::MPI_Comm);

/// A started operation.
pub(super) type Request = ffi::MPI_Request;

impl Comm {
    /// A copy of the world whose messages meet nobody else's (7.4.2, MPI_Comm_dup).
    pub(super) fn world() -> Result<Comm, CommError> {
        let mut comm = Comm::null();
        // SAFETY: MPI is initialised; every rank calls this once.
        check("MPI_Comm_dup", unsafe { ffi::MPI_Comm_dup(ffi::RSMPI_COMM_WORLD, &mut comm.0) })?;
        Ok(comm)
    }

    /// The ranks that share memory with this one, in rank order (7.4.2, MPI_Comm_split_type).
    pub(super) fn split_shared(self) -> Result<Comm, CommError> {
        let mut comm = Comm::null();
        // SAFETY: a live communicator; every rank of it calls this.
        let code = unsafe {
            let (kind, info) = (ffi::RSMPI_COMM_TYPE_SHARED, ffi::RSMPI_INFO_NULL);
            ffi::MPI_Comm_split_type(self.0, kind, 0, info, &mut comm.0)
        };
        check("MPI_Comm_split_type", code)?;
        Ok(comm)
    }

    /// The ranks of one color, in rank order (7.4.2, MPI_Comm_split).
    pub(super) fn split(self, color: usize) -> Result<Comm, CommError> {
        let mut comm = Comm::null();
        // SAFETY: a live communicator; every rank of it calls this.
        check("MPI_Comm_split", unsafe { ffi::MPI_Comm_split(self.0, count(color), 0, &mut comm.0) })?;
        Ok(comm)
    }

    /// Index of this process and number of processes (7.4.1, MPI_Comm_rank and MPI_Comm_size).
    pub(super) fn rank_and_size(self) -> Result<(usize, usize), CommError> {
        let (mut rank, mut size): (c_int, c_int) = (0, 0);
        // SAFETY: a live communicator and two integers to write to.
        check("MPI_Comm_rank", unsafe { ffi::MPI_Comm_rank(self.0, &mut rank) })?;
        // SAFETY: as above.
        check("MPI_Comm_size", unsafe { ffi::MPI_Comm_size(self.0, &mut size) })?;
        Ok((usize::try_from(rank).unwrap_or(0), usize::try_from(size).unwrap_or(0)))
    }

    /// Starts a barrier (6.12.1, MPI_Ibarrier).
    pub(super) fn start_barrier(self) -> Result<Request, CommError> {
        let mut request = null_request();
        // SAFETY: a live communicator.
        check("MPI_Ibarrier", unsafe { ffi::MPI_Ibarrier(self.0, &mut request) })?;
        Ok(request)
    }

    /// Starts sending `bytes` to a rank, nothing if there are none (3.7.2, MPI_Isend).
    ///
    /// # Safety
    /// `data` addresses so many bytes, which stay alive and are not written until the request is complete.
    pub(super) unsafe fn start_send(
        self,
        data: *const u8,
        bytes: usize,
        to: usize,
        tag: c_int,
        requests: &mut Vec<Request>,
    ) -> Result<(), CommError> {
        if bytes == 0 {
            return Ok(());
        }
        let mut request = null_request();
        // SAFETY: by this function's contract.
        let code = unsafe {
            let kind = ffi::RSMPI_UINT8_T;
            ffi::MPI_Isend(data.cast(), count(bytes), kind, count(to), tag, self.0, &mut request)
        };
        requests.push(request);
        check("MPI_Isend", code)
    }

    /// Starts receiving `bytes` from a rank, nothing if there are none (3.7.2, MPI_Irecv).
    ///
    /// # Safety
    /// `data` addresses so many bytes, which stay alive and untouched until the request is complete.
    pub(super) unsafe fn start_receive(
        self,
        data: *mut u8,
        bytes: usize,
        from: usize,
        tag: c_int,
        requests: &mut Vec<Request>,
    ) -> Result<(), CommError> {
        if bytes == 0 {
            return Ok(());
        }
        let mut request = null_request();
        // SAFETY: by this function's contract.
        let code = unsafe {
            let kind = ffi::RSMPI_UINT8_T;
            ffi::MPI_Irecv(data.cast(), count(bytes), kind, count(from), tag, self.0, &mut request)
        };
        requests.push(request);
        check("MPI_Irecv", code)
    }

    /// Starts copying `bytes` from `root` to all (6.12.2, MPI_Ibcast).
    ///
    /// # Safety
    /// `data` addresses so many bytes, which stay alive and untouched until the request is complete.
    pub(super) unsafe fn start_broadcast(
        self,
        data: *mut u8,
        bytes: usize,
        root: usize,
    ) -> Result<Request, CommError> {
        let mut request = null_request();
        // SAFETY: by this function's contract.
        let code = unsafe {
            let kind = ffi::RSMPI_UINT8_T;
            ffi::MPI_Ibcast(data.cast(), count(bytes), kind, count(root), self.0, &mut request)
        };
        check("MPI_Ibcast", code)?;
        Ok(request)
    }

    /// Every rank's numbers, `[K]` -> `[size, K]` in rank order (6.12.5, MPI_Iallgather).
    pub(super) fn all_gather_u64<const K: usize>(self, mine: [u64; K]) -> Result<Vec<[u64; K]>, CommError> {
        let (_, size) = self.rank_and_size()?;
        let mut all = vec![[0u64; K]; size];
        let (mut request, n) = (null_request(), count(K));
        // SAFETY: `mine` holds K and `all` size times K numbers; both live past the wait below.
        let code = unsafe {
            let (send, recv, kind) = (mine.as_ptr().cast(), all.as_mut_ptr().cast(), ffi::RSMPI_UINT64_T);
            ffi::MPI_Iallgather(send, n, kind, recv, n, kind, self.0, &mut request)
        };
        check("MPI_Iallgather", code)?;
        wait(&mut vec![request])?;
        Ok(all)
    }

    /// Every rank's bytes, rank r's being `lengths[r]` long (6.12.5, MPI_Iallgatherv). The sum of the
    /// lengths fits a C integer.
    pub(super) fn all_gather_bytes(self, mine: &[u8], lengths: &[usize]) -> Result<Vec<Vec<u8>>, CommError> {
        let counts: Vec<c_int> = lengths.iter().map(|&length| count(length)).collect();
        let starts: Vec<c_int> = lengths
            .iter()
            .scan(0usize, |end, &length| Some(count(std::mem::replace(end, *end + length))))
            .collect();
        // One byte more, which is not sent: the address of no bytes is 1, Open MPI's MPI_IN_PLACE.
        let sent = [mine, &[0]].concat();
        let mut all = vec![0u8; lengths.iter().sum::<usize>() + 1];
        let mut request = null_request();
        // SAFETY: `sent` has the length this rank announced, `all` room for all; they and the two
        // arrays live past the wait below.
        let code = unsafe {
            let (send, recv, kind) = (sent.as_ptr().cast(), all.as_mut_ptr().cast(), ffi::RSMPI_UINT8_T);
            let (counts, starts) = (counts.as_ptr(), starts.as_ptr());
            let n = count(mine.len());
            ffi::MPI_Iallgatherv(send, n, kind, recv, counts, starts, kind, self.0, &mut request)
        };
        check("MPI_Iallgatherv", code)?;
        wait(&mut vec![request])?;
        let mut rest = all.as_slice();
        Ok(lengths.iter().map(|&length| rest.split_off(..length).unwrap_or_default().to_vec()).collect())
    }

    fn null() -> Comm {
        // SAFETY: a constant set by the C part of the bindings.
        Comm(unsafe { ffi::RSMPI_COMM_NULL })
    }
}

fn null_request() -> Request {
    // SAFETY: a constant set by the C part of the bindings.
    unsafe { ffi::RSMPI_REQUEST_NULL }
}

/// Waits until all requests are complete, and forgets them (3.7.5, MPI_Testall).
///
/// Open MPI moves data only inside its calls, so this tests again and again: without a pause at first,
/// for a peer that is about to arrive, then with sleeps that leave the core to the computation.
pub(super) fn wait(requests: &mut Vec<Request>) -> Result<(), CommError> {
    let began = Instant::now();
    let mut sleep = SHORTEST_SLEEP;
    while !complete(requests)? {
        if began.elapsed() < SPIN {
            std::thread::yield_now();
        } else {
            std::thread::sleep(sleep);
            sleep = (sleep * 2).min(LONGEST_SLEEP);
        }
    }
    Ok(())
}

/// Lets messages travel, which they do only while MPI is called; whether all requests are complete, which are
/// then forgotten (3.7.5, MPI_Testall).
pub(super) fn complete(requests: &mut Vec<Request>) -> Result<bool, CommError> {
    if requests.is_empty() {
        return Ok(true);
    }
    let mut done: c_int = 0;
    // SAFETY: the requests are live or null; ignoring statuses is allowed.
    let code = unsafe {
        let ignore = ffi::RSMPI_STATUSES_IGNORE;
        ffi::MPI_Testall(count(requests.len()), requests.as_mut_ptr(), &mut done, ignore)
    };
    check("MPI_Testall", code)?;
    if done != 0 {
        requests.clear();
    }
    Ok(done != 0)
}
