//! In which order a run sees its sequences: arithmetic, without an index in memory and without
//! state. Owns the permutation; refuses to know tokens, batches and ranks.

use configs::Philox;

/// Rounds of the Feistel network. Four make a pseudo-random permutation of a large set (Luby and
/// Rackoff 1988); twice as many keep small sets well mixed.
const ROUNDS: u32 = 8;

/// The order of one run over one data set: a pure function of (digest, seq_len, seed, i).
///
/// Sample i is sequence `permutation(epoch)(i mod n)` in epoch `i / n`. The permutation of an epoch
/// is a Feistel network over pairs (l, r) of digits in base a = ceil(sqrt(n)), with
/// `(l, r) <- (r, (l + f(round, epoch, r)) mod a)` and f from Philox; a result of n or more, which
/// a^2 >= n leaves room for, goes through the network again until it is less (cycle walking, Black
/// and Rogaway 2002, "Ciphers with arbitrary finite domains"). Walking along a cycle of a
/// permutation from a place below n comes back below n, and no two places meet: what is left is a
/// permutation of 0..n.
#[derive(Debug, Clone, Copy)]
pub struct Order {
    philox: Philox,
    n_sequences: u64,
    base: u64,
}

impl Order {
    /// The order of a data set with that digest, cut into `n_sequences` sequences of `seq_len`.
    ///
    /// # Panics
    /// On no sequences: whoever opens the data refuses it first.
    pub fn new(digest: [u8; 32], seq_len: usize, n_sequences: u64, seed: u64) -> Order {
        assert!(n_sequences > 0, "an order needs at least one sequence");
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"phalanx order 1");
        hasher.update(&digest);
        hasher.update(&(seq_len as u64).to_le_bytes());
        hasher.update(&seed.to_le_bytes());
        let hash = hasher.finalize();
        let key = hash.as_bytes().first_chunk().copied().unwrap_or_default();
        let root = n_sequences.isqrt();
        let base = if root * root == n_sequences { root } else { root + 1 };
        Order { philox: Philox::new(u64::from_le_bytes(key)), n_sequences, base }
    }

    /// Sequences of one epoch.
    pub fn n_sequences(&self) -> u64 {
        self.n_sequences
    }

    /// The sequence that is sample `i` of the run, less than `n_sequences`.
    pub fn sequence(&self, i: u64) -> u64 {
        let (epoch, place) = (i / self.n_sequences, i % self.n_sequences);
        self.below(epoch, self.permute(epoch, place))
    }

    /// The sequences of two samples, each in an order of its own. What is done for one depends step by step on
    /// itself; two side by side take little more time.
    pub fn sequences(asked: [(&Order, u64); 2]) -> [u64; 2] {
        let [(x, i), (y, j)] = asked;
        let (epoch_x, epoch_y) = (i / x.n_sequences, j / y.n_sequences);
        let (place_x, place_y) = (i % x.n_sequences, j % y.n_sequences);
        let (mut left_x, mut right_x) = (place_x / x.base, place_x % x.base);
        let (mut left_y, mut right_y) = (place_y / y.base, place_y % y.base);
        for round in 0..ROUNDS {
            let counters =
                [(x.philox, counter(round, epoch_x, right_x)), (y.philox, counter(round, epoch_y, right_y))];
            let [words_x, words_y] = Philox::at_both(counters);
            (left_x, right_x) = (right_x, x.moved(left_x, words_x));
            (left_y, right_y) = (right_y, y.moved(left_y, words_y));
        }
        [x.below(epoch_x, left_x * x.base + right_x), y.below(epoch_y, left_y * y.base + right_y)]
    }

    /// Where a place ends that went through the network once: it goes on until it is a sequence.
    fn below(&self, epoch: u64, mut place: u64) -> u64 {
        while place >= self.n_sequences {
            place = self.permute(epoch, place);
        }
        place
    }

    /// The permutation of 0..base^2 of one epoch. base <= 2^32, so that base^2 - 1 fits 64 bits.
    fn permute(&self, epoch: u64, place: u64) -> u64 {
        let (mut left, mut right) = (place / self.base, place % self.base);
        for round in 0..ROUNDS {
            let words = self.philox.at(counter(round, epoch, right));
            (left, right) = (right, self.moved(left, words));
        }
        left * self.base + right
    }

    /// A digit moved by a random one.
    #[inline(always)]
    fn moved(&self, digit: u64, words: [u32; 4]) -> u64 {
        let random = u64::from(words[0]) << 32 | u64::from(words[1]);
        let by = ((u128::from(random) * u128::from(self.base)) >> 64) as u64;
        // Both are less than the base; a division would take longer than the rest.
        let sum = digit + by;
        if sum < self.base { sum } else { sum - self.base }
    }
}

