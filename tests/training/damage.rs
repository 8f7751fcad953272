//! Damage to checkpoints: it is named, and the newest good one is used.

use crate::Bench;
use crate::left::{Left, assert_same};
use std::fs;
use std::path::Path;

const EVERY_FIVE: &str = "--set checkpoint.every_steps=5";

/// What happens to a file.
type Damage = fn(&Path);

/// A run of 15 steps on two ranks, with checkpoints of steps 5, 10 and 15.
fn whole_run(name: &str) -> (Bench, Left) {
    let bench = Bench::new(name, 15);
    let left = bench.trained("whole", 2, EVERY_FIVE);
    assert!([5, 10, 15].iter().all(|&step| left.checkpoint(step).is_dir()));
    (bench, left)
}

/// Changes one bit in the middle of a file.
pub(crate) fn flip_a_bit(file: &Path) {
    let mut bytes = fs::read(file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 4;
    fs::write(file, bytes).unwrap();
}

/// Leaves the first half of a file.
pub(crate) fn cut_in_half(file: &Path) {
    let length = fs::metadata(file).unwrap().len();
    fs::File::options().write(true).open(file).unwrap().set_len(length / 2).unwrap();
}

#[test]
fn a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used() {
    let (bench, whole) = whole_run("newest");
    let damages: [(&str, Damage); 3] = [
        ("rank-00001.safetensors", flip_a_bit),
        ("rank-00000.safetensors", cut_in_half),
        ("manifest.json", |file| fs::remove_file(file).unwrap()),
    ];
    for (file, damage) in damages {
        bench.copy_run("whole", file);
        damage(&bench.left(file).checkpoint(15).join(file));
        let damaged = format!("checkpoint runs/{file}/checkpoints/step-00000015 is damaged: {file}");
        let used = format!("going on from runs/{file}/checkpoints/step-00000010 at step 10");
        bench.train(file, 2, EVERY_FIVE).run().expect_code(0).expect_stderr(&[&damaged, &used]);
        assert_same(&whole, &bench.left(file), 15);
    }
}

#[test]
fn when_every_checkpoint_is_damaged_all_are_named_and_nothing_is_done() {
    let (bench, whole) = whole_run("all");
    for step in [5, 10, 15] {
        flip_a_bit(&whole.checkpoint(step).join("rank-00000.safetensors"));
    }
    let told = ["step-00000005", "step-00000010", "step-00000015", "rank-00000.safetensors", "hint:"];
    bench.train("whole", 2, EVERY_FIVE).run().expect_code(2).expect_stderr(&told);
    assert_eq!(whole.of_steps("loss").len(), 15);
}
