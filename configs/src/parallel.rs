//! `[parallel]`: where and how ranks compute, and what they share out among them. Names only: which
//! device or precision there is, is known where tensors are.

use serde::{Deserialize, Serialize};

/// Where tensors live.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Device {
    /// CUDA where a device answers, else the CPU.
    Auto,
    /// The CPU.
    Cpu,
    /// One GPU per rank; refused without one.
    Cuda,
}

/// What ranks do not all hold, but each a slice of (ZeRO; Rajbhandari et al. 2020). Each mode has the
/// slices of the one before it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Shard {
    /// Every rank holds everything.
    #[default]
    None,
    /// The two moments of AdamW, and the master weights beside bf16 ones.
    Optimizer,
    /// The gradients' sums too.
    Gradients,
    /// The parameters too: a segment's are gathered before each use.
    Parameters,
}

impl Shard {
    /// Whether a micro-batch's gradient leaves for the other ranks as soon as it is there, since no rank
    /// has room for the sum of all.
    pub fn leaves_at_once(self) -> bool {
        self >= Shard::Gradients
    }

    /// Whether the memory of a rank's sums of gradients stays from step to step: that of slices does, and that
    /// of whole sums where ranks may read them from each other. Elsewhere sums begin with a step's backward, in
    /// the place of activations that it has let go of.
    pub fn gradients_stay(self, world_size: usize, on_cpu: bool) -> bool {
        self.leaves_at_once() || (on_cpu && world_size > 1)
    }
}

/// What the backward pass computes again instead of keeping it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Recompute {
    /// Nothing.
    #[default]
    None,
    /// Every block, from its input.
    Full,
}

/// In which precision a rank computes. Master weights, moments and sums are fp32 either way.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Dtype {
    /// bf16 where that is faster: on CPUs with a matrix unit for it and on GPUs that multiply it; else fp32.
    #[default]
    Auto,
    /// bfloat16.
    Bf16,
    /// float32.
    Fp32,
}

/// `[parallel]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ParallelConfig {
    /// Where tensors live.
    pub device: Device,
    /// Compute threads of each rank.
    pub threads: usize,
    /// What each rank holds a slice of.
    #[serde(default)]
    pub shard: Shard,
    /// What backward computes again.
    #[serde(default)]
    pub recompute: Recompute,
    /// Precision of the computation.
    #[serde(default)]
    pub dtype: Dtype,
    /// Whether the result may not depend, in any bit, on how many ranks made it; by device when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reproducible: Option<bool>,
}

impl ParallelConfig {
    /// Whether the result may not depend on how many ranks made it: as configured, else yes on the CPU
    /// and no on CUDA.
    pub fn reproducible(&self, on_cpu: bool) -> bool {
        self.reproducible.unwrap_or(on_cpu)
    }

    /// Whether [`ParallelConfig::reproducible`] may turn out to hold, as far as can be known before
    /// the device is.
    pub(crate) fn may_be_reproducible(&self) -> bool {
        self.reproducible(self.device != Device::Cuda)
    }
}
