//! Scores over the number of shots as a picture (SVG), with bars of a standard error to both sides. Knows numbers
//! and where they go.

use super::report::Report;
use super::scores::{Score, TaskScores};
use std::collections::BTreeSet;
use std::fmt::Write;

const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 400.0;
const LEFT: f64 = 60.0;
const RIGHT: f64 = 170.0;
const TOP: f64 = 40.0;
const BOTTOM: f64 = 50.0;
const COLOURS: [&str; 6] = ["#2563eb", "#c2410c", "#15803d", "#7e22ce", "#0e7490", "#a16207"];

/// A curve of each score that is a share of the examples, for each task that has one. Numbers of shots stand at
/// equal distances.
pub(super) fn shots(report: &Report) -> String {
    let is_share = |score: &&Score| score.name.starts_with("accuracy") || score.name == "exact_match";
    let scored: Vec<&TaskScores> =
        report.results.iter().filter(|result| result.scores.iter().any(|score| is_share(&score))).collect();
    let ks: Vec<usize> =
        scored.iter().map(|result| result.shots).collect::<BTreeSet<_>>().into_iter().collect();
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{HEIGHT}\" \
         viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <title>{0}</title>\n<rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n\
         <text x=\"{LEFT}\" y=\"24\" fill=\"#333333\">{0}: share that is right, and its standard error</text>\n",
        escaped(&format!("{} on {}", report.checkpoint, report.suite))
    );
    grid(&mut svg, &ks);
    let mut curves: Vec<(String, Vec<(usize, Score)>)> = Vec::new();
    for result in &scored {
        for score in result.scores.iter().filter(is_share) {
            let name = format!("{} {}", result.task, score.name);
            match curves.iter_mut().find(|(known, _)| *known == name) {
                Some((_, points)) => points.push((result.shots, *score)),
                None => curves.push((name, vec![(result.shots, *score)])),
            }
        }
    }
    for (number, (name, points)) in curves.iter().enumerate() {
        curve(&mut svg, &ks, points, COLOURS[number % COLOURS.len()]);
        let (x, y) = (WIDTH - RIGHT + 12.0, TOP + 8.0 + 16.0 * number as f64);
        let colour = COLOURS[number % COLOURS.len()];
        let _ = writeln!(
            svg,
            "<text x=\"{x}\" y=\"{y}\" font-size=\"10\" fill=\"{colour}\">{}</text>",
            escaped(name)
        );
    }
    svg.push_str("</svg>\n");
    svg
}

fn across(ks: &[usize], shots: usize) -> f64 {
    let place = ks.iter().position(|&k| k == shots).unwrap_or(0) as f64;
    let steps = ks.len().saturating_sub(1).max(1) as f64;
    LEFT + 20.0 + place / steps * (WIDTH - LEFT - RIGHT - 40.0)
}

fn up(share: f64) -> f64 {
    HEIGHT - BOTTOM - share.clamp(0.0, 1.0) * (HEIGHT - TOP - BOTTOM)
}

fn grid(svg: &mut String, ks: &[usize]) {
    for tenth in (0..=10).step_by(2) {
        let (share, y) = (f64::from(tenth) / 10.0, up(f64::from(tenth) / 10.0));
        let _ = writeln!(
            svg,
            "<path d=\"M{LEFT} {y:.1}H{:.1}\" stroke=\"#e7e5e4\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\" fill=\"#333333\">{share:.1}</text>",
            WIDTH - RIGHT,
            LEFT - 6.0,
            y + 4.0
        );
    }
    for &k in ks {
        let (x, bottom) = (across(ks, k), HEIGHT - BOTTOM);
        let _ = writeln!(
            svg,
            "<text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\" fill=\"#333333\">{k}</text>",
            bottom + 16.0
        );
    }
    let _ = writeln!(
        svg,
        "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\" fill=\"#333333\">shots</text>",
        (LEFT + WIDTH - RIGHT) / 2.0,
        HEIGHT - 12.0
    );
}

fn curve(svg: &mut String, ks: &[usize], points: &[(usize, Score)], colour: &str) {
    let places: Vec<String> = points
        .iter()
        .map(|(shots, score)| format!("{:.1},{:.1}", across(ks, *shots), up(score.value)))
        .collect();
    let _ = writeln!(
        svg,
        "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>",
        places.join(" ")
    );
    for (shots, score) in points {
        let (x, y) = (across(ks, *shots), up(score.value));
        let _ = writeln!(svg, "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\" fill=\"{colour}\"/>");
        if let Some(error) = score.stderr {
            let (high, low) = (up(score.value + error), up(score.value - error));
            let _ = writeln!(svg, "<path d=\"M{x:.1} {high:.1}V{low:.1}\" stroke=\"{colour}\"/>");
        }
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
