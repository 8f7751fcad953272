//! A plan as people read it. Knows its numbers and their units; computes none of them.

use configs::plan::{Fitted, ModePlan, Plan, Point};
use configs::{Recompute, Shard};
use std::fmt::Write;

/// The whole of it.
pub(super) fn text(plan: &Plan) -> String {
    let mut out = String::new();
    let precision = if plan.bf16 { "bf16" } else { "fp32" };
    let _ = writeln!(
        out,
        "{}: {} parameters in {precision}, on {} x {} in {}, {} between nodes\n",
        plan.name,
        short(plan.parameters as f64),
        grouped(plan.ranks as u64),
        plan.machine,
        count(plan.nodes as u64, "node"),
        plan.link,
    );
    batch(&mut out, &plan.batch, plan.ranks);
    memory(&mut out, plan);
    modes(&mut out, plan);
    step(&mut out, &plan.modes[0]);
    traffic(&mut out, plan);
    whole_run(&mut out, plan);
    scaling(&mut out, plan);
    out
}

fn batch(out: &mut String, batch: &Fitted, ranks: usize) {
    let Fitted { tokens, sequences, seq_len, micro_batch, micro_steps, most_ranks, .. } = batch;
    let ranks = count(ranks as u64, "rank");
    let (tokens, sequences) = (grouped(*tokens), grouped(*sequences));
    let passes = count(*micro_steps, "pass");
    line(
        out,
        "batch",
        &format!("{tokens} tokens: {sequences} sequences of {seq_len}; {micro_batch} at a time, {passes}"),
    );
    if let Some(configured) = batch.instead_of {
        let works: Vec<String> = [batch.lower, batch.upper].into_iter().flatten().map(grouped).collect();
        let configured = grouped(configured);
        line(
            out,
            "",
            &format!("not {configured}, which {ranks} cannot share; {} would do", works.join(" and ")),
        );
    }
    if let Some(micro_batch) = batch.instead_of_micro_batch {
        line(out, "", &format!("not {micro_batch} at a time, which does not divide a rank's sequences"));
    }
    let limit = grouped(*most_ranks);
    line(
        out,
        "",
        &format!("data parallelism ends at {limit} ranks, a sequence each; more need a larger batch"),
    );
    if batch.most_ranks_at_first < *most_ranks {
        let first = grouped(batch.most_ranks_at_first);
        line(out, "", &format!("the ramp's first batch is shared by at most {first} ranks"));
    }
}

fn memory(out: &mut String, plan: &Plan) {
    let (own, has) = (&plan.modes[0], gb(plan.memory_bytes));
    let verdict = if own.fits { "fits" } else { "does not fit" };
    out.push('\n');
    line(out, "memory", &format!("{} of {has} GB a rank: {verdict}", gb(own.room.total)));
    let parts: Vec<String> = own
        .room
        .components()
        .iter()
        .filter(|(_, bytes)| *bytes > 0)
        .map(|(name, bytes)| format!("{name} {}", gb(*bytes)))
        .collect();
    for parts in parts.chunks(5) {
        line(out, "", &parts.join(", "));
    }
}

fn modes(out: &mut String, plan: &Plan) {
    let _ = writeln!(
        out,
        "\n{:<12}{:<13}{:>8}  {:<6}{:>13}{:>11}{:>12}{:>8}",
        "shard", "recompute", "GB", "fits", "micro-batch", "step", "tokens/s", "MFU"
    );
    for mode in &plan.modes {
        let largest = mode.largest_micro_batch.map_or("-".into(), |largest| format!("{largest} at most"));
        let _ = writeln!(
            out,
            "{:<12}{:<13}{:>8}  {:<6}{:>13}{:>11}{:>12}{:>8}",
            shard(mode.mode.shard),
            recompute(mode.mode.recompute),
            gb(mode.room.total),
            if mode.fits { "yes" } else { "no" },
            largest,
            seconds(mode.step.total),
            short(mode.tokens_per_second),
            percent(mode.mfu),
        );
    }
    match &plan.best {
        Some(best) => line(
            out,
            "cheapest",
            &format!(
                "parallel.shard = \"{}\", parallel.recompute = \"{}\", batch.micro_batch = {}: {} tokens/s, MFU {}",
                shard(best.mode.shard),
                recompute(best.mode.recompute),
                best.mode.micro_batch,
                short(best.tokens_per_second),
                percent(best.mfu)
            ),
        ),
        None => line(out, "cheapest", "nothing fits: more ranks with parallel.shard = \"parameters\" might"),
    }
}

fn step(out: &mut String, own: &ModePlan) {
    let step = &own.step;
    out.push('\n');
    line(out, "step", &format!("{}, MFU {}", seconds(step.total), percent(own.mfu)));
    let phases = [
        ("forward", step.forward),
        ("backward", step.backward),
        ("recomputing", step.recompute),
        ("optimizer", step.optimizer),
        ("waiting for weights", step.waiting_for_weights),
        ("waiting for gradients", step.waiting_for_gradients),
        ("moving within the node", step.helping),
    ];
    let told: Vec<String> = phases
        .iter()
        .filter(|(_, taken)| *taken > 0.0)
        .map(|(name, taken)| format!("{name} {}", seconds(*taken)))
        .collect();
    line(out, "", &told.join(", "));
    if step.communicating > 0.0 {
        let (all, hidden) = (seconds(step.communicating), percent(step.hidden()));
        line(out, "", &format!("communication {all}, of which {hidden} passes behind computation"));
    }
}

