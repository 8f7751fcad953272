//! What parameters, gradients and optimizer state take of memory, seen from outside, against the formula
//! in `configs`. Two updates on a few tokens, so that activations hardly count.

use super::Case;
use crate::engine::{Engine, MicroBatch};
use crate::error::TrainError;
use crate::gradients::Gradients;
use crate::model::Gpt;
use crate::optimizer::Optimizer;
use crate::timing::Timing;
use crate::weights::Parameters;
use configs::{Memory, ModelConfig, RunConfig, Setup};
use ops::collectives::Communicator;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;
use tch::{Device, Kind};

/// Tokens of a pass.
const TOKENS: i64 = 8;

/// Runs two updates of `config` on a few tokens, on the CPU, and returns one case: the ranks' mean of the
/// memory that came with them (PSS: what ranks share is counted once), against the formula. Collective.
///
/// # Errors
/// A batch that the ranks cannot share, no memory, a failed collective.
pub fn memory(config: &RunConfig, comm: &dyn Communicator) -> Result<Vec<Case>, TrainError> {
    let kind = ops::device::dtype(config.parallel.dtype, Device::Cpu);
    let setup = Setup::of(config, comm.world_size(), true, kind == Kind::BFloat16)?;
    // Libraries load and allocate what they need at their first use; that is not the run's state.
    let mut small = config.clone();
    small.model = ModelConfig { n_layer: 1, n_head: 1, n_embd: 64, vocab_size: 257, ..config.model.clone() };
    updates(&small, kind, setup.micro_steps, comm)?;
    comm.barrier()?;
    let before = pss_bytes();
    let watch = Watch::start();
    updates(config, kind, setup.micro_steps, comm)?;
    let mut sum = [watch.end().saturating_sub(before) as f64];
    comm.all_reduce_f64(&mut sum)?;

    let measured = sum[0] / comm.world_size() as f64 / 1e6;
    let formula = Memory::of(&config.model, &setup).state() as f64 / 1e6;
    let shard = format!("{:?}", setup.shard).to_lowercase();
    let dtype = if setup.bf16 { "bf16" } else { "fp32" };
    let case = format!("{} {dtype} {shard}, {} ranks: a rank's state", config.run.name, setup.world_size);
    Ok(vec![Case { case, value: measured, unit: "MB", reference: formula, ratio: formula / measured }])
}

fn updates(
    config: &RunConfig,
    kind: Kind,
    micro_steps: u64,
    comm: &dyn Communicator,
) -> Result<(), TrainError> {
    let segments = configs::segments(&config.model);
    let parameters = Parameters::zeros(segments, config.parallel.shard, kind, Device::Cpu, comm)?;
    let gradients = Gradients::new(&parameters, micro_steps, config.reproducible(true), comm)?;
    let mut optimizer = Optimizer::new(&config.optim, &parameters)?;
    let model = Gpt::new(&config.model);
    let mut engine = Engine::new(model, parameters, gradients, config.parallel.recompute);
    engine.parameters_mut().init(config.run.seed);
    engine.parameters_mut().share()?;
    let tokens: Vec<i64> = (0..=TOKENS.min(config.model.seq_len as i64)).map(|token| token % 2).collect();
    let batch = MicroBatch::from_rows(&tokens, tokens.len(), Device::Cpu);
    for step in 0..2 {
        engine.begin(micro_steps, false);
        for _ in 0..micro_steps {
            engine.add(&batch, 1.0, &mut Timing::default())?;
        }
        engine.finish(&mut Timing::default())?;
        optimizer.update(&mut engine, step, 1e-4, 1.0)?;
    }
    engine.parameters_mut().settle()
}

/// Looks at the process's memory again and again, and keeps the most.
pub(super) struct Watch {
    most: Arc<AtomicU64>,
    over: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Watch {
    pub(super) fn start() -> Watch {
        let (most, over) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (seen, ended) = (Arc::clone(&most), Arc::clone(&over));
        let thread = std::thread::spawn(move || {
            while !ended.load(Ordering::Relaxed) {
                seen.fetch_max(pss_bytes(), Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        Watch { most, over, thread }
    }

    pub(super) fn end(self) -> u64 {
        self.over.store(true, Ordering::Relaxed);
        self.thread.join().expect("a watch does not panic");
        self.most.load(Ordering::Relaxed)
    }
}

/// This process's share of the memory it uses, in bytes; 0 where the kernel does not tell.
pub(super) fn pss_bytes() -> u64 {
    bytes_of("/proc/self/smaps_rollup", "Pss:")
}

/// The memory that this process uses, in bytes; 0 where the kernel does not tell.
pub(super) fn resident_bytes() -> u64 {
    bytes_of("/proc/self/status", "VmRSS:")
}

/// The most that it has ever used, in bytes; 0 where the kernel does not tell.
pub(super) fn most_resident_bytes() -> u64 {
    bytes_of("/proc/self/status", "VmHWM:")
}

/// The kilobytes of a line of one of the kernel's files, in bytes; 0 without such a line.
pub(super) fn bytes_of(file: &str, name: &str) -> u64 {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()).unwrap_or(0) * 1024
}
