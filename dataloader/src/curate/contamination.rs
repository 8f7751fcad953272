//! Documents that share a run of words with an evaluation set, which a model must not have seen (Brown et
//! al. 2020, appendix C). Owns what a run is; refuses to know what is evaluated.

use super::{Document, Dropped};
use crate::PrepareError;
use crate::documents::{Inputs, Raw, Reader};
use crate::pipeline::{self, Flow};
use rustc_hash::FxHashMap;
use std::sync::Arc;

/// Runs of `n` words of the evaluation sets, lower-cased and without punctuation.
#[derive(Debug, Clone)]
pub struct Contamination {
    n: usize,
    runs: Arc<FxHashMap<u64, u32>>,
    names: Arc<Vec<String>>,
    digest: [u8; 32],
    /// Documents of the evaluation sets.
    pub documents: u64,
    /// Documents among them that are too short to be looked for.
    pub too_short: u64,
}

impl Contamination {
    /// GPT-3's length of a run.
    pub const WORDS: usize = 13;

    /// The runs of `n` words in evaluation sets.
    ///
    /// # Errors
    /// Those of reading.
    pub fn with(inputs: &Inputs, n: usize, threads: usize) -> Result<Contamination, PrepareError> {
        inputs.check()?;
        let worker = || {
            move |batch: Vec<Raw>| {
                let runs = |raw: &Raw| {
                    let text = Document::of(inputs, raw, false)?.text;
                    Ok((raw.source as u32, runs(&text, n).1))
                };
                batch.iter().map(runs).collect::<Result<Vec<_>, PrepareError>>()
            }
        };
        let mut runs = FxHashMap::default();
        let (mut documents, mut too_short) = (0, 0);
        let mut digest = blake3::Hasher::new();
        pipeline::run(Reader::new(inputs, None, (0, 1)), threads, worker, |batch| {
            for (source, hashes) in batch {
                documents += 1;
                too_short += u64::from(hashes.is_empty());
                for hash in hashes {
                    digest.update(&hash.to_le_bytes());
                    runs.entry(hash).or_insert(source);
                }
            }
            Ok(Flow::Continue)
        })?;
        let (runs, names) = (Arc::new(runs), Arc::new(inputs.names()));
        let digest = *digest.finalize().as_bytes();
        Ok(Contamination { n, runs, names, digest, documents, too_short })
    }

    pub(super) fn described(&self) -> String {
        format!("{} words of {}", self.n, crate::files::hex(&self.digest))
    }

    pub(super) fn verdict(&self, document: &Document<'_>) -> Option<Dropped> {
        let (words, runs) = runs(&document.text, self.n);
        let (at, source) =
            runs.iter().enumerate().find_map(|(at, hash)| Some((at, *self.runs.get(hash)?)))?;
        Some(Dropped {
            stage: "decontaminate",
            reason: format!("{} words of {}", self.n, self.names[source as usize]),
            detail: Some(words[at..at + self.n].join(" ")),
        })
    }
}

/// The words of a text: letters and digits, lower-cased.
pub(super) fn words(text: &str) -> Vec<String> {
    let words = text.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty());
    words.map(str::to_lowercase).collect()
}

/// The words of a text, and a hash of every run of `n` of them, in order.
fn runs(text: &str, n: usize) -> (Vec<String>, Vec<u64>) {
    let words = words(text);
    let hashes: Vec<u64> = words.iter().map(|word| super::dedup::hash(word.as_bytes())).collect();
    let hash = |run: &[u64]| run.iter().fold(0u64, |sum, word| (sum.rotate_left(7) ^ word).wrapping_mul(MIX));
    let runs = hashes.windows(n.max(1)).map(hash).collect();
    (words, runs)
}

const MIX: u64 = 0x9E37_79B9_7F4A_7C15;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::documents::Fields;

    const QUESTION: &str =
        "The quick brown fox jumps over the lazy dog while seven old ships come slowly home.";

    fn against(eval: &str, text: &str) -> Option<Dropped> {
        let scratch = tempfile::tempdir().unwrap();
        let file = scratch.path().join("eval.jsonl");
        std::fs::write(&file, format!("{{\"text\": \"{eval}\"}}\n")).unwrap();
        let contamination = Contamination::with(&Inputs::new(&[file]), Contamination::WORDS, 2).unwrap();
        contamination.verdict(&Document { text: text.into(), fields: Fields::default() })
    }

    #[test]
    fn thirteen_words_in_a_row_are_found_whatever_their_case_and_punctuation() {
        let text = format!("Before. {} After", QUESTION.to_uppercase().replace(' ', ", "));
        let dropped = against(QUESTION, &text).unwrap();
        assert!(dropped.reason.starts_with("13 words of ") && dropped.reason.ends_with("eval.jsonl"));
        assert_eq!(
            dropped.detail.unwrap(),
            "the quick brown fox jumps over the lazy dog while seven old ships"
        );
    }

    #[test]
    fn twelve_words_in_a_row_are_not() {
        let twelve: Vec<&str> = QUESTION.split(' ').take(12).collect();
        assert_eq!(against(QUESTION, &twelve.join(" ")), None);
        let broken = QUESTION.replace("dog", "cat");
        assert_eq!(against(QUESTION, &broken), None);
    }
}
