//! Samples that a run leaves out, and what that makes of the numbers of all others. Owns the
//! arithmetic; refuses to know why a sample is left out, and who remembers it.

use std::ops::Range;

/// A set of sample numbers. What is left of the order is closed up: position p of a run is the p-th
/// sample that is not skipped.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Skips {
    /// Ascending; they neither overlap nor touch.
    ranges: Vec<Range<u64>>,
}

impl Skips {
    /// Adds samples to the set. They may be in it already.
    pub fn add(&mut self, samples: Range<u64>) {
        if samples.is_empty() {
            return;
        }
        let first = self.ranges.partition_point(|range| range.end < samples.start);
        let after = self.ranges.partition_point(|range| range.start <= samples.end);
        let met = &self.ranges[first..after];
        let start = met.first().map_or(samples.start, |range| range.start.min(samples.start));
        let end = met.last().map_or(samples.end, |range| range.end.max(samples.end));
        self.ranges.splice(first..after, std::iter::once(start..end));
    }

    /// The number of the sample at a position of the run.
    pub fn sample(&self, position: u64) -> u64 {
        let mut number = position;
        for range in &self.ranges {
            if number < range.start {
                break;
            }
            number = number.saturating_add(range.end - range.start);
        }
        number
    }

    /// Whether a sample is left out.
    pub fn contains(&self, sample: u64) -> bool {
        let after = self.ranges.partition_point(|range| range.start <= sample);
        after.checked_sub(1).is_some_and(|last| self.ranges[last].contains(&sample))
    }
}

impl FromIterator<Range<u64>> for Skips {
    fn from_iter<I: IntoIterator<Item = Range<u64>>>(ranges: I) -> Skips {
        let mut skips = Skips::default();
        ranges.into_iter().for_each(|range| skips.add(range));
        skips
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn without_skips_every_sample_is_where_its_number_says() {
        let skips = Skips::default();
        assert_eq!([0, 1, u64::MAX].map(|position| skips.sample(position)), [0, 1, u64::MAX]);
        assert!(!skips.contains(0));
    }

    #[test]
    fn a_skipped_step_moves_all_later_ones_on() {
        let skips: Skips = std::iter::once(16..32).collect();
        assert_eq!([15, 16, 17, 32].map(|position| skips.sample(position)), [15, 32, 33, 48]);
        assert_eq!([15, 16, 31, 32].map(|sample| skips.contains(sample)), [false, true, true, false]);
    }

    proptest! {
        #[test]
        fn positions_count_what_is_not_skipped(
            ranges in prop::collection::vec((0u64..200, 0u64..30), 0..8)
        ) {
            let ranges: Vec<_> = ranges.into_iter().map(|(start, len)| start..start + len).collect();
            let skips: Skips = ranges.iter().cloned().collect();
            let skipped = |sample: &u64| ranges.iter().any(|range| range.contains(sample));
            let left: Vec<u64> = (0..300).filter(|sample| !skipped(sample)).collect();
            let got: Vec<u64> = (0..left.len() as u64).map(|position| skips.sample(position)).collect();
            prop_assert_eq!(got, left);
            prop_assert!((0..300).all(|sample| skips.contains(sample) == skipped(&sample)));
        }
    }
}
