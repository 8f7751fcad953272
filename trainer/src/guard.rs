//! What is to be thought of a step's numbers before anybody acts on them: whether they are finite, and
//! whose they are if not; whether the loss is a spike. Judges by numbers that all ranks have in common;
//! going back and leaving out is `run`'s.

use crate::error::TrainError;
use crate::saving::Progress;
use configs::{BatchPlan, GuardConfig};
use dataloader::Samples;
use ops::collectives::Communicator;
use std::ops::Range;

/// The last losses by whose median the next one is judged, at most.
const WINDOW: usize = 32;

/// Losses before which nothing is judged.
const ARMED_AFTER: usize = 5;

/// Skips without a checkpoint in between, after which going back once more is no use.
pub(crate) const MOST_SKIPS: usize = 3;

/// Passages of documents that are told of one micro-batch, or of a step.
const MOST_PASSAGES: usize = 4;

/// Micro-batches that are told of one rank, and ranks that are told of.
const MOST_MICRO_BATCHES: usize = 2;
const MOST_RANKS: usize = 8;

/// A loss that is too high to be acted on.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Spike {
    /// What it is.
    pub(crate) loss: f64,
    /// The usual one.
    pub(crate) reference: f64,
}

/// A step that came to something that is no number.
#[derive(Debug, Clone, Copy)]
pub(crate) struct NotFinite<'a> {
    /// The loss of the step.
    pub(crate) loss: f64,
    /// The norm of its gradient.
    pub(crate) grad_norm: f64,
    /// The losses of this rank's micro-batches.
    pub(crate) losses: &'a [f64],
}

/// Whether a loss is more than `factor` times the median of the `recent` ones.
pub(crate) fn spike(factor: Option<f64>, loss: f64, recent: &[f64]) -> Option<Spike> {
    let (factor, reference) = (factor?, median(recent)?);
    (loss > factor * reference).then_some(Spike { loss, reference })
}

/// Whether the ranks' weights are to be compared after `step` updates: now and then, and before they are
/// saved, so that a checkpoint never has a fault that could be seen.
pub(crate) fn compares_replicas(config: &GuardConfig, step: u64, save: bool) -> bool {
    let every = config.replica_check_steps;
    every > 0 && (save || step.is_multiple_of(every))
}

/// Remembers the loss of an update that was made.
pub(crate) fn remember(recent: &mut Vec<f64>, loss: f64) {
    if recent.len() >= WINDOW {
        recent.drain(..=recent.len() - WINDOW);
    }
    recent.push(loss);
}

fn median(recent: &[f64]) -> Option<f64> {
    if recent.len() < ARMED_AFTER {
        return None;
    }
    let mut sorted = recent.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    Some(if sorted.len() % 2 == 1 { sorted[middle] } else { (sorted[middle - 1] + sorted[middle]) / 2.0 })
}

/// Nobody moves on a bad number: all ranks have this one in common, and it is not finite. Collective:
/// the ranks tell each other whose it is, so that the error of each names them.
pub(crate) fn not_finite(
    comm: &dyn Communicator,
    samples: &Samples,
    plan: &BatchPlan,
    progress: &Progress,
    found: NotFinite<'_>,
) -> Result<TrainError, TrainError> {
    let mine = suspects(comm.rank(), samples, plan, progress, found.losses).join("\n");
    let told = comm.all_gather_bytes(mine.as_bytes())?;
    let told: Vec<_> = told.iter().filter(|lines| !lines.is_empty()).collect();
    let mut suspects: Vec<String> =
        told.iter().take(MOST_RANKS).map(|lines| String::from_utf8_lossy(lines).into_owned()).collect();
    if told.len() > MOST_RANKS {
        suspects.push(format!("  and {} more ranks", told.len() - MOST_RANKS));
    }
    let positions = progress.samples..progress.samples + plan.samples_per_step();
    if suspects.is_empty() {
        suspects.push("  every loss is finite; the step's samples are".to_string());
        suspects.extend(passages(samples, positions.clone()));
    }
    let numbers = samples.numbers(positions);
    Ok(TrainError::NotFinite {
        step: progress.step + 1,
        loss: found.loss,
        grad_norm: found.grad_norm,
        suspects: suspects.join("\n"),
        first_sample: numbers.start,
        end_sample: numbers.end,
    })
}

/// A rank's micro-batches whose loss is not finite, with their documents, a line each.
fn suspects(
    rank: usize,
    samples: &Samples,
    plan: &BatchPlan,
    progress: &Progress,
    losses: &[f64],
) -> Vec<String> {
    let bad: Vec<(u64, f64)> =
        (0..).zip(losses.iter().copied()).filter(|(_, loss)| !loss.is_finite()).collect();
    let mut lines = Vec::new();
    for &(micro_step, loss) in bad.iter().take(MOST_MICRO_BATCHES) {
        let positions = plan.samples(progress.samples, rank, micro_step);
        let numbers = samples.numbers(positions.clone());
        let (micro_batch, of) =
            ((positions.start - progress.samples) / plan.micro_batch as u64 + 1, plan.micro_batches);
        lines.push(format!(
            "  rank {rank}: loss {loss} of samples {}..{}, micro-batch {micro_batch} of {of}",
            numbers.start, numbers.end
        ));
        lines.extend(passages(samples, positions));
    }
    if bad.len() > MOST_MICRO_BATCHES {
        lines.push(format!("  rank {rank}: and {} more micro-batches", bad.len() - MOST_MICRO_BATCHES));
    }
    lines
}

/// What samples were cut from, the first few and how many more, a line each.
pub(crate) fn passages(samples: &Samples, positions: Range<u64>) -> Vec<String> {
    let mut passages = samples.documents(positions);
    let mut lines: Vec<String> = passages
        .by_ref()
        .take(MOST_PASSAGES)
        .map(|passage| match passage {
            Ok(passage) => format!("    {passage}"),
            Err(error) => format!("    {error}"),
        })
        .collect();
    match passages.count() {
        0 => {}
        more => lines.push(format!("    and {more} more passages")),
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(losses: &[f64]) -> Vec<f64> {
        let mut recent = Vec::new();
        losses.iter().for_each(|&loss| remember(&mut recent, loss));
        recent
    }

    #[test]
    fn nothing_is_a_spike_before_there_is_something_to_compare_with() {
        assert_eq!(spike(Some(2.0), 1e9, &after(&[3.0; 4])), None);
        assert_eq!(spike(Some(2.0), 1e9, &after(&[3.0; 5])), Some(Spike { loss: 1e9, reference: 3.0 }));
        assert_eq!(spike(None, 1e9, &after(&[3.0; 5])), None);
    }

    #[test]
    fn a_loss_is_judged_by_the_median_of_the_last_ones() {
        let losses: Vec<f64> = (0..100).map(f64::from).collect();
        let recent = after(&losses);
        assert_eq!(recent, losses[68..]);
        let reference = (83.0 + 84.0) / 2.0;
        assert_eq!(spike(Some(2.0), 2.0 * reference, &recent), None);
        assert!(spike(Some(2.0), 2.0 * reference + 1e-9, &recent).is_some_and(|s| s.reference == reference));
    }

    #[test]
    fn one_loss_that_was_let_through_does_not_blunt_the_guard() {
        let recent = after(&[3.0, 3.1, 2.9, 1e6, 3.0]);
        assert!(spike(Some(1.5), 6.0, &recent).is_some());
    }
}
