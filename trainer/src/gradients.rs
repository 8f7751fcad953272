//! How gradients are added up: over a rank's micro-batches, in a tree or one after the other, and over
//! the ranks, each segment leaving as soon as it is complete. Knows flat buffers and the communicator;
//! knows nothing of what segments compute.
//!
//! With `shard = "none"` or `"optimizer"` a rank adds up its micro-batches in a whole buffer, which leaves
//! once a step. With `"gradients"` or `"parameters"` each micro-batch's gradient leaves at once, and what
//! stays is the sum of this rank's slice. Whole buffers live from a step's first backward to the next step,
//! where they take the place of activations that backward has let go of; unless ranks of a node may read
//! them from each other, whose memory stays.

use crate::error::TrainError;
use crate::pulse::Pulse;
use crate::weights::{Parameters, narrow, shared_zeros, zeros};
use configs::{Shard, owned_range, slice_numel};
use ops::collectives::{Communicator, Operation, Pending, Wire};
use ops::{ExactSum, GradientTree, Squares, Weights, mapped_zeros};
use std::collections::VecDeque;
use std::ops::Range;
use std::time::{Duration, Instant};
use tch::{Device, Kind, Tensor};

/// Buffers that may be on their way while the next is being filled.
const MOST_IN_FLIGHT: usize = 1;

/// A step's gradient in the making; lives from step to step.
pub struct Gradients<'a> {
    comm: &'a dyn Communicator,
    shard: Shard,
    /// Whether sums keep their memory from step to step.
    stays: bool,
    device: Device,
    slots: Vec<Slot>,
    /// `None`: leaves are added one after the other.
    tree: Option<GradientTree>,
    /// In which precision gradients travel.
    wire: Wire,
    in_flight: VecDeque<InFlight>,
    /// This rank's micro-batches of the step, and how many are done.
    leaves: u64,
    leaf: u64,
    /// Of how many parts, and the squares of what leaves before others' is added; none if they are not asked for.
    own: Option<(u64, Squares)>,
    waited: Duration,
    pulse: Pulse,
}

/// The gradients of parts of the batch, before they are added up: what the noise scale is seen from.
#[derive(Debug, Clone)]
pub struct OwnSquares {
    /// Into how many parts the global batch is divided.
    pub parts: u64,
    /// The sum of the squares of this rank's parts, each scaled as the whole gradient is.
    pub squares: ExactSum,
}

struct Slot {
    numel: usize,
    /// The slice that this rank owns.
    owned: Range<usize>,
    /// fp32; all elements, or the owned ones where gradients are sharded. None before a step's first backward
    /// where it does not stay.
    sum: Option<Tensor>,
    /// The leaf being filled, where gradients are sharded.
    open: Option<Tensor>,
}

struct InFlight {
    slot: usize,
    leaf: u64,
    pending: Pending,
    /// The leaf, where gradients are sharded.
    buffer: Option<Tensor>,
}

