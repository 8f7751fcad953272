//! Kernels on a GPU: compiled or taken from disk, loaded into libtorch's context, launched on its current
//! stream. Where that cannot be it is said once, and never tried again. Knows no shapes.

use super::cache::Cache;
use super::nvrtc::{Nvrtc, Target};
use super::{FAMILIES, Family, Launch, Runner};
use crate::{OpsError, cuda, cuda_stream};
use cudarc::driver::{result, sys};
use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use tch::Device;

/// Does `work` with what runs a family's kernels on a device; `None` where they are not to be had.
pub(super) fn with<T>(
    family: Family,
    device: Device,
    work: impl FnOnce(&dyn Runner) -> Result<T, OpsError>,
) -> Result<Option<T>, OpsError> {
    #[cfg(test)]
    if super::host::stands_in(device) {
        return work(&super::host::Host).map(Some);
    }
    match loaded(family, device) {
        Some(gpu) => work(&*gpu).map(Some),
        None => Ok(None),
    }
}

/// Whether a family's kernels are to be had on a device.
pub(crate) fn there(family: Family, device: Device) -> bool {
    matches!(with(family, device, |_| Ok(())), Ok(Some(())))
}

/// A family of kernels, and whether a device takes it.
pub type Ready = (&'static str, bool);

/// Which kernels a device takes; compiles them if need be. On a CPU none.
pub fn ready(device: Device) -> Vec<Ready> {
    FAMILIES.map(|family| (family.name, there(family, device))).to_vec()
}

/// What is loaded, or that it could not be, of each family on each GPU.
type Table = HashMap<(&'static str, usize), Option<Arc<Gpu>>>;

fn loaded(family: Family, device: Device) -> Option<Arc<Gpu>> {
    static TABLE: OnceLock<Mutex<Table>> = OnceLock::new();
    let Device::Cuda(index) = device else { return None };
    let mut table = TABLE.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner);
    let entry = table.entry((family.name, index)).or_insert_with(|| match Gpu::load(family, index) {
        Ok(gpu) => Some(Arc::new(gpu)),
        Err(why) => {
            tracing::warn!(
                "no kernels of our own for {} on GPU {index}: {why}; libtorch's operations do it, in more passes\n\
                 hint: NVRTC comes with CUDA's libraries, which scripts/setup installs where nvidia-smi answers",
                family.name
            );
            None
        }
    });
    entry.clone()
}

/// A family's kernels on one GPU.
struct Gpu {
    index: usize,
    module: sys::CUmodule,
    blocks: usize,
    most_shared_bytes: usize,
    functions: Mutex<HashMap<String, Function>>,
}

#[derive(Clone, Copy)]
struct Function(sys::CUfunction);

// SAFETY: a handle that the driver owns until its module is unloaded, which is never; the driver's functions
// on it may be called from any thread.
unsafe impl Send for Function {}

// SAFETY: as for `Function`; the table of functions is behind a lock.
unsafe impl Send for Gpu {}
// SAFETY: as above.
unsafe impl Sync for Gpu {}

/// Shared memory that kernels declare themselves, at most.
const DECLARED_BYTES: usize = 2 << 10;

/// What a block may ask for without more ado.
const PLAIN_SHARED_BYTES: usize = 48 << 10;

impl Gpu {
    fn load(family: Family, index: usize) -> Result<Gpu, String> {
        use sys::CUdevice_attribute_enum::{
            CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN as SHARED,
            CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT as MULTIPROCESSORS,
        };
        let about = cuda::properties(index).ok_or("there is no such device")?;
        let nvrtc = Nvrtc::open(&cuda::folder())?;
        let capability = 10 * about.capability.0 + about.capability.1;
        let known = nvrtc.capabilities()?;
        let target = Target::of(capability, &known)
            .ok_or_else(|| format!("NVRTC does not know compute capability {capability}"))?;
        let (text, (major, minor)) = (family.text(), nvrtc.version()?);
        let (options, version) = (family.options(), format!("NVRTC {major}.{minor}"));
        let mut parts = vec![text.as_str(), version.as_str()];
        let option = target.option();
        parts.extend(options);
        parts.push(&option);
        let cache = Cache::of_user(|name| std::env::var(name).ok());
        let code = cache.get_or(&parts, || nvrtc.compile(&text, &options, target))?;

        let driver = |error: result::DriverError| format!("{error:?}");
        cuda_stream::set_device(index).map_err(|error| error.to_string())?;
        let device = result::device::get(index as i32).map_err(driver)?;
        // SAFETY: the driver is initialised (`properties`), and gave this device.
        let attribute = |which| unsafe { result::device::get_attribute(device, which) }.map_err(driver);
        let (multiprocessors, shared) = (attribute(MULTIPROCESSORS)?, attribute(SHARED)?);
        // SAFETY: machine code, or PTX that ends in a NUL, as NVRTC made it and as a digest has shown it to be
        // still; the device's context is current.
        let module = unsafe { result::module::load_data(code.as_ptr().cast()) }.map_err(driver)?;
        let most_shared_bytes = (shared as usize).saturating_sub(DECLARED_BYTES);
        let blocks = 4 * multiprocessors as usize;
        Ok(Gpu { index, module, blocks, most_shared_bytes, functions: Mutex::default() })
    }

    fn function(&self, name: &str) -> Result<sys::CUfunction, result::DriverError> {
        let mut functions = self.functions.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(function) = functions.get(name) {
            return Ok(function.0);
        }
        let symbol = CString::new(name).unwrap_or_default();
        // SAFETY: the module was loaded and is never unloaded.
        let function = unsafe { result::module::get_function(self.module, symbol) }?;
        functions.insert(name.to_owned(), Function(function));
        Ok(function)
    }

    fn start(&self, launch: &Launch<'_>, stream: *mut c_void) -> Result<(), result::DriverError> {
        use sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as MOST_SHARED;
        let function = self.function(&launch.kernel)?;
        if launch.shared_bytes > PLAIN_SHARED_BYTES - DECLARED_BYTES {
            // SAFETY: a function of a loaded module.
            unsafe {
                result::function::set_function_attribute(function, MOST_SHARED, launch.shared_bytes as i32)
            }?;
        }
        let mut words: Vec<u64> = launch.arguments.iter().map(|argument| argument.word()).collect();
        let mut arguments: Vec<*mut c_void> =
            words.iter_mut().map(|word| std::ptr::from_mut(word).cast()).collect();
        let [x, y] = launch.grid.map(|blocks| blocks as u32);
        // SAFETY: the driver copies the arguments before it returns. Their number and types are the kernel's,
        // as the same launches show on the host; addresses are those of tensors on this device whose shapes
        // were checked, and which libtorch gives to nothing that comes before this on the stream.
        unsafe {
            result::launch_kernel(
                function,
                (x, y, 1),
                (launch.threads as u32, 1, 1),
                launch.shared_bytes as u32,
                stream.cast(),
                &mut arguments,
            )
        }
    }
}

impl Runner for Gpu {
    fn blocks(&self) -> usize {
        self.blocks
    }

    fn most_shared_bytes(&self) -> usize {
        self.most_shared_bytes
    }

    fn run(&self, launch: &Launch<'_>) -> Result<(), OpsError> {
        cuda_stream::set_device(self.index)?;
        let stream = cuda_stream::current_stream(self.index)?;
        let failed = |error| OpsError::Kernel { kernel: launch.kernel.clone(), why: format!("{error:?}") };
        self.start(launch, stream).map_err(failed)
    }
}

#[cfg(test)]
mod tests {
    use super::super::NORM;
    use super::*;

    #[test]
    fn without_a_gpu_there_are_no_kernels_and_nothing_fails() {
        assert!(ready(Device::Cpu).iter().all(|(_, there)| !there));
        let none = with(NORM, Device::Cpu, |_| -> Result<(), OpsError> { panic!("there is no GPU") });
        assert!(none.unwrap().is_none());
        if cuda::open().is_err() {
            assert!(ready(Device::Cuda(0)).iter().all(|(_, there)| !there), "asked twice as well");
            assert_eq!(ready(Device::Cuda(0)).len(), 5);
        }
    }
}
