//! Text from the model: one token after another, several texts at a time. Owns the loop and the rule for texts
//! longer than the model's context; how a token is chosen is in `sampling`, what is kept of earlier ones in
//! `cache`.

mod cache;
mod command;
mod sampling;
#[cfg(test)]
mod tests;

pub(crate) use command::named;
pub use command::{GenerateArgs, generate_command};
pub use sampling::Sampling;

use crate::error::TrainError;
use crate::model::Gpt;
use crate::weights::Parameters;
use cache::Cache;
use std::time::Instant;
use tch::{Kind, Tensor};

/// How texts are continued.
#[derive(Debug, Clone, Copy)]
pub struct Generation {
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Tokens after which a text ends.
    pub max_tokens: usize,
    /// A token that ends a text; it is not part of it.
    pub end: Option<i64>,
    /// The number of the first text among those that a seed is for: texts written in several batches are the
    /// same as in one.
    pub first_text: u32,
}

/// Where the context of the token after `n` others begins, for a model of `seq_len` positions. Positions are
/// learned, so there are no more of them: a context that is full goes on with its last half, and grows
/// again. So a token costs no more than two others on average however long the text is, and with or without
/// a cache the context is the same.
pub fn context_start(n: usize, seq_len: usize) -> usize {
    let dropped = seq_len - seq_len / 2;
    n.saturating_sub(seq_len).div_ceil(dropped) * dropped
}

/// A text that is being written.
struct Text {
    number: usize,
    tokens: Vec<i64>,
}

/// Continues prompts of at least one token each; returns what was added to each. `each` is told of every token
/// as it comes, the prompt's number and the token, and says whether the text goes on. Collective where weights are gathered.
///
/// # Errors
/// A failed collective.
///
/// # Panics
/// A prompt is empty.
pub fn generate(
    model: &Gpt,
    parameters: &mut Parameters<'_>,
    prompts: &[Vec<i64>],
    how: &Generation,
    each: &mut dyn FnMut(usize, i64) -> bool,
) -> Result<Vec<Vec<i64>>, TrainError> {
    assert!(prompts.iter().all(|prompt| !prompt.is_empty()), "a prompt has at least one token");
    let seq_len = model.config().seq_len;
    let mut texts: Vec<Text> =
        prompts.iter().enumerate().map(|(number, tokens)| Text { number, tokens: tokens.clone() }).collect();
    let mut written: Vec<Vec<i64>> = vec![Vec::new(); prompts.len()];
    let longest = prompts.iter().map(|prompt| prompt.len() + how.max_tokens).max().unwrap_or(0);
    let (kind, device) = (parameters.kind(), parameters.device());
    let mut cache = Cache::new(model, texts.len(), longest.min(seq_len), kind, device);
    for drawn in 0..how.max_tokens {
        if texts.is_empty() {
            break;
        }
        for (row, text) in texts.iter().enumerate() {
            let n = text.tokens.len();
            let before = &text.tokens[context_start(n, seq_len)..n - 1];
            if cache.length(row) != before.len() || drawn == 0 {
                cache.fill(model, parameters, row, before)?;
            }
        }
        let last: Vec<i64> = texts.iter().map(|text| text.tokens[text.tokens.len() - 1]).collect();
        let logits = cache.step(model, parameters, &last)?;
        let mut going_on = Vec::new();
        for (row, text) in texts.iter_mut().enumerate() {
            let stream = how.first_text + text.number as u32;
            let token = how.sampling.choose(&values(&logits.get(row as i64)), stream, drawn as u32) as i64;
            if how.end == Some(token) {
                continue;
            }
            text.tokens.push(token);
            written[text.number].push(token);
            if each(text.number, token) {
                going_on.push(row);
            }
        }
        if going_on.len() < texts.len() {
            cache.keep(&going_on);
            let mut row = 0..;
            texts.retain(|_| row.next().is_some_and(|row| going_on.contains(&row)));
        }
    }
    Ok(written)
}

/// Seconds that a token takes at a position, the least of some; what stands before it is made up.
///
/// # Errors
/// A failed collective.
pub(crate) fn token_seconds(
    model: &Gpt,
    parameters: &mut Parameters<'_>,
    position: usize,
) -> Result<f64, TrainError> {
    let mut cache = Cache::new(model, 1, position + 1, parameters.kind(), parameters.device());
    let mut least = f64::INFINITY;
    for _ in 0..5 {
        cache.pretend(position);
        let started = Instant::now();
        let _ = cache.step(model, parameters, &[1])?;
        least = least.min(started.elapsed().as_secs_f64());
    }
    Ok(least)
}

fn values(logits: &Tensor) -> Vec<f32> {
    let mut values = vec![0f32; logits.numel()];
    logits.to_kind(Kind::Float).copy_data(&mut values, logits.numel());
    values
}
