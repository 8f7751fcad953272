//! What the GPU check found: its parts as JSON files in one folder, and all of it as one JSON and one
//! Markdown file. Knows how findings are told, not how they are made.

use crate::error::TrainError;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

/// What one part of the check found; also all parts together.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Findings {
    /// What was looked at: the device, the versions, the peak.
    #[serde(default)]
    pub(super) about: BTreeMap<String, String>,
    /// What MFU is measured against, FLOP/s.
    #[serde(default)]
    pub(super) peak_flops: Option<f64>,
    /// What was claimed.
    #[serde(default)]
    pub(super) checks: Vec<Check>,
    /// How fast it was.
    #[serde(default)]
    pub(super) speeds: Vec<Speed>,
}

/// A claim and its evidence.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Check {
    /// The claim, as a sentence.
    pub(super) name: String,
    /// Whether every figure keeps its limit, and nothing went wrong.
    pub(super) held: bool,
    /// What was measured.
    pub(super) figures: Vec<Figure>,
    /// What went wrong, or what there is to say.
    pub(super) note: String,
    /// How long it took.
    pub(super) seconds: f64,
}

/// A number and what it may be at most.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Figure {
    /// What it is.
    pub(super) name: String,
    /// Its value; `None` where it was no number.
    pub(super) value: Option<f64>,
    /// The limit, if it has one.
    pub(super) limit: Option<f64>,
}

/// A training step's speed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Speed {
    /// Whose step: `phalanx` or `pytorch`.
    pub(super) system: String,
    /// Which model: `124m`, `1.3b`.
    pub(super) shape: String,
    /// Sequences of a step.
    pub(super) micro_batch: usize,
    /// Tokens of a sequence.
    pub(super) seq_len: usize,
    /// What computes: `bf16`, `fp32`.
    pub(super) dtype: String,
    /// Median time of a step, milliseconds.
    pub(super) step_ms: f64,
    /// Tokens per second at the median.
    pub(super) tokens_per_second: f64,
    /// Model FLOPs of a step over its time and the peak, where both are known.
    #[serde(default)]
    pub(super) mfu: Option<f64>,
    /// What else there is to say, such as `torch.compile`.
    #[serde(default)]
    pub(super) note: String,
}

impl Figure {
    /// A value that may be at most `limit`.
    pub(super) fn at_most(name: &str, value: f64, limit: f64) -> Figure {
        Figure { name: name.into(), value: value.is_finite().then_some(value), limit: Some(limit) }
    }

    /// A value without a limit.
    pub(super) fn plain(name: &str, value: f64) -> Figure {
        Figure { name: name.into(), value: value.is_finite().then_some(value), limit: None }
    }

    /// Whether it is a number that keeps its limit.
    fn held(&self) -> bool {
        self.value.is_some_and(|value| self.limit.is_none_or(|limit| value <= limit))
    }
}

impl Check {
    /// Runs a check: what it measures, or what went wrong.
    pub(super) fn run(name: &str, body: impl FnOnce() -> Result<Vec<Figure>, TrainError>) -> Check {
        let started = std::time::Instant::now();
        let (figures, note) = match body() {
            Ok(figures) => (figures, String::new()),
            Err(error) => (Vec::new(), error.to_string()),
        };
        let held = note.is_empty() && figures.iter().all(Figure::held);
        Check { name: name.into(), held, figures, note, seconds: started.elapsed().as_secs_f64() }
    }
}

impl Findings {
    /// Whether every claim held, and there was one.
    pub(super) fn held(&self) -> bool {
        !self.checks.is_empty() && self.checks.iter().all(|check| check.held)
    }

