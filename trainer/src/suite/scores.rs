//! From likelihoods and texts to scores, each with its standard error. Pure arithmetic.
//!
//! Standard errors are those of lm-eval's `mean_stderr`: s / √n, with the sample's standard deviation over n - 1.
//! That of a perplexity is the perplexity times that of the mean log-likelihood (the delta method), to which
//! lm-eval's bootstrap converges.

use super::likelihood::Likelihood;
use crate::metrics::float;
use configs::SuiteKind;
use dataloader::{Asked, SuiteItem};
use serde::Serialize;

/// One score of a task.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Score {
    /// What it is.
    pub name: &'static str,
    /// The value.
    #[serde(serialize_with = "float")]
    pub value: f64,
    /// Its standard error; none where it is not defined, as of one example.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stderr: Option<f64>,
}

/// The scores of a task with one number of shots.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TaskScores {
    /// The task's name.
    pub task: String,
    /// What was asked.
    pub kind: SuiteKind,
    /// Examples before each.
    pub shots: usize,
    /// Examples, or documents.
    pub examples: usize,
    /// Shots that were left out because a prompt was too long, over all examples.
    pub shots_dropped: u64,
    /// Examples whose prompt lost its beginning.
    pub prompts_cut: u64,
    /// In the order in which they are told.
    pub scores: Vec<Score>,
    /// Seconds it took.
    pub seconds: f64,
}

impl TaskScores {
    /// The value of a score.
    pub fn value(&self, name: &str) -> Option<f64> {
        self.scores.iter().find(|score| score.name == name).map(|score| score.value)
    }
}

/// The scores of items of one kind, given the likelihoods of their spans.
///
/// # Panics
/// Another number of likelihoods than spans; items of which nothing is predicted.
pub(super) fn of_likelihoods(items: &[SuiteItem], all: &[Likelihood]) -> Vec<Score> {
    let mut rest = all;
    let each: Vec<(&SuiteItem, &[Likelihood])> = items
        .iter()
        .map(|item| {
            let (own, after) = rest.split_at(item.spans.len());
            rest = after;
            (item, own)
        })
        .collect();
    match items[0].asked {
        Asked::Document { .. } => perplexity(&each),
        Asked::Word => last_word(&each),
        Asked::Choice { .. } => multiple_choice(&each),
        Asked::Text { .. } => panic!("a text has no likelihood"),
    }
}

/// The scores of texts that were written, by the items' right ones: equal, but for white space around them.
pub(super) fn of_texts(items: &[SuiteItem], texts: &[String]) -> Vec<Score> {
    let is_right = |(item, text): (&SuiteItem, &String)| matches!(&item.asked, Asked::Text { right } if text.trim() == right);
    vec![share("exact_match", items.iter().zip(texts).map(is_right))]
}

type Each<'a> = [(&'a SuiteItem, &'a [Likelihood])];

fn perplexity(each: &Each<'_>) -> Vec<Score> {
    let (mut log, mut tokens, mut total_bytes, mut total_words) = (0.0, 0, 0, 0);
    for (item, likelihoods) in each {
        log += likelihoods.iter().map(|likelihood| likelihood.log).sum::<f64>();
        tokens += item.spans.iter().map(|span| span.targets).sum::<usize>();
        if let Asked::Document { bytes, words } = item.asked {
            total_bytes += bytes;
            total_words += words;
        }
    }
    let per = |name, count: usize| Score { name, value: (-log / count as f64).exp(), stderr: None };
    let bits = -log / std::f64::consts::LN_2 / total_bytes as f64;
    vec![
        per("token_perplexity", tokens),
        per("word_perplexity", total_words),
        per("byte_perplexity", total_bytes),
        Score { name: "bits_per_byte", value: bits, stderr: None },
    ]
}

fn last_word(each: &Each<'_>) -> Vec<Score> {
    let logs: Vec<f64> = each.iter().map(|(_, likelihoods)| likelihoods[0].log).collect();
    let (mean, error) = mean(&logs);
    let perplexity = (-mean).exp();
    let error = error.map(|error| perplexity * error);
    vec![
        share("accuracy", each.iter().map(|(_, likelihoods)| likelihoods[0].greedy)),
        Score { name: "perplexity", value: perplexity, stderr: error },
    ]
}

fn multiple_choice(each: &Each<'_>) -> Vec<Score> {
    let mut scores = Vec::new();
    for (name, rule) in RULES {
        let right = each.iter().map(|(item, likelihoods)| {
            let Asked::Choice { bytes, right } = &item.asked else { return None };
            let choices: Option<Vec<f64>> = (0..bytes.len())
                .map(|choice| {
                    let tokens = item.spans[choice].targets;
                    rule(likelihoods, choice, tokens, bytes)
                })
                .collect();
            Some(largest(&choices?) == *right)
        });
        if let Some(right) = right.collect::<Option<Vec<bool>>>() {
            scores.push(share(name, right.into_iter()));
        }
    }
    scores
}

/// The score of a choice, given the likelihoods of all, its number and tokens, and the bytes of each; none where a
/// rule asks for what there is not.
type Rule = fn(&[Likelihood], usize, usize, &[usize]) -> Option<f64>;

/// How choices are compared.
const RULES: [(&str, Rule); 4] = [
    ("accuracy", |all, choice, _, _| Some(all[choice].log)),
    ("accuracy_per_token", |all, choice, tokens, _| Some(all[choice].log / tokens as f64)),
    ("accuracy_per_byte", |all, choice, _, bytes| Some(all[choice].log / bytes[choice] as f64)),
    ("accuracy_unconditional", |all, choice, _, bytes| {
        all.get(bytes.len() + choice).map(|alone| all[choice].log - alone.log)
    }),
];

/// The number of the largest, the first of equals.
fn largest(values: &[f64]) -> usize {
    let mut best = 0;
    for (number, value) in values.iter().enumerate() {
        if *value > values[best] {
            best = number;
        }
    }
    best
}

fn share(name: &'static str, right: impl Iterator<Item = bool>) -> Score {
    let values: Vec<f64> = right.map(|right| f64::from(u8::from(right))).collect();
    let (value, stderr) = mean(&values);
    Score { name, value, stderr }
}

/// The mean, and its standard error where there is more than one.
fn mean(values: &[f64]) -> (f64, Option<f64>) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    (mean, (values.len() > 1).then(|| (squares / (n - 1.0)).sqrt() / n.sqrt()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mean_has_the_standard_error_of_its_sample() {
        // Four of eight right: sqrt(8 * 0.25 / 7) / sqrt(8).
        let values = [1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0];
        let (value, error) = mean(&values);
        assert_eq!(value, 0.5);
        assert!((error.unwrap() - (2.0f64 / 7.0 / 8.0).sqrt()).abs() < 1e-15);
        assert_eq!(mean(&[3.0]), (3.0, None));
    }

    #[test]
    fn the_first_of_equal_choices_is_taken() {
        assert_eq!([largest(&[-2.0, -1.0, -1.0]), largest(&[-1.0]), largest(&[f64::NAN, 1.0])], [1, 0, 0]);
    }
}
