//! The training loop. Everything here runs on every rank, in the same order; what only rank 0 does is
//! hidden inside `report` and `saving`.

use crate::engine::{Engine, MicroBatch};
use crate::error::TrainError;
use crate::evaluation::Validation;
use crate::gradients::Gradients;
use crate::guard::{self, NotFinite, Spike};
use crate::inject::Faults;
use crate::log::Log;
use crate::masking::Purpose;
use crate::metrics::StepReport;
use crate::model::Gpt;
use crate::optimizer::Optimizer;
use crate::pulse::Pulse;
use crate::replicas;
use crate::run::Run;
use crate::saving::{Agreed, Progress};
use crate::stop::StopFlag;
use crate::suite::Measure;
use crate::timing::{Phase, Timing};
use crate::weights::Parameters;
use configs::{Doing, Exit, RunConfig, SegmentSpec};
use ops::Dropout;
use ops::collectives::Communicator;
use std::time::Instant;
use tch::Kind;
use tracing::debug;

/// What the process brings to a run: its signals, its log, its device, and what it was asked to spoil.
#[derive(Debug)]
pub struct Process {
    /// Raised by signals.
    pub stop: StopFlag,
    /// Where it speaks.
    pub log: Log,
    /// Where tensors live.
    pub device: tch::Device,
    /// What is made to go wrong.
    pub faults: Faults,
    /// Shows what it is doing.
    pub pulse: Pulse,
}

/// What a step changes: the weights, with their gradients on the way there, and the optimizer's state.
pub(crate) struct Learner<'a> {
    pub(crate) engine: Engine<'a>,
    pub(crate) optimizer: Optimizer,
}

impl<'a> Learner<'a> {
    /// Zeros everywhere, for `segments` that compute in `kind`; a checkpoint or the initial weights fill them.
    /// Collective.
    pub(crate) fn new(
        config: &RunConfig,
        segments: Vec<SegmentSpec>,
        kind: Kind,
        process: &Process,
        comm: &'a dyn Communicator,
    ) -> Result<Learner<'a>, TrainError> {
        let (model, shard) = (Gpt::new(&config.model), config.parallel.shard);
        let parameters = Parameters::zeros(segments, shard, kind, process.device, comm)?;
        let reproducible = config.reproducible(process.device == tch::Device::Cpu);
        let most_leaves = config.batch_plan(comm.world_size())?.grad_accum_steps;
        let gradients = Gradients::new(&parameters, most_leaves, reproducible, comm)?;
        let optimizer = Optimizer::new(&config.optim, &parameters)?;
        let mut engine = Engine::new(model, parameters, gradients, config.parallel.recompute);
        engine.show(&process.pulse);
        Ok(Learner { engine, optimizer })
    }
}

/// Trains to the end of the schedule, or until a signal on any rank asks to stop.
///
/// # Errors
/// Whatever ends a run before its time; afterwards the communicator must be aborted, not used.
pub fn train(config: &RunConfig, comm: &dyn Communicator, process: &Process) -> Result<Exit, TrainError> {
    let validation = Validation::open(config)?;
    let suite = Measure::of_run(config)?;
    let mut run = Run::open(config, comm, validation.as_ref(), process)?;
    let mut learner = Learner::new(config, configs::segments(&config.model), run.kind, process, comm)?;

    // Resume or start: afterwards every rank holds the same weights.
    let mut progress = run.restore(&mut learner)?;
    if progress.step >= config.max_steps() {
        return Ok(run.already_finished(&progress));
    }

    let mut exit = Exit::Done;
    while progress.step < config.max_steps() {
        let validation = validation.as_ref().filter(|_| due(progress.step, config.eval.every_steps));
        let suite = suite.as_ref().filter(|_| due(progress.step, config.eval.suite_every_steps));
        evaluate((validation, suite), &mut run, &mut learner.engine, progress.step)?;

        run.plan = config.batches().plan(progress.step, comm.world_size())?;
        let (outcome, agreed) = train_step(&mut run, &mut learner, &progress, &process.stop)?;
        let report = match outcome {
            Outcome::Updated(report) => report,
            Outcome::Spiked(spike) => {
                progress = run.rewind(spike, &progress, &mut learner)?;
                continue;
            }
        };
        progress.advance(&run.plan, report.loss);
        run.reporter.step(report)?;

        run.pulse.at(Doing::Saving);
        run.saver.settle(agreed, &mut run.reporter)?;
        let (last, save) = (
            agreed.stop || progress.step >= config.max_steps(),
            progress.step.is_multiple_of(config.checkpoint.every_steps),
        );
        run.pulse.at(Doing::Comparing);
        if guard::compares_replicas(&config.guard, progress.step, save || last)
            && let Some(difference) = replicas::compare(comm, learner.engine.parameters_mut(), progress.step)?
        {
            return Err(run.ended_by(difference));
        }
        if agreed.stop {
            exit = Exit::Stopped;
            break;
        }
        if save {
            run.pulse.at(Doing::Saving);
            run.saver.save(&progress, &mut learner, &mut run.reporter)?;
        }
    }

    if exit == Exit::Done {
        evaluate((validation.as_ref(), suite.as_ref()), &mut run, &mut learner.engine, progress.step)?;
    }
    run.pulse.at(Doing::Saving);
    run.saver.save_last(&progress, &mut learner, &mut run.reporter)?;
    run.pulse.at(Doing::Ending);
    run.finish(&progress, &mut learner.engine, exit)
}