    /// Writes one part into the folder, as `NAME.part.json`.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub(super) fn write_part(&self, folder: &Path, name: &str) -> Result<(), TrainError> {
        let path = folder.join(format!("{name}.part.json"));
        let text = serde_json::to_string_pretty(self).expect("findings are plain data");
        std::fs::create_dir_all(folder).map_err(TrainError::io(folder))?;
        std::fs::write(&path, text).map_err(TrainError::io(&path))
    }

    /// All parts that are in the folder, in the order of their names.
    ///
    /// # Errors
    /// A part that cannot be read or understood.
    pub(super) fn read_parts(folder: &Path) -> Result<Findings, TrainError> {
        let entries = std::fs::read_dir(folder).map_err(TrainError::io(folder))?;
        let mut paths: Vec<_> = entries
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| path.to_string_lossy().ends_with(".part.json"))
            .collect();
        paths.sort();
        let mut all = Findings::default();
        for path in paths {
            let text = std::fs::read_to_string(&path).map_err(TrainError::io(&path))?;
            let part: Findings = serde_json::from_str(&text)
                .map_err(|error| TrainError::io(&path)(std::io::Error::other(error)))?;
            all.about.extend(part.about);
            all.peak_flops = part.peak_flops.or(all.peak_flops);
            all.checks.extend(part.checks);
            all.speeds.extend(part.speeds);
        }
        Ok(all)
    }

    /// Writes `gpu-check.json` and `gpu-check.md`.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub(super) fn write_report(&self, folder: &Path) -> Result<(), TrainError> {
        let json = serde_json::to_string_pretty(self).expect("findings are plain data");
        for (name, text) in [("gpu-check.json", json + "\n"), ("gpu-check.md", self.markdown())] {
            let path = folder.join(name);
            std::fs::write(&path, text).map_err(TrainError::io(&path))?;
        }
        Ok(())
    }

    /// The findings for people.
    pub(super) fn markdown(&self) -> String {
        let mut text = String::from("# GPU check\n\n");
        let failed = self.checks.iter().filter(|check| !check.held).count();
        let _ = match (self.checks.len(), failed) {
            (0, _) => writeln!(text, "Nothing was checked."),
            (checks, 0) => writeln!(text, "All {checks} checks held."),
            (checks, failed) => writeln!(text, "**{failed} of {checks} checks failed.**"),
        };
        let peak = self.peak_flops.map(|peak| ("peak".to_owned(), format!("{:.2} TFLOP/s", peak / 1e12)));
        let about: Vec<_> = self.about.clone().into_iter().chain(peak).collect();
        if !about.is_empty() {
            text.push_str("\n| | |\n|---|---|\n");
            for (name, value) in &about {
                let _ = writeln!(text, "| {} | {} |", cell(name), cell(value));
            }
        }
        if !self.checks.is_empty() {
            text.push_str("\n## Checks\n\n| check | | measured | s |\n|---|---|---|---|\n");
            self.checks.iter().for_each(|check| check_row(&mut text, check));
        }
        if !self.speeds.is_empty() {
            text.push_str(
                "\n## Speed\n\n| model | dtype | step | system | ms a step | tokens/s | MFU | against PyTorch |\n\
                 |---|---|---|---|---|---|---|---|\n",
            );
            self.speeds.iter().for_each(|speed| self.speed_row(&mut text, speed));
        }
        text
    }

    fn speed_row(&self, text: &mut String, speed: &Speed) {
        let same_step = |other: &&Speed| {
            other.system == "pytorch"
                && (&other.shape, &other.dtype, other.micro_batch, other.seq_len)
                    == (&speed.shape, &speed.dtype, speed.micro_batch, speed.seq_len)
        };
        let reference = self.speeds.iter().find(same_step).filter(|_| speed.system != "pytorch");
        let ratio = reference.map(|other| speed.tokens_per_second / other.tokens_per_second);
        let note = if speed.note.is_empty() { String::new() } else { format!(" ({})", speed.note) };
        let or_none = |value: Option<String>| value.unwrap_or_else(|| "-".into());
        let _ = writeln!(
            text,
            "| {} | {} | {} x {} | {}{} | {:.1} | {:.0} | {} | {} |",
            cell(&speed.shape),
            cell(&speed.dtype),
            speed.micro_batch,
            speed.seq_len,
            cell(&speed.system),
            cell(&note),
            speed.step_ms,
            speed.tokens_per_second,
            or_none(speed.mfu.map(|mfu| format!("{:.1} %", 100.0 * mfu))),
            or_none(ratio.map(|ratio| format!("{ratio:.2}"))),
        );
    }
}

