//! Runs launches on the host, for tests: the kernels' own source, compiled for it, with the arguments that a
//! GPU would be given.

use super::{Launch, Runner};
use crate::OpsError;
use std::cell::Cell;
use std::ffi::{CString, c_char, c_int, c_void};
use tch::{Device, Kind, Tensor};

unsafe extern "C" {
    fn phx_run_on_host(
        name: *const c_char,
        grid_x: u32,
        grid_y: u32,
        threads: u32,
        shared_bytes: u32,
        arguments: *mut *mut c_void,
    ) -> c_int;
}

/// The host.
pub(super) struct Host;

impl Runner for Host {
    /// Few, so that a block has several rows.
    fn blocks(&self) -> usize {
        3
    }

    fn most_shared_bytes(&self) -> usize {
        48 << 10
    }

    fn run(&self, launch: &Launch<'_>) -> Result<(), OpsError> {
        let name = CString::new(launch.kernel.as_str()).expect("a name");
        let mut words: Vec<u64> = launch.arguments.iter().map(|argument| argument.word()).collect();
        let mut arguments: Vec<*mut c_void> =
            words.iter_mut().map(|word| std::ptr::from_mut(word).cast()).collect();
        let [x, y] = launch.grid.map(|blocks| blocks as u32);
        // SAFETY: the name and the arguments outlive the call, and those that are addresses are those of
        // tensors in host memory whose shapes the launch was made for; how many there are and of which types
        // is what the tests show.
        let code = unsafe {
            phx_run_on_host(
                name.as_ptr(),
                x,
                y,
                launch.threads as u32,
                launch.shared_bytes as u32,
                arguments.as_mut_ptr(),
            )
        };
        let why = match code {
            0 => return Ok(()),
            1 => "there is no such kernel, or no such block",
            _ => "a thread does not come to a barrier",
        };
        Err(OpsError::Kernel { kernel: launch.kernel.clone(), why: why.into() })
    }
}

thread_local! {
    static STANDS_IN: Cell<bool> = const { Cell::new(false) };
}

/// Does `work` with the host in the place of a GPU: on this thread, tensors of the CPU go the kernels' way.
pub(crate) fn in_place_of_a_gpu<T>(work: impl FnOnce() -> T) -> T {
    struct Back;
    impl Drop for Back {
        fn drop(&mut self) {
            STANDS_IN.set(false);
        }
    }
    STANDS_IN.set(true);
    let _back = Back;
    work()
}

/// Whether it stands in for this device.
pub(super) fn stands_in(device: Device) -> bool {
    device == Device::Cpu && STANDS_IN.get()
}

/// Rows, width and dtype: fewer rows than blocks and more, widths that are read one by one and several at
/// once, in one turn and in more, with threads that have none.
pub(crate) const CASES: [(i64, i64, Kind); 10] = [
    (1, 1, Kind::Float),
    (5, 7, Kind::Float),
    (2, 64, Kind::Float),
    (7, 1100, Kind::Float),
    (4, 601, Kind::Float),
    (3, 8, Kind::BFloat16),
    (5, 9, Kind::BFloat16),
    (9, 256, Kind::BFloat16),
    (2, 2184, Kind::BFloat16),
    (4, 515, Kind::BFloat16),
];

pub(crate) fn random(size: &[i64], kind: Kind) -> Tensor {
    Tensor::randn(size, (Kind::Float, Device::Cpu)).to_kind(kind)
}

/// ‖got - expected‖ / ‖expected‖ in f64.
pub(crate) fn off(got: &Tensor, expected: &Tensor) -> f64 {
    let exact = |tensor: &Tensor| tensor.detach().to_kind(Kind::Double);
    let (got, expected) = (exact(got), exact(expected));
    let distance = (got - &expected).norm().double_value(&[]);
    distance / expected.norm().double_value(&[]).max(1e-9)
}

#[cfg(test)]
mod tests {
    use super::super::Argument;
    use super::*;

    #[test]
    fn what_is_no_kernel_or_no_block_is_refused() {
        let launch = |kernel: &str, threads| Launch {
            kernel: kernel.into(),
            grid: [1, 1],
            threads,
            shared_bytes: 0,
            arguments: vec![Argument::Nothing, Argument::Long(-1), Argument::Float(1.5)],
        };
        for launch in [launch("norm_sideways", 32), launch("norm_columns", 33)] {
            let error = Host.run(&launch).unwrap_err().to_string();
            assert!(error.contains(&launch.kernel) && error.contains("no such block"), "{error}");
        }
        assert_eq!(Argument::Long(-1).word(), u64::MAX);
        assert_eq!(Argument::Float(1.5).word(), u64::from(1.5f32.to_bits()));
    }
}
