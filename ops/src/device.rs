//! Device, precision, threads and memory policy of a rank's process. Set once at start, by the program.

use crate::cuda::{self, NoCuda};
use crate::{OpsError, cuda_stream};
use std::time::Instant;
use tch::{Device, Kind, Tensor};

/// The device that a configuration asks for: for rank `local_rank` of its machine, one of the machine's
/// GPUs, in turn. To be called before the first tensor (see [`cuda::open`]). Whether ranks may share one
/// is decided where they are known, in [`serve`](crate::collectives::serve).
///
/// # Errors
/// [`OpsError::NoCuda`] when CUDA was asked for by name and there is none.
pub fn select(wanted: configs::Device, local_rank: usize) -> Result<Device, OpsError> {
    let device = choose(wanted, local_rank, cuda::open)?;
    if let Device::Cuda(index) = device {
        cuda_stream::set_device(index)?;
        let name = cuda::properties(index).map_or("of unknown make".into(), |about| about.name);
        tracing::info!("computing on GPU {index}, {name}");
    }
    Ok(device)
}

fn choose(
    wanted: configs::Device,
    local_rank: usize,
    open: impl Fn() -> Result<usize, NoCuda>,
) -> Result<Device, OpsError> {
    if wanted == configs::Device::Cpu {
        return Ok(Device::Cpu);
    }
    match open() {
        Ok(devices) => Ok(Device::Cuda(local_rank % devices)),
        Err(why) if wanted == configs::Device::Cuda => Err(OpsError::NoCuda(why)),
        Err(why) => {
            let why = why.to_string();
            tracing::info!("computing on the CPU: {}", why.lines().next().unwrap_or_default());
            Ok(Device::Cpu)
        }
    }
}

/// The precision in which a device computes: bf16 where that is the faster (CPUs with a matrix unit, GPUs from
/// compute capability 8.0 on), else fp32, unless one is asked for by name. With AVX512-BF16 alone a CPU
/// multiplies bf16 in hardware, and a step in it takes longer than one in fp32.
pub fn dtype(wanted: configs::Dtype, device: Device) -> Kind {
    let is_faster = || match device {
        Device::Cuda(index) => cuda::properties(index).is_some_and(|about| about.capability >= (8, 0)),
        _ => has_matrix_unit(),
    };
    match wanted {
        configs::Dtype::Bf16 => Kind::BFloat16,
        configs::Dtype::Fp32 => Kind::Float,
        configs::Dtype::Auto if is_faster() => Kind::BFloat16,
        configs::Dtype::Auto => Kind::Float,
    }
}

/// Whether the CPU has a matrix unit that multiplies bf16 and adds to fp32 where it lies: layers, their gradients
/// and the head are then products of our own.
pub fn has_matrix_unit() -> bool {
    crate::shim::has_products()
}

/// Gives the system what the process keeps of freed tensors' memory (see [`configure_process`]).
///
/// # Errors
/// None that is known: what the shim says.
pub fn trim_host_memory() -> Result<(), OpsError> {
    crate::shim::trim_host_memory()
}

/// Fixes how many threads compute, and keeps freed memory: a step allocates what the step before
/// freed, and giving it back to the system in between costs a page fault for every 4 KiB.
pub fn configure_process(threads: usize) {
    tch::set_num_threads(threads as i32);
    tch::set_num_interop_threads(1);
    if let Err(error) = crate::shim::keep_host_memory() {
        tracing::warn!("large tensors lie in the system's memory: {error}");
    }
    // SAFETY: mallopt only sets parameters of the allocator; both are valid for glibc, and a libc that
    // does not know them returns 0 and changes nothing.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 1 << 30);
        libc::mallopt(libc::M_TRIM_THRESHOLD, i32::MAX);
    }
}

/// Host memory on a device, for what is computed there from now on; on the CPU a handle of it. The thread does
/// not wait: what is sent lies in page-locked memory, which libtorch keeps until it has arrived.
///
/// # Panics
/// As tch's operations do: no memory.
pub fn sent(host: &Tensor, device: Device) -> Tensor {
    if !device.is_cuda() {
        return host.to_device(device);
    }
    host.pin_memory(device).to_device_(device, host.kind(), true, false)
}

