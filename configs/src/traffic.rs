//! What a step makes ranks send, as a formula: which segments, in which collective, how often.
//! Knows no network: bytes are those that an ideal algorithm sends, whatever they pass through.

use crate::{ModelConfig, Setup, Shard, segments};

/// Bytes that a rank sends in a step, the mean over the ranks.
///
/// Of a buffer of n bytes, W ranks each send (W - 1) / W n for a reduce-scatter or an all-gather (what
/// is not theirs to the owners, or their own slice to the W - 1 others), and twice as much for an
/// all-reduce, which is both.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StepTraffic {
    /// Gradients' sums for all.
    pub all_reduce: u64,
    /// Gradients' sums for their owners.
    pub reduce_scatter: u64,
    /// Weights for all.
    pub all_gather: u64,
}

impl StepTraffic {
    /// What a step of `setup.micro_steps` micro-steps makes each rank send. Weights travel as they
    /// compute, gradients in fp32, or in bf16 where that computes and the result may depend on the ranks.
    pub fn of(model: &ModelConfig, setup: &Setup) -> StepTraffic {
        StepTraffic::with_wire(model, setup, setup.wire_width())
    }

    /// The same where a gradient's number takes `wire_width` bytes on its way, whatever the setup asks for.
    pub(crate) fn with_wire(model: &ModelConfig, setup: &Setup, wire_width: u64) -> StepTraffic {
        let all = segments(model);
        let total: u64 = all.iter().map(|segment| segment.numel as u64).sum();
        // Backward needs the blocks again but for the last, and an embedding with a norm; tokens stay for the
        // head, and the last block and norm for their backward.
        let first_again = if model.has_plain_embedding() { 2 } else { 1 };
        let again: u64 = all[first_again..1 + model.n_layer].iter().map(|segment| segment.numel as u64).sum();
        let ranks = setup.world_size as u64;
        let once = |bytes: u64| (u128::from(bytes) * u128::from(ranks - 1) / u128::from(ranks)) as u64;
        let gradients = once(total * wire_width);
        let weights = |elements: u64| once(elements * setup.width());
        match setup.shard {
            Shard::None => StepTraffic { all_reduce: 2 * gradients, ..StepTraffic::default() },
            Shard::Optimizer => StepTraffic {
                reduce_scatter: gradients,
                all_gather: weights(total),
                ..StepTraffic::default()
            },
            Shard::Gradients => StepTraffic {
                reduce_scatter: setup.micro_steps * gradients,
                all_gather: weights(total),
                ..StepTraffic::default()
            },
            Shard::Parameters => StepTraffic {
                reduce_scatter: setup.micro_steps * gradients,
                all_gather: setup.micro_steps * weights(total + again),
                ..StepTraffic::default()
            },
        }
    }

    /// All of it.
    pub fn total(&self) -> u64 {
        self.all_reduce + self.reduce_scatter + self.all_gather
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(shard: Shard, world_size: usize, bf16: bool, micro_steps: u64, reproducible: bool) -> StepTraffic {
        let setup = Setup {
            world_size,
            shard,
            bf16,
            recompute: false,
            reproducible,
            micro_steps,
            micro_batch: 1,
            gradients_stay: true,
        };
        StepTraffic::of(&ModelConfig::default(), &setup)
    }

    /// GPT-2 Small in its flat buffers, and its blocks without the last.
    const ALL: u64 = 124_475_904;
    const AGAIN: u64 = 11 * 7_087_872;

    #[test]
    fn a_rank_alone_sends_nothing() {
        for shard in [Shard::None, Shard::Optimizer, Shard::Gradients, Shard::Parameters] {
            assert_eq!(of(shard, 1, false, 8, true).total(), 0);
        }
    }

    #[test]
    fn sharding_the_optimizer_sends_what_no_sharding_sends_and_less_in_bf16() {
        let none = of(Shard::None, 4, false, 8, true);
        assert_eq!(none.all_reduce, 2 * 3 * ALL); // 2 (W - 1) / W of 4 bytes
        assert_eq!(of(Shard::Optimizer, 4, false, 8, true).total(), none.total());
        let bf16 = of(Shard::Optimizer, 4, true, 8, true);
        assert_eq!((bf16.reduce_scatter, bf16.all_gather), (3 * ALL, 3 * ALL / 2));
        assert_eq!(of(Shard::None, 4, true, 8, false).total(), none.total() / 2);
    }

    #[test]
    fn sharded_gradients_leave_in_each_micro_step_and_sharded_weights_arrive_in_each() {
        let gradients = of(Shard::Gradients, 2, false, 3, true);
        assert_eq!((gradients.reduce_scatter, gradients.all_gather), (3 * 2 * ALL, 2 * ALL));
        let parameters = of(Shard::Parameters, 2, false, 3, true);
        assert_eq!((parameters.reduce_scatter, parameters.all_gather), (3 * 2 * ALL, 3 * 2 * (ALL + AGAIN)));
    }
}
