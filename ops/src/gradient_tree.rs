//! The sum of micro-batches' gradients as a perfect binary tree over their index, so that who computed
//! which of them changes no bit. Knows flat buffers; knows no ranks: theirs is the top of the tree.

use crate::FlatSegment;
use tch::Tensor;

/// Partial sums of a rank's micro-batches, a power of two of them, in the manner of a binary counter:
/// level l of a segment holds the sum of 2^l consecutive leaves while they wait for the next 2^l.
#[derive(Debug)]
pub struct GradientTree {
    /// `[level][segment]`, flat buffers.
    levels: Vec<Vec<Tensor>>,
}

impl GradientTree {
    /// A tree over `leaves` micro-batches of a rank. Takes log2(leaves) times the memory of the gradients.
    ///
    /// # Panics
    /// `leaves` is no power of two.
    pub fn new(segments: &[FlatSegment], leaves: u64) -> GradientTree {
        assert!(leaves.is_power_of_two(), "a perfect tree has a power of two of leaves, not {leaves}");
        let level = |_| segments.iter().map(|segment| segment.grad().zeros_like()).collect();
        GradientTree { levels: (0..leaves.trailing_zeros()).map(level).collect() }
    }

    /// Takes the gradient of leaf `leaf` of a segment, which is in its gradient buffer: adds to it what
    /// waits for it, and puts it aside, leaving zeros. After the last leaf the sum of all stays there.
    pub fn add_leaf(&mut self, segment: &FlatSegment, index: usize, leaf: u64) {
        let mut sum = segment.grad().shallow_clone();
        let complete = leaf.trailing_ones() as usize;
        for level in &self.levels[..complete] {
            let _ = sum.g_add_(&level[index]);
        }
        if let Some(level) = self.levels.get_mut(complete) {
            level[index].copy_(&sum);
            let _ = sum.zero_();
        }
    }
}

/// The sum of `values`, a power of two of them, in the same tree.
pub fn tree_total(values: &[f64]) -> f64 {
    match values {
        [] => 0.0,
        [value] => *value,
        _ => {
            let (left, right) = values.split_at(values.len() / 2);
            tree_total(left) + tree_total(right)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::collectives::tree_sum;
    use configs::{Init, Philox, SegmentSpec, TensorSpec};
    use tch::Device;

    const N: usize = 96;

    fn leaf(i: u64) -> Vec<f32> {
        let mut values = vec![0f32; N];
        Philox::new(11).normals(i as u32, &mut values);
        values.iter().map(|value| value * 10f32.powi(i as i32 % 5 - 2)).collect()
    }

    fn sum(leaves: std::ops::Range<u64>) -> Vec<f32> {
        let tensor = TensorSpec {
            name: "toy.weight".into(),
            shape: vec![N as i64],
            offset: 0,
            init: Init::Zeros,
            decay: false,
        };
        let spec = SegmentSpec { name: "toy".into(), tensors: vec![tensor], numel: N };
        let segments = [FlatSegment::zeros(spec, Device::Cpu).unwrap()];
        let mut tree = GradientTree::new(&segments, leaves.end - leaves.start);
        for (i, number) in leaves.enumerate() {
            let mut grad = segments[0].grad().shallow_clone();
            let _ = grad.g_add_(&Tensor::from_slice(&leaf(number)));
            tree.add_leaf(&segments[0], 0, i as u64);
        }
        Vec::try_from(segments[0].grad()).unwrap()
    }

    #[test]
    fn ranks_shares_summed_over_ranks_have_the_bits_of_one_rank_alone() {
        let whole = sum(0..16);
        for world_size in [2u64, 4, 8, 16] {
            let share = 16 / world_size;
            let shares: Vec<Vec<f32>> =
                (0..world_size).map(|rank| sum(rank * share..(rank + 1) * share)).collect();
            let rows: Vec<&[f32]> = shares.iter().map(Vec::as_slice).collect();
            let mut total = vec![0f32; N];
            tree_sum(&rows, &mut total);
            assert_eq!(total, whole, "{world_size} ranks");
        }
    }

    #[test]
    fn numbers_are_added_in_the_same_tree() {
        assert_eq!(tree_total(&[1e16, 1.0, -1e16, 1.0]), (1e16 + 1.0) + (-1e16 + 1.0));
    }
}
