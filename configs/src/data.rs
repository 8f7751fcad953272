//! What a run is trained and validated on: one folder, or several with weights. Owns the rules of the
//! keys; refuses to open what they name.

use crate::load::Problem;
use crate::raw::{RawData, RawSource};
use crate::run::VocabularyOf;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// `[data]`: folders written by `phalanx data prepare`, or token files of other programs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DataConfig {
    /// What is trained on, if it is one thing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub train: Option<PathBuf>,
    /// What is validated on; no validation without it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub val: Option<PathBuf>,
    /// Whether a token attends to those of its own document only.
    #[serde(default)]
    pub document_mask: bool,
    /// What is trained on, if it is a mixture. Exactly one of this and `train` is there.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub source: Vec<SourceConfig>,
}

/// One `[[data.source]]` of a mixture.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SourceConfig {
    /// A folder or token file.
    pub path: PathBuf,
    /// Its part of the samples, in proportion to the sum of all weights.
    pub weight: f64,
}

impl DataConfig {
    /// What is trained on, as a mixture: `train` alone is one source.
    pub fn sources(&self) -> Vec<SourceConfig> {
        match &self.train {
            Some(path) => vec![SourceConfig { path: path.clone(), weight: 1.0 }],
            None => self.source.clone(),
        }
    }

    /// The key that names the training data.
    pub fn train_key(&self) -> &'static str {
        if self.train.is_some() { "data.train" } else { "data.source" }
    }

    /// The largest vocabulary of the training data. Whether all sources have the same tokenizer is seen
    /// where they are opened.
    pub(crate) fn vocab_size(&self, vocabulary_of: VocabularyOf<'_>, problems: &mut Vec<Problem>) -> usize {
        let mut size = 1;
        for source in self.sources().iter().filter(|source| !source.path.as_os_str().is_empty()) {
            match vocabulary_of(&source.path) {
                Ok(vocabulary) => size = size.max(vocabulary),
                Err(why) => problems.push(Problem::key(self.train_key(), why)),
            }
        }
        size
    }
}

/// The data of a run, and what is wrong with it.
pub(crate) fn resolve_data(raw: RawData, problems: &mut Vec<Problem>) -> DataConfig {
    let data = DataConfig {
        train: raw.train.map(PathBuf::from),
        val: raw.val.map(PathBuf::from),
        document_mask: raw.document_mask.unwrap_or(false),
        source: raw.source.unwrap_or_default().into_iter().map(|raw| resolve_source(raw, problems)).collect(),
    };
    match (&data.train, data.source.is_empty()) {
        (None, true) => {
            let what = "is missing and has no default; it, or [[data.source]], says what to train on";
            problems.push(Problem::key("data.train", what.into()));
        }
        (Some(_), false) => {
            let what = "stands beside [[data.source]]; keep one: a mixture has all its folders in the list";
            problems.push(Problem::key("data.train", what.into()));
        }
        _ => {}
    }
    data
}

fn resolve_source(raw: RawSource, problems: &mut Vec<Problem>) -> SourceConfig {
    let path = raw.path.unwrap_or_default();
    if path.is_empty() {
        let what = "a source has no path; each needs one, and a weight";
        problems.push(Problem::key("data.source", what.into()));
    }
    let weight = raw.weight.unwrap_or(f64::NAN);
    if !(weight > 0.0 && weight.is_finite()) {
        let got = raw.weight.map_or("no weight".into(), |weight| format!("weight {weight}"));
        let what =
            format!("{path:?} has {got}, expected a positive number; weights are divided by their sum");
        problems.push(Problem::key("data.source", what));
    }
    SourceConfig { path: path.into(), weight }
}
