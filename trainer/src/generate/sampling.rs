//! Which token comes next, given the logits: the likeliest, or one drawn with a counted random number.
//! Owns temperature, top-k and top-p; knows no model and no tensors.

use configs::Philox;

/// How tokens are chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Divides the logits; at 0 the likeliest token is taken.
    pub temperature: f64,
    /// Only the k likeliest tokens are drawn; 0 is all.
    pub top_k: usize,
    /// Only the likeliest tokens are drawn that together have this probability (Holtzman et al. 2020); 1 is all.
    pub top_p: f64,
    /// Seed of the draws.
    pub seed: u64,
}

impl Sampling {
    /// Takes the likeliest token.
    pub const GREEDY: Sampling = Sampling { temperature: 0.0, top_k: 0, top_p: 1.0, seed: 0 };

    /// The token that follows, as number `drawn` of text `stream`: a pure function of all that is given, so
    /// that no text depends on which others are written beside it.
    ///
    /// # Panics
    /// There are no logits.
    pub fn choose(&self, logits: &[f32], stream: u32, drawn: u32) -> usize {
        let likelier = |a: &usize, b: &usize| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b));
        if self.temperature <= 0.0 {
            return (0..logits.len()).min_by(likelier).expect("a model has a vocabulary");
        }
        let mut tokens: Vec<usize> = (0..logits.len()).collect();
        if (1..tokens.len()).contains(&self.top_k) {
            tokens.select_nth_unstable_by(self.top_k - 1, likelier);
            tokens.truncate(self.top_k);
        }
        tokens.sort_unstable_by(likelier);
        let largest = f64::from(logits[tokens[0]]);
        let weight = |token: &usize| ((f64::from(logits[*token]) - largest) / self.temperature).exp();
        let weights: Vec<f64> = tokens.iter().map(weight).collect();
        let kept = nucleus(&weights, self.top_p);
        let total: f64 = weights[..kept].iter().sum();
        let wanted = Philox::new(self.seed).uniform([drawn, stream, 0, 0]) * total;
        let mut sum = 0.0;
        let passed = |weight: &f64| {
            sum += weight;
            sum > wanted
        };
        tokens[weights[..kept].iter().position(passed).unwrap_or(kept - 1)]
    }
}

/// How many of the weights, the largest first, it takes to have this part of their sum; at least one.
fn nucleus(weights: &[f64], part: f64) -> usize {
    if part >= 1.0 {
        return weights.len();
    }
    let (wanted, mut sum) = (part * weights.iter().sum::<f64>(), 0.0);
    let enough = |weight: &f64| {
        sum += weight;
        sum >= wanted
    };
    weights.iter().position(enough).map_or(weights.len(), |last| last + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Logarithms of 0.5, 0.125, 0.25 and 0.125.
    fn logits() -> [f32; 4] {
        [0.5f32, 0.125, 0.25, 0.125].map(f32::ln)
    }

    fn counts(sampling: Sampling) -> [usize; 4] {
        let mut counts = [0; 4];
        (0..4000).for_each(|drawn| counts[sampling.choose(&logits(), 3, drawn)] += 1);
        counts
    }

    const ALL: Sampling = Sampling { temperature: 1.0, top_k: 0, top_p: 1.0, seed: 7 };

    #[test]
    fn draws_follow_the_probabilities() {
        for (count, expected) in counts(ALL).into_iter().zip([2000.0, 500.0, 1000.0, 500.0]) {
            assert!((count as f64 / expected - 1.0).abs() < 0.1, "{count} of {expected}");
        }
    }

    #[test]
    fn top_k_and_top_p_leave_out_the_unlikely_and_keep_the_proportions() {
        let kept = [
            Sampling { top_k: 2, ..ALL },
            Sampling { top_p: 0.7, ..ALL },
            Sampling { top_k: 3, top_p: 0.8, ..ALL },
        ];
        for sampling in kept {
            let [first, none, second, never] = counts(sampling);
            assert_eq!((none, never), (0, 0), "{sampling:?}");
            assert!((first as f64 / second as f64 - 2.0).abs() < 0.3, "{sampling:?}: {first} and {second}");
        }
        assert_eq!(counts(Sampling { top_p: 0.0, ..ALL }), [4000, 0, 0, 0]);
        assert_eq!(counts(Sampling { top_k: 1, ..ALL }), [4000, 0, 0, 0]);
    }

    #[test]
    fn a_low_temperature_comes_near_the_likeliest_and_zero_takes_it() {
        assert!(counts(Sampling { temperature: 0.2, ..ALL })[0] > 3700);
        assert_eq!(Sampling::GREEDY.choose(&[1.0, 3.0, 3.0], 0, 0), 1); // the first of equals
    }

    #[test]
    fn draws_depend_on_seed_text_and_number_alone() {
        let draws =
            |sampling: Sampling, stream| (0..64).map(|i| sampling.choose(&logits(), stream, i)).collect();
        let first: Vec<usize> = draws(ALL, 0);
        assert_eq!(first, draws(ALL, 0));
        assert_ne!(first, draws(ALL, 1));
        assert_ne!(first, draws(Sampling { seed: 8, ..ALL }, 0));
    }
}
