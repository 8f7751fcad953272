//! How much of a GPU's memory libtorch has taken. Bound to the shim's `device_memory.cpp`; knows nothing of what
//! is in it.

use crate::OpsError;
use crate::shim::checked;
use std::ffi::c_int;

mod ffi {
    use super::c_int;

    unsafe extern "C" {
        pub(super) fn phx_begin_device_peak(index: c_int) -> c_int;
        pub(super) fn phx_device_peak(index: c_int, bytes: *mut i64) -> c_int;
    }
}

/// From now on the peak of device `index` is counted anew, and what libtorch keeps of freed tensors' memory
/// there goes back.
///
/// # Errors
/// No CUDA, or no such device.
pub fn begin_peak(index: usize) -> Result<(), OpsError> {
    // SAFETY: takes any number, and fails with an exception that the shim catches.
    checked(unsafe { ffi::phx_begin_device_peak(index as c_int) })
}

/// The most bytes that libtorch has held of device `index` since then: tensors, and what its allocator keeps
/// beside them; without CUDA's own.
///
/// # Errors
/// As [`begin_peak`].
pub fn peak_bytes(index: usize) -> Result<u64, OpsError> {
    let mut bytes = 0;
    // SAFETY: the place is written to before the call returns, and not kept.
    checked(unsafe { ffi::phx_device_peak(index as c_int, &mut bytes) })?;
    Ok(bytes.max(0).cast_unsigned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_cuda_there_is_no_peak_and_the_reason_is_told() {
        if crate::cuda::open().is_ok() {
            return; // tried by the GPU check
        }
        for refused in [begin_peak(0).unwrap_err(), peak_bytes(0).unwrap_err()] {
            let told = refused.to_string();
            assert!(told.to_lowercase().contains("cuda") && !told.contains("frame #"), "{told}");
        }
    }
}
