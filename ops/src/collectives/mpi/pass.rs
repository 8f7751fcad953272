//! A pass over a buffer and the pieces it is cut into, as arithmetic on sizes and addresses.
//! Knows neither MPI nor when a piece is worked on.

use crate::collectives::shard;
use std::ops::Range;

/// What a pass over a buffer does.
#[derive(Debug, Clone)]
pub(super) struct Pass {
    /// The first byte of the buffer of each rank of this node, where this one can reach them; else of its
    /// own only.
    pub(super) buffers: Vec<*mut u8>,
    /// Elements.
    pub(super) numel: usize,
    /// Elements per slice; rank r owns slice r.
    pub(super) slice_numel: usize,
    /// Sum the slices, or take each as its owner has it.
    pub(super) reduce: bool,
    /// Give the slices to all, or leave each with its owner.
    pub(super) gather: bool,
    /// Bytes of an element in the buffer: 4, fp32; or 2, bf16, which is not summed.
    pub(super) width: usize,
    /// Bytes of an element between nodes: `width`, or 2 for an fp32 buffer on a bf16 wire.
    pub(super) wire_width: usize,
}

impl Pass {
    /// Whether numbers are rounded on the wire.
    pub(super) fn rounds(&self) -> bool {
        self.wire_width < self.width
    }
}

/// A piece of every slice.
#[derive(Debug, Clone, Copy)]
pub(super) struct Piece<'a> {
    pub(super) pass: &'a Pass,
    /// Offset within a slice, elements.
    pub(super) offset: usize,
    /// Elements; slices at the end of the buffer may have fewer.
    pub(super) numel: usize,
    /// Which half of the scratch memory: 0 or 1.
    pub(super) slot: usize,
}

impl Piece<'_> {
    /// Elements of the buffer that belong to rank `rank`'s slice.
    fn of(&self, rank: usize) -> Range<usize> {
        let slice = shard(self.pass.numel, self.pass.slice_numel, rank);
        let start = (slice.start + self.offset).min(slice.end);
        start..(start + self.numel).min(slice.end)
    }

    /// Elements of rank `rank`'s slice.
    pub(super) fn len(&self, rank: usize) -> usize {
        self.of(rank).len()
    }

    /// Where rank `rank`'s slice lies in a buffer.
    pub(super) fn at(&self, buffer: *mut u8, rank: usize) -> *mut u8 {
        buffer.wrapping_add(self.of(rank).start * self.pass.width)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pass(numel: usize, slice_numel: usize, width: usize) -> Pass {
        let buffers = vec![std::ptr::null_mut()];
        Pass { buffers, numel, slice_numel, reduce: false, gather: true, width, wire_width: width }
    }

    #[test]
    fn pieces_cover_every_slice_once() {
        let pass = pass(1003, 300, 4);
        let mut seen = vec![0; 1003];
        for offset in (0..300).step_by(64) {
            let piece = Piece { pass: &pass, offset, numel: 64.min(300 - offset), slot: 0 };
            for rank in 0..4 {
                piece.of(rank).for_each(|i| seen[i] += 1);
            }
        }
        assert!(seen.iter().all(|&times| times == 1), "{seen:?}");
    }

    #[test]
    fn addresses_go_beyond_what_32_bits_count() {
        let (numel, slice_numel) = (6usize << 31, 3usize << 31);
        for width in [2, 4] {
            let pass = pass(numel, slice_numel, width);
            let piece = Piece { pass: &pass, offset: (3 << 31) - 64, numel: 64, slot: 0 };
            assert_eq!((piece.len(0), piece.len(1)), (64, 64));
            let end = piece.at(std::ptr::null_mut(), 1) as usize + 64 * width;
            assert_eq!(end, numel * width);
        }
    }
}
