//! Learning rates at every breakpoint, with and without a batch ramp, against runs walked step by step
//! with the formulas of the papers.
#![allow(clippy::unwrap_used)] // unwrap is how a test fails

use configs::RunConfig;

/// 16 tokens a sequence; the full batch has 16 of them.
fn run(schedule: &str, ramp: bool) -> RunConfig {
    let ramp = if ramp { "ramp_start_tokens = 32\nramp_tokens = 3360\n" } else { "" };
    let text = format!(
        "[model]\nn_layer = 1\nn_head = 1\nn_embd = 8\nseq_len = 16\nvocab_size = 257\n\
         [data]\ntrain = \"data\"\n[batch]\nglobal_batch_tokens = 256\n{ramp}\
         [optim]\nlr = 2.0\n[schedule]\n{schedule}"
    );
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("run.toml");
    std::fs::write(&file, text).unwrap();
    configs::load(&file, &[], &|_| Ok(257)).unwrap()
}

/// Tokens seen after each of the first `steps` steps. The line from 32 to 256 over 3360 tokens reaches
/// 64, 128 and 256 at 480, 1440 and 3360 tokens.
fn tokens_after(ramp: bool, steps: usize) -> Vec<u64> {
    let mut seen = 0;
    (0..steps)
        .map(|_| {
            seen += match seen {
                _ if !ramp => 256,
                0..480 => 32,
                480..1440 => 64,
                1440..3360 => 128,
                _ => 256,
            };
            seen
        })
        .collect()
}

/// `rate(tokens, end)` is the paper's formula; it is compared at every step, so at every breakpoint.
fn check(schedule: &str, rate: impl Fn(f64, f64) -> f64) {
    for ramp in [false, true] {
        let run = run(schedule, ramp);
        let steps = run.max_steps();
        let tokens = tokens_after(ramp, steps as usize);
        let end = *tokens.last().unwrap() as f64;
        for (step, &seen) in tokens.iter().enumerate() {
            let (got, expected) = (run.lr(step as u64), rate(seen as f64, end));
            assert!(
                (got - expected).abs() < 1e-12,
                "ramp {ramp}, step {step}, {seen} tokens: {got}, expected {expected}"
            );
        }
        let batches = run.batches();
        assert_eq!(batches.tokens_before(steps), end as u64);
    }
}

/// 2 = the peak; the warm-up of 1000 tokens ends between two steps with the ramp and without.
fn warmed(tokens: f64, after: f64) -> f64 {
    if tokens < 1000.0 { 2.0 * tokens / 1000.0 } else { after }
}

#[test]
fn a_cosine_in_tokens_falls_from_the_warm_up_to_the_floor_and_stays() {
    let schedule = "warmup_tokens = 1000\ndecay_tokens = 6000\nmin_lr_fraction = 0.1\nmax_tokens = 9000";
    check(schedule, |tokens, _| {
        let angle = std::f64::consts::PI * (tokens.min(6000.0) - 1000.0) / 5000.0;
        warmed(tokens, 0.2 + 1.8 * (1.0 + angle.cos()) / 2.0)
    });
}

#[test]
fn a_cosine_without_a_length_ends_with_the_run() {
    check("warmup_tokens = 1000\nmin_lr_fraction = 0.0\nmax_steps = 50", |tokens, end| {
        let angle = std::f64::consts::PI * (tokens - 1000.0) / (end - 1000.0);
        warmed(tokens, 1.0 + angle.cos())
    });
}

#[test]
fn wsd_turns_its_corner_at_the_decay_before_the_end() {
    let schedule =
        "kind = \"wsd\"\nwarmup_tokens = 1000\ndecay_tokens = 2560\nmin_lr_fraction = 0.25\nmax_steps = 60";
    check(schedule, |tokens, end| {
        let corner = end - 2560.0;
        let fallen = ((tokens - corner) / 2560.0).max(0.0);
        warmed(tokens, 2.0 - 1.5 * fallen)
    });
}

#[test]
fn a_constant_rate_stays_after_the_warm_up() {
    check("kind = \"constant\"\nwarmup_tokens = 1000\nmax_tokens = 9001", |tokens, _| warmed(tokens, 2.0));
}

#[test]
fn breakpoints_that_fall_on_a_step_belong_to_what_comes_after() {
    // Without a ramp, update s has 256 s tokens: the warm-up ends with the fourth, the decay with the
    // twelfth; half way down it is half way between peak and floor.
    let run = run("warmup_tokens = 1024\ndecay_tokens = 3072\nmin_lr_fraction = 0.5\nmax_steps = 20", false);
    let rates = [0, 2, 3, 7, 11, 12, 19].map(|step| run.lr(step));
    let expected = [0.5, 1.5, 2.0, 1.5, 1.0, 1.0, 1.0];
    assert!(rates.iter().zip(expected).all(|(rate, expected)| (rate - expected).abs() < 1e-12), "{rates:?}");
}

#[test]
fn the_end_in_tokens_is_the_first_update_that_has_seen_them() {
    for (tokens, steps) in [(3359, 45), (3360, 45), (3361, 46), (3616, 46), (3617, 47)] {
        assert_eq!(run(&format!("max_tokens = {tokens}"), true).max_steps(), steps, "{tokens} tokens");
    }
}
