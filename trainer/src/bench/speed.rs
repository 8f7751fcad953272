//! How fast steps of a configuration are: what `scripts/bench-train` runs in turns with a step of PyTorch's.
//! Knows nothing of what it is compared with.

use super::memory::most_resident_bytes;
use super::steps::Steps;
use super::{median, most};
use crate::error::TrainError;
use crate::timing::{PhaseSeconds, Timing};
use configs::{RunConfig, Setup};
use ops::collectives::Communicator;
use serde::Serialize;
use std::time::Instant;
use tch::{Device, Kind};

/// What steps of a configuration take.
#[derive(Debug, Clone, Serialize)]
pub struct Speed {
    /// `fp32` or `bf16`.
    pub dtype: &'static str,
    /// Seconds of each timed step, on its slowest rank.
    pub step_seconds: Vec<f64>,
    /// Of all ranks, by the median step.
    pub tokens_per_second: f64,
    /// Where rank 0's time went, seconds of a step.
    pub phases: PhaseSeconds,
    /// FLOP/s of the model, of all ranks: what MFU counts.
    pub model_flops: f64,
    /// The matrix rate of this process, FLOP/s; `None` where it was not asked for.
    pub matrix_peak: Option<f64>,
    /// The most memory that rank 0 has used, in bytes.
    pub peak_bytes: u64,
}

/// Times `steps` steps of `config` on made-up tokens, after `warmup` that are not counted. Collective.
///
/// # Errors
/// A batch that the ranks cannot share, no memory, a failed collective.
pub fn speed(
    config: &RunConfig,
    comm: &dyn Communicator,
    (warmup, steps): (u64, u64),
    with_peak: bool,
) -> Result<Speed, TrainError> {
    let kind = ops::device::dtype(config.parallel.dtype, Device::Cpu);
    let setup = Setup::of(config, comm.world_size(), true, kind == Kind::BFloat16)?;
    let mut run = Steps::new(config, &setup, comm)?;
    let (mut timing, mut step_seconds) = (Timing::default(), Vec::new());
    for step in 0..warmup + steps {
        if step == warmup {
            timing = Timing::default();
        }
        let began = Instant::now();
        run.make(&mut timing)?;
        let seconds = most(comm, began.elapsed().as_secs_f64())?;
        if step >= warmup {
            step_seconds.push(seconds);
        }
    }
    run.learner.engine.parameters_mut().settle()?;
    let peak_bytes = most_resident_bytes();
    let (seconds, tokens) = (median(step_seconds.clone()), config.batch.global_batch_tokens as f64);
    let sequences = tokens / config.model.seq_len as f64;
    Ok(Speed {
        dtype: if kind == Kind::BFloat16 { "bf16" } else { "fp32" },
        tokens_per_second: tokens / seconds,
        phases: timing.take().per(steps as f64),
        model_flops: config.model.flops_per_sequence() * sequences / seconds,
        matrix_peak: with_peak.then(|| ops::device::matrix_peak(Device::Cpu, kind)),
        peak_bytes,
        step_seconds,
    })
}
