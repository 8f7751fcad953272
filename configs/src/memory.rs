//! What a run takes of a rank's memory, as a formula of the model and of how ranks share the work.
//! It follows what `trainer` allocates, buffer by buffer; knows no allocator, and no device's size.

use crate::{BatchError, ModelConfig, Norm, Recompute, RunConfig, SegmentSpec, Shard, owned_range, segments};

const FP32: u64 = 4;

/// Logits that the loss holds at once, in elements of fp32: a chunk of rows. On the CPU 16 MiB; where a matrix unit
/// holds them as bf16, 128; on a GPU, which products of few rows leave idle, 1 GiB.
pub fn logits_at_once(on_gpu: bool, by_matrix_unit: bool) -> usize {
    match (on_gpu, by_matrix_unit) {
        (true, _) => 1 << 28,
        (false, true) => 1 << 26,
        (false, false) => 1 << 22,
    }
}

/// How the ranks of a run share its work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Setup {
    /// Ranks, W.
    pub world_size: usize,
    /// What each holds a slice of.
    pub shard: Shard,
    /// Whether bf16 computes, or fp32.
    pub bf16: bool,
    /// Whether backward computes blocks again.
    pub recompute: bool,
    /// Whether gradients are summed in a tree.
    pub reproducible: bool,
    /// Micro-steps of a rank in the largest step.
    pub micro_steps: u64,
    /// Sequences per rank and pass.
    pub micro_batch: usize,
    /// Whether the sums of gradients keep their memory from step to step ([`Shard::gradients_stay`]).
    pub gradients_stay: bool,
}

impl Setup {
    /// That of a run with its full batch, on ranks of which it is known where and in what they compute.
    ///
    /// # Errors
    /// A batch that they cannot share evenly.
    pub fn of(run: &RunConfig, world_size: usize, on_cpu: bool, bf16: bool) -> Result<Setup, BatchError> {
        let plan = run.batch_plan(world_size)?;
        Ok(Setup {
            world_size,
            shard: run.parallel.shard,
            bf16,
            recompute: run.parallel.recompute == Recompute::Full,
            reproducible: run.reproducible(on_cpu),
            micro_steps: plan.grad_accum_steps,
            micro_batch: plan.micro_batch,
            gradients_stay: run.parallel.shard.gradients_stay(world_size, on_cpu),
        })
    }

    /// Bytes of a number that computes.
    pub(crate) fn width(&self) -> u64 {
        if self.bf16 { 2 } else { FP32 }
    }

    /// Bytes of a gradient's number on its way to other ranks: the tree's sums are fp32 throughout; without
    /// it bf16 weights ask for no more than bf16.
    pub(crate) fn wire_width(&self) -> u64 {
        if self.bf16 && !self.reproducible { 2 } else { FP32 }
    }

    /// Elements of a segment that the fullest rank owns.
    pub(crate) fn owned(&self, segment: &SegmentSpec) -> u64 {
        owned_range(segment.numel, 0, self.world_size).len() as u64
    }
}

/// Bytes of the fullest rank; the others have as much, or less by parts of a slice's alignment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Memory {
    /// Weights that compute and stay: all of them, unless `"parameters"` are sharded.
    pub weights: u64,
    /// The fp32 masters that the optimizer moves, where they are not the weights themselves.
    pub masters: u64,
    /// The sums of the gradients, fp32.
    pub gradients: u64,
    /// Partial sums of the tree over micro-batches, fp32.
    pub tree: u64,
    /// AdamW's two moments, fp32.
    pub moments: u64,
    /// What comes and goes with the segments, at the fullest moment: gathered weights, and gradients on
    /// their way.
    pub passing: u64,
    /// Host memory for checkpoints, from the first on: fp32 copies of what the rank owns.
    pub snapshot: u64,
    /// An estimate of what a pass keeps for backward, and of a block's gradients there; libtorch's kernels decide.
    /// Where sums of gradients begin with backward, what it takes beside them at the fullest moment.
    pub activations: u64,
}

impl Memory {
    /// What a model takes.
    pub fn of(model: &ModelConfig, setup: &Setup) -> Memory {
        let all = segments(model);
        let whole = || all.iter().map(|segment| segment.numel as u64);
        let owned = || all.iter().map(|segment| setup.owned(segment));
        let total: u64 = whole().sum();
        let slices: u64 = owned().sum();
        let held = if setup.shard == Shard::None { total } else { slices };
        let summed = if setup.shard.leaves_at_once() { slices } else { total };
        let gathered = setup.shard == Shard::Parameters;
        let levels = if setup.reproducible { setup.micro_steps.ilog2() } else { 0 };
        Memory {
            weights: if gathered { 0 } else { setup.width() * total },
            masters: if gathered || setup.bf16 { FP32 * held } else { 0 },
            gradients: FP32 * summed,
            tree: FP32 * summed * u64::from(levels),
            moments: 2 * FP32 * held,
            passing: passing(&all, model, setup),
            snapshot: 3 * FP32 * slices,
            activations: activations(model, setup),
        }
    }

