//! The presets say what the papers say.
#![allow(clippy::unwrap_used)] // unwrap is how a test fails

use configs::plan::{Cluster, Machine, Plan, Question, RANK_HOURS_BETWEEN_FAILURES};
use configs::{Activation, Memory, Norm, Objective, RunConfig, Setup, Shard, StepTraffic};
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

/// Name and tokens over which the batch grows: the paper says "4-12 billion, depending on the size".
const RAMPS: [(&str, u64); 8] = [
    ("gpt3-125m", 4_000_000_000),
    ("gpt3-350m", 4_000_000_000),
    ("gpt3-760m", 4_000_000_000),
    ("gpt3-1.3b", 6_000_000_000),
    ("gpt3-2.7b", 6_000_000_000),
    ("gpt3-6.7b", 8_000_000_000),
    ("gpt3-13b", 8_000_000_000),
    ("gpt3-175b", 12_000_000_000),
];

#[test]
fn gpt3_presets_warm_up_and_decay_over_the_tokens_of_the_paper() {
    for (name, .., lr) in GPT3 {
        let run = preset(name);
        let rate_at = |tokens: u64| run.lr(run.batches().steps_for(tokens));
        assert!((rate_at(187_500_000) / lr - 0.5).abs() < 0.01, "{name} half way through the warm-up");
        assert!((rate_at(375_000_000) / lr - 1.0).abs() < 0.01, "{name} after the warm-up");
        assert!((rate_at(260_000_000_000) / lr - 0.1).abs() < 0.001, "{name} after the decay");
    }
}

#[test]
fn gpt3_presets_let_the_batch_grow_as_the_paper_does() {
    for (name, ramp_tokens) in RAMPS {
        let run = preset(name);
        let (full, start) = (run.batch.global_batch_tokens, run.batches().batch_tokens(0));
        // What needs more ranks than the paper's first batch has sequences starts with a sequence each.
        assert_eq!(start, if name == "gpt3-175b" { 128 * 3 * 2048 } else { 32 * 1024 }, "{name}");
        // Walked step by step: never above the paper's line, never at half of it or below.
        let (mut tokens, mut steps) = (0, 0);
        while tokens < 300_000_000_000 {
            let batch = run.batches().batch_tokens(steps);
            let line = start as f64 + (full - start) as f64 * (tokens as f64 / ramp_tokens as f64).min(1.0);
            assert!(batch as f64 <= line && batch as f64 > line / 2.0, "{name}: {batch} at {tokens} tokens");
            tokens += batch;
            steps += 1;
            if tokens > ramp_tokens + full {
                let left = 300_000_000_000_u64.saturating_sub(tokens).div_ceil(full);
                (tokens, steps) = (tokens + left * full, steps + left);
            }
        }
        assert_eq!((run.max_steps(), run.batches().tokens_before(steps)), (steps, tokens), "{name}");
    }
}

#[test]
fn gpt2_presets_have_the_shapes_and_batches_of_the_paper() {
    // Radford et al. 2019, table 2 with the parameters of the released models; section 2.3.
    for (name, parameters, n_layer, n_embd, n_head) in [
        ("gpt2-124m", 124_439_808, 12, 768, 12),
        ("gpt2-355m", 354_823_168, 24, 1024, 16),
        ("gpt2-774m", 774_030_080, 36, 1280, 20),
        ("gpt2-1558m", 1_557_611_200, 48, 1600, 25),
    ] {
        let run = preset(name);
        let model = &run.model;
        assert_eq!((model.n_layer, model.n_embd, model.n_head), (n_layer, n_embd, n_head), "{name}");
        assert_eq!(
            (model.seq_len, model.vocab_size, model.parameters()),
            (1024, 50_257, parameters),
            "{name}"
        );
        assert_eq!(run.batch.global_batch_tokens, 512 * 1024);
        assert_eq!((run.model.norm, run.run.name.as_str()), (Norm::Pre, name));
    }
}

#[test]
fn gpt1_has_the_shape_and_training_of_its_paper() {
    // Radford et al. 2018, section 4.1; the number of parameters is that of the released model.
    let run = preset("gpt1");
    let model = &run.model;
    assert_eq!((model.n_layer, model.n_embd, model.n_head, model.seq_len), (12, 768, 12, 512));
    assert_eq!((model.norm, model.dropout, model.parameters()), (Norm::Post, 0.1, 116_534_784));
    assert_eq!((run.batch.global_batch_tokens, run.optim.weight_decay), (64 * 512, 0.01));
    assert_eq!((run.lr(999), run.lr(1999)), (1.25e-4, 2.5e-4));
    assert!(run.lr(run.max_steps() - 1) < 1e-12, "the cosine ends at zero");
}

#[test]
fn presets_fit_on_few_gpus_of_80_gb_and_their_first_batch_on_as_many_as_the_paper_allows() {
    for (name, few, many) in [
        ("gpt1", 1, 8),
        ("gpt2-124m", 1, 128),
        ("gpt2-1558m", 1, 128),
        ("gpt3-125m", 1, 16),
        ("gpt3-1.3b", 1, 16),
        ("gpt3-2.7b", 1, 16),
        ("gpt3-6.7b", 4, 16),
        ("gpt3-13b", 8, 16),
        ("gpt3-175b", 128, 128),
    ] {
        let run = preset(name);
        run.batches().plan(0, many).unwrap();
        let memory = Memory::of(&run.model, &Setup::of(&run, few, false, true).unwrap());
        let needed = memory.state() + memory.activations;
        assert!(needed < 80_000_000_000, "{name} on {few} ranks takes {needed}: {memory:?}");
    }
}

