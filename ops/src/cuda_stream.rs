//! A thread's current CUDA device, bound to the shim's `stream.cpp`.

use crate::OpsError;
use crate::shim::checked;
use std::ffi::c_int;

mod ffi {
    use super::c_int;

    unsafe extern "C" {
        pub(super) fn phx_set_device(index: c_int) -> c_int;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_cuda_a_device_is_refused_with_libtorchs_reason() {
        if crate::cuda::open().is_err() {
            let error = set_device(0).unwrap_err().to_string();
            assert!(error.contains("cuda") && !error.contains("frame #"), "{error}");
        }
    }
}
