//! Steps of a configuration on made-up tokens and without files: what benchmarks time.
//! Knows nothing of what is measured.

use crate::engine::{Engine, MicroBatch};
use crate::error::TrainError;
use crate::gradients::Gradients;
use crate::model::Gpt;
use crate::optimizer::Optimizer;
use crate::timing::{Phase, Timing};
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
    /// Updates made.
    made: u64,
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
        Ok(Steps { comm, learner: Learner { engine, optimizer }, batches, targets, made: 0 })
    }

    /// Makes the next update. Collective.
    pub(super) fn make(&mut self, timing: &mut Timing) -> Result<(), TrainError> {
        let Learner { engine, optimizer } = &mut self.learner;
        engine.begin(self.batches.len() as u64, false);
        for batch in &self.batches {
            engine.add(batch, 1.0 / self.targets as f64, timing)?;
        }
        let gradient = engine.finish(timing)?;
        // What ranks agree on in a step, and what they wait for.
        let mut squares = [gradient.squares.value()];
        self.comm.all_reduce_f64(&mut squares)?;
        let started = timing.now();
        optimizer.update(engine, self.made, 1e-6, squares[0].sqrt())?;
        timing.add(Phase::Optimizer, started);
        self.made += 1;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::recorder::{Recorder, Started};
    use super::*;
    use configs::plan::{Costs, Simulation, Trouble};
    use configs::{
        Act, Collective, Dtype, ModelConfig, Norm, Objective, Pattern, Recompute, Shard, step_acts,
    };
    use ops::collectives::{Operation, Wire};
    use tch::Kind;

    const RANKS: usize = 4;

    fn config(shard: Shard, norm: Norm, dtype: Dtype, micro_steps: u64) -> RunConfig {
        let demo = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/demo.toml");
        let mut config = configs::load(&demo, &[], &|_| Ok(257)).unwrap();
        (config.model.n_layer, config.model.n_head, config.model.n_embd) = (3, 2, 64);
        (config.model.seq_len, config.model.norm) = (16, norm);
        (config.batch.micro_batch, config.batch.ramp) = (1, None);
        config.batch.global_batch_tokens = 16 * RANKS as u64 * micro_steps;
        (config.parallel.shard, config.parallel.dtype) = (shard, dtype);
        config.parallel.reproducible = Some(dtype == Dtype::Fp32);
        config
    }

    /// What the schedule starts, as the engine would say it.
    fn scheduled(acts: &[Act]) -> Vec<Started> {
        let calls = acts.iter().filter_map(|act| if let Act::Start(call) = act { Some(call) } else { None });
        let started = calls.map(|call| {
            let (shard_numel, half) = (call.slice_numel, call.width == 2);
            let wire = if half { Wire::Bf16 } else { Wire::Fp32 };
            match call.collective {
                Collective::AllReduce => (Operation::AllReduce { wire }, call.numel, Kind::Float),
                Collective::ReduceScatter => {
                    (Operation::ReduceScatter { shard_numel, wire }, call.numel, Kind::Float)
                }
                Collective::AllGather => {
                    let kind = if half { Kind::BFloat16 } else { Kind::Float };
                    (Operation::AllGather { shard_numel }, call.numel, kind)
                }
            }
        });
        started.collect()
    }

    /// With the embedding of BERT's.
    fn with_norm(model: ModelConfig) -> ModelConfig {
        ModelConfig { embedding_norm: true, token_types: 2, attention: vec![Pattern::Bidirectional], ..model }
    }

    #[test]
    fn a_step_starts_the_collectives_of_the_schedule_in_its_order_and_sizes_in_every_mode() {
        let shards = [Shard::None, Shard::Optimizer, Shard::Gradients, Shard::Parameters];
        let kinds = [
            (Norm::Pre, Dtype::Fp32, false),
            (Norm::Pre, Dtype::Bf16, false),
            (Norm::Post, Dtype::Fp32, false),
            (Norm::Post, Dtype::Bf16, true),
        ];
        for shard in shards {
            for ((norm, dtype, masked), micro_steps) in
                kinds.into_iter().flat_map(|kind| [(kind, 1), (kind, 2)])
            {
                for recompute in [Recompute::None, Recompute::Full] {
                    let mut config = config(shard, norm, dtype, micro_steps);
                    config.parallel.recompute = recompute;
                    if masked {
                        config.model =
                            ModelConfig { objective: Objective::Masked, ..with_norm(config.model) };
                    }
                    let case = format!("{shard:?} {norm:?} {dtype:?} {masked} {micro_steps} {recompute:?}");
                    let setup = Setup::of(&config, RANKS, true, dtype == Dtype::Bf16).unwrap();
                    let group = Recorder::of(RANKS);
                    let mut steps = Steps::new(&config, &setup, &group).unwrap();
                    let acts = step_acts(&config.model, &setup);
                    group.take();
                    steps.make(&mut Timing::default()).unwrap();
                    assert_eq!(group.take(), scheduled(&acts), "{case}");
                    simulates(&config, &setup, &acts);
                }
            }
        }
    }

    /// The same acts are what the simulation runs.
    fn simulates(config: &RunConfig, setup: &Setup, acts: &[Act]) {
        let machine = configs::plan::Machine::named("cpu", 1).unwrap();
        let (between, per_node) = (machine.between.clone(), RANKS);
        let cluster = configs::plan::Cluster { machine, between, per_node, disk_bytes_per_s: 1e9 };
        let costs = Costs::new(&cluster, &config.model, setup);
        let trouble = Trouble::default();
        assert!(Simulation::new(acts, &costs, RANKS, &trouble).step().seconds > 0.0);
    }
}
