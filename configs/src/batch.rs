//! Batch arithmetic: from tokens of one step to sequences, micro-steps and sample numbers. Which batch a
//! step has is in `ramp`.
//! The user gives tokens and the micro-batch; accumulation is derived and a remainder refused.

use crate::Shard;
use std::ops::Range;

/// A batch that the ranks cannot share evenly.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{} = {got} is no multiple of {unit} (micro_batch {micro_batch} x seq_len {seq_len} x {world_size} ranks)\n\
     hint: {}", subject(*.ramp_step), hint(*.lower, *.upper, *.ranks)
)]
pub struct BatchError {
    /// Which batch: the full one, or the one that a ramp has from this step on.
    pub ramp_step: Option<u64>,
    /// Its tokens.
    pub got: u64,
    /// Tokens of one micro-step over all ranks; the batch must be a multiple.
    pub unit: u64,
    /// Sequences per rank and pass.
    pub micro_batch: usize,
    /// Tokens per sequence.
    pub seq_len: usize,
    /// Ranks.
    pub world_size: usize,
    /// The nearest smaller batch that works, if there is one.
    pub lower: Option<u64>,
    /// The nearest larger batch that works, if there is one.
    pub upper: Option<u64>,
    /// The nearest smaller number of ranks that works with this batch, if there is one.
    pub ranks: Option<u64>,
}

fn subject(ramp_step: Option<u64>) -> String {
    match ramp_step {
        None => "batch.global_batch_tokens".to_string(),
        Some(0) => "batch.ramp_start_tokens".to_string(),
        Some(step) => format!("the batch of step {} on, grown from batch.ramp_start_tokens,", step + 1),
    }
}

fn hint(lower: Option<u64>, upper: Option<u64>, ranks: Option<u64>) -> String {
    let batches = nearest(lower, upper);
    match ranks {
        Some(1) => format!("{batches}; with this batch, 1 rank does"),
        Some(ranks) => format!("{batches}; with this batch, {ranks} ranks do"),
        None => batches,
    }
}

/// The values that work, in words.
pub(crate) fn nearest(lower: Option<u64>, upper: Option<u64>) -> String {
    match (lower, upper) {
        (Some(lower), Some(upper)) => format!("{lower} and {upper} work"),
        (None, Some(upper)) => format!("the smallest that works is {upper}"),
        (Some(lower), None) => format!("the largest that works is {lower}"),
        (None, None) => "no other works".to_string(),
    }
}

/// Which micro-batches a rank computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Leaves {
    /// Rank r has the r-th of W runs: a subtree of the sum over micro-batches, so that a rank adds up
    /// its own and the ranks' sums meet once, at the end of the step.
    Contiguous,
    /// Rank r has those congruent to r modulo W: the ranks' gradients meet in every micro-step, and
    /// what a rank adds up are sums over all ranks.
    Interleaved,
}

impl Leaves {
    /// As the engine needs them: interleaved where gradients are sharded.
    pub fn of(shard: Shard) -> Leaves {
        if shard.leaves_at_once() { Leaves::Interleaved } else { Leaves::Contiguous }
    }
}

/// How one step's samples fall on ranks and micro-steps.
///
/// The step has M micro-batches, the leaves of the tree in which gradients are summed; each of W ranks
/// computes M/W of them. Micro-batch m holds the samples `first + m micro_batch ..`, so that which
/// samples a step sees does not depend on W.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BatchPlan {
    /// Sequences per rank and pass, B.
    pub micro_batch: usize,
    /// Tokens per sequence, T.
    pub seq_len: usize,
    /// Micro-batches per step over all ranks, M.
    pub micro_batches: u64,
    /// Micro-steps of each rank per step, M/W.
    pub grad_accum_steps: u64,
    /// Which micro-batches a rank has.
    pub leaves: Leaves,
}

impl BatchPlan {
    /// The plan of a batch on `world_size` ranks, each with a contiguous run of micro-batches.
    ///
    /// # Errors
    /// A batch that is no multiple of a micro-step over all ranks.
    pub fn new(
        global_batch_tokens: u64,
        micro_batch: usize,
        seq_len: usize,
        world_size: usize,
    ) -> Result<BatchPlan, BatchError> {
        let micro_tokens = micro_batch as u64 * seq_len as u64;
        let unit = micro_tokens.saturating_mul(world_size as u64);
        if global_batch_tokens == 0 || !global_batch_tokens.is_multiple_of(unit) {
            let below = global_batch_tokens / unit * unit;
            return Err(BatchError {
                ramp_step: None,
                got: global_batch_tokens,
                unit,
                micro_batch,
                seq_len,
                world_size,
                lower: Some(below).filter(|&below| below > 0),
                upper: Some(below + unit),
                ranks: fewer_ranks(global_batch_tokens, micro_tokens, world_size),
            });
        }
        Ok(BatchPlan {
            micro_batch,
            seq_len,
            micro_batches: global_batch_tokens / micro_tokens,
            grad_accum_steps: global_batch_tokens / unit,
            leaves: Leaves::Contiguous,
        })
    }

