//! What a step is made of, each for itself and on all ranks at the same time: a product, attention, a pass over
//! memory. Knows how each is timed; not which sizes matter.

use super::{median, most, slowest};
use crate::error::TrainError;
use configs::plan::{LOGIT_BYTES, UPDATE_BYTES};
use configs::{Init, ModelConfig, OptimConfig, Pattern, SegmentSpec, TensorSpec};
use ops::collectives::{Communicator, Operation, Wire};
use ops::{AdamWSlice, AdamWStep, Gelu, Layer, Moments, Weights};
use std::sync::Arc;
use std::time::Instant;
use tch::{Device, Kind, Tensor};

/// Width of a head, as the papers' models have it.
const HEAD_DIM: i64 = 64;

/// Seconds that a primitive is repeated for, and counts as one turn.
const TURN_S: f64 = 0.01;

/// GPT-2's, whose logits the loss passes over.
pub(super) const VOCAB_SIZE: i64 = 50_257;

/// Numbers that the plan counts for an element of the residual stream in a block's forward and backward, beside
/// products: 16 kept, each written and read, and twice that.
const PASS_NUMBERS: f64 = 96.0;

/// Times primitives on ranks.
pub(super) struct Primitives<'a> {
    pub(super) comm: &'a dyn Communicator,
    /// Turns, of which the middle one counts.
    pub(super) turns: usize,
}