fn check_row(text: &mut String, check: &Check) {
    let figure = |figure: &Figure| {
        let value = figure.value.map_or("not a number".into(), number);
        let limit = figure.limit.map_or(String::new(), |limit| format!(" (at most {})", number(limit)));
        format!("{} {value}{limit}", figure.name)
    };
    let mut measured: Vec<String> = check.figures.iter().map(figure).collect();
    measured.extend((!check.note.is_empty()).then(|| check.note.clone()));
    let held = if check.held { "held" } else { "**failed**" };
    let _ = writeln!(
        text,
        "| {} | {held} | {} | {:.1} |",
        cell(&check.name),
        cell(&measured.join("; ")),
        check.seconds
    );
}

fn number(value: f64) -> String {
    match value.abs() {
        size if size < 1e6 && value.fract() == 0.0 => format!("{value:.0}"),
        0.01..1e6 => format!("{value:.4}"),
        _ => format!("{value:.2e}"),
    }
}

/// Text that stays within its cell of a table.
fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace('\n', " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn speed(system: &str, tokens_per_second: f64) -> Speed {
        Speed {
            system: system.into(),
            shape: "124m".into(),
            micro_batch: 16,
            seq_len: 1024,
            dtype: "bf16".into(),
            step_ms: 100.0,
            tokens_per_second,
            mfu: Some(0.42),
            note: String::new(),
        }
    }

    #[test]
    fn a_check_holds_only_within_its_limits_and_without_trouble() {
        let of = |value, limit| Check::run("x", || Ok(vec![Figure::at_most("distance", value, limit)]));
        assert!(of(1e-6, 1e-5).held);
        assert!(!of(1e-4, 1e-5).held);
        assert!(!of(f64::NAN, 1e-5).held);
        let trouble = Check::run("x", || Err(ops::OpsError::Torch("out of memory".into()).into()));
        assert!(!trouble.held && trouble.note.contains("out of memory"), "{trouble:?}");
    }

    #[test]
    fn parts_come_together_in_one_report() {
        let folder = tempfile::tempdir().unwrap();
        let mut one = Findings::default();
        one.about.insert("device".into(), "NVIDIA H100 | PCIe".into());
        one.checks.push(Check::run("losses are near", || Ok(vec![Figure::at_most("farthest", 2e-6, 1e-4)])));
        one.speeds.push(speed("phalanx", 120.0));
        one.write_part(folder.path(), "one").unwrap();
        let two = r#"{"speeds": [{"system": "pytorch", "shape": "124m", "micro_batch": 16, "seq_len": 1024,
            "dtype": "bf16", "step_ms": 120.0, "tokens_per_second": 100.0, "note": "torch.compile"}]}"#;
        std::fs::write(folder.path().join("pytorch.part.json"), two).unwrap();

        let all = Findings::read_parts(folder.path()).unwrap();
        assert!(all.held());
        all.write_report(folder.path()).unwrap();
        let text = std::fs::read_to_string(folder.path().join("gpu-check.md")).unwrap();
        for part in [
            "All 1 checks held.",
            "| device | NVIDIA H100 \\| PCIe |",
            "| losses are near | held | farthest 2.00e-6 (at most 1.00e-4) |",
            "| 124m | bf16 | 16 x 1024 | phalanx | 100.0 | 120 | 42.0 % | 1.20 |",
            "| pytorch (torch.compile) | 120.0 | 100 | - | - |",
        ] {
            assert!(text.contains(part), "no {part:?} in\n{text}");
        }
        let json = std::fs::read_to_string(folder.path().join("gpu-check.json")).unwrap();
        assert_eq!(serde_json::from_str::<Findings>(&json).unwrap(), all);
    }

    #[test]
    fn a_failed_check_is_counted_and_a_broken_part_named() {
        let folder = tempfile::tempdir().unwrap();
        let mut findings = Findings::default();
        assert!(!findings.held(), "nothing checked is nothing held");
        findings.checks.push(Check::run("bad", || Ok(vec![Figure::at_most("off", 2.0, 1.0)])));
        assert!(findings.markdown().contains("**1 of 1 checks failed.**"), "{}", findings.markdown());
        std::fs::write(folder.path().join("x.part.json"), "{").unwrap();
        let error = Findings::read_parts(folder.path()).unwrap_err().to_string();
        assert!(error.contains("x.part.json"), "{error}");
    }
}
