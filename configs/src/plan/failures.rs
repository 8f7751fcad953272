//! What failures cost a long run, and how often to save. Knows rates and seconds only.

use serde::Serialize;

/// Hours of one rank between failures that end a job, when nothing else is said: 419 unexpected interruptions
/// in 54 days of 16,384 GPUs (Grattafiori et al. 2024, The Llama 3 Herd of Models, section 3.3.4).
pub const RANK_HOURS_BETWEEN_FAILURES: f64 = 16_384.0 * 54.0 * 24.0 / 419.0;

/// Seconds from a failure to the first step after it, without reading the checkpoint: found, ended, started.
const RESTART_S: f64 = 180.0;

/// Failures of a run, and the saving that costs it least.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Failures {
    /// Hours between failures of the whole job.
    pub hours_between: f64,
    /// To be expected until the run's end.
    pub expected: f64,
    /// Seconds for which a checkpoint holds up training.
    pub save_s: f64,
    /// Seconds until it is written, beside training: none can follow sooner.
    pub write_s: f64,
    /// Seconds from a failure to the first step after it: three minutes, and reading.
    pub restart_s: f64,
    /// Seconds between checkpoints, by Young's formula: sqrt(2 d M), d being what saving costs and M the
    /// time between failures.
    pub young_s: f64,
    /// The same with Daly's terms of higher order.
    pub daly_s: f64,
    /// The best interval in steps: Daly's, or the time that writing takes.
    pub every_steps: u64,
    /// The part of the time that is lost to saving, to work done twice, and to restarts.
    pub lost: f64,
}

/// What is saved, and how fast.
#[derive(Debug, Clone, Copy)]
pub struct Saving {
    /// Bytes of a rank's snapshot.
    pub bytes: f64,
    /// To host memory.
    pub host_bytes_per_s: f64,
    /// To where checkpoints go, a rank's share.
    pub disk_bytes_per_s: f64,
}

impl Failures {
    /// For `ranks` with `rank_hours` between failures of one, a run of `run_s` in steps of `step_s`.
    pub fn of(ranks: usize, rank_hours: f64, run_s: f64, step_s: f64, saving: &Saving) -> Failures {
        let between = rank_hours * 3600.0 / ranks as f64;
        let save = saving.bytes / saving.host_bytes_per_s;
        let write = saving.bytes / saving.disk_bytes_per_s;
        let young = (2.0 * save * between).sqrt();
        let daly = daly(save, between);
        let interval = daly.max(write).max(step_s);
        let restart = RESTART_S + write; // reading takes what writing takes
        Failures {
            hours_between: between / 3600.0,
            expected: run_s / between,
            save_s: save,
            write_s: write,
            restart_s: restart,
            young_s: young,
            daly_s: daly,
            every_steps: (interval / step_s).round().max(1.0) as u64,
            lost: (save / interval + (interval / 2.0 + restart) / between).min(1.0),
        }
    }
}

/// Daly 2006, equation 37: the interval of computation between checkpoints that take `save` seconds.
fn daly(save: f64, between: f64) -> f64 {
    if save >= 2.0 * between {
        return between;
    }
    let ratio = save / (2.0 * between);
    (2.0 * save * between).sqrt() * (1.0 + ratio.sqrt() / 3.0 + ratio / 9.0) - save
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The part that is lost when `save` seconds are spent every `interval`, and failures come by chance:
    /// exact for an exponential time between them, restarts left out.
    fn lost(interval: f64, save: f64, between: f64) -> f64 {
        let segment = interval + save;
        1.0 - interval / (between * ((segment / between).exp() - 1.0))
    }

    #[test]
    fn dalys_interval_loses_no_more_than_a_tenth_longer_or_shorter() {
        for (save, between) in [(1.0, 1000.0), (60.0, 10_000.0), (300.0, 3600.0)] {
            let best = daly(save, between);
            let at = |factor: f64| lost(best * factor, save, between);
            assert!(at(1.0) < at(0.9) && at(1.0) < at(1.1), "{save} {between}: {best}");
        }
    }

    #[test]
    fn twice_the_ranks_fail_twice_as_often_and_save_more_often() {
        let saving = Saving { bytes: 1e9, host_bytes_per_s: 1e10, disk_bytes_per_s: 1e9 };
        let of = |ranks| Failures::of(ranks, 50_000.0, 1e6, 2.0, &saving);
        let (few, many) = (of(1000), of(2000));
        assert!((many.expected / few.expected - 2.0).abs() < 1e-9);
        assert!(many.every_steps < few.every_steps && many.lost > few.lost);
        assert!((few.young_s - (2.0 * 0.1 * 50.0 * 3600.0_f64).sqrt()).abs() < 1e-9);
    }
}
