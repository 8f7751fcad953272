//! The training loop. Everything here runs on every rank, in the same order; what only rank 0 does is
//! hidden inside `report` and `saving`.

use crate::engine::{Engine, MicroBatch};
use crate::error::TrainError;
use crate::evaluation::Validation;
use crate::gradients::Gradients;
use crate::log::Log;
use crate::metrics::StepReport;
use crate::model::Gpt;
use crate::optimizer::Optimizer;
use crate::run::Run;
use crate::saving::{Agreed, Progress};
use crate::stop::StopFlag;
use crate::timing::{Phase, Timing};
use crate::weights::Parameters;
use configs::{BatchPlan, Exit, RunConfig};
use ops::Dropout;
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

/// What a step changes: the weights, with their gradients on the way there, and the optimizer's state.
pub(crate) struct Learner<'a> {
    pub(crate) engine: Engine<'a>,
    pub(crate) optimizer: Optimizer,
}

impl<'a> Learner<'a> {
    /// Zeros everywhere; a checkpoint or the initial weights fill them.
    fn new(run: &Run<'a>) -> Result<Learner<'a>, TrainError> {
        let (config, comm) = (run.config, run.comm);
        let (model, shard) = (Gpt::new(&config.model), config.parallel.shard);
        let parameters =
            Parameters::zeros(configs::segments(&config.model), shard, run.kind, run.device, comm)?;
        let reproducible = config.reproducible(run.device == tch::Device::Cpu);
        let gradients = Gradients::new(&parameters, run.plan.grad_accum_steps, reproducible, comm)?;
        let optimizer = Optimizer::new(&config.optim, &parameters)?;
        let engine = Engine::new(model, parameters, gradients, config.parallel.recompute);
        Ok(Learner { engine, optimizer })
    }
}

/// Trains to the end of the schedule, or until a signal on any rank asks to stop.
///
/// # Errors
/// Whatever ends a run before its time; afterwards the communicator must be aborted, not used.
pub fn train(config: &RunConfig, comm: &dyn Communicator, process: &Process) -> Result<Exit, TrainError> {
    let validation = Validation::open(config)?;
    let mut run = Run::open(config, comm, validation.as_ref(), process)?;
    let mut learner = Learner::new(&run)?;

    // Resume or start: afterwards every rank holds the same weights.
    let mut progress = run.restore(&mut learner)?;
    if progress.step >= config.max_steps() {
        return Ok(run.already_finished(&progress));
    }

    let mut exit = Exit::Done;
    while progress.step < config.max_steps() {
        if let Some(validation) = validation.as_ref().filter(|_| due(progress.step, config.eval.every_steps))
        {
            run.reporter.eval(validation.run(&mut learner.engine, progress.step, comm)?)?;
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
            run.saver.save(&progress, &mut learner, &mut run.reporter)?;
        }
    }

    if let (Some(validation), Exit::Done) = (&validation, exit) {
        run.reporter.eval(validation.run(&mut learner.engine, progress.step, comm)?)?;
    }
    run.saver.save_last(&progress, &mut learner, &mut run.reporter)?;
    run.finish(&progress, &mut learner.engine, exit)
}

/// Every `every` steps from the first on; with 0 the first only.
fn due(step: u64, every: u64) -> bool {
    step == 0 || step.is_multiple_of(every)
}

/// One update: the gradient of one global batch, a micro-batch at a time, summed over the ranks, and
/// what the ranks agree on.
fn train_step(
    run: &mut Run<'_>,
    learner: &mut Learner<'_>,
    progress: &Progress,
    stop: &StopFlag,
) -> Result<(StepReport, Agreed), TrainError> {
    let (config, plan, started) = (run.config, &run.plan, Instant::now());
    let Learner { engine, optimizer } = learner;
    let mut timing = Timing::default();

    engine.begin(plan.grad_accum_steps, false);
    for micro_step in 0..plan.grad_accum_steps {
        let samples = plan.samples(progress.samples, run.comm.rank(), micro_step);
        debug!("step {} samples {}..{}", progress.step + 1, samples.start, samples.end);
        let waiting = timing.now();
        let rows = run.samples.batch(samples.clone())?;
        let mut batch = MicroBatch::from_rows(&rows.tokens, rows.row_len, run.device);
        batch.dropout = dropout(config, progress.step, samples.start);
        timing.add(Phase::Data, waiting);
        // The sum over all targets of the global batch, divided by their number: so ranks only add.
        engine.add(&batch, 1.0 / plan.global_tokens() as f64, &mut timing)?;
    }
    let gradient = engine.finish(&mut timing)?;

    // What follows is decided on reduced values, so that every rank takes the same way.
    let agreed = run.saver.agree(gradient, stop)?;
    let (loss, grad_norm) = (agreed.nats / plan.global_tokens() as f64, agreed.squares.sqrt());
    require_finite(loss, grad_norm, progress, plan)?;
    let lr = config.lr(progress.step);
    let update = timing.now();
    optimizer.update(engine, progress.step, lr, grad_norm)?;
    timing.add(Phase::Optimizer, update);

    let seconds = started.elapsed().as_secs_f64();
    let flops = config.model.flops_per_sequence() * plan.samples_per_step() as f64;
    let report = StepReport {
        step: progress.step + 1,
        tokens: progress.tokens + plan.global_tokens(),
        first_sample: progress.samples,
        loss,
        lr,
        grad_norm,
        tokens_per_second: plan.global_tokens() as f64 / seconds,
        mfu: flops / seconds / run.peak_flops,
        seconds,
        phases: timing.take(),
    };
    Ok((report, agreed))
}

/// The dropout of a micro-batch whose first sample is `first_sample`, if the run has any.
fn dropout(config: &RunConfig, step: u64, first_sample: u64) -> Option<Dropout> {
    let p = config.model.dropout;
    (p > 0.0).then_some(Dropout { p, seed: config.run.seed, step, first_sample })
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
