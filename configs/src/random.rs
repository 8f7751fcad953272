//! Random numbers that are counted, not drawn: Philox4x32-10, a pure function of key and counter.
//! Owns no state, so what it gives does not depend on ranks, order or what was asked before.
//!
//! Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3". Crates that implement
//! it wrap it in a stateful generator; what is needed here is the bare function, also in kernels.

/// Philox4x32-10 under one 64-bit key.
#[derive(Debug, Clone, Copy)]
pub struct Philox {
    key: [u32; 2],
}

impl Philox {
    /// The function keyed by a seed.
    pub fn new(seed: u64) -> Philox {
        Philox { key: [seed as u32, (seed >> 32) as u32] }
    }

    /// Four random words at a counter. Callers give each use its own words of the counter.
    pub fn at(self, counter: [u32; 4]) -> [u32; 4] {
        let [mut k0, mut k1] = self.key;
        let [mut a, mut b, mut c, mut d] = counter;
        for _ in 0..10 {
            let low = u64::from(a) * 0xD251_1F53;
            let high = u64::from(c) * 0xCD9E_8D57;
            (a, b, c, d) =
                ((high >> 32) as u32 ^ b ^ k0, high as u32, (low >> 32) as u32 ^ d ^ k1, low as u32);
            k0 = k0.wrapping_add(0x9E37_79B9);
            k1 = k1.wrapping_add(0xBB67_AE85);
        }
        [a, b, c, d]
    }

    /// Four random words at each of two counters. A round waits for the one before, so that a processor does two
    /// side by side in little more time than one.
    #[inline(always)]
    pub fn at_both([x, y]: [(Philox, [u32; 4]); 2]) -> [[u32; 4]; 2] {
        // One name for each word: arrays would lie in memory.
        let ([mut k0, mut k1], [mut a, mut b, mut c, mut d]) = (x.0.key, x.1);
        let ([mut l0, mut l1], [mut e, mut f, mut g, mut h]) = (y.0.key, y.1);
        for _ in 0..10 {
            let (low, high) = (u64::from(a) * 0xD251_1F53, u64::from(c) * 0xCD9E_8D57);
            let (low_y, high_y) = (u64::from(e) * 0xD251_1F53, u64::from(g) * 0xCD9E_8D57);
            (a, b, c, d) =
                ((high >> 32) as u32 ^ b ^ k0, high as u32, (low >> 32) as u32 ^ d ^ k1, low as u32);
            (e, f, g, h) =
                ((high_y >> 32) as u32 ^ f ^ l0, high_y as u32, (low_y >> 32) as u32 ^ h ^ l1, low_y as u32);
            (k0, k1) = (k0.wrapping_add(0x9E37_79B9), k1.wrapping_add(0xBB67_AE85));
            (l0, l1) = (l0.wrapping_add(0x9E37_79B9), l1.wrapping_add(0xBB67_AE85));
        }
        [[a, b, c, d], [e, f, g, h]]
    }

    /// Standard normal numbers (Box-Muller, in f64): number `first` and those after it of the endless
    /// stream `stream`, `out.len()` of them.
    pub fn normals(self, stream: u32, first: usize, out: &mut [f32]) {
        let mut four = [0.0; 4];
        for (i, value) in (first..).zip(out) {
            if i.is_multiple_of(4) || i == first {
                let block = i as u64 / 4;
                let words = self.at([block as u32, (block >> 32) as u32, stream, 0]);
                let pairs = [normal_pair(words[0], words[1]), normal_pair(words[2], words[3])];
                four.copy_from_slice(pairs.as_flattened());
            }
            *value = four[i % 4] as f32;
        }
    }

    /// A uniform number in [0, 1) with 32 random bits, at a counter.
    pub fn uniform(self, counter: [u32; 4]) -> f64 {
        f64::from(self.at(counter)[0]) / 4_294_967_296.0
    }
}

fn normal_pair(u: u32, v: u32) -> [f64; 2] {
    let open_unit = (f64::from(u) + 0.5) / 4_294_967_296.0; // never 0: the logarithm stays finite
    let radius = (-2.0 * open_unit.ln()).sqrt();
    let (sin, cos) = (std::f64::consts::TAU * (f64::from(v) / 4_294_967_296.0)).sin_cos();
    [radius * cos, radius * sin]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn philox_gives_the_published_known_answers() {
        // From the authors' kat_vectors file, philox4x32 with 10 rounds.
        let zero = Philox::new(0).at([0; 4]);
        assert_eq!(zero, [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        let ones = Philox::new(u64::MAX).at([u32::MAX; 4]);
        assert_eq!(ones, [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        let pi = Philox::new(0x299f_31d0_a409_3822).at([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344]);
        assert_eq!(pi, [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]);
        let both = Philox::at_both([(Philox::new(0), [0; 4]), (Philox::new(u64::MAX), [u32::MAX; 4])]);
        assert_eq!(both, [zero, ones]);
    }

    #[test]
    fn normals_have_mean_zero_and_variance_one() {
        let mut numbers = vec![0f32; 100_001];
        Philox::new(7).normals(3, 0, &mut numbers);
        let n = numbers.len() as f64;
        let mean = numbers.iter().map(|&x| f64::from(x)).sum::<f64>() / n;
        let variance = numbers.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / n;
        assert!(mean.abs() < 0.02, "mean {mean}");
        assert!((variance - 1.0).abs() < 0.02, "variance {variance}");
    }

    #[test]
    fn a_stream_of_normals_can_be_entered_anywhere() {
        let mut whole = [0f32; 23];
        Philox::new(7).normals(3, 0, &mut whole);
        for first in 0..9 {
            let mut part = [0f32; 10];
            Philox::new(7).normals(3, first, &mut part);
            assert_eq!(part, whole[first..first + 10]);
        }
    }
}
