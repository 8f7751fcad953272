//! A step on ranks that differ: some are slow, each takes a little more or less time in each step, a node's
//! link is slow, machines fail. Runs the same acts as the engine and the plan, on a clock for each rank.
//! Knows costs and chances; the same seed gives the same course.
//!
//! A rank's acts come in one fixed order, and all ranks' collectives pass in the order in which they are
//! started, each when the last rank has come to it. So events need no queue: act by act, all clocks move
//! on. Ranks that are told nothing of their own share one clock, which is exact: they do the same at the same time.

use super::cost::Costs;
use crate::{Act, Cargo, Philox};
use serde::Serialize;

/// What is not as it should be.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Trouble {
    /// Of all chances.
    pub seed: u64,
    /// Ranks that compute this many times as long as the others.
    pub slow_ranks: Vec<(usize, f64)>,
    /// Nodes whose link takes this many times as long.
    pub slow_links: Vec<(usize, f64)>,
    /// The standard deviation of the logarithm of what a rank's computation takes in a step, over what it
    /// should; 0 for none.
    pub jitter: f64,
}

/// A step as it went.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct SimulatedStep {
    /// From the update before it to its own, on the last rank.
    pub seconds: f64,
    /// The rank that has waited least, and was waited for.
    pub last: usize,
    /// The mean over the ranks of what they waited.
    pub waited: f64,
}

/// Ranks and their clocks.
pub struct Simulation<'a> {
    acts: &'a [Act],
    costs: &'a Costs<'a>,
    trouble: &'a Trouble,
    /// The first rank that each clock stands for, and how many.
    clocks: Vec<(usize, usize)>,
    now: Vec<f64>,
    waited: Vec<f64>,
    /// What each clock's computation takes in this step, over what it should.
    factors: Vec<f64>,
    /// When the last collective is complete, and each segment's for weights and gradients.
    free: f64,
    done: Vec<[f64; 2]>,
    step: u64,
}

impl<'a> Simulation<'a> {
    /// `ranks` that make steps of `acts`.
    pub fn new(acts: &'a [Act], costs: &'a Costs<'a>, ranks: usize, trouble: &'a Trouble) -> Simulation<'a> {
        let clocks = clocks(ranks, trouble);
        let (count, segments) =
            (clocks.len(), acts.iter().filter_map(segment).max().map_or(0, |last| last + 1));
        Simulation {
            acts,
            costs,
            trouble,
            clocks,
            now: vec![0.0; count],
            waited: vec![0.0; count],
            factors: vec![1.0; count],
            free: 0.0,
            done: vec![[0.0; 2]; segments],
            step: 0,
        }
    }

    /// Makes a step.
    pub fn step(&mut self) -> SimulatedStep {
        let began = latest(&self.now);
        self.draw();
        self.waited.fill(0.0);
        for act in self.acts {
            match act {
                Act::Compute(work) => {
                    let seconds = self.costs.work(*work);
                    self.now.iter_mut().zip(&self.factors).for_each(|(now, factor)| *now += factor * seconds);
                }
                Act::Start(call) => self.start(call),
                Act::Wait(cargo, segment) => self.wait(self.done[*segment][*cargo as usize]),
                Act::Agree => self.wait(latest(&self.now) + self.costs.agree()),
            }
        }
        self.step += 1;
        let ranks: usize = self.clocks.iter().map(|(_, ranks)| ranks).sum();
        let waited = self.waited.iter().zip(&self.clocks).map(|(waited, (_, ranks))| waited * *ranks as f64);
        let waited = waited.sum::<f64>() / ranks as f64;
        SimulatedStep { seconds: latest(&self.now) - began, last: self.last(), waited }
    }

    fn start(&mut self, call: &crate::Call) {
        let mut seconds = self.costs.call(call);
        // The slowest link holds up all.
        seconds.between *= self.trouble.slow_links.iter().map(|(_, factor)| *factor).fold(1.0, f64::max);
        self.now.iter_mut().for_each(|now| *now += seconds.cores);
        self.free = self.free.max(latest(&self.now)) + seconds.total() - seconds.cores;
        self.done[call.segment][call.cargo as usize] = self.free;
    }

    fn wait(&mut self, until: f64) {
        for (now, waited) in self.now.iter_mut().zip(&mut self.waited) {
            *waited += (until - *now).max(0.0);
            *now = now.max(until);
        }
    }

    /// The rank that has waited least: the others have waited for it.
    fn last(&self) -> usize {
        let least = self.waited.iter().zip(&self.clocks).min_by(|a, b| a.0.total_cmp(b.0));
        least.map_or(0, |(_, (rank, _))| *rank)
    }

    /// What this step takes on each clock.
    fn draw(&mut self) {
        let Trouble { seed, slow_ranks, jitter, .. } = self.trouble;
        let random = Philox::new(*seed);
        for ((rank, _), factor) in self.clocks.iter().zip(&mut self.factors) {
            let slow = slow_ranks.iter().find(|(slow, _)| slow == rank).map_or(1.0, |(_, factor)| *factor);
            let [a, b, ..] = random.at([*rank as u32, self.step as u32, (self.step >> 32) as u32, 0]);
            let normal = (-2.0 * uniform(a).ln()).sqrt() * (std::f64::consts::TAU * uniform(b)).cos();
            *factor = slow * if *jitter > 0.0 { (jitter * normal).exp() } else { 1.0 };
        }
    }
}

