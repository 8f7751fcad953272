//! What attention costs by pattern, forward and backward, beside libtorch's dense causal attention at the
//! same length; and how time and memory grow with the length.
//! Knows no kernel: it calls what a layer calls.

use super::memory::{most_resident_bytes, resident_bytes};
use super::{Case, median};
use crate::error::TrainError;
use configs::Pattern;
use std::io;
use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;
use tch::{Device, Kind, Tensor};

/// As in GPT-2 and GPT-3 Small.
const HEADS: i64 = 12;
const HEAD_DIM: i64 = 64;

/// Lengths that are compared: T, and twice that for the growth.
const T: i64 = 8192;

/// Seconds above which a reference is measured once: a CPU that emulates bf16 takes minutes.
const SLOW_S: f64 = 20.0;

/// The pattern whose growth is measured.
const BAND: Pattern = Pattern::Banded(256);

/// What is measured.
#[derive(Debug, Clone)]
pub struct AttentionBench {
    /// Threads that compute.
    pub threads: usize,
    /// Measured turns of each side, of which the middle one counts.
    pub turns: usize,
    /// Precisions.
    pub kinds: Vec<Kind>,
    /// The shorter length; the other is twice that.
    pub seq_len: i64,
    /// What the band takes of memory at a length, in bytes, as [`band_memory`] says.
    pub memory: fn(Kind, i64) -> Result<u64, TrainError>,
}

impl Default for AttentionBench {
    fn default() -> AttentionBench {
        AttentionBench {
            threads: 2,
            turns: 5,
            kinds: vec![Kind::BFloat16, Kind::Float],
            seq_len: T,
            memory: band_memory_elsewhere,
        }
    }
}

impl AttentionBench {
    /// Measures every case, on the CPU.
    ///
    /// # Errors
    /// Memory that cannot be measured.
    pub fn run(&self) -> Result<Vec<Case>, TrainError> {
        ops::device::configure_process(self.threads);
        let mut cases = Vec::new();
        for &kind in &self.kinds {
            let short = (self.memory)(kind, self.seq_len)?;
            let long = (self.memory)(kind, 2 * self.seq_len)?;
            cases.extend(self.of_kind(kind, long as f64 / short as f64));
        }
        Ok(cases)
    }

    fn of_kind(&self, kind: Kind, memory_growth: f64) -> Vec<Case> {
        let sparse = [BAND, Pattern::Strided(128), Pattern::Fixed(128, 16)];
        let dtype = dtype(kind);
        let (short, mut cases) = self.of_length(self.seq_len, kind, &sparse);
        let (long, rest) = self.of_length(2 * self.seq_len, kind, &sparse[..1]);
        cases.extend(rest);
        let growth = |what: &str, value: f64| {
            let case = format!("{BAND} {dtype}: {what} at T={} over T={}", 2 * self.seq_len, self.seq_len);
            Case::less_is_better(case, "x", value, 2.0)
        };
        cases.push(growth("time", long / short));
        cases.push(growth("memory", memory_growth));
        cases
    }

    /// The first pattern's milliseconds, and a case for each.
    fn of_length(&self, t: i64, kind: Kind, patterns: &[Pattern]) -> (f64, Vec<Case>) {
        let inputs = Inputs::new(t, kind);
        let mut dense = Vec::new();
        let mut taken = vec![Vec::new(); patterns.len()];
        for turn in 0..=self.turns {
            if turn == 0 || dense.last().is_none_or(|&ms| ms < 1e3 * SLOW_S) {
                let ms = inputs.pass(causal);
                // The first turn touches memory for the first time; where it takes long, that is nothing.
                dense.extend((turn > 0 || ms >= 1e3 * SLOW_S).then_some(ms));
            }
            for (pattern, taken) in patterns.iter().zip(&mut taken) {
                let ms = inputs.pass(|q, k, v| ops::attention(q, k, v, *pattern, None));
                taken.extend((turn > 0).then_some(ms));
            }
        }
        let dense = median(dense);
        let medians: Vec<f64> = taken.into_iter().map(median).collect();
        let dtype = dtype(kind);
        let case = |(pattern, &ms): (&Pattern, &f64)| {
            Case::less_is_better(format!("{pattern} T={t} {dtype}"), "ms", ms, dense)
        };
        (medians[0], patterns.iter().zip(&medians).map(case).collect())
    }
}

