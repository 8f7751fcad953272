//! Which batch a step has, and how many samples and tokens came before it: closed forms of the step
//! number, so that going on from any step needs no state.

use crate::{BatchConfig, BatchError, BatchPlan, BatchRamp, Leaves, Shard};

/// The batches of a run, one after the other.
///
/// GPT-3 lets the batch grow linearly with the tokens seen, from a small one to the full one (Brown et
/// al. 2020, section 2.3 and appendix B). Here it doubles: after t tokens the batch is the largest of
/// `start`, 2 `start`, 4 `start` ... that the line `start + (full - start) t / ramp_tokens` has
/// reached. So every batch keeps the powers of two of the full one, and is never above the line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batches {
    /// Ascending; the first begins at step 0.
    stages: Vec<Stage>,
    micro_batch: usize,
    seq_len: usize,
    leaves: Leaves,
}

/// Consecutive steps with batches of one size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stage {
    /// The first of them.
    pub first_step: u64,
    /// Tokens before it.
    pub first_token: u64,
    /// Tokens of each step.
    pub batch_tokens: u64,
}

impl Batches {
    /// The batches of a run: of samples of `seq_len` tokens, on ranks that share out `shard`.
    pub fn new(batch: &BatchConfig, seq_len: usize, shard: Shard) -> Batches {
        Batches {
            stages: stages(batch.global_batch_tokens, batch.ramp),
            micro_batch: batch.micro_batch,
            seq_len,
            leaves: Leaves::of(shard),
        }
    }

    /// The sizes that there are, each with its first step.
    pub fn stages(&self) -> &[Stage] {
        &self.stages
    }

    /// Tokens of the step that takes the run from `step` to `step + 1`.
    pub fn batch_tokens(&self, step: u64) -> u64 {
        at_step(&self.stages, step).batch_tokens
    }

    /// Tokens of the first `step` steps, batches that were left out not counted; at most the largest
    /// integer of TOML, in which configurations are saved.
    pub fn tokens_before(&self, step: u64) -> u64 {
        tokens_before(&self.stages, step)
    }

    /// Samples of the first `step` steps, batches that were left out not counted.
    pub fn samples_before(&self, step: u64) -> u64 {
        self.tokens_before(step) / self.seq_len as u64
    }

    /// The number of steps after which at least `tokens` tokens have been seen.
    pub fn steps_for(&self, tokens: u64) -> u64 {
        let stage = self.stages.iter().rev().find(|stage| stage.first_token < tokens);
        stage.map_or(0, |stage| stage.first_step + (tokens - stage.first_token).div_ceil(stage.batch_tokens))
    }

    /// How the step that takes the run from `step` to `step + 1` falls on `world_size` ranks. Where a
    /// step has a plan, all later ones have.
    ///
    /// # Errors
    /// A batch, this one or the full one, that the ranks cannot share evenly.
    pub fn plan(&self, step: u64, world_size: usize) -> Result<BatchPlan, BatchError> {
        self.full(world_size)?;
        let Stage { first_step, batch_tokens, .. } = at_step(&self.stages, step);
        let plan = BatchPlan::new(batch_tokens, self.micro_batch, self.seq_len, world_size);
        let plan = plan.map_err(|error| {
            // Each batch is twice the one before: the first that works is the smallest to start with.
            let mut sizes = self.stages.iter().map(|stage| stage.batch_tokens);
            let upper = sizes.find(|tokens| tokens.is_multiple_of(error.unit));
            BatchError { ramp_step: Some(first_step), lower: None, upper, ..error }
        })?;
        Ok(plan.with_leaves(self.leaves))
    }

    /// How a step with the full batch, the largest of the run, falls on `world_size` ranks.
    ///
    /// # Errors
    /// A full batch that the ranks cannot share evenly.
    pub fn full(&self, world_size: usize) -> Result<BatchPlan, BatchError> {
        let tokens = self.stages.last().map_or(0, |stage| stage.batch_tokens);
        let plan = BatchPlan::new(tokens, self.micro_batch, self.seq_len, world_size)?;
        Ok(plan.with_leaves(self.leaves))
    }
}

/// The sizes of a run's batches. `full` must be `ramp_start_tokens` times a power of two; what has no
/// size, or no start, counts as a ramp that is over.
fn stages(full: u64, ramp: Option<BatchRamp>) -> Vec<Stage> {
    let mut stages = Vec::new();
    let mut next = Stage { first_step: 0, first_token: 0, batch_tokens: full };
    if let Some(BatchRamp { ramp_start_tokens: start, ramp_tokens }) =
        ramp.filter(|ramp| ramp.ramp_start_tokens > 0)
    {
        next.batch_tokens = start;
        while next.batch_tokens < full {
            // The line start + (full - start) t / ramp_tokens reaches the next size at this t.
            let rise = 2 * u128::from(next.batch_tokens) - u128::from(start);
            let reached = (u128::from(ramp_tokens) * rise).div_ceil(u128::from(full - start)) as u64;
            let steps = reached.saturating_sub(next.first_token).div_ceil(next.batch_tokens);
            if steps > 0 {
                stages.push(next);
            }
            next.first_step += steps;
            next.first_token += steps * next.batch_tokens;
            next.batch_tokens *= 2;
        }
        next.batch_tokens = full;
    }
    stages.push(next);
    stages
}

fn at_step(stages: &[Stage], step: u64) -> Stage {
    let after = stages.partition_point(|stage| stage.first_step <= step);
    stages[after - 1]
}