    /// Parameters, gradients and optimizer state, with what passes: all but activations and snapshots.
    pub fn state(&self) -> u64 {
        self.weights + self.masters + self.gradients + self.tree + self.moments + self.passing
    }
}

/// What comes and goes, moment by moment of a micro-step.
fn passing(all: &[SegmentSpec], model: &ModelConfig, setup: &Setup) -> u64 {
    let n_layer = model.n_layer;
    let numel = |index: usize| all.get(index).map_or(0, |segment| segment.numel as u64);
    let (tokens, positions, block, norm) = (numel(0), numel(1), numel(2), numel(2 + n_layer));
    // Where the last block has no successor, its neighbour is the norm, or nothing.
    let neighbour = if n_layer > 1 { block } else { norm };
    // An embedding with a norm is needed again for its backward, and autograd's.
    let embedding = if model.has_plain_embedding() { 0 } else { positions };
    // (weights gathered, gradients open or on their way), in elements.
    let rest = if setup.micro_steps > 1 { block + positions + tokens } else { 0 };
    let moments = [
        // Tokens and positions are looked up; the first block is on its way. The last gradients of the
        // micro-step before may still be.
        (tokens + positions + block, rest),
        // A block computes, the next is on its way; the tokens stay for the head.
        (tokens + block + neighbour, rest),
        // The head fills the tokens' gradient, which stays open until the embedding has filled it too.
        // The last block stays for its backward.
        (tokens + norm + block, tokens),
        // A block's backward: the one before it is on its way, the gradient of the one after it too.
        (if n_layer > 1 { 2 * block } else { block }, tokens + block + neighbour),
        (block + embedding, tokens + block + neighbour),
        (embedding, tokens + positions + block),
    ];
    let bytes = |(weights, gradients): (u64, u64)| {
        let weights = if setup.shard == Shard::Parameters { setup.width() * weights } else { 0 };
        let gradients = if setup.shard.leaves_at_once() { FP32 * gradients } else { 0 };
        weights + gradients
    };
    moments.into_iter().map(bytes).max().unwrap_or(0)
}

/// What autograd keeps of a block, in elements a token: the inputs of its norms, of the four products but the
/// last, of attention and of the GELU, and attention's output.
pub(crate) fn block_activations(model: &ModelConfig) -> u64 {
    let c = model.n_embd as u64;
    let heads = model.n_head as u64;
    // x, norm, attention's output, x + attention, norm: 5 C; before the GELU: 4 C.
    let around = 9 * c;
    // Queries, keys and values, whatever the pattern.
    let attention = if model.dropout > 0.0 {
        // With dropout, probabilities, their mask and their product, for all pairs.
        3 * c + 2 * c + 3 * heads * model.seq_len as u64
    } else {
        3 * c
    };
    let residual = if model.norm == Norm::Post { c } else { 0 }; // the sums are kept too, before the norms
    around + attention + residual
}

