//! The presets say what the papers say.
#![allow(clippy::unwrap_used)] // unwrap is how a test fails

use configs::RunConfig;
use std::path::Path;

fn preset(name: &str) -> RunConfig {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("{name}.toml"));
    configs::load(&file, &[], &|_| Ok(257)).unwrap()
}

/// Name, parameters, layers, width, heads, batch in tokens, learning rate: Brown et al. 2020, table 2.1,
/// but for the two printed shapes that do not fit and batches rounded to whole micro-batches.
const GPT3: [(&str, f64, usize, usize, usize, u64, f64); 8] = [
    ("gpt3-125m", 125e6, 12, 768, 12, 1 << 19, 6e-4),
    ("gpt3-350m", 350e6, 24, 1024, 16, 1 << 19, 3e-4),
    ("gpt3-760m", 760e6, 24, 1536, 16, 1 << 19, 2.5e-4),
    ("gpt3-1.3b", 1.3e9, 24, 2048, 16, 1 << 20, 2e-4),
    ("gpt3-2.7b", 2.7e9, 32, 2560, 32, 1 << 20, 1.6e-4),
    ("gpt3-6.7b", 6.7e9, 32, 4096, 32, 1 << 21, 1.2e-4),
    ("gpt3-13b", 13e9, 40, 5120, 40, 1 << 21, 1e-4),
    ("gpt3-175b", 175e9, 96, 12_288, 96, 3 << 20, 0.6e-4),
];

#[test]
fn gpt3_presets_have_the_shapes_batches_and_rates_of_the_paper() {
    for (name, parameters, n_layer, n_embd, n_head, batch, lr) in GPT3 {
        let run = preset(name);
        let model = &run.model;
        assert_eq!(run.run.name, name);
        assert_eq!(
            (model.n_layer, model.n_embd, model.n_head, model.seq_len),
            (n_layer, n_embd, n_head, 2048)
        );
        assert_eq!((run.batch.global_batch_tokens, run.optim.lr), (batch, lr), "{name}");
        let off = model.parameters() as f64 / parameters - 1.0;
        assert!(off.abs() < 0.025, "{name} has {} parameters", model.parameters());
    }
}

#[test]
fn gpt3_presets_warm_up_and_decay_over_the_tokens_of_the_paper() {
    for (name, .., lr) in GPT3 {
        let run = preset(name);
        let rate_at = |tokens: u64| run.lr(tokens / run.batch.global_batch_tokens);
        assert!((rate_at(187_500_000) / lr - 0.5).abs() < 0.01, "{name} half way through the warm-up");
        assert!((rate_at(375_000_000) / lr - 1.0).abs() < 0.01, "{name} after the warm-up");
        assert!((rate_at(260_000_000_000) / lr - 0.1).abs() < 0.001, "{name} after the decay");
        assert_eq!(run.max_steps(), 300_000_000_000u64.div_ceil(run.batch.global_batch_tokens));
    }
}
