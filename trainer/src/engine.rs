//! How a step's gradient comes about: forward and backward segment by segment, each segment's flat
//! gradient leaving for the other ranks as soon as its last backward returns.
//! Knows the model's segments and the communicator; knows no schedule, no files and no metrics.

use crate::error::TrainError;
use crate::model::Gpt;
use crate::timing::{Phase, Timing};
use ops::GradientTree;
use ops::collectives::{Communicator, Operation, Pending, Wire};
use tch::{Device, Tensor};

/// One pass's tokens: `inputs` and `targets`, `[B, T]` i64 each.
#[derive(Debug)]
pub struct MicroBatch {
    /// What the model reads.
    pub inputs: Tensor,
    /// What it must predict: the inputs, one position on.
    pub targets: Tensor,
}

impl MicroBatch {
    /// From rows of T + 1 consecutive tokens.
    pub fn from_rows(tokens: &[i64], row_len: usize, device: Device) -> MicroBatch {
        let rows = Tensor::from_slice(tokens).view([-1, row_len as i64]).to_device(device);
        let t = row_len as i64 - 1;
        MicroBatch { inputs: rows.narrow(1, 0, t).contiguous(), targets: rows.narrow(1, 1, t).contiguous() }
    }
}

/// A step's gradient in the making.
pub struct GradientStep<'a> {
    model: &'a Gpt,
    comm: &'a dyn Communicator,
    timing: &'a mut Timing,
    sums: &'a mut Accumulation,
    losses: Vec<f64>,
    in_flight: Vec<Pending>,
}

/// How a rank's micro-batches of a step are added up; lives from step to step.
#[derive(Debug)]
pub struct Accumulation {
    grad_accum_steps: u64,
    /// `None`: one after the other, in the gradient buffers themselves.
    tree: Option<GradientTree>,
}

impl Accumulation {
    /// For a model and a rank's micro-steps; in a tree if the result may not depend on the ranks.
    pub fn new(model: &Gpt, grad_accum_steps: u64, reproducible: bool) -> Accumulation {
        let tree = reproducible.then(|| GradientTree::new(model.segments(), grad_accum_steps));
        Accumulation { grad_accum_steps, tree }
    }
}

/// A step's gradient, complete in the flat buffers of every rank.
#[derive(Debug, Clone, Copy)]
pub struct Gradient {
    /// The sum of this rank's losses, in nats.
    pub nats: f64,
    /// The global L2 norm, before clipping.
    pub norm: f64,
}

impl<'a> GradientStep<'a> {
    /// A step whose gradient starts at zero.
    pub fn begin(
        model: &'a mut Gpt,
        comm: &'a dyn Communicator,
        timing: &'a mut Timing,
        sums: &'a mut Accumulation,
    ) -> GradientStep<'a> {
        model.segments_mut().iter_mut().for_each(ops::FlatSegment::zero_grad);
        GradientStep { model, comm, timing, sums, losses: Vec::new(), in_flight: Vec::new() }
    }

    /// Adds the gradient of the micro-batch's summed loss times `scale`. In the last micro-step each
    /// segment's gradient leaves once it is complete.
    ///
    /// # Errors
    /// What libtorch or the communicator says.
    pub fn add(&mut self, batch: &MicroBatch, scale: f64) -> Result<(), TrainError> {
        let model = self.model;
        let n_layer = model.config().n_layer;

        // Forward. Each segment is differentiated by autograd inside, by this function outside: its
        // input is a leaf, so that the graph ends at the segment's edge.
        let started = self.timing.now();
        let leaf = |x: Tensor| x.detach().set_requires_grad(true);
        let mut inputs = vec![leaf(tch::no_grad(|| model.embed(&batch.inputs)))];
        let mut outputs = Vec::with_capacity(n_layer);
        for layer in 0..n_layer {
            outputs.push(model.block(layer, &inputs[layer]));
            inputs.push(leaf(outputs[layer].shallow_clone()));
        }
        let hidden = model.final_norm(&inputs[n_layer]);
        let started = self.timing.add(Phase::Forward, started);

        // Backward, last segment first.
        let (loss, hidden_grad) = tch::no_grad(|| {
            let rows = hidden.view([-1, model.config().n_embd as i64]);
            model.head().loss_and_grad(&rows, &batch.targets.view([-1]), model.head_grad(), scale)
        });
        ops::backward(&hidden, &hidden_grad.view_as(&hidden))?;
        self.complete(model.norm_segment())?;
        for layer in (0..n_layer).rev() {
            let grad = inputs.pop().map(|input| input.grad()).expect("one input per segment");
            let output = outputs.pop().expect("one output per block");
            ops::backward(&output, &grad)?;
            self.complete(model.block_segment(layer))?;
        }
        tch::no_grad(|| model.embed_backward(&batch.inputs, &inputs[0].grad()));
        self.complete(1)?;
        self.complete(0)?; // tied: complete only now
        self.losses.push(loss);
        self.timing.add(Phase::Backward, started);
        Ok(())
    }

    /// Runs `body` on the step's clock, under `phase`.
    pub fn time<T>(&mut self, phase: Phase, body: impl FnOnce() -> T) -> T {
        let started = self.timing.now();
        let result = body();
        self.timing.add(phase, started);
        result
    }

    /// The micro-batch's gradient of a segment is in its buffer.
    fn complete(&mut self, index: usize) -> Result<(), TrainError> {
        let (segment, leaf) = (&self.model.segments()[index], self.losses.len() as u64);
        if let Some(tree) = &mut self.sums.tree {
            tree.add_leaf(segment, index, leaf);
        }
        if leaf + 1 == self.sums.grad_accum_steps {
            self.in_flight.push(self.comm.start(Operation::AllReduce { wire: Wire::Fp32 }, segment.grad())?);
        }
        Ok(())
    }

    /// Waits until every segment's gradient is the sum over all ranks.
    ///
    /// # Errors
    /// A failed collective.
    pub fn finish(self) -> Result<Gradient, TrainError> {
        let started = self.timing.now();
        self.in_flight.into_iter().try_for_each(Pending::wait)?;
        let started = self.timing.add(Phase::Reduce, started);
        let mut sum = 0.0;
        for segment in self.model.segments() {
            sum += ops::sum_squares(segment.grad())?;
        }
        self.timing.add(Phase::Optimizer, started);
        Ok(Gradient { nats: ops::tree_total(&self.losses), norm: sum.sqrt() })
    }
}