fn counter(round: u32, epoch: u64, right: u64) -> [u32; 4] {
    [right as u32, round, epoch as u32, (epoch >> 32) as u32]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn epoch(order: &Order, epoch: u64) -> Vec<u64> {
        let n = order.n_sequences();
        (epoch * n..(epoch + 1) * n).map(|i| order.sequence(i)).collect()
    }

    proptest! {
        #[test]
        fn every_epoch_is_a_permutation(n in 1u64..3000, seed: u64, epoch_number in 0u64..1000) {
            let order = Order::new([7; 32], 256, n, seed);
            let mut seen = epoch(&order, epoch_number);
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..n).collect::<Vec<_>>());
        }

        #[test]
        fn huge_data_sets_stay_in_range_and_two_samples_of_an_epoch_differ(
            n in (1u64 << 40)..u64::MAX, seed: u64, a: u64, b: u64
        ) {
            let order = Order::new([7; 32], 256, n, seed);
            let (a, b) = (a % n, b % n);
            prop_assert!(order.sequence(a) < n);
            prop_assert_eq!(a == b, order.sequence(a) == order.sequence(b));
        }
    }

    #[test]
    fn the_order_never_changes_between_versions() {
        // A run that goes on must see what it would have seen: these values are part of the format.
        let order = Order::new([1; 32], 256, 1000, 1337);
        let samples = [0, 1, 2, 999, 1000, 1_000_000_007].map(|i| order.sequence(i));
        assert_eq!(samples, [767, 510, 62, 880, 946, 658]);
    }

    proptest! {
        #[test]
        fn two_samples_together_are_what_they_are_alone(
            n in 1u64..u64::MAX, m in 1u64..3000, seed: u64, i: u64, j: u64
        ) {
            let (x, y) = (Order::new([7; 32], 256, n, seed), Order::new([8; 32], 128, m, seed));
            prop_assert_eq!(Order::sequences([(&x, i), (&y, j)]), [x.sequence(i), y.sequence(j)]);
        }
    }

    #[test]
    fn epochs_seeds_lengths_and_data_sets_differ_in_order() {
        let first = epoch(&Order::new([0; 32], 256, 1001, 1), 0);
        for other in [
            epoch(&Order::new([0; 32], 256, 1001, 1), 1),
            epoch(&Order::new([0; 32], 256, 1001, 1), 1 << 40),
            epoch(&Order::new([0; 32], 256, 1001, 2), 0),
            epoch(&Order::new([0; 32], 255, 1001, 1), 0),
            epoch(&Order::new([1; 32], 256, 1001, 1), 0),
        ] {
            // Two random permutations of 1001 agree in about one place.
            let agreeing = first.iter().zip(&other).filter(|(a, b)| a == b).count();
            assert!(agreeing < 10, "{agreeing} places agree");
        }
    }

    #[test]
    fn one_sequence_is_every_sample() {
        let order = Order::new([0; 32], 256, 1, 1);
        assert_eq!([0, 1, 2, u64::MAX].map(|i| order.sequence(i)), [0; 4]);
    }

    #[test]
    fn the_first_and_last_sample_numbers_have_a_sequence() {
        for n in [2, 3, 1 << 32, (1 << 32) + 1, u64::MAX] {
            let order = Order::new([0; 32], 1, n, 0);
            assert!([0, n - 1, n, u64::MAX].iter().all(|&i| order.sequence(i) < n), "n = {n}");
        }
    }

    #[test]
    fn every_sequence_is_as_likely_to_come_first_as_any_other() {
        const N: usize = 10;
        let mut counts = [[0u32; N]; N];
        for seed in 0..5000 {
            let order = Order::new([0; 32], 256, N as u64, seed);
            for (place, counts) in counts.iter_mut().enumerate() {
                counts[order.sequence(place as u64) as usize] += 1;
            }
        }
        // 500 expected in each of 100 cells, standard deviation 21: five of them are not met by chance.
        assert!(counts.iter().flatten().all(|count| (395..=605).contains(count)), "{counts:?}");
    }
}
