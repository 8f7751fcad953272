//! Every score of a tiny model against the same computed by hand from its logits.

use super::*;
use crate::gradients::Gradients;
use crate::model::Gpt;
use crate::weights::Parameters;
use configs::{Recompute, Shard, load_suite};
use ops::collectives::Solo;
use std::collections::BTreeMap;
use std::fmt::Write;
use tch::{Device, Kind, Tensor};

const SEQ_LEN: usize = 24;

fn config() -> ModelConfig {
    let attention = ["dense", "banded:5"].map(|pattern| pattern.parse().unwrap()).to_vec();
    ModelConfig {
        n_layer: 2,
        n_head: 2,
        n_embd: 16,
        seq_len: SEQ_LEN,
        vocab_size: 257,
        attention,
        ..ModelConfig::default()
    }
}

/// A model whose weights are large enough for what comes next to depend on all before it.
fn engine(comm: &Solo) -> Engine<'_> {
    let segments = configs::segments(&config());
    let mut parameters = Parameters::zeros(segments, Shard::None, Kind::Float, Device::Cpu, comm).unwrap();
    parameters.init(3);
    for index in 0..parameters.len() {
        let _ = parameters.master(index).shallow_clone().g_mul_scalar_(8.0);
    }
    let gradients = Gradients::new(&parameters, 1, false, comm).unwrap();
    Engine::new(Gpt::new(&config()), parameters, gradients, Recompute::None)
}

