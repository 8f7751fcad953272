//! Where a model's weights are: the fp32 masters that the optimizer moves, whole or this rank's slices,
//! and the weights that compute, in their precision, gathered from the ranks when they are needed.
//! Knows segments as flat buffers; knows nothing of what they compute.
//!
//! Rajbhandari et al. 2020 (ZeRO). With `shard = "none"` every rank has all of it. With `"optimizer"` and
//! `"gradients"` a rank holds the masters of its slices, and the weights are gathered after each update.
//! With `"parameters"` they exist on a rank only from their gathering, just before use, to their release;
//! those that a step begins with are gathered as soon as the update before it has changed them.

use crate::error::TrainError;
use crate::pulse::Pulse;
use configs::{SegmentSpec, Shard, owned_range, slice_numel};
use ops::collectives::{Communicator, Operation, Pending};
use ops::{Weights, mapped_zeros};
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tch::{Device, Kind, Tensor};

/// Elements that are given their initial values at a time: a second copy of a large segment would
/// be more than the ranks' shares leave room for.
const INIT_NUMEL: usize = 1 << 20;

/// The segments that a step begins with: tokens, positions and what follows them.
const FIRST: usize = 3;

/// A model's weights on this rank.
pub struct Parameters<'a> {
    comm: &'a dyn Communicator,
    shard: Shard,
    kind: Kind,
    device: Device,
    segments: Vec<Segment>,
    waited: Duration,
    pulse: Pulse,
}

struct Segment {
    spec: Arc<SegmentSpec>,
    /// Elements whose master this rank holds.
    held: Range<usize>,
    /// `[held.len()]` fp32; a view of the weights where these are fp32 and stay.
    master: Tensor,
    weights: Option<Weights>,
    /// The weights are on their way.
    gather: Option<Pending>,
}

