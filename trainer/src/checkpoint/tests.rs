//! What a user relies on: whole buffers come back bit for bit at any number of ranks, a crash at any
//! moment and damage of any kind leave the previous checkpoint, and one start of a run at a time writes.

use super::write::report_file;
use super::*;
use crate::run_folder::folder_names;
use configs::{Philox, SegmentSpec};
use proptest::prelude::*;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;

/// A run in a folder of its own, with one segment larger than a slice and one smaller.
struct Run {
    _scratch: TempDir,
    run: RunFolder,
    segments: Vec<SegmentSpec>,
}

impl Run {
    fn new() -> Run {
        Run::with_segments(&[("wte", 20_000), ("h.0", 4096), ("ln_f", 64)])
    }

    fn with_segments(sizes: &[(&str, usize)]) -> Run {
        let scratch = tempfile::tempdir().unwrap();
        let run = RunFolder::open(scratch.path()).unwrap();
        let segment =
            |&(name, numel): &(&str, usize)| SegmentSpec { name: name.into(), tensors: Vec::new(), numel };
        Run { _scratch: scratch, run, segments: sizes.iter().map(segment).collect() }
    }

    /// A start of the run: its generation and rank 0's hand.
    fn start(&self) -> (u64, Publisher) {
        let generation = self.run.claim_generation().unwrap();
        (generation, Publisher::new(&self.run, generation))
    }

    fn state(&self, step: u64) -> TrainState {
        TrainState {
            step,
            samples: step * 64,
            tokens: step * 64 * 256,
            config: "[run]\nname = \"tiny\"\n".into(),
            train_digest: "ab".repeat(32),
            val_digest: Some("cd".repeat(32)),
            tokenizer: "bytes".into(),
            segments: self.segments.clone(),
        }
    }

    /// Any bits, other ones for each step, segment and kind: NaNs with payloads too.
    fn buffer(&self, step: u64, segment: usize, kind: StateKind) -> Vec<f32> {
        let numel = self.segments[segment].numel;
        (0..numel).map(|i| f32::from_bits(hash_of(step, segment, kind, i))).collect()
    }

    fn snapshot(&self, step: u64, generation: u64, rank: usize, world_size: usize) -> Snapshot {
        let mut slices = Vec::new();
        for (index, segment) in self.segments.iter().enumerate() {
            for kind in StateKind::ALL {
                let whole = self.buffer(step, index, kind);
                slices.extend(Slice::owned(&segment.name, kind, &whole, rank, world_size));
            }
        }
        Snapshot { step, generation, rank, world_size, slices }
    }

    /// All that the ranks of a start do for one checkpoint.
    fn save(&self, start: &(u64, Publisher), step: u64, world_size: usize) -> PathBuf {
        let (generation, publisher) = start;
        publisher.prepare(step, &self.segments).unwrap();
        let writers: Vec<_> = (0..world_size)
            .map(|rank| {
                CheckpointWriter::start(&self.run, self.snapshot(step, *generation, rank, world_size))
            })
            .collect();
        writers.into_iter().for_each(|writer| drop(writer.wait().unwrap()));
        publisher.publish(&self.state(step), world_size).unwrap()
    }

    fn checkpoints(&self) -> Checkpoints {
        Checkpoints::open(self.run.dir())
    }

    fn newest(&self) -> Loaded {
        self.checkpoints().newest_good().unwrap().expect("there is a good one")
    }

    fn names(&self) -> Vec<String> {
        folder_names(&self.run.checkpoints_dir()).unwrap()
    }

    fn assert_holds(&self, loaded: &Loaded, step: u64) {
        assert_eq!(loaded.state(), &self.state(step));
        for (index, segment) in self.segments.iter().enumerate() {
            for kind in StateKind::ALL {
                let mut values = vec![0.0; segment.numel];
                loaded.fill(&segment.name, kind, &mut values).unwrap();
                assert_eq!(bits(&values), bits(&self.buffer(step, index, kind)), "{} {kind}", segment.name);
            }
        }
    }
}

fn hash_of(step: u64, segment: usize, kind: StateKind, element: usize) -> u32 {
    let mixed = (step << 40 | (segment as u64) << 32 | element as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed >> 17) as u32 ^ kind as u32
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}
