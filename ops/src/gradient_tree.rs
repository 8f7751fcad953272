//! The sum of micro-batches' gradients as a perfect binary tree over their index, so that who computed
//! which of them changes no bit. Knows flat buffers; knows no ranks: theirs is a part of the tree.

use tch::{Device, Kind, Tensor};

/// Partial sums of consecutive leaves of the tree, in the manner of a binary counter: level l of a
/// buffer holds the sum of 2^l leaves while they wait for the next 2^l.
#[derive(Debug)]
pub struct GradientTree {
    /// `[level][buffer]`, fp32.
    levels: Vec<Vec<Tensor>>,
}

impl GradientTree {
    /// A tree over at most `most_leaves` leaves for buffers of these many elements. Takes
    /// log2(most_leaves) times their memory.
    ///
    /// # Panics
    /// `most_leaves` is no power of two.
    pub fn new(numels: &[usize], most_leaves: u64, device: Device) -> GradientTree {
        assert!(
            most_leaves.is_power_of_two(),
            "a perfect tree has a power of two of leaves, not {most_leaves}"
        );
        let zeros = |numel: &usize| Tensor::zeros([*numel as i64], (Kind::Float, device));
        let level = |_| numels.iter().map(zeros).collect();
        GradientTree { levels: (0..most_leaves.trailing_zeros()).map(level).collect() }
    }

    /// Adds to `leaf`, the number `number` of `leaves` leaves of a buffer, what waits for it. After the
    /// last one that is the sum of all, and true is returned; before, the sum is put aside.
    ///
    /// # Panics
    /// `leaves` is no power of two, or above what the tree was made for.
    pub fn add_leaf(&mut self, leaf: &Tensor, buffer: usize, number: u64, leaves: u64) -> bool {
        assert!(leaves.is_power_of_two() && number < leaves, "leaf {number} of {leaves}");
        let complete = number.trailing_ones() as usize;
        let mut sum = leaf.shallow_clone();
        for level in &self.levels[..complete] {
            let _ = sum.g_add_(&level[buffer]);
        }
        let last = number + 1 == leaves;
        if !last {
            self.levels[complete][buffer].copy_(&sum);
        }
        last
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::collectives::tree_sum;
    use configs::Philox;

    const N: usize = 96;

    fn leaf(i: u32) -> Vec<f32> {
        let mut values = vec![0f32; N];
        Philox::new(11).normals(i, 0, &mut values);
        values.iter().map(|value| value * 10f32.powi(i as i32 % 5 - 2)).collect()
    }

    fn sum(leaves: impl ExactSizeIterator<Item = Vec<f32>>) -> Vec<f32> {
        let n = leaves.len() as u64;
        // Made for more than there are: early stages of a batch ramp have fewer.
        let mut tree = GradientTree::new(&[N], 2 * n, Device::Cpu);
        let mut sums = leaves.enumerate().filter_map(|(i, leaf)| {
            let leaf = Tensor::from_slice(&leaf);
            tree.add_leaf(&leaf, 0, i as u64, n).then_some(leaf)
        });
        Vec::try_from(sums.next().unwrap()).unwrap()
    }

    fn over_ranks(rows: &[Vec<f32>]) -> Vec<f32> {
        let rows: Vec<&[f32]> = rows.iter().map(Vec::as_slice).collect();
        let mut total = vec![0f32; N];
        tree_sum(&rows, &mut total);
        total
    }

    #[test]
    fn runs_of_leaves_per_rank_summed_over_ranks_have_the_bits_of_one_rank_alone() {
        let whole = sum((0..16).map(leaf));
        for world_size in [2usize, 4, 8, 16] {
            let share = 16 / world_size as u32;
            let rank = |rank: u32| sum((rank * share..(rank + 1) * share).map(leaf));
            let shares: Vec<Vec<f32>> = (0..world_size as u32).map(rank).collect();
            assert_eq!(over_ranks(&shares), whole, "{world_size} ranks");
        }
    }

    #[test]
    fn leaves_summed_over_ranks_first_have_the_bits_of_one_rank_alone() {
        let whole = sum((0..16).map(leaf));
        for world_size in [2usize, 4, 8, 16] {
            let step = |k: usize| {
                let leaves: Vec<_> = (0..world_size).map(|r| leaf((k * world_size + r) as u32)).collect();
                over_ranks(&leaves)
            };
            assert_eq!(sum((0..16 / world_size).map(step)), whole, "{world_size} ranks");
        }
    }
}
