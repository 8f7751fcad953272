//! The learning rate and the end of a run, as functions of tokens seen. Pure arithmetic.

use serde::{Deserialize, Serialize};

/// How the learning rate falls after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScheduleKind {
    /// Half a cosine from the peak to the floor over the decay tokens (GPT-3).
    Cosine,
    /// Warm-up, stable, decay: the peak until `decay_tokens` before the end, then a straight line
    /// to the floor (Hu et al. 2024, MiniCPM).
    Wsd,
    /// The peak until the end.
    Constant,
}

/// When a run is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Budget {
    /// After this many optimizer updates.
    MaxSteps(u64),
    /// After the first update that has seen this many tokens.
    MaxTokens(u64),
}

/// The learning-rate schedule of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Schedule {
    /// Shape after the warm-up.
    pub kind: ScheduleKind,
    /// Straight rise from 0 over this many tokens.
    pub warmup_tokens: u64,
    /// Cosine: tokens at which the floor is reached, warm-up included. Wsd: length of the decay at
    /// the end of the run.
    pub decay_tokens: u64,
    /// The floor as a fraction of the peak.
    pub min_lr_fraction: f64,
    /// The end of the run.
    #[serde(flatten)]
    pub budget: Budget,
}

impl Schedule {
    /// The learning rate as a fraction of the peak for the update that brings the tokens seen to
    /// `tokens`, in a run that ends at `end_tokens`.
    pub fn fraction(&self, tokens: u64, end_tokens: u64) -> f64 {
        if tokens < self.warmup_tokens {
            return tokens as f64 / self.warmup_tokens as f64;
        }
        let floor = self.min_lr_fraction;
        match self.kind {
            ScheduleKind::Constant => 1.0,
            ScheduleKind::Cosine => {
                let span = self.decay_tokens.saturating_sub(self.warmup_tokens).max(1);
                let done = ((tokens - self.warmup_tokens) as f64 / span as f64).min(1.0);
                floor + (1.0 - floor) * 0.5 * (1.0 + (std::f64::consts::PI * done).cos())
            }
            ScheduleKind::Wsd => {
                let left = end_tokens.saturating_sub(tokens);
                if left >= self.decay_tokens {
                    return 1.0;
                }
                floor + (1.0 - floor) * left as f64 / self.decay_tokens as f64
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(kind: ScheduleKind) -> Schedule {
        Schedule {
            kind,
            warmup_tokens: 100,
            decay_tokens: 300,
            min_lr_fraction: 0.1,
            budget: Budget::MaxTokens(1000),
        }
    }

    #[test]
    fn the_rate_rises_straight_over_the_warm_up() {
        for kind in [ScheduleKind::Cosine, ScheduleKind::Wsd, ScheduleKind::Constant] {
            assert_eq!(schedule(kind).fraction(25, 1000), 0.25);
            assert_eq!(schedule(kind).fraction(100, 1000), 1.0);
        }
    }

    #[test]
    fn cosine_is_half_way_at_half_time_and_stays_at_the_floor() {
        let cosine = schedule(ScheduleKind::Cosine);
        assert!((cosine.fraction(200, 1000) - 0.55).abs() < 1e-12);
        assert!((cosine.fraction(300, 1000) - 0.1).abs() < 1e-12);
        assert!((cosine.fraction(999, 1000) - 0.1).abs() < 1e-12);
    }

    #[test]
    fn wsd_holds_the_peak_and_falls_in_a_line_at_the_end() {
        let wsd = schedule(ScheduleKind::Wsd);
        assert_eq!(wsd.fraction(700, 1000), 1.0);
        assert!((wsd.fraction(850, 1000) - 0.55).abs() < 1e-12);
        assert!((wsd.fraction(1000, 1000) - 0.1).abs() < 1e-12);
    }
}
