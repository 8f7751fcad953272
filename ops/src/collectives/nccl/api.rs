//! NCCL's functions, found in the library that libtorch_cuda was loaded with, with their errors checked.
//!
//! Types are `cudarc`'s. Its loader is not used: it looks for `libnccl.so`, and what comes with libtorch
//! is called `libnccl.so.2`. Knows no buffers and no ranks but by number.

use super::super::CommError;
use crate::cuda::with_sources;
use cudarc::nccl::sys::{cudaStream_t, ncclComm_t, ncclDataType_t, ncclRedOp_t, ncclResult_t, ncclUniqueId};
use libloading::os::unix::Library;
use std::ffi::{CStr, c_char, c_int, c_void};

type Reduce = unsafe extern "C" fn(
    *const c_void,
    *mut c_void,
    usize,
    ncclDataType_t,
    ncclRedOp_t,
    c_int,
    ncclComm_t,
    cudaStream_t,
) -> ncclResult_t;
type AllReduce = unsafe extern "C" fn(
    *const c_void,
    *mut c_void,
    usize,
    ncclDataType_t,
    ncclRedOp_t,
    ncclComm_t,
    cudaStream_t,
) -> ncclResult_t;
type Broadcast = unsafe extern "C" fn(
    *const c_void,
    *mut c_void,
    usize,
    ncclDataType_t,
    c_int,
    ncclComm_t,
    cudaStream_t,
) -> ncclResult_t;
type AllGather = unsafe extern "C" fn(
    *const c_void,
    *mut c_void,
    usize,
    ncclDataType_t,
    ncclComm_t,
    cudaStream_t,
) -> ncclResult_t;
type ToPeer = unsafe extern "C" fn(
    *const c_void,
    usize,
    ncclDataType_t,
    c_int,
    ncclComm_t,
    cudaStream_t,
) -> ncclResult_t;
type FromPeer =
    unsafe extern "C" fn(*mut c_void, usize, ncclDataType_t, c_int, ncclComm_t, cudaStream_t) -> ncclResult_t;
type InitRank = unsafe extern "C" fn(*mut ncclComm_t, c_int, ncclUniqueId, c_int) -> ncclResult_t;

/// The functions that are used. `ncclReduceScatter` has the arguments of `ncclAllReduce`.
pub(super) struct Api {
    pub(super) get_unique_id: unsafe extern "C" fn(*mut ncclUniqueId) -> ncclResult_t,
    pub(super) init_rank: InitRank,
    pub(super) destroy: unsafe extern "C" fn(ncclComm_t) -> ncclResult_t,
    pub(super) async_error: unsafe extern "C" fn(ncclComm_t, *mut ncclResult_t) -> ncclResult_t,
    pub(super) group_start: unsafe extern "C" fn() -> ncclResult_t,
    pub(super) group_end: unsafe extern "C" fn() -> ncclResult_t,
    pub(super) all_reduce: AllReduce,
    pub(super) reduce_scatter: AllReduce,
    pub(super) all_gather: AllGather,
    pub(super) reduce: Reduce,
    pub(super) broadcast: Broadcast,
    pub(super) send: ToPeer,
    pub(super) receive: FromPeer,
    error_string: unsafe extern "C" fn(ncclResult_t) -> *const c_char,
    last_error: unsafe extern "C" fn(ncclComm_t) -> *const c_char,
    get_version: unsafe extern "C" fn(*mut c_int) -> ncclResult_t,
    _library: Library,
}

impl Api {
    /// Finds them: among what libtorch_cuda brought, else by the library's name.
    ///
    /// # Errors
    /// What the loader says, when there is no NCCL.
    pub(super) fn open() -> Result<Api, String> {
        // SAFETY: runs the initialisers of NCCL, where libtorch_cuda has not done so.
        let opened = unsafe { Library::new("libnccl.so.2") };
        let library = match opened {
            Ok(library) => library,
            // Some builds of libtorch hold NCCL within libtorch_cuda, whose symbols are global.
            Err(error) if Api::symbol::<*const c_void>(&Library::this(), "ncclAllReduce").is_ok() => {
                tracing::debug!("NCCL is within libtorch: {error}");
                Library::this()
            }
            Err(error) => return Err(with_sources(&error)),
        };
        Ok(Api {
            get_unique_id: Api::symbol(&library, "ncclGetUniqueId")?,
            init_rank: Api::symbol(&library, "ncclCommInitRank")?,
            destroy: Api::symbol(&library, "ncclCommDestroy")?,
            async_error: Api::symbol(&library, "ncclCommGetAsyncError")?,
            group_start: Api::symbol(&library, "ncclGroupStart")?,
            group_end: Api::symbol(&library, "ncclGroupEnd")?,
            all_reduce: Api::symbol(&library, "ncclAllReduce")?,
            reduce_scatter: Api::symbol(&library, "ncclReduceScatter")?,
            all_gather: Api::symbol(&library, "ncclAllGather")?,
            reduce: Api::symbol(&library, "ncclReduce")?,
            broadcast: Api::symbol(&library, "ncclBroadcast")?,
            send: Api::symbol(&library, "ncclSend")?,
            receive: Api::symbol(&library, "ncclRecv")?,
            error_string: Api::symbol(&library, "ncclGetErrorString")?,
            last_error: Api::symbol(&library, "ncclGetLastError")?,
            get_version: Api::symbol(&library, "ncclGetVersion")?,
            _library: library,
        })
    }

    fn symbol<T: Copy>(library: &Library, name: &str) -> Result<T, String> {
        // SAFETY: the types of the fields are those of nccl.h, which has kept them since 2.7; the library
        // lives as long as the value that holds the function.
        unsafe { library.get::<T>(name.as_bytes()) }
            .map(|symbol| *symbol)
            .map_err(|error| with_sources(&error))
    }

    /// Such as 22809 for 2.28.9.
    pub(super) fn version(&self) -> Result<i32, CommError> {
        let mut version = 0;
        // SAFETY: writes one number.
        self.checked("ncclGetVersion", unsafe { (self.get_version)(&mut version) })?;
        Ok(version)
    }

    /// Turns what a function returned into an error with NCCL's words.
    pub(super) fn checked(&self, call: &'static str, result: ncclResult_t) -> Result<(), CommError> {
        if result == ncclResult_t::ncclSuccess {
            return Ok(());
        }
        // SAFETY: both return text of NCCL's own, NUL-terminated; the last error's is copied before
        // another call changes it. NCCL takes no communicator here.
        let [what, why] = unsafe {
            [(self.error_string)(result), (self.last_error)(std::ptr::null_mut())]
                .map(|text| if text.is_null() { c"" } else { CStr::from_ptr(text) })
                .map(|text| text.to_string_lossy().into_owned())
        };
        let text = if why.is_empty() { what } else { format!("{what}: {why}") };
        Err(CommError::Nccl { call, text })
    }
}
