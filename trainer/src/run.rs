//! A run's parts, opened in order and closed in order: data, folder, checkpoints, reports.
//! The loop in `train` uses them; nothing here computes a gradient, or knows what a checkpoint looks like.

use crate::alike;
use crate::checkpoint::{Loaded, Skip, TrainState, step_folder};
use crate::engine::Engine;
use crate::error::TrainError;
use crate::evaluation::Validation;
use crate::generate::{Generation, Sampling, generate};
use crate::guard::{self, MOST_SKIPS, Spike};
use crate::inject::Faults;
use crate::masking::{Masking, Purpose};
use crate::metrics::{FailureReport, PassageReport, RewindReport, StartReport};
use crate::noise_scale::NoiseScale;
use crate::pulse::Pulse;
use crate::replicas;
use crate::report::Reporter;
use crate::resume::{load, newest_good};
use crate::run_folder::{RunFolder, unix_seconds};
use crate::saving::{Progress, Saver};
use crate::start::Start;
use crate::train::{Learner, Process};
use configs::{BatchPlan, Exit, RunConfig, Shard};
use dataloader::{DataError, Samples, Tokenizer};
use ops::collectives::Communicator;
use std::ops::Range;
use tch::{Device, Kind};
use tracing::{debug, info, warn};

/// What a run writes of its own at the end.
const SAMPLE: Generation = Generation {
    sampling: Sampling { temperature: 0.7, top_k: 50, top_p: 1.0, seed: 1 },
    max_tokens: 400,
    end: None,
    first_text: 0,
};

/// Passages of documents that `metrics.jsonl` names of a batch that is left out.
const MOST_PASSAGES: usize = 64;

/// The open parts of a run.
pub(crate) struct Run<'a> {
    /// As resolved.
    pub(crate) config: &'a RunConfig,
    /// The other ranks.
    pub(crate) comm: &'a dyn Communicator,
    /// Where tensors live.
    pub(crate) device: Device,
    /// The precision that computes.
    pub(crate) kind: Kind,
    /// How the present step falls on the ranks.
    pub(crate) plan: BatchPlan,
    /// The training data in the run's order.
    pub(crate) samples: Samples,
    /// Checkpoints to come.
    pub(crate) saver: Saver<'a>,
    /// Who is told.
    pub(crate) reporter: Reporter,
    /// Matrix rate of all ranks together, FLOP/s.
    pub(crate) peak_flops: f64,
    /// What a masked model has to find.
    pub(crate) masking: Option<Masking>,
    /// What is made to go wrong.
    pub(crate) faults: Faults,
    /// Shows what this rank is doing.
    pub(crate) pulse: Pulse,
    /// The gradient noise scale of this start.
    pub(crate) noise_scale: NoiseScale,
    folder: RunFolder,
    generation: u64,
    resume: Option<Loaded>,
    tokenizer: Tokenizer,
}

impl<'a> Run<'a> {
    /// Opens the data and the run folder, and claims this start of the run. Collective.
    ///
    /// # Errors
    /// What the user must change, and what the system refuses.
    pub(crate) fn open(
        config: &'a RunConfig,
        comm: &'a dyn Communicator,
        validation: Option<&Validation>,
        process: &Process,
    ) -> Result<Run<'a>, TrainError> {
        let device = process.device;
        let kind = ops::device::dtype(config.parallel.dtype, device);
        alike::check(comm, config.reproducible(device == Device::Cpu))?;
        config.batch_plan(comm.world_size())?;
        process.faults.check(comm.world_size())?;
        let samples = Samples::of(&config.data, config.model.seq_len, config.run.seed)?;
        check_vocabulary(config, &samples)?;
        let tokenizer = samples.tokenizer().clone();
        let masking = Masking::of(&config.model, config.run.seed, &tokenizer)?;

