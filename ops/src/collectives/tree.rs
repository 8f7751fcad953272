//! The order in which numbers of several ranks are added, and nothing else.

use std::ops::AddAssign;

/// Elements summed at a time, so that partial sums stay in the first-level cache.
pub(super) const BLOCK: usize = 1024;

/// Sums rows element by element, `rows` x `[n]` -> `[n]`, in the balanced binary tree over the row
/// index: the left half holds the largest power of two of rows that leaves the right one some.
///
/// For a power of two of rows this is the perfect tree, so the sum of 2^a groups of 2^b leaves each
/// has the same bits as the sum of all 2^(a+b) leaves. Without rows the sum is zero.
///
/// # Panics
/// If a row has another length than `out`.
pub fn tree_sum<T: Copy + Default + AddAssign>(rows: &[&[T]], out: &mut [T]) {
    for row in rows {
        assert_eq!(row.len(), out.len(), "rows and sum have one length");
    }
    let rows: Vec<*const T> = rows.iter().map(|row| row.as_ptr()).collect();
    for (index, block) in out.chunks_mut(BLOCK).enumerate() {
        // SAFETY: every row has as many elements as `out`, and they are borrowed until the end.
        unsafe { sum_block(&rows, index * BLOCK, block) };
    }
}

/// How many of several rows the left half of their tree holds.
pub(super) fn left_of(rows: usize) -> usize {
    rows.next_power_of_two() / 2
}

/// Sums elements `start..start + out.len()` of the rows.
///
/// # Safety
/// Every row addresses that many elements, aligned, that nobody writes meanwhile.
///
/// # Panics
/// If `out` is longer than [`BLOCK`].
pub(super) unsafe fn sum_block<T: Copy + Default + AddAssign>(
    rows: &[*const T],
    start: usize,
    out: &mut [T],
) {
    // SAFETY: by this function's contract.
    let row = |row: *const T| unsafe { std::slice::from_raw_parts(row.add(start), out.len()) };
    match *rows {
        [] => out.fill(T::default()),
        [a] => out.copy_from_slice(row(a)),
        [a, b] => {
            let (a, b) = (row(a), row(b));
            for ((sum, &a), &b) in out.iter_mut().zip(a).zip(b) {
                *sum = a;
                *sum += b;
            }
        }
        _ => {
            let (left, right) = rows.split_at(left_of(rows.len()));
            let mut scratch = [T::default(); BLOCK];
            let right_sum = &mut scratch[..out.len()];
            // SAFETY: handed on.
            unsafe {
                sum_block(left, start, out);
                sum_block(right, start, right_sum);
            }
            for (sum, &right) in out.iter_mut().zip(right_sum.iter()) {
                *sum += right;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One element whose sum shows the order: each value is lost unless it meets the right partner.
    fn sum(values: &[f32]) -> f32 {
        let rows: Vec<&[f32]> = values.iter().map(std::slice::from_ref).collect();
        let mut out = [f32::NAN];
        tree_sum(&rows, &mut out);
        out[0]
    }

    #[test]
    fn rows_are_added_in_the_balanced_tree() {
        let big = 2f32.powi(24);
        assert_eq!(sum(&[]), 0.0);
        assert_eq!(sum(&[3.0]), 3.0);
        assert_eq!(sum(&[big, 1.0, 1.0]), big, "(big + 1) + 1");
        assert_eq!(sum(&[big, 1.0, 1.0, 1.0]), big + 2.0, "(big + 1) + (1 + 1)");
        assert_eq!(sum(&[1.0, 1.0, 1.0, 1.0, big]), big + 4.0, "((1 + 1) + (1 + 1)) + big");
    }

    #[test]
    fn a_tree_of_trees_has_the_bits_of_the_tree() {
        let rows: Vec<Vec<f32>> =
            (0..8).map(|r| (0..3000).map(|i| ((i * 7 + r * 13) as f32).sin()).collect()).collect();
        let rows: Vec<&[f32]> = rows.iter().map(Vec::as_slice).collect();
        let mut whole = vec![0f32; 3000];
        tree_sum(&rows, &mut whole);
        let halves: Vec<Vec<f32>> = rows
            .chunks(2)
            .map(|pair| {
                let mut half = vec![0f32; 3000];
                tree_sum(pair, &mut half);
                half
            })
            .collect();
        let halves: Vec<&[f32]> = halves.iter().map(Vec::as_slice).collect();
        let mut nested = vec![0f32; 3000];
        tree_sum(&halves, &mut nested);
        assert_eq!(nested, whole);
    }
}
