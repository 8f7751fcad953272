//! Saving in the loop: when snapshots are taken, and how the ranks agree that one is complete.
//! The files themselves are `checkpoint`'s; the agreement travels in the step's one small reduction.

use crate::checkpoint::{
    CheckpointError, CheckpointWriter, Publisher, Skip, Slice, Snapshot, StateKind, TrainState, step_folder,
};
use crate::engine::Gradient;
use crate::error::TrainError;
use crate::guard;
use crate::metrics::CheckpointReport;
use crate::report::Reporter;
use crate::run_folder::RunFolder;
use crate::stop::StopFlag;
use crate::train::Learner;
use crate::weights::narrow;
use configs::{BatchPlan, CheckpointConfig, owned_range};
use ops::ExactSum;
use ops::collectives::Communicator;
use std::sync::Arc;
use std::time::Instant;
use tch::Tensor;
use tracing::warn;

/// How far a run has come. With the seed and the data it decides every sample to come.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Progress {
    /// Updates done.
    pub(crate) step: u64,
    /// Samples trained on.
    pub(crate) samples: u64,
    /// Tokens trained on.
    pub(crate) tokens: u64,
    /// Batches that are left out of the order.
    pub(crate) skips: Vec<Skip>,
    /// The last losses, by which the next one is judged.
    pub(crate) recent_losses: Vec<f64>,
}

impl Progress {
    /// As a checkpoint has it.
    pub(crate) fn of(state: &TrainState) -> Progress {
        let TrainState { step, samples, tokens, skips, recent_losses, .. } = state.clone();
        Progress { step, samples, tokens, skips, recent_losses }
    }

    /// The state of a checkpoint, all else taken from `template`.
    fn into_state(self, template: &TrainState) -> TrainState {
        let Progress { step, samples, tokens, skips, recent_losses } = self;
        TrainState { step, samples, tokens, skips, recent_losses, ..template.clone() }
    }

    /// Counts one step, which had this loss.
    pub(crate) fn advance(&mut self, plan: &BatchPlan, loss: f64) {
        guard::remember(&mut self.recent_losses, loss);
        self.step += 1;
        self.samples += plan.samples_per_step();
        self.tokens += plan.global_tokens();
    }
}

/// What the ranks know of each other after a step's small reduction. The same on every rank.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Agreed {
    /// The sum of all losses of the step, in nats.
    pub(crate) nats: f64,
    /// The sum of all squares of its gradient.
    pub(crate) squares: f64,
    /// Into how many parts the batch was divided, and the sum of all squares of their gradients, each
    /// scaled as the whole is; if they were asked for.
    pub(crate) parts: Option<(u64, f64)>,
    /// Some rank was asked to stop.
    pub(crate) stop: bool,
    /// Every rank has ended writing the checkpoint in flight.
    saved: bool,
    /// Some rank could not write it.
    failed: bool,
}

/// The checkpoints of one start of a run.
pub(crate) struct Saver<'a> {
    comm: &'a dyn Communicator,
    folder: RunFolder,
    publisher: Publisher,
    generation: u64,
    keep: CheckpointConfig,
    template: TrainState,
    in_flight: Option<InFlight>,
    /// The last snapshot, kept for its memory.
    last: Option<Arc<Snapshot>>,
    /// The newest step that is complete on disk, as rank 0 knows it.
    published: Option<u64>,
}

#[derive(Debug)]
struct InFlight {
    writer: CheckpointWriter,
    progress: Progress,
    started: Instant,
}

