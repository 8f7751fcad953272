//! A batch that ranks can share: the run's own, or the nearest that divides. Knows no machine.

use crate::RunConfig;
use serde::Serialize;

/// A batch on ranks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Fitted {
    /// Tokens of an update.
    pub tokens: u64,
    /// Sequences of it.
    pub sequences: u64,
    /// Tokens of a sequence.
    pub seq_len: usize,
    /// Sequences per rank and pass.
    pub micro_batch: usize,
    /// Passes of a rank in an update.
    pub micro_steps: u64,
    /// Ranks beyond which the configured batch has no sequence for each: where data parallelism ends.
    pub most_ranks: u64,
    /// Ranks that can share the first batch, where it grows.
    pub most_ranks_at_first: u64,
    /// The configured batch, if the ranks cannot share it.
    pub instead_of: Option<u64>,
    /// The configured micro-batch, if it had to be another.
    pub instead_of_micro_batch: Option<usize>,
    /// The nearest batch below that these ranks can share, if they cannot share the configured one.
    pub lower: Option<u64>,
    /// The nearest above.
    pub upper: Option<u64>,
}

/// Fits a run's batch to `ranks`: as it is if they can share it; else with a smaller micro-batch; else the
/// nearest batch, the larger one where both are as near. Returns the run with it.
pub fn fit_batch(run: &RunConfig, ranks: usize) -> (Fitted, RunConfig) {
    let (seq_len, ranks) = (run.model.seq_len, ranks.max(1) as u64);
    let configured = run.batch.global_batch_tokens;
    let (sequences, first) = (configured / seq_len as u64, run.batches().batch_tokens(0) / seq_len as u64);
    let below = sequences / ranks * ranks;
    let (lower, upper) = (Some(below).filter(|&n| n > 0), below + ranks);
    let divides = sequences > 0 && below == sequences;
    let fitted = match lower {
        _ if divides => sequences,
        // Nearer as a factor.
        Some(lower) if sequences as f64 / (lower as f64) < upper as f64 / sequences as f64 => lower,
        _ => upper,
    };
    let per_rank = fitted / ranks;
    let wanted = run.batch.micro_batch;
    let micro_batch = divisors(per_rank).filter(|&d| d <= wanted as u64).max().unwrap_or(1) as usize;
    let in_tokens = |sequences: u64| sequences * seq_len as u64;
    let mut shared = run.clone();
    shared.batch.global_batch_tokens = in_tokens(fitted);
    shared.batch.micro_batch = micro_batch;
    // A ramp doubles up to the full batch: what is no doubling of its start has none.
    let keeps_ramp =
        |start: u64| in_tokens(fitted).is_multiple_of(start) && (in_tokens(fitted) / start).is_power_of_two();
    shared.batch.ramp = run.batch.ramp.filter(|ramp| keeps_ramp(ramp.ramp_start_tokens));
    let told = Fitted {
        tokens: in_tokens(fitted),
        sequences: fitted,
        seq_len,
        micro_batch,
        micro_steps: per_rank / micro_batch as u64,
        most_ranks: sequences,
        most_ranks_at_first: first,
        instead_of: (!divides).then_some(configured),
        instead_of_micro_batch: (micro_batch != wanted).then_some(wanted),
        lower: lower.filter(|_| !divides).map(in_tokens),
        upper: (!divides).then_some(in_tokens(upper)),
    };
    (told, shared)
}

/// The numbers that divide `n`, not in order.
pub(super) fn divisors(n: u64) -> impl Iterator<Item = u64> {
    (1..=n.isqrt()).filter(move |d| n.is_multiple_of(*d)).flat_map(move |d| [d, n / d])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::tests::run;

    #[test]
    fn ranks_that_share_the_batch_have_it_as_it_is() {
        let (fitted, shared) = fit_batch(&run("gpt3-13b"), 64);
        assert_eq!((fitted.sequences, fitted.instead_of, fitted.lower), (1024, None, None));
        assert_eq!(shared, run("gpt3-13b"));
        shared.batch_plan(64).unwrap();
    }

    #[test]
    fn ranks_that_do_not_divide_it_get_the_nearest_that_they_do() {
        // 1536 sequences, three at a time.
        let run = run("gpt3-175b");
        for (ranks, sequences, micro_batch) in
            [(256, 1536, 3), (768, 1536, 2), (1024, 2048, 2), (5000, 5000, 1)]
        {
            let (fitted, shared) = fit_batch(&run, ranks);
            assert_eq!((fitted.sequences, fitted.micro_batch), (sequences, micro_batch), "{ranks} ranks");
            assert_eq!(shared.batch_plan(ranks).unwrap().grad_accum_steps, fitted.micro_steps);
        }
        let (fitted, _) = fit_batch(&run, 1024);
        assert_eq!((fitted.most_ranks, fitted.instead_of), (1536, Some(3 << 20)));
        assert_eq!((fitted.lower, fitted.upper), (Some(2 << 20), Some(4 << 20)));
    }
}
