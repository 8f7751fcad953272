//! What a run reports: one definition of each number, from which come the terminal's lines and
//! `metrics.jsonl`. Rank 0 writes; on the others everything here does nothing.

use crate::timing::PhaseSeconds;
use dataloader::Passage;
use serde::{Serialize, Serializer};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;
use std::time::Duration;

/// One line of `metrics.jsonl`.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub(crate) enum Event {
    /// A start of the run, fresh or from a checkpoint. Steps after `step` that stand above it were
    /// lost and are done again.
    Start(StartReport),
    /// An optimizer update.
    Step(StepReport),
    /// A validation.
    Eval(EvalReport),
    /// How well a task is done.
    Score(ScoreReport),
    /// A task of a suite, with one number of shots.
    Suite(SuiteReport),
    /// A checkpoint that is complete on disk.
    Checkpoint(CheckpointReport),
    /// A spike of the loss, after which the run went back. Steps after the checkpoint's that stand above
    /// it are done again.
    Rewind(RewindReport),
    /// Something that all ranks found, and that ends the run.
    Failure(FailureReport),
    /// The end of the run.
    Summary(SummaryReport),
}

/// A start of the run.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct StartReport {
    /// Updates done before.
    pub(crate) step: u64,
    /// Which start of this run it is, from 1.
    pub(crate) generation: u64,
    /// When it was, seconds since 1970.
    pub(crate) unix_s: u64,
    /// Ranks.
    pub(crate) world_size: usize,
    /// Trained parameters.
    pub(crate) parameters: u64,
    /// Matrix rate of all ranks together, measured at the start, in FLOP/s: what MFU is a share of.
    pub(crate) peak_flops: f64,
}

/// One optimizer update, over all ranks.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct StepReport {
    /// Updates done, this one included.
    pub(crate) step: u64,
    /// Tokens seen by then.
    pub(crate) tokens: u64,
    /// The number of its first sample in the run's order.
    pub(crate) first_sample: u64,
    /// Mean over all targets of the step, nats.
    #[serde(serialize_with = "float")]
    pub(crate) loss: f64,
    /// Learning rate of this update.
    #[serde(serialize_with = "float")]
    pub(crate) lr: f64,
    /// Global L2 norm of the gradient, before clipping.
    #[serde(serialize_with = "float")]
    pub(crate) grad_norm: f64,
    /// Tokens per second of this step, over all ranks, validation and saving left out.
    #[serde(serialize_with = "float")]
    pub(crate) tokens_per_second: f64,
    /// Model FLOPs utilisation: matrix FLOPs of the model over the measured matrix rate.
    #[serde(serialize_with = "float")]
    pub(crate) mfu: f64,
    /// Seconds of this step.
    pub(crate) seconds: f64,
    /// Where they went, on rank 0.
    pub(crate) phases: PhaseSeconds,
    /// The gradient noise scale: a batch of about so many tokens is as large as helps. Absent while it
    /// cannot be told.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) noise_scale_tokens: Option<f64>,
    /// How often each source of the training data has been seen, in epochs.
    pub(crate) epochs: Vec<f64>,
}

/// A validation, over all ranks, each token once.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct EvalReport {
    /// Updates done before it.
    pub(crate) step: u64,
    /// Mean over all targets, nats.
    #[serde(serialize_with = "float")]
    pub(crate) val_loss: f64,
    /// The same in bits per byte of source text; none where tokens are hidden, of which the rest tells.
    #[serde(serialize_with = "maybe_float", skip_serializing_if = "Option::is_none")]
    pub(crate) bits_per_byte: Option<f64>,
    /// Targets.
    pub(crate) targets: u64,
    /// Seconds it took.
    pub(crate) seconds: f64,
}

/// How well a task is done, over all of its validation examples.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct ScoreReport {
    /// Updates done before it.
    pub(crate) step: u64,
    /// The task's mean loss over the examples: nats, or a squared error.
    #[serde(serialize_with = "float")]
    pub(crate) val_loss: f64,
    /// The task's metrics, each under its own name.
    #[serde(flatten)]
    pub(crate) scores: BTreeMap<String, f64>,
    /// Examples.
    pub(crate) examples: u64,
    /// Seconds it took.
    pub(crate) seconds: f64,
}

/// How well a task of a suite is done, with one number of shots.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct SuiteReport {
    /// Updates done before it.
    pub(crate) step: u64,
    /// The task's name.
    pub(crate) task: String,
    /// Examples before each.
    pub(crate) shots: usize,
    /// Its scores, each under its own name.
    #[serde(flatten)]
    pub(crate) scores: BTreeMap<&'static str, f64>,
    /// Examples.
    pub(crate) examples: usize,
    /// Seconds it took.
    pub(crate) seconds: f64,
}

/// A checkpoint that is complete on disk.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct CheckpointReport {
    /// Updates that it holds.
    pub(crate) step: u64,
    /// Folder, relative to the run folder.
    pub(crate) folder: String,
    /// From the snapshot to the rename.
    pub(crate) seconds: f64,
}

