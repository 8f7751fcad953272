//! What a run will take before it is paid for: memory, time, traffic, money and failures, on ranks that need
//! not exist. Arithmetic on what the run itself obeys: its batch, segments, memory and the acts of its step.
//! Knows no processes and prints nothing.

mod batch;
mod cost;
mod failures;
mod machine;
mod measured;
mod modes;
mod published;
mod room;
mod scaling;
mod simulation;
mod timeline;

pub use batch::{Fitted, fit_batch};
pub use cost::{CallSeconds, Costs, LOGIT_BYTES, UPDATE_BYTES};
pub use failures::{Failures, RANK_HOURS_BETWEEN_FAILURES, Saving};
pub use machine::{Cluster, Link, MACHINES, Machine, REACHED};
pub use measured::{Computing, MACHINE_FILE, Measured, MeasuredCall, MeasuredProduct, RatePoint, Rates};
pub use modes::{Mode, ModePlan};
pub use published::{PUBLISHED, Published};
pub use room::Room;
pub use scaling::{Bend, Point, Scaling};
pub use simulation::{Failure, Life, Lived, SimulatedStep, Simulation, Trouble};
pub use timeline::{StepSeconds, step_seconds};

use crate::{Dtype, Memory, ModelConfig, RunConfig, Setup, Shard, StepTraffic, step_acts};
use serde::Serialize;

/// What cannot be planned.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// A name of a machine or a link.
    #[error("{what} {got}: unknown\nhint: {known}")]
    Unknown {
        /// The flag.
        what: &'static str,
        /// What it was given.
        got: String,
        /// What it takes.
        known: String,
    },
    /// A number that must be positive.
    #[error("{what} {got}: expected a number above 0\nhint: {hint}")]
    NotPositive {
        /// The flag.
        what: &'static str,
        /// What it was given.
        got: String,
        /// What is meant by it.
        hint: &'static str,
    },
}

/// What is asked beside the configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct Question {
    /// Ranks, W.
    pub ranks: usize,
    /// Where they would be.
    pub cluster: Cluster,
    /// Money for a rank and hour, if that is known.
    pub price: Option<f64>,
    /// Hours of one rank between failures that end a job.
    pub rank_hours_between_failures: f64,
}

/// The answer.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Plan {
    /// The run's name.
    pub name: String,
    /// The model's parameters.
    pub parameters: u64,
    /// What each rank computes on.
    pub machine: String,
    /// What connects nodes.
    pub link: String,
    /// Bytes of a rank's memory.
    pub memory_bytes: u64,
    /// Ranks.
    pub ranks: usize,
    /// Nodes that hold them.
    pub nodes: usize,
    /// Whether bf16 computes, or fp32.
    pub bf16: bool,
    /// The batch, as these ranks can share it.
    pub batch: Fitted,
    /// The modes of sharding and recomputation, that of the configuration first.
    pub modes: Vec<ModePlan>,
    /// Of all modes and micro-batches that fit, what is fastest, and so cheapest; none if nothing fits.
    pub best: Option<ModePlan>,
    /// What a rank sends in a step.
    pub traffic: Traffic,
    /// The whole run, in the mode of the configuration.
    pub run: RunPlan,
    /// The run on fewer and on more ranks.
    pub scaling: Scaling,
    /// What failures cost.
    pub failures: Failures,
}

/// Bytes sent in a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Traffic {
    /// By a rank, sums for all.
    pub all_reduce: u64,
    /// By a rank, sums for their owners.
    pub reduce_scatter: u64,
    /// By a rank, weights.
    pub all_gather: u64,
    /// By a rank in all.
    pub rank_total: u64,
    /// Over the links of a rank within its node.
    pub within: u64,
    /// Over the link of a node.
    pub between: u64,
}

/// A run from its first step to its last.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct RunPlan {
    /// Updates.
    pub steps: u64,
    /// Tokens of all of them.
    pub tokens: u64,
    /// Tokens per second of all ranks, with the full batch.
    pub tokens_per_second: f64,
    /// Without failures.
    pub days: f64,
    /// With what failures and saving take.
    pub days_with_failures: f64,
    /// Hours of all ranks together, with failures.
    pub rank_hours: f64,
    /// What they cost, if a price was given.
    pub price: Option<f64>,
}