impl<'a> Parameters<'a> {
    /// Zeros, for `segments` in the order of the forward pass; `kind` is what computes, fp32 or bf16.
    /// Collective.
    ///
    /// # Errors
    /// What libtorch says, such as out of memory.
    pub fn zeros(
        segments: Vec<SegmentSpec>,
        shard: Shard,
        kind: Kind,
        device: Device,
        comm: &'a dyn Communicator,
    ) -> Result<Parameters<'a>, TrainError> {
        let mut all = Vec::with_capacity(segments.len());
        for spec in segments {
            let spec = Arc::new(spec);
            let held = match shard {
                Shard::None => 0..spec.numel,
                _ => owned_range(spec.numel, comm.rank(), comm.world_size()),
            };
            let weights = match shard {
                Shard::Parameters => None,
                _ => Some(Weights::over(&spec, shared_zeros(spec.numel, kind, device, comm)?)?),
            };
            let master = match &weights {
                Some(weights) if kind == Kind::Float => narrow(weights.flat(), &held),
                _ => zeros(held.len(), Kind::Float, device)?,
            };
            all.push(Segment { spec, held, master, weights, gather: None });
        }
        let (waited, pulse) = (Duration::ZERO, Pulse::default());
        Ok(Parameters { comm, shard, kind, device, segments: all, waited, pulse })
    }

    /// From now on it shows in this pulse when a segment is waited for.
    pub(crate) fn show(&mut self, pulse: &Pulse) {
        self.pulse = pulse.clone();
    }

    /// Sets the masters to their initial values, a pure function of the seed, on all cores that are this rank's.
    pub fn init(&mut self, seed: u64) {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let threads = (cores / self.comm.place().local_size.max(1)).max(1);
        for Segment { spec, held, master, .. } in &mut self.segments {
            let part = |start: usize| start..(start + INIT_NUMEL).min(held.end);
            let starts: Vec<usize> = held.clone().step_by(INIT_NUMEL).collect();
            for starts in starts.chunks(threads) {
                let values = |start: usize| ops::initial_values(spec, seed, part(start));
                let all: Vec<Tensor> = std::thread::scope(|scope| {
                    let others = starts[1..].iter().map(|&start| scope.spawn(move || values(start)));
                    let others: Vec<_> = others.collect();
                    let first = values(starts[0]);
                    let others =
                        others.into_iter().map(|thread| thread.join().expect("numbers do not panic"));
                    std::iter::once(first).chain(others).collect()
                });
                for (&start, values) in starts.iter().zip(all) {
                    let part = part(start);
                    narrow(master, &(part.start - held.start..part.end - held.start)).copy_(&values);
                }
            }
        }
    }

    /// How many segments there are.
    pub fn len(&self) -> usize {
        self.segments.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.segments.is_empty()
    }

    /// Where the weights live.
    pub fn device(&self) -> Device {
        self.device
    }

    /// The precision that computes.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// How ranks share the state.
    pub fn shard(&self) -> Shard {
        self.shard
    }

    /// A segment's layout.
    pub fn spec(&self, index: usize) -> &Arc<SegmentSpec> {
        &self.segments[index].spec
    }

    /// Elements of a segment whose master this rank holds.
    pub fn held(&self, index: usize) -> Range<usize> {
        self.segments[index].held.clone()
    }

    /// The fp32 master of the held elements, `[held.len()]`; after [`Parameters::settle`], to be read and
    /// changed, and then told by [`Parameters::publish`].
    pub fn master(&self, index: usize) -> &Tensor {
        &self.segments[index].master
    }

    /// Starts to gather a segment, unless it is here. Collective where weights are sharded, as are all
    /// of the following.
    ///
    /// # Errors
    /// No memory, a failed collective.
    pub fn need(&mut self, index: usize) -> Result<(), TrainError> {
        let segment = &mut self.segments[index];
        if segment.weights.is_some() {
            return Ok(());
        }
        let flat = mapped_zeros(segment.spec.numel, self.kind, self.device)?;
        narrow(&flat, &segment.held).copy_(&segment.master);
        segment.gather = Some(self.comm.start(gathering(&segment.spec, self.comm), &flat)?);
        segment.weights = Some(Weights::over(&segment.spec, flat)?);
        Ok(())
    }

    /// A segment's weights, complete.
    ///
    /// # Errors
    /// As [`Parameters::need`].
    pub fn get(&mut self, index: usize) -> Result<&Weights, TrainError> {
        self.need(index)?;
        let segment = &mut self.segments[index];
        if let Some(gather) = segment.gather.take() {
            let started = Instant::now();
            self.pulse.waiting(index, || gather.wait())?;
            self.waited += started.elapsed();
        }
        Ok(segment.weights.as_ref().expect("a segment that was needed is here"))
    }

    /// Two segments' weights, complete.
    ///
    /// # Errors
    /// As [`Parameters::need`].
    pub fn get_both(&mut self, a: usize, b: usize) -> Result<(&Weights, &Weights), TrainError> {
        self.get(a)?;
        self.get(b)?;
        let weights = |i: usize| self.segments[i].weights.as_ref().expect("just waited for");
        Ok((weights(a), weights(b)))
    }

    /// Gives a segment's weights back where they do not stay.
    ///
    /// # Errors
    /// A failed collective.
    pub fn release(&mut self, index: usize) -> Result<(), TrainError> {
        if self.shard == Shard::Parameters {
            let segment = &mut self.segments[index];
            segment.gather.take().map_or(Ok(()), Pending::wait)?;
            segment.weights = None;
        }
        Ok(())
    }

    /// What the held elements' masters are rounded to, `[held.len()]`, where weights stay and have another
    /// precision than their masters: whoever changes the masters may change it too, and then [`send`] it.
    ///
    /// [`send`]: Parameters::send
    pub fn rounded(&self, index: usize) -> Option<Tensor> {
        let Segment { held, weights, .. } = &self.segments[index];
        weights.as_ref().filter(|_| self.kind != Kind::Float).map(|weights| narrow(weights.flat(), held))
    }

    /// Makes the weights follow the masters: rounds them to the precision that computes and sends them.
    ///
    /// # Errors
    /// A failed collective.
    pub fn publish(&mut self) -> Result<(), TrainError> {
        for index in 0..self.segments.len() {
            if let Some(mut rounded) = self.rounded(index) {
                rounded.copy_(&self.segments[index].master);
            }
            self.send(index)?;
        }
        Ok(())
    }

    /// Starts to gather what the ranks have changed of a segment's weights, where they stay or are what the
    /// next step begins with.
    ///
    /// # Errors
    /// No memory, a failed collective.
    pub fn send(&mut self, index: usize) -> Result<(), TrainError> {
        if self.shard == Shard::Parameters {
            self.release(index)?; // what was gathered before the change
            return if index < FIRST { self.need(index) } else { Ok(()) };
        }
        let segment = &mut self.segments[index];
        if let Some(weights) = segment.weights.as_ref().filter(|_| self.shard != Shard::None) {
            segment.gather = Some(self.comm.start(gathering(&segment.spec, self.comm), weights.flat())?);
        }
        Ok(())
    }

    /// Makes every rank start from rank 0's masters where each has all of them, and publishes.
    ///
    /// # Errors
    /// A failed collective.
    pub fn share(&mut self) -> Result<(), TrainError> {
        if self.shard == Shard::None {
            for segment in &self.segments {
                self.comm.broadcast(&segment.master, 0)?;
            }
        }
        self.publish()
    }

    /// Waits until nothing is on its way.
    ///
    /// # Errors
    /// A failed collective.
    pub fn settle(&mut self) -> Result<(), TrainError> {
        for segment in &mut self.segments {
            segment.gather.take().map_or(Ok(()), Pending::wait)?;
        }
        Ok(())
    }

    /// How long this rank has waited for weights since the last call.
    pub fn take_waited(&mut self) -> Duration {
        std::mem::take(&mut self.waited)
    }

    /// BLAKE3 of all masters as little-endian fp32, segment by segment, in hexadecimal: what ranks and
    /// runs are compared by. Collective.
    ///
    /// # Errors
    /// No memory, a failed collective.
    pub fn digest(&mut self) -> Result<String, TrainError> {
        self.settle()?;
        let mut hash = blake3::Hasher::new();
        for segment in &self.segments {
            let whole = match self.shard {
                Shard::None => segment.master.shallow_clone(),
                _ => {
                    let whole = mapped_zeros(segment.spec.numel, Kind::Float, self.device)?;
                    narrow(&whole, &segment.held).copy_(&segment.master);
                    self.comm.start(gathering(&segment.spec, self.comm), &whole)?.wait()?;
                    whole
                }
            };
            hash_values(&mut hash, &whole);
        }
        Ok(hash.finalize().to_hex().to_string())
    }
}

