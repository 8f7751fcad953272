//! Kernels of our own for GPUs: compiled when they are first needed, kept on disk, launched on libtorch's
//! stream. A family of kernels is a file here, which knows shapes and launches, and one in `ops/kernels`.
//!
//! Every family has the same on libtorch's operations, in `by_torch`: what it is tested against, and what its
//! callers fall back to where there is no GPU, no NVRTC, or a kernel does not compile. Knows no model.

pub mod adamw;
mod cache;
pub mod cross_entropy;
mod device;
pub mod dropout;
pub mod gelu;
#[cfg(test)]
pub(crate) mod host;
pub mod norm;
mod nvrtc;

pub(crate) use device::there;
pub use device::{Ready, ready};

use crate::OpsError;
use tch::{Kind, Tensor};

/// Kernels that are compiled together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Family {
    pub(crate) name: &'static str,
    source: &'static str,
    /// Whether a product and the sum that it goes into may be rounded once.
    contracts: bool,
}

const GPU: &str = include_str!("../../kernels/gpu.cuh");
const COMMON: &str = include_str!("../../kernels/common.cuh");

macro_rules! family {
    ($name:literal, $contracts:literal) => {
        Family {
            name: $name,
            source: include_str!(concat!("../../kernels/", $name, ".cu")),
            contracts: $contracts,
        }
    };
}

pub(crate) const NORM: Family = family!("norm", true);
pub(crate) const GELU: Family = family!("gelu", true);
pub(crate) const CROSS_ENTROPY: Family = family!("cross_entropy", true);
pub(crate) const ADAMW: Family = family!("adamw", false);
pub(crate) const DROPOUT: Family = family!("dropout", true);

/// All of them.
pub(crate) const FAMILIES: [Family; 5] = [NORM, GELU, CROSS_ENTROPY, ADAMW, DROPOUT];

impl Family {
    /// What the compiler is given.
    fn text(self) -> String {
        [GPU, COMMON, self.source].concat()
    }

    /// How it is told to, beside the architecture.
    fn options(self) -> [&'static str; 2] {
        ["--std=c++17", if self.contracts { "--fmad=true" } else { "--fmad=false" }]
    }
}

/// An argument of a kernel.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Argument<'a> {
    /// The address of its first element.
    Of(&'a Tensor),
    /// No tensor: a null pointer.
    Nothing,
    Long(i64),
    Float(f32),
}

impl<'a> Argument<'a> {
    /// That of a tensor, if there is one.
    fn maybe(tensor: Option<&'a Tensor>) -> Argument<'a> {
        tensor.map_or(Argument::Nothing, Argument::Of)
    }

    /// As it lies in memory, on little-endian machines, which all with CUDA are: eight bytes, or the first four.
    fn word(self) -> u64 {
        match self {
            Argument::Of(tensor) => tensor.data_ptr() as u64,
            Argument::Nothing => 0,
            Argument::Long(value) => value.cast_unsigned(),
            Argument::Float(value) => u64::from(value.to_bits()),
        }
    }
}

/// A kernel with its arguments.
#[derive(Debug)]
pub(crate) struct Launch<'a> {
    pub(crate) kernel: String,
    /// Blocks, in two dimensions.
    pub(crate) grid: [usize; 2],
    /// Threads of a block, a multiple of 32.
    pub(crate) threads: usize,
    /// What blocks are given beside what they declare.
    pub(crate) shared_bytes: usize,
    pub(crate) arguments: Vec<Argument<'a>>,
}

/// What runs launches, one after the other.
pub(crate) trait Runner {
    /// Blocks that keep it busy.
    fn blocks(&self) -> usize;

    /// Bytes of shared memory that a block may ask for.
    fn most_shared_bytes(&self) -> usize;

    /// Puts a launch behind what was given before.
    fn run(&self, launch: &Launch<'_>) -> Result<(), OpsError>;
}

/// How many numbers a kernel reads at once, for rows of `width` elements that lie in `tensors`: 16 bytes of
/// them where rows begin at multiples of that.
fn at_once(width: i64, tensors: &[&Tensor]) -> i64 {
    let size = if tensors[0].kind() == Kind::BFloat16 { 2 } else { 4 };
    let aligned = tensors.iter().all(|tensor| (tensor.data_ptr() as usize).is_multiple_of(16));
    if aligned && width % (16 / size) == 0 { 16 / size } else { 1 }
}

/// A kernel's name for a dtype and numbers at once.
fn named(kernel: &str, kind: Kind, at_once: i64) -> String {
    let kind = if kind == Kind::BFloat16 { "bf16" } else { "f32" };
    format!("{kernel}_{kind}x{at_once}")
}

/// Refuses what a kernel would read wrongly: another size, dtype or device than `like`'s, or gaps.
fn check(op: &'static str, like: &Tensor, others: &[(&Tensor, &[i64], Kind)]) -> Result<(), OpsError> {
    let known = matches!(like.kind(), Kind::Float | Kind::BFloat16);
    for &(tensor, size, kind) in [(like, like.size().as_slice(), like.kind())].iter().chain(others) {
        let fits = known
            && tensor.size() == size
            && tensor.kind() == kind
            && tensor.device() == like.device()
            && tensor.is_contiguous();
        if !fits {
            let got = format!("{:?} {:?} on {:?}", tensor.kind(), tensor.size(), tensor.device());
            let expected = "contiguous fp32 or bf16 tensors of shapes that fit, on one device";
            return Err(OpsError::Argument { op, expected, got });
        }
    }
    Ok(())
}

/// Rows and width of `[..., width]`.
fn rows_of(tensor: &Tensor) -> [i64; 2] {
    let width = tensor.size().last().copied().unwrap_or(1);
    [if width == 0 { 0 } else { tensor.numel() as i64 / width }, width]
}
