//! What can go wrong below the model, as errors for people.

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
    /// A device that is not to be had.
    #[error("parallel.device = \"cuda\": {why}\nhint: set parallel.device = \"cpu\" or \"auto\"")]
    NoCuda {
        /// Why not.
        why: &'static str,
    },
}

impl From<tch::TchError> for OpsError {
    fn from(error: tch::TchError) -> OpsError {
        OpsError::Torch(error.to_string())
    }
}
