//! When a rank does what, while all ranks do the same at the same time: its thread computes, starts and waits,
//! and collectives pass one after the other beside it. Exact for ranks in lockstep; ranks that differ are
//! `simulation`'s.

use super::cost::Costs;
use crate::{Act, Cargo, Work};
use serde::Serialize;

/// Where the seconds of a step go.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct StepSeconds {
    /// From one update to the next.
    pub total: f64,
    /// Embedding and blocks.
    pub forward: f64,
    /// Head and blocks, without what is computed again.
    pub backward: f64,
    /// Blocks that are computed again for it.
    pub recompute: f64,
    /// The update.
    pub optimizer: f64,
    /// Waiting for weights.
    pub waiting_for_weights: f64,
    /// Waiting for gradients.
    pub waiting_for_gradients: f64,
    /// Agreeing on a few numbers.
    pub agreeing: f64,
    /// Collectives that take the time of the cores that compute.
    pub helping: f64,
    /// All collectives, hidden or not.
    pub communicating: f64,
    /// The part of them that waits for latency, not for bytes.
    pub latency: f64,
    /// Whether links between nodes carry them more slowly than those within.
    pub between_bound: bool,
}

impl StepSeconds {
    /// The share of communication that passes behind computation.
    pub fn hidden(&self) -> f64 {
        let seen = self.waiting_for_weights + self.waiting_for_gradients + self.helping;
        if self.communicating > 0.0 { (1.0 - seen / self.communicating).max(0.0) } else { 1.0 }
    }
}

/// Runs a step's acts twice, so that the second begins with what the first has left on its way, and takes
/// the second.
pub fn step_seconds(acts: &[Act], costs: &Costs<'_>) -> StepSeconds {
    let mut rank = Rank::default();
    rank.run(acts, costs);
    let began = rank.now;
    rank.taken = StepSeconds::default();
    rank.run(acts, costs);
    StepSeconds { total: rank.now - began, between_bound: rank.between > rank.within, ..rank.taken }
}

#[derive(Default)]
struct Rank {
    /// Of its thread.
    now: f64,
    /// When the last collective that was started is complete.
    free: f64,
    /// The same of each segment's last, for weights and gradients.
    done: Vec<[f64; 2]>,
    taken: StepSeconds,
    within: f64,
    between: f64,
}

impl Rank {
    fn run(&mut self, acts: &[Act], costs: &Costs<'_>) {
        for act in acts {
            match act {
                Act::Compute(work) => {
                    let seconds = costs.work(*work);
                    self.now += seconds;
                    *self.phase(*work) += seconds;
                }
                Act::Start(call) => {
                    let seconds = costs.call(call);
                    self.taken.communicating += seconds.total();
                    self.taken.latency += seconds.latency;
                    self.within += seconds.within;
                    self.between += seconds.between;
                    self.now += seconds.cores;
                    self.taken.helping += seconds.cores;
                    self.free = self.free.max(self.now) + seconds.total() - seconds.cores;
                    *self.done(call.cargo, call.segment) = self.free;
                }
                Act::Wait(cargo, segment) => {
                    let waited = (*self.done(*cargo, *segment) - self.now).max(0.0);
                    self.now += waited;
                    match cargo {
                        Cargo::Weights => self.taken.waiting_for_weights += waited,
                        Cargo::Gradient => self.taken.waiting_for_gradients += waited,
                    }
                }
                Act::Agree => {
                    self.now += costs.agree();
                    self.taken.agreeing += costs.agree();
                }
            }
        }
    }

    fn done(&mut self, cargo: Cargo, segment: usize) -> &mut f64 {
        if self.done.len() <= segment {
            self.done.resize(segment + 1, [0.0; 2]);
        }
        &mut self.done[segment][cargo as usize]
    }

    fn phase(&mut self, work: Work) -> &mut f64 {
        match work {
            Work::Embed | Work::Forward(_) => &mut self.taken.forward,
            Work::Head | Work::Backward(_) | Work::EmbedBackward => &mut self.taken.backward,
            Work::Recompute(_) => &mut self.taken.recompute,
            Work::Update(_) => &mut self.taken.optimizer,
        }
    }
}
