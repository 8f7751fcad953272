//! Pieces of the segments' flat buffers: who owns which, what they are called in a file, and whether
//! together they make up the whole. Pure arithmetic; knows no files.

use configs::{SegmentSpec, owned_range};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::fmt;
use std::ops::Range;

/// What a flat buffer holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StateKind {
    /// Parameters, fp32.
    Param,
    /// AdamW's first moment.
    ExpAvg,
    /// AdamW's second moment.
    ExpAvgSq,
}

impl StateKind {
    /// All that a checkpoint holds of every segment.
    pub const ALL: [StateKind; 3] = [StateKind::Param, StateKind::ExpAvg, StateKind::ExpAvgSq];

    /// The name in files, as PyTorch's AdamW calls them.
    pub fn name(self) -> &'static str {
        match self {
            StateKind::Param => "param",
            StateKind::ExpAvg => "exp_avg",
            StateKind::ExpAvgSq => "exp_avg_sq",
        }
    }
}

impl fmt::Display for StateKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A contiguous piece of one segment's flat buffer.
#[derive(Debug, Clone, PartialEq)]
pub struct Slice {
    /// The segment's name.
    pub segment: String,
    /// What the values are.
    pub kind: StateKind,
    /// Elements before it in the flat buffer.
    pub start: usize,
    /// `[len]`
    pub values: Vec<f32>,
}

impl Slice {
    /// Copies what `rank` of `world_size` owns out of a whole flat buffer; nothing when it owns none.
    pub fn owned(
        segment: &str,
        kind: StateKind,
        whole: &[f32],
        rank: usize,
        world_size: usize,
    ) -> Option<Slice> {
        let range = owned_range(whole.len(), rank, world_size);
        (!range.is_empty()).then(|| Slice {
            segment: segment.to_string(),
            kind,
            start: range.start,
            values: whole[range].to_vec(),
        })
    }

    /// The slice without its values.
    pub fn spec(&self) -> SliceSpec {
        SliceSpec {
            segment: self.segment.clone(),
            kind: self.kind,
            start: self.start,
            len: self.values.len(),
        }
    }
}

/// Which piece of which buffer, without the values.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SliceSpec {
    /// The segment's name.
    pub segment: String,
    /// What the values are.
    pub kind: StateKind,
    /// Elements before it in the flat buffer.
    pub start: usize,
    /// Elements.
    pub len: usize,
}

impl SliceSpec {
    /// The name of its tensor in a file, such as `h.0:exp_avg:4096`.
    pub fn tensor_name(&self) -> String {
        format!("{}:{}:{}", self.segment, self.kind, self.start)
    }
}

/// Slices that do not make up the segments.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SliceError {
    /// Elements that no slice holds.
    #[error("no slice holds elements {}..{} of {segment} ({kind})", at.start, at.end)]
    Missing {
        /// The segment.
        segment: String,
        /// What is missing of it.
        kind: StateKind,
        /// The first gap.
        at: Range<usize>,
    },
    /// Elements that two slices hold.
    #[error("two slices hold elements {}..{} of {segment} ({kind})", at.start, at.end)]
    Overlap {
        /// The segment.
        segment: String,
        /// What is there twice.
        kind: StateKind,
        /// The first overlap.
        at: Range<usize>,
    },
    /// A slice of a segment that does not exist, beyond the end of one, or of no elements.
    #[error("slice {} of {len} elements lies outside the model's segments", slice.tensor_name(), len = slice.len)]
    Outside {
        /// The slice.
        slice: SliceSpec,
    },
}

/// Checks that the slices hold every element of every segment once for each kind.
pub(crate) fn check_cover<'a>(
    segments: &[SegmentSpec],
    slices: impl IntoIterator<Item = &'a SliceSpec>,
) -> Result<(), SliceError> {
    let lengths: HashMap<&str, usize> = segments.iter().map(|s| (s.name.as_str(), s.numel)).collect();
    let mut pieces: HashMap<(&str, StateKind), Vec<Range<usize>>> = HashMap::new();
    for slice in slices {
        let end = slice.start.checked_add(slice.len).filter(|_| slice.len > 0);
        match (lengths.get(slice.segment.as_str()), end) {
            (Some(&numel), Some(end)) if end <= numel => {
                pieces.entry((&slice.segment, slice.kind)).or_default().push(slice.start..end);
            }
            _ => return Err(SliceError::Outside { slice: slice.clone() }),
        }
    }
    for segment in segments {
        for kind in StateKind::ALL {
            let held = pieces.remove(&(segment.name.as_str(), kind)).unwrap_or_default();
            check_buffer(segment, kind, held)?;
        }
    }
    Ok(())
}

fn check_buffer(
    segment: &SegmentSpec,
    kind: StateKind,
    mut held: Vec<Range<usize>>,
) -> Result<(), SliceError> {
    held.sort_unstable_by_key(|range| range.start);
    let end = segment.numel..segment.numel;
    let mut covered = 0;
    for range in held.into_iter().chain([end]) {
        let name = || segment.name.clone();
        if range.start > covered {
            return Err(SliceError::Missing { segment: name(), kind, at: covered..range.start });
        }
        if range.start < covered {
            let at = range.start..range.end.min(covered);
            return Err(SliceError::Overlap { segment: name(), kind, at });
        }
        covered = range.end;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one_segment(numel: usize) -> Vec<SegmentSpec> {
        vec![SegmentSpec { name: "wte".into(), tensors: Vec::new(), numel }]
    }

    /// Each piece, from its first element to before its last, as a slice of every kind.
    fn slices(pieces: &[(usize, usize)]) -> Vec<SliceSpec> {
        let of = |kind, &(start, end)| SliceSpec { segment: "wte".into(), kind, start, len: end - start };
        StateKind::ALL.iter().flat_map(|&kind| pieces.iter().map(move |piece| of(kind, piece))).collect()
    }

    #[test]
    fn slices_in_any_order_make_up_a_segment() {
        assert_eq!(check_cover(&one_segment(10), &slices(&[(4, 10), (0, 4)])), Ok(()));
        assert_eq!(check_cover(&one_segment(0), &[]), Ok(()));
    }

    #[test]
    fn gaps_overlaps_and_strays_are_told_apart() {
        let missing = |at| SliceError::Missing { segment: "wte".into(), kind: StateKind::Param, at };
        let check = |pieces: &[_]| check_cover(&one_segment(10), &slices(pieces)).unwrap_err();
        assert_eq!(check(&[]), missing(0..10));
        assert_eq!(check(&[(0, 4), (6, 10)]), missing(4..6));
        assert_eq!(check(&[(0, 9)]), missing(9..10));
        let overlap = SliceError::Overlap { segment: "wte".into(), kind: StateKind::Param, at: 5..7 };
        assert_eq!(check(&[(0, 7), (5, 10)]), overlap);
        assert!(matches!(check(&[(0, 10), (10, 11)]), SliceError::Outside { .. }));
        let endless = SliceSpec { len: usize::MAX, start: 5, ..slices(&[(0, 10)])[0].clone() };
        assert!(matches!(check_cover(&one_segment(10), &[endless]), Err(SliceError::Outside { .. })));
    }

    #[test]
    fn names_in_files_are_the_documented_ones() {
        let slice = Slice { segment: "h.0".into(), kind: StateKind::ExpAvg, start: 4096, values: vec![0.0] };
        assert_eq!(slice.spec().tensor_name(), "h.0:exp_avg:4096");
        for kind in StateKind::ALL {
            assert_eq!(serde_json::to_string(&kind).unwrap(), format!("\"{kind}\""));
        }
    }
}
