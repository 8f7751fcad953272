//! A small training run without files: made-up tokens, an engine, an optimizer. The same on any device
//! and number of ranks. Knows nothing of what is compared.

use crate::engine::{Engine, MicroBatch};
use crate::error::TrainError;
use crate::gradients::Gradients;
use crate::model::Gpt;
use crate::optimizer::Optimizer;
use crate::timing::{Phase, Timing};
use crate::weights::Parameters;
use configs::plan::{Machine, Room};
use configs::{ModelConfig, OptimConfig, Pattern, Philox, Recompute, Setup, Shard};
use ops::ExactSum;
use ops::collectives::Communicator;
use tch::{Device, Kind, Tensor};

/// What is trained, and in which steps.
#[derive(Debug, Clone)]
pub(super) struct Shape {
    pub(super) model: ModelConfig,
    /// Sequences of a pass.
    pub(super) micro_batch: usize,
    /// Passes of a step, over all ranks.
    pub(super) passes: u64,
    /// Whether the result may not depend on the number of ranks.
    pub(super) reproducible: bool,
}

impl Shape {
    /// Small enough for a CPU within seconds, with everything in it that a model has.
    pub(super) fn small() -> Shape {
        let model = ModelConfig {
            n_layer: 3,
            n_head: 4,
            n_embd: 128,
            seq_len: 64,
            vocab_size: 257,
            attention: vec![Pattern::Dense, Pattern::Banded(16)],
            ..ModelConfig::default()
        };
        Shape { model, micro_batch: 4, passes: 2, reproducible: true }
    }

    /// The shapes that are timed, as in `tests/reference/step.py`.
    pub(super) fn timed(name: &str, micro_batch: usize) -> Option<Shape> {
        let (n_layer, n_head, n_embd, seq_len, vocab_size) = match name {
            "tiny" => (2, 2, 64, 64, 257),
            "124m" => (12, 12, 768, 1024, 50_257),
            "350m" => (24, 16, 1024, 2048, 50_257),
            "1.3b" => (24, 16, 2048, 2048, 50_257),
            "2.7b" => (32, 32, 2560, 2048, 50_257),
            _ => return None,
        };
        let model = ModelConfig { n_layer, n_head, n_embd, seq_len, vocab_size, ..ModelConfig::default() };
        Some(Shape { model, micro_batch, passes: 1, reproducible: false })
    }

    /// What one rank of it takes of a GPU that computes in `kind`, as `phalanx plan` has it.
    pub(super) fn room(&self, kind: Kind) -> Room {
        let setup = Setup {
            world_size: 1,
            shard: Shard::None,
            bf16: kind == Kind::BFloat16,
            recompute: false,
            reproducible: self.reproducible,
            micro_steps: self.passes,
            micro_batch: self.micro_batch,
            gradients_stay: Shard::None.gradients_stay(1, false),
        };
        Room::of(&self.model, &setup, &Machine::named("h200", 1).expect("a machine of that name"))
    }
}

/// A run in the making.
pub(super) struct Trial<'a> {
    shape: Shape,
    comm: &'a dyn Communicator,
    engine: Engine<'a>,
    optimizer: Optimizer,
    steps_done: u64,
}

const OPTIM: OptimConfig =
    OptimConfig { lr: 1e-3, betas: [0.9, 0.95], eps: 1e-8, weight_decay: 0.1, grad_clip: 1.0 };

