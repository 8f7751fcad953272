//! Who is told what: each report goes to `metrics.jsonl`, as a line to the terminal, and to what is shown to
//! Prometheus.

use crate::error::TrainError;
use crate::gauges::Gauges;
use crate::metrics::{
    CheckpointReport, EvalReport, Event, FailureReport, Metrics, Pace, RewindReport, ScoreReport,
    StartReport, StepReport, SuiteReport, SummaryReport, step_line,
};
use crate::suite::TaskScores;
use configs::{Batches, RunConfig};
use std::path::{Path, PathBuf};
use tracing::{info, warn};

/// Tells of a run. On ranks other than 0 only their own log file hears of it.
#[derive(Debug)]
pub(crate) struct Reporter {
    metrics: Metrics,
    path: PathBuf,
    every_steps: u64,
    max_steps: u64,
    batches: Batches,
    /// Whether batches have as many tokens as their examples happen to have.
    uneven: bool,
    tokens: u64,
    pace: Pace,
    evals: Option<(EvalReport, EvalReport)>,
    gauges: Option<Gauges>,
}

impl Reporter {
    /// Appends to the run's `metrics.jsonl`.
    ///
    /// # Errors
    /// The file cannot be opened.
    pub(crate) fn open(path: &Path, config: &RunConfig, rank: usize) -> Result<Reporter, TrainError> {
        Ok(Reporter {
            metrics: Metrics::open(path, rank).map_err(TrainError::io(path))?,
            path: path.to_path_buf(),
            every_steps: config.metrics.every_steps,
            max_steps: config.max_steps(),
            batches: config.batches(),
            uneven: config.task.is_some(),
            tokens: 0,
            pace: Pace::default(),
            evals: None,
            gauges: None,
        })
    }

    /// From now on these show what is told.
    pub(crate) fn show(&mut self, gauges: Option<Gauges>) {
        self.gauges = gauges;
    }

    fn write(&mut self, event: Event) -> Result<(), TrainError> {
        self.metrics.write(&event).map_err(TrainError::io(&self.path))
    }

    /// A start of the run.
    pub(crate) fn start(&mut self, report: StartReport) -> Result<(), TrainError> {
        info!(
            "{:.1} million parameters, {} {}, {:.0} GFLOP/s of matrix products",
            report.parameters as f64 / 1e6,
            report.world_size,
            if report.world_size == 1 { "rank" } else { "ranks" },
            report.peak_flops / 1e9,
        );
        self.write(Event::Start(report))
    }

    /// Whether this step will be told.
    pub(crate) fn tells(&self, step: u64) -> bool {
        step.is_multiple_of(self.every_steps) || step == self.max_steps
    }

    /// A step; every `metrics.every_steps`-th is told, and the last.
    pub(crate) fn step(&mut self, report: StepReport) -> Result<(), TrainError> {
        if let Some(gauges) = &self.gauges {
            gauges.step(&report);
        }
        self.pace.note((report.tokens_per_second * report.seconds).round() as u64, report.seconds);
        self.tokens = report.tokens;
        if self.tells(report.step) {
            let end_tokens = match self.uneven {
                true => (report.tokens as f64 / report.step as f64 * self.max_steps as f64) as u64,
                false => self.batches.tokens_before(self.max_steps),
            };
            info!("{}", step_line(&report, self.max_steps, end_tokens, &self.pace));
            self.write(Event::Step(report))?;
        }
        Ok(())
    }

    /// A validation.
    pub(crate) fn eval(&mut self, report: EvalReport) -> Result<(), TrainError> {
        let in_bytes =
            report.bits_per_byte.map_or(String::new(), |bits| format!(", {bits:.4} bits per byte"));
        info!(
            "validation after {} steps: loss {:.4}{in_bytes} ({} targets, {:.1} s)",
            report.step, report.val_loss, report.targets, report.seconds,
        );
        if let Some(gauges) = &self.gauges {
            gauges.eval(&report);
        }
        let first = self.evals.take().map_or_else(|| report.clone(), |(first, _)| first);
        self.evals = Some((first, report.clone()));
        self.write(Event::Eval(report))
    }

