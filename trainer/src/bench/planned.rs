//! A configuration's steps beside its plan on this machine: memory of a rank, bytes sent, seconds and where they
//! go. Knows a step as something to time and a plan as something to ask; fits nothing.

use super::memory::{Watch, pss_bytes};
use super::overlap::{mean, sent_bytes};
use super::steps::Steps;
use super::{Case, median, most};
use crate::error::TrainError;
use crate::timing::{PhaseSeconds, Timing};
use configs::plan::{Cluster, Costs, Machine, Measured, Room, StepSeconds, Traffic, step_seconds};
use configs::{RunConfig, Setup, step_acts};
use ops::collectives::Communicator;
use std::time::Instant;
use tch::Kind;

/// Steps that are timed one by one, of which the middle one counts.
const STEPS: u64 = 5;

/// Steps of `config` as they were planned and as they are, on the ranks that are there, on the CPU. Each case has
/// the measured value and, as its reference, the planned one; the ratio is planned over measured. Collective.
///
/// # Errors
/// A batch that the ranks cannot share evenly, no memory, a failed collective.
pub fn planned(
    config: &RunConfig,
    measured: Measured,
    comm: &dyn Communicator,
) -> Result<Vec<Case>, TrainError> {
    let place = comm.place();
    let bf16 = ops::device::dtype(config.parallel.dtype, tch::Device::Cpu) == Kind::BFloat16;
    let setup = Setup::of(config, place.world_size, true, bf16)?;
    let plan = Planned::of(config, &setup, measured, place.local_size);
    let taken = Taken::by(config, &setup, comm)?;
    let shard = format!("{:?}", setup.shard).to_lowercase();
    let dtype = if bf16 { "bf16" } else { "fp32" };
    let again = if setup.recompute { ", recomputes" } else { "" };
    let nodes = if place.nodes > 1 { format!(" on {} nodes", place.nodes) } else { String::new() };
    let name = format!("{} {dtype} {shard}{again}, {} ranks{nodes}", config.run.name, place.world_size);
    let case = |what: &str, unit, value: f64, planned: f64| {
        let ratio = if value > 0.0 { planned / value } else { 1.0 };
        Case { case: format!("{name}: {what}"), value, unit, reference: planned, ratio }
    };
    let step = plan.step;
    let (phases, waits) = (taken.phases, step.waiting_for_weights + step.waiting_for_gradients);
    Ok(vec![
        case("memory of a rank", "MB", taken.bytes / 1e6, plan.bytes / 1e6),
        case("sent in a step", "MB", taken.sent / 1e6, plan.sent / 1e6),
        case("step", "s", taken.seconds, step.total),
        case("of it forward", "s", phases.forward, step.forward),
        case("of it backward", "s", phases.backward, step.backward + step.recompute),
        case("of it update", "s", phases.optimizer, step.optimizer),
        case("of it other ranks", "s", phases.reduce, waits + step.helping),
    ])
}

/// What the plan says of a rank.
struct Planned {
    bytes: f64,
    sent: f64,
    step: StepSeconds,
}

impl Planned {
    fn of(config: &RunConfig, setup: &Setup, measured: Measured, per_node: usize) -> Planned {
        let disk_bytes_per_s = measured.disk_bytes_per_s;
        let machine = Machine::measured(measured, config.parallel.threads);
        let cluster = Cluster { between: machine.between.clone(), machine, per_node, disk_bytes_per_s };
        let room = Room::of(&config.model, setup, &cluster.machine);
        let costs = Costs::new(&cluster, &config.model, setup);
        Planned {
            // Nothing is saved here.
            bytes: (room.total - room.snapshot) as f64,
            sent: Traffic::of(&config.model, setup, &cluster).rank_total as f64,
            step: step_seconds(&step_acts(&config.model, setup), &costs),
        }
    }
}

/// What a rank took; the mean over ranks, of seconds the slowest one's.
struct Taken {
    bytes: f64,
    sent: f64,
    seconds: f64,
    phases: PhaseSeconds,
}

impl Taken {
    fn by(config: &RunConfig, setup: &Setup, comm: &dyn Communicator) -> Result<Taken, TrainError> {
        let mut steps = Steps::new(config, setup, comm)?;
        let mut timing = Timing::default();
        for step in 0..2 {
            steps.make(step, &mut timing)?; // touches memory for the first time
        }
        timing.take();
        steps.learner.engine.parameters_mut().settle()?;
        let (mut seconds, mut phases) = (Vec::new(), Vec::new());
        let before = sent_bytes(comm);
        for step in 2..2 + STEPS {
            comm.barrier()?;
            let began = Instant::now();
            steps.make(step, &mut timing)?;
            seconds.push(most(comm, began.elapsed().as_secs_f64())?);
            phases.push(timing.take());
        }
        steps.learner.engine.parameters_mut().settle()?;
        let sent = sent_bytes(comm) - before;
        // Looking at memory takes time: not while steps are timed.
        let watch = Watch::start();
        for step in 2 + STEPS..4 + STEPS {
            steps.make(step, &mut timing)?;
        }
        let bytes = watch.end().max(pss_bytes());
        let of = |phase: fn(&PhaseSeconds) -> f64| median(phases.iter().map(phase).collect());
        Ok(Taken {
            bytes: mean(comm, bytes as f64)?,
            sent: mean(comm, sent as f64 / STEPS as f64)?,
            seconds: median(seconds),
            phases: PhaseSeconds {
                data: 0.0,
                forward: of(|phases| phases.forward),
                backward: of(|phases| phases.backward),
                reduce: of(|phases| phases.reduce),
                optimizer: of(|phases| phases.optimizer),
            },
        })
    }
}
