//! Memory of a rank, by component, and whether it fits. The sizes are `memory`'s; here is what surrounds
//! them: logits, the allocator's slack, and what the device keeps for itself.

use super::machine::Machine;
use crate::{Memory, ModelConfig, Setup, logits_at_once};
use serde::Serialize;

/// The part of what comes and goes that the allocator holds beside it: blocks that fit nothing else.
const SLACK: f64 = 0.1;

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
    /// What the allocator holds beside.
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
        let chunk = logits_at_once(!machine.cpu, setup.bf16) as u64;
        let logits = chunk.min((setup.micro_batch * model.seq_len * model.vocab_size) as u64);
        // fp32, a temporary of the sum of exponentials, and the gradient as it computes.
        let mut logits = logits * (8 + if setup.bf16 { 2 } else { 0 });
        if setup.bf16 && machine.cpu {
            // The head's weight gradient of a chunk, and the fp32 copy of it that libtorch adds to the sum.
            logits += 6 * (model.vocab_size * model.n_embd) as u64;
        }
        let slack = (SLACK * (memory.activations + logits + memory.passing) as f64) as u64;
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