impl Plan {
    /// Plans a run.
    pub fn of(run: &RunConfig, question: &Question) -> Plan {
        let Question { ranks, cluster, price, .. } = question;
        let (fitted, shared) = fit_batch(run, *ranks);
        let modes = modes::all(&shared, *ranks, cluster);
        let setup = setup_of(&shared, *ranks, cluster);
        let traffic = Traffic::of(&shared.model, &setup, cluster);
        let configured = &modes[0];
        let (steps, tokens) = length(&shared);
        let seconds = run_seconds(&shared, *ranks, cluster);
        let saving = Saving {
            bytes: Memory::of(&run.model, &setup).snapshot as f64,
            host_bytes_per_s: cluster.machine.host_bytes_per_s * cluster.machine.reached,
            disk_bytes_per_s: cluster.disk_bytes_per_s / cluster.per_node.min(*ranks) as f64,
        };
        let step_s = configured.step.total;
        let failures = Failures::of(*ranks, question.rank_hours_between_failures, seconds, step_s, &saving);
        let days = seconds / 86_400.0;
        let days_with_failures = days / (1.0 - failures.lost).max(1e-3);
        let rank_hours = days_with_failures * 24.0 * *ranks as f64;
        Plan {
            name: run.run.name.clone(),
            parameters: run.model.parameters(),
            machine: cluster.machine.name.clone(),
            link: cluster.between.name.clone(),
            memory_bytes: cluster.machine.memory_bytes,
            ranks: *ranks,
            nodes: cluster.nodes(*ranks),
            bf16: setup.bf16,
            traffic,
            run: RunPlan {
                steps,
                tokens,
                tokens_per_second: configured.tokens_per_second,
                days,
                days_with_failures,
                rank_hours,
                price: price.map(|price| price * rank_hours),
            },
            scaling: Scaling::of(run, *ranks, cluster),
            best: modes::best(&shared, *ranks, cluster),
            batch: fitted,
            modes,
            failures,
        }
    }
}

/// Whether a run's ranks compute in bf16 on this machine.
pub(crate) fn computes_in_bf16(run: &RunConfig, machine: &Machine) -> bool {
    match run.parallel.dtype {
        Dtype::Bf16 => true,
        Dtype::Fp32 => false,
        Dtype::Auto => !machine.cpu || machine.rates.as_ref().is_some_and(|rates| rates.bf16.is_some()),
    }
}

/// How ranks share the work of a run whose batch they can share, as [`fit_batch`] makes it.
pub fn setup_of(shared: &RunConfig, ranks: usize, cluster: &Cluster) -> Setup {
    let bf16 = computes_in_bf16(shared, &cluster.machine);
    Setup::of(shared, ranks, cluster.machine.cpu, bf16).expect("the batch was made to be shared")
}

/// Steps and tokens of a run.
fn length(run: &RunConfig) -> (u64, u64) {
    let steps = run.max_steps();
    (steps, run.batches().tokens_before(steps))
}

/// Seconds of all steps, each with its own batch. A batch of the ramp that is smaller than these ranks can
/// share counts as if fewer had it, each a micro-batch.
fn run_seconds(shared: &RunConfig, ranks: usize, cluster: &Cluster) -> f64 {
    let (batches, last) = (shared.batches(), shared.max_steps());
    let full = setup_of(shared, ranks, cluster);
    let micro_tokens = (full.micro_batch * shared.model.seq_len * ranks) as u64;
    let stages = batches.stages();
    let ends = stages.iter().skip(1).map(|stage| stage.first_step).chain([u64::MAX]);
    let seconds = stages.iter().zip(ends).map(|(stage, end)| {
        let steps = end.min(last).saturating_sub(stage.first_step);
        let micro_steps = (stage.batch_tokens / micro_tokens).max(1);
        let setup = Setup { micro_steps, ..full };
        steps as f64 * seconds_of(shared, &setup, cluster).total
    });
    seconds.sum()
}

/// A step's seconds.
fn seconds_of(run: &RunConfig, setup: &Setup, cluster: &Cluster) -> StepSeconds {
    let costs = Costs::new(cluster, &run.model, setup);
    step_seconds(&step_acts(&run.model, setup), &costs)
}

