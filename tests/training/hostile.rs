//! Checkpoints that somebody wrote to do harm: with digests that are right, and numbers, names and headers that
//! are not. They are read or refused, in little memory; nothing else happens.

use crate::Bench;
use configs::Philox;
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use trainer::checkpoint::{Checkpoints, StateKind};

/// Random numbers by counter.
struct Dice {
    philox: Philox,
    count: u32,
}

impl Dice {
    fn below(&mut self, n: usize) -> usize {
        self.count += 1;
        (self.philox.uniform([self.count, 0, 0, 0]) * n as f64) as usize
    }
}

/// Changes some value of a tree: numbers to such near a limit, texts to others, lists to longer and shorter ones.
fn change(value: &mut Value, dice: &mut Dice) {
    const NUMBERS: [u64; 10] =
        [0, 1, 2, 63, 1 << 31, 1 << 32, 1 << 62, i64::MAX as u64, u64::MAX - 3, u64::MAX];
    const TEXTS: [&str; 6] = ["", "../../etc/passwd", "h.0", "param", "rank-00001.safetensors", "\u{0}é"];
    match value {
        Value::Object(object) if !object.is_empty() => {
            let key = object.keys().nth(dice.below(object.len())).cloned().unwrap();
            if dice.below(20) == 0 { drop(object.remove(&key)) } else { change(&mut object[&key], dice) }
        }
        Value::Array(list) if !list.is_empty() => {
            let at = dice.below(list.len());
            match dice.below(12) {
                0 => drop(list.remove(at)),
                1 => list.push(list[at].clone()),
                2 => list.swap(0, at),
                _ => change(&mut list[at], dice),
            }
        }
        Value::Number(number) if dice.below(3) == 0 => {
            *value = number.as_u64().map_or(0, |number| number.wrapping_add(dice.below(3) as u64)).into();
        }
        Value::Number(_) => *value = NUMBERS[dice.below(NUMBERS.len())].into(),
        Value::String(_) if dice.below(8) > 0 => *value = TEXTS[dice.below(TEXTS.len())].into(),
        _ => *value = [Value::Null, 7.into(), "x".into(), Value::Array(vec![])][dice.below(4)].clone(),
    }
}

/// The checkpoint of a run, whole, and how it is damaged.
struct Target {
    run: PathBuf,
    folder: PathBuf,
    manifest: Value,
    state_file: Vec<u8>,
}

const STEP: u64 = 2;
const STATE_FILE: &str = "rank-00000.safetensors";

impl Target {
    fn of(run: &Path) -> Target {
        let folder = Checkpoints::open(run).folder(STEP);
        let manifest = serde_json::from_slice(&fs::read(folder.join("manifest.json")).unwrap()).unwrap();
        let state_file = fs::read(folder.join(STATE_FILE)).unwrap();
        Target { run: run.into(), folder, manifest, state_file }
    }

    /// Writes a manifest and a state file that it agrees with, in length and digest.
    fn write(&self, mut manifest: Value, state_file: &[u8]) {
        fs::write(self.folder.join(STATE_FILE), state_file).unwrap();
        let entry = manifest.pointer_mut("/files/0").filter(|entry| entry.is_object());
        if let Some(entry) = entry.filter(|_| state_file != self.state_file) {
            entry["size_bytes"] = state_file.len().into();
            entry["blake3"] = blake3::hash(state_file).to_hex().as_str().into();
        }
        if let Some(object) = manifest.as_object_mut() {
            object.remove("digest");
        }
        let text = serde_json::to_string_pretty(&manifest).unwrap();
        let covered = format!("{},\n", text.trim_end_matches("\n}"));
        let digest = blake3::hash(covered.as_bytes()).to_hex();
        fs::write(self.folder.join("manifest.json"), format!("{covered}  \"digest\": \"{digest}\"\n}}\n"))
            .unwrap();
    }

    /// Proves it and reads all of it, if it can be.
    fn read(&self) -> Result<(), String> {
        let loaded = Checkpoints::open(&self.run).verify(STEP).map_err(|damaged| damaged.to_string())?;
        for segment in &loaded.state().segments {
            for kind in [StateKind::Param, StateKind::ExpAvg, StateKind::ExpAvgSq] {
                // A manifest whose slices are there cannot speak of more values than the files have.
                let mut values = vec![0.0; segment.numel];
                loaded.fill(&segment.name, kind, &mut values).map_err(|error| error.to_string())?;
            }
        }
        Ok(())
    }

    /// One damage, by number.
    fn damage(&self, round: u64) {
        let mut dice = Dice { philox: Philox::new(round), count: 0 };
        let (mut manifest, mut state_file) = (self.manifest.clone(), self.state_file.clone());
        match dice.below(3) {
            0 => (0..=dice.below(3)).for_each(|_| change(&mut manifest, &mut dice)),
            1 => self.change_header(&mut state_file, &mut dice),
            _ => {
                let header = state_file.len().min(2000);
                for _ in 0..=dice.below(5) {
                    let at = dice.below(header);
                    state_file[at] = dice.below(256) as u8;
                }
                if dice.below(4) == 0 {
                    state_file.truncate(dice.below(header));
                }
            }
        }
        self.write(manifest, &state_file);
    }

    /// Changes the names, shapes and places in the header of a state file.
    fn change_header(&self, state_file: &mut Vec<u8>, dice: &mut Dice) {
        let length = u64::from_le_bytes(*state_file.first_chunk().unwrap()) as usize;
        let mut header: Value = serde_json::from_slice(&state_file[8..8 + length]).unwrap();
        (0..=dice.below(3)).for_each(|_| change(&mut header, dice));
        let header = serde_json::to_vec(&header).unwrap();
        let values = state_file.split_off(8 + length);
        *state_file = [&(header.len() as u64).to_le_bytes()[..], &header, &values].concat();
    }
}

/// The most memory that this process has had resident, in bytes.
fn peak_bytes() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    peak.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

mod whole_table {
    use super::*;

    #[test]
    fn a_checkpoint_made_to_do_harm_is_read_or_refused_for_as_long_as_asked() {
        let bench = Bench::new("hostile", STEP);
        bench.trained("run", 2, "");
        let target = Target::of(&bench.scratch.join("runs/run"));
        target.write(target.manifest.clone(), &target.state_file);
        target.read().unwrap(); // what is written here is what is written there
        let seconds = std::env::var("PHALANX_FUZZ_SECONDS").map_or(30, |seconds| seconds.parse().unwrap());
        let (started, before) = (Instant::now(), peak_bytes());
        let (mut round, mut refused) = (0, 0);
        while started.elapsed() < Duration::from_secs(seconds) {
            target.damage(round);
            refused += u64::from(target.read().is_err());
            round += 1;
        }
        assert!(refused > round / 2);
        assert!(peak_bytes() < before + (64 << 20), "{} bytes of memory", peak_bytes());
    }
}
