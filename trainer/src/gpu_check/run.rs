//! A run as people make them, in legs, with checkpoints on disk between them: on a CPU, on the device, on a CPU
//! again. Knows no kernels, and of the run only what it writes.

use super::compare::curve_distance;
use super::report::Figure;
use crate::error::TrainError;
use crate::train::{Process, train};
use crate::{Faults, Log, Pulse, StopFlag};
use configs::Philox;
use dataloader::{DataSetWriter, Tokenizer};
use ops::collectives::Solo;
use std::path::Path;
use tch::Device;

/// Steps of a leg.
const STEPS: u64 = 3;

/// Where each leg's steps are: before the first checkpoint, between the two, and after.
const LEGS: u64 = 3;

/// How far the losses of a run on CPU, device and CPU are from those of one on the CPU alone. `folder` is for what
/// they write, and removed.
///
/// # Errors
/// What ends a run, files that cannot be written.
pub(super) fn there_and_back(device: Device, folder: &Path, limit: f64) -> Result<Vec<Figure>, TrainError> {
    let _ = std::fs::remove_dir_all(folder); // of an earlier check
    write_data(&folder.join("data"))?;
    let moved = losses(folder, "moved", &[Device::Cpu, device, Device::Cpu])?;
    let stayed = losses(folder, "stayed", &[Device::Cpu])?;
    std::fs::remove_dir_all(folder).map_err(TrainError::io(folder))?;
    Ok(vec![
        Figure::at_most("farthest loss", curve_distance(&moved, &stayed), limit),
        Figure::plain("steps", moved.len() as f64),
    ])
}

/// The losses of a run of all legs, the last of `devices` for all that follow.
fn losses(folder: &Path, name: &str, devices: &[Device]) -> Result<Vec<f64>, TrainError> {
    let (file, run) = (folder.join(format!("{name}.toml")), folder.join(name));
    for (leg, &device) in devices.iter().enumerate() {
        let last = leg + 1 == devices.len();
        let max_steps = if last { LEGS * STEPS } else { (leg as u64 + 1) * STEPS };
        let text = configuration(&folder.join("data"), &run, max_steps);
        std::fs::write(&file, text).map_err(TrainError::io(&file))?;
        let config = configs::load(&file, &[], &dataloader::vocab_size)?;
        let process = Process {
            stop: StopFlag::default(),
            log: Log::default(),
            device,
            faults: Faults::default(),
            pulse: Pulse::default(),
        };
        train(&config, &Solo::on(device), &process)?;
    }
    let metrics = run.join("metrics.jsonl");
    let text = std::fs::read_to_string(&metrics).map_err(TrainError::io(&metrics))?;
    let events = text.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    Ok(events.filter(|event| event["kind"] == "step").filter_map(|event| event["loss"].as_f64()).collect())
}

fn configuration(data: &Path, run: &Path, max_steps: u64) -> String {
    let (data, run) = (data.display().to_string(), run.display().to_string());
    format!(
        "[run]\ndir = {run:?}\n\
         [model]\nn_layer = 2\nn_head = 2\nn_embd = 64\nseq_len = 64\nattention = [\"dense\", \"banded:16\"]\n\
         [data]\ntrain = {data:?}\n\
         [batch]\nglobal_batch_tokens = 1024\nmicro_batch = 4\n\
         [optim]\nlr = 1e-3\n\
         [schedule]\nkind = \"constant\"\nmax_steps = {max_steps}\n\
         [parallel]\ndtype = \"fp32\"\nshard = \"none\"\n"
    )
}

/// Documents of bytes that mostly follow a rule.
fn write_data(folder: &Path) -> Result<(), TrainError> {
    let mut data = DataSetWriter::create(folder, Tokenizer::Bytes, 1 << 20)?;
    for document in 0..32 {
        let words = (0..512).map(|i| Philox::new(3).at([i, document, 0, 0])[0]);
        let text: Vec<u8> = words
            .scan(0u8, |byte, draw| {
                *byte = if draw % 8 == 0 { (draw >> 8) as u8 } else { byte.wrapping_mul(5).wrapping_add(3) };
                Some(*byte)
            })
            .collect();
        data.push(0, u64::from(document), &text)?;
    }
    data.finish(vec!["gpu-check".into()])?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_in_legs_has_the_losses_of_one_without_and_leaves_nothing() {
        let scratch = tempfile::tempdir().unwrap();
        let folder = scratch.path().join("runs");
        let figures = there_and_back(Device::Cpu, &folder, 0.0).unwrap();
        assert_eq!(figures[0], Figure::at_most("farthest loss", 0.0, 0.0), "{figures:?}");
        assert_eq!(figures[1], Figure::plain("steps", (LEGS * STEPS) as f64));
        assert!(!folder.exists());
    }
}