/// Which ranks share a clock: all, but for those of which something is said; with jitter none do.
fn clocks(ranks: usize, trouble: &Trouble) -> Vec<(usize, usize)> {
    if trouble.jitter > 0.0 {
        return (0..ranks).map(|rank| (rank, 1)).collect();
    }
    let mut slow: Vec<usize> =
        trouble.slow_ranks.iter().map(|(rank, _)| *rank).filter(|r| *r < ranks).collect();
    slow.sort_unstable();
    slow.dedup();
    let others = (0..ranks).find(|rank| !slow.contains(rank)).map(|first| (first, ranks - slow.len()));
    others.into_iter().chain(slow.iter().map(|rank| (*rank, 1))).collect()
}

fn segment(act: &Act) -> Option<usize> {
    match act {
        Act::Start(call) => Some(call.segment),
        Act::Wait(Cargo::Weights | Cargo::Gradient, segment) => Some(*segment),
        Act::Compute(_) | Act::Agree => None,
    }
}

fn latest(clocks: &[f64]) -> f64 {
    clocks.iter().copied().fold(0.0, f64::max)
}

/// Above 0, below 1.
fn uniform(bits: u32) -> f64 {
    (f64::from(bits) + 0.5) / 4_294_967_296.0
}

/// How a run lives: what it saves when, and how often it fails.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Life {
    /// Of its chances.
    pub seed: u64,
    /// Ranks, one of which fails.
    pub ranks: usize,
    /// Updates to make.
    pub steps: u64,
    /// Updates between checkpoints.
    pub every_steps: u64,
    /// Seconds for which one holds up training, and until it is written.
    pub save_s: f64,
    /// See there.
    pub write_s: f64,
    /// Seconds from a failure to the first step after it.
    pub restart_s: f64,
    /// Seconds between failures of the job, in the mean.
    pub between_failures_s: f64,
}

/// A failure.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Failure {
    /// Seconds since the run's start.
    pub at_s: f64,
    /// The rank that failed.
    pub rank: usize,
    /// Updates made by then, and that the run goes on from.
    pub step: u64,
    /// See there.
    pub back_to: u64,
}

/// How it went.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Lived {
    /// From start to end.
    pub seconds: f64,
    /// The part of it that no update came of.
    pub lost: f64,
    /// Every failure.
    pub failures: Vec<Failure>,
}

impl Life {
    /// Lives through all steps, which take what `steps` took, one after the other and again from the first. A
    /// failure takes the run back to the last checkpoint that was written; none is begun before the one before
    /// it is.
    pub fn live(&self, steps: &[SimulatedStep]) -> Lived {
        let (mut at, mut made, mut saved) = (0.0, 0u64, 0u64);
        let mut writing: Option<(f64, u64)> = None;
        let mut useful = 0.0;
        let mut failures = Vec::new();
        let mut fails_at = self.next_failure(0, 0.0);
        while made < self.steps {
            let seconds = steps[made as usize % steps.len()].seconds;
            if at + seconds > fails_at {
                if let Some((_, step)) = writing.take_if(|(complete, _)| *complete <= fails_at) {
                    saved = step;
                }
                let number = failures.len() as u64;
                let rank = Philox::new(self.seed).at([number as u32, 0, 2, 0])[0] as usize % self.ranks;
                failures.push(Failure { at_s: fails_at, rank, step: made, back_to: saved });
                (at, made, writing) = (fails_at + self.restart_s, saved, None);
                fails_at = self.next_failure(number + 1, at);
                continue;
            }
            (at, made) = (at + seconds, made + 1);
            if let Some((_, step)) = writing.take_if(|(complete, _)| *complete <= at) {
                saved = step;
            }
            if made.is_multiple_of(self.every_steps) && writing.is_none() {
                at += self.save_s;
                writing = Some((at + self.write_s, made));
            }
        }
        for step in 0..self.steps.min(steps.len() as u64) {
            let times = (self.steps - step).div_ceil(steps.len() as u64);
            useful += times as f64 * steps[step as usize].seconds;
        }
        Lived { seconds: at, lost: 1.0 - useful / at.max(f64::MIN_POSITIVE), failures }
    }