/// A spike of the loss, and what was done about it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct RewindReport {
    /// The update that was not made, from 1.
    pub(crate) step: u64,
    /// Its loss.
    #[serde(serialize_with = "float")]
    pub(crate) loss: f64,
    /// The median of the last losses.
    #[serde(serialize_with = "float")]
    pub(crate) reference: f64,
    /// The first sample of the batch, which is left out from now on.
    pub(crate) first_sample: u64,
    /// One past its last sample.
    pub(crate) end_sample: u64,
    /// What the batch was cut from, the first passages of it.
    pub(crate) documents: Vec<PassageReport>,
    /// Passages beyond these.
    pub(crate) more_documents: u64,
    /// Updates done at the checkpoint from which the run goes on.
    pub(crate) checkpoint_step: u64,
    /// Its folder, relative to the run folder.
    pub(crate) checkpoint: String,
}

/// What ended the run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct FailureReport {
    /// Updates done.
    pub(crate) step: u64,
    /// In one word: `not_finite`, `replicas`, or `error`.
    pub(crate) fault: &'static str,
    /// As the terminal has it.
    pub(crate) what: String,
}

/// A stretch of a document that a sample has tokens of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct PassageReport {
    /// The sample's number in the run's order.
    pub(crate) sample: u64,
    /// The data set, where a mixture has several.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) source: Option<String>,
    /// The source file, as it was named when the data set was prepared.
    pub(crate) file: String,
    /// Line or record of it, from 1.
    pub(crate) record: u64,
    /// Number of the document in the data set, from 0.
    pub(crate) document: u64,
    /// The shard that holds it.
    pub(crate) shard: String,
    /// Position of the first token in the document, from 0.
    pub(crate) first_token: u64,
    /// One past the last.
    pub(crate) end_token: u64,
}

impl PassageReport {
    /// Of a passage.
    pub(crate) fn of(passage: &Passage<'_>) -> PassageReport {
        let Passage { sample, source, document, tokens } = passage;
        PassageReport {
            sample: *sample,
            source: source.map(|source| source.display().to_string()),
            file: document.file.to_string(),
            record: document.record,
            document: document.number,
            shard: document.shard.to_string(),
            first_token: tokens.start,
            end_token: tokens.end,
        }
    }
}

/// The end of a run.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct SummaryReport {
    /// Updates done.
    pub(crate) step: u64,
    /// Tokens seen.
    pub(crate) tokens: u64,
    /// The first validation of this start.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) first_eval: Option<EvalReport>,
    /// The last one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) last_eval: Option<EvalReport>,
    /// Mean rate of this start, without its first step, validation and saving.
    #[serde(serialize_with = "float")]
    pub(crate) tokens_per_second: f64,
}

/// Finite numbers as JSON numbers that read back bit for bit, others as "nan", "inf" or "-inf".
pub(crate) fn float<S: Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
    if value.is_finite() {
        serializer.serialize_f64(*value)
    } else if value.is_nan() {
        serializer.serialize_str("nan")
    } else if *value > 0.0 {
        serializer.serialize_str("inf")
    } else {
        serializer.serialize_str("-inf")
    }
}

fn maybe_float<S: Serializer>(value: &Option<f64>, serializer: S) -> Result<S::Ok, S::Error> {
    match value {
        Some(value) => float(value, serializer),
        None => serializer.serialize_none(),
    }
}

/// Where reports go.
#[derive(Debug)]
pub(crate) struct Metrics {
    file: Option<File>,
}

impl Metrics {
    /// Appends to the file, on rank 0. Half a line that a killed run left at its end is cut off.
    ///
    /// # Errors
    /// The file cannot be opened or cut.
    pub(crate) fn open(path: &Path, rank: usize) -> io::Result<Metrics> {
        if rank != 0 {
            return Ok(Metrics { file: None });
        }
        let mut file = File::options().create(true).read(true).append(true).open(path)?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        let whole = bytes.iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1) as u64;
        file.set_len(whole)?;
        Ok(Metrics { file: Some(file) })
    }

    /// Writes one event, whole.
    ///
    /// # Errors
    /// The disk refuses.
    pub(crate) fn write(&mut self, event: &Event) -> io::Result<()> {
        let Some(file) = &mut self.file else { return Ok(()) };
        let mut line = serde_json::to_vec(event)?;
        line.push(b'\n');
        file.write_all(&line)
    }
}

/// Tokens and time of one start, for rates and the time left.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    started: bool,
    tokens: u64,
    seconds: f64,
}

impl Pace {
    /// Notes a step. The first one of a start allocates and is left out.
    pub(crate) fn note(&mut self, tokens: u64, seconds: f64) {
        if self.started {
            self.tokens += tokens;
            self.seconds += seconds;
        }
        self.started = true;
    }

