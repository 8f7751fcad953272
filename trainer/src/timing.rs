//! Where a step's time goes, by phase. A stopwatch and nothing else.

use serde::Serialize;
use std::time::{Duration, Instant};
use tch::Device;

/// The phases of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Waiting for tokens.
    Data,
    /// Forward, without the loss.
    Forward,
    /// The loss and backward.
    Backward,
    /// Waiting for other ranks: their gradients, and weights that they hold.
    Reduce,
    /// Norm and update.
    Optimizer,
}

/// Seconds by phase since the last reset, on this rank.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct PhaseSeconds {
    /// Waiting for tokens.
    pub data: f64,
    /// Forward, without the loss.
    pub forward: f64,
    /// The loss and backward.
    pub backward: f64,
    /// Waiting for other ranks: their gradients, and weights that they hold.
    pub reduce: f64,
    /// Norm and update.
    pub optimizer: f64,
}

impl PhaseSeconds {
    /// Each divided by `count`: the mean of so many steps.
    pub(crate) fn per(self, count: f64) -> PhaseSeconds {
        let PhaseSeconds { data, forward, backward, reduce, optimizer } = self;
        let [data, forward, backward, reduce, optimizer] =
            [data, forward, backward, reduce, optimizer].map(|seconds| seconds / count);
        PhaseSeconds { data, forward, backward, reduce, optimizer }
    }
}

/// Adds up phases.
#[derive(Debug, Default)]
pub struct Timing {
    seconds: PhaseSeconds,
    /// The GPU that is waited for wherever a phase ends; none: a phase is as long as its work is being given.
    waits_for: Option<usize>,
}

impl Timing {
    /// A stopwatch that waits for a GPU at the end of each phase, so that its work is in it: for profiles, not
    /// for training, which it holds up.
    pub(crate) fn of_device(device: Device) -> Timing {
        let waits_for = if let Device::Cuda(index) = device { Some(index) } else { None };
        Timing { waits_for, ..Timing::default() }
    }

    /// Now, to be handed to [`Timing::add`].
    pub fn now(&self) -> Instant {
        Instant::now()
    }

    /// Adds what has passed since `started` to a phase, and returns now.
    pub fn add(&mut self, phase: Phase, started: Instant) -> Instant {
        if let Some(gpu) = self.waits_for {
            tch::Cuda::synchronize(gpu as i64);
        }
        let now = Instant::now();
        *self.of(phase) += (now - started).as_secs_f64();
        now
    }

    /// Moves a part of one phase to another: waits that were within it.
    pub fn shift(&mut self, from: Phase, to: Phase, part: Duration) {
        *self.of(from) -= part.as_secs_f64();
        *self.of(to) += part.as_secs_f64();
    }

    fn of(&mut self, phase: Phase) -> &mut f64 {
        match phase {
            Phase::Data => &mut self.seconds.data,
            Phase::Forward => &mut self.seconds.forward,
            Phase::Backward => &mut self.seconds.backward,
            Phase::Reduce => &mut self.seconds.reduce,
            Phase::Optimizer => &mut self.seconds.optimizer,
        }
    }

    /// What has been added since the last call.
    pub fn take(&mut self) -> PhaseSeconds {
        std::mem::take(&mut self.seconds)
    }
}