    /// The same with other micro-batches on each rank.
    pub fn with_leaves(self, leaves: Leaves) -> BatchPlan {
        BatchPlan { leaves, ..self }
    }

    /// Ranks, W.
    pub fn world_size(&self) -> u64 {
        self.micro_batches / self.grad_accum_steps
    }

    /// Tokens per step over all ranks.
    pub fn global_tokens(&self) -> u64 {
        self.samples_per_step() * self.seq_len as u64
    }

    /// Samples per step over all ranks.
    pub fn samples_per_step(&self) -> u64 {
        self.micro_batches * self.micro_batch as u64
    }

    /// Which of the step's micro-batches rank `rank` computes in its micro-step `micro_step`.
    pub fn leaf(&self, rank: usize, micro_step: u64) -> u64 {
        match self.leaves {
            Leaves::Contiguous => rank as u64 * self.grad_accum_steps + micro_step,
            Leaves::Interleaved => micro_step * self.world_size() + rank as u64,
        }
    }

    /// The samples of rank `rank`'s micro-step `micro_step`, in a step that starts at sample `first`.
    pub fn samples(&self, first: u64, rank: usize, micro_step: u64) -> Range<u64> {
        let start = first + self.leaf(rank, micro_step) * self.micro_batch as u64;
        start..start + self.micro_batch as u64
    }
}

/// The largest number of ranks below `world_size` that shares a batch.
fn fewer_ranks(batch_tokens: u64, micro_tokens: u64, world_size: usize) -> Option<u64> {
    let micro_batches =
        Some(batch_tokens / micro_tokens).filter(|m| m * micro_tokens == batch_tokens && *m > 0)?;
    (1..world_size as u64).rev().find(|ranks| micro_batches.is_multiple_of(*ranks))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accumulation_is_what_is_left_to_do() {
        let plan = BatchPlan::new(65_536, 4, 1024, 2).unwrap();
        assert_eq!((plan.micro_batches, plan.grad_accum_steps), (16, 8));
        assert_eq!((plan.samples_per_step(), plan.global_tokens()), (64, 65_536));
    }

    #[test]
    fn a_remainder_is_refused_with_the_two_nearest_batches() {
        let error = BatchPlan::new(10_000, 4, 256, 2).unwrap_err();
        assert_eq!((error.lower, error.upper), (Some(8192), Some(10_240)));
        let text = error.to_string();
        assert!(text.contains("8192 and 10240 work"), "{text}");
        let error = BatchPlan::new(100, 4, 256, 2).unwrap_err();
        assert_eq!((error.lower, error.upper), (None, Some(2048)));
    }

    #[test]
    fn every_world_size_covers_the_same_samples_once() {
        for (world_size, leaves) in
            [1, 2, 4, 8].into_iter().flat_map(|w| [(w, Leaves::Contiguous), (w, Leaves::Interleaved)])
        {
            let plan = BatchPlan::new(16 * 3 * 8, 3, 8, world_size).unwrap().with_leaves(leaves);
            let mut seen: Vec<u64> = (0..world_size)
                .flat_map(|rank| (0..plan.grad_accum_steps).map(move |micro_step| (rank, micro_step)))
                .flat_map(|(rank, micro_step)| plan.samples(1000, rank, micro_step))
                .collect();
            seen.sort_unstable();
            assert_eq!(seen, (1000..1048).collect::<Vec<u64>>(), "world size {world_size}, {leaves:?}");
        }
    }

    #[test]
    fn a_rank_has_a_run_of_micro_batches_or_every_wth() {
        let plan = BatchPlan::new(8 * 16, 1, 16, 2).unwrap();
        let of = |plan: &BatchPlan, rank| [0, 1, 2, 3].map(|micro_step| plan.leaf(rank, micro_step));
        assert_eq!([of(&plan, 0), of(&plan, 1)], [[0, 1, 2, 3], [4, 5, 6, 7]]);
        let plan = plan.with_leaves(Leaves::of(Shard::Parameters));
        assert_eq!([of(&plan, 0), of(&plan, 1)], [[0, 2, 4, 6], [1, 3, 5, 7]]);
    }
}
