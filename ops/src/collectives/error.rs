//! What can go wrong between ranks, as errors for people.

/// A failure of a collective. Only `abort` may follow it, but for errors of `init`.
#[derive(Debug, thiserror::Error)]
pub enum CommError {
    /// Several processes that each believe to be alone.
    #[error(
        "{tasks} processes were started together ({evidence}), but they have no MPI world in common: each would \
         train on its own\nhint: start them with `srun --mpi=pmix` or with mpirun; for one rank inside a \
         larger job use `srun -n 1`"
    )]
    NoCommonWorld {
        /// Processes, as the environment has it.
        tasks: usize,
        /// What says so.
        evidence: String,
    },
    /// A number in the environment that is none.
    #[error("environment variable {name} = {got:?} is not a number\nhint: unset it, or start with mpirun")]
    Environment {
        /// The variable.
        name: &'static str,
        /// Its value.
        got: String,
    },
    /// A process joins MPI once.
    #[error("this process has joined MPI before\nhint: call init once and pass the communicator on")]
    Twice,
    /// A tensor that is no flat buffer.
    #[error("{operation} takes a contiguous one-dimensional {dtypes} buffer on {device:?}, got {got}")]
    Buffer {
        /// The operation.
        operation: &'static str,
        /// What it takes.
        dtypes: &'static str,
        /// Where it has to be.
        device: tch::Device,
        /// The tensor's dtype, shape and device.
        got: String,
    },
    /// A buffer of a dtype that no collective takes.
    #[error("buffers are fp32 or bf16, got {got:?}")]
    Kind {
        /// The dtype asked for.
        got: tch::Kind,
    },
    /// libtorch could not make a buffer.
    #[error("a buffer between ranks: {0}")]
    Torch(#[from] tch::TchError),
    /// A root or a shard size that does not fit the group.
    #[error("{operation}: {what}")]
    Argument {
        /// The operation.
        operation: &'static str,
        /// What does not fit what.
        what: String,
    },
    /// Control data beyond what MPI counts.
    #[error(
        "all_gather_bytes of {total} bytes over all ranks; at most {limit} can be sent\nhint: use tensors"
    )]
    TooLong {
        /// Bytes over all ranks.
        total: usize,
        /// Bytes that would do.
        limit: usize,
    },
    /// Ranks that called different collectives.
    #[error("ranks called different collectives: rank {rank} {got} where rank {by} {expected}")]
    Mismatch {
        /// The rank that differs.
        rank: usize,
        /// What it called.
        got: String,
        /// The rank it is compared with.
        by: usize,
        /// What that one called.
        expected: String,
    },
    /// MPI refused.
    #[error("{call} failed: {text}")]
    Mpi {
        /// The function of MPI.
        call: &'static str,
        /// MPI's words.
        text: String,
    },
    /// Some ranks compute on a GPU and others do not.
    #[error(
        "rank {rank} on {host} computes on {got}, and rank 0 on {expected}\n\
         hint: the log of that rank says why; set parallel.device to \"cpu\", or use hosts that are alike"
    )]
    Devices {
        /// The rank that differs.
        rank: usize,
        /// Its machine.
        host: String,
        /// Where it computes.
        got: &'static str,
        /// Where rank 0 does.
        expected: &'static str,
    },
    /// Two ranks on one GPU, which NCCL cannot serve.
    #[error(
        "ranks {first} and {second} have the same GPU of {host}, and each needs its own\n\
         hint: start at most as many ranks on a machine as it has GPUs; or set parallel.reproducible = true, \
         where ranks sum through host memory and may share one"
    )]
    SharedGpu {
        /// The one.
        first: usize,
        /// The other.
        second: usize,
        /// Their machine.
        host: String,
    },
    /// NCCL refused.
    #[error("{call} failed: {text}")]
    Nccl {
        /// The function of NCCL.
        call: &'static str,
        /// NCCL's words.
        text: String,
    },
    /// CUDA's streams refused.
    #[error("between ranks: {0}")]
    Device(#[from] crate::OpsError),
    /// The thread that talks to the other ranks could not be started.
    #[error("cannot start the thread that talks to the other ranks: {0}")]
    Thread(#[from] std::io::Error),
    /// The thread that talks to the other ranks is gone.
    #[error("the thread that talks to the other ranks has ended")]
    Ended,
}
