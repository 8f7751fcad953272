//! A run as its folder tells it: `metrics.jsonl` read on as it grows, thinned out so that a run of any length fits
//! a page, with its configuration and what the model wrote. Only reads; knows keys of the file, not what they mean.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Seek, SeekFrom};
use std::path::{Path, PathBuf};

/// What is kept of a step, in this order.
pub const COLUMNS: [&str; 13] = [
    "step",
    "tokens",
    "loss",
    "lr",
    "grad_norm",
    "tokens_per_second",
    "mfu",
    "seconds",
    "data",
    "forward",
    "backward",
    "reduce",
    "optimizer",
];

/// Steps that are kept at most; above, every other one goes.
const MOST_STEPS: usize = 1600;

/// Other events that are kept at most, the oldest going first.
const MOST_EVENTS: usize = 1000;

/// Of configuration and text, bytes.
const MOST_TEXT_BYTES: usize = 32 << 10;

/// A run to be shown. As JSON, a number that is none is null.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct View {
    /// The folder's name.
    pub name: String,
    /// Whether somebody looks after it: `targets.json` lists places.
    pub live: bool,
    /// [`COLUMNS`] of steps, each as it was done last; the newest is always among them.
    pub steps: Vec<[Option<f64>; COLUMNS.len()]>,
    /// All other events, as they stand in the file, lists of documents left out.
    pub events: Vec<Value>,
    /// `config.toml`.
    pub config: String,
    /// `sample.txt`: what the model wrote at the end.
    pub sample: String,
    /// What each rank says of itself while the run goes on.
    #[serde(default)]
    pub ranks: Vec<crate::ranks::RankView>,
}

impl View {
    /// A column of the newest step.
    pub fn newest(&self, column: &str) -> Option<f64> {
        let index = COLUMNS.iter().position(|name| *name == column)?;
        self.steps.last()?[index]
    }

    /// The newest event of a kind.
    pub fn event(&self, kind: &str) -> Option<&Value> {
        self.events.iter().rev().find(|event| event["kind"] == kind)
    }
}

/// A reader of one run folder, which goes on where it was.
#[derive(Debug)]
pub struct History {
    folder: PathBuf,
    offset: u64,
    /// Kept are the steps that this divides.
    stride: u64,
    steps: BTreeMap<u64, [Option<f64>; COLUMNS.len()]>,
    newest: Option<[Option<f64>; COLUMNS.len()]>,
    events: Vec<Value>,
}

impl History {
    /// Of this folder; nothing is read yet.
    pub fn of(folder: &Path) -> History {
        let folder = folder.to_path_buf();
        History { folder, offset: 0, stride: 1, steps: BTreeMap::new(), newest: None, events: Vec::new() }
    }

    /// Reads what has been added.
    ///
    /// # Errors
    /// `metrics.jsonl` is not there or cannot be read.
    pub fn look(&mut self) -> io::Result<View> {
        let mut file = std::fs::File::open(self.folder.join("metrics.jsonl"))?;
        if file.metadata()?.len() < self.offset {
            *self = History::of(&self.folder); // another file
        }
        file.seek(SeekFrom::Start(self.offset))?;
        let mut reader = BufReader::new(file);
        let mut line = Vec::new();
        loop {
            line.clear();
            let read = reader.read_until(b'\n', &mut line)?;
            if line.last() != Some(&b'\n') {
                break; // the rest of it is still to come
            }
            self.offset += read as u64;
            // Half a line that a killed process left is cut off by the next; until then it says nothing.
            if let Ok(event) = serde_json::from_slice(&line) {
                self.take(event);
            }
        }
        Ok(self.view())
    }

    fn take(&mut self, mut event: Value) {
        let back_to = match event["kind"].as_str() {
            Some("step") => return self.take_step(&event),
            Some("start") => event["step"].as_u64(),
            Some("rewind") => event["checkpoint_step"].as_u64(),
            _ => None,
        };
        if let Some(step) = back_to {
            // What was done after it is done again.
            self.steps.split_off(&(step + 1));
            self.newest = self.steps.last_key_value().map(|(_, row)| *row);
        }
        if let Some(event) = event.as_object_mut() {
            event.remove("documents");
        }
        if self.events.len() >= MOST_EVENTS {
            self.events.remove(0);
        }
        self.events.push(event);
    }

