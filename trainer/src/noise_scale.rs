//! The gradient noise scale: about how many tokens a batch needs before more of them help less. Made of
//! the lengths of gradients of two batch sizes; knows not how these come about.
//!
//! McCandlish, Kaplan, Amodei et al. 2018, "An Empirical Model of Large-Batch Training", appendix A.1.

use crate::saving::Agreed;

/// What is left of the running means with each step.
const DECAY: f64 = 0.98;

/// Steps before which the means say nothing.
const SILENT: u64 = 10;

/// The squared length of the mean gradient of a batch.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Length {
    /// Tokens of the batch.
    tokens: f64,
    /// The squared length; of several batches of this size, its mean.
    squares: f64,
}

/// Running means of the two quantities whose ratio is the noise scale. Each alone is unbiased; their
/// ratio in a single step is neither that nor steady, so that the means come first.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct NoiseScale {
    /// Of tr(S), the variance that one token brings.
    noise: f64,
    /// Of |G|^2, the squared length of the true gradient.
    signal: f64,
    seen: u64,
}

impl NoiseScale {
    /// Takes in a step of `tokens` tokens, and returns the noise scale in tokens as it is then known.
    pub(crate) fn of_step(&mut self, agreed: &Agreed, tokens: u64) -> Option<f64> {
        let (tokens, (parts, squares)) = (tokens as f64, agreed.parts?);
        let parts = parts as f64;
        // A part's own mean gradient is so many times what it adds to the whole's.
        let part = Length { tokens: tokens / parts, squares: squares * parts };
        self.note(part, Length { tokens, squares: agreed.squares });
        self.tokens()
    }

    /// Takes in a step's gradient, whole and in parts. Parts that are the whole teach nothing.
    fn note(&mut self, part: Length, whole: Length) {
        if part.tokens >= whole.tokens {
            return;
        }
        // E|G_B|^2 = |G|^2 + tr(S) / B, solved for both from two values of B.
        let noise = (part.squares - whole.squares) / (1.0 / part.tokens - 1.0 / whole.tokens);
        let signal =
            (whole.tokens * whole.squares - part.tokens * part.squares) / (whole.tokens - part.tokens);
        // Both means start at zero, and what that biases them by is gone from their ratio.
        self.noise = DECAY * self.noise + (1.0 - DECAY) * noise;
        self.signal = DECAY * self.signal + (1.0 - DECAY) * signal;
        self.seen += 1;
    }

    /// tr(S) / |G|^2 in tokens; nothing while it cannot be told.
    fn tokens(&self) -> Option<f64> {
        (self.seen >= SILENT && self.noise > 0.0 && self.signal > 0.0).then(|| self.noise / self.signal)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use configs::Philox;

    /// Elements of a gradient.
    const N: usize = 500;

    /// Tokens of a part.
    const TOKENS: f64 = 64.0;

    /// Steps of gradients that are 1 in each element, with noise of variance `scale` from each token: so
    /// |G|^2 = N and tr(S) = N x scale.
    fn steps(noise_scale: &mut NoiseScale, scale: f64, parts: usize, steps: std::ops::Range<u32>) {
        for step in steps {
            let (mut sum, mut squares) = (vec![0f64; N], 0.0);
            for part in 0..parts {
                let mut normals = vec![0f32; N];
                Philox::new(7).normals(step * 64 + part as u32, 0, &mut normals);
                for (sum, normal) in sum.iter_mut().zip(normals) {
                    let element = 1.0 + f64::from(normal) * (scale / TOKENS).sqrt();
                    *sum += element;
                    squares += element * element;
                }
            }
            let mean = |sum: &f64| sum / parts as f64;
            let whole = sum.iter().map(|sum| mean(sum) * mean(sum)).sum();
            noise_scale.note(
                Length { tokens: TOKENS, squares: squares / parts as f64 },
                Length { tokens: TOKENS * parts as f64, squares: whole },
            );
        }
    }

    #[test]
    fn a_known_noise_scale_is_found_whatever_the_batch() {
        for scale in [10.0, 100.0, 1000.0] {
            let mut noise_scale = NoiseScale::default();
            steps(&mut noise_scale, scale, 4, 0..100);
            let few = noise_scale.tokens().unwrap();
            assert!((few / scale - 1.0).abs() < 0.15, "{few} is not {scale}");
            // A batch that has grown changes nothing.
            steps(&mut noise_scale, scale, 16, 100..200);
            let many = noise_scale.tokens().unwrap();
            assert!((many / scale - 1.0).abs() < 0.1, "{many} is not {scale}");
        }
    }

    #[test]
    fn nothing_is_said_of_a_batch_without_parts_or_after_a_few_steps() {
        let mut noise_scale = NoiseScale::default();
        steps(&mut noise_scale, 1e3, 1, 0..50);
        assert_eq!(noise_scale.tokens(), None);
        steps(&mut noise_scale, 1e3, 4, 0..9);
        assert_eq!(noise_scale.tokens(), None);
        steps(&mut noise_scale, 1e3, 4, 9..10);
        assert!(noise_scale.tokens().is_some());
    }
}
