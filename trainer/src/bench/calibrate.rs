//! Rates of this machine for the plan: what is measured, at which sizes, and how it comes together in a machine
//! file. Primitives only; how each is timed is `primitives`'s, and a step is nobody's here.

use super::memory::pss_bytes;
use super::primitives::{Primitives, VOCAB_SIZE};
use super::{median, most, slowest};
use crate::error::TrainError;
use configs::Collective;
use configs::plan::{Computing, Measured, MeasuredCall, MeasuredProduct, RatePoint, Rates};
use ops::collectives::{Communicator, Operation, Wire};
use std::io::Write;
use std::path::Path;
use std::time::Instant;
use tch::Kind;

/// Rows, inner dimension and columns: a block's products at several widths, and a head of bytes.
const PRODUCTS: [[u32; 3]; 7] = [
    [128, 128, 512],
    [1024, 128, 512],
    [128, 512, 512],
    [1024, 512, 512],
    [1024, 512, 2048],
    [1024, 1024, 4096],
    [1024, 256, 257],
];

/// Tokens of a sequence.
const ATTENTION: [u32; 4] = [64, 256, 1024, 2048];

/// Elements of the residual stream.
const PASSES: [u32; 4] = [1 << 14, 1 << 17, 1 << 19, 1 << 22];

/// Elements of buffers that ranks sum, scatter and gather.
const CALLS: [usize; 5] = [1 << 10, 1 << 15, 1 << 18, 1 << 21, 1 << 23];

/// How much is measured.
#[derive(Debug, Clone)]
pub struct Calibration {
    /// What takes more operations or elements than this is left out or cut: nothing, but in tests.
    pub most: u64,
    /// Measurements of each, of which the middle one counts.
    pub turns: usize,
}

impl Default for Calibration {
    fn default() -> Calibration {
        Calibration { most: u64::MAX, turns: 3 }
    }
}

impl Calibration {
    /// Measures, on one thread and on all that a rank has; `folder` is on the disk that is meant. The same on all
    /// ranks. Collective.
    ///
    /// # Errors
    /// A failed collective, a folder that cannot be written.
    pub fn run(&self, comm: &dyn Communicator, folder: &Path) -> Result<Measured, TrainError> {
        let place = comm.place();
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let all = (cores / place.local_size).max(1);
        ops::device::configure_process(all);
        let primitives = Primitives { comm, turns: self.turns };
        // Libraries load and allocate what they need at their first use.
        let fastest = ops::device::dtype(configs::Dtype::Auto, tch::Device::Cpu);
        for kind in [Kind::Float, fastest] {
            primitives.product(kind, [64, 64, 64])?;
            primitives.attention(kind, 64)?;
            primitives.pass(kind, 1 << 12)?;
        }
        let process_bytes = most(comm, pss_bytes() as f64)? as u64;
        let mut threads = vec![1, all];
        threads.dedup();
        let rates = threads.into_iter().map(|threads| self.rates(&primitives, threads));
        let rates = rates.collect::<Result<Vec<Rates>, TrainError>>()?;
        Ok(Measured {
            host: place.host.clone(),
            ranks: place.world_size,
            nodes: place.nodes,
            memory_bytes: memory_bytes(),
            process_bytes,
            barrier_s: self.barrier(comm)?,
            disk_bytes_per_s: self.disk(comm, folder)?,
            cores_share: if place.nodes > 1 { primitives.beside()? } else { 0.0 },
            rates,
            collectives: if place.world_size > 1 { self.collectives(comm)? } else { Vec::new() },
        })
    }

    fn rates(&self, primitives: &Primitives<'_>, threads: usize) -> Result<Rates, TrainError> {
        tch::set_num_threads(threads as i32);
        let bytes = self.most.min(256 << 20) as usize;
        Ok(Rates {
            threads,
            copy_bytes_per_s: primitives.copy(bytes)?,
            update_bytes_per_s: primitives.update(if self.takes(1 << 30) { 1024 } else { 128 })?,
            fp32: self.computing(primitives, Kind::Float)?,
            bf16: match ops::device::dtype(configs::Dtype::Auto, tch::Device::Cpu) {
                Kind::Float => None,
                kind => Some(self.computing(primitives, kind)?),
            },
        })
    }

    fn computing(&self, primitives: &Primitives<'_>, kind: Kind) -> Result<Computing, TrainError> {
        // And a head of GPT-2's vocabulary, whose rows come in chunks.
        let rows = configs::logits_at_once(false, kind != Kind::Float) as i64 / VOCAB_SIZE;
        let head = [rows as u32, 512, VOCAB_SIZE as u32];
        let shapes = PRODUCTS.into_iter().chain([head]).filter(|shape| self.takes(flop(shape)));
        let products = shapes.map(|shape| {
            Ok(MeasuredProduct { shape, rate: primitives.product(kind, shape.map(i64::from))? })
        });
        let point =
            |size: u32, rate: Result<f64, TrainError>| Ok(RatePoint { size: f64::from(size), rate: rate? });
        let attention = ATTENTION.iter().filter(|&&t| self.takes(u64::from(t).pow(3)));
        let passes = PASSES.iter().filter(|&&n| self.takes(64 * u64::from(n)));
        Ok(Computing {
            loss_bytes_per_s: primitives.loss(kind, rows.min((self.most >> 20) as i64))?,
            products: products.collect::<Result<_, TrainError>>()?,
            attention: attention
                .map(|&t| point(t, primitives.attention(kind, i64::from(t))))
                .collect::<Result<_, TrainError>>()?,
            passes: passes
                .map(|&n| point(n, primitives.pass(kind, i64::from(n))))
                .collect::<Result<_, TrainError>>()?,
        })
    }

