//! The numbers that a run reports are what they are called.

use crate::{Bench, assert_close};

#[test]
fn the_learning_rate_is_a_warm_up_and_a_cosine() {
    let bench = Bench::new("rate", 24);
    // 6 steps of warm-up, then down to a fifth within 14, then flat.
    let arguments = "--set schedule.warmup_tokens=3072 --set schedule.decay_tokens=10240 \
                     --set schedule.min_lr_fraction=0.2";
    bench.train_alone("run", arguments).run().expect_code(0);
    let rate = |step: f64| match step {
        ..6.0 => 1e-3 * step / 6.0,
        6.0..20.0 => 2e-4 + 8e-4 * 0.5 * (1.0 + ((step - 6.0) / 14.0 * std::f64::consts::PI).cos()),
        _ => 2e-4,
    };
    let expected: Vec<f64> = (1..=24).map(|step| rate(f64::from(step))).collect();
    assert_close(&expected, &bench.left("run").of_steps("lr"), 1e-12);
}

#[test]
fn an_untrained_model_is_as_unsure_as_its_vocabulary_is_large() {
    let bench = Bench::new("unsure", 2);
    bench.train_alone("run", "").run().expect_code(0);
    let left = bench.left("run");
    let unsure = 256f64.ln();
    assert_close(&[unsure, unsure], &[left.of_evals("val_loss")[0], left.of_steps("loss")[0]], 0.05);
    assert_close(&[8.0], &[left.of_evals("bits_per_byte")[0]], 0.05);
}

#[test]
fn a_run_learns_and_counts_what_it_has_seen() {
    let bench = Bench::new("learns", 40);
    bench.train_alone("run", "--set optim.lr=1e-2").run().expect_code(0);
    let left = bench.left("run");
    let losses = left.of_steps("loss");
    assert!(losses[39] < 0.6 * losses[0], "{losses:?}");
    let tokens: Vec<f64> = (1..=40).map(|step| f64::from(step * 512)).collect();
    assert_eq!(left.of_steps("tokens"), tokens);
    assert_eq!(left.of_steps("first_sample")[39], 39.0 * 16.0);
}