        let segments = configs::segments(&config.model);
        let template = TrainState {
            train_digest: hex(&samples.digest()),
            val_digest: validation.map(|validation| hex(&validation.digest())),
            ..TrainState::start(config, tokenizer.id(), segments)
        };
        let Start { folder, generation, resume, plan, saver, reporter, peak_flops } =
            Start::claim(config, template, &tokenizer, comm, process)?;
        Ok(Run {
            config,
            comm,
            device,
            kind,
            plan,
            samples,
            saver,
            reporter,
            peak_flops,
            masking,
            faults: process.faults.clone(),
            pulse: process.pulse.clone(),
            noise_scale: NoiseScale::default(),
            folder,
            generation,
            resume,
            tokenizer,
        })
    }

    /// Fills model and optimizer from the newest good checkpoint, or with their initial values, and
    /// tells of the start. Collective: afterwards every rank holds the same.
    ///
    /// # Errors
    /// A checkpoint of another run, or none that is good.
    pub(crate) fn restore(&mut self, learner: &mut Learner<'_>) -> Result<Progress, TrainError> {
        let progress = match self.resume.take() {
            Some(loaded) => {
                info!("going on from {} at step {}", loaded.folder().display(), loaded.state().step);
                self.go_on_from(&loaded, learner)?
            }
            None => {
                learner.engine.parameters_mut().init(self.config.run.seed);
                learner.engine.parameters_mut().share()?;
                let progress = Progress::default();
                if self.config.guard.spike_factor.is_some() {
                    // A guard that goes back needs somewhere to go back to.
                    self.saver.save(&progress, learner, &mut self.reporter)?;
                }
                progress
            }
        };
        if self.config.guard.replica_check_steps > 0 && !replicas::has_any(self.config.parallel.shard) {
            info!(
                "guard.replica_check_steps: nothing to compare, with parallel.shard = \"parameters\" no rank holds \
                 what another does"
            );
        }
        self.pulse.goes_on(progress.step, self.generation);
        self.reporter.start(StartReport {
            step: progress.step,
            generation: self.generation,
            unix_s: unix_seconds(),
            world_size: self.comm.world_size(),
            parameters: self.config.model.parameters(),
            peak_flops: self.peak_flops,
        })?;
        Ok(progress)
    }

    /// After a spike: goes back to the newest checkpoint, and leaves the batch that made it out from
    /// there on. Collective.
    ///
    /// # Errors
    /// `SpikesGoOn`, `NothingToGoBackTo`, and what can go wrong with checkpoints.
    pub(crate) fn rewind(
        &mut self,
        spike: Spike,
        progress: &Progress,
        learner: &mut Learner<'_>,
    ) -> Result<Progress, TrainError> {
        let (step, Spike { loss, reference }) = (progress.step + 1, spike);
        self.saver.complete(&mut self.reporter)?;
        let loaded = newest_good(&self.folder, self.comm)?.ok_or_else(|| {
            let folder = self.folder.checkpoints_dir();
            TrainError::NothingToGoBackTo { step, loss, reference, folder }
        })?;
        let checkpoint = loaded.state().step;
        let skipped = progress.skips.iter().filter(|skip| skip.step > checkpoint).count();
        if skipped >= MOST_SKIPS {
            return Err(TrainError::SpikesGoOn { step, loss, reference, skipped, checkpoint });
        }

        let positions = progress.samples..progress.samples + self.plan.samples_per_step();
        let report = self.rewind_report(spike, step, positions.clone(), checkpoint)?;
        let passages = guard::passages(&self.samples, positions).join("\n");
        let mut skips = progress.skips.clone();
        skips.push(Skip { step, first_sample: report.first_sample, end_sample: report.end_sample });
        // Written down first: a run that is killed from here on leaves the batch out all the same.
        self.saver.record_skips(checkpoint, &skips)?;
        self.reporter.rewind(report, &passages)?;
        let progress = Progress { skips, ..self.go_on_from(&loaded, learner)? };
        self.leave_out(&progress.skips);
        Ok(progress)
    }

    fn rewind_report(
        &self,
        spike: Spike,
        step: u64,
        positions: Range<u64>,
        checkpoint: u64,
    ) -> Result<RewindReport, TrainError> {
        let numbers = self.samples.numbers(positions.clone());
        let mut passages = self.samples.documents(positions);
        let documents = passages.by_ref().take(MOST_PASSAGES).map(|passage| Ok(PassageReport::of(&passage?)));
        Ok(RewindReport {
            step,
            loss: spike.loss,
            reference: spike.reference,
            first_sample: numbers.start,
            end_sample: numbers.end,
            documents: documents.collect::<Result<_, DataError>>()?,
            more_documents: passages.count() as u64,
            checkpoint_step: checkpoint,
            checkpoint: format!("checkpoints/{}", step_folder(checkpoint)),
        })
    }

    /// Fills weights and optimizer from a checkpoint. Collective: afterwards every rank holds the same.
    fn go_on_from(&mut self, loaded: &Loaded, learner: &mut Learner<'_>) -> Result<Progress, TrainError> {
        learner.engine.parameters_mut().settle()?;
        load(loaded, learner)?;
        learner.engine.parameters_mut().share()?;
        let progress = Progress::of(loaded.state());
        self.saver.resumed_at(progress.step);
        self.leave_out(&progress.skips);
        Ok(progress)
    }

    fn leave_out(&mut self, skips: &[Skip]) {
        self.samples.leave_out(skips.iter().map(Skip::samples).collect());
    }

    /// Ends a start that has nothing left to do.
    pub(crate) fn already_finished(&self, progress: &Progress) -> Exit {
        info!(
            "this run is finished: {} of {} steps are done (in {})\n\
             hint: raise schedule.max_steps to go on, or start over with --fresh",
            progress.step,
            self.config.max_steps(),
            self.folder.dir().display(),
        );
        Exit::Done
    }

    /// Ends a run for a reason that all ranks have in common, and know of, so that they can still do one
    /// thing together: complete the checkpoint in flight, which is from before. Collective.
    pub(crate) fn ended_by(&mut self, why: TrainError) -> TrainError {
        let step = self.pulse.look().step;
        let report = FailureReport { step, fault: why.fault(), what: why.to_string() };
        let ended = match self.saver.complete(&mut self.reporter) {
            Ok(()) => why,
            Err(error) => error,
        };
        // The last thing that is written, for the launcher to find.
        if let Err(error) = self.reporter.failure(report) {
            warn!("metrics.jsonl does not hear of it: {error}"); // it is not what the run ends of
        }
        ended
    }

    /// How many targets the step's batch has, over all ranks, at least one: its tokens, or those that are
    /// hidden.
    ///
    /// # Errors
    /// Data that cannot be read.
    pub(crate) fn targets(&self, progress: &Progress) -> Result<u64, TrainError> {
        let Some(masking) = &self.masking else { return Ok(self.plan.global_tokens()) };
        // Every rank counts all of the batch: reading tokens takes less than asking the others.
        let (first, end) = (progress.samples, progress.samples + self.plan.samples_per_step());
        let mut targets = 0;
        for position in (first..end).step_by(self.plan.micro_batch) {
            let rows = self.samples.batch(position..end.min(position + self.plan.micro_batch as u64))?;
            targets += masking.targets(Purpose::Training(progress.step), position, &rows);
        }
        Ok(targets.max(1))
    }

    /// The token that ends a document, where attention keeps to documents.
    pub(crate) fn document_end(&self) -> Option<i64> {
        self.config.data.document_mask.then(|| i64::from(self.tokenizer.end_of_text()))
    }

    /// Lets the model write, and tells of the end.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub(crate) fn finish(
        &mut self,
        progress: &Progress,
        engine: &mut Engine<'_>,
        exit: Exit,
    ) -> Result<Exit, TrainError> {
        // In every rank's own log: all of a run's ranks must have the same.
        debug!(
            "after step {} the parameters have the digest {}",
            progress.step,
            engine.parameters_mut().digest()?
        );
        if exit == Exit::Stopped {
            info!("stopped after step {}, with a checkpoint; the same command goes on", progress.step);
            return Ok(exit);
        }
        if self.masking.is_none() {
            self.write_sample(engine)?; // a masked model does not write
        }
        self.reporter.finish(progress.step, self.folder.dir())?;
        Ok(exit)
    }

    fn write_sample(&self, engine: &mut Engine<'_>) -> Result<(), TrainError> {
        if self.comm.rank() > 0 && self.config.parallel.shard != Shard::Parameters {
            return Ok(());
        }
        // A document begins after the end of another.
        let prompt = vec![i64::from(self.tokenizer.end_of_text())];
        let (model, parameters) = engine.parts_mut();
        let tokens = generate(model, parameters, &[prompt], &SAMPLE, &mut |_, _| true)?.concat();
        if self.comm.rank() > 0 {
            return Ok(()); // took part only because the weights are everybody's
        }
        let tokens: Vec<u32> = tokens.into_iter().map(|token| token as u32).collect();
        let bytes = self.tokenizer.decode(&tokens);
        let path = self.folder.sample_path();
        std::fs::write(&path, &bytes).map_err(TrainError::io(&path))?;
        info!("the model writes ({}):\n{}", path.display(), String::from_utf8_lossy(&bytes));
        Ok(())
    }
}

fn check_vocabulary(config: &RunConfig, samples: &Samples) -> Result<(), TrainError> {
    let (model, data) = (config.model.vocab_size, samples.tokenizer().vocab_size());
    match samples.sources().next() {
        Some(source) if model < data => {
            Err(TrainError::Vocabulary { model, data, folder: source.folder().into() })
        }
        _ => Ok(()),
    }
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
