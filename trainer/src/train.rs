//! The training loop. Everything here runs on every rank, in the same order; what only rank 0 does is
//! hidden inside `report` and `saving`.

use crate::engine::{Accumulation, GradientStep, MicroBatch};
use crate::error::TrainError;
use crate::evaluation::Validation;
use crate::log::Log;
use crate::metrics::StepReport;
use crate::model::Gpt;
use crate::optimizer::Optimizer;
use crate::run::Run;
use crate::saving::{Agreed, Progress};
use crate::stop::StopFlag;
use crate::timing::{Phase, Timing};
use configs::{BatchPlan, Exit, RunConfig};
use ops::collectives::Communicator;
use std::time::Instant;
use tracing::debug;

/// What the process brings to a run: its signals, its log and its device.
#[derive(Debug)]
pub struct Process {
    /// Raised by signals.
    pub stop: StopFlag,
    /// Where it speaks.
    pub log: Log,
    /// Where tensors live.
    pub device: tch::Device,
}

/// What a step changes: the weights, the optimizer's state, and the sums on the way there.
struct Learner {
    model: Gpt,
    optimizer: Optimizer,
    sums: Accumulation,
}

/// Trains to the end of the schedule, or until a signal on any rank asks to stop.
///
/// # Errors
/// Whatever ends a run before its time; afterwards the communicator must be aborted, not used.
pub fn train(config: &RunConfig, comm: &dyn Communicator, process: &Process) -> Result<Exit, TrainError> {
    let validation = Validation::open(config)?;
    let mut run = Run::open(config, comm, validation.as_ref(), process)?;
    let model = Gpt::zeros(&config.model, run.device)?;
    let optimizer = Optimizer::new(&config.optim, &model);
    let reproducible = config.reproducible(run.device == tch::Device::Cpu);
    let sums = Accumulation::new(&model, run.plan.grad_accum_steps, reproducible);
    let mut learner = Learner { model, optimizer, sums };

    // Resume or start: afterwards every rank holds the same weights.
    let mut progress = run.restore(&mut learner.model, &mut learner.optimizer)?;
    if progress.step >= config.max_steps() {
        return Ok(run.already_finished(&progress));
    }

    let mut exit = Exit::Done;
    while progress.step < config.max_steps() {
        if let Some(validation) = validation.as_ref().filter(|_| due(progress.step, config.eval.every_steps))
        {
            run.reporter.eval(validation.run(&learner.model, progress.step, comm)?)?;
        }

        let (report, agreed) = train_step(&mut run, &mut learner, &progress, &process.stop)?;
        progress.advance(&run.plan);
        run.reporter.step(report)?;

        run.saver.settle(agreed, &mut run.reporter)?;
        if agreed.stop {
            exit = Exit::Stopped;
            break;
        }
        if progress.step.is_multiple_of(config.checkpoint.every_steps) {
            run.saver.save(&progress, &learner.model, &learner.optimizer, &mut run.reporter)?;
        }
    }

    if let (Some(validation), Exit::Done) = (&validation, exit) {
        run.reporter.eval(validation.run(&learner.model, progress.step, comm)?)?;
    }
    run.saver.save_last(&progress, &learner.model, &learner.optimizer, &mut run.reporter)?;
    run.finish(&progress, &learner.model, exit)
}

/// Every `every` steps from the first on; with 0 the first only.
fn due(step: u64, every: u64) -> bool {
    step == 0 || step.is_multiple_of(every)
}

/// One update: the gradient of one global batch, a micro-batch at a time, summed over the ranks, and
/// what the ranks agree on.
fn train_step(
    run: &mut Run<'_>,
    learner: &mut Learner,
    progress: &Progress,
    stop: &StopFlag,
) -> Result<(StepReport, Agreed), TrainError> {
    let (comm, plan, started) = (run.comm, &run.plan, Instant::now());
    let Learner { model, optimizer, sums } = learner;
    let mut timing = Timing::default();

    let mut step = GradientStep::begin(model, comm, &mut timing, sums);
    for micro_step in 0..plan.grad_accum_steps {
        let samples = plan.samples(progress.samples, comm.rank(), micro_step);
        debug!("step {} samples {}..{}", progress.step + 1, samples.start, samples.end);
        let batch = step.time(Phase::Data, || run.samples.batch(samples))?;
        let batch = MicroBatch::from_rows(&batch.tokens, batch.row_len, run.device);
        // The sum over all targets of the global batch, divided by their number: so ranks only add.
        step.add(&batch, 1.0 / plan.global_tokens() as f64)?;
    }
    let gradient = step.finish()?;

    // What follows is decided on reduced values, so that every rank takes the same way.
    let (nats, agreed) = run.saver.agree(gradient.nats, stop)?;
    let loss = nats / plan.global_tokens() as f64;
    require_finite(loss, gradient.norm, progress, plan)?;
    let lr = run.config.lr(progress.step);
    let update = timing.now();
    optimizer.update(model, progress.step, lr, gradient.norm)?;
    timing.add(Phase::Optimizer, update);

    let seconds = started.elapsed().as_secs_f64();
    let flops = run.config.model.flops_per_sequence() * plan.samples_per_step() as f64;
    let report = StepReport {
        step: progress.step + 1,
        tokens: progress.tokens + plan.global_tokens(),
        first_sample: progress.samples,
        loss,
        lr,
        grad_norm: gradient.norm,
        tokens_per_second: plan.global_tokens() as f64 / seconds,
        mfu: flops / seconds / run.peak_flops,
        seconds,
        phases: timing.take(),
    };
    Ok((report, agreed))
}

/// Nobody moves on a bad number.
fn require_finite(
    loss: f64,
    grad_norm: f64,
    progress: &Progress,
    plan: &BatchPlan,
) -> Result<(), TrainError> {
    if loss.is_finite() && grad_norm.is_finite() {
        return Ok(());
    }
    let first_sample = progress.samples;
    let end_sample = first_sample + plan.samples_per_step();
    Err(TrainError::NotFinite { step: progress.step + 1, loss, grad_norm, first_sample, end_sample })
}