    /// How well a task is done.
    pub(crate) fn score(&mut self, report: ScoreReport) -> Result<(), TrainError> {
        let scores: Vec<String> =
            report.scores.iter().map(|(name, value)| format!("{name} {value:.4}")).collect();
        info!(
            "validation after {} steps: loss {:.4}, {} ({} examples, {:.1} s)",
            report.step,
            report.val_loss,
            scores.join(", "),
            report.examples,
            report.seconds,
        );
        self.write(Event::Score(report))
    }

    /// How well the tasks of a suite are done after `step` updates.
    pub(crate) fn suite(&mut self, step: u64, results: Vec<TaskScores>) -> Result<(), TrainError> {
        for TaskScores { task, shots, examples, scores, seconds, .. } in results {
            let told: Vec<String> =
                scores.iter().map(|score| format!("{} {:.4}", score.name, score.value)).collect();
            let s = if shots == 1 { "" } else { "s" };
            info!("{task} after {step} steps, {shots} shot{s}: {} ({examples} examples)", told.join(", "));
            let scores = scores.iter().map(|score| (score.name, score.value)).collect();
            self.write(Event::Suite(SuiteReport { step, task, shots, scores, examples, seconds }))?;
        }
        Ok(())
    }

    /// A checkpoint that is complete.
    pub(crate) fn checkpoint(&mut self, report: CheckpointReport) -> Result<(), TrainError> {
        info!("checkpoint {} is complete ({:.1} s)", report.folder, report.seconds);
        if let Some(gauges) = &self.gauges {
            gauges.checkpoint(&report);
        }
        self.write(Event::Checkpoint(report))
    }

    /// A spike, after which the run goes on from a checkpoint; `passages` are a few lines on what the
    /// batch was cut from.
    pub(crate) fn rewind(&mut self, report: RewindReport, passages: &str) -> Result<(), TrainError> {
        warn!(
            "step {}: loss {:.4} where {:.4} is usual; its samples {}..{} are left out from now on, and \
             training goes on from {}\n{passages}",
            report.step,
            report.loss,
            report.reference,
            report.first_sample,
            report.end_sample,
            report.checkpoint,
        );
        if let Some(gauges) = &self.gauges {
            gauges.rewind(report.loss);
        }
        self.write(Event::Rewind(report))
    }

    /// What ends the run, and would end it again; the error says it on the terminal.
    pub(crate) fn failure(&mut self, report: FailureReport) -> Result<(), TrainError> {
        self.write(Event::Failure(report))
    }

    /// The end of the run, after `step` updates.
    pub(crate) fn finish(&mut self, step: u64, dir: &Path) -> Result<(), TrainError> {
        let (first_eval, last_eval) = self.evals.take().unzip();
        let tokens_per_second = self.pace.tokens_per_second().unwrap_or(0.0);
        if let (Some(first), Some(last)) = (&first_eval, &last_eval) {
            let in_bytes = first.bits_per_byte.zip(last.bits_per_byte);
            let in_bytes = in_bytes
                .map_or(String::new(), |(first, last)| format!("{first:.3} -> {last:.3} bits per byte, "));
            info!(
                "done: validation loss {:.4} -> {:.4}, {in_bytes}{tokens_per_second:.0} tokens/s, run in {}",
                first.val_loss,
                last.val_loss,
                dir.display(),
            );
        } else {
            info!("done: {step} steps, {tokens_per_second:.0} tokens/s, run in {}", dir.display());
        }
        let tokens = if self.uneven { self.tokens } else { self.batches.tokens_before(step) };
        self.write(Event::Summary(SummaryReport { step, tokens, first_eval, last_eval, tokens_per_second }))
    }
}