impl Traffic {
    /// What a step of `model` sends on ranks of a cluster. Ranks of one node read each other's fp32 as it is:
    /// bf16 on the wire halves what leaves a node.
    pub fn of(model: &ModelConfig, setup: &Setup, cluster: &Cluster) -> Traffic {
        let reads = cluster.machine.cpu && cluster.nodes(setup.world_size) == 1;
        let wire_width = if reads { 4 } else { setup.wire_width() };
        let sent = StepTraffic::with_wire(model, setup, wire_width);
        let ranks = setup.world_size as f64;
        // What an ideal algorithm sends is (W - 1) / W of the buffers; of these, each link's share.
        let buffers = if setup.world_size > 1 { sent.total() as f64 * ranks / (ranks - 1.0) } else { 0.0 };
        let share = |parts: usize| (parts as f64 - 1.0) / parts as f64;
        let here = setup.world_size.min(cluster.per_node);
        Traffic {
            all_reduce: sent.all_reduce,
            reduce_scatter: sent.reduce_scatter,
            all_gather: sent.all_gather,
            rank_total: sent.total(),
            within: (buffers * share(here)) as u64,
            between: (buffers * share(cluster.nodes(setup.world_size))) as u64,
        }
    }
}

/// All modes of sharding.
const SHARDS: [Shard; 4] = [Shard::None, Shard::Optimizer, Shard::Gradients, Shard::Parameters];

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::path::Path;

    pub(crate) fn run(name: &str) -> RunConfig {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("{name}.toml"));
        crate::load(&file, &[], &|_| Ok(257)).unwrap()
    }

    pub(crate) fn question(gpu: &str, link: &str, ranks: usize) -> Question {
        let machine = Machine::named(gpu, 1).unwrap();
        let per_node = machine.per_node;
        let between = Link::named(link).unwrap();
        let cluster = Cluster { machine, between, per_node, disk_bytes_per_s: 2e9 };
        let hours = RANK_HOURS_BETWEEN_FAILURES;
        Question { ranks, cluster, price: Some(2.0), rank_hours_between_failures: hours }
    }

    #[test]
    fn a_slower_link_and_more_nodes_are_never_faster_per_rank() {
        let run = run("gpt3-6.7b");
        let rate = |link, ranks| Plan::of(&run, &question("h100", link, ranks)).run.tokens_per_second;
        assert!(rate("ib400x8", 64) >= rate("ib100", 64) && rate("ib100", 64) > rate("eth10", 64));
        assert!(rate("ib400x8", 64) / 64.0 <= rate("ib400x8", 8) / 8.0 * 1.001);
    }

    #[test]
    fn the_phases_of_a_step_add_up_to_it() {
        for name in ["gpt2-124m", "gpt3-1.3b", "gpt3-175b"] {
            for mode in Plan::of(&run(name), &question("a100-80", "ib100", 64)).modes {
                let step = mode.step;
                let computing = step.forward + step.backward + step.recompute + step.optimizer;
                let waiting = step.waiting_for_weights + step.waiting_for_gradients;
                let all = computing + waiting + step.agreeing + step.helping;
                assert!((all / step.total - 1.0).abs() < 1e-9, "{name}: {step:?}");
            }
        }
    }

    #[test]
    fn money_is_hours_times_price_and_what_fits_best_fits() {
        let plan = Plan::of(&run("gpt3-13b"), &question("h100", "ib400x8", 64));
        assert_eq!(plan.run.price, Some(2.0 * plan.run.rank_hours));
        let best = plan.best.unwrap();
        assert!(best.fits && best.tokens_per_second >= plan.run.tokens_per_second * 0.999);
        assert!(plan.run.days_with_failures > plan.run.days);
    }

    #[test]
    fn the_largest_micro_batch_fits_and_the_next_does_not() {
        let plan = Plan::of(&run("gpt3-6.7b"), &question("a100-80", "ib200x8", 16));
        let largest = plan.modes[0].largest_micro_batch.unwrap();
        let (_, mut shared) = fit_batch(&run("gpt3-6.7b"), 16);
        let cluster = question("a100-80", "ib200x8", 16).cluster;
        let fits = |run: &RunConfig| modes::mode_plan(run, 16, &cluster).fits;
        shared.batch.micro_batch = largest;
        assert!(fits(&shared));
        shared.batch.micro_batch = 2 * largest;
        assert!(largest == 64 || !fits(&shared), "{largest}");
    }
}
