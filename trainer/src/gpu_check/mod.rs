//! The GPU check: that a GPU computes what the CPU does, alone and with two ranks on it, and how fast.
//! `scripts/gpu-check` runs its parts one after the other and puts PyTorch's figures beside them.
//!
//! Owns what is claimed and the limits; how far apart things are is `compare`'s, how it is told
//! `report`'s. On the CPU in the place of the GPU it compares that with itself: a trial of the check.

mod compare;
mod kernels;
mod pace;
mod report;
mod run;
mod trial;

use crate::error::TrainError;
use compare::{curve_distance, farthest, relative_distance};
use configs::Exit;
use ops::collectives::{Communicator, DeviceSums, Solo, Staged, Way, serve, suite};
use ops::{cuda, cuda_memory, device};
use report::{Check, Figure, Findings, Speed};
use std::path::Path;
use std::time::Instant;
use tch::{Device, Kind};
use trial::{Shape, Trial};

/// A part of the check, a process (or a job of two) of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// One rank: the device, kernels and patterns, forward and backward, twenty steps, repetition, the state's
    /// way to the device and back, by itself and in checkpoints of a run, the behaviour suite over NCCL.
    One,
    /// Two ranks that share the device, with sums through host memory.
    Ranks,
    /// Tokens per second, attention by length, a step by phase.
    Speed,
}

/// Steps of a curve that are compared: of a GPU, and in a trial, whose CPU may be slow in bf16.
const STEPS: usize = 20;
const STEPS_TRIAL: usize = 4;

/// What fp32 and bf16 may differ by between two devices: logits, gradients of a segment and losses of a
/// curve. In fp32 only the order of additions differs; in bf16 a rounding of 2^-8 falls elsewhere.
const LIMITS: [(&str, Kind, Limits); 2] = [
    ("fp32", Kind::Float, Limits { logits: 1e-5, gradient: 1e-4, curve: 1e-4 }),
    ("bf16", Kind::BFloat16, Limits { logits: 3e-2, gradient: 5e-2, curve: 1e-2 }),
];

#[derive(Debug, Clone, Copy)]
struct Limits {
    logits: f64,
    gradient: f64,
    curve: f64,
}

/// Runs a part and leaves what it found in the folder `out`, on a GPU, or with the CPU in its place if
/// `trial`. Collective.
///
/// # Errors
/// [`TrainError::NoGpu`], files that cannot be written, a failed collective.
pub fn gpu_check(
    part: Part,
    out: &Path,
    trial: bool,
    comm: &mut Box<dyn Communicator>,
) -> Result<Exit, TrainError> {
    if !trial {
        cuda::open().map_err(TrainError::NoGpu)?;
    }
    let wanted = if trial { configs::Device::Cpu } else { configs::Device::Cuda };
    let device = device::select(wanted, comm.local_rank())?;
    device::configure_process(1);
    let (name, findings) = match part {
        Part::One => ("1-one", one(device, out, comm)?),
        Part::Ranks => ("2-ranks", ranks(device, comm)?),
        Part::Speed => ("3-speed", speed(device, &**comm)),
    };
    if comm.rank() == 0 {
        findings.write_part(out, name)?;
    }
    Ok(Exit::Done)
}

/// Writes the report of what the parts left in the folder `out`; ends well if all held.
///
/// # Errors
/// Files that cannot be read or written.
pub fn gpu_check_report(out: &Path) -> Result<Exit, TrainError> {
    let mut all = Findings::read_parts(out)?;
    let peak = all.peak_flops;
    for speed in all.speeds.iter_mut().filter(|speed| speed.mfu.is_none()) {
        let shape = Shape::timed(&speed.shape, speed.micro_batch);
        speed.mfu = shape.zip(peak).map(|(shape, peak)| mfu(&shape, speed.step_ms / 1e3, peak));
    }
    all.write_report(out)?;
    Ok(if all.held() { Exit::Done } else { Exit::Failed })
}

