//! A configuration's steps beside its plan on this machine: memory of a rank, bytes sent, seconds and where they
//! go. Knows a step as something to time and a plan as something to ask; fits nothing.

use super::memory::{Watch, pss_bytes};
use super::overlap::{mean, sent_bytes};
use super::steps::Steps;
use super::{Calibration, Case, median, most};
use crate::error::TrainError;
use crate::timing::{PhaseSeconds, Timing};
use configs::plan::{Cluster, Costs, Machine, Measured, Room, StepSeconds, Traffic, step_seconds};
use configs::{Act, RunConfig, Setup, step_acts};
use ops::collectives::{Communicator, Place};
use std::time::Instant;
use tch::Kind;

/// Turns, in each of which the machine is measured, steps are timed, and the machine is measured again: what it
/// gives changes from second to second.
const TURNS: usize = 4;

/// Steps of a turn, of which the middle one counts.
const STEPS: u64 = 3;

/// A configuration's steps as they are planned and as they are.
#[derive(Debug)]
pub struct Compared {
    /// Each with the measured value and, as its reference, the planned one; the ratio is planned over measured. Of
    /// seconds the middle turn's.
    pub cases: Vec<Case>,
    /// The least and the greatest ratio of a step's seconds among the turns.
    pub spread: [f64; 2],
}

/// Steps of `config` as they were planned and as they are, on the ranks that are there, on the CPU; `measured` is
/// the machine as another process has measured it. Collective.
///
/// # Errors
/// A batch that the ranks cannot share evenly, no memory, a failed collective.
pub fn planned(
    config: &RunConfig,
    measured: &Measured,
    comm: &dyn Communicator,
) -> Result<Compared, TrainError> {
    let place = comm.place();
    let bf16 = ops::device::dtype(config.parallel.dtype, tch::Device::Cpu) == Kind::BFloat16;
    let setup = Setup::of(config, place.world_size, true, bf16)?;
    let acts = step_acts(&config.model, &setup);
    let plan = |measured: &Measured| Planned::of(config, &setup, &acts, measured.clone(), place.local_size);
    let mut steps = Steps::new(config, &setup, comm)?;
    // Before anything else takes memory here.
    let taken = Taken::by(&mut steps, comm)?;

    let calibration = Calibration { turns: 1, ..Calibration::default() };
    let buffers = calibration.buffers(comm)?;
    let machine = || {
        calibration
            .again(measured, (config.parallel.threads, bf16, &acts), (comm, &buffers))
            .map(|now| plan(&now))
    };
    let mut before = machine()?;
    let mut turns = Vec::new();
    for _ in 0..TURNS {
        let timed = Timed::by(&mut steps, comm)?;
        let after = machine()?;
        turns.push((timed, [before.step, after.step]));
        before = after;
    }
    let cases = Naming { config, setup: &setup, place }.cases(&taken, &plan(measured), &turns);
    let mut ratios: Vec<f64> =
        turns.iter().map(|(timed, plans)| mean_of(plans, |step| step.total) / timed.seconds).collect();
    ratios.sort_by(f64::total_cmp);
    Ok(Compared { cases, spread: [ratios[0], ratios[ratios.len() - 1]] })
}

/// How cases are called.
struct Naming<'a> {
    config: &'a RunConfig,
    setup: &'a Setup,
    place: &'a Place,
}

