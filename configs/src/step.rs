//! What a rank does in a step, in order: what it computes, which collectives it starts on which segment,
//! and when it waits for them. Written after `trainer`'s engine, act by act; the plan and the simulation run it.
//! Knows no time, no tensors and no network.

use crate::{ModelConfig, SegmentSpec, Setup, Shard, segments, slice_numel};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;

/// One thing that a rank does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Act {
    /// Computes.
    Compute(Work),
    /// Starts a collective, and goes on.
    Start(Call),
    /// Waits until the last collective on a segment's weights or gradient is complete.
    Wait(Cargo, usize),
    /// Agrees with all ranks on a few numbers: loss, norm, stop.
    Agree,
}

/// What is computed, of one micro-batch unless it says otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    /// Tokens and positions are looked up.
    Embed,
    /// A block's forward pass.
    Forward(usize),
    /// The last norm, or a masked model's transform, head and loss, forward and backward.
    Head,
    /// A block's forward pass again, for its backward.
    Recompute(usize),
    /// A block's backward pass.
    Backward(usize),
    /// The gradients of tokens and positions.
    EmbedBackward,
    /// The update of what the rank holds of a segment, once a step.
    Update(usize),
}

/// What a collective carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cargo {
    /// A segment's weights.
    Weights,
    /// A segment's gradient.
    Gradient,
}

/// Which collective.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Collective {
    /// The sum for all.
    AllReduce,
    /// Each rank's slice of the sum.
    ReduceScatter,
    /// Everybody's slices for all.
    AllGather,
}

/// A collective on a segment's flat buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Call {
    /// Which.
    pub collective: Collective,
    /// What it carries.
    pub cargo: Cargo,
    /// The segment, by its index.
    pub segment: usize,
    /// Elements of the buffer.
    pub numel: usize,
    /// Elements of a rank's slice, where there are slices.
    pub slice_numel: usize,
    /// Bytes of an element on its way.
    pub width: u64,
    /// Whether the buffer comes and goes, so that the ranks of a node cannot reach into it.
    pub passing: bool,
}

impl Call {
    /// Bytes of the whole buffer on its way.
    pub fn bytes(&self) -> u64 {
        self.numel as u64 * self.width
    }

    /// Passes over the wire: an all-reduce is a reduce-scatter and an all-gather.
    pub fn passes(&self) -> u64 {
        if self.collective == Collective::AllReduce { 2 } else { 1 }
    }
}

/// Gradients that may be on their way while the next is being filled.
const MOST_IN_FLIGHT: usize = 1;

const TOKENS: usize = 0;
const POSITIONS: usize = 1;
const FIRST_BLOCK: usize = 2;

/// The acts of a step of `setup.micro_steps` micro-steps. At its beginning the weights that the step before
/// has changed may still be on their way.
pub fn step_acts(model: &ModelConfig, setup: &Setup) -> Vec<Act> {
    let all = segments(model);
    let coming: Vec<bool> = (0..all.len()).map(|index| follows(setup.shard, index)).collect();
    let mut walk = Walk {
        setup,
        n_layer: model.n_layer,
        norm: (all.len() > FIRST_BLOCK + model.n_layer).then_some(all.len() - 1),
        plain_embedding: model.has_plain_embedding(),
        recompute: setup.recompute || setup.shard == Shard::Parameters,
        here: coming.iter().map(|coming| *coming || setup.shard != Shard::Parameters).collect(),
        coming,
        leaving: VecDeque::new(),
        acts: Vec::new(),
        segments: all,
    };
    for micro_step in 0..setup.micro_steps {
        walk.micro_step(micro_step + 1 == setup.micro_steps);
    }
    walk.finish();
    walk.acts
}

/// Whether a segment's weights are gathered as soon as they are updated: where they stay, all are; where
/// they do not, those that the next step begins with.
fn follows(shard: Shard, index: usize) -> bool {
    match shard {
        Shard::None => false,
        Shard::Optimizer | Shard::Gradients => true,
        Shard::Parameters => index <= FIRST_BLOCK,
    }
}

/// A rank's way through a step: what is where.
struct Walk<'a> {
    setup: &'a Setup,
    segments: Vec<SegmentSpec>,
    n_layer: usize,
    norm: Option<usize>,
    /// The embedding's backward needs no weights.
    plain_embedding: bool,
    recompute: bool,
    /// Whether a segment's weights are here, or on their way.
    here: Vec<bool>,
    /// Whether they are on their way.
    coming: Vec<bool>,
    /// Gradients on their way, the first to leave first.
    leaving: VecDeque<usize>,
    acts: Vec<Act>,
}