fn one(device: Device, out: &Path, comm: &mut Box<dyn Communicator>) -> Result<Findings, TrainError> {
    let mut findings = Findings { about: about(device), ..Findings::default() };
    let steps = steps(device);
    for (name, kind, limits) in LIMITS {
        let claim = format!("forward and backward in {name} are the CPU's");
        findings.checks.push(Check::run(&claim, || forward_and_backward(device, kind, limits)));
        let claim = format!("{steps} steps in {name} follow the CPU's curve");
        let figures = || {
            let got = Trial::new(&Shape::small(), kind, device, &Solo::on(device))?.curve(steps)?;
            curve_figures(&got, kind, limits)
        };
        findings.checks.push(Check::run(&claim, figures));
    }
    findings.checks.extend(kernels::checks(device));
    findings.checks.push(Check::run("two runs have the same bits", || repetition(device, steps)));
    let claim = "the state goes to the device and back unchanged, and the curve goes on";
    findings.checks.push(Check::run(claim, || there_and_back(device)));
    let claim = "a run goes on from a CPU's checkpoint on the device, and from the device's on a CPU";
    let limit = LIMITS[0].2.curve;
    findings.checks.push(Check::run(claim, || run::there_and_back(device, &out.join("runs"), limit)));
    let way = match serve(comm, device, DeviceSums::Fast)? {
        Way::Nccl => "over NCCL",
        Way::HostMemory => "without NCCL, which was not found",
        Way::Cpu => "on the CPU",
    };
    let claim = format!("one rank passes the behaviour suite {way}");
    findings.checks.push(suite_check(&claim, &**comm));
    Ok(findings)
}

fn ranks(device: Device, comm: &mut Box<dyn Communicator>) -> Result<Findings, TrainError> {
    if device == Device::Cpu {
        let inner = std::mem::replace(comm, Box::new(Solo::new()));
        *comm = Box::new(Staged::new(inner, device)); // with the copies, for the trial
    } else {
        serve(comm, device, DeviceSums::Tree)?;
    }
    let (comm, ranks) = (&**comm, comm.world_size());
    let (mut findings, steps) = (Findings::default(), steps(device));
    let claim = format!("{ranks} ranks on one device pass the behaviour suite through host memory");
    findings.checks.push(suite_check(&claim, comm));
    for (name, kind, limits) in LIMITS {
        let claim = format!("{ranks} ranks on one device follow the CPU's curve of {steps} steps in {name}");
        let figures = || {
            let got = Trial::new(&Shape::small(), kind, device, comm)?.curve(steps)?;
            curve_figures(&got, kind, limits)
        };
        findings.checks.push(Check::run(&claim, figures));
    }
    Ok(findings)
}

fn steps(device: Device) -> usize {
    if device == Device::Cpu { STEPS_TRIAL } else { STEPS }
}

/// Shapes, micro-batches and how many steps are timed after how many that are not.
const TIMED: [(&str, usize, usize, usize); 4] =
    [("124m", 16, 20, 5), ("350m", 8, 10, 3), ("1.3b", 4, 10, 3), ("2.7b", 4, 5, 2)];
const TIMED_TRIAL: [(&str, usize, usize, usize); 1] = [("tiny", 2, 5, 1)];

/// The shape and micro-batch whose step is told by phase.
const PROFILED: (&str, usize) = ("1.3b", 4);
const PROFILED_TRIAL: (&str, usize) = ("tiny", 2);

/// How far the peak of memory may be from the planned one, as a share of it.
const MEMORY_LIMIT: f64 = 0.1;

fn speed(device: Device, comm: &dyn Communicator) -> Findings {
    let (dtype, kind) = if device == Device::Cpu { ("fp32", Kind::Float) } else { ("bf16", Kind::BFloat16) };
    let peak = device::peak_flops(device, kind);
    let mut findings = Findings { peak_flops: Some(peak), ..Findings::default() };
    let (timed, profiled): (&[_], _) =
        if device == Device::Cpu { (&TIMED_TRIAL, PROFILED_TRIAL) } else { (&TIMED, PROFILED) };
    for &(name, micro_batch, steps, warm_up) in timed {
        let shape = Shape::timed(name, micro_batch).expect("the list names shapes that there are");
        if let Some(why) = has_no_room(&shape, kind, device) {
            findings.about.insert(format!("no step at the {name} shape"), why);
            continue;
        }
        let claim = format!("a step at the {name} shape runs in the memory that is planned");
        let mut found = None;
        let check = Check::run(&claim, || {
            let gpu = if let Device::Cuda(index) = device { Some(index) } else { None };
            gpu.map(cuda_memory::begin_peak).transpose()?;
            let (seconds, loss) = step_seconds(&shape, kind, device, comm, [warm_up, steps])?;
            found = Some(Speed {
                system: "phalanx".into(),
                shape: name.into(),
                micro_batch,
                seq_len: shape.model.seq_len,
                dtype: dtype.into(),
                step_ms: 1e3 * seconds,
                tokens_per_second: (micro_batch * shape.model.seq_len) as f64 / seconds,
                mfu: Some(mfu(&shape, seconds, peak)),
                note: String::new(),
            });
            let mut figures = vec![Figure::plain("loss", loss)];
            if let Some(peak) = gpu.map(cuda_memory::peak_bytes).transpose()? {
                figures.extend(memory_figures(&shape, kind, peak));
            }
            Ok(figures)
        });
        findings.checks.push(check);
        findings.speeds.extend(found);
    }
    findings.checks.push(pace::attention(device, kind));
    let (name, micro_batch) = profiled;
    let shape = Shape::timed(name, micro_batch).expect("a shape that there is");
    findings.checks.push(pace::phases(name, &shape, kind, device, comm));
    findings
}