impl Naming<'_> {
    fn cases(&self, taken: &Taken, plan: &Planned, turns: &[Turn]) -> Vec<Case> {
        let name = self.name();
        let case = |what: &str, unit, value: f64, planned: f64| {
            let ratio = if value > 0.0 { planned / value } else { 1.0 };
            Case { case: format!("{name}: {what}"), value, unit, reference: planned, ratio }
        };
        let seconds = |what: &str, is: fn(&Timed) -> f64, planned: fn(&StepSeconds) -> f64| {
            let measured = median(turns.iter().map(|(timed, _)| is(timed)).collect());
            let planned = median(turns.iter().flat_map(|(_, plans)| plans.iter().map(planned)).collect());
            case(what, "s", measured, planned)
        };
        vec![
            case("memory of a rank", "MB", taken.bytes / 1e6, plan.bytes / 1e6),
            case("sent in a step", "MB", taken.sent / 1e6, plan.sent / 1e6),
            seconds("step", |timed| timed.seconds, |step| step.total),
            seconds("of it forward", |timed| timed.phases.forward, |step| step.forward),
            seconds("of it backward", |timed| timed.phases.backward, |step| step.backward + step.recompute),
            seconds("of it update", |timed| timed.phases.optimizer, |step| step.optimizer),
            seconds(
                "of it other ranks",
                |timed| timed.phases.reduce,
                |step| step.waiting_for_weights + step.waiting_for_gradients + step.helping,
            ),
        ]
    }

    fn name(&self) -> String {
        let Naming { config, setup, place } = self;
        let shard = format!("{:?}", setup.shard).to_lowercase();
        let dtype = if setup.bf16 { "bf16" } else { "fp32" };
        let again = if setup.recompute { ", recomputes" } else { "" };
        let nodes = if place.nodes > 1 { format!(" on {} nodes", place.nodes) } else { String::new() };
        let threads = match config.parallel.threads {
            1 => String::new(),
            threads => format!(", {threads} threads"),
        };
        format!("{} {dtype} {shard}{again}, {} ranks{nodes}{threads}", config.run.name, place.world_size)
    }
}

fn mean_of(plans: &[StepSeconds; 2], of: fn(&StepSeconds) -> f64) -> f64 {
    plans.iter().map(of).sum::<f64>() / 2.0
}

/// Steps, and what was planned with what the machine gave before and after them.
type Turn = (Timed, [StepSeconds; 2]);

/// What the plan says of a rank.
struct Planned {
    bytes: f64,
    sent: f64,
    step: StepSeconds,
}

impl Planned {
    fn of(config: &RunConfig, setup: &Setup, acts: &[Act], measured: Measured, per_node: usize) -> Planned {
        let disk_bytes_per_s = measured.disk_bytes_per_s;
        let machine = Machine::measured(measured, config.parallel.threads);
        let cluster = Cluster { between: machine.between.clone(), machine, per_node, disk_bytes_per_s };
        let room = Room::of(&config.model, setup, &cluster.machine);
        let costs = Costs::new(&cluster, &config.model, setup);
        Planned {
            // Nothing is saved here.
            bytes: (room.total - room.snapshot) as f64,
            sent: Traffic::of(&config.model, setup, &cluster).rank_total as f64,
            step: step_seconds(acts, &costs),
        }
    }
}

/// What a step takes of a rank beside time, the mean over ranks.
struct Taken {
    bytes: f64,
    sent: f64,
}

impl Taken {
    fn by(steps: &mut Steps<'_>, comm: &dyn Communicator) -> Result<Taken, TrainError> {
        const LOOKED_AT: u64 = 2;
        steps.make(&mut Timing::default())?; // touches memory for the first time
        steps.learner.engine.parameters_mut().settle()?;
        let (watch, before) = (Watch::start(), sent_bytes(comm));
        for _ in 0..LOOKED_AT {
            steps.make(&mut Timing::default())?;
        }
        steps.learner.engine.parameters_mut().settle()?;
        let sent = (sent_bytes(comm) - before) as f64 / LOOKED_AT as f64;
        let bytes = watch.end().max(pss_bytes());
        Ok(Taken { bytes: mean(comm, bytes as f64)?, sent: mean(comm, sent)? })
    }
}

/// What a step takes of time: in all on the slowest rank, and this rank's phases.
struct Timed {
    seconds: f64,
    phases: PhaseSeconds,
}

impl Timed {
    fn by(steps: &mut Steps<'_>, comm: &dyn Communicator) -> Result<Timed, TrainError> {
        let (mut seconds, mut phases, mut timing) = (Vec::new(), Vec::new(), Timing::default());
        for step in 0..=STEPS {
            comm.barrier()?;
            let began = Instant::now();
            steps.make(&mut timing)?;
            let taken = most(comm, began.elapsed().as_secs_f64())?;
            let phase = timing.take();
            if step > 0 {
                // The first finds caches full of something else.
                seconds.push(taken);
                phases.push(phase);
            }
        }
        steps.learner.engine.parameters_mut().settle()?;
        let of = |phase: fn(&PhaseSeconds) -> f64| median(phases.iter().map(phase).collect());
        Ok(Timed {
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
