//! Rates of this machine for the plan: what is measured, at which sizes, and how it comes together in a machine
//! file. Primitives only; how each is timed is `primitives`'s, and a step is nobody's here.

use super::memory::pss_bytes;
use super::primitives::{Primitives, VOCAB_SIZE};
use super::{median, most, slowest};
use crate::error::TrainError;
use configs::plan::{Computing, Measured, MeasuredCall, MeasuredProduct, RatePoint, Rates};
use configs::{Act, Call, Collective};
use ops::collectives::{Communicator, Operation, Wire};
use std::io::Write;
use std::path::Path;
use std::time::Instant;
use tch::{Device, Kind, Tensor};

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
        let mut threads = vec![1, all];
        threads.dedup();
        let rates = threads.into_iter().map(|threads| self.rates(&primitives, threads));
        let rates = rates.collect::<Result<Vec<Rates>, TrainError>>()?;
        Ok(Measured {
            host: place.host.clone(),
            ranks: place.world_size,
            nodes: place.nodes,
            memory_bytes: memory_bytes(),
            matrix_unit: ops::device::has_matrix_unit(),
            barrier_s: self.barrier(comm)?,
            disk_bytes_per_s: self.disk(comm, folder)?,
            cores_share: if place.nodes > 1 { primitives.beside()? } else { 0.0 },
            rates,
            collectives: match place.world_size {
                1 => Vec::new(),
                _ => self.collectives(comm, &self.buffers(comm)?, |_| true)?,
            },
        })
    }

    /// What the ranks of a node share, for [`Calibration::again`]. Collective.
    ///
    /// # Errors
    /// No memory.
    pub(super) fn buffers(&self, comm: &dyn Communicator) -> Result<[Tensor; 2], TrainError> {
        let numel = CALLS.into_iter().filter(|&numel| self.takes(numel as u64)).max().unwrap_or(1);
        Ok([comm.buffer(numel, Kind::Float)?, comm.buffer(numel, Kind::BFloat16)?])
    }

    /// Measures again what of `measured` plans these acts of a step on so many threads. Collective.
    ///
    /// # Errors
    /// A failed collective.
    pub(super) fn again(
        &self,
        measured: &Measured,
        (threads, bf16, acts): (usize, bool, &[Act]),
        (comm, buffers): (&dyn Communicator, &[Tensor; 2]),
    ) -> Result<Measured, TrainError> {
        let primitives = Primitives { comm, turns: self.turns };
        let calls = acts.iter().filter_map(|act| if let Act::Start(call) = act { Some(*call) } else { None });
        let calls: Vec<Call> = calls.collect();
        let started = |way: &Way| calls.iter().any(|call| way.is_of(call));
        let mut again = measured.clone();
        let nearest = again.rates.iter_mut().min_by_key(|rates| rates.threads.abs_diff(threads));
        if let Some(rates) = nearest {
            (rates.copy_bytes_per_s, rates.mapping_bytes_per_s, rates.update_bytes_per_s) =
                self.passing(&primitives)?;
            match &mut rates.bf16 {
                Some(half) if bf16 => *half = self.computing(&primitives, Kind::BFloat16)?,
                _ => rates.fp32 = self.computing(&primitives, Kind::Float)?,
            }
        }
        if measured.ranks > 1 {
            again.barrier_s = self.barrier(comm)?;
            again.collectives = self.collectives(comm, buffers, started)?;
        }
        if measured.nodes > 1 {
            again.cores_share = primitives.beside()?;
            tch::set_num_threads(threads as i32);
        }
        Ok(again)
    }

    fn rates(&self, primitives: &Primitives<'_>, threads: usize) -> Result<Rates, TrainError> {
        tch::set_num_threads(threads as i32);
        let (copy_bytes_per_s, mapping_bytes_per_s, update_bytes_per_s) = self.passing(primitives)?;
        let fp32 = self.computing(primitives, Kind::Float)?;
        let bf16 = match ops::device::dtype(configs::Dtype::Auto, tch::Device::Cpu) {
            Kind::Float => None,
            kind => Some(self.computing(primitives, kind)?),
        };
        // By now libraries have loaded and allocated what they need at such sizes.
        ops::device::trim_host_memory()?;
        let process_bytes = most(primitives.comm, pss_bytes() as f64)? as u64;
        Ok(Rates {
            threads,
            process_bytes,
            copy_bytes_per_s,
            mapping_bytes_per_s,
            update_bytes_per_s,
            fp32,
            bf16,
        })
    }

    /// A copy, memory from the system, and an update.
    fn passing(&self, primitives: &Primitives<'_>) -> Result<(f64, f64, f64), TrainError> {
        let bytes = self.most.min(256 << 20) as usize;
        Ok((
            primitives.copy(bytes)?,
            primitives.mapping(bytes / 16)?,
            primitives.update(if self.takes(1 << 30) { 1024 } else { 128 })?,
        ))
    }

    fn computing(&self, primitives: &Primitives<'_>, kind: Kind) -> Result<Computing, TrainError> {
        // And a head of GPT-2's vocabulary, whose rows come in chunks, or fewer.
        let rows = configs::logits_at_once(false, kind != Kind::Float && ops::device::has_matrix_unit())
            as i64
            / VOCAB_SIZE;
        let mut heads = vec![[rows, 512, VOCAB_SIZE], [rows.min(256), 512, VOCAB_SIZE]];
        heads.dedup();
        let mut products = Vec::new();
        for shape in PRODUCTS.iter().filter(|shape| self.takes(flop(shape))) {
            products.push(MeasuredProduct {
                shape: *shape,
                rate: primitives.product(kind, shape.map(i64::from))?,
            });
        }
        for head in heads {
            let shape = head.map(|side| side as u32);
            if self.takes(flop(&shape)) {
                products.push(MeasuredProduct { shape, rate: primitives.head_product(kind, head)? });
            }
        }
        let point =
            |size: u32, rate: Result<f64, TrainError>| Ok(RatePoint { size: f64::from(size), rate: rate? });
        let attention = ATTENTION.iter().filter(|&&t| self.takes(u64::from(t).pow(3)));
        let passes = PASSES.iter().filter(|&&n| self.takes(64 * u64::from(n)));
        Ok(Computing {
            loss_bytes_per_s: primitives.loss(kind, rows.min((self.most >> 20) as i64))?,
            products,
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

    /// The ways on which numbers travel of which `wanted` says so, each with each size.
    fn collectives(
        &self,
        comm: &dyn Communicator,
        buffers: &[Tensor; 2],
        wanted: impl Fn(&Way) -> bool,
    ) -> Result<Vec<MeasuredCall>, TrainError> {
        let mut calls = Vec::new();
        let ways: Vec<Way> = Way::all().filter(wanted).collect();
        for &numel in CALLS.iter().filter(|&&numel| self.takes(numel as u64)) {
            for way in &ways {
                let buffer = way.buffer(numel, buffers)?;
                let operation = way.operation(configs::slice_numel(numel, comm.world_size()));
                let mut seconds = Vec::new();
                for turn in 0..=self.turns {
                    let taken = slowest(comm, || comm.start(operation, &buffer)?.wait())?;
                    seconds.extend((turn > 0).then_some(taken)); // the first touches memory for the first time
                }
                let Way { collective, width, passing } = *way;
                let bytes = numel as u64 * width;
                calls.push(MeasuredCall { collective, width, passing, bytes, seconds: median(seconds) });
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

/// How numbers travel: in which collective, of how many bytes each, in a buffer that stays and that the ranks of a
/// node share, as steps use them, or in one that comes and goes.
#[derive(Debug, Clone, Copy)]
struct Way {
    collective: Collective,
    width: u64,
    passing: bool,
}

impl Way {
    fn all() -> impl Iterator<Item = Way> {
        let of = |collective, passing| [4, 2].map(|width| Way { collective, width, passing });
        [
            of(Collective::AllReduce, false),
            of(Collective::ReduceScatter, false),
            of(Collective::AllGather, false),
            of(Collective::ReduceScatter, true),
            of(Collective::AllGather, true),
        ]
        .into_iter()
        .flatten()
    }

    fn is_of(&self, call: &Call) -> bool {
        (self.collective, self.width, self.passing) == (call.collective, call.width, call.passing)
    }

    fn operation(&self, shard_numel: usize) -> Operation {
        let wire = if self.width == 2 { Wire::Bf16 } else { Wire::Fp32 };
        match self.collective {
            Collective::AllReduce => Operation::AllReduce { wire },
            Collective::ReduceScatter => Operation::ReduceScatter { shard_numel, wire },
            Collective::AllGather => Operation::AllGather { shard_numel },
        }
    }

    fn buffer(&self, numel: usize, [full, half]: &[Tensor; 2]) -> Result<Tensor, TrainError> {
        let stays = match self.collective {
            Collective::AllGather if self.width == 2 => half,
            _ => full, // sums are fp32
        };
        Ok(match self.passing {
            true => ops::mapped_zeros(numel, stays.kind(), Device::Cpu)?,
            false => stays.narrow(0, 0, numel as i64),
        })
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
        assert!(measured.memory_bytes > 1 << 28 && measured.rates[0].process_bytes > 1 << 24, "{measured:?}");
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
