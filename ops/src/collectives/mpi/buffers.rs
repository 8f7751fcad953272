//! The buffers that ranks of a node made together, and where each of them has them.
//! Knows neither operations nor how a buffer is worked on.

use super::raw::Comm;
use super::shared::Shared;
use crate::collectives::CommError;
use crate::collectives::flat::{Flat, plain_buffer, width};
use tch::{Device, Kind, Tensor};

/// Buffers in shared memory, in the order of their making, the same on all ranks.
#[derive(Debug, Default)]
pub(super) struct Buffers {
    made: Vec<&'static Shared>,
    warned: bool,
}

/// A place in a buffer: its number from 1 on, and the offset in bytes. Number 0: in none.
pub(super) type At = [u64; 2];

impl Buffers {
    /// A buffer of zeros: in shared memory if every node of `world` has it, else an ordinary tensor.
    /// Collective over `world`; `node` has this node's ranks, several of them.
    pub(super) fn make(
        &mut self,
        world: Comm,
        node: Comm,
        numel: usize,
        kind: Kind,
    ) -> Result<Tensor, CommError> {
        let shared = Shared::allocate(node, numel * width(kind))?;
        let everywhere = world.all_gather_u64([u64::from(shared.is_ok())])?.iter().all(|[ok]| *ok == 1);
        match shared {
            Ok(shared) if everywhere => {
                // Kept until the process ends, since nobody knows how long tensors refer to it.
                let shared: &'static Shared = Box::leak(Box::new(shared));
                self.made.push(shared);
                let data = shared.part(node.rank_and_size()?.0);
                // SAFETY: the part has at least `numel` elements, is zeros, aligned to a page, and is
                // never unmapped.
                Ok(unsafe { Tensor::f_from_blob(data, &[numel as i64], &[1], kind, Device::Cpu) }?)
            }
            shared => {
                self.warn(shared.err());
                plain_buffer(numel, kind, tch::Device::Cpu)
            }
        }
    }

    fn warn(&mut self, why: Option<String>) {
        let Some(why) = why.filter(|_| !std::mem::replace(&mut self.warned, true)) else { return };
        tracing::warn!(
            "{}: {why}: ranks of a node copy their buffers to each other, on all nodes, which is slower\n\
             hint: make /dev/shm larger (docker run --shm-size)",
            crate::collectives::machine::host_name()
        );
    }

    /// Where a buffer lies, if it lies in one of these.
    pub(super) fn find(&self, flat: &Flat, local_rank: usize) -> At {
        let (data, bytes) = (flat.data() as usize, flat.numel() * width(flat.kind()));
        for (index, shared) in self.made.iter().enumerate() {
            let start = shared.part(local_rank) as usize;
            if data >= start && data + bytes <= start + shared.len() {
                return [index as u64 + 1, (data - start) as u64];
            }
        }
        [0, 0]
    }

    /// Every local rank's address of a place, by local rank.
    pub(super) fn reach(&self, [number, offset]: At, local_size: usize) -> Option<Vec<*mut u8>> {
        let shared = self.made.get(usize::try_from(number).ok()?.checked_sub(1)?)?;
        Some((0..local_size).map(|rank| shared.part(rank).wrapping_add(offset as usize)).collect())
    }
}
