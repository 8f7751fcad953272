//! Devices, threads and memory policy of a rank's process. Set once at start, by the program.

use crate::OpsError;
use std::time::Instant;
use tch::{Kind, Tensor};

/// The device that a configuration asks for.
///
/// # Errors
/// CUDA asked for by name: this build computes on the CPU.
pub fn select(device: configs::Device) -> Result<tch::Device, OpsError> {
    match device {
        configs::Device::Auto | configs::Device::Cpu => Ok(tch::Device::Cpu),
        configs::Device::Cuda => Err(OpsError::NoCuda { why: "this version trains on the CPU only" }),
    }
}

/// Fixes how many threads compute, and keeps freed memory: a step allocates what the step before
/// freed, and giving it back to the system in between costs a page fault for every 4 KiB.
pub fn configure_process(threads: usize) {
    tch::set_num_threads(threads as i32);
    tch::set_num_interop_threads(1);
    // SAFETY: mallopt only sets parameters of the allocator; both are valid for glibc, and a libc that
    // does not know them returns 0 and changes nothing.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 1 << 30);
        libc::mallopt(libc::M_TRIM_THRESHOLD, i32::MAX);
    }
}

/// The matrix rate of this process in FLOP/s: the best of ten fp32 products of 1024 x 1024 x 1024, so
/// that what else the machine does at the moment counts little.
pub fn matrix_peak(device: tch::Device) -> f64 {
    let n = 1024i64;
    let a = Tensor::ones([n, n], (Kind::Float, device));
    let best = (0..10).map(|_| {
        let start = Instant::now();
        let product = a.matmul(&a);
        let _ = product.double_value(&[0, 0]); // wait for the device
        start.elapsed().as_secs_f64()
    });
    2.0 * (n as f64).powi(3) / best.fold(f64::INFINITY, f64::min)
}
