//! Steps of a configuration on made-up tokens and without files: what benchmarks time.
//! Knows nothing of what is measured.

use crate::engine::{Engine, MicroBatch};
use crate::error::TrainError;
use crate::gradients::Gradients;
use crate::model::Gpt;
use crate::optimizer::Optimizer;
use crate::timing::Timing;
use crate::train::Learner;
use crate::weights::Parameters;
use configs::{Philox, RunConfig, Setup};
use ops::collectives::Communicator;
use tch::Device;

/// A run in the making, on the CPU.
pub(super) struct Steps<'a> {
    comm: &'a dyn Communicator,
    pub(super) learner: Learner<'a>,
    batches: Vec<MicroBatch>,
    targets: u64,
}

impl<'a> Steps<'a> {
    /// The initial weights, and each rank its own tokens. Collective.
    pub(super) fn new(
        config: &RunConfig,
        setup: &Setup,
        comm: &'a dyn Communicator,
    ) -> Result<Steps<'a>, TrainError> {
        let (model, cpu) = (&config.model, Device::Cpu);
        let kind = ops::device::dtype(config.parallel.dtype, cpu);
        let segments = configs::segments(model);
        let mut parameters = Parameters::zeros(segments, config.parallel.shard, kind, cpu, comm)?;
        parameters.init(config.run.seed);
        parameters.share()?;
        let gradients = Gradients::new(&parameters, setup.micro_steps, config.reproducible(true), comm)?;
        let optimizer = Optimizer::new(&config.optim, &parameters)?;
        let engine = Engine::new(Gpt::new(model), parameters, gradients, config.parallel.recompute);
        let row_len = model.seq_len + 1;
        let batch = |number: u64| {
            let random = |i: usize| Philox::new(7).at([i as u32, number as u32, comm.rank() as u32, 0])[0];
            let tokens =
                (0..config.batch.micro_batch * row_len).map(|i| random(i) as i64 % model.vocab_size as i64);
            MicroBatch::from_rows(&tokens.collect::<Vec<i64>>(), row_len, cpu)
        };
        let targets = config.batch.global_batch_tokens;
        let batches = (0..setup.micro_steps).map(batch).collect();
        Ok(Steps { comm, learner: Learner { engine, optimizer }, batches, targets })
    }

    /// Makes update number `step`, counted from 0. Collective.
    pub(super) fn make(&mut self, step: u64, timing: &mut Timing) -> Result<(), TrainError> {
        let Learner { engine, optimizer } = &mut self.learner;
        engine.begin(self.batches.len() as u64, false);
        for batch in &self.batches {
            engine.add(batch, 1.0 / self.targets as f64, timing)?;
        }
        let gradient = engine.finish(timing)?;
        // What ranks agree on in a step, and what they wait for.
        let mut squares = [gradient.squares.value()];
        self.comm.all_reduce_f64(&mut squares)?;
        optimizer.update(engine, step, 1e-6, squares[0].sqrt())
    }
}
