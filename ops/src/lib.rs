//! Everything native: flat buffers, attention, the fused loss, AdamW, the device and collectives.
//!
//! The only crate with FFI, and with the data loader's memory map the only one with `unsafe`.
//! Refuses to know models, runs, files and configuration beyond the numbers it is given.

mod adamw;
mod attention;
pub mod collectives;
pub mod cuda;
pub mod cuda_memory;
mod cuda_stream;
pub mod device;
mod device_adamw;
mod dropout;
mod error;
mod exact_sum;
mod flat;
pub mod gpu_health;
mod gradient_tree;
pub mod kernels;
mod linear;
mod loss;
mod mlp;
mod norm;
mod outside;
mod shim;

pub use adamw::{AdamWSlice, AdamWStep, Moments, NORM_CHUNK, Squares, adamw};
pub use attention::{attention, attention_with_mask};
pub use dropout::{Dropout, dropped};
pub use error::OpsError;
pub use exact_sum::ExactSum;
pub use flat::{Weights, initial_values, view};
pub use gradient_tree::GradientTree;
pub use linear::Layer;
pub use loss::{Bias, Head};
pub use mlp::{Gelu, gelu, mlp};
pub use norm::{LayerNorm, add_norm};
pub use shim::{backward, cross_entropy, mapped_zeros};

#[cfg(test)]
mod tests {
    use configs::ModelConfig;

    /// One block of eight channels.
    pub(crate) fn small_model() -> ModelConfig {
        ModelConfig { n_layer: 1, n_head: 1, n_embd: 8, seq_len: 4, vocab_size: 10, ..ModelConfig::default() }
    }
}
