//! Where time goes on a device: attention by pattern and length, and a step by phase. Measures; of limits it
//! knows one, that of a band beside all pairs.

use super::report::{Check, Figure};
use super::trial::{Shape, Trial};
use crate::error::TrainError;
use crate::timing::Timing;
use configs::Pattern;
use ops::collectives::Communicator;
use std::time::Instant;
use tch::{Device, Kind, Tensor};

/// What attention is timed over, and at which length a band is held against all pairs.
struct Lengths {
    all: &'static [i64],
    compared: i64,
    turns: usize,
}

const ON_GPU: Lengths = Lengths { all: &[1024, 4096, 16_384, 65_536], compared: 16_384, turns: 5 };
const IN_TRIAL: Lengths = Lengths { all: &[256, 2048], compared: 2048, turns: 1 };

/// Forward and backward of 12 heads of 64 by pattern and length, milliseconds; a band of 256 takes at most a
/// fifth of what all pairs take (in a trial, less).
pub(super) fn attention(device: Device, kind: Kind) -> Check {
    let lengths = if device.is_cuda() { ON_GPU } else { IN_TRIAL };
    Check::run("a band costs a fraction of all pairs", || {
        let (mut figures, mut compared) = (Vec::new(), [f64::NAN; 2]);
        for &t in lengths.all {
            for text in ["dense", "banded:256", "strided:128", "fixed:128,8"] {
                let ms = attention_ms(device, kind, t, text, lengths.turns)?;
                if t == lengths.compared {
                    match text {
                        "dense" => compared[0] = ms,
                        "banded:256" => compared[1] = ms,
                        _ => {}
                    }
                }
                figures.push(Figure::plain(&format!("{text} T={t} ms"), ms));
            }
        }
        let limit = if device.is_cuda() { 0.2 } else { 1.0 };
        figures.push(Figure::at_most("banded:256 over dense", compared[1] / compared[0], limit));
        Ok(figures)
    })
}

/// The median of `turns`, after one that is not counted.
fn attention_ms(device: Device, kind: Kind, t: i64, text: &str, turns: usize) -> Result<f64, TrainError> {
    let pattern: Pattern = text.parse().expect("a pattern");
    let random = || Tensor::randn([1, 12, t, 64], (kind, device));
    let leaves = [random(), random(), random()].map(|x| x.set_requires_grad(true));
    let (grad, mut times) = (random(), Vec::new());
    for _ in 0..=turns {
        wait_for(device);
        let started = Instant::now();
        let out = ops::attention(&leaves[0], &leaves[1], &leaves[2], pattern, None);
        ops::backward(&out, &grad)?;
        wait_for(device);
        times.push(started.elapsed().as_secs_f64());
    }
    let times = &mut times[1..];
    times.sort_by(f64::total_cmp);
    Ok(1e3 * times[times.len() / 2])
}

/// A step by phase, milliseconds, the device waited for at the end of each; so their sum is more than a step
/// that waits for nothing.
pub(super) fn phases(
    name: &str,
    shape: &Shape,
    kind: Kind,
    device: Device,
    comm: &dyn Communicator,
) -> Check {
    Check::run(&format!("a step at the {name} shape by phase"), || {
        let mut trial = Trial::new(shape, kind, device, comm)?;
        let mut timing = Timing::of_device(device);
        for _ in 0..2 {
            timing.take(); // the first step is not like the others
            trial.step_timed(&mut timing)?;
        }
        let phases = timing.take();
        let figure = |(name, seconds): (&str, f64)| Figure::plain(name, 1e3 * seconds);
        let named = [("forward", phases.forward), ("backward", phases.backward), ("reduce", phases.reduce)];
        Ok(named.into_iter().chain([("optimizer", phases.optimizer)]).map(figure).collect())
    })
}

fn wait_for(device: Device) {
    if let Device::Cuda(index) = device {
        tch::Cuda::synchronize(index as i64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ops::collectives::Solo;

    #[test]
    fn a_step_by_phase_has_every_phase_and_its_seconds() {
        let shape = Shape::timed("tiny", 2).unwrap();
        let check = phases("tiny", &shape, Kind::Float, Device::Cpu, &Solo::new());
        assert!(check.held && check.figures.len() == 4, "{check:?}");
        let forward = check.figures[0].value.unwrap();
        assert!(forward > 0.0 && forward < 1e4, "{check:?}");
    }
}