fn dtype(kind: Kind) -> &'static str {
    if kind == Kind::Float { "fp32" } else { "bf16" }
}

/// What the band takes of memory at a length, in bytes: the inputs, the results and all between, of a forward
/// and a backward. To be asked once in a process: what it frees is kept, and would hide what comes after.
pub fn band_memory(kind: Kind, seq_len: i64) -> u64 {
    Inputs::new(256, kind).pass(banded); // libraries load and allocate what they need
    let before = resident_bytes();
    Inputs::new(seq_len, kind).pass(banded);
    most_resident_bytes().saturating_sub(before)
}

/// [`band_memory`] in a process of its own.
fn band_memory_elsewhere(kind: Kind, seq_len: i64) -> Result<u64, TrainError> {
    let program = PathBuf::from("/proc/self/exe");
    let output = Command::new(&program)
        .args(["bench", "band-memory", dtype(kind), &seq_len.to_string()])
        .output()
        .map_err(TrainError::io(&program))?;
    let text = String::from_utf8_lossy(&output.stdout);
    text.trim().parse().map_err(|_| {
        let said = String::from_utf8_lossy(&output.stderr);
        let what = format!("measuring memory ended with {}: {said}", output.status);
        TrainError::io(&program)(io::Error::other(what))
    })
}

fn banded(q: &Tensor, k: &Tensor, v: &Tensor) -> Tensor {
    ops::attention(q, k, v, BAND, None)
}

/// Libtorch's dense causal attention, the reference.
fn causal(q: &Tensor, k: &Tensor, v: &Tensor) -> Tensor {
    Tensor::scaled_dot_product_attention::<&Tensor>(q, k, v, None, 0.0, true, None, false)
}

/// Queries, keys, values and the output's gradient of one sequence, random: `[1, H, T, D]`, in memory as a
/// layer has them, with heads side by side.
struct Inputs([Tensor; 4]);

impl Inputs {
    fn new(t: i64, kind: Kind) -> Inputs {
        let random = |_| Tensor::randn([1, t, HEADS, HEAD_DIM], (Kind::Float, Device::Cpu)).to_kind(kind);
        Inputs([0, 1, 2, 3].map(random).map(|x| x.transpose(1, 2)))
    }

    /// Milliseconds of forward and backward.
    fn pass(&self, attend: impl Fn(&Tensor, &Tensor, &Tensor) -> Tensor) -> f64 {
        let [q, k, v, grad] = &self.0;
        let [q, k, v] = [q, k, v].map(|x| x.detach().set_requires_grad(true));
        let started = Instant::now();
        ops::backward(&attend(&q, &k, &v), grad).expect("attention has a gradient of its output's shape");
        1e3 * started.elapsed().as_secs_f64()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pattern_is_measured_at_its_length_and_the_band_at_twice_that() {
        let memory = |kind, seq_len| Ok(band_memory(kind, seq_len));
        let bench = AttentionBench { turns: 1, kinds: vec![Kind::Float], seq_len: 512, threads: 1, memory };
        let cases = bench.run().unwrap();
        let names: Vec<&str> = cases.iter().map(|case| case.case.as_str()).collect();
        assert_eq!(
            names,
            [
                "banded:256 T=512 fp32",
                "strided:128 T=512 fp32",
                "fixed:128,16 T=512 fp32",
                "banded:256 T=1024 fp32",
                "banded:256 fp32: time at T=1024 over T=512",
                "banded:256 fp32: memory at T=1024 over T=512",
            ]
        );
        assert!(cases[..5].iter().all(|case| case.value > 0.0 && case.ratio > 0.0));
    }
}
