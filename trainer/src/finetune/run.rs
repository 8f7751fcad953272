//! A fine-tuning run: its examples in the run's order, its loop, and its scores. Everything here runs on every
//! rank, in the same order; gradients, updates and checkpoints are those of pre-training.

use super::base::Base;
use super::batch::{apart_from_padding, language_targets, micro_batch};
use super::scores::{Prediction, scores};
use crate::alike;
use crate::checkpoint::{Loaded, TrainState};
use crate::engine::{Engine, MicroBatch};
use crate::error::TrainError;
use crate::guard;
use crate::metrics::{FailureReport, ScoreReport, StartReport, StepReport};
use crate::replicas;
use crate::report::Reporter;
use crate::resume::load;
use crate::run::hex;
use crate::run_folder::{RunFolder, unix_seconds};
use crate::saving::{Agreed, Progress, Saver};
use crate::start::Start;
use crate::timing::{Phase, Timing};
use crate::train::{Learner, Process, dropout, due};
use configs::{BatchPlan, Doing, Exit, ModelConfig, RunConfig, TaskConfig, TaskFile, task_segment};
use dataloader::{Answer, LaidOut, Order, TaskSet, Tokenizer};
use ops::collectives::Communicator;
use std::ops::Range;
use std::path::Path;
use std::time::Instant;
use tch::{Device, Kind, Tensor};
use tracing::{info, warn};

/// The open parts of a fine-tuning run.
struct Tuning<'a> {
    config: &'a RunConfig,
    task: &'a TaskConfig,
    comm: &'a dyn Communicator,
    device: Device,
    plan: BatchPlan,
    data: &'a TaskData,
    order: Order,
    saver: Saver<'a>,
    reporter: Reporter,
    peak_flops: f64,
    folder: RunFolder,
    generation: u64,
    resume: Option<Loaded>,
}

/// Fine-tunes the model of the checkpoint `from` to a task, to the end of its epochs or until a signal on any
/// rank asks to stop; goes on where an earlier start of the same run ended.
///
/// # Errors
/// Whatever ends a run before its time; afterwards the communicator must be aborted, not used.
pub fn finetune(
    file: &TaskFile,
    from: &Path,
    comm: &dyn Communicator,
    process: &Process,
) -> Result<Exit, TrainError> {
    let base = Base::open(from, comm)?;
    let data = TaskData::open(file, &base)?;
    let config = run_config(file, &base, &data.train)?;
    let Some(task) = &config.task else { unreachable!("the run of a task file has a task") };
    let mut segments = configs::segments(&config.model);
    segments.push(task_segment(&config.model, task.outputs()));

    let mut run = Tuning::open(&config, task, &data, &segments, comm, process)?;
    let kind = ops::device::dtype(config.parallel.dtype, process.device);
    let mut learner = Learner::new(&config, segments, kind, process, comm)?;
    let mut progress = run.restore(&base, &mut learner, process)?;
    if progress.step >= config.max_steps() {
        info!(
            "this run is finished: all {} steps are done (in {})",
            progress.step,
            run.folder.dir().display()
        );
        return Ok(Exit::Done);
    }
    drop(base);

    let mut exit = Exit::Done;
    while progress.step < config.max_steps() {
        if due(progress.step, config.eval.every_steps) {
            run.score(&mut learner.engine, progress.step, process)?;
        }
        let agreed = run.step(&mut learner, &mut progress, process)?;
        process.pulse.at(Doing::Saving);
        run.saver.settle(agreed, &mut run.reporter)?;
        let last = agreed.stop || progress.step >= config.max_steps();
        let save = progress.step.is_multiple_of(config.checkpoint.every_steps);
        process.pulse.at(Doing::Comparing);
        if guard::compares_replicas(&config.guard, progress.step, save || last)
            && let Some(difference) = replicas::compare(comm, learner.engine.parameters_mut(), progress.step)?
        {
            return Err(run.ended_by(progress.step, difference));
        }
        if agreed.stop {
            exit = Exit::Stopped;
            break;
        }
        if save && !last {
            process.pulse.at(Doing::Saving);
            run.saver.save(&progress, &mut learner, &mut run.reporter)?;
        }
    }
    run.end(&progress, &mut learner, exit, process)
}

