//! CUDA, opened at run time: whether a driver and a device answer, and the library of libtorch that
//! computes on it. Nothing of CUDA is linked, so one binary serves machines with and without.
//! Knows no tensors and no ranks.

use cudarc::driver::{result, sys};
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// Why there is no CUDA here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoCuda {
    /// No driver.
    #[error(
        "libcuda.so.1, which comes with NVIDIA's driver, is not on this machine\n\
         hint: where there is a GPU, nvidia-smi lists it once its driver is installed; in a container, start \
         it with the GPUs (docker run --gpus all)"
    )]
    Driver,
    /// A driver without a device.
    #[error(
        "the driver finds no device: {0}\n\
         hint: nvidia-smi lists the devices; CUDA_VISIBLE_DEVICES hides some from a process"
    )]
    Device(String),
    /// libtorch was installed without its CUDA part.
    #[error(
        "libtorch_cuda.so is not in {}, where libtorch_cpu.so is\n\
         hint: run scripts/setup on this machine: where nvidia-smi answers it installs CUDA's libraries too",
        folder.display()
    )]
    Library {
        /// Where it was looked for.
        folder: PathBuf,
    },
    /// The library is there and cannot be used.
    #[error(
        "{} cannot be opened: {why}\n\
         hint: it needs the libraries of CUDA 13 beside it; scripts/setup installs them", path.display()
    )]
    Open {
        /// The library.
        path: PathBuf,
        /// The loader's words.
        why: String,
    },
    /// The library is open and cannot compute.
    #[error(
        "libtorch_cuda.so is open and finds no device it can use\n\
         hint: it needs a driver for CUDA 13, that is 580 or newer; nvidia-smi says which one there is"
    )]
    Torch,
}

/// Opens CUDA and says how many devices there are, at least one. Before the process makes its first
/// tensor: libtorch looks once for the part of it that knows CUDA. Later calls repeat the answer.
///
/// # Errors
/// Why there is none.
pub fn open() -> Result<usize, NoCuda> {
    static ANSWER: OnceLock<Result<usize, NoCuda>> = OnceLock::new();
    ANSWER.get_or_init(open_once).clone()
}

fn open_once() -> Result<usize, NoCuda> {
    driver_devices()?;
    open_library(&folder())?;
    match tch::Cuda::device_count() {
        devices @ 1.. if tch::Cuda::is_available() => Ok(devices as usize),
        _ => Err(NoCuda::Torch),
    }
}

/// Devices that the driver finds, at least one.
fn driver_devices() -> Result<usize, NoCuda> {
    // SAFETY: opens and closes the driver's library by its well-known names; its initialisers may run.
    if !unsafe { sys::is_culib_present() } {
        return Err(NoCuda::Driver);
    }
    let count = result::init().and_then(|()| result::device::get_count());
    match count {
        Ok(devices @ 1..) => Ok(devices as usize),
        Ok(_) => Err(NoCuda::Device("it counts none".into())),
        Err(error) => Err(NoCuda::Device(format!("{error:?}"))),
    }
}

/// The folder of libtorch's libraries; empty if there is none.
pub(crate) fn folder() -> PathBuf {
    libtorch_folder(&std::fs::read_to_string("/proc/self/maps").unwrap_or_default())
}

/// The folder of the libtorch_cpu.so that this process runs on, with links followed, given the text of
/// /proc/self/maps; empty if it is not mapped.
fn libtorch_folder(maps: &str) -> PathBuf {
    let path = maps.lines().find_map(|line| {
        let path = Path::new(line.get(line.find('/')?..)?);
        path.ends_with("libtorch_cpu.so").then_some(path)
    });
    path.and_then(Path::parent).unwrap_or(Path::new("")).to_path_buf()
}