/// Measures the model as it is after `step` updates, on what is given. Collective.
fn evaluate(
    (validation, suite): (Option<&Validation>, Option<&Measure>),
    run: &mut Run<'_>,
    engine: &mut Engine<'_>,
    step: u64,
) -> Result<(), TrainError> {
    if let Some(validation) = validation {
        run.pulse.at(Doing::Evaluation);
        run.reporter.eval(validation.run(engine, step, run.comm)?)?;
    }
    if let Some(suite) = suite {
        run.pulse.at(Doing::Evaluation);
        run.reporter.suite(step, suite.run(engine, run.comm)?)?;
    }
    Ok(())
}

/// Every `every` steps from the first on; with 0 the first only.
pub(crate) fn due(step: u64, every: u64) -> bool {
    step == 0 || step.is_multiple_of(every)
}

/// What has become of a step.
enum Outcome {
    /// The update was made.
    Updated(StepReport),
    /// It was not: the loss is too high.
    Spiked(Spike),
}

/// One update: the gradient of one global batch, a micro-batch at a time, summed over the ranks, and
/// what the ranks agree on.
fn train_step(
    run: &mut Run<'_>,
    learner: &mut Learner<'_>,
    progress: &Progress,
    stop: &StopFlag,
) -> Result<(Outcome, Agreed), TrainError> {
    let (config, comm, plan, started) = (run.config, run.comm, &run.plan, Instant::now());
    let Learner { engine, optimizer } = learner;
    let mut timing = Timing::default();

    let positions = progress.samples..progress.samples + plan.samples_per_step();
    let first_position = |step: u64| config.batches().samples_before(step - 1);
    let spoiled =
        run.faults.of_step(progress.step + 1, comm.rank(), &run.samples, positions.clone(), first_position);

    let targets = run.targets(progress)? as f64;
    engine.begin(plan.grad_accum_steps, run.reporter.tells(progress.step + 1));
    for micro_step in 0..plan.grad_accum_steps {
        let batch = next_batch(run, progress, micro_step, &mut timing)?;
        // The sum over all targets of the global batch, divided by their number: so ranks only add.
        let scale = spoiled.factor(micro_step) / targets;
        engine.add(&batch, scale, &mut timing)?;
    }
    let mut gradient = engine.finish(&mut timing)?;
    spoiled.spoil(&mut gradient.losses);

    // What follows is decided on reduced values, so that every rank takes the same way.
    run.pulse.at(Doing::Agree);
    let agreed = run.saver.agree(&gradient, stop)?;
    let (loss, grad_norm) = (agreed.nats / targets, agreed.squares.sqrt());
    if !(loss.is_finite() && grad_norm.is_finite()) {
        let found = NotFinite { loss, grad_norm, losses: &gradient.losses };
        let why = guard::not_finite(comm, &run.samples, plan, progress, found)?;
        return Err(run.ended_by(why));
    }
    if let Some(spike) = guard::spike(config.guard.spike_factor, loss, &progress.recent_losses) {
        return Ok((Outcome::Spiked(spike), agreed));
    }
    let lr = config.lr(progress.step);
    run.pulse.at(Doing::Optimizer);
    let update = timing.now();
    optimizer.update(engine, progress.step, lr, grad_norm)?;
    timing.add(Phase::Optimizer, update);
    run.faults.flip(progress.step + 1, comm.rank(), engine.parameters_mut())?;

    let (seconds, phases) = (started.elapsed().as_secs_f64(), timing.take());
    run.pulse.stepped(progress.step + 1, seconds - phases.reduce);
    let samples = run.samples.numbers(positions);
    let flops = config.model.flops_per_sequence() * plan.samples_per_step() as f64;
    let report = StepReport {
        step: progress.step + 1,
        tokens: progress.tokens + plan.global_tokens(),
        first_sample: samples.start,
        loss,
        lr,
        grad_norm,
        tokens_per_second: plan.global_tokens() as f64 / seconds,
        mfu: flops / seconds / run.peak_flops,
        seconds,
        phases,
        noise_scale_tokens: run.noise_scale.of_step(&agreed, plan.global_tokens()),
        epochs: run.samples.epochs(samples.end),
    };
    Ok((Outcome::Updated(report), agreed))
}

/// This rank's micro-batch number `micro_step` of the step.
fn next_batch(
    run: &Run<'_>,
    progress: &Progress,
    micro_step: u64,
    timing: &mut Timing,
) -> Result<MicroBatch, TrainError> {
    run.pulse.at(Doing::Data);
    if micro_step == 0 {
        run.faults.befall(progress.step + 1, run.comm.rank());
    }
    let positions = run.plan.samples(progress.samples, run.comm.rank(), micro_step);
    let samples = run.samples.numbers(positions.clone());
    debug!("step {} samples {}..{}", progress.step + 1, samples.start, samples.end);
    let waiting = timing.now();
    let rows = run.samples.batch(positions.clone())?;
    let mut batch = match &run.masking {
        Some(masking) => masking.batch(Purpose::Training(progress.step), positions.start, &rows, run.device),
        None => MicroBatch::from_rows(&rows.tokens, rows.row_len, run.device),
    };
    batch.keep_to_documents(&rows.tokens, rows.row_len, run.document_end());
    batch.dropout = dropout(run.config, progress.step, positions.start);
    timing.add(Phase::Data, waiting);
    Ok(batch)
}

/// The dropout of a micro-batch whose first sample is `first_sample`, if the run has any.
pub(crate) fn dropout(config: &RunConfig, step: u64, first_sample: u64) -> Option<Dropout> {
    let p = config.model.dropout;
    (p > 0.0).then_some(Dropout { p, seed: config.run.seed, step, first_sample })
}
