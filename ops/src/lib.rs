//! Everything native: flat buffers, attention, the fused loss, AdamW, the device and collectives.
//!
//! The only crate with FFI, and with the data loader's memory map the only one with `unsafe`.
//! Refuses to know models, runs, files and configuration beyond the numbers it is given.

mod adamw;
mod attention;
pub mod collectives;
pub mod cuda;
mod cuda_stream;
pub mod device;
mod error;
mod flat;
mod gradient_tree;
mod loss;
mod shim;

pub use adamw::{AdamWStep, Moments, NORM_CHUNK, adamw, sum_squares};
pub use attention::attention;
pub use error::OpsError;
pub use flat::FlatSegment;
pub use gradient_tree::{GradientTree, tree_total};
pub use loss::Head;
pub use shim::backward;
