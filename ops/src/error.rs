//! What can go wrong below the model, as errors for people.

use crate::cuda::NoCuda;

/// A failure of a native operation.
#[derive(Debug, thiserror::Error)]
pub enum OpsError {
    /// libtorch refused; its message says what.
    #[error("libtorch: {0}")]
    Torch(String),
    /// A tensor that an operation cannot take.
    #[error("{op} takes {expected}, got {got}")]
    Argument {
        /// The operation.
        op: &'static str,
        /// What it takes.
        expected: &'static str,
        /// What it was given.
        got: String,
    },
    /// A kernel of our own that a GPU would not take.
    #[error(
        "the kernel {kernel}: {why}\nhint: an error of work before it can show here; CUDA_LAUNCH_BLOCKING=1 \
             makes each show where it happens"
    )]
    Kernel {
        /// Its name.
        kernel: String,
        /// CUDA's words.
        why: String,
    },
    /// CUDA was asked for by name, and there is none.
    #[error("parallel.device = \"cuda\": {0}; or set parallel.device = \"cpu\" or \"auto\"")]
    NoCuda(#[from] NoCuda),
}

impl From<tch::TchError> for OpsError {
    fn from(error: tch::TchError) -> OpsError {
        OpsError::Torch(error.to_string())
    }
}