    fn take_step(&mut self, event: &Value) {
        let Some(step) = event["step"].as_u64() else { return };
        let row = COLUMNS.map(|name| event.get(name).unwrap_or(&event["phases"][name]).as_f64());
        if step.is_multiple_of(self.stride) {
            self.steps.insert(step, row);
        }
        self.newest = Some(row);
        while self.steps.len() > MOST_STEPS {
            self.stride *= 2;
            let stride = self.stride;
            self.steps.retain(|step, _| step.is_multiple_of(stride));
        }
    }

    fn view(&self) -> View {
        let text = |name: &str| {
            let text = std::fs::read(self.folder.join(name)).unwrap_or_default();
            String::from_utf8_lossy(&text[..text.len().min(MOST_TEXT_BYTES)]).into_owned()
        };
        let mut steps: Vec<_> = self.steps.values().copied().collect();
        if let Some(newest) = self.newest.filter(|newest| steps.last() != Some(newest)) {
            steps.push(newest);
        }
        let name = self.folder.canonicalize().unwrap_or_else(|_| self.folder.clone());
        let name = name.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let targets = text("targets.json");
        View {
            name,
            live: targets.contains("\"targets\""),
            steps,
            events: self.events.clone(),
            config: text("config.toml"),
            sample: text("sample.txt"),
            ranks: Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn step(step: u64, loss: f64) -> String {
        format!(
            "{{\"kind\":\"step\",\"step\":{step},\"loss\":{loss},\"lr\":\"nan\",\"phases\":{{\"data\":0.5}}}}\n"
        )
    }

    struct Run {
        folder: tempfile::TempDir,
        history: History,
    }

    impl Run {
        fn new() -> Run {
            let folder = tempfile::tempdir().unwrap();
            let history = History::of(folder.path());
            Run { folder, history }
        }

        fn add(&mut self, text: &str) -> View {
            let file = self.folder.path().join("metrics.jsonl");
            let mut file = std::fs::File::options().create(true).append(true).open(file).unwrap();
            file.write_all(text.as_bytes()).unwrap();
            self.history.look().unwrap()
        }
    }

    #[test]
    fn a_file_that_grows_is_read_on_and_half_a_line_waits_for_its_rest() {
        let mut run = Run::new();
        assert!(run.history.look().is_err());
        let view = run.add(&(step(1, 0.1 + 0.2) + "{\"kind\":\"st"));
        assert_eq!((view.steps.len(), view.newest("loss")), (1, Some(0.1 + 0.2)));
        assert_eq!((view.newest("data"), view.newest("lr"), view.live), (Some(0.5), None, false));
        let view = run.add("ep\",\"step\":2,\"loss\":3}\nnonsense\n");
        assert_eq!((view.steps.len(), view.newest("loss")), (2, Some(3.0)));
    }

    #[test]
    fn steps_that_are_done_again_count_as_they_were_done_last() {
        let mut run = Run::new();
        let first: String = (1..=5).map(|n| step(n, 1.0)).collect();
        let again: String = (3..=4).map(|n| step(n, 2.0)).collect();
        let view = run.add(&(first + "{\"kind\":\"start\",\"step\":2,\"generation\":2}\n" + &again));
        let losses: Vec<_> = view.steps.iter().map(|row| row[2].unwrap()).collect();
        assert_eq!(losses, [1.0, 1.0, 2.0, 2.0]);
        let view = run.add("{\"kind\":\"rewind\",\"step\":5,\"checkpoint_step\":2,\"documents\":[1]}\n");
        assert_eq!((view.steps.len(), view.newest("step")), (2, Some(2.0)));
        assert!(view.event("rewind").unwrap().get("documents").is_none());
    }

    #[test]
    fn a_run_of_any_length_fits_and_its_newest_step_is_there() {
        let mut run = Run::new();
        let lines: String = (1..=10_001).map(|n| step(n, n as f64)).collect();
        let view = run.add(&lines);
        assert!(
            view.steps.len() <= MOST_STEPS + 1 && view.steps.len() > MOST_STEPS / 2,
            "{}",
            view.steps.len()
        );
        assert_eq!(view.newest("step"), Some(10_001.0));
        // The same again, from a file that is another one.
        std::fs::write(run.folder.path().join("metrics.jsonl"), step(1, 7.0)).unwrap();
        assert_eq!(run.history.look().unwrap().newest("loss"), Some(7.0));
    }
}
