//! A run on one rank to ten thousand: where more ranks stop paying, and why. Knows how to look along a curve.

use super::{Cluster, StepSeconds, fit_batch, modes};
use crate::RunConfig;
use serde::Serialize;

/// The most ranks that are looked at.
const MOST: usize = 10_000;

/// The share of its best rate at which a rank counts as held up.
const BENT: f64 = 0.8;

/// The curve.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Scaling {
    /// By ascending number of ranks.
    pub points: Vec<Point>,
    /// Ranks that have a sequence each of the configured batch, and no more.
    pub most_ranks: u64,
    /// Where the curve bends, if it does.
    pub bend: Option<Bend>,
}

/// One number of ranks.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Point {
    /// Ranks.
    pub ranks: usize,
    /// Tokens of an update: the configured ones, or the nearest that so many ranks can share.
    pub batch_tokens: u64,
    /// Of all ranks.
    pub tokens_per_second: f64,
    /// Model FLOPs over the data sheet's peak.
    pub mfu: f64,
    /// Tokens per second and rank, over the most that any smaller number of ranks has.
    pub efficiency: f64,
    /// Whether it fits into memory.
    pub fits: bool,
}

/// Where more ranks stop paying.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Bend {
    /// The first number of ranks whose efficiency is below 0.8.
    pub ranks: usize,
    /// What holds them up.
    pub why: String,
}

impl Scaling {
    /// The run, in its own mode, on powers of two, on ten thousand ranks, and on `ranks`.
    pub(super) fn of(run: &RunConfig, ranks: usize, cluster: &Cluster) -> Scaling {
        let mut numbers: Vec<usize> = (0..).map(|i| 1 << i).take_while(|&n| n < MOST).collect();
        numbers.extend([ranks, MOST]);
        numbers.sort_unstable();
        numbers.dedup();
        let (mut best, mut bend) = (0f64, None);
        let mut points = Vec::with_capacity(numbers.len());
        for ranks in numbers {
            let (fitted, shared) = fit_batch(run, ranks);
            let plan = modes::mode_plan(&shared, ranks, cluster);
            let each = plan.tokens_per_second / ranks as f64;
            best = best.max(each);
            let efficiency = each / best;
            if efficiency < BENT && bend.is_none() {
                bend = Some(Bend { ranks, why: why(&plan.step, ranks, cluster, fitted.micro_batch) });
            }
            points.push(Point {
                ranks,
                batch_tokens: fitted.tokens,
                tokens_per_second: plan.tokens_per_second,
                mfu: plan.mfu,
                efficiency,
                fits: plan.fits,
            });
        }
        Scaling { points, most_ranks: run.batch.global_batch_tokens / run.model.seq_len as u64, bend }
    }
}

/// What most of a step's loss goes to.
fn why(step: &StepSeconds, ranks: usize, cluster: &Cluster, micro_batch: usize) -> String {
    let waiting = step.waiting_for_weights + step.waiting_for_gradients + step.helping;
    if waiting < 0.1 * step.total {
        let sequences =
            if micro_batch == 1 { "one sequence".into() } else { format!("{micro_batch} sequences") };
        return format!("the update and accumulation: a rank has only {sequences} in a pass");
    }
    let what = if step.waiting_for_weights > step.waiting_for_gradients { "weights" } else { "gradients" };
    let share = 100.0 * waiting / step.total;
    let over = if step.between_bound {
        format!("{} between {} nodes", cluster.between.name, cluster.nodes(ranks))
    } else {
        format!("{} within a node", cluster.machine.within.name)
    };
    let of = if step.latency > 0.5 * step.communicating { "latency" } else { "bandwidth" };
    format!("{of} of {over}: {share:.0} % of a step waits, mostly for {what}")
}
