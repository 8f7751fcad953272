//! What ranks do to a flat buffer together, as values, and which arguments fit.
//! Knows neither tensors nor how anything travels.

use super::CommError;
use std::ops::Range;

/// A collective operation on a flat buffer, in place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Every rank ends with the sum over ranks. fp32 buffers.
    AllReduce {
        /// How contributions and sums travel.
        wire: Wire,
    },
    /// Rank r ends with the sum over ranks in its shard; the rest of its buffer is left unspecified.
    /// fp32 buffers.
    ReduceScatter {
        /// Elements per shard; rank r's is [`shard`] r of the buffer.
        shard_numel: usize,
        /// How contributions travel; the sums stay where they are taken.
        wire: Wire,
    },
    /// Every rank ends with all shards, each as its owner had it. fp32 or bf16 buffers.
    AllGather {
        /// Elements per shard; rank r's is [`shard`] r of the buffer.
        shard_numel: usize,
    },
    /// Every rank ends with the root's buffer. fp32 or bf16 buffers.
    Broadcast {
        /// The rank that gives.
        root: usize,
    },
}

/// How the numbers of a sum travel; they are added in fp32 either way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Wire {
    /// As they are.
    #[default]
    Fp32,
    /// Half the bytes: every rank's contribution is rounded to bf16, to nearest even, its own as well, so
    /// that the result does not depend on who adds what; what several ranks of a node have summed is
    /// rounded again where it leaves the node; and the sum of an all-reduce is rounded once more, the
    /// same for all ranks. On one rank alone nothing travels and nothing is rounded.
    Bf16,
}

/// The elements of shard `rank` of a buffer of `numel` elements in shards of `shard_numel`; the last
/// ones may be short or empty.
pub fn shard(numel: usize, shard_numel: usize, rank: usize) -> Range<usize> {
    let edge = |rank: usize| rank.saturating_mul(shard_numel).min(numel);
    edge(rank)..edge(rank + 1)
}

impl Operation {
    /// MPI's word for it.
    pub fn name(self) -> &'static str {
        match self {
            Operation::AllReduce { .. } => "all_reduce",
            Operation::ReduceScatter { .. } => "reduce_scatter",
            Operation::AllGather { .. } => "all_gather",
            Operation::Broadcast { .. } => "broadcast",
        }
    }

    /// Whether numbers are added, which takes fp32, or only copied.
    pub(super) fn adds(self) -> bool {
        matches!(self, Operation::AllReduce { .. } | Operation::ReduceScatter { .. })
    }

    /// How its sums travel.
    pub(super) fn wire(self) -> Wire {
        match self {
            Operation::AllReduce { wire } | Operation::ReduceScatter { wire, .. } => wire,
            Operation::AllGather { .. } | Operation::Broadcast { .. } => Wire::Fp32,
        }
    }

    /// Whether its arguments fit a buffer of `numel` elements and the number of ranks.
    pub(super) fn check(self, numel: usize, world_size: usize) -> Result<(), CommError> {
        match self {
            Operation::AllReduce { .. } => Ok(()),
            Operation::Broadcast { root } => check_root(self.name(), root, world_size),
            Operation::ReduceScatter { shard_numel, .. } | Operation::AllGather { shard_numel } => {
                if shard_numel.saturating_mul(world_size) >= numel {
                    return Ok(());
                }
                let least = numel.div_ceil(world_size);
                let what = format!(
                    "shards of {shard_numel} elements on {world_size} ranks do not cover {numel} elements\n\
                     hint: shards of at least {least} do"
                );
                Err(CommError::Argument { operation: self.name(), what })
            }
        }
    }
}

/// Refuses a root that is no rank.
pub(super) fn check_root(operation: &'static str, root: usize, world_size: usize) -> Result<(), CommError> {
    if root < world_size {
        return Ok(());
    }
    let what = format!("root {root} is no rank; there are {world_size}");
    Err(CommError::Argument { operation, what })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_cover_a_buffer_once_and_may_end_early() {
        let ranges: Vec<_> = (0..4).map(|rank| shard(10, 4, rank)).collect();
        assert_eq!(ranges, [0..4, 4..8, 8..10, 10..10]);
    }
}