impl<'a> Gradients<'a> {
    /// For a model's parameters and at most `most_leaves` micro-batches of a rank and step; in a tree if
    /// the result may not depend on the ranks.
    ///
    /// # Errors
    /// No memory.
    pub fn new(
        parameters: &Parameters<'_>,
        most_leaves: u64,
        reproducible: bool,
        comm: &'a dyn Communicator,
    ) -> Result<Gradients<'a>, TrainError> {
        let (shard, device) = (parameters.shard(), parameters.device());
        let stays = shard.gradients_stay(comm.world_size(), device == Device::Cpu);
        let mut slots = Vec::with_capacity(parameters.len());
        for index in 0..parameters.len() {
            let numel = parameters.spec(index).numel;
            let owned = owned_range(numel, comm.rank(), comm.world_size());
            let sum = match (stays, shard.leaves_at_once()) {
                (false, _) => None,
                (true, true) => Some(zeros(owned.len(), Kind::Float, device)?),
                (true, false) => Some(shared_zeros(numel, Kind::Float, device, comm)?),
            };
            slots.push(Slot { numel, owned, sum, open: None });
        }
        let summed = |slot: &Slot| if shard.leaves_at_once() { slot.owned.len() } else { slot.numel };
        let kept: Vec<usize> = slots.iter().map(summed).collect();
        let tree = reproducible.then(|| GradientTree::new(&kept, most_leaves, device));
        // The tree's sums are fp32 throughout; without it, bf16 weights ask for no more than bf16.
        let wire = if parameters.kind() != Kind::Float && !reproducible { Wire::Bf16 } else { Wire::Fp32 };
        Ok(Gradients {
            comm,
            shard,
            stays,
            device,
            slots,
            tree,
            wire,
            in_flight: VecDeque::new(),
            leaves: 0,
            leaf: 0,
            own: None,
            waited: Duration::ZERO,
            pulse: Pulse::default(),
        })
    }

    /// From now on it shows in this pulse when a segment's sum is waited for.
    pub(crate) fn show(&mut self, pulse: &Pulse) {
        self.pulse = pulse.clone();
    }

    /// Begins a step of `leaves` micro-batches of this rank, with its gradient at zero; takes the squares
    /// of the parts if `own_squares`.
    pub fn begin(&mut self, leaves: u64, own_squares: bool) {
        (self.leaves, self.leaf) = (leaves, 0);
        for slot in &mut self.slots {
            match &mut slot.sum {
                sum if !self.stays => *sum = None,
                // With a tree each leaf starts at zero, and the last leaves the sum.
                Some(sum) if self.tree.is_none() => drop(sum.zero_()),
                _ => {}
            }
        }
        let ranks = self.comm.world_size() as u64;
        let parts = if self.takes_every_leaf() { leaves * ranks } else { ranks };
        self.own = own_squares.then(|| (parts, Squares::default()));
    }

    /// The buffer to which the present micro-batch's gradient of a segment is to be added, `[numel]` fp32.
    ///
    /// # Errors
    /// No memory, a failed collective.
    pub fn open(&mut self, index: usize) -> Result<Tensor, TrainError> {
        if !self.shard.leaves_at_once() {
            let began = self.slots[index].sum.is_some();
            let sum = self.slots[index].sum(self.device)?;
            if began && self.tree.is_some() {
                let _ = sum.zero_();
            }
            return Ok(sum.shallow_clone());
        }
        let too_many = |waiting: &VecDeque<InFlight>| {
            waiting.len() > MOST_IN_FLIGHT || waiting.iter().any(|flight| flight.slot == index)
        };
        while too_many(&self.in_flight) {
            self.retire()?;
        }
        let buffer = mapped_zeros(self.slots[index].numel, Kind::Float, self.device)?;
        self.slots[index].open = Some(buffer.shallow_clone());
        Ok(buffer)
    }

    /// The buffer that is open for a segment.
    pub fn opened(&self, index: usize) -> Tensor {
        let Slot { open, sum, .. } = &self.slots[index];
        open.as_ref().or(sum.as_ref()).expect("a segment's gradient is opened first").shallow_clone()
    }

    /// The present micro-batch's gradient of a segment is complete.
    ///
    /// # Errors
    /// A failed collective.
    pub fn close(&mut self, index: usize) -> Result<(), TrainError> {
        let (leaf, last, shard) = (self.leaf, self.leaf + 1 == self.leaves, self.shard);
        let every_leaf = self.takes_every_leaf();
        let slot = &mut self.slots[index];
        let (wire, shard_numel) = (self.wire, slice_numel(slot.numel, self.comm.world_size()));
        let buffer = slot.open.take();
        let filled = buffer.as_ref().or(slot.sum.as_ref()).expect("a segment's gradient is opened first");
        if let Some((_, own)) = self.own.as_mut().filter(|_| last || every_leaf) {
            own.add(filled)?;
        }
        let leaves = match (&buffer, &mut self.tree) {
            (Some(_), _) => true,
            (None, Some(tree)) => tree.add_leaf(filled, index, leaf, self.leaves),
            (None, None) => last,
        };
        if leaves {
            let operation = match shard {
                Shard::None => Operation::AllReduce { wire },
                _ => Operation::ReduceScatter { shard_numel, wire },
            };
            let pending = self.comm.start(operation, filled)?;
            self.in_flight.push_back(InFlight { slot: index, leaf, pending, buffer });
        }
        Ok(())
    }

    /// Differentiates `output`, which comes of `weights`, given the loss's gradient of it, and adds that
    /// of the weights.
    ///
    /// # Errors
    /// What libtorch says, a failed collective.
    pub fn backward(
        &mut self,
        index: usize,
        weights: &Weights,
        output: &Tensor,
        output_grad: &Tensor,
    ) -> Result<(), TrainError> {
        weights.accumulate_into(&self.open(index)?)?;
        ops::backward(output, output_grad)?;
        weights.forget_gradients()?;
        self.close(index)
    }

    /// Ends a micro-batch.
    pub fn next_leaf(&mut self) {
        self.leaf += 1;
    }

    /// Waits until every segment's gradient is the sum over all micro-batches and ranks, and returns the
    /// sum of the squares of this rank's slices of it.
    ///
    /// # Errors
    /// A failed collective.
    pub fn finish(&mut self) -> Result<ExactSum, TrainError> {
        while !self.in_flight.is_empty() {
            self.retire()?;
        }
        let mut squares = Squares::default();
        for slot in &mut self.slots {
            slot.sum(self.device)?; // of a segment that no micro-batch has reached it is zero
            squares.add(&slot.owned_sum(self.shard))?;
        }
        Ok(squares.read()?)
    }

    /// The squares of the step's parts, if they were asked for.
    ///
    /// # Errors
    /// What libtorch says.
    pub fn take_own_squares(&mut self) -> Result<Option<OwnSquares>, TrainError> {
        let Some((parts, squares)) = self.own.take() else { return Ok(None) };
        Ok(Some(OwnSquares { parts, squares: squares.read()? }))
    }

    /// The gradient of the elements whose master this rank holds, after [`Gradients::finish`].
    pub fn of_held(&self, index: usize) -> Tensor {
        match self.shard {
            Shard::None => self.slots[index].whole_sum().shallow_clone(),
            _ => self.slots[index].owned_sum(self.shard),
        }
    }

    /// How long this rank has waited for other ranks since the last call.
    pub fn take_waited(&mut self) -> Duration {
        std::mem::take(&mut self.waited)
    }

    /// Whether the leaves can be seen one by one, and not only their sum.
    fn takes_every_leaf(&self) -> bool {
        self.tree.is_some() || self.shard.leaves_at_once()
    }

    /// Waits for what left first.
    fn retire(&mut self) -> Result<(), TrainError> {
        let Some(InFlight { slot, leaf, pending, buffer }) = self.in_flight.pop_front() else {
            return Ok(());
        };
        let started = Instant::now();
        self.pulse.waiting(slot, || pending.wait())?;
        self.waited += started.elapsed();
        let Some(buffer) = buffer else { return Ok(()) };
        let slice = &mut self.slots[slot];
        let mine = narrow(&buffer, &slice.owned);
        let sum = slice.sum(self.device)?;
        match &mut self.tree {
            None => drop(sum.g_add_(&mine)),
            Some(tree) => {
                if tree.add_leaf(&mine, slot, leaf, self.leaves) {
                    sum.copy_(&mine);
                }
            }
        }
        Ok(())
    }
}

impl Slot {
    /// The sum, which begins at zero if it has not begun.
    fn sum(&mut self, device: Device) -> Result<&mut Tensor, TrainError> {
        if self.sum.is_none() {
            self.sum = Some(zeros(self.numel, Kind::Float, device)?);
        }
        Ok(self.sum.as_mut().expect("it was made just now"))
    }

    /// All that this rank has of the sum, after [`Gradients::finish`].
    fn whole_sum(&self) -> &Tensor {
        self.sum.as_ref().expect("a step's gradient is complete")
    }

    fn owned_sum(&self, shard: Shard) -> Tensor {
        let sum = self.whole_sum();
        if shard.leaves_at_once() { sum.shallow_clone() } else { narrow(sum, &self.owned) }
    }
}
