//! A CUDA stream beside the one libtorch computes on, and the order between the two. Bound to the
//! shim's `stream.cpp`; knows nothing of what runs on it.

use crate::OpsError;
use crate::shim::checked;
use std::ffi::{c_int, c_void};

mod ffi {
    use super::{c_int, c_void};

    /// libtorch's `c10::Event`.
    #[repr(C)]
    pub(super) struct Event {
        _private: [u8; 0],
    }

    unsafe extern "C" {
        pub(super) fn phx_set_device(index: c_int) -> c_int;
        pub(super) fn phx_stream_new(index: c_int, id: *mut i64, native: *mut *mut c_void) -> c_int;
        pub(super) fn phx_stream_follow_current(index: c_int, id: i64) -> c_int;
        pub(super) fn phx_current_stream(index: c_int, native: *mut *mut c_void) -> c_int;
        pub(super) fn phx_exchange_stream(index: c_int, id: i64, before: *mut i64) -> c_int;
        pub(super) fn phx_event_new(index: c_int, id: i64, event: *mut *mut Event) -> c_int;
        pub(super) fn phx_event_block_current(event: *const Event) -> c_int;
        pub(super) fn phx_event_synchronize(event: *const Event) -> c_int;
        pub(super) fn phx_event_free(event: *mut Event);
    }
}

/// Makes a CUDA device the calling thread's current one.
///
/// # Errors
/// No CUDA, or no such device.
pub(crate) fn set_device(index: usize) -> Result<(), OpsError> {
    // SAFETY: takes any number, and fails with an exception that the shim catches.
    checked(unsafe { ffi::phx_set_device(index as c_int) })
}

/// The `cudaStream_t` that libtorch gives the calling thread's work on a device to.
///
/// # Errors
/// No CUDA, or no such device.
pub(crate) fn current_stream(device: usize) -> Result<*mut c_void, OpsError> {
    let mut native = std::ptr::null_mut();
    // SAFETY: the place is written to before the call returns, and not kept.
    checked(unsafe { ffi::phx_current_stream(device as c_int, &mut native) })?;
    Ok(native)
}

/// A stream of one device, of libtorch's pool.
#[derive(Debug)]
pub(crate) struct CudaStream {
    device: c_int,
    id: i64,
    native: *mut c_void,
}

// SAFETY: the pointer is a handle that libtorch owns and never frees; CUDA's functions on streams may
// be called from any thread.
unsafe impl Send for CudaStream {}
// SAFETY: as above.
unsafe impl Sync for CudaStream {}

impl CudaStream {
    /// Takes one from the pool.
    ///
    /// # Errors
    /// No CUDA, or no such device.
    pub(crate) fn new(device: usize) -> Result<CudaStream, OpsError> {
        let mut stream = CudaStream { device: device as c_int, id: 0, native: std::ptr::null_mut() };
        // SAFETY: both places are written to before the call returns, and not kept.
        checked(unsafe { ffi::phx_stream_new(stream.device, &mut stream.id, &mut stream.native) })?;
        Ok(stream)
    }

    /// The `cudaStream_t`, which lives as long as the process.
    pub(crate) fn native(&self) -> *mut c_void {
        self.native
    }

    /// What this stream is given from now on begins after all that libtorch's current stream of the
    /// calling thread has been given so far. Returns at once.
    ///
    /// # Errors
    /// What CUDA says.
    pub(crate) fn follow_current(&self) -> Result<(), OpsError> {
        // SAFETY: device and id are those of a stream of the pool (`new`).
        checked(unsafe { ffi::phx_stream_follow_current(self.device, self.id) })
    }

    /// Does `work` with this stream as libtorch's: what it computes there is given to this stream, and what it
    /// allocates is this stream's to use again.
    ///
    /// # Errors
    /// What CUDA says, and what `work` does.
    pub(crate) fn within<T, E: From<OpsError>>(&self, work: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
        let mut before = 0;
        // SAFETY: device and id are those of a stream of the pool (`new`); the place is written to at once.
        checked(unsafe { ffi::phx_exchange_stream(self.device, self.id, &mut before) })?;
        let done = work();
        let mut own = 0;
        // SAFETY: as above; the id is the one that libtorch gave for its stream before.
        checked(unsafe { ffi::phx_exchange_stream(self.device, before, &mut own) })?;
        done
    }

    /// An event that has passed when this stream has done what it has been given so far.
    ///
    /// # Errors
    /// What CUDA says.
    pub(crate) fn event(&self) -> Result<CudaEvent, OpsError> {
        let mut event = std::ptr::null_mut();
        // SAFETY: as in `follow_current`; the place is written to before the call returns, with an event
        // that is then this value's alone.
        checked(unsafe { ffi::phx_event_new(self.device, self.id, &mut event) })?;
        Ok(CudaEvent { event })
    }
}

/// A point in a stream's work.
#[derive(Debug)]
pub(crate) struct CudaEvent {
    event: *mut ffi::Event,
}

// SAFETY: the event is owned by this value, and libtorch's events may be used by one thread after
// another.
unsafe impl Send for CudaEvent {}

impl CudaEvent {
    /// What libtorch's current stream of the calling thread is given from now on begins after the event.
    /// Returns at once.
    ///
    /// # Errors
    /// What CUDA says.
    pub(crate) fn block_current(&self) -> Result<(), OpsError> {
        // SAFETY: a live event of this value's own.
        checked(unsafe { ffi::phx_event_block_current(self.event) })
    }

    /// Returns when the event has passed.
    ///
    /// # Errors
    /// What CUDA says, also about earlier work of the device.
    pub(crate) fn synchronize(&self) -> Result<(), OpsError> {
        // SAFETY: as in `block_current`.
        checked(unsafe { ffi::phx_event_synchronize(self.event) })
    }
}

impl Drop for CudaEvent {
    fn drop(&mut self) {
        // SAFETY: made by `phx_event_new`, freed once; CUDA keeps what streams still wait for.
        unsafe { ffi::phx_event_free(self.event) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_cuda_streams_are_refused_with_libtorchs_reason() {
        if crate::cuda::open().is_ok() {
            return; // tried by the GPU check
        }
        let refused =
            [CudaStream::new(0).unwrap_err(), set_device(0).unwrap_err(), current_stream(0).unwrap_err()];
        for error in refused {
            let error = error.to_string();
            assert!(error.contains("cuda") && !error.contains("frame #"), "{error}");
        }
    }
}