    /// When the failure number `number` comes, counted from `from`: an exponential time.
    fn next_failure(&self, number: u64, from: f64) -> f64 {
        let bits = Philox::new(self.seed).at([number as u32, (number >> 32) as u32, 1, 0])[0];
        from - uniform(bits).ln() * self.between_failures_s
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::tests::{question, run};
    use crate::plan::{Costs, fit_batch, setup_of, step_seconds};
    use crate::step_acts;
    use std::time::Instant;

    /// The last of some steps of a preset on so many ranks.
    fn last(name: &str, ranks: usize, steps: usize, trouble: &Trouble) -> SimulatedStep {
        let cluster = question("h100", "ib100", ranks).cluster;
        let (_, shared) = fit_batch(&run(name), ranks);
        let setup = setup_of(&shared, ranks, &cluster);
        let costs = Costs::new(&cluster, &shared.model, &setup);
        let acts = step_acts(&shared.model, &setup);
        let mut simulation = Simulation::new(&acts, &costs, ranks, trouble);
        (0..steps).map(|_| simulation.step()).last().unwrap()
    }

    #[test]
    fn ranks_in_lockstep_take_what_the_plan_says() {
        for (name, ranks) in [("gpt2-124m", 16), ("gpt3-6.7b", 64), ("gpt3-175b", 128)] {
            let cluster = question("h100", "ib100", ranks).cluster;
            let (_, shared) = fit_batch(&run(name), ranks);
            let setup = setup_of(&shared, ranks, &cluster);
            let costs = Costs::new(&cluster, &shared.model, &setup);
            let planned = step_seconds(&step_acts(&shared.model, &setup), &costs).total;
            let simulated = last(name, ranks, 2, &Trouble::default()).seconds;
            assert!((simulated / planned - 1.0).abs() < 1e-9, "{name}: {simulated} {planned}");
            // A clock for each rank gives the same as one for all.
            let alone = Trouble { jitter: 1e-300, ..Trouble::default() };
            assert!((last(name, ranks, 2, &alone).seconds / planned - 1.0).abs() < 1e-9, "{name}");
        }
    }

    #[test]
    fn one_slow_rank_holds_up_all_and_is_named_and_the_others_wait_for_it() {
        let trouble = Trouble { slow_ranks: vec![(37, 1.5)], ..Trouble::default() };
        let (slow, well) =
            (last("gpt3-1.3b", 64, 3, &trouble), last("gpt3-1.3b", 64, 3, &Trouble::default()));
        // Its computation takes half as long again, in part behind what is communicated.
        let computing = well.seconds - well.waited;
        let longer = (slow.seconds - well.seconds) / computing;
        assert!((0.3..0.51).contains(&longer), "{longer}: {slow:?} {well:?}");
        assert_eq!(slow.last, 37);
        assert!(slow.waited > well.waited + 0.3 * computing);
        let link = Trouble { slow_links: vec![(3, 10.0)], ..Trouble::default() };
        assert!(last("gpt3-1.3b", 64, 3, &link).seconds > well.seconds);
    }

    #[test]
    fn a_seed_gives_one_course_and_another_seed_another() {
        let of = |seed| last("gpt2-124m", 32, 5, &Trouble { seed, jitter: 0.05, ..Trouble::default() });
        assert_eq!(of(1), of(1));
        assert_ne!(of(1).seconds, of(2).seconds);
    }

    #[test]
    fn ten_thousand_ranks_of_the_largest_model_are_simulated_in_seconds() {
        let began = Instant::now();
        let trouble = Trouble { jitter: 0.02, ..Trouble::default() };
        let step = last("gpt3-175b", 10_000, 3, &trouble);
        assert!(step.seconds > 0.0 && began.elapsed().as_secs_f64() < 10.0, "{:?}", began.elapsed());
    }

    #[test]
    fn what_failures_cost_comes_to_what_the_formula_says() {
        let step = SimulatedStep { seconds: 10.0, last: 0, waited: 0.0 };
        let life = |every_steps, seed| Life {
            seed,
            ranks: 1000,
            steps: 200_000,
            every_steps,
            save_s: 5.0,
            write_s: 60.0,
            restart_s: 300.0,
            between_failures_s: 20_000.0,
        };
        let lived = life(45, 7).live(&[step]);
        assert_eq!(lived, life(45, 7).live(&[step]));
        // Saving, then half an interval, what was being written, and the restart, once every 20,000 seconds.
        let expected = 5.0 / 455.0 + (225.0 + 60.0 + 300.0) / 20_000.0;
        assert!((lived.lost / expected - 1.0).abs() < 0.2, "{} {expected}", lived.lost);
        assert!(life(450, 7).live(&[step]).lost > lived.lost && life(2, 7).live(&[step]).lost > lived.lost);
        assert!(lived.failures.iter().all(|failure| failure.back_to <= failure.step && failure.rank < 1000));
    }
}