    fn takes(&self, size: u64) -> bool {
        size <= self.most
    }

    fn barrier(&self, comm: &dyn Communicator) -> Result<f64, TrainError> {
        let mut seconds = Vec::new();
        for _ in 0..20 * self.turns {
            seconds.push(slowest(comm, || comm.all_reduce_f64(&mut [0.0]))?);
        }
        Ok(median(seconds))
    }

    /// Each operation on each size, on the buffers that ranks share, as steps use them.
    fn collectives(&self, comm: &dyn Communicator) -> Result<Vec<MeasuredCall>, TrainError> {
        let ranks = comm.world_size();
        let mut calls = Vec::new();
        for &numel in CALLS.iter().filter(|&&numel| self.takes(numel as u64)) {
            let buffers = [comm.buffer(numel, Kind::Float)?, comm.buffer(numel, Kind::BFloat16)?];
            let shard_numel = configs::slice_numel(numel, ranks);
            let sums = [(Wire::Fp32, 4), (Wire::Bf16, 2)].into_iter().flat_map(|(wire, width)| {
                let scatter = Operation::ReduceScatter { shard_numel, wire };
                [
                    (Collective::AllReduce, Operation::AllReduce { wire }, width, 0),
                    (Collective::ReduceScatter, scatter, width, 0),
                ]
            });
            let gather = Operation::AllGather { shard_numel };
            let gathers = [4, 2].map(|width| (Collective::AllGather, gather, width, usize::from(width == 2)));
            for (collective, operation, width, buffer) in sums.chain(gathers) {
                let mut seconds = Vec::new();
                for turn in 0..=self.turns {
                    let taken = slowest(comm, || comm.start(operation, &buffers[buffer])?.wait())?;
                    seconds.extend((turn > 0).then_some(taken)); // the first touches memory for the first time
                }
                let bytes = numel as u64 * width;
                calls.push(MeasuredCall { collective, width, bytes, seconds: median(seconds) });
            }
        }
        Ok(calls)
    }

    /// Bytes per second of the first rank alone, flushed; the same on all.
    fn disk(&self, comm: &dyn Communicator, folder: &Path) -> Result<f64, TrainError> {
        let bytes = vec![7u8; self.most.min(64 << 20) as usize];
        let mut written = Ok(0.0);
        if comm.rank() == 0 {
            written = write(folder, &bytes);
        }
        // Everybody learns of it before anybody fails.
        let seconds = most(comm, *written.as_ref().unwrap_or(&f64::INFINITY))?;
        written?;
        Ok(bytes.len() as f64 / seconds)
    }
}

/// Seconds until bytes are on the disk.
fn write(folder: &Path, bytes: &[u8]) -> Result<f64, TrainError> {
    std::fs::create_dir_all(folder).map_err(TrainError::io(folder))?;
    let path = folder.join(format!("calibrate.{}.tmp", std::process::id()));
    let began = Instant::now();
    let outcome = std::fs::File::create(&path).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_all()
    });
    let seconds = began.elapsed().as_secs_f64();
    let removed = std::fs::remove_file(&path);
    outcome.and(removed).map_err(TrainError::io(&path))?;
    Ok(seconds)
}

fn flop(shape: &[u32; 3]) -> u64 {
    2 * shape.iter().map(|&side| u64::from(side)).product::<u64>()
}

/// Bytes of this machine's memory; 0 where the kernel does not tell.
fn memory_bytes() -> u64 {
    super::memory::bytes_of("/proc/meminfo", "MemTotal:")
}

#[cfg(test)]
mod tests {
    use super::*;
    use configs::plan::{Cluster, Machine, Plan, Question};
    use ops::collectives::Solo;

    #[test]
    fn a_small_calibration_is_plausible_reads_back_and_a_plan_with_it_answers() {
        let folder = tempfile::tempdir().unwrap();
        let small = Calibration { most: 1 << 24, turns: 1 };
        let measured = small.run(&Solo::new(), folder.path()).unwrap();
        // Reading refuses what is not finite and above 0.
        assert_eq!(Measured::parse(&measured.to_toml()).unwrap(), measured);
        assert!(measured.memory_bytes > 1 << 28 && measured.process_bytes > 1 << 24, "{measured:?}");
        let fp32 = &measured.rates[0].fp32;
        assert!((1e8..1e14).contains(&fp32.peak()), "{fp32:?}");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);

        let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/demo.toml");
        let config = configs::load(&demo, &[], &|_| Ok(257)).unwrap();
        let machine = Machine::measured(measured, 1);
        let (between, per_node) = (machine.between.clone(), machine.per_node);
        let cluster = Cluster { machine, between, per_node, disk_bytes_per_s: 1e9 };
        let question = Question { ranks: 1, cluster, price: None, rank_hours_between_failures: 1e5 };
        let step = Plan::of(&config, &question).modes[0].step;
        assert!(step.total.is_finite() && step.total > 0.0, "{step:?}");
    }
}
