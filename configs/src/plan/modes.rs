//! Every way to share and to recompute, beside each other: does it fit, and how fast is it. Knows how to try,
//! not what anything takes.

use super::batch::divisors;
use super::{Cluster, Room, SHARDS, StepSeconds, seconds_of, setup_of};
use crate::{Recompute, RunConfig, Setup, Shard};
use serde::Serialize;

/// A way to share the work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Mode {
    /// `parallel.shard`.
    pub shard: Shard,
    /// `parallel.recompute`; sharded parameters recompute whatever it says.
    pub recompute: Recompute,
    /// `batch.micro_batch`.
    pub micro_batch: usize,
}

/// What it takes.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct ModePlan {
    /// The way.
    pub mode: Mode,
    /// A rank's memory.
    pub room: Room,
    /// Whether that fits.
    pub fits: bool,
    /// The largest micro-batch that fits and divides the batch; none if none does.
    pub largest_micro_batch: Option<usize>,
    /// A step's time.
    pub step: StepSeconds,
    /// Of all ranks.
    pub tokens_per_second: f64,
    /// Model FLOPs over the data sheet's peak.
    pub mfu: f64,
}

/// All modes with the run's micro-batch, that of the run first.
pub(super) fn all(run: &RunConfig, ranks: usize, cluster: &Cluster) -> Vec<ModePlan> {
    let own = (run.parallel.shard, effective(run.parallel.shard, run.parallel.recompute));
    let others = ways().filter(|way| *way != own);
    std::iter::once(own).chain(others).map(|way| mode_plan(&with(run, way), ranks, cluster)).collect()
}

/// The fastest of all modes and micro-batches that fit.
pub(super) fn best(run: &RunConfig, ranks: usize, cluster: &Cluster) -> Option<ModePlan> {
    let tried = ways().flat_map(|way| {
        let run = with(run, way);
        let mut fitting = micro_batches(&run, ranks, cluster);
        // Larger ones are faster, or as fast: the few largest will do.
        fitting.reverse();
        fitting.truncate(3);
        fitting.into_iter().map(move |micro_batch| {
            let mut run = run.clone();
            run.batch.micro_batch = micro_batch;
            mode_plan(&run, ranks, cluster)
        })
    });
    tried.max_by(|a, b| a.tokens_per_second.total_cmp(&b.tokens_per_second))
}

/// What one mode takes, in which the run is.
pub(super) fn mode_plan(run: &RunConfig, ranks: usize, cluster: &Cluster) -> ModePlan {
    let setup = setup_of(run, ranks, cluster);
    let room = Room::of(&run.model, &setup, &cluster.machine);
    let step = seconds_of(run, &setup, cluster);
    let tokens = run.batch.global_batch_tokens as f64;
    let flops = run.model.flops_per_sequence() * tokens / run.model.seq_len as f64;
    ModePlan {
        mode: Mode {
            shard: run.parallel.shard,
            recompute: run.parallel.recompute,
            micro_batch: run.batch.micro_batch,
        },
        room,
        fits: room.fits(&cluster.machine),
        largest_micro_batch: micro_batches(run, ranks, cluster).last().copied(),
        step,
        tokens_per_second: tokens / step.total,
        mfu: flops / step.total / (ranks as f64 * cluster.machine.peak(setup.bf16)),
    }
}

/// The micro-batches that divide the batch and fit, ascending.
fn micro_batches(run: &RunConfig, ranks: usize, cluster: &Cluster) -> Vec<usize> {
    let full = setup_of(run, ranks, cluster);
    let per_rank = full.micro_steps * full.micro_batch as u64;
    let mut fitting: Vec<usize> = divisors(per_rank)
        .filter(|&d| !full.reproducible || (per_rank / d).is_power_of_two())
        .map(|d| d as usize)
        .filter(|&micro_batch| {
            let micro_steps = per_rank / micro_batch as u64;
            let setup = Setup { micro_batch, micro_steps, ..full };
            Room::of(&run.model, &setup, &cluster.machine).fits(&cluster.machine)
        })
        .collect();
    fitting.sort_unstable();
    fitting.dedup();
    fitting
}

/// The seven ways: sharded parameters always recompute.
fn ways() -> impl Iterator<Item = (Shard, Recompute)> {
    let both = |shard| [(shard, Recompute::None), (shard, Recompute::Full)];
    SHARDS.into_iter().flat_map(both).filter(|&(shard, recompute)| recompute == effective(shard, recompute))
}

fn effective(shard: Shard, recompute: Recompute) -> Recompute {
    if shard == Shard::Parameters { Recompute::Full } else { recompute }
}

fn with(run: &RunConfig, (shard, recompute): (Shard, Recompute)) -> RunConfig {
    let mut run = run.clone();
    (run.parallel.shard, run.parallel.recompute) = (shard, recompute);
    run
}