fn tokens_before(stages: &[Stage], step: u64) -> u64 {
    let Stage { first_step, first_token, batch_tokens } = at_step(stages, step);
    let tokens = (step - first_step).saturating_mul(batch_tokens).saturating_add(first_token);
    tokens.min(i64::MAX as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// 4, 8, 16, 32 sequences of 8 tokens: full after 4480 tokens.
    const RAMP: BatchRamp = BatchRamp { ramp_start_tokens: 32, ramp_tokens: 4480 };

    fn batches(ramp: Option<BatchRamp>, micro_batch: usize) -> Batches {
        Batches::new(&BatchConfig { global_batch_tokens: 256, micro_batch, ramp }, 8, Shard::None)
    }

    /// The tokens of each batch, by walking: the largest doubling that the line has reached.
    fn walked(full: u64, ramp: BatchRamp, steps: usize) -> Vec<u64> {
        let start = ramp.ramp_start_tokens;
        let mut seen = 0;
        let walk = (0..steps).map(|_| {
            let line = |size: u64| {
                u128::from(full - start) * u128::from(seen)
                    >= u128::from(size - start) * u128::from(ramp.ramp_tokens)
            };
            let sizes = (0..64).map(|k| start << k).take_while(|&size| size <= full);
            let batch = sizes.filter(|&size| line(size)).last().unwrap();
            seen += batch;
            batch
        });
        walk.collect()
    }

    #[test]
    fn batches_double_when_the_line_has_reached_the_next_size() {
        // The line reaches 64, 128 and 256 at 640, 1920 and 4480 tokens.
        let stages: Vec<_> = batches(Some(RAMP), 1)
            .stages()
            .iter()
            .map(|stage| (stage.first_step, stage.first_token, stage.batch_tokens))
            .collect();
        assert_eq!(stages, [(0, 0, 32), (20, 640, 64), (40, 1920, 128), (60, 4480, 256)]);
    }

    #[test]
    fn tokens_and_samples_before_a_step_are_the_sum_of_the_batches_before_it() {
        let batches = batches(Some(RAMP), 1);
        let mut tokens = 0;
        for (step, batch) in walked(256, RAMP, 100).into_iter().enumerate() {
            let step = step as u64;
            assert_eq!((batches.tokens_before(step), batches.batch_tokens(step)), (tokens, batch));
            assert_eq!(batches.samples_before(step), tokens / 8);
            tokens += batch;
            assert_eq!(
                [tokens - 1, tokens, tokens + 1].map(|t| batches.steps_for(t)),
                [step + 1, step + 1, step + 2]
            );
        }
        assert_eq!(batches.steps_for(0), 0);
    }

    #[test]
    fn without_a_ramp_every_batch_is_full() {
        let still = BatchRamp { ramp_start_tokens: 256, ramp_tokens: 5000 };
        let over = BatchRamp { ramp_start_tokens: 32, ramp_tokens: 0 };
        for batches in [batches(None, 1), batches(Some(still), 1), batches(Some(over), 1)] {
            assert_eq!(batches.stages(), [Stage { first_step: 0, first_token: 0, batch_tokens: 256 }]);
            assert_eq!((batches.tokens_before(7), batches.samples_before(7)), (7 * 256, 7 * 32));
        }
    }

    #[test]
    fn a_step_has_the_micro_batches_of_its_own_batch() {
        let batches = batches(Some(RAMP), 2);
        let steps = |step| batches.plan(step, 2).unwrap().grad_accum_steps;
        assert_eq!([0, 19, 20, 39, 40, 59, 60, 1000].map(steps), [1, 1, 2, 2, 4, 4, 8, 8]);
        assert_eq!(batches.full(2).unwrap().grad_accum_steps, 8);
    }

    #[test]
    fn ranks_that_cannot_share_the_first_batch_are_told_what_works() {
        let batches = batches(Some(RAMP), 2);
        let told = batches.plan(0, 8).unwrap_err().to_string();
        assert!(
            told.starts_with("batch.ramp_start_tokens = 32 is no multiple of 128 (micro_batch 2"),
            "{told}"
        );
        assert!(told.ends_with("the smallest that works is 128; with this batch, 2 ranks do"), "{told}");
        let told = batches.plan(25, 8).unwrap_err().to_string();
        assert!(
            told.starts_with("the batch of step 21 on, grown from batch.ramp_start_tokens, = 64"),
            "{told}"
        );
        // Further on, more ranks can join; more than share the full batch never can.
        assert_eq!(batches.plan(40, 8).unwrap().grad_accum_steps, 1);
        let told = batches.plan(40, 32).unwrap_err().to_string();
        assert!(told.starts_with("batch.global_batch_tokens = 256 is no multiple of 512"), "{told}");
    }

    proptest! {
        #[test]
        fn the_closed_form_is_the_walk(start in 1u64..50, doublings in 0u32..6, ramp_tokens in 0u64..20_000) {
            let (full, ramp) = (start << doublings, BatchRamp { ramp_start_tokens: start, ramp_tokens });
            let stages = stages(full, Some(ramp));
            let mut tokens = 0;
            for (step, batch) in walked(full, ramp, 300).into_iter().enumerate() {
                prop_assert_eq!(at_step(&stages, step as u64).batch_tokens, batch);
                prop_assert_eq!(tokens_before(&stages, step as u64), tokens);
                tokens += batch;
            }
        }
    }
}
