//! `phalanx plan --simulate`: steps of ranks that differ and a run with failures, told. The simulation itself
//! is `configs`'.

use super::PlanArgs;
use super::text::{days, percent, seconds};
use anyhow::Result;
use configs::RunConfig;
use configs::plan::{Costs, Life, Lived, PlanError, Question, SimulatedStep, Simulation, Trouble};
use configs::plan::{Plan, fit_batch, setup_of};
use serde::Serialize;
use std::fmt::Write;

/// What came of it.
#[derive(Serialize)]
pub(super) struct Simulated {
    steps: Vec<SimulatedStep>,
    lived: Lived,
}

/// Simulates `--simulate` steps, and a whole run of such steps with the plan's failures and checkpoints.
pub(super) fn simulate(
    args: &PlanArgs,
    config: &RunConfig,
    question: &Question,
    plan: &Plan,
) -> Result<Simulated> {
    let (_, shared) = fit_batch(config, question.ranks);
    let setup = setup_of(&shared, question.ranks, &question.cluster);
    let costs = Costs::new(&question.cluster, &shared.model, &setup);
    let acts = configs::step_acts(&shared.model, &setup);
    let trouble = trouble(args)?;
    let mut simulation = Simulation::new(&acts, &costs, question.ranks, &trouble);
    // The first step begins with nothing on its way.
    simulation.step();
    let steps: Vec<SimulatedStep> =
        (0..args.simulate.unwrap_or(1).max(1)).map(|_| simulation.step()).collect();
    let failures = &plan.failures;
    let life = Life {
        seed: args.seed,
        ranks: question.ranks,
        steps: plan.run.steps,
        every_steps: failures.every_steps,
        save_s: failures.save_s,
        write_s: failures.write_s,
        restart_s: failures.restart_s,
        between_failures_s: failures.hours_between * 3600.0,
    };
    Ok(Simulated { lived: life.live(&steps), steps })
}

/// As people read it.
pub(super) fn text(simulated: &Simulated, plan: &Plan) -> String {
    let Simulated { steps, lived } = simulated;
    let mut out = String::new();
    let all = || steps.iter().map(|step| step.seconds);
    let mean = all().sum::<f64>() / steps.len() as f64;
    let (least, most) = (all().fold(f64::MAX, f64::min), all().fold(0.0, f64::max));
    let _ = writeln!(
        out,
        "\nsimulated   {} steps: {} in the mean, {} to {}; {} of it waiting; the plan says {}",
        steps.len(),
        seconds(mean),
        seconds(least),
        seconds(most),
        percent(steps.iter().map(|step| step.waited).sum::<f64>() / steps.len() as f64 / mean),
        seconds(plan.modes[0].step.total),
    );
    let mut last: Vec<(usize, usize)> = Vec::new();
    for step in steps {
        match last.iter_mut().find(|(rank, _)| *rank == step.last) {
            Some((_, times)) => *times += 1,
            None => last.push((step.last, 1)),
        }
    }
    last.sort_by_key(|(rank, times)| (std::cmp::Reverse(*times), *rank));
    let named: Vec<String> =
        last.iter().take(3).map(|(rank, times)| format!("rank {rank} {times} times")).collect();
    let _ = writeln!(out, "            most waited for, step by step: {}", named.join(", "));
    let _ = writeln!(
        out,
        "            the whole run: {} days, {} failures, {} lost to them and to saving",
        days(lived.seconds / 86_400.0),
        lived.failures.len(),
        percent(lived.lost.max(0.0))
    );
    for failure in lived.failures.iter().take(3) {
        let (day, rank) = (days(failure.at_s / 86_400.0), failure.rank);
        let _ = writeln!(
            out,
            "            day {day}: rank {rank} fails after step {}, back to {}",
            failure.step, failure.back_to
        );
    }
    out
}

fn trouble(args: &PlanArgs) -> Result<Trouble, PlanError> {
    if !(args.jitter.is_finite() && args.jitter >= 0.0) {
        let hint = "a share of the time that a computation takes, like 0.02; 0 for none";
        return Err(PlanError::NotPositive { what: "--jitter", got: args.jitter.to_string(), hint });
    }
    Ok(Trouble {
        seed: args.seed,
        slow_ranks: args
            .slow_ranks
            .iter()
            .map(|text| factor("--slow-rank", text))
            .collect::<Result<_, _>>()?,
        slow_links: args
            .slow_links
            .iter()
            .map(|text| factor("--slow-link", text))
            .collect::<Result<_, _>>()?,
        jitter: args.jitter,
    })
}

/// Reads `37:1.5`.
fn factor(what: &'static str, text: &str) -> Result<(usize, f64), PlanError> {
    let parts = text.split_once(':');
    let read = parts.and_then(|(number, factor)| Some((number.parse().ok()?, factor.parse::<f64>().ok()?)));
    read.filter(|(_, factor)| factor.is_finite() && *factor > 0.0).ok_or_else(|| PlanError::Unknown {
        what,
        got: text.into(),
        known: "write 37:1.5 for number 37, which takes half as long again".into(),
    })
}