/// Why a shape is not tried on a GPU: it has no room for what is planned.
fn has_no_room(shape: &Shape, kind: Kind, device: Device) -> Option<String> {
    let Device::Cuda(index) = device else { return None };
    let (planned, there) = (shape.room(kind).total as f64, cuda::properties(index)?.memory_bytes as f64);
    (planned > 0.95 * there).then(|| format!("it takes {:.1} GB of {:.1}", planned / 1e9, there / 1e9))
}

/// The peak of what libtorch held beside what is planned without CUDA's own, GB.
fn memory_figures(shape: &Shape, kind: Kind, peak: u64) -> [Figure; 3] {
    let room = shape.room(kind);
    let (peak, planned) = (peak as f64, (room.total - room.reserved) as f64);
    [
        Figure::plain("peak GB", peak / 1e9),
        Figure::plain("planned GB", planned / 1e9),
        Figure::at_most("off by", (peak / planned - 1.0).abs(), MEMORY_LIMIT),
    ]
}

/// The median of `steps` steps in seconds, after `warm_up` others, and the last loss.
fn step_seconds(
    shape: &Shape,
    kind: Kind,
    device: Device,
    comm: &dyn Communicator,
    [warm_up, steps]: [usize; 2],
) -> Result<(f64, f64), TrainError> {
    let mut trial = Trial::new(shape, kind, device, comm)?;
    let (mut seconds, mut loss) = (Vec::with_capacity(steps), f64::NAN);
    for turn in 0..warm_up + steps {
        trial.synchronize();
        let started = Instant::now();
        loss = trial.step()?;
        trial.synchronize();
        if turn >= warm_up {
            seconds.push(started.elapsed().as_secs_f64());
        }
    }
    seconds.sort_by(f64::total_cmp);
    Ok((seconds[steps / 2], loss))
}

fn mfu(shape: &Shape, seconds: f64, peak: f64) -> f64 {
    shape.model.flops_per_sequence() * shape.micro_batch as f64 / seconds / peak
}

fn forward_and_backward(device: Device, kind: Kind, limits: Limits) -> Result<Vec<Figure>, TrainError> {
    let shape = Shape::small();
    let (there, here) = (Solo::on(device), Solo::new());
    let mut got = Trial::new(&shape, kind, device, &there)?;
    let mut expected = Trial::new(&shape, kind, Device::Cpu, &here)?;
    let logits = relative_distance(&got.logits()?, &expected.logits()?);
    let ((loss, _), (expected_loss, _)) = (got.gradient()?, expected.gradient()?);
    let mut figures = vec![
        Figure::at_most("logits", logits, limits.logits),
        Figure::at_most("loss", curve_distance(&[loss], &[expected_loss]), limits.curve),
    ];
    for ((name, got), (_, expected)) in got.gradients().iter().zip(expected.gradients()) {
        let name = format!("gradient of {name}");
        figures.push(Figure::at_most(&name, relative_distance(got, &expected), limits.gradient));
    }
    Ok(figures)
}

/// How far two runs of the same are from each other: not at all.
fn repetition(device: Device, steps: usize) -> Result<Vec<Figure>, TrainError> {
    let kind = Kind::BFloat16;
    let comm = Solo::on(device);
    let curve = || Trial::new(&Shape::small(), kind, device, &comm)?.curve(steps);
    let (first, second) = (curve()?, curve()?);
    Ok(vec![Figure::at_most("farthest loss", curve_distance(&first, &second), 0.0)])
}