/// Opens libtorch_cuda.so for good; it registers itself with libtorch while it is opened.
fn open_library(folder: &Path) -> Result<(), NoCuda> {
    let path = folder.join("libtorch_cuda.so");
    if !path.exists() {
        return Err(NoCuda::Library { folder: folder.to_path_buf() });
    }
    // SAFETY: runs the library's initialisers, which are made to run whenever it is loaded. Its symbols
    // become global, as they are where it is linked. It is the one that was built with libtorch_cpu.so,
    // beside which it lies.
    match unsafe { Library::open(Some(&path), RTLD_NOW | RTLD_GLOBAL) } {
        Ok(library) => {
            std::mem::forget(library);
            Ok(())
        }
        Err(error) => Err(NoCuda::Open { path, why: with_sources(&error) }),
    }
}

/// An error with what caused it: the loader says why in the sources.
pub(crate) fn with_sources(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {}", with_sources(source)),
        None => error.to_string(),
    }
}

/// What a device says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Properties {
    /// Such as `NVIDIA H100 80GB HBM3`.
    pub name: String,
    /// Compute capability, major and minor.
    pub capability: (i32, i32),
    /// Bytes of its memory.
    pub memory_bytes: usize,
}

/// What device `index` says of itself; `None` without CUDA or such a device.
pub fn properties(index: usize) -> Option<Properties> {
    use sys::CUdevice_attribute_enum::{
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as MAJOR,
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as MINOR,
    };
    open().ok()?;
    let device = result::device::get(i32::try_from(index).ok()?).ok()?;
    // SAFETY: the driver is initialised (`open`), and gave this device.
    let attribute = |which| unsafe { result::device::get_attribute(device, which) }.ok();
    Some(Properties {
        name: result::device::get_name(device).ok()?,
        capability: (attribute(MAJOR)?, attribute(MINOR)?),
        // SAFETY: as above.
        memory_bytes: unsafe { result::device::total_mem(device) }.ok()?,
    })
}

/// What tells a device from every other, whatever its index in this process: its UUID. `None` without
/// CUDA or such a device.
pub fn uuid(index: usize) -> Option<String> {
    open().ok()?;
    let device = result::device::get(i32::try_from(index).ok()?).ok()?;
    let uuid = result::device::get_uuid(device).ok()?;
    Some(uuid.bytes.iter().map(|byte| format!("{:02x}", byte.cast_unsigned())).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libtorch_is_found_among_what_is_mapped() {
        let maps = "7f0000000000-7f0000001000 r-xp 00000000 08:01 42   /usr/lib/libc.so.6\n\
                    7f0000002000-7f0000003000 r--p 00000000 08:01 43   /opt/a b/torch/lib/libtorch_cpu.so\n\
                    7f0000004000-7f0000005000 rw-p 00000000 00:00 0    [heap]\n";
        assert_eq!(libtorch_folder(maps), Path::new("/opt/a b/torch/lib"));
        assert_eq!(libtorch_folder("7f00-7f01 rw-p 00000000 00:00 0 [heap]\n"), Path::new(""));
        let own = std::fs::read_to_string("/proc/self/maps").unwrap();
        tch::set_num_threads(1); // so that the library is needed
        assert!(libtorch_folder(&own).join("libtorch_cpu.so").exists());
    }

    #[test]
    fn a_missing_library_is_named_with_the_place_and_a_hint() {
        let folder = tempfile::tempdir().unwrap();
        let error = open_library(folder.path()).unwrap_err().to_string();
        assert!(error.contains(folder.path().to_str().unwrap()), "{error}");
        assert!(error.contains("hint: run scripts/setup"), "{error}");
    }

    #[test]
    fn a_library_that_does_not_load_says_what_the_loader_says() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("libtorch_cuda.so"), b"no library").unwrap();
        let error = open_library(folder.path()).unwrap_err().to_string();
        assert!(error.contains("libtorch_cuda.so cannot be opened") && error.contains("hint:"), "{error}");
        assert!(error.contains("file too short") || error.contains("ELF"), "{error}");
    }

    #[test]
    fn asking_twice_gives_one_answer() {
        assert_eq!(open(), open());
        if open().is_err() {
            assert_eq!(properties(0), None);
        }
    }
}