#[test]
fn every_gpt3_preset_has_a_plan_that_fits_on_so_many_gpus_of_80_gb() {
    let gpus = [1, 1, 1, 1, 1, 4, 8, 192];
    for ((name, ..), ranks) in GPT3.into_iter().zip(gpus) {
        for gpu in ["a100-80", "h100"] {
            let machine = Machine::named(gpu, 1).unwrap();
            let (between, per_node) = (machine.between.clone(), machine.per_node);
            let cluster = Cluster { machine, between, per_node, disk_bytes_per_s: 2e9 };
            let rank_hours_between_failures = RANK_HOURS_BETWEEN_FAILURES;
            let question = Question { ranks, cluster, price: None, rank_hours_between_failures };
            let plan = Plan::of(&preset(name), &question);
            assert!(plan.modes[0].fits, "{name} as it is, on {ranks} {gpu}: {:?}", plan.modes[0].room);
            let best = plan.best.unwrap();
            assert!(
                best.room.total <= 80_000_000_000 && best.mfu > 0.24,
                "{name} on {ranks} {gpu}: {best:?}"
            );
        }
    }
}

#[test]
fn the_table_of_modes_in_the_documentation_is_what_the_formulas_say() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/PARALLEL.md");
    let text = std::fs::read_to_string(file).unwrap();
    let run = preset("gpt3-1.3b");
    let gb = |bytes: u64| format!("{:.1}", bytes as f64 / 1e9);
    let row = |world_size, (word, shard)| {
        let setup = Setup { shard, ..Setup::of(&run, world_size, false, true).unwrap() };
        let memory = Memory::of(&run.model, &setup);
        let sent = StepTraffic::of(&run.model, &setup).total();
        let (state, passing, sent) = (gb(memory.state()), gb(memory.passing), gb(sent));
        format!("| {world_size} | `\"{word}\"` | {state} | {passing} | {sent} |")
    };
    let modes = [
        ("none", Shard::None),
        ("optimizer", Shard::Optimizer),
        ("gradients", Shard::Gradients),
        ("parameters", Shard::Parameters),
    ];
    let rows = [8, 64].into_iter().flat_map(|world_size| modes.map(|mode| row(world_size, mode)));
    let table = rows.collect::<Vec<String>>().join("\n");
    assert!(text.contains(&table), "docs/PARALLEL.md should have\n{table}");
}

#[test]
fn gpt3s_mixture_has_the_weights_as_printed_which_sum_to_101_percent() {
    let run = preset("gpt3-mixture");
    let weights: Vec<f64> = run.data.sources().iter().map(|source| source.weight).collect();
    assert_eq!(weights, [60.0, 22.0, 8.0, 8.0, 3.0]);
    assert_eq!((weights.iter().sum::<f64>(), run.model.n_embd), (101.0, 768));
}

#[test]
fn bert_presets_have_the_shapes_batch_and_rate_of_the_paper() {
    // 110 and 340 million in the paper, which counts the pooler and rounds.
    for (name, n_layer, n_embd, n_head, parameters) in
        [("bert-base", 12, 768, 12, 109_514_298), ("bert-large", 24, 1024, 16, 335_174_458)]
    {
        let run = preset(name);
        let model = &run.model;
        assert_eq!((model.n_layer, model.n_embd, model.n_head), (n_layer, n_embd, n_head));
        assert_eq!((model.parameters(), model.seq_len, model.dropout), (parameters, 512, 0.1), "{name}");
        assert_eq!(
            (model.objective, model.norm, model.activation),
            (Objective::Masked, Norm::Post, Activation::Gelu)
        );
        assert_eq!((run.batch.global_batch_tokens, run.optim.lr), (256 * 512, 1e-4));
        assert!(
            (run.lr(9_999) - 1e-4).abs() < 1e-12 && (run.lr(504_999) / 1e-4 - 0.5).abs() < 1e-3,
            "{name}"
        );
        assert!(run.lr(999_999) < 1e-9);
    }
}

#[test]
fn the_small_encoder_differs_from_the_small_decoder_in_its_objective_alone() {
    let (masked, causal) = (preset("mail-masked"), preset("mail"));
    assert_eq!(
        (&masked.batch, &masked.optim, &masked.schedule),
        (&causal.batch, &causal.optim, &causal.schedule)
    );
    let shape = |run: &RunConfig| [run.model.n_layer, run.model.n_head, run.model.n_embd, run.model.seq_len];
    assert_eq!(shape(&masked), shape(&causal));
    // The rest of the embedding, the transform with its bias, and the mask.
    let c = 128;
    assert_eq!(
        masked.model.parameters() - causal.model.parameters(),
        2 * c + 2 * c + c * c + 3 * c + 258 + c - 2 * c
    );
}
