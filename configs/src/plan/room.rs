//! Memory of a rank, by component, and whether it fits. The sizes are `memory`'s; here is what surrounds
//! them: logits, the allocator's slack, and what the device keeps for itself.

use super::machine::Machine;
use crate::{Memory, ModelConfig, Setup, logits_at_once, segments};
use serde::Serialize;

/// The part of what comes and goes that a GPU's allocator holds beside it: blocks that fit nothing else.
const SLACK: f64 = 0.1;

/// What the CPU's takes from the system at once (`ops/csrc/allocator.cpp`): regions that tensors are put into.
const REGION_BYTES: u64 = 32 << 20;

/// Bytes of the fullest rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Room {
    /// Weights that compute and stay, and fp32 masters beside them.
    pub parameters: u64,
    /// Sums of gradients, and the tree's.
    pub gradients: u64,
    /// AdamW's moments.
    pub optimizer: u64,
    /// Inputs of the blocks, where they are computed again; else all that they keep.
    pub activations: u64,
    /// Logits of a chunk of rows, with their gradient.
    pub logits: u64,
    /// What comes and goes with segments: gathered weights, gradients on their way, and on a GPU what a bf16
    /// wire takes of its own.
    pub buffers: u64,
    /// What the allocator holds beside: on the CPU the rest of a region.
    pub slack: u64,
    /// A checkpoint's snapshot, where the rank's memory is the host's.
    pub snapshot: u64,
    /// The device's own.
    pub reserved: u64,
    /// All of it.
    pub total: u64,
}

impl Room {
    /// What a rank of `machine` takes.
    pub fn of(model: &ModelConfig, setup: &Setup, machine: &Machine) -> Room {
        let memory = Memory::of(model, setup);
        let logits = logits(model, setup, machine, memory.activations);
        let buffers = memory.passing + if machine.cpu { 0 } else { wire_scratch(model, setup) };
        let sums = if setup.gradients_stay { 0 } else { memory.gradients };
        let comes_and_goes = memory.activations + logits + buffers + sums;
        let tensors = memory.state() + memory.activations + logits;
        let slack = match machine.cpu {
            true => tensors.next_multiple_of(REGION_BYTES) - tensors,
            false => (SLACK * comes_and_goes as f64) as u64,
        };
        let mut room = Room {
            parameters: memory.weights + memory.masters,
            gradients: memory.gradients + memory.tree,
            optimizer: memory.moments,
            activations: memory.activations,
            logits,
            buffers,
            slack,
            snapshot: if machine.cpu { memory.snapshot } else { 0 },
            reserved: machine.reserved_bytes,
            total: 0,
        };
        room.total = room.components().iter().map(|(_, bytes)| bytes).sum();
        room
    }

