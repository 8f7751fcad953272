//! A quality classifier: logistic regression on hashed words, and GPT-3's rule for what to keep by its score
//! (Brown et al. 2020, appendix A). Owns features, fitting and the rule; refuses to know what is good.

use super::{Document, Dropped, contamination::words, dedup::hash};
use crate::documents::{Inputs, Raw, Reader};
use crate::pipeline::{self, Flow};
use crate::{DataError, Order, PrepareError, files};
use configs::Philox;
use std::path::Path;
use std::sync::Arc;

/// Features: words and pairs of words, hashed into so many places.
const PLACES: usize = 1 << 18;

/// Documents of each kind that are learnt from at most; the first ones are taken.
const MOST_DOCUMENTS: usize = 50_000;

/// Words of a document that are looked at.
const MOST_WORDS: usize = 1000;

/// Passes over the documents, and the rate of the first; it falls in a straight line.
const PASSES: u64 = 5;
const RATE: f64 = 0.5;

/// One document in so many is kept for the test.
const TEST_EVERY: usize = 10;

const MAGIC: [u8; 8] = *b"PHXCLS\0\x01";

/// Weights of a classifier: a score near 1 is like the good text, near 0 like the rest.
#[derive(Debug, Clone)]
pub struct Classifier {
    weights: Arc<Vec<f32>>,
    bias: f32,
}

/// How well a classifier tells the two apart.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct ClassifierReport {
    /// Good documents learnt from or tested on.
    pub good: u64,
    /// Other documents.
    pub raw: u64,
    /// Share of the documents kept for the test that it tells right.
    pub accuracy: f64,
}

impl Classifier {
    /// The score of a text, in (0, 1).
    pub fn score(&self, text: &str) -> f64 {
        self.score_of(&features(text))
    }

    fn score_of(&self, features: &[(u32, f32)]) -> f64 {
        let sum: f64 =
            features.iter().map(|&(place, value)| f64::from(self.weights[place as usize] * value)).sum();
        1.0 / (1.0 + (-sum - f64::from(self.bias)).exp())
    }

    /// Reads a classifier.
    ///
    /// # Errors
    /// A file that is none.
    pub fn load(file: &Path) -> Result<Classifier, DataError> {
        let bytes = std::fs::read(file).map_err(DataError::io(file, "read"))?;
        let body = bytes.strip_prefix(&MAGIC).and_then(|body| body.split_at_checked(4 * (PLACES + 1)));
        let Some((body, sum)) = body.filter(|(body, sum)| **sum == crc32fast::hash(body).to_le_bytes())
        else {
            return Err(DataError::ClassifierInvalid { file: file.into() });
        };
        let _ = sum;
        let mut weights: Vec<f32> = body.as_chunks().0.iter().map(|four| f32::from_le_bytes(*four)).collect();
        let bias = weights.pop().unwrap_or_default();
        Ok(Classifier { weights: Arc::new(weights), bias })
    }

    /// Writes the classifier: complete, or not there.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn save(&self, file: &Path) -> Result<(), DataError> {
        let values = self.weights.iter().chain([&self.bias]);
        let body: Vec<u8> = values.flat_map(|weight| weight.to_le_bytes()).collect();
        files::write(file, &[&MAGIC[..], &body, &crc32fast::hash(&body).to_le_bytes()].concat())
    }
}

/// Which scores are kept: `pareto(alpha) > 1 - score`, with the random number counted by the text, so that
/// the same document is kept or dropped wherever it stands.
#[derive(Debug, Clone)]
pub struct Gate {
    /// What scores.
    pub classifier: Classifier,
    /// 9 in GPT-3: most of what scores high, and a little of everything.
    pub alpha: f64,
    /// Seed of the random numbers.
    pub seed: u64,
}

impl Gate {
    /// GPT-3's.
    pub const ALPHA: f64 = 9.0;

    pub(super) fn described(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        for weight in self.classifier.weights.iter() {
            hasher.update(&weight.to_le_bytes());
        }
        format!("{} {} {}", self.alpha, self.seed, files::hex(hasher.finalize().as_bytes()))
    }

