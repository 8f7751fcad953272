//! The scaling curve as a picture (SVG), both axes logarithmic. Knows points and where they go.

use super::text::short;
use configs::plan::{Plan, Point};
use std::fmt::Write;

const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 400.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = 20.0;
const TOP: f64 = 40.0;
const BOTTOM: f64 = 50.0;

/// Tokens per second over ranks, beside a straight line from the first point that fits; where the batch has no
/// sequence for each rank is marked.
pub(super) fn scaling(plan: &Plan) -> String {
    let points = &plan.scaling.points;
    let ideal = ideal(points);
    let axes = Axes::around(points, ideal);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{HEIGHT}\" \
         viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <title>{} on {}</title>\n<rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n",
        escaped(&plan.name),
        escaped(&plan.machine),
    );
    let _ = writeln!(
        svg,
        "<text x=\"{LEFT}\" y=\"24\" fill=\"#333333\">{}: tokens per second on {}, {} between nodes</text>",
        escaped(&plan.name),
        escaped(&plan.machine),
        escaped(&plan.link)
    );
    axes.grid(&mut svg);
    let straight = points.iter().map(|point| (point.ranks as f64, ideal * point.ranks as f64));
    axes.line(&mut svg, straight, "#a8a29e", "4 4");
    let of = |point: &Point| (point.ranks as f64, point.tokens_per_second);
    axes.line(&mut svg, points.iter().map(of), "#2563eb", "none");
    for point in points {
        let (x, y) = axes.place(of(point));
        let fill = if point.fits { "#2563eb" } else { "#ffffff" };
        let _ = writeln!(
            svg,
            "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3.5\" fill=\"{fill}\" stroke=\"#2563eb\"/>"
        );
    }
    axes.limit(&mut svg, plan.scaling.most_ranks as f64);
    let _ = writeln!(
        svg,
        "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\" fill=\"#333333\">ranks (hollow: does not fit)</text>",
        (LEFT + WIDTH - RIGHT) / 2.0,
        HEIGHT - 12.0
    );
    svg.push_str("</svg>\n");
    svg
}

/// The most tokens per second and rank.
fn ideal(points: &[Point]) -> f64 {
    points.iter().map(|point| point.tokens_per_second / point.ranks as f64).fold(0.0, f64::max)
}

/// Powers of ten that hold all points.
struct Axes {
    x: [f64; 2],
    y: [f64; 2],
}

impl Axes {
    fn around(points: &[Point], ideal: f64) -> Axes {
        let ranks = points.iter().map(|point| point.ranks as f64);
        let rates = points.iter().flat_map(|point| [point.tokens_per_second, ideal * point.ranks as f64]);
        let decades = |values: &mut dyn Iterator<Item = f64>| {
            let (low, high) = values.fold((f64::MAX, 1.0_f64), |(low, high), v| (low.min(v), high.max(v)));
            [low.max(1e-3).log10().floor(), high.log10().ceil()]
        };
        Axes { x: decades(&mut ranks.into_iter()), y: decades(&mut rates.into_iter()) }
    }

    fn place(&self, (x, y): (f64, f64)) -> (f64, f64) {
        let along = |value: f64, [low, high]: [f64; 2]| (value.log10() - low) / (high - low).max(1.0);
        let across = LEFT + along(x, self.x) * (WIDTH - LEFT - RIGHT);
        (across, HEIGHT - BOTTOM - along(y, self.y) * (HEIGHT - TOP - BOTTOM))
    }

    fn grid(&self, svg: &mut String) {
        for decade in self.x[0] as i32..=self.x[1] as i32 {
            let (x, _) = self.place((10f64.powi(decade), 1.0));
            let (bottom, label) = (HEIGHT - BOTTOM, short(10f64.powi(decade)));
            let _ = writeln!(
                svg,
                "<path d=\"M{x:.1} {TOP}V{bottom}\" stroke=\"#e7e5e4\"/>\
                 <text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\" fill=\"#333333\">{label}</text>",
                bottom + 16.0
            );
        }
        for decade in self.y[0] as i32..=self.y[1] as i32 {
            let (_, y) = self.place((1.0, 10f64.powi(decade)));
            let (right, label) = (WIDTH - RIGHT, short(10f64.powi(decade)));
            let _ = writeln!(
                svg,
                "<path d=\"M{LEFT} {y:.1}H{right}\" stroke=\"#e7e5e4\"/>\
                 <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\" fill=\"#333333\">{label}</text>",
                LEFT - 6.0,
                y + 4.0
            );
        }
    }

    fn line(&self, svg: &mut String, points: impl Iterator<Item = (f64, f64)>, colour: &str, dashes: &str) {
        let places = points.map(|point| self.place(point)).map(|(x, y)| format!("{x:.1},{y:.1}"));
        let places = places.collect::<Vec<String>>().join(" ");
        let _ = writeln!(
            svg,
            "<polyline points=\"{places}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\" \
             stroke-dasharray=\"{dashes}\"/>"
        );
    }

    /// Marks the ranks that have a sequence each.
    fn limit(&self, svg: &mut String, ranks: f64) {
        let (x, _) = self.place((ranks.max(1.0), 1.0));
        let bottom = HEIGHT - BOTTOM;
        let _ = writeln!(
            svg,
            "<path d=\"M{x:.1} {TOP}V{bottom}\" stroke=\"#c2410c\" stroke-dasharray=\"2 3\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\" fill=\"#c2410c\">a sequence each: {ranks}</text>",
            x - 4.0,
            bottom - 8.0
        );
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