    /// Each component with its name.
    pub fn components(&self) -> [(&'static str, u64); 9] {
        [
            ("parameters", self.parameters),
            ("gradients", self.gradients),
            ("optimizer", self.optimizer),
            ("activations", self.activations),
            ("logits", self.logits),
            ("buffers", self.buffers),
            ("slack", self.slack),
            ("snapshot", self.snapshot),
            ("reserved", self.reserved),
        ]
    }

    /// Whether it fits.
    pub fn fits(&self, machine: &Machine) -> bool {
        self.total <= machine.memory_bytes
    }
}

/// Logits of a chunk of rows, and what is beside them; on a GPU the gradient of the weight that they come of, or that
/// of a block's widest weight, later, if it is more.
fn logits(model: &ModelConfig, setup: &Setup, machine: &Machine, activations: u64) -> u64 {
    let (vocab_size, c) = (model.vocab_size as u64, model.n_embd as u64);
    let rows = (setup.micro_batch * model.seq_len) as u64;
    let by_matrix_unit = setup.bf16 && machine.matrix_unit;
    let rows = rows.min(logits_at_once(!machine.cpu, by_matrix_unit) as u64 / vocab_size).max(1);
    if by_matrix_unit {
        // As bf16, which become their gradient where they lie; the hidden states' in fp32. Weights' gradients
        // are added in place.
        return 2 * rows * vocab_size + 4 * rows * c;
    }
    if !machine.cpu {
        // As they compute, of padded ids too, which become their gradient where they lie; in bf16 the head's
        // gradient of a chunk beside its sum.
        let padded = model.padded_vocab_size() as u64;
        let head = if setup.bf16 { 2 * padded * c } else { 0 };
        let training = (setup.width() * rows * padded + head).max(setup.width() * 4 * c * c);
        // Evaluation has them in fp32, with a temporary, and keeps nothing for backward.
        let evaluation = rows * vocab_size * (8 + if setup.bf16 { 2 } else { 0 });
        return training.max(evaluation.saturating_sub(activations));
    }
    // fp32, with a temporary of the sum of exponentials; bf16 is widened, the head as a whole.
    rows * vocab_size * 8 + if setup.bf16 { 4 * vocab_size * c } else { 0 }
}

/// What sums on a bf16 wire take on a GPU beside the buffer, of the largest segment: it rounded, what arrives of
/// the others' for this rank's slice, and the slice's partial sums in fp32, one for each level of the tree.
fn wire_scratch(model: &ModelConfig, setup: &Setup) -> u64 {
    if setup.world_size == 1 || setup.wire_width() != 2 {
        return 0;
    }
    let ranks = setup.world_size as u64;
    let of_segment =
        |numel: u64, owned: u64| 2 * numel + 2 * ranks * owned + 4 * owned * (1 + u64::from(ranks.ilog2()));
    let segments = segments(model);
    segments.iter().map(|segment| of_segment(segment.numel as u64, setup.owned(segment))).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::measured::tests::machine;

    const ALONE: Setup = Setup {
        world_size: 1,
        shard: crate::Shard::None,
        bf16: true,
        recompute: false,
        reproducible: false,
        micro_steps: 1,
        micro_batch: 1,
        gradients_stay: true,
    };

    fn of(matrix_unit: bool, bf16: bool) -> Room {
        let measured = crate::plan::Measured { matrix_unit, ..machine() };
        let setup = Setup { bf16, ..ALONE };
        Room::of(&ModelConfig::default(), &setup, &Machine::measured(measured, 1))
    }

    fn on_gpu(setup: &Setup) -> Room {
        Room::of(&ModelConfig::default(), setup, &Machine::named("h100", 1).unwrap())
    }

    #[test]
    fn a_gpu_has_its_logits_in_the_precision_that_computes_and_evaluation_may_take_more() {
        let (padded, c) = (50_304, 768);
        let deep = ModelConfig { n_layer: 24, ..ModelConfig::default() };
        let h100 = Machine::named("h100", 1).unwrap();
        assert_eq!(Room::of(&deep, &ALONE, &h100).logits, 2 * 1024 * padded + 2 * padded * c);
        assert_eq!(on_gpu(&Setup { bf16: false, ..ALONE }).logits, 4 * 1024 * padded);
        // Of a pass that keeps little for backward, more is there when it is evaluated.
        let many = on_gpu(&Setup { recompute: true, micro_batch: 4, ..ALONE });
        assert_eq!(many.logits + many.activations, 10 * 4096 * 50_257);
    }

    #[test]
    fn a_bf16_wire_takes_room_for_what_it_rounds_and_adds_up() {
        let tokens = 50_304 * 768;
        let buffers = |world_size, reproducible, bf16| {
            on_gpu(&Setup { world_size, reproducible, bf16, ..ALONE }).buffers
        };
        // Half a segment is its own, and its sum is that of two partial ones.
        assert_eq!(buffers(2, false, true), 2 * tokens + 2 * tokens + 4 * (tokens / 2) * 2);
        assert_eq!(buffers(8, false, true), 2 * tokens + 2 * tokens + 4 * (tokens / 8) * 4);
        assert_eq!([buffers(1, false, true), buffers(2, true, true), buffers(2, false, false)], [0; 3]);
    }

    #[test]
    fn a_matrix_unit_has_its_logits_in_bf16_and_no_gradient_of_the_head_beside_their_sum() {
        let (rows, vocab_size, c) = (1024, 50_257, 768);
        assert_eq!(of(true, true).logits, 2 * rows * vocab_size + 4 * rows * c);
        let few = (1 << 22) / vocab_size;
        assert_eq!(of(false, true).logits, 8 * few * vocab_size + 4 * vocab_size * c);
        assert_eq!(of(false, false).logits, 8 * few * vocab_size);
        assert_eq!(of(true, false), of(false, false));
    }

    #[test]
    fn on_the_cpu_tensors_fill_whole_regions() {
        let Room { total, snapshot, reserved, .. } = of(true, false);
        assert_eq!((total - snapshot - reserved) % REGION_BYTES, 0);
    }
}
