//! Faults brought about on purpose, so that tests can see what a run makes of them: what each does to a
//! step. How they are written is `configs`'; whether they are allowed is asked where they are typed.

use crate::error::TrainError;
use crate::weights::Parameters;
use configs::{Fault, Shard};
use dataloader::Samples;
use std::ops::Range;
use std::time::{Duration, Instant};
use tch::Kind;
use tracing::warn;

/// What a spike multiplies the loss by.
const SPIKE: f64 = 100.0;

/// The bit of a weight that flips: in the mantissa of fp32 and of bf16.
const BIT: u32 = 1 << 20;

/// The segment whose weight it is: the first block.
const FLIPPED: usize = 2;

/// The faults of a run.
#[derive(Debug, Clone, Default)]
pub struct Faults {
    faults: Vec<Fault>,
}

/// What is wrong with a step of this rank.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Spoiled {
    nan: bool,
    spike: bool,
}

impl Faults {
    /// Those that were asked for.
    pub fn new(faults: &[Fault]) -> Faults {
        Faults { faults: faults.to_vec() }
    }

    /// Refuses faults of ranks that there are not, and tells of all others.
    ///
    /// # Errors
    /// `FaultyRank`.
    pub(crate) fn check(&self, world_size: usize) -> Result<(), TrainError> {
        for &fault in &self.faults {
            if fault.rank().is_some_and(|rank| rank >= world_size) {
                return Err(TrainError::FaultyRank { fault, world_size });
            }
            warn!("this run is made to fail: {fault}");
        }
        Ok(())
    }

    /// What is wrong with the update number `step`, of the samples at `positions`; `first_position` says
    /// at which position an update begins.
    pub(crate) fn of_step(
        &self,
        step: u64,
        rank: usize,
        samples: &Samples,
        positions: Range<u64>,
        first_position: impl Fn(u64) -> u64,
    ) -> Spoiled {
        let numbers = samples.numbers(positions);
        let has = |sample: u64| numbers.contains(&sample) && !samples.skips().contains(sample);
        let mut spoiled = Spoiled { nan: false, spike: false };
        for fault in &self.faults {
            match *fault {
                Fault::Nan { step: at, rank: whose } => spoiled.nan |= (at, whose) == (step, rank),
                Fault::Spike { step: at } => spoiled.spike |= has(first_position(at)),
                Fault::Flip { .. } | Fault::Panic { .. } | Fault::Hang { .. } | Fault::Slow { .. } => {}
            }
        }
        spoiled
    }

    /// What befalls this rank within the update number `step`.
    pub(crate) fn befall(&self, step: u64, rank: usize) {
        for fault in self.faults.iter().filter(|fault| fault.rank() == Some(rank)) {
            match *fault {
                Fault::Panic { step: at, .. } if at == step => panic!("as asked for: {fault}"),
                Fault::Hang { step: at, .. } if at == step => loop {
                    std::thread::park();
                },
                Fault::Slow { ms, .. } => {
                    let until = Instant::now() + Duration::from_millis(ms);
                    while Instant::now() < until {
                        std::hint::spin_loop();
                    }
                }
                _ => {}
            }
        }
    }

    /// Flips a bit of a weight if it is this rank's turn, after the update number `step`.
    ///
    /// # Errors
    /// A failed collective.
    pub(crate) fn flip(
        &self,
        step: u64,
        rank: usize,
        parameters: &mut Parameters<'_>,
    ) -> Result<(), TrainError> {
        if !self.faults.iter().any(|fault| matches!(fault, Fault::Flip { step: at, .. } if *at == step)) {
            return Ok(());
        }
        parameters.settle()?;
        if self.faults.contains(&Fault::Flip { step, rank }) {
            // Where others' slices are gathered, what has flipped is a copy of one of theirs.
            let flat = match parameters.shard() {
                Shard::Optimizer | Shard::Gradients => parameters.get(FLIPPED)?.flat(),
                Shard::None | Shard::Parameters => parameters.master(FLIPPED),
            };
            let mut weight = flat.narrow(0, 0, flat.size()[0].min(1));
            let value = weight.to_kind(Kind::Double).sum(Kind::Double).double_value(&[]) as f32;
            let _ = weight.fill_(f64::from(f32::from_bits(value.to_bits() ^ BIT)));
            warn!("a bit of a weight of {} has flipped, as asked for", parameters.spec(FLIPPED).name);
        }
        Ok(())
    }
}

impl Spoiled {
    /// Makes this rank's losses what they are with the fault.
    pub(crate) fn spoil(&self, losses: &mut [f64]) {
        (0..).zip(losses).for_each(|(micro_step, loss)| *loss *= self.factor(micro_step));
    }

    /// What the loss and the gradient of a micro-batch of this rank are multiplied by: 1 where nothing
    /// is wrong.
    pub(crate) fn factor(&self, micro_step: u64) -> f64 {
        match (self.nan && micro_step == 0, self.spike) {
            (true, _) => f64::NAN,
            (false, true) => SPIKE,
            (false, false) => 1.0,
        }
    }
}