/// The scores of the only task of a suite.
fn measured(engine: &mut Engine<'_>, data: &str, task: &str) -> BTreeMap<&'static str, f64> {
    let folder = tempfile::tempdir().unwrap();
    let (file, rows) = (folder.path().join("suite.toml"), folder.path().join("x.jsonl"));
    std::fs::write(&rows, data).unwrap();
    // Batches of a few rows of different lengths.
    let head = format!("[suite]\nbatch_tokens = 50\n[[task]]\nname = \"t\"\ndata = \"{}\"\n", rows.display());
    std::fs::write(&file, format!("{head}{task}")).unwrap();
    let suite = load_suite(&file).unwrap();
    let measure = Measure::open(&suite, &config(), &Tokenizer::Bytes, false).unwrap();
    let results = measure.run(engine, &Solo::new()).unwrap();
    results[0].scores.iter().map(|score| (score.name, score.value)).collect()
}

/// Log-probabilities `[V]` of what follows some tokens, the model reading them and nothing else.
fn after(engine: &mut Engine<'_>, tokens: &[i64]) -> Vec<f64> {
    let logits = engine.next_logits(&Tensor::from_slice(tokens).view([1, -1])).unwrap();
    Vec::<f64>::try_from(logits.view([-1]).to_kind(Kind::Double).log_softmax(-1, Kind::Double)).unwrap()
}

/// The log-likelihood of `answer` after `context`, a byte at a time.
fn log_likelihood(engine: &mut Engine<'_>, context: &str, answer: &str) -> f64 {
    let mut tokens: Vec<i64> = context.bytes().map(i64::from).collect();
    let mut sum = 0.0;
    for byte in answer.bytes() {
        sum += after(engine, &tokens)[usize::from(byte)];
        tokens.push(i64::from(byte));
    }
    sum
}

fn assert_close(got: f64, expected: f64) {
    assert!((got - expected).abs() <= 1e-4 * expected.abs(), "{got}, by hand {expected}");
}

#[test]
fn the_last_words_likelihood_and_whether_the_model_would_write_it_are_those_of_its_logits() {
    let comm = Solo::new();
    let mut engine = engine(&comm);
    let (mut rows, mut logs, mut right) = (String::new(), Vec::new(), 0);
    for i in 0..60 {
        let context = format!("row {i}");
        let tokens: Vec<i64> = format!("{context}:").bytes().map(i64::from).collect();
        let logs_of_next = after(&mut engine, &tokens);
        let likeliest = (0..257).max_by(|&a, &b| logs_of_next[a].total_cmp(&logs_of_next[b])).unwrap();
        let word = u8::try_from(likeliest).ok().map(char::from).filter(char::is_ascii_alphanumeric);
        right += usize::from(word.is_some());
        let word = word.map_or("no".to_string(), String::from);
        logs.push(log_likelihood(&mut engine, &format!("{context}:"), &word));
        writeln!(rows, "{{\"text\": \"{context} {word}\"}}").unwrap();
    }
    assert!((1..60).contains(&right), "{right}");
    let scores =
        measured(&mut engine, &rows, "kind = \"last_word\"\nprompt = \"{context}:\"\nanswer = \"{word}\"\n");
    assert_eq!(scores["accuracy"], right as f64 / 60.0);
    assert_close(scores["perplexity"], (-logs.iter().sum::<f64>() / 60.0).exp());
}

#[test]
fn a_choice_is_scored_as_sum_per_token_per_byte_and_against_its_likelihood_alone() {
    let comm = Solo::new();
    let mut engine = engine(&comm);
    let choices = ["red", "a dark green", "xy", "é"];
    let mut rows = String::new();
    let mut right = [0.0f64; 4];
    for i in 0..24 {
        let label = i % 4;
        let list = choices.map(|choice| format!("{choice:?}")).join(", ");
        writeln!(rows, "{{\"context\": \"q{i}\", \"choices\": [{list}], \"label\": {label}}}").unwrap();
        let scored = choices.map(|choice| {
            let answer = format!(" {choice}");
            let log = log_likelihood(&mut engine, &format!("q{i}"), &answer);
            let alone = log_likelihood(&mut engine, "Answer:", &answer);
            // A token is a byte here, and the space in front is one of the answer's tokens.
            [log, log / answer.len() as f64, log / choice.len() as f64, log - alone]
        });
        for (rule, right) in right.iter_mut().enumerate() {
            let best = (0..4).max_by(|&a, &b| scored[a][rule].total_cmp(&scored[b][rule])).unwrap();
            *right += f64::from(u8::from(best == label)) / 24.0;
        }
    }
    let scores = measured(&mut engine, &rows, "kind = \"multiple_choice\"\n");
    let rules = ["accuracy", "accuracy_per_token", "accuracy_per_byte", "accuracy_unconditional"];
    for (rule, right) in rules.into_iter().zip(right) {
        assert!((scores[rule] - right).abs() < 1e-9, "{rule}: {}, by hand {right}", scores[rule]);
    }
}

const TEXT: &str = "Two words, and then some more of them.";

fn perplexity(engine: &mut Engine<'_>, text: &str, stride: usize) -> BTreeMap<&'static str, f64> {
    let rows = format!("{{\"text\": {text:?}}}\n{{\"text\": \"short\"}}\n");
    measured(engine, &rows, &format!("kind = \"perplexity\"\nstride = {stride}\n"))
}

#[test]
fn a_document_that_fits_has_the_likelihood_of_the_whole_sequence_whatever_the_stride() {
    let comm = Solo::new();
    let mut engine = engine(&comm);
    let text = &TEXT[..SEQ_LEN];
    let mut log = 0.0;
    for text in [text, "short"] {
        let mut tokens = vec![256];
        for byte in text.bytes() {
            log += after(&mut engine, &tokens)[usize::from(byte)];
            tokens.push(i64::from(byte));
        }
    }
    let bytes = (text.len() + 5) as f64;
    for stride in [SEQ_LEN, 3] {
        let scores = perplexity(&mut engine, text, stride);
        assert_close(scores["token_perplexity"], (-log / bytes).exp());
        assert_close(scores["byte_perplexity"], (-log / bytes).exp());
        assert_close(scores["bits_per_byte"], -log / bytes / std::f64::consts::LN_2);
        assert_close(scores["word_perplexity"], (-log / 6.0).exp()); // "Two words, and then some", "short"
    }
}

#[test]
fn in_a_longer_document_every_token_has_the_context_that_the_stride_leaves_it() {
    let comm = Solo::new();
    let mut engine = engine(&comm);
    let tokens: Vec<i64> = std::iter::once(256).chain(TEXT.bytes().map(i64::from)).collect();
    for stride in [1, 5, SEQ_LEN] {
        let mut log = 0.0;
        for target in 1..tokens.len() {
            let start = match target {
                _ if target <= SEQ_LEN => 0,
                _ => {
                    // Its window ends with the stride that it is part of, or with the text.
                    let moves = (target - SEQ_LEN).div_ceil(stride);
                    (SEQ_LEN + moves * stride).min(TEXT.len()) - SEQ_LEN
                }
            };
            log += after(&mut engine, &tokens[start..target])[tokens[target] as usize];
        }
        for byte in 0..5 {
            let before: Vec<i64> =
                std::iter::once(256).chain("short".bytes().take(byte).map(i64::from)).collect();
            log += after(&mut engine, &before)[usize::from("short".as_bytes()[byte])];
        }
        let scores = perplexity(&mut engine, TEXT, stride);
        assert_close(scores["token_perplexity"], (-log / (TEXT.len() + 5) as f64).exp());
    }
}

#[test]
fn what_is_written_ends_before_a_stop_and_is_right_where_it_is_equal() {
    let comm = Solo::new();
    let mut engine = engine(&comm);
    let ascii = |log: &[f64]| (97..123).max_by(|&a, &b| log[a].total_cmp(&log[b])).unwrap();
    // The likeliest byte after each prompt, if that is a letter: a text of one token is right by it.
    let (mut rows, mut right) = (String::new(), 0);
    for i in 0..40 {
        let prompt = format!("n{i}");
        let tokens: Vec<i64> = prompt.bytes().map(i64::from).collect();
        let log = after(&mut engine, &tokens);
        let letter = ascii(&log);
        right += usize::from((0..257).all(|other| log[other] <= log[letter]));
        writeln!(rows, "{{\"question\": {prompt:?}, \"answer\": \"{}\"}}", char::from(letter as u8)).unwrap();
    }
    assert!(right > 0);
    let task = "kind = \"generate\"\nanswer = \"{answer}\"\nmax_tokens = 1\n";
    assert_eq!(measured(&mut engine, &rows, task)["exact_match"], right as f64 / 40.0);
    // A stop that comes at once leaves nothing, which none of these is.
    let all: Vec<String> = (0..26u8).map(|letter| format!("\"{}\"", char::from(97 + letter))).collect();
    let stopped = format!("{task}stop = [{}]\n", all.join(", "));
    assert_eq!(measured(&mut engine, &rows, &stopped)["exact_match"], 0.0);
}

#[test]
fn a_model_that_sees_what_it_would_have_to_predict_is_refused() {
    let model = ModelConfig { attention: vec![Pattern::Bidirectional], ..config() };
    let suite = Suite { seed: 1, batch_tokens: 1, tasks: Vec::new() };
    let refusal = Measure::open(&suite, &model, &Tokenizer::Bytes, false).unwrap_err().to_string();
    assert!(refusal.contains("bidirectional") && refusal.contains("hint: "), "{refusal}");
}
