//! Who owns which slice of a segment's flat buffer: what a rank saves, updates where optimizer state is
//! sharded, and takes the norm of. Pure arithmetic.

use std::ops::Range;

/// The edges of the ranks' slices are multiples of this many elements, whatever the number of ranks.
pub const SLICE_ALIGN: usize = 4096;

/// Elements of each rank's slice of a buffer of `numel` elements; the last ones may be short or empty.
pub fn slice_numel(numel: usize, world_size: usize) -> usize {
    numel.div_ceil(world_size).next_multiple_of(SLICE_ALIGN)
}

/// What `rank` of `world_size` owns of a flat buffer of `numel` elements: equal slices whose edges are
/// multiples of [`SLICE_ALIGN`], the last ones shorter or empty.
pub fn owned_range(numel: usize, rank: usize, world_size: usize) -> Range<usize> {
    assert!(rank < world_size, "rank {rank} of {world_size}");
    let slice = slice_numel(numel, world_size);
    // A rank beyond the end owns the empty range there; saturating, for the last of very many ranks.
    let edge = |rank: usize| slice.saturating_mul(rank).min(numel);
    edge(rank)..edge(rank + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn ranks_share_a_buffer_without_gap_or_overlap(
            numel in 0_usize..300_000, world_size in 1_usize..70,
        ) {
            let mut end = 0;
            let mut longest = 0;
            for rank in 0..world_size {
                let range = owned_range(numel, rank, world_size);
                prop_assert_eq!(range.start, end);
                prop_assert!(range.start.is_multiple_of(SLICE_ALIGN) || range.start == numel);
                longest = longest.max(range.len());
                end = range.end;
            }
            prop_assert_eq!(end, numel);
            prop_assert!(longest < numel.div_ceil(world_size) + SLICE_ALIGN);
        }
    }
}
