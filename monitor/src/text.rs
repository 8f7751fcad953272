//! A run as text, for a terminal: the numbers of the page and its curves in a line each.

use crate::history::{COLUMNS, View};
use serde_json::Value;
use std::fmt::Write;

/// Heights of a curve.
const BLOCKS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// Events that are shown.
const EVENTS: usize = 6;

/// The run in lines of at most `width` columns.
pub fn render(view: &View, width: usize) -> String {
    let width = width.clamp(40, 160);
    let mut text = String::new();
    let number = |column: &str, digits: usize| shown(view.newest(column), digits);
    let of = |kind: &str, key: &str| view.event(kind).and_then(|event| event[key].as_f64());
    let count = |kind: &str| view.events.iter().filter(|event| event["kind"] == kind).count();
    let _ = writeln!(text, "{}  {}", view.name, state(view));
    let end = max_steps(&view.config);
    let step = view.newest("step").unwrap_or(0.0);
    if let Some(end) = end.filter(|end| *end > 0.0) {
        let room = width.saturating_sub(30);
        let full = ((step / end).min(1.0) * room as f64) as usize;
        let _ = writeln!(text, "step {step} of {end}  {}{}", "█".repeat(full), "░".repeat(room - full));
    } else {
        let _ = writeln!(text, "step {step}");
    }
    // A masked model's validation has none.
    let in_bytes =
        of("eval", "bits_per_byte").map_or(String::new(), |bits| format!(" ({bits:.3} bits per byte)"));
    let _ = writeln!(
        text,
        "loss {}  validation {}{in_bytes}  norm {}  lr {}",
        number("loss", 4),
        shown(of("eval", "val_loss"), 4),
        number("grad_norm", 3),
        view.newest("lr").map_or("-".into(), |lr| format!("{lr:.2e}")),
    );
    let _ = writeln!(
        text,
        "{} tokens/s  MFU {} %  checkpoint of step {}  restarts {}  spikes {}",
        number("tokens_per_second", 0),
        shown(view.newest("mfu").map(|mfu| 100.0 * mfu), 1),
        of("checkpoint", "step").map_or("-".into(), |step| step.to_string()),
        count("restart"),
        count("rewind"),
    );
    for (name, column) in [("loss", "loss"), ("tokens/s", "tokens_per_second"), ("norm", "grad_norm")] {
        let index = COLUMNS.iter().position(|known| *known == column);
        let values: Vec<f64> = view.steps.iter().filter_map(|row| row[index?]).collect();
        let (low, high) = values.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| {
            (low.min(*value), high.max(*value))
        });
        if !values.is_empty() {
            let curve = curve(&values, width.saturating_sub(34));
            let _ = writeln!(text, "{name:>9} {curve} {} to {}", short(low), short(high));
        }
    }
    for rank in &view.ranks {
        let total: f64 = rank.phases.values().sum();
        let parts: Vec<String> = rank
            .phases
            .iter()
            .map(|(phase, seconds)| format!("{phase} {:.0} %", 100.0 * seconds / total))
            .collect();
        let _ = writeln!(text, "rank {} on {}: {}", rank.rank, rank.host, parts.join("  "));
    }
    let told: Vec<String> = view.events.iter().rev().filter_map(told).take(EVENTS).collect();
    told.iter().rev().for_each(|line| {
        let line: String = line.chars().take(width).collect();
        let _ = writeln!(text, "{line}");
    });
    text
}

fn state(view: &View) -> &'static str {
    let end = view
        .events
        .iter()
        .rev()
        .find(|event| ["failure", "summary", "start"].iter().any(|kind| event["kind"] == **kind));
    match end.and_then(|event| event["kind"].as_str()) {
        Some("summary") => "finished",
        Some("failure") => "failed",
        _ if view.live => "training",
        _ => "not running",
    }
}

/// An event in a line, where it is one for people.
fn told(event: &Value) -> Option<String> {
    let what = event["what"].as_str().and_then(|what| what.lines().next()).unwrap_or_default();
    let number = |key: &str| event[key].as_f64().map_or("?".into(), short);
    Some(match event["kind"].as_str()? {
        "start" => format!(
            "start {} at step {}, {} ranks",
            number("generation"),
            number("step"),
            number("world_size")
        ),
        "restart" => format!("restart from step {}: {what}", number("from_step")),
        "rewind" => format!(
            "spike: loss {} at step {}; back to step {}",
            number("loss"),
            number("step"),
            number("checkpoint_step")
        ),
        "failure" => what.to_string(),
        "checkpoint" => format!("checkpoint of step {}", number("step")),
        "eval" => {
            format!("validation after step {}: loss {}", number("step"), shown(event["val_loss"].as_f64(), 4))
        }
        "summary" => format!("finished after {} steps", number("step")),
        _ => return None,
    })
}

/// As many columns as there is room, or values.
fn curve(values: &[f64], columns: usize) -> String {
    let columns = columns.min(values.len()).max(1);
    let means: Vec<f64> = (0..columns)
        .map(|column| {
            let part = &values[column * values.len() / columns..(column + 1) * values.len() / columns];
            part.iter().sum::<f64>() / part.len() as f64
        })
        .collect();
    let (low, high) = means
        .iter()
        .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), mean| (low.min(*mean), high.max(*mean)));
    let height = |mean: &f64| if high > low { ((mean - low) / (high - low) * 7.99) as usize } else { 0 };
    means.iter().map(|mean| BLOCKS[height(mean).min(7)]).collect()
}

fn max_steps(config: &str) -> Option<f64> {
    config.lines().find_map(|line| line.strip_prefix("max_steps = ")?.trim().parse().ok())
}

fn shown(value: Option<f64>, digits: usize) -> String {
    value.map_or("-".into(), |value| format!("{value:.digits$}"))
}

fn short(value: f64) -> String {
    if value == value.trunc() && value.abs() < 1e9 { format!("{value}") } else { format!("{value:.3}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_is_shown_in_lines_that_fit() {
        let mut row = [Some(0.5); COLUMNS.len()];
        row[0] = Some(20.0);
        row[2] = Some(2.345678);
        let mut first = row;
        first[2] = Some(5.0);
        let view = View {
            name: "tiny".into(),
            steps: vec![first, row],
            events: vec![
                serde_json::json!({"kind": "start", "step": 0, "generation": 1, "world_size": 2}),
                serde_json::json!({"kind": "restart", "from_step": 10, "what": "x".repeat(300)}),
            ],
            config: "max_steps = 40\n".into(),
            ..View::default()
        };
        let text = render(&view, 80);
        for word in [
            "tiny  not running",
            "step 20 of 40  █",
            "loss 2.3457  validation -",
            "█▁ 2.346 to 5",
            "restarts 1",
            "start 1 at step 0, 2 ranks",
        ] {
            assert!(text.contains(word), "{word} is not in\n{text}");
        }
        assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
        assert!(render(&View::default(), 80).contains("step 0"));
    }
}