/// What a run learns from and is scored on, and how text becomes tokens.
struct TaskData {
    train: TaskSet,
    val: Option<TaskSet>,
    tokenizer: Tokenizer,
}

impl TaskData {
    fn open(file: &TaskFile, base: &Base) -> Result<TaskData, TrainError> {
        let (tokenizer, model) = (base.tokenizer()?, &base.config.model);
        let open =
            |path: &Path| TaskSet::open(path, &file.task, &tokenizer, model.vocab_size, model.seq_len, true);
        let train = open(file.data.train.as_deref().unwrap_or(Path::new("")))?;
        let val = file.data.val.as_deref().map(open).transpose()?;
        Ok(TaskData { train, val, tokenizer })
    }
}

/// The run, once model and data are known.
fn run_config(file: &TaskFile, base: &Base, train: &TaskSet) -> Result<RunConfig, TrainError> {
    if base.config.task.is_some() {
        let what = "it is fine-tuned already; start from the model that it was made of".to_string();
        return Err(TrainError::Base { checkpoint: base.loaded.folder().to_path_buf(), what });
    }
    Ok(file.run_config(&base.config.model, train.len() as u64, base.name()))
}

impl<'a> Tuning<'a> {
    /// Opens the run folder and claims this start of the run. Collective.
    fn open(
        config: &'a RunConfig,
        task: &'a TaskConfig,
        data: &'a TaskData,
        segments: &[configs::SegmentSpec],
        comm: &'a dyn Communicator,
        process: &Process,
    ) -> Result<Tuning<'a>, TrainError> {
        let device = process.device;
        alike::check(comm, config.reproducible(device == Device::Cpu))?;
        config.batch_plan(comm.world_size())?;
        process.faults.check(comm.world_size())?;
        let template = TrainState {
            train_digest: hex(&data.train.digest()),
            val_digest: data.val.as_ref().map(|val| hex(&val.digest())),
            ..TrainState::start(config, data.tokenizer.id(), segments.to_vec())
        };
        let Start { folder, generation, resume, plan, saver, reporter, peak_flops } =
            Start::claim(config, template, &data.tokenizer, comm, process)?;
        let order = data.train.order(config.run.seed);
        Ok(Tuning {
            config,
            task,
            comm,
            device,
            plan,
            data,
            order,
            saver,
            reporter,
            peak_flops,
            folder,
            generation,
            resume,
        })
    }

    /// Fills model and optimizer from this run's newest good checkpoint, or from the model it starts from.
    /// Collective: afterwards every rank holds the same.
    fn restore(
        &mut self,
        base: &Base,
        learner: &mut Learner<'_>,
        process: &Process,
    ) -> Result<Progress, TrainError> {
        let progress = match self.resume.take() {
            Some(loaded) => {
                info!("going on from {} at step {}", loaded.folder().display(), loaded.state().step);
                load(&loaded, learner)?;
                let progress = Progress::of(loaded.state());
                self.saver.resumed_at(progress.step);
                progress
            }
            None => {
                info!("starting from {}", base.loaded.folder().display());
                learner.engine.parameters_mut().init(self.config.run.seed);
                base.fill(learner.engine.parameters())?;
                Progress::default()
            }
        };
        learner.engine.parameters_mut().share()?;
        process.pulse.goes_on(progress.step, self.generation);
        let added = task_segment(&self.config.model, self.task.outputs());
        let added: usize = added.tensors.iter().map(configs::TensorSpec::numel).sum();
        self.reporter.start(StartReport {
            step: progress.step,
            generation: self.generation,
            unix_s: unix_seconds(),
            world_size: self.comm.world_size(),
            parameters: self.config.model.parameters() + added as u64,
            peak_flops: self.peak_flops,
        })?;
        Ok(progress)
    }

    /// The examples at these places of the run's order.
    fn examples(&self, places: Range<u64>) -> Vec<&'a LaidOut> {
        let train = self.data.train.examples();
        places.map(|place| &train[self.order.sequence(place) as usize]).collect()
    }

    /// One update, and what the ranks agree on.
    fn step(
        &mut self,
        learner: &mut Learner<'_>,
        progress: &mut Progress,
        process: &Process,
    ) -> Result<Agreed, TrainError> {
        let (config, started, mut timing) = (self.config, Instant::now(), Timing::default());
        let Learner { engine, optimizer } = learner;
        // The whole batch is known on every rank, so the numbers of its targets are too.
        let places = progress.samples..progress.samples + self.plan.samples_per_step();
        let batch = self.examples(places.clone());
        let language = self.task.lambda > 0.0;
        let language_scale = if language { self.task.lambda / language_targets(&batch) as f64 } else { 0.0 };
        engine.begin(self.plan.grad_accum_steps, false);
        for micro_step in 0..self.plan.grad_accum_steps {
            process.pulse.at(Doing::Data);
            if micro_step == 0 {
                process.faults.befall(progress.step + 1, self.comm.rank());
            }
            let mine = self.plan.samples(progress.samples, self.comm.rank(), micro_step);
            let examples = self.examples(mine.clone());
            let mut rows = micro_batch(&examples, self.task, language, 1.0 / batch.len() as f64, self.device);
            let sequences = self.data.train.sequences_per_example() as u64;
            rows.dropout = dropout(config, progress.step, mine.start * sequences);
            rows.documents = apart_from_padding(&examples, &config.model);
            engine.add(&rows, language_scale, &mut timing)?;
        }
        let gradient = engine.finish(&mut timing)?;

        process.pulse.at(Doing::Agree);
        let agreed = self.saver.agree(&gradient, &process.stop)?;
        let (loss, grad_norm) = (agreed.nats, agreed.squares.sqrt());
        if !(loss.is_finite() && grad_norm.is_finite()) {
            let why = self.not_finite(progress.step + 1, loss, grad_norm, places);
            return Err(self.ended_by(progress.step, why));
        }
        process.pulse.at(Doing::Optimizer);
        let (lr, update) = (config.lr(progress.step), timing.now());
        optimizer.update(engine, progress.step, lr, grad_norm)?;
        timing.add(Phase::Optimizer, update);

        let (seconds, phases) = (started.elapsed().as_secs_f64(), timing.take());
        process.pulse.stepped(progress.step + 1, seconds - phases.reduce);
        let (tokens, flops) = self.cost(&batch);
        guard::remember(&mut progress.recent_losses, loss);
        progress.step += 1;
        progress.samples = places.end;
        progress.tokens += tokens;
        self.reporter.step(StepReport {
            step: progress.step,
            tokens: progress.tokens,
            first_sample: places.start,
            loss,
            lr,
            grad_norm,
            tokens_per_second: tokens as f64 / seconds,
            mfu: flops / seconds / self.peak_flops,
            seconds,
            phases,
            noise_scale_tokens: None,
            epochs: vec![places.end as f64 / self.data.train.len() as f64],
        })?;
        Ok(agreed)
    }

    /// Tokens of a batch, and the matrix FLOPs of forward and backward over them, padding left out.
    fn cost(&self, batch: &[&LaidOut]) -> (u64, f64) {
        let lengths =
            batch.iter().flat_map(|example| &example.sequences).map(|sequence| sequence.tokens.len());
        let flops = |seq_len| ModelConfig { seq_len, ..self.config.model.clone() }.flops_per_sequence();
        lengths.fold((0, 0.0), |(tokens, sum), length| (tokens + length as u64, sum + flops(length)))
    }

    fn not_finite(&self, step: u64, loss: f64, grad_norm: f64, places: Range<u64>) -> TrainError {
        let numbers: Vec<String> =
            places.clone().map(|place| (self.order.sequence(place) + 1).to_string()).collect();
        let suspects = format!("these are examples {} of data.train, from 1", numbers.join(", "));
        let (first_sample, end_sample) = (places.start, places.end);
        TrainError::NotFinite { step, loss, grad_norm, suspects, first_sample, end_sample }
    }

    /// The last score and the last checkpoint. Collective.
    fn end(
        &mut self,
        progress: &Progress,
        learner: &mut Learner<'_>,
        exit: Exit,
        process: &Process,
    ) -> Result<Exit, TrainError> {
        if exit == Exit::Done {
            self.score(&mut learner.engine, progress.step, process)?;
        }
        process.pulse.at(Doing::Saving);
        self.saver.save_last(progress, learner, &mut self.reporter)?;
        process.pulse.at(Doing::Ending);
        match exit {
            Exit::Stopped => {
                info!("stopped after step {}, with a checkpoint; the same command goes on", progress.step);
            }
            _ => self.reporter.finish(progress.step, self.folder.dir())?,
        }
        Ok(exit)
    }

    /// Ends a run for a reason that all ranks have in common: completes the checkpoint in flight, which is from
    /// before, and writes the reason down. Collective.
    fn ended_by(&mut self, step: u64, why: TrainError) -> TrainError {
        let report = FailureReport { step, fault: why.fault(), what: why.to_string() };
        let ended = self.saver.complete(&mut self.reporter).err().unwrap_or(why);
        if let Err(error) = self.reporter.failure(report) {
            warn!("metrics.jsonl does not hear of it: {error}"); // it is not what the run ends of
        }
        ended
    }

    /// The scores of the model as it is after `step` updates, where there are examples for it. Collective.
    fn score(&mut self, engine: &mut Engine<'_>, step: u64, process: &Process) -> Result<(), TrainError> {
        let Some(val) = &self.data.val else { return Ok(()) };
        process.pulse.at(Doing::Evaluation);
        let started = Instant::now();
        let outputs = outputs(engine, val, self.task, self.config.batch.micro_batch, self.comm)?;
        let answers: Vec<Answer> = val.examples().iter().filter_map(|example| example.answer).collect();
        let (val_loss, scores) = scores(self.task, &outputs, &answers);
        let (examples, seconds) = (answers.len() as u64, started.elapsed().as_secs_f64());
        self.reporter.score(ScoreReport { step, val_loss, scores, examples, seconds })
    }
}

