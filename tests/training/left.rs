//! What a run has left in its folder, read as others would read it.

use crate::support::{metrics, of_kind, steps};
use std::ops::Range;
use std::path::{Path, PathBuf};
use trainer::checkpoint::{Checkpoints, StateKind};

/// The folder of a run.
pub(crate) struct Left {
    folder: PathBuf,
}

impl Left {
    /// By the run of this folder.
    pub(crate) fn by(folder: PathBuf) -> Left {
        Left { folder }
    }

    /// `runs/NAME`.
    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// The folder of a step's checkpoint.
    pub(crate) fn checkpoint(&self, step: u64) -> PathBuf {
        Checkpoints::open(&self.folder).folder(step)
    }

    /// A number of each step.
    pub(crate) fn of_steps(&self, key: &str) -> Vec<f64> {
        steps(&self.folder).iter().map(|step| step[key].as_f64().unwrap()).collect()
    }

    /// A number of each validation.
    pub(crate) fn of_evals(&self, key: &str) -> Vec<f64> {
        of_kind(&metrics(&self.folder), "eval").iter().map(|eval| eval[key].as_f64().unwrap()).collect()
    }

    /// Panics unless a step that was done twice gave the same both times.
    #[track_caller]
    pub(crate) fn assert_repeats_agree(&self) {
        let last = steps(&self.folder);
        for step in of_kind(&metrics(&self.folder), "step") {
            let again = &last[step["step"].as_u64().unwrap() as usize - 1];
            for key in ["step", "tokens", "first_sample", "loss", "lr", "grad_norm"] {
                assert_eq!(step[key], again[key], "{key} of {step}");
            }
        }
    }

    /// What a rank's log says of its parameters at the end.
    pub(crate) fn digest(&self, rank: usize) -> String {
        let log = self.log(rank);
        let (_, digest) = log.rsplit_once("the parameters have the digest ").expect("the log of a whole run");
        digest.split_whitespace().next().unwrap().to_string()
    }

    /// The samples of each step, in the order of ranks and passes, as the last start of the run logged
    /// them on `ranks` ranks.
    pub(crate) fn samples_of_the_last_start(&self, ranks: usize) -> Vec<(u64, Vec<Range<u64>>)> {
        let mut steps = std::collections::BTreeMap::<u64, Vec<Range<u64>>>::new();
        for rank in 0..ranks {
            let log = self.log(rank);
            let start = log.rfind("going on from").unwrap_or(0);
            for (step, samples) in log[start..].lines().filter_map(step_and_samples) {
                steps.entry(step).or_default().push(samples);
            }
        }
        steps.into_iter().collect()
    }

    /// All of the state in a step's checkpoint: values as bits, by segment and kind.
    pub(crate) fn state(&self, step: u64) -> Vec<(String, StateKind, Vec<u32>)> {
        let loaded = Checkpoints::open(&self.folder).verify(step).unwrap();
        let mut state = Vec::new();
        for segment in &loaded.state().segments {
            for kind in [StateKind::Param, StateKind::ExpAvg, StateKind::ExpAvgSq] {
                let mut values = vec![0.0; segment.numel];
                loaded.fill(&segment.name, kind, &mut values).unwrap();
                state.push((segment.name.clone(), kind, values.into_iter().map(f32::to_bits).collect()));
            }
        }
        state
    }

    /// All that a rank wrote into its log.
    pub(crate) fn log(&self, rank: usize) -> String {
        let path = self.folder.join(format!("logs/rank-{rank:05}.log"));
        String::from_utf8_lossy(&std::fs::read(path).unwrap()).into_owned()
    }
}

/// Panics unless two runs gave the same losses and left the same state after `step`, bit for bit.
#[track_caller]
pub(crate) fn assert_same(a: &Left, b: &Left, step: u64) {
    let bits =
        |left: &Left, key: &str| -> Vec<u64> { left.of_steps(key).into_iter().map(f64::to_bits).collect() };
    for key in ["loss", "lr", "grad_norm", "tokens"] {
        assert_eq!(bits(a, key), bits(b, key), "{key} differs");
    }
    for (a, b) in a.state(step).into_iter().zip(b.state(step)) {
        assert!(a == b, "{:?} of {} differs", a.1, a.0);
    }
}

/// The numbers in `... step 21 samples 336..338`.
fn step_and_samples(line: &str) -> Option<(u64, Range<u64>)> {
    let (step, samples) = line.split_once(" step ")?.1.split_once(" samples ")?;
    let (start, end) = samples.trim().split_once("..")?;
    Some((step.parse().ok()?, start.parse().ok()?..end.parse().ok()?))
}