fn traffic(out: &mut String, plan: &Plan) {
    let traffic = &plan.traffic;
    if traffic.rank_total == 0 {
        return;
    }
    let (rank, within, between) = (gb(traffic.rank_total), gb(traffic.within), gb(traffic.between));
    line(
        out,
        "wire",
        &format!("a rank sends {rank} GB a step; {within} within its node, and its node {between}"),
    );
}

fn whole_run(out: &mut String, plan: &Plan) {
    let (run, failures) = (&plan.run, &plan.failures);
    out.push('\n');
    let rate = short(run.tokens_per_second);
    line(
        out,
        "run",
        &format!("{} tokens in {} steps, {rate} tokens/s", short(run.tokens as f64), grouped(run.steps)),
    );
    let money = run.price.map_or(String::new(), |price| format!(", {} at that price", grouped(price as u64)));
    let hours = grouped(run.rank_hours as u64);
    line(
        out,
        "",
        &format!(
            "{} days, {} with failures: {hours} rank-hours{money}",
            days(run.days),
            days(run.days_with_failures)
        ),
    );
    line(
        out,
        "failures",
        &format!(
            "{:.1} to be expected, one every {} hours; {} of the time is lost to them and to saving",
            failures.expected,
            days(failures.hours_between),
            percent(failures.lost)
        ),
    );
    line(
        out,
        "",
        &format!(
            "checkpoint.every_steps = {} loses least (Young {}, Daly {}; saving holds up {}, is written in {})",
            failures.every_steps,
            seconds(failures.young_s),
            seconds(failures.daly_s),
            seconds(failures.save_s),
            seconds(failures.write_s)
        ),
    );
}

fn scaling(out: &mut String, plan: &Plan) {
    let scaling = &plan.scaling;
    let _ = writeln!(
        out,
        "\n{:>8}{:>16}{:>12}{:>8}{:>13}",
        "ranks", "batch, tokens", "tokens/s", "MFU", "efficiency"
    );
    for point in &scaling.points {
        let Point { ranks, batch_tokens, tokens_per_second, mfu, efficiency, fits } = *point;
        let note = match (fits, ranks as u64 > scaling.most_ranks) {
            (false, _) => "  does not fit",
            (true, true) => "  beyond the batch",
            (true, false) => "",
        };
        let _ = writeln!(
            out,
            "{:>8}{:>16}{:>12}{:>8}{:>13}{note}",
            grouped(ranks as u64),
            grouped(batch_tokens),
            short(tokens_per_second),
            percent(mfu),
            percent(efficiency),
        );
    }
    match &scaling.bend {
        Some(bend) => line(out, "bends", &format!("at {} ranks: {}", grouped(bend.ranks as u64), bend.why)),
        None => line(out, "bends", "nowhere up to 10,000 ranks"),
    }
}

fn line(out: &mut String, name: &str, what: &str) {
    let _ = writeln!(out, "{name:<12}{what}");
}

fn shard(shard: Shard) -> &'static str {
    match shard {
        Shard::None => "none",
        Shard::Optimizer => "optimizer",
        Shard::Gradients => "gradients",
        Shard::Parameters => "parameters",
    }
}

fn recompute(recompute: Recompute) -> &'static str {
    match recompute {
        Recompute::None => "none",
        Recompute::Full => "full",
    }
}

fn count(number: u64, what: &str) -> String {
    let plural = match what {
        _ if number == 1 => "",
        "pass" => "es",
        _ => "s",
    };
    format!("{} {what}{plural}", grouped(number))
}

/// 1,048,576.
fn grouped(number: u64) -> String {
    crate::data::grouped(number)
}

/// Bytes in GB.
fn gb(bytes: u64) -> String {
    format!("{:.1}", bytes as f64 / 1e9)
}

pub(super) fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}

/// 1.23 million.
pub(super) fn short(number: f64) -> String {
    let (divided, unit) = match number {
        n if n >= 1e12 => (n / 1e12, " T"),
        n if n >= 1e9 => (n / 1e9, " G"),
        n if n >= 1e6 => (n / 1e6, " M"),
        n if n >= 1e3 => (n / 1e3, " k"),
        n => (n, ""),
    };
    format!("{divided:.digits$}{unit}", digits = if divided < 10.0 { 2 } else { 1 })
}

pub(super) fn seconds(seconds: f64) -> String {
    match seconds {
        s if s >= 3600.0 => format!("{:.1} h", s / 3600.0),
        s if s >= 120.0 => format!("{:.0} min", s / 60.0),
        s if s >= 1.0 => format!("{s:.2} s"),
        s if s >= 1e-3 => format!("{:.1} ms", s * 1e3),
        s => format!("{:.0} us", s * 1e6),
    }
}

pub(super) fn days(days: f64) -> String {
    if days < 10.0 { format!("{days:.2}") } else { format!("{days:.0}") }
}
