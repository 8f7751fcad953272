//! The gradients of a masked model against the slope of its loss, tensor by tensor.

use crate::engine;
use configs::{Activation, ModelConfig, Norm, Objective, Pattern};
use ops::collectives::Solo;
use ops::view;
use tch::{Device, Tensor};
use trainer::{MicroBatch, Timing};

fn bert() -> ModelConfig {
    ModelConfig {
        n_layer: 2,
        n_head: 2,
        n_embd: 16,
        seq_len: 12,
        vocab_size: 40,
        attention: vec![Pattern::Bidirectional],
        norm: Norm::Post,
        objective: Objective::Masked,
        activation: Activation::Gelu,
        norm_eps: 1e-12,
        embedding_norm: true,
        token_types: 2,
        ..ModelConfig::default()
    }
}

/// Two rows, of which these positions are predicted, numbered over both.
fn batch(picked: &[i64]) -> MicroBatch {
    let tokens: Vec<i64> = (0..2 * 13).map(|i| (i * i * 7 + 3 * i) % 40).collect();
    let targets: Vec<i64> = picked.iter().map(|row| row * 5 % 40).collect();
    MicroBatch {
        targets: Tensor::from_slice(&targets),
        target_rows: Some(Tensor::from_slice(picked)),
        ..MicroBatch::from_rows(&tokens, 13, Device::Cpu)
    }
}

#[test]
fn every_gradient_is_the_slope_of_the_loss_and_a_micro_batch_without_targets_adds_nothing() {
    let (config, comm, mut timing) = (bert(), Solo::new(), Timing::default());
    let picked = [1, 4, 5, 11, 12, 20];
    let mut engine = engine(&config, &comm, 2, true);
    engine.parameters_mut().init(5);
    engine.begin(2, false);
    engine.add(&batch(&picked), 1.0, &mut timing).unwrap();
    engine.add(&batch(&[]), 1.0, &mut timing).unwrap();
    let nats = engine.finish(&mut timing).unwrap().nats().value();
    assert!((nats / engine.loss(Some(&batch(&picked))).unwrap() - 1.0).abs() < 1e-5);
    for index in 0..engine.parameters().len() {
        for spec in engine.parameters().spec(index).tensors.clone() {
            let grad = view(&engine.gradients().of_held(index), &spec).unwrap().copy();
            let norm = grad.norm().double_value(&[]);
            if norm < 1e-3 {
                continue; // such as that of the keys' biases, which change nothing
            }
            let along = |h: f64, engine: &mut trainer::Engine<'_>| {
                let value = view(engine.parameters().master(index), &spec).unwrap();
                let before = value.copy();
                tch::no_grad(|| value.shallow_clone().copy_(&(&before + &grad * (h / norm))));
                let loss = engine.loss(Some(&batch(&picked))).unwrap();
                tch::no_grad(|| value.shallow_clone().copy_(&before));
                loss
            };
            let h = 5e-3;
            let slope = (along(h, &mut engine) - along(-h, &mut engine)) / (2.0 * h);
            let off = (slope - norm).abs();
            assert!(off < 0.03 * norm + 3e-2, "{}: slope {slope}, gradient {norm}", spec.name);
        }
    }
}
