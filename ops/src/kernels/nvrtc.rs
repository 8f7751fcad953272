//! NVRTC, NVIDIA's compiler as a library: found at run time, its errors with its own words.
//!
//! `cudarc` has it too, and looks for it by other names than those it has beside libtorch. Knows no kernels
//! and no devices but by number.

use crate::cuda::with_sources;
use libloading::os::unix::Library;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::Path;

type Program = *mut c_void;
type Read = unsafe extern "C" fn(Program, *mut c_char) -> c_int;
type Size = unsafe extern "C" fn(Program, *mut usize) -> c_int;
type Create = unsafe extern "C" fn(
    *mut Program,
    *const c_char,
    *const c_char,
    c_int,
    *const *const c_char,
    *const *const c_char,
) -> c_int;

/// What is compiled for: a compute capability, such as 90 for 9.0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Target {
    /// Machine code of this one.
    Machine(i32),
    /// PTX, which a driver compiles for this one and later ones.
    Ptx(i32),
}

impl Target {
    /// The best that a compiler which knows `known` has for a device.
    pub(super) fn of(capability: i32, known: &[i32]) -> Option<Target> {
        let newest = known.iter().copied().filter(|&known| known <= capability).max()?;
        Some(if newest == capability { Target::Machine(newest) } else { Target::Ptx(newest) })
    }

    /// As the compiler's option.
    pub(super) fn option(self) -> String {
        match self {
            Target::Machine(capability) => format!("--gpu-architecture=sm_{capability}"),
            Target::Ptx(capability) => format!("--gpu-architecture=compute_{capability}"),
        }
    }
}

/// The functions that are used.
pub(super) struct Nvrtc {
    create: Create,
    compile: unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int,
    destroy: unsafe extern "C" fn(*mut Program) -> c_int,
    log: (Size, Read),
    machine: (Size, Read),
    ptx: (Size, Read),
    version: unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int,
    capabilities: (unsafe extern "C" fn(*mut c_int) -> c_int, unsafe extern "C" fn(*mut c_int) -> c_int),
    error_string: unsafe extern "C" fn(c_int) -> *const c_char,
    _library: Library,
}

impl Nvrtc {
    /// Finds it: by its name, or as what libtorch's part for it needs, which is in `libtorch_folder`.
    ///
    /// # Errors
    /// What the loader says.
    pub(super) fn open(libtorch_folder: &Path) -> Result<Nvrtc, String> {
        let beside = libtorch_folder.join("libcaffe2_nvrtc.so");
        let mut refused = String::new();
        for name in [Path::new("libnvrtc.so.13"), Path::new("libnvrtc.so.12"), &beside] {
            // SAFETY: runs the initialisers of NVRTC, or of libtorch's library that loads it, which are made
            // to run whenever they are loaded.
            match unsafe { Library::new(name) } {
                Ok(library) => return Nvrtc::of(library),
                Err(error) => refused = with_sources(&error),
            }
        }
        Err(refused)
    }

    fn of(library: Library) -> Result<Nvrtc, String> {
        Ok(Nvrtc {
            create: symbol(&library, "nvrtcCreateProgram")?,
            compile: symbol(&library, "nvrtcCompileProgram")?,
            destroy: symbol(&library, "nvrtcDestroyProgram")?,
            log: (symbol(&library, "nvrtcGetProgramLogSize")?, symbol(&library, "nvrtcGetProgramLog")?),
            machine: (symbol(&library, "nvrtcGetCUBINSize")?, symbol(&library, "nvrtcGetCUBIN")?),
            ptx: (symbol(&library, "nvrtcGetPTXSize")?, symbol(&library, "nvrtcGetPTX")?),
            version: symbol(&library, "nvrtcVersion")?,
            capabilities: (
                symbol(&library, "nvrtcGetNumSupportedArchs")?,
                symbol(&library, "nvrtcGetSupportedArchs")?,
            ),
            error_string: symbol(&library, "nvrtcGetErrorString")?,
            _library: library,
        })
    }

    /// Such as 13.0.
    pub(super) fn version(&self) -> Result<(i32, i32), String> {
        let (mut major, mut minor) = (0, 0);
        // SAFETY: writes two numbers.
        self.checked(unsafe { (self.version)(&mut major, &mut minor) })?;
        Ok((major, minor))
    }

    /// The compute capabilities that it knows.
    pub(super) fn capabilities(&self) -> Result<Vec<i32>, String> {
        let mut count = 0;
        // SAFETY: writes one number.
        self.checked(unsafe { (self.capabilities.0)(&mut count) })?;
        let mut known = vec![0; usize::try_from(count).unwrap_or(0)];
        // SAFETY: writes as many numbers as it has just said there are.
        self.checked(unsafe { (self.capabilities.1)(known.as_mut_ptr()) })?;
        Ok(known)
    }