    /// Whether a document with this text and score is kept.
    pub fn keeps(&self, text: &str, score: f64) -> bool {
        let hash = blake3::hash(text.as_bytes());
        let words: [u32; 4] = std::array::from_fn(|i| {
            hash.as_bytes()[4 * i..].first_chunk().map_or(0, |word| u32::from_le_bytes(*word))
        });
        // numpy.random.pareto: a Pareto variable less 1, by the inverse of its distribution.
        let uniform = 1.0 - Philox::new(self.seed).uniform(words);
        uniform.powf(-1.0 / self.alpha) - 1.0 > 1.0 - score
    }

    pub(super) fn verdict(&self, document: &Document<'_>) -> Option<Dropped> {
        let score = self.classifier.score(&document.text);
        if self.keeps(&document.text, score) {
            return None;
        }
        let reason = "a low score, by the Pareto rule".to_string();
        Some(Dropped { stage: "classify", reason, detail: Some(format!("score {score:.3}")) })
    }
}

/// Hashed words and pairs, by place, with the root of their counts, of length 1 together.
fn features(text: &str) -> Vec<(u32, f32)> {
    let mut words = words(text);
    words.truncate(MOST_WORDS);
    let hashes: Vec<u64> = words.iter().map(|word| hash(word.as_bytes())).collect();
    let pairs =
        hashes.windows(2).map(|pair| pair[0].rotate_left(17) ^ pair[1].wrapping_mul(0x9E37_79B9_7F4A_7C15));
    let mut places: Vec<u32> =
        hashes.iter().copied().chain(pairs).map(|hash| (hash >> 40) as u32 % PLACES as u32).collect();
    places.sort_unstable();
    let mut features: Vec<(u32, f32)> = Vec::new();
    for place in places {
        match features.last_mut() {
            Some((last, count)) if *last == place => *count += 1.0,
            _ => features.push((place, 1.0)),
        }
    }
    features.iter_mut().for_each(|(_, count)| *count = count.sqrt());
    let length = features.iter().map(|(_, value)| value * value).sum::<f32>().sqrt().max(1e-9);
    features.iter_mut().for_each(|(_, value)| *value /= length);
    features
}

/// Learns to tell good text from the rest. The same files give the same classifier.
///
/// # Errors
/// Those of reading; too few documents to learn from.
pub fn train_classifier(
    good: &Inputs,
    raw: &Inputs,
    threads: usize,
) -> Result<(Classifier, ClassifierReport), PrepareError> {
    let (good, raw) = (all_features(good, threads)?, all_features(raw, threads)?);
    let report = |accuracy| ClassifierReport { good: good.len() as u64, raw: raw.len() as u64, accuracy };
    if good.len() < TEST_EVERY || raw.len() < TEST_EVERY {
        let (good, raw) = (good.len(), raw.len());
        return Err(PrepareError::TooFewToLearn { good, raw, needed: TEST_EVERY });
    }
    // Both kinds weigh the same, however many there are of each.
    let weigh = |of: usize, other: usize| ((of + other) as f64 / (2 * of) as f64).min(10.0);
    let kinds = [(&good, 1.0, weigh(good.len(), raw.len())), (&raw, 0.0, weigh(raw.len(), good.len()))];
    let labelled = kinds.iter().flat_map(|(features, label, weight)| {
        features.iter().enumerate().map(move |(i, features)| (i, features, *label, *weight))
    });
    let (test, train): (Vec<_>, Vec<_>) = labelled.partition(|(i, ..)| i % TEST_EVERY == 0);

    let mut weights = vec![0f32; PLACES];
    let mut bias = 0f32;
    let order = Order::new([0; 32], 1, train.len() as u64, 0);
    let updates = PASSES * train.len() as u64;
    for update in 0..updates {
        let (_, features, label, weight) = train[order.sequence(update) as usize];
        let sum: f64 =
            features.iter().map(|&(place, value)| f64::from(weights[place as usize] * value)).sum();
        let score = 1.0 / (1.0 + (-sum - f64::from(bias)).exp());
        let rate = RATE * (1.0 - update as f64 / updates as f64);
        let change = (rate * weight * (label - score)) as f32;
        features.iter().for_each(|&(place, value)| weights[place as usize] += change * value);
        bias += change * 0.1;
    }
    let classifier = Classifier { weights: Arc::new(weights), bias };
    let right =
        test.iter().filter(|(_, features, label, _)| (classifier.score_of(features) > 0.5) == (*label > 0.5));
    let accuracy = right.count() as f64 / test.len() as f64;
    Ok((classifier, report(accuracy)))
}

