//! Which source of a mixture each sample comes from: arithmetic, without state and without chance.
//! Owns the apportioning; refuses to know what the sources hold.

/// Sources with weights, as an endless sequence in which every stretch has the weights' shares, to
/// within one sample for each time that the sources can be halved.
///
/// The sources are halved, and each half again, down to single ones. Where a half with the share s of
/// a group's weight is split off, it gets the group's sample i iff `floor((i + 1) s) > floor(i s)`, and
/// as its own sample `floor(i s)`; the rest of the group gets sample `i - floor(i s)` of its own. So a
/// source sees its samples 0, 1, 2, ... in order, none left out, and where it stands is a sum in closed
/// form. Shares are held in units of 2^-64.
#[derive(Debug, Clone)]
pub struct Mixture {
    root: Node,
    n_sources: usize,
}

#[derive(Debug, Clone)]
enum Node {
    Source(usize),
    /// The left half gets this share of the samples, in units of 2^-64.
    Halves(u64, Box<(Node, Node)>),
}

impl Mixture {
    /// A mixture of sources with these weights, whatever their sum.
    ///
    /// # Panics
    /// On no sources, or weights that are not positive numbers: configurations with these are refused.
    pub fn new(weights: &[f64]) -> Mixture {
        let positive = |weight: &f64| *weight > 0.0 && weight.is_finite();
        assert!(!weights.is_empty() && weights.iter().all(positive), "weights are positive: {weights:?}");
        let largest = weights.iter().copied().fold(0.0, f64::max);
        let scaled: Vec<f64> = weights.iter().map(|weight| weight / largest).collect(); // sums stay finite
        Mixture { root: Node::of(&scaled, 0), n_sources: weights.len() }
    }

    /// Which source sample `i` of the mixture comes from, and which of its samples that is.
    pub fn at(&self, i: u64) -> (usize, u64) {
        let (mut node, mut i) = (&self.root, i);
        loop {
            match node {
                Node::Source(source) => return (*source, i),
                Node::Halves(share, halves) => {
                    let left = part(i.into(), *share);
                    let takes = part(u128::from(i) + 1, *share) > left;
                    (node, i) = if takes { (&halves.0, left) } else { (&halves.1, i - left) };
                }
            }
        }
    }

    /// How many of the first `n` samples come from each source.
    pub fn counts(&self, n: u64) -> Vec<u64> {
        let mut counts = vec![0; self.n_sources];
        self.root.count(n, &mut counts);
        counts
    }
}

impl Node {
    fn of(weights: &[f64], first: usize) -> Node {
        if weights.len() == 1 {
            return Node::Source(first);
        }
        let (left, right) = weights.split_at(weights.len() / 2);
        let sum: f64 = weights.iter().sum();
        let share = left.iter().sum::<f64>() / sum * 2f64.powi(64);
        // As an integer it saturates; a half that gets nothing in 2^64 samples gets one of them.
        let share = (share as u64).clamp(1, u64::MAX);
        Node::Halves(share, Box::new((Node::of(left, first), Node::of(right, first + left.len()))))
    }

    fn count(&self, n: u64, counts: &mut [u64]) {
        match self {
            Node::Source(source) => counts[*source] = n,
            Node::Halves(share, halves) => {
                let left = part(n.into(), *share);
                halves.0.count(left, counts);
                halves.1.count(n - left, counts);
            }
        }
    }
}

/// `floor(n share / 2^64)`, for n of at most 2^64.
fn part(n: u128, share: u64) -> u64 {
    ((n * u128::from(share)) >> 64) as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Common Crawl, WebText2, Books1, Books2, Wikipedia, in percent as printed (Brown et al. 2020, table
    /// 2.2): they sum to 101.
    const GPT3: [f64; 5] = [60.0, 22.0, 8.0, 8.0, 3.0];

    #[test]
    fn one_source_alone_has_every_sample_at_its_own_number() {
        let mixture = Mixture::new(&[0.3]);
        assert_eq!([0, 7, u64::MAX].map(|i| mixture.at(i)), [(0, 0), (0, 7), (0, u64::MAX)]);
    }

    #[test]
    fn the_mixture_never_changes_between_versions() {
        // A run that goes on must see what it would have seen: these values are part of the format.
        let mixture = Mixture::new(&GPT3);
        let first: Vec<usize> = (0..20).map(|i| mixture.at(i).0).collect();
        assert_eq!(first, [4, 1, 0, 0, 1, 3, 0, 0, 0, 1, 2, 0, 0, 0, 1, 3, 0, 0, 1, 0]);
        assert_eq!(mixture.at(1_000_000_007), (0, 594_059_409));
    }

    #[test]
    fn fractions_of_any_ten_thousand_samples_are_exact_to_one_in_a_thousand() {
        let mixture = Mixture::new(&GPT3);
        let sum: f64 = GPT3.iter().sum();
        for start in (0..40_000).step_by(37).chain([u64::MAX - 10_000, 1 << 40]) {
            let mut seen = [0u64; 5];
            (start..start + 10_000).for_each(|i| seen[mixture.at(i).0] += 1);
            for (seen, weight) in seen.iter().zip(GPT3) {
                assert!((*seen as f64 / 1e4 - weight / sum).abs() <= 1e-3, "{start}: {seen} of {weight}");
            }
        }
    }

    proptest! {
        #[test]
        fn every_source_sees_its_samples_in_order_and_none_twice(
            weights in prop::collection::vec(1e-6f64..1.0, 1..12), start in 0u64..1 << 62
        ) {
            let mixture = Mixture::new(&weights);
            let mut next = mixture.counts(start);
            for i in start..start + 2000 {
                let (source, number) = mixture.at(i);
                prop_assert_eq!(number, next[source]);
                next[source] += 1;
            }
            prop_assert_eq!(mixture.counts(start + 2000), next);
        }

        #[test]
        fn any_stretch_has_the_shares_of_the_weights(
            weights in prop::collection::vec(1e-3f64..1.0, 1..100), start in 0u64..1 << 50, len in 1u64..1 << 40
        ) {
            let mixture = Mixture::new(&weights);
            let sum: f64 = weights.iter().sum();
            let (before, after) = (mixture.counts(start), mixture.counts(start + len));
            for ((before, after), weight) in before.iter().zip(&after).zip(&weights) {
                let off = (after - before) as f64 - len as f64 * (weight / sum);
                prop_assert!(off.abs() < 8.0, "off by {off}"); // 7 halvings of fewer than 128 sources
            }
        }
    }
}