/// Adds a flat tensor's values to a hash, as little-endian fp32.
pub(crate) fn hash_values(hash: &mut blake3::Hasher, flat: &Tensor) {
    let mut values = vec![0f32; flat.numel()];
    flat.to_kind(Kind::Float).copy_data(&mut values, flat.numel());
    for values in values.chunks(1 << 16) {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        hash.update(&bytes);
    }
}

/// The elements `range` of a flat buffer.
pub(crate) fn narrow(flat: &Tensor, range: &Range<usize>) -> Tensor {
    flat.narrow(0, range.start as i64, range.len() as i64)
}

/// A flat buffer of zeros that stays, from which the ranks of a node can read directly if it is in host
/// memory. Collective.
pub(crate) fn shared_zeros(
    numel: usize,
    kind: Kind,
    device: Device,
    comm: &dyn Communicator,
) -> Result<Tensor, TrainError> {
    if device == Device::Cpu { Ok(comm.buffer(numel, kind)?) } else { zeros(numel, kind, device) }
}

/// A flat buffer of zeros.
pub(crate) fn zeros(numel: usize, kind: Kind, device: Device) -> Result<Tensor, TrainError> {
    Ok(Tensor::f_zeros([numel as i64], (kind, device)).map_err(ops::OpsError::from)?)
}

fn gathering(spec: &SegmentSpec, comm: &dyn Communicator) -> Operation {
    Operation::AllGather { shard_numel: slice_numel(spec.numel, comm.world_size()) }
}
