//! The model against PyTorch: forward, loss and every gradient of a small GPT-2, dense and banded, and
//! ten AdamW updates, from the golden files that `tests/reference` makes.
#![allow(clippy::unwrap_used)] // how a test fails

use configs::{ModelConfig, OptimConfig, Pattern};
use ops::collectives::Solo;
use ops::{AdamWStep, FlatSegment, Moments};
use safetensors::{Dtype, SafeTensors};
use std::path::Path;
use tch::{Device, Kind, Tensor};
use trainer::{Accumulation, Gpt, GradientStep, MicroBatch, Timing};

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
    let mut model = Gpt::zeros(&config, Device::Cpu).unwrap();
    for segment in model.segments() {
        for (i, spec) in segment.spec().tensors.iter().enumerate() {
            let value = golden.get(&format!("param.{}", spec.name));
            tch::no_grad(|| real_rows(segment.tensor(i), &value).copy_(&value));
        }
    }

    let tokens = Vec::<i64>::try_from(golden.get("tokens").view([-1])).unwrap();
    let batch = MicroBatch::from_rows(&tokens, 49, Device::Cpu);
    let targets = batch.targets.numel() as f64;
    let logits = model.head().logits(&model.hidden(&batch.inputs).view([-1, 64]));
    assert_close("logits", &logits.view([-1, 48, 257]), &golden.get("logits"));

    let (comm, mut timing) = (Solo::new(), Timing::default());
    let mut sums = Accumulation::new(&model, 1, true);
    let mut step = GradientStep::begin(&mut model, &comm, &mut timing, &mut sums);
    step.add(&batch, 1.0 / targets).unwrap();
    let nats = step.finish().unwrap().nats;
    let loss = golden.get("loss").double_value(&[0]);
    assert!((nats / targets / loss - 1.0).abs() < 1e-6, "loss {} is not {loss}", nats / targets);
    for segment in model.segments() {
        for (i, spec) in segment.spec().tensors.iter().enumerate() {
            let expected = golden.get(&format!("grad.{}", spec.name));
            assert_close(&spec.name, &real_rows(segment.tensor_grad(i), &expected), &expected);
        }
    }
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
    let mut model = Gpt::zeros(&config, Device::Cpu).unwrap();
    model.init(5);
    let tokens: Vec<i64> = (0..4 * 17).map(|i| (i * i * 7 + 3 * i) % 100).collect();
    let gradient = |model: &mut Gpt, parts: &[&[i64]], reproducible| {
        let (comm, mut timing) = (Solo::new(), Timing::default());
        let mut sums = Accumulation::new(model, parts.len() as u64, reproducible);
        let mut step = GradientStep::begin(model, &comm, &mut timing, &mut sums);
        for part in parts {
            step.add(&MicroBatch::from_rows(part, 17, Device::Cpu), 1.0 / 64.0).unwrap();
        }
        step.finish().unwrap();
        model.segments().iter().map(|segment| segment.grad().copy()).collect::<Vec<Tensor>>()
    };
    let whole = gradient(&mut model, &[&tokens], true);
    for reproducible in [false, true] {
        let halves = gradient(&mut model, &[&tokens[..34], &tokens[34..]], reproducible);
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
    let segment = FlatSegment::zeros(spec, Device::Cpu).unwrap();
    let mut moments = Moments::zeros(&segment);
    let names = ["matrix", "bias"];
    tch::no_grad(|| {
        for (i, name) in names.iter().enumerate() {
            segment.tensor(i).shallow_clone().copy_(&golden.get(&format!("param.{name}")));
        }
    });
    for step in 0..10 {
        for (i, name) in names.iter().enumerate() {
            segment.tensor_grad(i).shallow_clone().copy_(&golden.get(&format!("grads.{name}")).get(step));
        }
        let update = AdamWStep { lr: optim.lr, t: step as u64 + 1, grad_scale: 1.0 };
        ops::adamw(&segment, &mut moments, &optim, update).unwrap();
        for (i, name) in names.iter().enumerate() {
            let expected = golden.get(&format!("params.{name}")).get(step);
            assert_close(&format!("{name} after update {}", step + 1), segment.tensor(i), &expected);
            let spec = &segment.spec().tensors[i];
            for (moment, flat) in [("exp_avg", &moments.exp_avg), ("exp_avg_sq", &moments.exp_avg_sq)] {
                let got = flat.narrow(0, spec.offset as i64, spec.numel() as i64).view(spec.shape.as_slice());
                let expected = golden.get(&format!("{moment}.{name}")).get(step);
                assert_close(&format!("{moment} of {name} after update {}", step + 1), &got, &expected);
            }
        }
    }
}