fn activations(model: &ModelConfig, setup: &Setup) -> u64 {
    let (layers, block, c) = (model.n_layer as u64, block_activations(model), model.n_embd as u64);
    let tokens = setup.width() * (setup.micro_batch * model.seq_len) as u64;
    let recompute = setup.recompute || setup.shard == Shard::Parameters;
    let kept = if recompute { layers * c + block } else { layers * block };
    // In backward, two of what is 4 C wide around the GELU of the block that computes.
    let widest = 8 * c;
    // The rows of the tokens, from which an embedding with a norm is computed again.
    let rows = if model.has_plain_embedding() { 0 } else { c };
    let all = tokens * (kept + rows + widest);
    if setup.gradients_stay || setup.micro_steps > 1 {
        return all;
    }
    // When backward begins there are no gradients but of what comes after the blocks, the tokens' with it, and of
    // a block; when it comes to the first block there are all, and no other block's activations.
    let segments = segments(model);
    let numel = |segments: &[SegmentSpec]| segments.iter().map(|segment| segment.numel as u64).sum::<u64>();
    let gradients = FP32 * numel(&segments);
    let begun = FP32 * (numel(&segments[..1]) + numel(&segments[1 + model.n_layer..]));
    let first = tokens * (block + rows + widest + if recompute { c } else { 0 });
    (all + begun).saturating_sub(gradients).max(first)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: Setup = Setup {
        world_size: 1,
        shard: Shard::None,
        bf16: false,
        recompute: false,
        reproducible: false,
        micro_steps: 1,
        micro_batch: 1,
        gradients_stay: true,
    };

    fn of(setup: Setup) -> Memory {
        Memory::of(&ModelConfig::default(), &setup)
    }

    /// GPT-2 Small in its flat buffers, the vocabulary padded: 50,304 x 768 + 1024 x 768 + 12 blocks of
    /// 12 x 768^2 + 13 x 768 + 2 x 768.
    const ALL: u64 = 124_475_904;
    const TOKENS: u64 = 38_633_472;
    const POSITIONS: u64 = 786_432;
    const BLOCK: u64 = 7_087_872;

    #[test]
    fn without_sharding_a_parameter_takes_sixteen_bytes_in_fp32_and_eighteen_in_bf16() {
        let fp32 = of(ONE);
        assert_eq!(
            (fp32.weights, fp32.masters, fp32.gradients, fp32.moments),
            (4 * ALL, 0, 4 * ALL, 8 * ALL)
        );
        assert_eq!(fp32.state(), 16 * ALL);
        let bf16 = of(Setup { bf16: true, ..ONE });
        assert_eq!(bf16.state(), 18 * ALL);
        assert_eq!((bf16.weights, bf16.masters), (2 * ALL, 4 * ALL));
    }

    #[test]
    fn each_mode_shares_out_what_its_name_says() {
        let four = |shard, bf16| of(Setup { world_size: 4, shard, bf16, ..ONE });
        let near = |got: u64, expected: f64| (got as f64 / expected - 1.0).abs() < 1e-3;
        let all = ALL as f64;
        let optimizer = four(Shard::Optimizer, true);
        assert!(near(optimizer.moments, 2.0 * all) && near(optimizer.masters, all));
        assert_eq!((optimizer.weights, optimizer.gradients), (2 * ALL, 4 * ALL));
        let gradients = four(Shard::Gradients, true);
        assert!(near(gradients.gradients, all));
        assert_eq!(gradients.weights, 2 * ALL);
        assert_eq!(gradients.passing, 4 * (TOKENS + 2 * BLOCK));
        let parameters = four(Shard::Parameters, false);
        assert_eq!(parameters.weights, 0);
        assert!(near(parameters.masters + parameters.gradients + parameters.moments, 4.0 * all));
        // The head: the token embedding with its gradient, the last norm, and the last block for its backward.
        assert_eq!(parameters.passing, 4 * (2 * TOKENS + 2 * 768 + BLOCK));
        assert!((parameters.state() as f64) < 0.45 * of(ONE).state() as f64);
    }

    #[test]
    fn the_tree_takes_the_gradients_again_for_each_doubling_of_the_micro_steps() {
        for (shard, share) in [(Shard::None, ALL), (Shard::Parameters, ALL / 4)] {
            let tree = |micro_steps, reproducible| {
                of(Setup { world_size: 4, shard, micro_steps, reproducible, ..ONE }).tree as f64
            };
            assert_eq!([tree(1, true), tree(8, false)], [0.0, 0.0]);
            assert!((tree(8, true) / (3.0 * 4.0 * share as f64) - 1.0).abs() < 1e-3);
        }
    }

    #[test]
    fn gradients_of_one_micro_step_may_still_travel_in_the_next() {
        let passing =
            |micro_steps| of(Setup { world_size: 4, shard: Shard::Parameters, micro_steps, ..ONE }).passing;
        assert_eq!(passing(2), 4 * (TOKENS + 2 * BLOCK) + 4 * (BLOCK + POSITIONS + TOKENS));
        assert!(passing(1) < passing(2));
    }

    #[test]
    fn what_ranks_own_adds_up_to_the_whole() {
        for world_size in [1usize, 2, 3, 5, 8] {
            let longest: u64 = segments(&ModelConfig::default())
                .iter()
                .map(|segment| {
                    let owned = |rank| owned_range(segment.numel, rank, world_size).len();
                    assert_eq!((0..world_size).map(owned).sum::<usize>(), segment.numel);
                    (0..world_size).map(owned).max().unwrap_or(0) as u64
                })
                .sum();
            let memory = of(Setup { world_size, shard: Shard::Optimizer, ..ONE });
            assert_eq!((memory.moments, memory.snapshot), (8 * longest, 12 * longest), "{world_size} ranks");
        }
    }

    #[test]
    fn recomputation_keeps_the_blocks_inputs_and_one_block() {
        let tokens = 1024;
        assert_eq!(of(ONE).activations, 4 * (12 * 12 + 8) * 768 * tokens);
        assert_eq!(of(Setup { recompute: true, ..ONE }).activations, 4 * (12 + 12 + 8) * 768 * tokens);
        assert_eq!(of(Setup { bf16: true, micro_batch: 4, ..ONE }).activations, 2 * of(ONE).activations);
    }

    #[test]
    fn gradients_that_begin_with_backward_take_the_place_of_activations() {
        let of_passes = |bf16, micro_steps, gradients_stay| {
            of(Setup { bf16, micro_steps, gradients_stay, ..ONE }).activations
        };
        // The fullest moment is when backward begins, or where activations are less than gradients the first block's.
        let later = 4 * (POSITIONS + 11 * BLOCK);
        assert_eq!(of_passes(false, 1, false), of_passes(false, 1, true) - later);
        assert_eq!(of_passes(true, 1, false), 2 * (12 + 8) * 768 * 1024);
        assert_eq!(of_passes(false, 2, false), of_passes(false, 2, true));
    }
}