impl Primitives<'_> {
    /// A layer's product of `[rows, inner]` and `[inner, columns]` with its bias, and their gradients, those of weight
    /// and bias added to fp32 sums as a step adds them: FLOP/s.
    pub(super) fn product(
        &self,
        kind: Kind,
        shape @ [rows, inner, columns]: [i64; 3],
    ) -> Result<f64, TrainError> {
        let (x, grad) = (leaf(&random([rows, inner], kind)), random([rows, columns], kind));
        let (parameters, sums) = layer(kind, shape)?;
        parameters.accumulate_into(&sums)?;
        let layer = Layer { weight: parameters.tensor("weight"), bias: parameters.get("bias") };
        let seconds = self.seconds(|| {
            let y = layer.of(&x);
            ops::backward(&y, &grad).expect("a layer has a gradient of its output's shape");
        })?;
        Ok(3.0 * 2.0 * (rows * inner * columns) as f64 / seconds)
    }

    /// The same as the head has it, whose weight's gradient is added a chunk of rows at a time.
    pub(super) fn head_product(
        &self,
        kind: Kind,
        shape @ [rows, inner, columns]: [i64; 3],
    ) -> Result<f64, TrainError> {
        if kind == Kind::BFloat16 && ops::device::has_matrix_unit() {
            return self.product(kind, shape);
        }
        // Widened as a whole, before the first chunk.
        let kind = Kind::Float;
        let (x, weight, grad) =
            (random([rows, inner], kind), random([columns, inner], kind), random([rows, columns], kind));
        let mut sums = Tensor::zeros([columns, inner], (kind, Device::Cpu));
        let seconds = self.seconds(|| {
            let _ = x.matmul(&weight.transpose(0, 1));
            let _ = grad.matmul(&weight);
            let _ = sums.addmm_(&grad.transpose(0, 1), &x);
        })?;
        Ok(3.0 * 2.0 * (rows * inner * columns) as f64 / seconds)
    }

    /// Dense causal attention of eight heads, forward and backward: FLOP/s of the pairs kept.
    pub(super) fn attention(&self, kind: Kind, seq_len: i64) -> Result<f64, TrainError> {
        const HEADS: i64 = 8;
        // In memory as a layer has them, with heads side by side.
        let like_a_layers = || random([1, seq_len, HEADS, HEAD_DIM], kind).transpose(1, 2);
        let inputs = [like_a_layers(), like_a_layers(), like_a_layers()];
        let grad = like_a_layers();
        let seconds = self.seconds(|| {
            let [q, k, v] = inputs.each_ref().map(leaf);
            let output = ops::attention(&q, &k, &v, Pattern::Dense, None);
            ops::backward(&output, &grad).expect("attention has a gradient of its output's shape");
        })?;
        let pairs = Pattern::Dense.pairs(seq_len as usize) as f64;
        Ok(3.0 * 4.0 * (HEADS * HEAD_DIM) as f64 * pairs / seconds)
    }

    /// What a block does beside products and attention, forward and backward, on a residual stream of so many
    /// elements: two norms, two sums, a GELU where that is a pass. Bytes per second, counted as the plan counts
    /// them.
    pub(super) fn pass(&self, kind: Kind, elements: i64) -> Result<f64, TrainError> {
        const C: i64 = 256;
        let rows = (elements / C).max(1);
        let (stream, inside) = (random([rows, C], kind), random([rows, 4 * C], kind));
        let (gain, bias) = (leaf(&Tensor::ones([C], (kind, Device::Cpu))), leaf(&random([C], kind)));
        let seconds = self.seconds(|| {
            for _ in 0..2 {
                let x = leaf(&stream);
                let sum = &x + x.layer_norm([C], Some(&gain), Some(&bias), 1e-5, false);
                ops::backward(&sum, &stream).expect("a sum has a gradient of its shape");
            }
            if kind != Kind::BFloat16 || !ops::device::has_matrix_unit() {
                let hidden = leaf(&inside);
                let y = ops::gelu(&hidden, Gelu::Tanh);
                ops::backward(&y, &inside).expect("a GELU has a gradient of its shape");
            }
            // Heads put side by side.
            let _ = (stream.to_dtype(kind, false, true), inside.to_dtype(kind, false, true));
        })?;
        let width = if kind == Kind::Float { 4.0 } else { 2.0 };
        Ok(PASS_NUMBERS * width * (rows * C) as f64 / seconds)
    }

    /// The loss's passes over the logits of so many rows: bytes per second, counted as the plan counts them.
    pub(super) fn loss(&self, kind: Kind, rows: i64) -> Result<f64, TrainError> {
        let by_matrix_unit = kind == Kind::BFloat16 && ops::device::has_matrix_unit();
        let given = random([rows, VOCAB_SIZE], if by_matrix_unit { kind } else { Kind::Float });
        let targets = Tensor::zeros([rows], (Kind::Int64, Device::Cpu));
        let seconds = self.seconds(|| {
            if by_matrix_unit {
                ops::cross_entropy(&given, &targets, VOCAB_SIZE, 1.0).expect("logits and targets are these");
                return;
            }
            let lse = given.logsumexp([1], true);
            let mut logits = given.shallow_clone(); // where they lie
            let _ = logits.subtract_(&lse).exp_();
            let _ = logits.g_mul_scalar_(1.0);
        })?;
        Ok(LOGIT_BYTES * (rows * VOCAB_SIZE) as f64 / seconds)
    }

    /// A copy of so many bytes: bytes per second, read and written.
    pub(super) fn copy(&self, bytes: usize) -> Result<f64, TrainError> {
        let from = random([(bytes / 4).max(1) as i64], Kind::Float);
        let mut to = from.zeros_like();
        let seconds = self.seconds(|| to.copy_(&from))?;
        Ok(2.0 * bytes as f64 / seconds)
    }

    /// Memory from the system, written once: bytes per second.
    pub(super) fn mapping(&self, numel: usize) -> Result<f64, TrainError> {
        let mut outcome = Ok(());
        let seconds = self.seconds(|| match ops::mapped_zeros(numel, Kind::Float, Device::Cpu) {
            Ok(mut zeros) => drop(zeros.fill_(1.0)),
            Err(error) => outcome = Err(error),
        })?;
        outcome?;
        Ok(4.0 * numel as f64 / seconds)
    }

    /// AdamW over a block of such a width: bytes per second, read and written.
    pub(super) fn update(&self, n_embd: usize) -> Result<f64, TrainError> {
        let model = ModelConfig { n_layer: 1, n_head: 1, n_embd, ..ModelConfig::default() };
        let spec = configs::segments(&model).swap_remove(2);
        let numel = spec.numel;
        let (param, grad) = (random([numel as i64], Kind::Float), random([numel as i64], Kind::Float));
        let mut moments = Moments::zeros(numel, Device::Cpu)?;
        let optim =
            OptimConfig { lr: 1e-6, betas: [0.9, 0.95], eps: 1e-8, weight_decay: 0.1, grad_clip: 0.0 };
        let mut outcome = Ok(());
        let seconds = self.seconds(|| {
            let mut slice = AdamWSlice {
                spec: &spec,
                range: 0..numel,
                param: &param,
                grad: &grad,
                moments: &mut moments,
                weights: None,
            };
            let step = AdamWStep { lr: optim.lr, t: 1, grad_scale: 1.0 };
            if let Err(error) = ops::adamw(&mut slice, &optim, step) {
                outcome = Err(error);
            }
        })?;
        outcome?;
        Ok(UPDATE_BYTES * numel as f64 / seconds)
    }

    /// The share of a core that a sum between nodes takes from products beside it.
    pub(super) fn beside(&self) -> Result<f64, TrainError> {
        tch::set_num_threads(1);
        let a = random([512, 512], Kind::Float);
        let buffer = self.comm.buffer(1 << 23, Kind::Float)?;
        let rate_of = |seconds: f64| {
            let (began, mut products) = (Instant::now(), 0);
            while began.elapsed().as_secs_f64() < seconds {
                let _ = a.matmul(&a);
                products += 1;
            }
            f64::from(products) / began.elapsed().as_secs_f64()
        };
        let mut shares = Vec::new();
        for _ in 0..self.turns {
            let sum = Operation::AllReduce { wire: Wire::Fp32 };
            let seconds = slowest(self.comm, || self.comm.start(sum, &buffer)?.wait())?;
            let alone = rate_of(0.8 * seconds);
            self.comm.barrier()?;
            let under_way = self.comm.start(sum, &buffer)?;
            let beside = rate_of(0.8 * seconds);
            under_way.wait()?;
            shares.push(most(self.comm, 1.0 - beside / alone)?);
        }
        Ok(median(shares).clamp(0.0, 1.0))
    }

    /// Seconds of one repetition, on the slowest rank: the middle turn.
    fn seconds(&self, mut body: impl FnMut()) -> Result<f64, TrainError> {
        body(); // touches memory for the first time
        self.comm.barrier()?;
        let mut turns = Vec::new();
        for _ in 0..self.turns {
            let (began, mut repeated) = (Instant::now(), 0);
            while repeated == 0 || began.elapsed().as_secs_f64() < TURN_S {
                body();
                repeated += 1;
            }
            turns.push(began.elapsed().as_secs_f64() / f64::from(repeated));
        }
        Ok(most(self.comm, median(turns))?)
    }
}

fn random<const N: usize>(size: [i64; N], kind: Kind) -> Tensor {
    Tensor::randn(size, (Kind::Float, Device::Cpu)).to_kind(kind)
}

fn leaf(x: &Tensor) -> Tensor {
    x.detach().set_requires_grad(true)
}

/// A layer's weight and bias, and the fp32 sums of their gradients.
fn layer(kind: Kind, [_, inner, columns]: [i64; 3]) -> Result<(Weights, Tensor), TrainError> {
    let tensor = |name: &str, shape: Vec<i64>, offset| TensorSpec {
        name: format!("layer.{name}"),
        shape,
        offset,
        init: Init::Zeros,
        decay: false,
    };
    let (weights, numel) = (inner * columns, (inner + 1) * columns);
    let tensors =
        vec![tensor("weight", vec![columns, inner], 0), tensor("bias", vec![columns], weights as usize)];
    let spec = Arc::new(SegmentSpec { name: "layer".into(), tensors, numel: numel as usize });
    let sums = Tensor::zeros([numel], (Kind::Float, Device::Cpu));
    Ok((Weights::over(&spec, random([numel], kind))?, sums))
}
