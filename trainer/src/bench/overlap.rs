//! How much of a step's communication is hidden behind its computation, and how many bytes it sends beside
//! theory. Knows a step as something to time; what it consists of is `steps`'s.

use super::steps::Steps;
use super::switch::Switch;
use super::{Case, median, most, slowest};
use crate::error::TrainError;
use crate::timing::Timing;
use configs::{RunConfig, Setup, StepTraffic};
use ops::collectives::{CommError, Communicator, Operation, Pending};
use std::time::Instant;
use tch::{Device, Kind, Tensor};

/// Steps that are timed together, from the end of the update before them to the end of the last one's:
/// weights that are on their way then hide behind the step that follows, as they do in a run.
const STEPS: u64 = 2;
/// With the one before.
const ALL_STEPS: f64 = (STEPS + 1) as f64;

/// Measures steps of `config` on the ranks that are there, on the CPU: with communication, with none,
/// and communication alone, in turns, each as long as its slowest rank. Each turn's steps are held against
/// those without communication right before and right after them, for a machine's pace changes by more from
/// minute to minute than what is looked for. All are medians. Collective.
///
/// # Errors
/// A batch that the ranks cannot share evenly, no memory, a failed collective.
pub fn overlap(config: &RunConfig, comm: &dyn Communicator, turns: usize) -> Result<Vec<Case>, TrainError> {
    let kind = ops::device::dtype(config.parallel.dtype, Device::Cpu);
    let setup = Setup::of(config, comm.world_size(), true, kind == Kind::BFloat16)?;
    let switch = Switch::new(comm);
    let mut steps = Steps::new(config, &setup, &switch)?;
    time(&mut steps, comm)?; // touches memory for the first time

    let at_first = sent_bytes(comm);
    let (outcome, operations) = switch.remembering(|| time(&mut steps, comm));
    outcome?;
    let sent = mean(comm, (sent_bytes(comm) - at_first) as f64)? / ALL_STEPS;

    let quiet = |steps: &mut Steps<'_>| switch.without(|| time(steps, comm));
    let (mut hidden, mut with, mut without, mut alone, mut backward) =
        (vec![], vec![], vec![], vec![], vec![]);
    let mut before = quiet(&mut steps)?;
    for _ in 0..turns {
        let taken = time(&mut steps, comm)?.seconds;
        let after = quiet(&mut steps)?;
        let sending = slowest(comm, || replay(comm, &operations))? / ALL_STEPS;
        let beside = (before.seconds + after.seconds) / 2.0;
        hidden.push(1.0 - (taken - beside) / sending);
        with.push(taken);
        without.push(beside);
        alone.push(sending);
        backward.push(after.backward);
        before = after;
    }
    let (hidden, alone) = (median(hidden), median(alone));
    let shard = format!("{:?}", config.parallel.shard).to_lowercase();
    let name = format!("{} {} nodes of {}", shard, comm.place().nodes, comm.place().local_size);
    let theory = StepTraffic::of(&config.model, &setup).total() as f64;
    Ok(vec![
        Case::more_is_better(format!("communication hidden, {name}"), "share", hidden, 1.0),
        Case::more_is_better(format!("backward beside communication, {name}"), "s", median(backward), alone),
        Case::more_is_better(
            format!("step without and with communication, {name}"),
            "s",
            median(without),
            median(with),
        ),
        Case::more_is_better(format!("sent per step and theory, {name}"), "MB", sent / 1e6, theory / 1e6),
    ])
}

/// What a step takes.
struct Taken {
    /// Seconds, on the slowest rank.
    seconds: f64,
    /// Seconds of it in backward, on this rank.
    backward: f64,
}

/// Makes steps and times all but the first. Collective.
fn time(steps: &mut Steps<'_>, comm: &dyn Communicator) -> Result<Taken, TrainError> {
    let (mut timing, mut began) = (Timing::default(), Instant::now());
    for step in 0..=STEPS {
        if step == 1 {
            (timing, began) = (Timing::default(), Instant::now());
        }
        steps.make(&mut timing)?;
    }
    let seconds = began.elapsed().as_secs_f64() / STEPS as f64;
    steps.learner.engine.parameters_mut().settle()?;
    let backward = timing.take().backward / STEPS as f64;
    Ok(Taken { seconds: most(comm, seconds)?, backward })
}

/// The operations, one after the other and nothing else.
fn replay(comm: &dyn Communicator, operations: &[(Operation, Tensor)]) -> Result<(), TrainError> {
    let start = |(operation, buffer): &(Operation, Tensor)| comm.start(*operation, buffer);
    let started: Result<Vec<Pending>, CommError> = operations.iter().map(start).collect();
    Ok(started?.into_iter().try_for_each(Pending::wait)?)
}

/// What this rank has sent to others in operations.
pub(super) fn sent_bytes(comm: &dyn Communicator) -> u64 {
    let traffic = comm.traffic();
    [traffic.all_reduce, traffic.reduce_scatter, traffic.all_gather]
        .iter()
        .map(|moved| moved.sent_bytes)
        .sum()
}

/// The mean over ranks.
pub(super) fn mean(comm: &dyn Communicator, mine: f64) -> Result<f64, CommError> {
    let mut sum = [mine];
    comm.all_reduce_f64(&mut sum)?;
    Ok(sum[0] / comm.world_size() as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ops::collectives::Solo;
    use std::path::Path;

    #[test]
    fn one_rank_alone_sends_nothing_and_has_every_case() {
        let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/demo.toml");
        let sets = ["batch.global_batch_tokens=128", "batch.micro_batch=1"].map(str::to_owned);
        let config = configs::load(&demo, &sets, &|_| Ok(257)).unwrap();
        let cases = overlap(&config, &Solo::new(), 1).unwrap();
        assert_eq!(cases.len(), 4);
        assert_eq!((cases[3].value, cases[3].reference), (0.0, 0.0));
        assert!(cases[2].value > 0.0 && cases[2].reference > 0.0);
    }
}
