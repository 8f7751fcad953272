//! Batch arithmetic: from tokens per step to sequences, micro-steps and sample numbers.
//! The user gives tokens and the micro-batch; accumulation is derived and a remainder refused.

use std::ops::Range;

/// A global batch that the ranks cannot share evenly.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "batch.global_batch_tokens = {got} is no multiple of {unit} \
     (micro_batch {micro_batch} x seq_len {seq_len} x {world_size} ranks)\n\
     hint: {}", nearest(*.lower, *.upper)
)]
pub struct BatchError {
    /// What the configuration asks for.
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
    /// The nearest larger batch that works.
    pub upper: u64,
}

fn nearest(lower: Option<u64>, upper: u64) -> String {
    match lower {
        Some(lower) => format!("{lower} and {upper} work"),
        None => format!("the smallest that works is {upper}"),
    }
}

/// How one step's samples fall on ranks and micro-steps.
///
/// The step has M micro-batches; rank r of W computes the contiguous run of M/W of them that starts
/// at r M/W. Micro-batch m holds the samples `first + m micro_batch ..`, so that which samples a step
/// sees does not depend on W.
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
}

impl BatchPlan {
    /// The plan of a batch on `world_size` ranks.
    pub fn new(
        global_batch_tokens: u64,
        micro_batch: usize,
        seq_len: usize,
        world_size: usize,
    ) -> Result<BatchPlan, BatchError> {
        let micro_tokens = micro_batch as u64 * seq_len as u64;
        let unit = micro_tokens * world_size as u64;
        if global_batch_tokens == 0 || !global_batch_tokens.is_multiple_of(unit) {
            let below = global_batch_tokens / unit * unit;
            return Err(BatchError {
                got: global_batch_tokens,
                unit,
                micro_batch,
                seq_len,
                world_size,
                lower: (below > 0).then_some(below),
                upper: below + unit,
            });
        }
        Ok(BatchPlan {
            micro_batch,
            seq_len,
            micro_batches: global_batch_tokens / micro_tokens,
            grad_accum_steps: global_batch_tokens / unit,
        })
    }

    /// Tokens per step over all ranks.
    pub fn global_tokens(&self) -> u64 {
        self.samples_per_step() * self.seq_len as u64
    }

    /// Samples per step over all ranks.
    pub fn samples_per_step(&self) -> u64 {
        self.micro_batches * self.micro_batch as u64
    }

    /// The samples of rank `rank`'s micro-step `micro_step`, in a step that starts at sample `first`.
    pub fn samples(&self, first: u64, rank: usize, micro_step: u64) -> Range<u64> {
        let micro_batch = rank as u64 * self.grad_accum_steps + micro_step;
        let start = first + micro_batch * self.micro_batch as u64;
        start..start + self.micro_batch as u64
    }
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
        assert_eq!((error.lower, error.upper), (Some(8192), 10_240));
        let text = error.to_string();
        assert!(text.contains("8192 and 10240 work"), "{text}");
        let error = BatchPlan::new(100, 4, 256, 2).unwrap_err();
        assert_eq!((error.lower, error.upper), (None, 2048));
    }

    #[test]
    fn every_world_size_covers_the_same_samples_once() {
        for world_size in [1, 2, 4, 8] {
            let plan = BatchPlan::new(16 * 3 * 8, 3, 8, world_size).unwrap();
            let mut seen: Vec<u64> = (0..world_size)
                .flat_map(|rank| (0..plan.grad_accum_steps).map(move |micro_step| (rank, micro_step)))
                .flat_map(|(rank, micro_step)| plan.samples(1000, rank, micro_step))
                .collect();
            seen.sort_unstable();
            assert_eq!(seen, (1000..1048).collect::<Vec<u64>>(), "world size {world_size}");
        }
    }
}
