//! Generation with the cache against generation without, and how texts keep to themselves.

use super::cache::Cache;
use super::*;
use crate::engine::Engine;
use crate::gradients::Gradients;
use configs::{ModelConfig, Norm, Recompute, Shard};
use ops::collectives::Solo;
use tch::Device;

fn config(attention: &[&str]) -> ModelConfig {
    ModelConfig {
        n_layer: 3,
        n_head: 2,
        n_embd: 16,
        seq_len: 24,
        vocab_size: 97,
        attention: attention.iter().map(|pattern| pattern.parse().unwrap()).collect(),
        ..ModelConfig::default()
    }
}

/// Weights that are large enough for the next token to depend on all before it.
fn parameters<'a>(config: &ModelConfig, comm: &'a Solo) -> Parameters<'a> {
    let segments = configs::segments(config);
    let mut parameters = Parameters::zeros(segments, Shard::None, Kind::Float, Device::Cpu, comm).unwrap();
    parameters.init(3);
    for index in 0..parameters.len() {
        let _ = parameters.master(index).shallow_clone().g_mul_scalar_(8.0);
    }
    parameters
}

const SAMPLED: Sampling = Sampling { temperature: 0.8, top_k: 20, top_p: 0.95, seed: 9 };

fn with_cache(
    config: &ModelConfig,
    prompts: &[Vec<i64>],
    sampling: Sampling,
    max_tokens: usize,
) -> Vec<Vec<i64>> {
    let comm = Solo::new();
    let mut parameters = parameters(config, &comm);
    let how = Generation { sampling, max_tokens, end: None, first_text: 0 };
    generate(&Gpt::new(config), &mut parameters, prompts, &how, &mut |_, _| true).unwrap()
}

/// One text, each token from the model over the whole context.
fn without_cache(config: &ModelConfig, prompt: &[i64], sampling: Sampling, max_tokens: usize) -> Vec<i64> {
    let comm = Solo::new();
    let parameters = parameters(config, &comm);
    let gradients = Gradients::new(&parameters, 1, true, &comm).unwrap();
    let mut engine = Engine::new(Gpt::new(config), parameters, gradients, Recompute::None);
    let mut tokens = prompt.to_vec();
    for drawn in 0..max_tokens {
        let context =
            Tensor::from_slice(&tokens[context_start(tokens.len(), config.seq_len)..]).view([1, -1]);
        let logits = engine.next_logits(&context).unwrap();
        tokens.push(sampling.choose(&values(&logits.view([-1])), 0, drawn as u32) as i64);
    }
    tokens.split_off(prompt.len())
}

#[test]
fn with_the_cache_every_pattern_writes_what_it_writes_without() {
    let patterns = [
        &["dense"][..],
        &["banded:5"],
        &["dense", "banded:5"],
        &["strided:4"],
        &["fixed:6,2"],
        &["strided:99"],
    ];
    let kinds =
        [(Norm::Pre, true, SAMPLED), (Norm::Pre, false, Sampling::GREEDY), (Norm::Post, true, SAMPLED)];
    for (attention, (norm, qkv_bias, sampling)) in patterns.into_iter().zip(kinds.into_iter().cycle()) {
        let config = ModelConfig { norm, qkv_bias, ..config(attention) };
        for prompt in [vec![5], (0..40).map(|i| i * 7 % 97).collect()] {
            let cached = with_cache(&config, std::slice::from_ref(&prompt), sampling, 60);
            let plain = without_cache(&config, &prompt, sampling, 60);
            assert_eq!(cached[0], plain, "{attention:?} {norm:?} from {} tokens", prompt.len());
        }
    }
}

#[test]
fn texts_written_side_by_side_are_those_written_alone() {
    for attention in [["dense", "banded:5"], ["strided:4", "fixed:6,2"]] {
        let config = config(&attention);
        let prompts = [vec![5], vec![1, 2, 3, 4, 5, 6, 7], (0..30).collect(), vec![9, 9]];
        let together = with_cache(&config, &prompts, SAMPLED, 60);
        assert_ne!(together[0], together[3]);
        let comm = Solo::new();
        let mut parameters = parameters(&config, &comm);
        for (number, prompt) in prompts.iter().enumerate() {
            let how = Generation { sampling: SAMPLED, max_tokens: 60, end: None, first_text: number as u32 };
            let prompt = std::slice::from_ref(prompt);
            let alone =
                generate(&Gpt::new(&config), &mut parameters, prompt, &how, &mut |_, _| true).unwrap();
            assert_eq!(alone[0], together[number], "text {number}, {attention:?}");
        }
    }
}

#[test]
fn a_text_ends_before_its_end_token_and_the_others_go_on() {
    let config = config(&["dense", "banded:5"]);
    let prompts = [vec![5], vec![6, 7], vec![8]];
    let whole = with_cache(&config, &prompts, SAMPLED, 40);
    let end = whole[1][10];
    let comm = Solo::new();
    let how = Generation { sampling: SAMPLED, max_tokens: 40, end: Some(end), first_text: 0 };
    let mut streamed = vec![Vec::new(); 3];
    let mut each = |text: usize, token| {
        streamed[text].push(token);
        true
    };
    let cut =
        generate(&Gpt::new(&config), &mut parameters(&config, &comm), &prompts, &how, &mut each).unwrap();
    for (cut, whole) in cut.iter().zip(&whole) {
        let expected: Vec<i64> = whole.iter().copied().take_while(|&token| token != end).collect();
        assert_eq!(*cut, expected);
    }
    assert_eq!(streamed, cut);
}

#[test]
fn a_context_holds_between_half_and_all_positions_and_moves_in_halves() {
    for seq_len in [1, 2, 7, 24] {
        for n in 1..200 {
            let start = context_start(n, seq_len);
            let length = n - start;
            assert!(
                length <= seq_len && (n <= seq_len || length > seq_len / 2),
                "{n} of {seq_len}: {length}"
            );
            assert_eq!(start % (seq_len - seq_len / 2), 0);
        }
        assert_eq!(context_start(seq_len, seq_len), 0);
    }
}

#[test]
fn a_banded_layer_keeps_its_band_and_no_more() {
    let bytes = |attention: &str, positions| {
        let config = ModelConfig { seq_len: 4096, ..config(&[attention]) };
        Cache::new(&Gpt::new(&config), 1, positions, Kind::Float, Device::Cpu).bytes()
    };
    assert_eq!(bytes("banded:32", 4096), bytes("banded:32", 64));
    assert_eq!(bytes("dense", 4096), 128 * bytes("banded:32", 4096));
}

#[test]
fn past_its_band_a_token_costs_the_same_wherever_it_stands() {
    let config = ModelConfig { n_head: 4, n_embd: 64, seq_len: 4096, ..config(&["banded:32"]) };
    let (comm, model) = (Solo::new(), Gpt::new(&config));
    let mut parameters = parameters(&config, &comm);
    // The least of some times, which what else the machine does at the moment changes little.
    let mut cost =
        |at| (0..8).map(|_| token_seconds(&model, &mut parameters, at).unwrap()).fold(1.0, f64::min);
    let (early, late) = (cost(40), cost(4000));
    assert!(late < 1.5 * early, "{late} s at 4000, {early} s at 40");
}
