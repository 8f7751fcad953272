//! What a curation kept, dropped and why, with examples. Owns the counting; refuses to know the stages.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Examples that are kept for each reason.
const EXAMPLES: usize = 5;

/// Characters of a document that an example shows.
const SHOWN: usize = 120;

/// Why a document is dropped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dropped {
    /// The stage.
    pub stage: &'static str,
    /// Why, in words that documents have in common.
    pub reason: String,
    /// What is particular to this one.
    pub detail: Option<String>,
}

/// What became of the documents.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CurationReport {
    /// Documents read.
    pub read: u64,
    /// Documents kept.
    pub kept: u64,
    /// Documents dropped, by stage and reason.
    pub dropped: BTreeMap<String, u64>,
    /// The first few of each.
    pub examples: Vec<Example>,
}

/// A document that was dropped.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Example {
    /// Stage and reason.
    pub reason: String,
    /// What is particular to it.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub detail: Option<String>,
    /// Its file.
    pub file: String,
    /// Line or row of it, from 1.
    pub record: u64,
    /// Its first characters.
    pub start: String,
}

impl CurationReport {
    /// Counts a document; `place` tells its file, record and first characters.
    pub(crate) fn count(&mut self, verdict: Option<&Dropped>, place: impl FnOnce() -> (String, u64, String)) {
        self.read += 1;
        let Some(Dropped { stage, reason, detail }) = verdict else {
            self.kept += 1;
            return;
        };
        let reason = format!("{stage}: {reason}");
        let count = self.dropped.entry(reason.clone()).or_default();
        *count += 1;
        if *count <= EXAMPLES as u64 {
            let (file, record, start) = place();
            self.examples.push(Example { reason, detail: detail.clone(), file, record, start });
        }
    }

    /// The first characters of a text, on one line.
    pub(crate) fn start(text: &str) -> String {
        text.chars().take(SHOWN).map(|c| if c.is_control() { ' ' } else { c }).collect()
    }
}