/// The matrix rate that a rank's FLOPs are measured against, FLOP/s: in bf16 the data sheet's where
/// the GPU is a known one, else what [`matrix_peak`] measures.
pub fn peak_flops(device: Device, kind: Kind) -> f64 {
    let known = match (device, kind) {
        (Device::Cuda(index), Kind::BFloat16) => {
            cuda::properties(index).and_then(|about| configs::data_sheet_bf16(&about.name))
        }
        _ => None,
    };
    known.unwrap_or_else(|| matrix_peak(device, kind))
}

/// The matrix rate of this process in FLOP/s: the best of square products, from small ones up to 1024
/// wide on the CPU and 8192 wide on a GPU, ten of a size, so that what else the machine does at the
/// moment counts little. A CPU that only emulates the precision is not kept at it: the next size is not
/// tried where one product would take a tenth of a second.
pub fn matrix_peak(device: Device, kind: Kind) -> f64 {
    let sizes: &[i64] = if device.is_cuda() { &[8192] } else { &[128, 256, 512, 1024] };
    let mut best_rate = 0.0f64;
    for &n in sizes {
        let flops = 2.0 * (n as f64).powi(3);
        if best_rate > 0.0 && flops / best_rate > 0.1 {
            break;
        }
        let a = Tensor::ones([n, n], (kind, device));
        for _ in 0..10 {
            let start = Instant::now();
            let product = a.matmul(&a);
            let _ = product.double_value(&[0, 0]); // wait for the device
            best_rate = best_rate.max(flops / start.elapsed().as_secs_f64());
        }
    }
    best_rate
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cuda_by_name_is_refused_with_the_reason_and_a_way_out() {
        let error = choose(configs::Device::Cuda, 0, || Err(NoCuda::Driver)).unwrap_err().to_string();
        for part in ["parallel.device = \"cuda\"", "libcuda.so.1", "hint: ", "\"cpu\" or \"auto\""] {
            assert!(error.contains(part), "no {part:?} in {error}");
        }
    }

    #[test]
    fn auto_takes_a_gpu_where_there_is_one_and_the_cpu_where_there_is_none() {
        assert_eq!(choose(configs::Device::Auto, 0, || Ok(1)).unwrap(), Device::Cuda(0));
        assert_eq!(choose(configs::Device::Auto, 0, || Err(NoCuda::Torch)).unwrap(), Device::Cpu);
        let never = || panic!("nobody looks for CUDA");
        assert_eq!(choose(configs::Device::Cpu, 0, never).unwrap(), Device::Cpu);
    }

    #[test]
    fn ranks_of_a_machine_have_its_gpus_in_turn() {
        let gpus: Vec<Device> =
            (0..3).map(|rank| choose(configs::Device::Cuda, rank, || Ok(2)).unwrap()).collect();
        assert_eq!(gpus, [Device::Cuda(0), Device::Cuda(1), Device::Cuda(0)]);
    }

    #[test]
    fn what_is_sent_to_the_cpu_is_there_already() {
        let host = Tensor::from_slice(&[1i64, 2]);
        assert_eq!(sent(&host, Device::Cpu).data_ptr(), host.data_ptr());
    }

    #[test]
    fn memory_of_tensors_that_are_gone_goes_back_to_the_system_when_it_is_asked_for() {
        let resident = || {
            let text = std::fs::read_to_string("/proc/self/statm").unwrap();
            4096 * text.split(' ').nth(1).unwrap().parse::<i64>().unwrap()
        };
        configure_process(1);
        // Less than a region, so that it is kept.
        let bytes = 16 << 20;
        let kept = Tensor::ones([bytes / 4], (Kind::Float, Device::Cpu));
        drop(kept.copy());
        let before = resident();
        drop(kept);
        trim_host_memory().unwrap();
        assert!(before - resident() > bytes, "{before} became {}", resident());
    }

    #[test]
    fn a_precision_asked_for_by_name_is_that_one() {
        assert_eq!(dtype(configs::Dtype::Bf16, Device::Cpu), Kind::BFloat16);
        assert_eq!(dtype(configs::Dtype::Fp32, Device::Cpu), Kind::Float);
        let auto = dtype(configs::Dtype::Auto, Device::Cpu);
        assert_eq!(auto == Kind::BFloat16, has_matrix_unit());
    }
}