    /// Compiles CUDA C++ to what a driver loads.
    ///
    /// # Errors
    /// The compiler's words.
    pub(super) fn compile(&self, text: &str, options: &[&str], target: Target) -> Result<Vec<u8>, String> {
        let c = |text: &str| CString::new(text).map_err(|error| error.to_string());
        let source = c(text)?;
        let option = target.option();
        let options: Vec<CString> =
            options.iter().copied().chain([option.as_str()]).map(c).collect::<Result<_, _>>()?;
        let options: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
        let mut program: Program = std::ptr::null_mut();
        let none = std::ptr::null();
        // SAFETY: the text is NUL-terminated and outlives the program; there are no headers.
        self.checked(unsafe {
            (self.create)(&mut program, source.as_ptr(), none, 0, none.cast(), none.cast())
        })?;
        // SAFETY: a program that was just made, and as many options as are counted.
        let compiled = unsafe { (self.compile)(program, options.len() as c_int, options.as_ptr()) };
        let outcome = match self.checked(compiled) {
            Ok(()) if matches!(target, Target::Machine(_)) => self.read(program, self.machine),
            Ok(()) => self.read(program, self.ptx),
            Err(error) => {
                let log = self.read(program, self.log).unwrap_or_default();
                Err(format!("{error}: {}", String::from_utf8_lossy(&log).trim_end_matches('\0').trim_end()))
            }
        };
        // SAFETY: the program is not used after this.
        unsafe { (self.destroy)(&mut program) };
        outcome
    }

    /// Text or code of a program, by the functions that say how long it is and what.
    fn read(&self, program: Program, (size, read): (Size, Read)) -> Result<Vec<u8>, String> {
        let mut bytes = 0;
        // SAFETY: a live program; one number is written.
        self.checked(unsafe { size(program, &mut bytes) })?;
        let mut text = vec![0u8; bytes];
        // SAFETY: as many bytes are written as it has just said there are.
        self.checked(unsafe { read(program, text.as_mut_ptr().cast()) })?;
        Ok(text)
    }

    fn checked(&self, result: c_int) -> Result<(), String> {
        if result == 0 {
            return Ok(());
        }
        // SAFETY: returns text of its own, NUL-terminated.
        let text = unsafe { CStr::from_ptr((self.error_string)(result)) };
        Err(text.to_string_lossy().into_owned())
    }
}

fn symbol<T: Copy>(library: &Library, name: &str) -> Result<T, String> {
    // SAFETY: the types of the fields are those of nvrtc.h, which has kept them since CUDA 11.2; the library
    // lives as long as the value that holds the function.
    unsafe { library.get::<T>(name.as_bytes()) }.map(|symbol| *symbol).map_err(|error| with_sources(&error))
}

#[cfg(test)]
mod tests {
    use super::super::{FAMILIES, Family};
    use super::*;
    use std::io::Write;

    /// NVRTC, or a word on why a test says nothing.
    fn nvrtc() -> Option<Nvrtc> {
        let found = Nvrtc::open(Path::new(""));
        if let Err(why) = &found {
            assert!(why.contains("nvrtc"), "{why}");
            writeln!(std::io::stderr(), "skipped: no NVRTC: {why}").unwrap();
        }
        found.ok()
    }

    /// The kernels that a family's source has.
    fn kernels(family: Family) -> Vec<String> {
        let begins = |line: &str| line.trim_start().starts_with("PHX_KERNEL void ");
        let mut found = Vec::new();
        for line in family.source.lines().filter(|line| begins(line)) {
            let after = line.trim_start().trim_start_matches("PHX_KERNEL void ");
            let name = after.split('(').next().unwrap_or_default();
            match name.strip_suffix("##name") {
                None => found.push(name.to_owned()),
                Some(stem) if family == super::super::DROPOUT => {
                    found.extend(["f32", "bf16"].map(|kind| format!("{stem}{kind}")));
                }
                Some(stem) => {
                    let variants = ["f32x1", "f32x4", "bf16x1", "bf16x8"];
                    found.extend(variants.map(|variant| format!("{stem}{variant}")));
                }
            }
        }
        found
    }

    #[test]
    fn every_kernel_compiles_for_ampere_hopper_and_blackwell() {
        let Some(nvrtc) = nvrtc() else { return };
        let known = nvrtc.capabilities().unwrap();
        for family in FAMILIES {
            let names = kernels(family);
            assert!(!names.is_empty(), "{}", family.name);
            for capability in [80, 90, 100] {
                assert_eq!(Target::of(capability, &known), Some(Target::Machine(capability)));
                let ptx = nvrtc.compile(&family.text(), &family.options(), Target::Ptx(capability)).unwrap();
                let ptx = String::from_utf8(ptx).unwrap();
                for name in &names {
                    assert!(ptx.contains(&format!(".entry {name}(")), "no {name} for {capability}");
                }
                assert_eq!(ptx.matches(".entry ").count(), names.len(), "{}", family.name);
            }
            let code = nvrtc.compile(&family.text(), &family.options(), Target::Machine(90)).unwrap();
            assert_eq!(&code[..4], b"\x7fELF", "{}", family.name);
        }
    }

    #[test]
    fn what_does_not_compile_has_the_compilers_words() {
        let Some(nvrtc) = nvrtc() else { return };
        assert!(nvrtc.version().unwrap() >= (12, 0));
        let error = nvrtc.compile("int x = nowhere;", &[], Target::Ptx(90)).unwrap_err();
        assert!(error.contains("NVRTC_ERROR_COMPILATION") && error.contains("nowhere"), "{error}");
    }

    #[test]
    fn a_device_gets_machine_code_of_its_own_or_the_newest_ptx_before_it() {
        let known = [75, 80, 90, 100];
        assert_eq!(Target::of(90, &known), Some(Target::Machine(90)));
        assert_eq!(Target::of(89, &known), Some(Target::Ptx(80)));
        assert_eq!(Target::of(120, &known), Some(Target::Ptx(100)));
        assert_eq!(Target::of(70, &known), None);
        assert_eq!(Target::Ptx(80).option(), "--gpu-architecture=compute_80");
    }
}
