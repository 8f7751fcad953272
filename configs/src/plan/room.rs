//! Memory of a rank, by component, and whether it fits. The sizes are `memory`'s; here is what surrounds
//! them: logits, the allocator's slack, and what the device keeps for itself.

use super::machine::Machine;
use crate::{Memory, ModelConfig, Setup, logits_at_once};
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
    /// What comes and goes with segments: gathered weights, gradients on their way.
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
        let logits = logits(model, setup, machine);
        let comes_and_goes = memory.activations + logits + memory.passing;
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
            buffers: memory.passing,
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

/// Logits of a chunk of rows, and what the gradient of the weight that they come of takes; or that of a block's
/// widest weight, later, if it is more.
fn logits(model: &ModelConfig, setup: &Setup, machine: &Machine) -> u64 {
    let (vocab_size, c) = (model.vocab_size as u64, model.n_embd as u64);
    let rows = (setup.micro_batch * model.seq_len) as u64;
    let rows = rows.min(logits_at_once(!machine.cpu, setup.bf16) as u64 / vocab_size).max(1);
    if setup.bf16 && machine.matrix_unit {
        // As bf16, which become their gradient where they lie; the hidden states' in fp32. Weights' gradients
        // are added in place.
        return 2 * rows * vocab_size + 4 * rows * c;
    }
    // fp32, a temporary of the sum of exponentials, and the gradient as it computes.
    let chunk = rows * vocab_size * (8 + if setup.bf16 { 2 } else { 0 });
    // In bf16 on the CPU the head's gradient of a chunk, and the fp32 copy of it that libtorch adds to the sum.
    let head = if setup.bf16 && machine.cpu { 6 * vocab_size * c } else { 0 };
    (chunk + head).max(setup.width() * 4 * c * c)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::measured::tests::machine;

    fn of(matrix_unit: bool, bf16: bool) -> Room {
        let measured = crate::plan::Measured { matrix_unit, ..machine() };
        let setup = Setup {
            world_size: 1,
            shard: crate::Shard::None,
            bf16,
            recompute: false,
            reproducible: false,
            micro_steps: 1,
            micro_batch: 1,
        };
        Room::of(&ModelConfig::default(), &setup, &Machine::measured(measured, 1))
    }

    #[test]
    fn a_matrix_unit_has_its_logits_in_bf16_and_no_gradient_of_the_head_beside_their_sum() {
        let (rows, vocab_size, c) = (1024, 50_257, 768);
        assert_eq!(of(true, true).logits, 2 * rows * vocab_size + 4 * rows * c);
        assert_eq!(of(false, true).logits, 10 * rows * vocab_size + 6 * vocab_size * c);
        assert_eq!(of(true, false), of(false, false));
    }

    #[test]
    fn on_the_cpu_tensors_fill_whole_regions() {
        let Room { total, snapshot, reserved, .. } = of(true, false);
        assert_eq!((total - snapshot - reserved) % REGION_BYTES, 0);
    }
}
