//! Sums of f64 that are exact, and so do not depend on who adds what in which order: the loss and the
//! gradient's norm are the same bits on any number of ranks, however buffers are cut into shards.
//! Knows no tensors.

/// Bits 0..32 of limb i weigh 2^(32 i - 1074): the smallest f64 is one unit of limb 0, and the upper
/// limbs hold 2^78 of the largest.
const LIMBS: usize = 68;

/// Additions after which limbs may be full.
const CARRY_EVERY: u32 = 1 << 30;

/// A sum in fixed point, wide enough for every f64 (Kulisch's accumulator).
#[derive(Debug, Clone)]
pub struct ExactSum {
    limbs: [i64; LIMBS],
    added: u32,
    /// The sum of what is not finite; zero if there was nothing.
    not_finite: f64,
}

impl Default for ExactSum {
    fn default() -> ExactSum {
        ExactSum { limbs: [0; LIMBS], added: 0, not_finite: 0.0 }
    }
}

impl ExactSum {
    /// How many numbers [`ExactSum::parts`] gives.
    pub const PARTS: usize = LIMBS + 1;

    /// Adds a number.
    pub fn add(&mut self, value: f64) {
        if !value.is_finite() {
            self.not_finite += value;
            return;
        }
        let bits = value.to_bits();
        let (fraction, exponent) = (bits & ((1 << 52) - 1), (bits >> 52) as usize & 0x7FF);
        // value = mantissa 2^(shift - 1074)
        let (mantissa, shift) =
            if exponent == 0 { (fraction, 0) } else { (fraction | 1 << 52, exponent - 1) };
        let mut rest = u128::from(mantissa) << (shift % 32);
        for limb in &mut self.limbs[shift / 32..shift / 32 + 3] {
            let low = (rest & 0xFFFF_FFFF) as i64;
            *limb += if value < 0.0 { -low } else { low };
            rest >>= 32;
        }
        self.added += 1;
        if self.added == CARRY_EVERY {
            self.carry();
        }
    }

    /// Brings all limbs but the last into 0..2^32.
    fn carry(&mut self) {
        for i in 0..LIMBS - 1 {
            let over = self.limbs[i] >> 32;
            self.limbs[i] -= over << 32;
            self.limbs[i + 1] += over;
        }
        self.added = 0;
    }

    /// The sum as numbers that may be added, part by part, to those of up to 2^20 other sums without
    /// rounding.
    pub fn parts(mut self) -> [f64; ExactSum::PARTS] {
        self.carry();
        let mut parts = [self.not_finite; ExactSum::PARTS];
        for (part, limb) in parts.iter_mut().zip(self.limbs) {
            *part = limb as f64;
        }
        parts
    }

    /// The sum of sums whose parts were added.
    ///
    /// # Panics
    /// Another number of parts than [`ExactSum::PARTS`].
    pub fn from_parts(parts: &[f64]) -> ExactSum {
        assert_eq!(parts.len(), ExactSum::PARTS, "the parts of a sum");
        let mut sum = ExactSum { not_finite: parts[LIMBS], ..ExactSum::default() };
        for (limb, part) in sum.limbs.iter_mut().zip(parts) {
            *limb = *part as i64;
        }
        sum.carry();
        sum
    }

    /// The sum, rounded once, to the nearest f64; infinite or NaN if a number was.
    pub fn value(mut self) -> f64 {
        if self.not_finite != 0.0 {
            return self.not_finite; // NaN differs from zero too
        }
        self.carry();
        let negative = self.limbs[LIMBS - 1] < 0;
        if negative {
            self.limbs.iter_mut().for_each(|limb| *limb = -*limb);
            self.carry();
        }
        let top = self.limbs.iter().rposition(|&limb| limb != 0).unwrap_or(0);
        let low = top.saturating_sub(3);
        let mut leading =
            self.limbs[low..=top].iter().rev().fold(0u128, |value, &limb| value << 32 | limb as u128);
        // What is left out below only matters between two neighbours: one bit says that it is there.
        leading |= u128::from(self.limbs[..low].iter().any(|&limb| limb != 0));
        let magnitude = leading as f64 * power_of_two(32 * low as u64);
        if negative { -magnitude } else { magnitude }
    }
}

/// 2^(exponent - 1074), for exponents up to 2097.
fn power_of_two(exponent: u64) -> f64 {
    // Up to 2^-1022 a bit of the fraction; above, an exponent field that counts from there.
    f64::from_bits(if exponent < 52 { 1 << exponent } else { (exponent - 51) << 52 })
}

impl FromIterator<f64> for ExactSum {
    fn from_iter<I: IntoIterator<Item = f64>>(values: I) -> ExactSum {
        let mut sum = ExactSum::default();
        values.into_iter().for_each(|value| sum.add(value));
        sum
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sum(values: &[f64]) -> f64 {
        values.iter().copied().collect::<ExactSum>().value()
    }

    #[test]
    fn nothing_is_lost_between_large_and_small() {
        assert_eq!(sum(&[]), 0.0);
        assert_eq!(sum(&[1e300, 1.0, -1e300]), 1.0);
        assert_eq!(sum(&[f64::MAX, f64::MIN_POSITIVE / 2.0, -f64::MAX]), f64::MIN_POSITIVE / 2.0);
        assert_eq!(sum(&[-3.5, 1.25]), -2.25);
        assert_eq!(sum(&[f64::MAX, f64::MAX]), f64::INFINITY);
        assert_eq!(sum(&[0.1; 10]), 1.0, "rounded once: ten times the f64 nearest to 0.1 is nearest to 1");
        assert_eq!(sum(&[5e-324, 5e-324]), 1e-323);
    }

    #[test]
    fn what_is_not_finite_stays_so() {
        assert!(sum(&[1.0, f64::NAN]).is_nan());
        assert_eq!(sum(&[1.0, f64::INFINITY, 2.0]), f64::INFINITY);
        assert!(sum(&[f64::NEG_INFINITY, f64::INFINITY]).is_nan());
    }

    #[test]
    fn halves_are_rounded_to_even() {
        let one_ulp = f64::EPSILON;
        assert_eq!(sum(&[1.0, one_ulp / 2.0]), 1.0);
        assert_eq!(sum(&[1.0 + one_ulp, one_ulp / 2.0]), 1.0 + 2.0 * one_ulp);
        assert_eq!(sum(&[1.0, one_ulp / 2.0, 1e-300]), 1.0 + one_ulp);
    }

    proptest! {
        #[test]
        fn parts_of_any_split_add_up_to_the_same_bits(
            values in prop::collection::vec((-1e6f64..1e6, -40i32..40), 1..60), cuts in 1usize..9,
        ) {
            let values: Vec<f64> = values.iter().map(|&(value, scale)| value * 2f64.powi(scale)).collect();
            let mut total = [0.0; ExactSum::PARTS];
            for part in values.chunks(values.len().div_ceil(cuts)) {
                let parts = part.iter().rev().copied().collect::<ExactSum>().parts();
                total.iter_mut().zip(parts).for_each(|(total, part)| *total += part);
            }
            let got = ExactSum::from_parts(&total).value();
            prop_assert_eq!(got.to_bits(), sum(&values).to_bits());
            let plain: f64 = values.iter().sum();
            let scale: f64 = values.iter().map(|value| value.abs()).sum();
            prop_assert!((got - plain).abs() <= 1e-13 * scale);
        }
    }
}
