//! What only ranks can tell of a machine: whether libtorch works, CUDA and NCCL are there, collectives do
//! what they should, and how fast they are. One line of JSON a rank; what to make of it is the launcher's.

use crate::error::TrainError;
use ops::collectives::{Communicator, suite};
use std::time::Instant;
use tch::{Device, Kind, Tensor};

/// Elements of the buffer that is sent: 32 MB of fp32.
const NUMEL: usize = 8 << 20;

/// Small messages, of which the median is taken.
const TURNS: usize = 200;

/// Looks, and measures between all ranks. Collective.
///
/// # Errors
/// A failed collective.
pub fn doctor(comm: &dyn Communicator) -> Result<String, TrainError> {
    let cuda = match ops::cuda::open() {
        Ok(devices) => format!("{devices} devices"),
        Err(why) => why.to_string().lines().next().unwrap_or_default().to_string(),
    };
    let product = Tensor::ones([64, 64], (Kind::Float, Device::Cpu));
    let works = product.matmul(&product).double_value(&[0, 0]) == 64.0;
    let failed: Vec<String> = suite::suite(comm)
        .into_iter()
        .filter_map(|check| check.outcome.err().map(|why| format!("{}: {why}", check.name)))
        .collect();
    let mut latencies = Vec::with_capacity(TURNS);
    for _ in 0..TURNS {
        let started = Instant::now();
        comm.barrier()?;
        latencies.push(started.elapsed().as_secs_f64());
    }
    latencies.sort_by(f64::total_cmp);
    let buffer = comm.buffer(NUMEL, Kind::Float)?;
    comm.broadcast(&buffer, 0)?; // memory is touched for the first time
    comm.barrier()?;
    let started = Instant::now();
    comm.broadcast(&buffer, 0)?;
    comm.barrier()?;
    let seconds = started.elapsed().as_secs_f64();
    let place = comm.place();
    let found = serde_json::json!({
        "rank": place.rank,
        "host": place.host,
        "nodes": place.nodes,
        "world_size": place.world_size,
        "libtorch": works,
        "cuda": cuda,
        "nccl": ops::collectives::nccl_version(),
        "failed": failed,
        "barrier_us": latencies[TURNS / 2] * 1e6,
        "gigabytes_per_second": (NUMEL * 4) as f64 / seconds / 1e9,
    });
    Ok(found.to_string())
}
