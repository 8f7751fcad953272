//! The training loop. Everything here runs on every rank, in the same order; what only rank 0 does is
//! hidden inside `report` and `saving`.

use crate::engine::{GradientStep, MicroBatch};
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
use configs::{Exit, RunConfig};
use ops::collectives::Communicator;
use std::time::Instant;
use tracing::debug;

/// What the process brings to a run: its signals and its log.
#[derive(Debug)]
pub struct Process {
    /// Raised by signals.
    pub stop: StopFlag,
    /// Where it speaks.
    pub log: Log,
}

/// Trains to the end of the schedule, or until a signal on any rank asks to stop.
///
/// # Errors
/// Whatever ends a run before its time; afterwards the communicator must be aborted, not used.
pub fn train(config: &RunConfig, comm: &dyn Communicator, process: &Process) -> Result<Exit, TrainError> {
    let validation = Validation::open(config)?;
    let mut run = Run::open(config, comm, validation.as_ref(), &process.log)?;
    let mut model = Gpt::zeros(&config.model, run.device)?;
    let mut optimizer = Optimizer::new(&config.optim, &model);

    // Resume or start: afterwards every rank holds the same weights.
    let mut progress = run.restore(&mut model, &mut optimizer)?;
    if progress.step >= config.max_steps() {
        return Ok(run.already_finished(&progress));
    }

    let mut exit = Exit::Done;
    while progress.step < config.max_steps() {
        if let Some(validation) = validation.as_ref().filter(|_| due(progress.step, config.eval.every_steps))
        {
            run.reporter.eval(validation.run(&model, progress.step, comm)?)?;
        }

        let (report, agreed) = train_step(&mut run, &mut model, &mut optimizer, &progress, &process.stop)?;
        progress.advance(&run.plan);
        run.reporter.step(report)?;

        run.saver.settle(agreed, &mut run.reporter)?;
        if agreed.stop {
            exit = Exit::Stopped;
            break;
        }
        if progress.step.is_multiple_of(config.checkpoint.every_steps) {
            run.saver.save(&progress, &model, &optimizer, &mut run.reporter)?;
        }
    }

    if let (Some(validation), Exit::Done) = (&validation, exit) {
        run.reporter.eval(validation.run(&model, progress.step, comm)?)?;
    }
    run.saver.save_last(&progress, &model, &optimizer, &mut run.reporter)?;
    run.finish(&progress, &model, exit)
}

/// Every `every` steps from the first on; with 0 the first only.
fn due(step: u64, every: u64) -> bool {
    step == 0 || step.is_multiple_of(every)
}

/// One update: the gradient of one global batch, a micro-batch at a time, summed over the ranks, and
/// what the ranks agree on.
fn train_step(
    run: &mut Run<'_>,
    model: &mut Gpt,
    optimizer: &mut Optimizer,
    progress: &Progress,
    stop: &StopFlag,
) -> Result<(StepReport, Agreed), TrainError> {
    let (comm, plan, started) = (run.comm, &run.plan, Instant::now());
    let mut timing = Timing::default();
    let mut nats = 0.0;

    let mut gradient = GradientStep::begin(model, comm, &mut timing);
    for micro_step in 0..plan.grad_accum_steps {
        let samples = plan.samples(progress.samples, comm.rank(), micro_step);
        debug!("step {} samples {}..{}", progress.step + 1, samples.start, samples.end);
        let batch = gradient.time(Phase::Data, || run.samples.batch(samples))?;
        let batch = MicroBatch::from_rows(&batch.tokens, batch.row_len, run.device);
        // The sum over all targets of the global batch, divided by their number: so ranks only add.
        let scale = 1.0 / plan.global_tokens() as f64;
        nats += gradient.add(&batch, scale, micro_step + 1 == plan.grad_accum_steps)?;
    }
    let grad_norm = gradient.finish()?;

    // What follows is decided on reduced values, so that every rank takes the same way.
    let (loss, agreed) = run.saver.agree(nats, stop)?;
    let loss = loss / plan.global_tokens() as f64;
    if !loss.is_finite() || !grad_norm.is_finite() {
        let first_sample = progress.samples;
        let end_sample = first_sample + plan.samples_per_step();
        return Err(TrainError::NotFinite {
            step: progress.step + 1,
            loss,
            grad_norm,
            first_sample,
            end_sample,
        });
    }
    let lr = run.config.lr(progress.step);
    let update = timing.now();
    optimizer.update(model, progress.step, lr, grad_norm)?;
    timing.add(Phase::Optimizer, update);

    let seconds = started.elapsed().as_secs_f64();
    let report = StepReport {
        step: progress.step + 1,
        tokens: progress.tokens(plan) + plan.global_tokens(),
        first_sample: progress.samples,
        loss,
        lr,
        grad_norm,
        tokens_per_second: plan.global_tokens() as f64 / seconds,
        mfu: run.config.model.flops_per_sequence() * plan.samples_per_step() as f64
            / seconds
            / run.peak_flops,
        seconds,
        phases: timing.take(),
    };
    Ok((report, agreed))
}
