//! How long a sum over ranks takes, measured where it will be used. Knows no reference to compare with.

use super::{CommError, Communicator};
use std::time::Instant;
use tch::{Device, Kind, Tensor};

/// The median time of summing a buffer of `numel` fp32 over ranks, in seconds, after one unmeasured
/// turn. Each turn counts as long as its slowest rank; the same on all ranks. Collective.
///
/// # Errors
/// As [`Communicator::all_reduce`].
pub fn all_reduce_seconds(comm: &dyn Communicator, numel: usize, turns: usize) -> Result<f64, CommError> {
    let buffer = Tensor::zeros([numel as i64], (Kind::Float, Device::Cpu));
    let mut seconds = Vec::with_capacity(turns);
    for turn in 0..=turns {
        comm.barrier()?;
        let began = Instant::now();
        comm.all_reduce(&buffer)?;
        let mine = began.elapsed().as_secs_f64();
        let all = comm.all_gather_bytes(&mine.to_ne_bytes())?;
        let slowest = all.iter().flat_map(|bytes| super::f64s(bytes)).fold(0.0, f64::max);
        if turn > 0 {
            seconds.push(slowest);
        }
    }
    seconds.sort_by(f64::total_cmp);
    Ok(seconds.get(turns / 2).copied().unwrap_or(0.0))
}
