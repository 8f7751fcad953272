//! Sums of rows in memory that several ranks see, in fp32 whatever they hold: the inner loops of a reduction.
//! Knows addresses, not whose they are.

use super::bf16;
use crate::collectives::tree::{BLOCK, left_of, sum_block};
use std::ops::Range;

/// What the rows of a sum hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Rows {
    /// fp32, taken as they are.
    Fp32,
    /// fp32, rounded to bf16 before they are added.
    Rounded,
    /// bf16.
    Bf16,
}

/// Where a sum goes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sum<'a> {
    /// Every copy in fp32. They may be rows of the sum.
    pub(super) fp32: &'a [*mut f32],
    /// A copy in bf16, or null.
    pub(super) bf16: *mut u16,
    /// Whether the fp32 copies are rounded to bf16.
    pub(super) round: bool,
}

/// Sums the elements of the rows that lie in `range`, in the tree's order and in fp32.
///
/// # Safety
/// Rows and copies address so many elements of what they hold, aligned; nobody else touches the copies or
/// writes to the rows meanwhile. A copy is a row, or overlaps none.
pub(super) unsafe fn sum(rows: &[*const u8], kind: Rows, range: Range<usize>, to: Sum) {
    let (mut block, mut rounded) = ([0f32; BLOCK], [0f32; BLOCK]);
    for start in range.clone().step_by(BLOCK) {
        let out = &mut block[..BLOCK.min(range.end - start)];
        // SAFETY: by this function's contract; a pointer to bytes has the layout of one to elements. All
        // rows of the block have been read before a copy is written.
        unsafe {
            match kind {
                Rows::Fp32 => sum_block(cast::<f32>(rows), start, out),
                Rows::Rounded => sum_read(cast::<f32>(rows), start, out, bf16::round_and_widen),
                Rows::Bf16 => sum_read(cast::<u16>(rows), start, out, bf16::widen),
            }
            if !to.bf16.is_null() {
                bf16::round(out, std::slice::from_raw_parts_mut(to.bf16.add(start), out.len()));
            }
            let kept: &[f32] = if to.round {
                bf16::round_and_widen(out, &mut rounded[..out.len()]);
                &rounded[..out.len()]
            } else {
                out
            };
            for &copy in to.fp32 {
                copy.add(start).copy_from_nonoverlapping(kept.as_ptr(), kept.len());
            }
        }
    }
}

/// As [`sum_block`], of rows that `read` turns into fp32, each of them once.
///
/// # Safety
/// As [`sum_block`].
unsafe fn sum_read<L>(rows: &[*const L], start: usize, out: &mut [f32], read: fn(&[L], &mut [f32])) {
    let [first, others @ ..] = rows else { return out.fill(0.0) };
    if others.is_empty() {
        // SAFETY: by this function's contract.
        return read(unsafe { std::slice::from_raw_parts(first.add(start), out.len()) }, out);
    }
    let (left, right) = rows.split_at(left_of(rows.len()));
    let mut scratch = [0f32; BLOCK];
    let right_sum = &mut scratch[..out.len()];
    // SAFETY: handed on.
    unsafe {
        sum_read(left, start, out, read);
        sum_read(right, start, right_sum, read);
    }
    out.iter_mut().zip(right_sum.iter()).for_each(|(sum, &right)| *sum += right);
}

fn cast<L>(rows: &[*const u8]) -> &[*const L] {
    // SAFETY: pointers to sized types have one layout, and any address is a valid pointer value.
    unsafe { std::slice::from_raw_parts(rows.as_ptr().cast(), rows.len()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sum_may_be_written_over_its_rows() {
        let numel = 3 * BLOCK + 5;
        let mut rows: Vec<Vec<f32>> = (0..3).map(|r| (0..numel).map(|i| (i + r) as f32).collect()).collect();
        let mut halves = vec![0u16; numel];
        let to: Vec<*mut f32> = rows.iter_mut().map(|row| row.as_mut_ptr()).collect();
        let from: Vec<*const u8> = to.iter().map(|row| row.cast_const().cast()).collect();
        // SAFETY: three rows and a copy of `numel` elements that nothing else touches.
        unsafe {
            sum(&from, Rows::Fp32, 0..numel, Sum { fp32: &to, bf16: halves.as_mut_ptr(), round: false })
        };
        assert!(rows.iter().all(|row| (0..numel).all(|i| row[i] == (3 * i + 3) as f32)));
        let mut rounded = vec![0u16; numel];
        bf16::round(&rows[0], &mut rounded);
        assert_eq!(halves, rounded);
    }

    #[test]
    fn rows_in_bf16_are_added_in_the_tree_too() {
        // 256 + 1 is 256 in bf16: only sums in fp32 keep the ones, and only in the tree's order is nothing lost.
        let big = 2f32.powi(24);
        let numbers = [big, 1.0, 1.0, 1.0, 257.0];
        let mut halves = [0u16; 5];
        bf16::round(&numbers, &mut halves);
        let sum_of = |rows: &[*const u8], kind| {
            let mut total = [f32::NAN];
            let to = Sum { fp32: &[total.as_mut_ptr()], bf16: std::ptr::null_mut(), round: false };
            // SAFETY: rows of one element each, and a copy that nothing else touches.
            unsafe { sum(rows, kind, 0..1, to) };
            total[0]
        };
        let fp32: Vec<*const u8> = numbers.iter().map(|x| std::ptr::from_ref(x).cast()).collect();
        let bf16: Vec<*const u8> = halves.iter().map(|x| std::ptr::from_ref(x).cast()).collect();
        for rows in 1..=5 {
            let in_tree = |numbers: &[f32]| {
                let leaves: Vec<&[f32]> = numbers.iter().map(std::slice::from_ref).collect();
                let mut total = [0.0];
                crate::collectives::tree_sum(&leaves, &mut total);
                total[0]
            };
            let expected = in_tree(&[big, 1.0, 1.0, 1.0, 256.0][..rows]);
            assert_eq!(sum_of(&fp32[..rows], Rows::Rounded), expected, "{rows} rows");
            assert_eq!(sum_of(&bf16[..rows], Rows::Bf16), expected, "{rows} rows");
        }
    }
}
