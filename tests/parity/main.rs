//! The model against PyTorch: forward, loss and every gradient of a small GPT-2, dense and banded, and
//! ten AdamW updates, from the golden files that `tests/reference` makes; models of `transformers`, there
//! and back; and the gradients of a masked model against the slope of its loss.
#![allow(clippy::unwrap_used)] // how a test fails

mod exchange;
mod masked;
#[path = "../support/mod.rs"]
mod support;

use configs::{ModelConfig, OptimConfig, Pattern, Recompute, Shard};
use ops::collectives::Solo;
use ops::{AdamWSlice, AdamWStep, Moments, view};
use safetensors::{Dtype, SafeTensors};
use std::path::Path;
use tch::{Device, Kind, Tensor};
use trainer::{Engine, Gpt, Gradients, MicroBatch, Parameters, Timing};

/// Largest accepted ‖a - b‖ / ‖b‖. PyTorch's own fp32 is up to 1.1e-6 from float64 on these models.
const TOLERANCE: f64 = 1e-5;

struct Golden {
    bytes: Vec<u8>,
}

impl Golden {
    fn read(name: &str) -> Golden {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(name);
        Golden { bytes: std::fs::read(&path).unwrap() }
    }

    fn get(&self, name: &str) -> Tensor {
        let file = SafeTensors::deserialize(&self.bytes).unwrap();
        let view = file.tensor(name).unwrap();
        let shape: Vec<i64> = view.shape().iter().map(|&n| n as i64).collect();
        let kind = match view.dtype() {
            Dtype::F32 => Kind::Float,
            Dtype::I64 => Kind::Int64,
            other => panic!("{name} is {other:?}"),
        };
        Tensor::from_data_size(view.data(), &shape, kind)
    }
}

fn assert_close(name: &str, got: &Tensor, golden: &Tensor) {
    assert_eq!(got.size(), golden.size(), "{name}");
    let norm = |x: &Tensor| x.to_kind(Kind::Double).norm().double_value(&[]);
    let (distance, scale) = (norm(&(got.to_kind(Kind::Double) - golden.to_kind(Kind::Double))), norm(golden));
    assert!(distance <= TOLERANCE * scale, "{name}: off by {distance:e} of {scale:e}");
}

/// Rows that a tensor has in a checkpoint: the embedding's padding is left out.
fn real_rows(tensor: &Tensor, golden: &Tensor) -> Tensor {
    tensor.narrow(0, 0, golden.size()[0])
}

fn check_model(file: &str, attention: Vec<Pattern>) {
    let golden = Golden::read(file);
    let config = ModelConfig {
        n_layer: 3,
        n_head: 4,
        n_embd: 64,
        seq_len: 48,
        vocab_size: 257,
        attention,
        ..ModelConfig::default()
    };
    let comm = Solo::new();
    let mut engine = engine(&config, &comm, 1, true);
    for index in 0..engine.parameters().len() {
        for spec in &engine.parameters().spec(index).tensors {
            let value = golden.get(&format!("param.{}", spec.name));
            let tensor = view(engine.parameters().master(index), spec).unwrap();
            tch::no_grad(|| real_rows(&tensor, &value).copy_(&value));
        }
    }

    let tokens = Vec::<i64>::try_from(golden.get("tokens").view([-1])).unwrap();
    let batch = MicroBatch::from_rows(&tokens, 49, Device::Cpu);
    let targets = batch.targets.numel() as f64;
    assert_close("logits", &engine.logits(&batch.inputs).unwrap(), &golden.get("logits"));

    let mut timing = Timing::default();
    engine.begin(1, false);
    engine.add(&batch, 1.0 / targets, &mut timing).unwrap();
    let nats = engine.finish(&mut timing).unwrap().nats().value();
    let loss = golden.get("loss").double_value(&[0]);
    assert!((nats / targets / loss - 1.0).abs() < 1e-6, "loss {} is not {loss}", nats / targets);
    for index in 0..engine.parameters().len() {
        for spec in &engine.parameters().spec(index).tensors {
            let expected = golden.get(&format!("grad.{}", spec.name));
            let got = view(&engine.gradients().of_held(index), spec).unwrap();
            assert_close(&spec.name, &real_rows(&got, &expected), &expected);
        }
    }
}

/// A model of zeros on one rank.
fn engine<'a>(config: &ModelConfig, comm: &'a Solo, leaves: u64, reproducible: bool) -> Engine<'a> {
    let segments = configs::segments(config);
    let parameters = Parameters::zeros(segments, Shard::None, Kind::Float, Device::Cpu, comm).unwrap();
    let gradients = Gradients::new(&parameters, leaves, reproducible, comm).unwrap();
    Engine::new(Gpt::new(config), parameters, gradients, Recompute::None)
}

#[test]
fn forward_loss_and_every_gradient_equal_transformers_gpt2() {
    check_model("gpt2-tiny.safetensors", vec![Pattern::Dense]);
}

#[test]
fn a_banded_layer_equals_its_masked_softmax_in_the_whole_model() {
    check_model("gpt2-tiny-banded.safetensors", vec![Pattern::Dense, Pattern::Banded(7), Pattern::Dense]);
}