/// What the model says of each example of a set, the ranks sharing them; the same on every rank, whatever their
/// number. Collective.
pub(super) fn outputs(
    engine: &mut Engine<'_>,
    set: &TaskSet,
    task: &TaskConfig,
    micro_batch_size: usize,
    comm: &dyn Communicator,
) -> Result<Vec<Prediction>, TrainError> {
    let examples: Vec<&LaidOut> = set.examples().iter().collect();
    let batches: Vec<&[&LaidOut]> = examples.chunks(micro_batch_size).collect();
    let share = batches.len().div_ceil(comm.world_size());
    let device = engine.parameters().device();
    let mut mine = Vec::new();
    for pass in comm.rank() * share..(comm.rank() + 1) * share {
        // A rank that has none left helps the others to their weights.
        let rows = batches.get(pass).map(|batch| MicroBatch {
            documents: apart_from_padding(batch, engine.model().config()),
            ..micro_batch(batch, task, false, 1.0, device)
        });
        if let Some(outputs) = engine.task_outputs(rows.as_ref())? {
            mine.extend(values(&outputs).into_iter().flat_map(f32::to_le_bytes));
        }
    }
    let all = comm.all_gather_bytes(&mine)?.concat();
    let values: Vec<f64> =
        all.as_chunks().0.iter().map(|four| f64::from(f32::from_le_bytes(*four))).collect();
    let each = values.len() / set.len();
    Ok(values.chunks(each.max(1)).map(|outputs| Prediction { outputs: outputs.to_vec() }).collect())
}

fn values(tensor: &Tensor) -> Vec<f32> {
    let mut values = vec![0f32; tensor.numel()];
    tensor.to_kind(Kind::Float).contiguous().copy_data(&mut values, tensor.numel());
    values
}