impl<'a> Trial<'a> {
    /// Initial weights on `device`, computing in `kind`. Collective, as is all that follows.
    ///
    /// # Errors
    /// No memory, a failed collective.
    pub(super) fn new(
        shape: &Shape,
        kind: Kind,
        device: Device,
        comm: &'a dyn Communicator,
    ) -> Result<Trial<'a>, TrainError> {
        let segments = configs::segments(&shape.model);
        let mut parameters = Parameters::zeros(segments, Shard::None, kind, device, comm)?;
        parameters.init(1337);
        parameters.share()?;
        let passes = shape.passes / comm.world_size() as u64;
        let gradients = Gradients::new(&parameters, passes, shape.reproducible, comm)?;
        let optimizer = Optimizer::new(&OPTIM, &parameters)?;
        let engine = Engine::new(Gpt::new(&shape.model), parameters, gradients, Recompute::None);
        Ok(Trial { shape: shape.clone(), comm, engine, optimizer, steps_done: 0 })
    }

    /// The gradient of one step: the mean loss over all ranks, and the gradient's norm. What of it this
    /// rank holds is in [`Trial::gradients`].
    ///
    /// # Errors
    /// What libtorch says, a failed collective.
    pub(super) fn gradient(&mut self) -> Result<(f64, f64), TrainError> {
        self.gradient_timed(&mut Timing::default())
    }

    fn gradient_timed(&mut self, timing: &mut Timing) -> Result<(f64, f64), TrainError> {
        let Shape { model, micro_batch, passes, .. } = &self.shape;
        let (targets, mine) = ((micro_batch * model.seq_len) as u64 * passes, passes / self.ranks());
        self.engine.begin(mine, false);
        for pass in 0..mine {
            let number = self.steps_done * passes + self.comm.rank() as u64 * mine + pass;
            let batch = batch(&self.shape, number, self.engine.parameters().device());
            self.engine.add(&batch, 1.0 / targets as f64, timing)?;
        }
        let gradient = self.engine.finish(timing)?;
        let mut parts = [gradient.nats().parts(), gradient.squares.parts()].concat();
        self.comm.all_reduce_f64(&mut parts)?;
        let [nats, squares] = [0, 1].map(|i| {
            let parts = &parts[i * ExactSum::PARTS..][..ExactSum::PARTS];
            ExactSum::from_parts(parts).value()
        });
        // Every rank holds the whole gradient, and gives the squares of the slices that it owns.
        Ok((nats / targets as f64, squares.sqrt()))
    }

    /// One step; its mean loss, before the update.
    ///
    /// # Errors
    /// As [`Trial::gradient`].
    pub(super) fn step(&mut self) -> Result<f64, TrainError> {
        self.step_timed(&mut Timing::default())
    }

    /// The same, with its phases.
    ///
    /// # Errors
    /// As [`Trial::gradient`].
    pub(super) fn step_timed(&mut self, timing: &mut Timing) -> Result<f64, TrainError> {
        let (loss, norm) = self.gradient_timed(timing)?;
        let started = timing.now();
        self.optimizer.update(&mut self.engine, self.steps_done, OPTIM.lr, norm)?;
        timing.add(Phase::Optimizer, started);
        self.steps_done += 1;
        Ok(loss)
    }

    /// Takes over where another of the same shape is, whatever its device: masters, moments and steps.
    ///
    /// # Errors
    /// A failed collective.
    pub(super) fn take_over(&mut self, other: &Trial<'_>) -> Result<(), TrainError> {
        self.engine.parameters_mut().settle()?;
        for (to, from) in self.state().into_iter().zip(other.state()) {
            to.shallow_clone().copy_(&from);
        }
        self.steps_done = other.steps_done;
        self.engine.parameters_mut().publish()
    }

    /// Masters and moments, what a checkpoint holds.
    pub(super) fn state(&self) -> Vec<Tensor> {
        let parameters = self.engine.parameters();
        let masters = (0..parameters.len()).map(|index| parameters.master(index).shallow_clone());
        let moments = self.optimizer.moments().iter();
        let moments = moments.flat_map(|moments| [&moments.exp_avg, &moments.exp_avg_sq]);
        masters.chain(moments.map(Tensor::shallow_clone)).collect()
    }

    /// The losses of the next `steps` steps.
    ///
    /// # Errors
    /// As [`Trial::gradient`].
    pub(super) fn curve(&mut self, steps: usize) -> Result<Vec<f64>, TrainError> {
        (0..steps).map(|_| self.step()).collect()
    }

    /// Each segment's name and gradient.
    pub(super) fn gradients(&self) -> Vec<(String, Tensor)> {
        let parameters = self.engine.parameters();
        let gradient = |index| (parameters.spec(index).name.clone(), self.engine.gradients().of_held(index));
        (0..parameters.len()).map(gradient).collect()
    }

    /// Logits of the first pass's tokens.
    ///
    /// # Errors
    /// A failed collective.
    pub(super) fn logits(&mut self) -> Result<Tensor, TrainError> {
        let batch = batch(&self.shape, 0, self.engine.parameters().device());
        self.engine.logits(&batch.inputs)
    }

    /// Returns when the device has done all it was given.
    pub(super) fn synchronize(&self) {
        let last = self.engine.parameters().len() - 1;
        let _ = self.engine.parameters().master(last).double_value(&[0]);
    }

    fn ranks(&self) -> u64 {
        self.comm.world_size() as u64
    }
}

/// Pass `number` of a run: sequences that mostly follow a rule, so that there is something to learn.
fn batch(shape: &Shape, number: u64, device: Device) -> MicroBatch {
    let (random, row_len) = (Philox::new(7), shape.model.seq_len + 1);
    let vocabulary = shape.model.vocab_size as u64;
    let mut tokens = Vec::with_capacity(shape.micro_batch * row_len);
    let mut token = 0;
    for i in 0..shape.micro_batch * row_len {
        let [draw, other, ..] = random.at([i as u32, number as u32, 0, 0]);
        token = if draw % 8 == 0 { u64::from(other) % vocabulary } else { (5 * token + 3) % vocabulary };
        tokens.push(token as i64);
    }
    MicroBatch::from_rows(&tokens, row_len, device)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ops::collectives::Solo;

    #[test]
    fn a_trial_learns_and_repeats_itself() {
        let comm = Solo::new();
        let curve = |kind| Trial::new(&Shape::small(), kind, Device::Cpu, &comm).unwrap().curve(8).unwrap();
        let losses = curve(Kind::Float);
        assert!((losses[0] - 257f64.ln()).abs() < 0.2, "{losses:?}");
        assert!(losses[7] < losses[0] - 0.1, "{losses:?}");
        assert_eq!(losses, curve(Kind::Float));
    }

    #[test]
    fn timed_shapes_are_the_papers() {
        let parameters = |name| Shape::timed(name, 1).unwrap().model.parameters() as f64 / 1e6;
        assert!((parameters("124m") - 124.4).abs() < 0.1, "{}", parameters("124m"));
        assert!((parameters("350m") - 355.9).abs() < 1.0, "{}", parameters("350m"));
        assert!((parameters("1.3b") - 1315.0).abs() < 5.0, "{}", parameters("1.3b"));
        assert!((parameters("2.7b") - 2651.0).abs() < 10.0, "{}", parameters("2.7b"));
        assert!(Shape::timed("7b", 1).is_none());
    }
}