impl Walk<'_> {
    fn micro_step(&mut self, last: bool) {
        self.embed();
        for layer in 0..self.n_layer {
            let index = FIRST_BLOCK + layer;
            self.get(index);
            self.need_after(index);
            self.compute(Work::Forward(layer));
            if layer + 1 < self.n_layer {
                self.release(index); // the last one's backward comes next
            }
        }
        self.head(last);
        for layer in (0..self.n_layer).rev() {
            let index = FIRST_BLOCK + layer;
            self.get(index);
            if layer > 0 || !self.plain_embedding {
                self.need(index - 1);
            }
            if self.recompute {
                self.compute(Work::Recompute(layer));
            }
            self.open(index);
            self.compute(Work::Backward(layer));
            self.close(index, last);
            self.release(index);
        }
        if !self.plain_embedding {
            self.get(POSITIONS);
        }
        self.open(POSITIONS);
        self.compute(Work::EmbedBackward);
        self.close(POSITIONS, last);
        if !self.plain_embedding {
            self.release(POSITIONS);
        }
        self.close(TOKENS, last); // tied: complete only now
    }

    fn embed(&mut self) {
        self.need(TOKENS);
        self.need(POSITIONS);
        self.need_after(POSITIONS);
        self.get(TOKENS);
        self.get(POSITIONS);
        self.compute(Work::Embed);
        self.release(POSITIONS); // the tokens stay for the head
    }

    fn head(&mut self, last: bool) {
        if let Some(norm) = self.norm {
            self.get(norm);
        }
        self.open(TOKENS);
        self.get(TOKENS);
        self.compute(Work::Head);
        self.release(TOKENS);
        let Some(norm) = self.norm else { return };
        self.open(norm);
        self.close(norm, last);
        self.release(norm);
    }

    /// The sums arrive, all ranks agree, the masters move and each segment's weights follow.
    fn finish(&mut self) {
        while let Some(segment) = self.leaving.pop_front() {
            self.acts.push(Act::Wait(Cargo::Gradient, segment));
        }
        self.acts.push(Act::Agree);
        for index in 0..self.segments.len() {
            self.arrive(index);
        }
        for index in 0..self.segments.len() {
            self.compute(Work::Update(index));
            if follows(self.setup.shard, index) {
                self.gather(index);
            }
        }
    }

    fn compute(&mut self, work: Work) {
        self.acts.push(Act::Compute(work));
    }

    /// Starts to gather weights, unless they are here.
    fn need(&mut self, index: usize) {
        if !std::mem::replace(&mut self.here[index], true) {
            self.gather(index);
            self.coming[index] = true;
        }
    }

    fn need_after(&mut self, index: usize) {
        if index + 1 < self.segments.len() {
            self.need(index + 1);
        }
    }

    /// Has weights complete.
    fn get(&mut self, index: usize) {
        self.need(index);
        self.arrive(index);
    }

    fn arrive(&mut self, index: usize) {
        if std::mem::take(&mut self.coming[index]) {
            self.acts.push(Act::Wait(Cargo::Weights, index));
        }
    }

    fn release(&mut self, index: usize) {
        if self.setup.shard == Shard::Parameters {
            self.arrive(index);
            self.here[index] = false;
        }
    }

    /// Opens a segment's gradient: where gradients are sharded that is a new buffer, for which one that
    /// left earlier makes room.
    fn open(&mut self, index: usize) {
        if !self.setup.shard.leaves_at_once() {
            return;
        }
        while self.leaving.len() > MOST_IN_FLIGHT || self.leaving.contains(&index) {
            if let Some(segment) = self.leaving.pop_front() {
                self.acts.push(Act::Wait(Cargo::Gradient, segment));
            }
        }
    }

    /// A segment's gradient is complete: it leaves if it leaves at once, or if this micro-step is the last.
    fn close(&mut self, index: usize, last: bool) {
        if last || self.setup.shard.leaves_at_once() {
            let collective = match self.setup.shard {
                Shard::None => Collective::AllReduce,
                _ => Collective::ReduceScatter,
            };
            self.start(collective, Cargo::Gradient, index, self.setup.wire_width());
            self.leaving.push_back(index);
        }
    }

    fn gather(&mut self, index: usize) {
        self.start(Collective::AllGather, Cargo::Weights, index, self.setup.width());
    }

    fn start(&mut self, collective: Collective, cargo: Cargo, segment: usize, width: u64) {
        let numel = self.segments[segment].numel;
        let slice_numel = slice_numel(numel, self.setup.world_size);
        let passing = match cargo {
            Cargo::Weights => self.setup.shard == Shard::Parameters,
            Cargo::Gradient => self.setup.shard.leaves_at_once(),
        };
        self.acts.push(Act::Start(Call { collective, cargo, segment, numel, slice_numel, width, passing }));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Norm, Objective, StepTraffic};
    use std::collections::BTreeMap;

    const SHARDS: [Shard; 4] = [Shard::None, Shard::Optimizer, Shard::Gradients, Shard::Parameters];

    fn setup(shard: Shard, micro_steps: u64) -> Setup {
        Setup {
            world_size: 4,
            shard,
            bf16: true,
            recompute: false,
            reproducible: false,
            micro_steps,
            micro_batch: 1,
            gradients_stay: true,
        }
    }

    fn bert() -> ModelConfig {
        ModelConfig {
            norm: Norm::Post,
            objective: Objective::Masked,
            embedding_norm: true,
            token_types: 2,
            ..ModelConfig::default()
        }
    }

    fn calls(acts: &[Act]) -> Vec<Call> {
        acts.iter().filter_map(|act| if let Act::Start(call) = act { Some(*call) } else { None }).collect()
    }

    #[test]
    fn the_calls_of_a_step_carry_what_the_formula_of_traffic_says() {
        let models = [ModelConfig::default(), bert()];
        let cases = SHARDS.into_iter().flat_map(|shard| [(shard, 1), (shard, 3)]);
        for ((shard, micro_steps), model) in
            cases.flat_map(|case| models.each_ref().map(|model| (case, model)))
        {
            let setup = setup(shard, micro_steps);
            let mut sent = BTreeMap::new();
            for call in calls(&step_acts(model, &setup)) {
                let key = format!("{:?}", call.collective);
                *sent.entry(key).or_insert(0) += call.passes() * call.bytes() * 3 / 4;
            }
            let traffic = StepTraffic::of(model, &setup);
            let of = |name: &str| sent.get(name).copied().unwrap_or(0);
            assert_eq!(of("AllReduce"), traffic.all_reduce, "{shard:?}");
            assert_eq!(of("ReduceScatter"), traffic.reduce_scatter, "{shard:?}");
            assert_eq!(of("AllGather"), traffic.all_gather, "{shard:?}");
        }
    }

    #[test]
    fn nothing_is_waited_for_that_was_not_started_and_gradients_are_complete_before_the_update() {
        let gpts = [Norm::Pre, Norm::Post].map(|norm| ModelConfig { norm, ..ModelConfig::default() });
        let models: Vec<ModelConfig> = gpts.into_iter().chain([bert()]).collect();
        for (shard, model) in
            SHARDS.into_iter().flat_map(|shard| models.iter().map(move |model| (shard, model)))
        {
            // The second of two steps in a row: the first leaves weights on their way.
            let acts = step_acts(model, &setup(shard, 2)).repeat(2);
            let mut under_way: Vec<(Cargo, usize)> = Vec::new();
            for (i, act) in acts.iter().enumerate() {
                match act {
                    Act::Start(call) => {
                        assert!(!under_way.contains(&(call.cargo, call.segment)), "{shard:?} {call:?}");
                        under_way.push((call.cargo, call.segment));
                    }
                    Act::Wait(cargo, segment) => {
                        let at = under_way.iter().position(|sent| *sent == (*cargo, *segment));
                        let first_step = i < acts.len() / 2;
                        assert!(at.is_some() || first_step && *cargo == Cargo::Weights, "{shard:?} {act:?}");
                        at.map(|at| under_way.remove(at));
                    }
                    Act::Compute(Work::Update(index)) => {
                        let in_the_way =
                            |(cargo, segment): &(Cargo, usize)| *cargo == Cargo::Gradient || segment >= index;
                        assert!(!under_way.iter().any(in_the_way), "{shard:?} {under_way:?}");
                    }
                    Act::Compute(_) | Act::Agree => {}
                }
            }
        }
    }

    #[test]
    fn sharded_weights_are_gathered_one_segment_ahead() {
        let acts = step_acts(&ModelConfig::default(), &setup(Shard::Parameters, 1));
        let at = |wanted: Act| acts.iter().position(|act| *act == wanted).unwrap();
        let gathers = |act: &Act, index: usize| {
            let Act::Start(call) = act else { return false };
            (call.cargo, call.segment) == (Cargo::Weights, index)
        };
        for layer in 1..12 {
            let gathered = acts.iter().position(|act| gathers(act, 2 + layer));
            assert!(gathered.unwrap() < at(Act::Compute(Work::Forward(layer - 1))), "block {layer}");
        }
        for index in [TOKENS, POSITIONS, FIRST_BLOCK] {
            let updated = at(Act::Compute(Work::Update(index)));
            assert!(gathers(&acts[updated + 1], index), "the next step begins with segment {index}");
        }
        assert!(acts.contains(&Act::Compute(Work::Recompute(0))));
        let last = acts.iter().filter(|act| gathers(act, 13)).count();
        assert_eq!(last, 1, "the last block stays for its backward");
    }
}