fn all_features(inputs: &Inputs, threads: usize) -> Result<Vec<Vec<(u32, f32)>>, PrepareError> {
    inputs.check()?;
    let worker = || {
        move |batch: Vec<Raw>| {
            let features = |raw: &Raw| Ok(features(&Document::of(inputs, raw, false)?.text));
            batch.iter().map(features).collect::<Result<Vec<_>, PrepareError>>()
        }
    };
    let mut all: Vec<Vec<(u32, f32)>> = Vec::new();
    pipeline::run(Reader::new(inputs, None, (0, 1)), threads, worker, |batch| {
        all.extend(batch.into_iter().filter(|features| !features.is_empty()));
        Ok(if all.len() < MOST_DOCUMENTS { Flow::Continue } else { Flow::Stop })
    })?;
    all.truncate(MOST_DOCUMENTS);
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn untrained() -> Classifier {
        Classifier { weights: Arc::new(vec![0.0; PLACES]), bias: 0.0 }
    }

    #[test]
    fn the_share_kept_at_each_score_is_that_of_the_pareto_rule() {
        let gate = Gate { classifier: untrained(), alpha: Gate::ALPHA, seed: 1 };
        for score in [0.0, 0.3, 0.7, 0.9, 1.0] {
            let n = 20_000;
            let kept = (0..n).filter(|i| gate.keeps(&format!("document {i}"), score)).count() as f64;
            // P(pareto(a) > x) = (1 + x)^-a for x >= 0.
            let expected = (2.0f64 - score).powf(-9.0);
            let spread = 4.0 * (expected * (1.0 - expected) / f64::from(n)).sqrt() + 1e-4;
            assert!((kept / f64::from(n) - expected).abs() < spread, "{score}: {kept} of {n}, {expected}");
        }
    }

    #[test]
    fn a_document_is_kept_or_dropped_wherever_it_stands() {
        let gate = Gate { classifier: untrained(), alpha: 9.0, seed: 7 };
        assert_eq!(gate.keeps("some text", 0.6), gate.keeps("some text", 0.6));
        let other = Gate { seed: 8, ..gate.clone() };
        let differ = (0..200).filter(|i| gate.keeps(&i.to_string(), 0.9) != other.keeps(&i.to_string(), 0.9));
        assert!(differ.count() > 20);
    }

    #[test]
    fn good_text_is_told_from_the_rest_and_a_classifier_reads_back() {
        let scratch = tempfile::tempdir().unwrap();
        let write = |name: &str, words: [&str; 4]| {
            let line = |i: usize| {
                let text: Vec<&str> = (0..20).map(|j| words[(i * 7 + j * j) % 4]).collect();
                format!("{{\"text\": \"{} {i}\"}}\n", text.join(" "))
            };
            let file = scratch.path().join(name);
            std::fs::write(&file, (0..200).map(line).collect::<String>()).unwrap();
            Inputs::new(&[file])
        };
        let good = write("good.jsonl", ["river", "kingdom", "therefore", "the"]);
        let raw = write("raw.jsonl", ["click", "buy", "cheap", "the"]);
        let (classifier, report) = train_classifier(&good, &raw, 2).unwrap();
        assert!(report.accuracy > 0.95, "{report:?}");
        assert!(classifier.score("the river therefore") > 0.8 && classifier.score("click the cheap") < 0.2);
        let file = scratch.path().join("c.classifier");
        classifier.save(&file).unwrap();
        assert_eq!(Classifier::load(&file).unwrap().score("the kingdom"), classifier.score("the kingdom"));
        std::fs::write(&file, b"no classifier").unwrap();
        assert!(Classifier::load(&file).unwrap_err().to_string().contains("c.classifier"));
    }
}
