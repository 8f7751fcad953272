//! What a rank is about to do, in a few numbers that ranks compare before they do it, and in words.

use super::buffers::At;
use crate::collectives::flat::{Flat, width};
use crate::collectives::{CommError, Operation, Wire};
use std::fmt;
use tch::Kind;

/// Kind, elements, a number more, bytes of an element on the wire; and where the buffer lies, which need
/// not be the same on all ranks.
#[derive(Clone, Copy)]
pub(super) struct Call([u64; 6]);

const BYTES: u64 = 0;

impl Call {
    pub(super) const BARRIER: Call = Call([1, 0, 0, 0, 0, 0]);
    pub(super) const FINALIZE: Call = Call([2, 0, 0, 0, 0, 0]);

    pub(super) fn bytes(length: usize) -> Call {
        Call([BYTES, 0, length as u64, 0, 0, 0])
    }

    pub(super) fn buffer(numel: usize, kind: Kind) -> Call {
        Call([3, numel as u64, 0, width(kind) as u64, 0, 0])
    }

    pub(super) fn flat(operation: Operation, flat: &Flat, [number, offset]: At) -> Call {
        let (kind, more) = match operation {
            Operation::AllReduce { .. } => (4, 0),
            Operation::ReduceScatter { shard_numel, .. } => (5, shard_numel),
            Operation::AllGather { shard_numel } => (6, shard_numel),
            Operation::Broadcast { root } => (7, root),
        };
        let wire = if operation.wire() == Wire::Bf16 { 2 } else { width(flat.kind()) };
        Call([kind, flat.numel() as u64, more as u64, wire as u64, number, offset])
    }

    /// From and to what travels.
    pub(super) fn from_numbers(numbers: [u64; 6]) -> Call {
        Call(numbers)
    }

    pub(super) fn numbers(self) -> [u64; 6] {
        self.0
    }

    /// Bytes that are gathered.
    pub(super) fn length(self) -> usize {
        self.0[2] as usize
    }

    /// The first rank whose call is another than rank 0's, as an error.
    pub(super) fn compare(calls: &[Call]) -> Result<(), CommError> {
        match calls.iter().position(|other| !other.agrees(calls[0])) {
            None => Ok(()),
            Some(rank) => {
                let (got, expected) = (calls[rank].to_string(), calls[0].to_string());
                Err(CommError::Mismatch { rank, got, by: 0, expected })
            }
        }
    }

    /// Where the buffer lies, if that is the same for all.
    pub(super) fn same_place(calls: &[Call]) -> Option<At> {
        let place = |call: &Call| [call.0[4], call.0[5]];
        let first = calls.first().map(place)?;
        calls.iter().all(|call| place(call) == first).then_some(first)
    }

    /// Lengths of bytes and places may differ, all else may not.
    fn agrees(self, other: Call) -> bool {
        self.0[..4] == other.0[..4] || self.0[0] == BYTES && other.0[0] == BYTES
    }
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [kind, numel, more, width, ..] = self.0;
        let dtype = if width == 2 { "bf16" } else { "fp32" };
        match kind {
            BYTES => write!(f, "all_gather_bytes of {more} bytes"),
            1 => write!(f, "barrier"),
            2 => write!(f, "finalize"),
            3 => write!(f, "buffer of {numel} elements in {dtype}"),
            4 => write!(f, "all_reduce of {numel} elements in {dtype}"),
            5 => write!(f, "reduce_scatter of {numel} elements in {dtype} in shards of {more}"),
            6 => write!(f, "all_gather of {numel} elements in {dtype} in shards of {more}"),
            _ => write!(f, "broadcast of {numel} elements in {dtype} from rank {more}"),
        }
    }
}