impl<'a> Saver<'a> {
    /// For the start of the run that claimed `generation`; `template` is the state but for its step.
    pub(crate) fn new(
        comm: &'a dyn Communicator,
        folder: &RunFolder,
        generation: u64,
        keep: &CheckpointConfig,
        template: TrainState,
    ) -> Saver<'a> {
        let publisher = Publisher::new(folder, generation);
        let folder = folder.clone();
        let keep = keep.clone();
        Saver {
            comm,
            folder,
            publisher,
            generation,
            keep,
            template,
            in_flight: None,
            last: None,
            published: None,
        }
    }

    /// The step's small reduction: the sums of what the ranks have of a step, and what they agree on.
    ///
    /// # Errors
    /// A failed collective.
    pub(crate) fn agree(&mut self, gradient: &Gradient, stop: &StopFlag) -> Result<Agreed, TrainError> {
        let outcome = self.in_flight.as_mut().and_then(|flight| flight.writer.finished());
        let (ended, failed) = (outcome.is_some(), matches!(outcome, Some(Err(_))));
        let flags = [stop.is_raised(), ended, failed].map(flag);
        let mut sums = vec![gradient.nats().parts(), gradient.squares.clone().parts()];
        sums.extend(gradient.own.as_ref().map(|own| own.squares.clone().parts()));
        let mut values = [&flags[..], sums.as_flattened()].concat();
        self.comm.all_reduce_f64(&mut values)?;
        let (flags, sums) = values.split_at(flags.len());
        let mut sums = sums.chunks_exact(ExactSum::PARTS).map(|parts| ExactSum::from_parts(parts).value());
        let mut sum = || sums.next().expect("as many sums as went in");
        Ok(Agreed {
            nats: sum(),
            squares: sum(),
            parts: gradient.own.as_ref().map(|own| (own.parts, sum())),
            stop: flags[0] > 0.0,
            saved: flags[1] == self.comm.world_size() as f64,
            failed: flags[2] > 0.0,
        })
    }

    /// Publishes the checkpoint in flight if every rank has written it.
    ///
    /// # Errors
    /// Another start of the run has taken over. A disk that refuses is warned of: the run goes on, and
    /// the checkpoint before stays.
    pub(crate) fn settle(&mut self, agreed: Agreed, reporter: &mut Reporter) -> Result<(), TrainError> {
        if !agreed.saved {
            return Ok(());
        }
        let Some(InFlight { writer, progress, started }) = self.in_flight.take() else { return Ok(()) };
        let step = progress.step;
        if let Err(error) = writer.wait() {
            go_on_without(step, error)?;
        }
        if self.comm.rank() == 0 {
            if agreed.failed {
                warn!("no checkpoint of step {step}: a rank could not write its part");
                return self.publisher.abandon(step).or_else(|error| go_on_without(step, error));
            }
            let state = progress.into_state(&self.template);
            match self.publisher.publish(&state, self.comm.world_size()) {
                Ok(_) => {
                    self.published = Some(step);
                    let folder = format!("checkpoints/{}", step_folder(step));
                    let seconds = started.elapsed().as_secs_f64();
                    reporter.checkpoint(CheckpointReport { step, folder, seconds })?;
                    if let Err(error) = self.publisher.prune(&self.keep, step) {
                        warn_unless_superseded("old checkpoints stay", error)?;
                    }
                }
                Err(error) => go_on_without(step, error)?,
            }
        }
        Ok(())
    }

    /// Notes that the checkpoint of this step is on disk already.
    pub(crate) fn resumed_at(&mut self, step: u64) {
        self.published = Some(step);
    }

    /// Writes down in the checkpoint of a step which batches are left out from it on, on rank 0.
    ///
    /// # Errors
    /// A checkpoint that is damaged, a disk that refuses, another start that has taken over.
    pub(crate) fn record_skips(&self, step: u64, skips: &[Skip]) -> Result<(), TrainError> {
        if self.comm.rank() == 0 {
            self.publisher.record_skips(step, skips)?;
        }
        Ok(())
    }

    /// Takes a snapshot and starts to write it. Collective; waits for one that is still being written.
    ///
    /// # Errors
    /// As [`Saver::settle`], and a failed collective.
    pub(crate) fn save(
        &mut self,
        progress: &Progress,
        learner: &mut Learner<'_>,
        reporter: &mut Reporter,
    ) -> Result<(), TrainError> {
        self.complete(reporter)?;
        let mut refused = [0.0];
        if self.comm.rank() == 0
            && let Err(error) = self.publisher.prepare(progress.step, &self.template.segments)
        {
            go_on_without(progress.step, error)?;
            refused = [1.0];
        }
        self.comm.all_reduce_f64(&mut refused)?; // also the barrier: nobody writes before the folder is there
        if refused == [0.0] {
            let started = Instant::now();
            learner.engine.parameters_mut().settle()?;
            let snapshot = Arc::new(self.snapshot(progress, learner));
            self.last = Some(Arc::clone(&snapshot));
            let writer = CheckpointWriter::start(&self.folder, snapshot);
            self.in_flight = Some(InFlight { writer, progress: progress.clone(), started });
        }
        Ok(())
    }

    /// Saves the end of a run, unless that step is saved already, and waits until it is complete.
    ///
    /// # Errors
    /// As [`Saver::save`], and `NotSaved`: a run does not end well while its end is nowhere.
    pub(crate) fn save_last(
        &mut self,
        progress: &Progress,
        learner: &mut Learner<'_>,
        reporter: &mut Reporter,
    ) -> Result<(), TrainError> {
        self.complete(reporter)?;
        if self.is_published(progress.step)? {
            return Ok(());
        }
        self.save(progress, learner, reporter)?;
        self.complete(reporter)?;
        if self.is_published(progress.step)? {
            return Ok(());
        }
        Err(TrainError::NotSaved { step: progress.step, folder: self.folder.checkpoints_dir() })
    }

    /// Whether the checkpoint of a step is complete on disk. Collective: rank 0 knows.
    fn is_published(&self, step: u64) -> Result<bool, TrainError> {
        let mut known = [flag(self.comm.rank() == 0 && self.published == Some(step))];
        self.comm.all_reduce_f64(&mut known)?;
        Ok(known != [0.0])
    }

    /// Waits for the checkpoint in flight, on every rank, and publishes it. Collective.
    ///
    /// # Errors
    /// As [`Saver::settle`], and a failed collective.
    pub(crate) fn complete(&mut self, reporter: &mut Reporter) -> Result<(), TrainError> {
        let Some(flight) = &mut self.in_flight else { return Ok(()) };
        flight.writer.block();
        let agreed = self.agree(&Gradient::none(), &StopFlag::default())?;
        self.settle(agreed, reporter)
    }

    /// A copy of what this rank owns, in the memory of the last one, which nobody reads any more: to touch
    /// memory for the first time costs many times the copy.
    fn snapshot(&mut self, progress: &Progress, learner: &Learner<'_>) -> Snapshot {
        let last = self.last.take().and_then(Arc::into_inner).map_or_else(Vec::new, |last| last.slices);
        let mut memory = last.into_iter().map(|slice| slice.values);
        let (rank, world_size) = (self.comm.rank(), self.comm.world_size());
        let (parameters, mut slices) = (learner.engine.parameters(), Vec::new());
        for (index, moments) in learner.optimizer.moments().iter().enumerate() {
            let (spec, held) = (parameters.spec(index), parameters.held(index));
            let owned = owned_range(spec.numel, rank, world_size);
            if owned.is_empty() {
                continue;
            }
            let within = owned.start - held.start..owned.end - held.start;
            let flats = [
                (StateKind::Param, parameters.master(index)),
                (StateKind::ExpAvg, &moments.exp_avg),
                (StateKind::ExpAvgSq, &moments.exp_avg_sq),
            ];
            for (kind, flat) in flats {
                let values = copy_out(&narrow(flat, &within), memory.next());
                slices.push(Slice { segment: spec.name.clone(), kind, start: owned.start, values });
            }
        }
        Snapshot { step: progress.step, generation: self.generation, rank, world_size, slices }
    }
}

fn flag(up: bool) -> f64 {
    f64::from(u8::from(up))
}

/// A flat buffer's values, in `memory` if that is given.
fn copy_out(flat: &Tensor, memory: Option<Vec<f32>>) -> Vec<f32> {
    let mut values = memory.unwrap_or_default();
    values.resize(flat.numel(), 0.0);
    flat.copy_data(&mut values, flat.numel());
    values
}

/// A failed save: a start that has been superseded ends, everything else is told and survived.
fn go_on_without(step: u64, error: CheckpointError) -> Result<(), TrainError> {
    warn_unless_superseded(&format!("no checkpoint of step {step}, training goes on"), error)
}

fn warn_unless_superseded(what: &str, error: CheckpointError) -> Result<(), TrainError> {
    if matches!(error, CheckpointError::StaleGeneration { .. }) {
        return Err(error.into());
    }
    warn!("{what}: {error}");
    Ok(())
}