#[test]
fn two_micro_batches_add_up_to_the_gradient_of_their_union() {
    let config = ModelConfig {
        n_layer: 2,
        n_head: 2,
        n_embd: 32,
        seq_len: 16,
        vocab_size: 100,
        attention: vec![Pattern::Dense, Pattern::Banded(4)],
        ..ModelConfig::default()
    };
    let tokens: Vec<i64> = (0..4 * 17).map(|i| (i * i * 7 + 3 * i) % 100).collect();
    let gradient = |parts: &[&[i64]], reproducible| {
        let (comm, mut timing) = (Solo::new(), Timing::default());
        let mut engine = engine(&config, &comm, parts.len() as u64, reproducible);
        engine.parameters_mut().init(5);
        engine.begin(parts.len() as u64, false);
        for part in parts {
            let batch = MicroBatch::from_rows(part, 17, Device::Cpu);
            engine.add(&batch, 1.0 / 64.0, &mut timing).unwrap();
        }
        engine.finish(&mut timing).unwrap();
        let all = 0..engine.parameters().len();
        all.map(|index| engine.gradients().of_held(index)).collect::<Vec<Tensor>>()
    };
    let whole = gradient(&[&tokens], true);
    for reproducible in [false, true] {
        let halves = gradient(&[&tokens[..34], &tokens[34..]], reproducible);
        for (i, (whole, halves)) in whole.iter().zip(&halves).enumerate() {
            assert_close(&format!("segment {i}"), halves, whole);
        }
    }
}

#[test]
fn ten_adamw_updates_equal_torch() {
    let golden = Golden::read("adamw.safetensors");
    let optim = OptimConfig { lr: 1e-3, betas: [0.9, 0.95], eps: 1e-8, weight_decay: 0.1, grad_clip: 0.0 };
    let tensor = |name: &str, shape: Vec<i64>, offset, decay| configs::TensorSpec {
        name: name.into(),
        shape,
        offset,
        init: configs::Init::Zeros,
        decay,
    };
    let tensors = vec![tensor("matrix", vec![13, 7], 0, true), tensor("bias", vec![13], 96, false)];
    let spec = configs::SegmentSpec { name: "toy".into(), tensors, numel: 128 };
    let [param, grad] = [0; 2].map(|_| Tensor::zeros([128], (Kind::Float, Device::Cpu)));
    let moments = Moments::zeros(128, Device::Cpu).unwrap();
    for tensor in &spec.tensors {
        view(&param, tensor).unwrap().copy_(&golden.get(&format!("param.{}", tensor.name)));
    }
    for step in 0..10 {
        for tensor in &spec.tensors {
            let value = golden.get(&format!("grads.{}", tensor.name)).get(step);
            view(&grad, tensor).unwrap().copy_(&value);
        }
        let update = AdamWStep { lr: optim.lr, t: step as u64 + 1, grad_scale: 1.0 };
        // In two slices, as two ranks would: the cut lies within the matrix.
        for range in [0..50, 50..128] {
            let part = |flat: &Tensor| flat.narrow(0, range.start as i64, range.len() as i64);
            let mut moments =
                Moments { exp_avg: part(&moments.exp_avg), exp_avg_sq: part(&moments.exp_avg_sq) };
            let (param, grad) = (&part(&param), &part(&grad));
            let mut slice = AdamWSlice {
                spec: &spec,
                range: range.clone(),
                param,
                grad,
                moments: &mut moments,
                weights: None,
            };
            ops::adamw(&mut slice, &optim, update).unwrap();
        }
        for tensor in &spec.tensors {
            let expected = golden.get(&format!("params.{}", tensor.name)).get(step);
            let what = |kind: &str| format!("{kind} of {} after update {}", tensor.name, step + 1);
            assert_close(&what("param"), &view(&param, tensor).unwrap(), &expected);
            for (kind, flat) in [("exp_avg", &moments.exp_avg), ("exp_avg_sq", &moments.exp_avg_sq)] {
                let expected = golden.get(&format!("{kind}.{}", tensor.name)).get(step);
                assert_close(&what(kind), &view(flat, tensor).unwrap(), &expected);
            }
        }
    }
}

/// What the loss of a row's second document changes by when the first one is another.
fn leak(pattern: &str, end_of_text: Option<i64>) -> f64 {
    let (t, end, comm) = (40, 99, Solo::new());
    let config = ModelConfig {
        n_layer: 2,
        n_head: 2,
        n_embd: 32,
        seq_len: t,
        vocab_size: 100,
        attention: vec![pattern.parse().unwrap()],
        ..ModelConfig::default()
    };
    let mut engine = engine(&config, &comm, 1, true);
    engine.parameters_mut().init(5);
    let document = |n: usize, seed: i64| (0..n as i64).map(move |i| (i * i * seed + 3 * i) % 99);
    // Seventeen tokens, end of text, and a document that begins with the same token whatever it is.
    let mut loss = |first: i64, second: i64| {
        let row: Vec<i64> = document(17, first).chain([end]).chain(document(t - 17, second)).collect();
        let mut batch = MicroBatch::from_rows(&row, t + 1, Device::Cpu);
        batch.keep_to_documents(&row, t + 1, end_of_text);
        engine.loss(Some(&batch)).unwrap()
    };
    let of_second = |loss: &mut dyn FnMut(i64, i64) -> f64, first| loss(first, 7) - loss(first, 11);
    (of_second(&mut loss, 2) - of_second(&mut loss, 5)).abs()
}

#[test]
fn within_documents_the_loss_of_one_does_not_depend_on_another() {
    for pattern in ["dense", "banded:30", "strided:7", "fixed:8,3"] {
        let (masked, open) = (leak(pattern, Some(99)), leak(pattern, None));
        assert!(masked < 2e-5, "{pattern}: {masked}");
        assert!(open > 20.0 * masked, "{pattern}: {open} without documents, {masked} with");
    }
}