    /// The mean rate, once there is a step to judge by.
    pub(crate) fn tokens_per_second(&self) -> Option<f64> {
        (self.tokens > 0).then(|| self.tokens as f64 / self.seconds)
    }
}

/// The line that a terminal shows for a step of a run that ends after `max_steps` and `end_tokens`.
pub(crate) fn step_line(report: &StepReport, max_steps: u64, end_tokens: u64, pace: &Pace) -> String {
    let left = match pace.tokens_per_second() {
        Some(rate) => {
            let seconds = end_tokens.saturating_sub(report.tokens) as f64 / rate;
            clock(Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX))
        }
        None => "?".to_string(),
    };
    // Of one source, tokens say it.
    let epochs = match &report.epochs[..] {
        [_] => String::new(),
        several => {
            let each: Vec<String> = several.iter().map(|epochs| format!("{epochs:.2}")).collect();
            format!(" | epochs {}", each.join(" "))
        }
    };
    format!(
        "step {}/{max_steps} | loss {:.4} | norm {:.3} | lr {:.2e} | {:.0} tokens/s | MFU {:.1} % | ETA {left}{epochs}",
        report.step,
        report.loss,
        report.grad_norm,
        report.lr,
        report.tokens_per_second,
        100.0 * report.mfu,
    )
}

/// A duration as people read it: `42s`, `3m12s`, `2h05m`, `3d04h`.
pub(crate) fn clock(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m{:02}s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{}h{:02}m", seconds / 3600, seconds % 3600 / 60),
        _ => format!("{}d{:02}h", seconds / 86_400, seconds % 86_400 / 3600),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn eval(val_loss: f64) -> Event {
        Event::Eval(EvalReport { step: 3, val_loss, bits_per_byte: Some(val_loss), targets: 7, seconds: 0.5 })
    }

    #[test]
    fn floats_read_back_bit_for_bit_and_others_are_words() {
        let value = 0.1f64 + 0.2;
        let line = serde_json::to_string(&eval(value)).unwrap();
        let read: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(read["val_loss"].as_f64().unwrap().to_bits(), value.to_bits());
        assert_eq!(read["kind"], "eval");
        for (value, word) in [(f64::NAN, "nan"), (f64::INFINITY, "inf"), (f64::NEG_INFINITY, "-inf")] {
            let read: serde_json::Value = serde_json::to_value(eval(value)).unwrap();
            assert_eq!(read["val_loss"], word);
        }
    }

    #[test]
    fn half_a_line_left_by_a_killed_run_is_cut_off() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        std::fs::write(&path, "{\"kind\":\"start\"}\n{\"kind\":\"st").unwrap();
        Metrics::open(&path, 0).unwrap().write(&eval(1.0)).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.lines().all(|line| serde_json::from_str::<serde_json::Value>(line).is_ok()), "{text}");
        assert_eq!(text.lines().count(), 2);
    }

    #[test]
    fn two_starts_of_a_run_do_not_write_over_each_other() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let [mut old, mut new] = [0, 0].map(|rank| Metrics::open(&path, rank).unwrap());
        for value in [0.1 + 0.2, 1.0, 1e-300] {
            old.write(&eval(value)).unwrap();
            new.write(&eval(0.5)).unwrap();
        }
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.lines().all(|line| serde_json::from_str::<serde_json::Value>(line).is_ok()), "{text}");
        assert_eq!(text.lines().count(), 6);
    }

    #[test]
    fn other_ranks_write_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        Metrics::open(&path, 1).unwrap().write(&eval(1.0)).unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn a_run_without_an_end_in_sight_still_has_its_line() {
        let mut pace = Pace::default();
        [1.0, 1000.0].into_iter().for_each(|seconds| pace.note(1, seconds));
        let report = StepReport {
            step: 2,
            tokens: 2,
            first_sample: 1,
            loss: 1.5,
            lr: 1e-3,
            grad_norm: 0.5,
            tokens_per_second: 1.0,
            mfu: 0.25,
            seconds: 1000.0,
            phases: PhaseSeconds::default(),
            noise_scale_tokens: None,
            epochs: vec![0.1],
        };
        let line = step_line(&report, u64::MAX, u64::MAX, &pace);
        assert!(
            line.contains("| loss 1.5000 | norm 0.500 | lr 1.00e-3 | 1 tokens/s | MFU 25.0 % | ETA "),
            "{line}"
        );
    }

    #[test]
    fn the_rate_is_that_of_all_steps_but_the_first_weighed_by_their_tokens() {
        let mut pace = Pace::default();
        pace.note(100, 60.0);
        assert_eq!(pace.tokens_per_second(), None);
        pace.note(100, 1.0);
        pace.note(800, 2.0);
        assert_eq!(pace.tokens_per_second(), Some(300.0));
    }

    #[test]
    fn durations_read_like_a_clock() {
        let read = |seconds| clock(Duration::from_secs(seconds));
        assert_eq!([read(42), read(192), read(7500), read(273_600)], ["42s", "3m12s", "2h05m", "3d04h"]);
    }
}
