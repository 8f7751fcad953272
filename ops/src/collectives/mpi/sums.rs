//! Sums of rows in memory that several ranks see, and rounding to bf16: the inner loops of a reduction.
//! Knows addresses, not whose they are.

use crate::collectives::tree::{BLOCK, sum_block};

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

/// Sums `numel` elements of the rows in the tree's order, in fp32.
///
/// # Safety
/// Rows and copies address `numel` elements of what they hold, aligned; nobody else touches the copies or
/// writes to the rows meanwhile. A copy is a row, or overlaps none.
pub(super) unsafe fn sum(rows: &[*const u8], kind: Rows, numel: usize, to: Sum) {
    let mut block = [0f32; BLOCK];
    for start in (0..numel).step_by(BLOCK) {
        let out = &mut block[..BLOCK.min(numel - start)];
        // SAFETY: by this function's contract; a pointer to bytes has the layout of one to elements. All
        // rows of the block have been read before a copy is written.
        unsafe {
            match kind {
                Rows::Fp32 => sum_block(cast::<f32>(rows), start, out, |x| x),
                Rows::Rounded => sum_block(cast::<f32>(rows), start, out, |x| widen(round(x))),
                Rows::Bf16 => sum_block(cast::<u16>(rows), start, out, widen),
            }
            if !to.bf16.is_null() {
                let bf16 = std::slice::from_raw_parts_mut(to.bf16.add(start), out.len());
                bf16.iter_mut().zip(out.iter()).for_each(|(to, &x)| *to = round(x));
            }
            if to.round {
                out.iter_mut().for_each(|x| *x = widen(round(*x)));
            }
            for &copy in to.fp32 {
                copy.add(start).copy_from_nonoverlapping(out.as_ptr(), out.len());
            }
        }
    }
}

fn cast<L>(rows: &[*const u8]) -> &[*const L] {
    // SAFETY: pointers to sized types have one layout, and any address is a valid pointer value.
    unsafe { std::slice::from_raw_parts(rows.as_ptr().cast(), rows.len()) }
}

/// The nearest bf16 number, the even one of two as near; a NaN stays one.
fn round(x: f32) -> u16 {
    let bits = x.to_bits();
    let nearest = bits.wrapping_add(0x7FFF + (bits >> 16 & 1)) >> 16;
    let nan = bits >> 16 | 0x40;
    (if x.is_nan() { nan } else { nearest }) as u16
}

/// A bf16 number as fp32.
fn widen(x: u16) -> f32 {
    f32::from_bits(u32::from(x) << 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_to_bf16_is_that_of_libtorch() {
        let bits = [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x1_7FFF, 0x1_8000, 0x1_8001];
        let exponents = [0u32, 0x3F80_0000, 0x7F7F_0000, 0x7F80_0000, 0xBF80_0000, 0xFF80_0000];
        let numbers: Vec<f32> = exponents
            .iter()
            .flat_map(|e| bits.iter().map(move |b| f32::from_bits(e.wrapping_add(*b))))
            .collect();
        let torch = tch::Tensor::from_slice(&numbers).to_kind(tch::Kind::BFloat16).to_kind(tch::Kind::Float);
        for (i, &x) in numbers.iter().enumerate() {
            let (ours, torchs) = (widen(round(x)), torch.double_value(&[i as i64]) as f32);
            assert!(ours == torchs || ours.is_nan() && torchs.is_nan(), "{x:e}: {ours:e}, torch {torchs:e}");
        }
    }

    #[test]
    fn a_sum_may_be_written_over_its_rows() {
        let numel = 3 * BLOCK + 5;
        let mut rows: Vec<Vec<f32>> = (0..3).map(|r| (0..numel).map(|i| (i + r) as f32).collect()).collect();
        let mut bf16 = vec![0u16; numel];
        let to: Vec<*mut f32> = rows.iter_mut().map(|row| row.as_mut_ptr()).collect();
        let from: Vec<*const u8> = to.iter().map(|row| row.cast_const().cast()).collect();
        // SAFETY: three rows and a copy of `numel` elements that nothing else touches.
        unsafe { sum(&from, Rows::Fp32, numel, Sum { fp32: &to, bf16: bf16.as_mut_ptr(), round: false }) };
        assert!(rows.iter().all(|row| (0..numel).all(|i| row[i] == (3 * i + 3) as f32)));
        assert!((0..numel).all(|i| bf16[i] == round((3 * i + 3) as f32)));
    }
}