/// Three steps on the CPU, three on the device, and one on the CPU, beside the CPU all along.
fn there_and_back(device: Device) -> Result<Vec<Figure>, TrainError> {
    let (kind, shape, limit) = (Kind::Float, Shape::small(), LIMITS[0].2.curve);
    let (there, here) = (Solo::on(device), Solo::new());
    let new = |device, comm| Trial::new(&shape, kind, device, comm);
    let (mut on_cpu, mut on_device) = (new(Device::Cpu, &here)?, new(device, &there)?);
    let mut curve = on_cpu.curve(3)?;
    on_device.take_over(&on_cpu)?;
    let (got, was) = (on_device.state(), on_cpu.state());
    let moved = farthest(got.iter().zip(&was).map(|(got, was)| relative_distance(got, was)));
    curve.extend(on_device.curve(3)?);
    on_cpu.take_over(&on_device)?;
    curve.extend(on_cpu.curve(1)?);
    let expected = new(Device::Cpu, &here)?.curve(curve.len())?;
    Ok(vec![
        Figure::at_most("what was moved", moved, 0.0),
        Figure::at_most("farthest loss", curve_distance(&curve, &expected), limit),
    ])
}

/// A curve against that of the CPU, of one rank.
fn curve_figures(got: &[f64], kind: Kind, limits: Limits) -> Result<Vec<Figure>, TrainError> {
    let expected = Trial::new(&Shape::small(), kind, Device::Cpu, &Solo::new())?.curve(got.len())?;
    Ok(vec![
        Figure::at_most("farthest loss", curve_distance(got, &expected), limits.curve),
        Figure::plain("first loss", got[0]),
        Figure::plain("last loss", got[got.len() - 1]),
    ])
}

fn suite_check(claim: &str, comm: &dyn Communicator) -> Check {
    let mut checks = Vec::new();
    let mut check = Check::run(claim, || {
        checks = suite::suite(comm);
        Ok(vec![Figure::plain("claims", checks.len() as f64)])
    });
    for failed in checks {
        if let Err(why) = failed.outcome {
            check.held = false;
            check.note = format!("{}{}: {why}; ", check.note, failed.name);
        }
    }
    check
}

fn about(device: Device) -> std::collections::BTreeMap<String, String> {
    let mut about = std::collections::BTreeMap::new();
    let mut say = |name: &str, value: String| drop(about.insert(name.to_owned(), value));
    say("phalanx", env!("CARGO_PKG_VERSION").into());
    match device {
        Device::Cuda(index) => {
            if let Some(gpu) = cuda::properties(index) {
                let (major, minor) = gpu.capability;
                say("device", format!("{}, compute capability {major}.{minor}", gpu.name));
                say("device memory", format!("{:.1} GiB", gpu.memory_bytes as f64 / f64::from(1 << 30)));
            }
            let kernels = ops::kernels::ready(device).into_iter();
            let kernels = kernels.map(|(name, there)| if there { name.into() } else { format!("no {name}") });
            say("kernels", kernels.collect::<Vec<_>>().join(", "));
        }
        _ => say("device", "the CPU in the place of a GPU: a trial of the check".into()),
    }
    about
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_holds_within_a_tenth_of_what_is_planned() {
        let shape = Shape::timed("1.3b", 4).unwrap();
        let room = shape.room(Kind::BFloat16);
        let planned = (room.total - room.reserved) as f64;
        for (share, held) in [(1.0, true), (0.92, true), (1.08, true), (0.85, false), (1.15, false)] {
            let [_, _, off] = memory_figures(&shape, Kind::BFloat16, (planned * share) as u64);
            let check = Check::run("memory", || Ok(vec![off]));
            assert_eq!(check.held, held, "{share}: {check:?}");
        }
    }

    #[test]
    fn a_shape_of_16_gb_and_more_of_state_is_planned_with_all_of_it() {
        let room = Shape::timed("2.7b", 4).unwrap().room(Kind::BFloat16);
        assert!(room.total as f64 > 18.0 * 2.6e9 && (room.total as f64) < 80e9, "{room:?}");
    }
}
