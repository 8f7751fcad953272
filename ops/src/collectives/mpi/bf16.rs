//! Rounding to bf16 and back, many numbers at a time, in the CPU's widest registers that are there: a
//! reduction in bf16 passes every number through here, and may not be slower than the memory.
//! Knows numbers, not whose they are.

/// The nearest bf16 numbers, `to[i]` of `from[i]`; of two as near the even one; a NaN stays one.
pub(super) fn round(from: &[f32], to: &mut [u16]) {
    in_wide_registers(
        #[inline(always)]
        || to.iter_mut().zip(from).for_each(|(to, &x)| *to = rounded(x)),
    );
}

/// bf16 numbers as fp32.
pub(super) fn widen(from: &[u16], to: &mut [f32]) {
    in_wide_registers(
        #[inline(always)]
        || to.iter_mut().zip(from).for_each(|(to, &x)| *to = widened(x)),
    );
}

/// What is left of fp32 numbers in bf16, as fp32.
pub(super) fn round_and_widen(from: &[f32], to: &mut [f32]) {
    in_wide_registers(
        #[inline(always)]
        || to.iter_mut().zip(from).for_each(|(to, &x)| *to = widened(rounded(x))),
    );
}

#[inline(always)]
fn rounded(x: f32) -> u16 {
    let bits = x.to_bits();
    let nearest = bits.wrapping_add(0x7FFF + (bits >> 16 & 1)) >> 16;
    let nan = bits >> 16 | 0x40;
    (if x.is_nan() { nan } else { nearest }) as u16
}

#[inline(always)]
fn widened(x: u16) -> f32 {
    f32::from_bits(u32::from(x) << 16)
}

/// Runs a loop that the compiler may make of AVX2 where the CPU has it.
fn in_wide_registers(body: impl FnOnce()) {
    #[cfg(target_arch = "x86_64")]
    if std::is_x86_feature_detected!("avx2") {
        // SAFETY: the CPU has AVX2.
        return unsafe { with_avx2(body) };
    }
    body();
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn with_avx2(body: impl FnOnce()) {
    body();
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
        let (mut halves, mut there_and_back, mut at_once) =
            (vec![0; numbers.len()], vec![0.0; numbers.len()], vec![0.0; numbers.len()]);
        round(&numbers, &mut halves);
        widen(&halves, &mut there_and_back);
        round_and_widen(&numbers, &mut at_once);
        for (i, &x) in numbers.iter().enumerate() {
            let torchs = torch.double_value(&[i as i64]) as f32;
            for ours in [there_and_back[i], at_once[i]] {
                let same = ours == torchs || ours.is_nan() && torchs.is_nan();
                assert!(same, "{x:e}: {ours:e}, torch {torchs:e}");
            }
        }
    }
}
