//! What a user relies on: whole buffers come back bit for bit at any number of ranks, a crash at any
//! moment and damage of any kind leave the previous checkpoint, and one start of a run at a time writes.

use super::write::report_file;
use super::*;
use crate::run_folder::{FileError, folder_names};
use configs::{CheckpointConfig, Exit, SegmentSpec};
use proptest::prelude::*;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
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
            skips: Vec::new(),
            recent_losses: Vec::new(),
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
        let snapshots = (0..world_size).map(|rank| self.snapshot(step, *generation, rank, world_size));
        let writers: Vec<_> =
            snapshots.map(|snapshot| CheckpointWriter::start(&self.run, snapshot)).collect();
        for writer in writers {
            writer.wait().unwrap();
        }
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

/// Keeps this many.
fn keep(keep_last: usize) -> CheckpointConfig {
    CheckpointConfig { every_steps: 1, keep_last, keep_every_steps: 0 }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

#[test]
fn any_number_of_ranks_writes_the_same_buffers() {
    for world_size in 1..=4 {
        let run = Run::new();
        run.save(&run.start(), 1000, world_size);
        let loaded = run.newest();
        run.assert_holds(&loaded, 1000);
        let manifest = loaded.manifest();
        assert_eq!((manifest.world_size, manifest.generation), (world_size, 1));
        assert!(loaded.skipped().is_empty());
        let mut files: Vec<String> = (0..world_size).map(rank_file).collect();
        files.insert(0, MANIFEST.to_string());
        assert_eq!(folder_names(loaded.folder()).unwrap(), files, "and nothing else is in the folder");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn a_rank_reads_what_it_owns_from_the_slices_of_any_other_number_of_ranks(
        numel in 1_usize..40_000, wrote in 1_usize..9, reads in 1_usize..9,
    ) {
        let run = Run::with_segments(&[("wte", numel)]);
        run.save(&run.start(), 1, wrote);
        let loaded = run.checkpoints().read(1).unwrap();
        let whole = run.buffer(1, 0, StateKind::ExpAvg);
        for rank in 0..reads {
            let range = configs::owned_range(numel, rank, reads);
            let mut values = vec![0.0; range.len()];
            loaded.fill_from("wte", StateKind::ExpAvg, range.start, &mut values).unwrap();
            prop_assert_eq!(bits(&values), bits(&whole[range]));
        }
    }

    #[test]
    fn no_byte_of_any_file_changes_unseen(
        file in 0_usize..3, place in any::<prop::sample::Index>(), change in 1_u8..=255,
    ) {
        let run = Run::with_segments(&[("wte", 5000), ("ln_f", 64)]);
        let start = run.start();
        run.save(&start, 1, 2);
        let folder = run.save(&start, 2, 2);
        let path = folder.join(&folder_names(&folder).unwrap()[file]);
        let mut bytes = fs::read(&path).unwrap();
        let place = place.index(bytes.len());
        bytes[place] ^= change;
        fs::write(&path, &bytes).unwrap();
        let loaded = run.newest();
        prop_assert_eq!(&loaded.skipped()[0].folder, &folder);
        run.assert_holds(&loaded, 1);
    }
}

/// Damages the newest of two checkpoints, and returns what is said about it; the one before is used.
fn damage_of_the_newest(damage: impl FnOnce(&Path)) -> String {
    let run = Run::new();
    let start = run.start();
    run.save(&start, 1000, 2);
    let folder = run.save(&start, 2000, 2);
    damage(&folder);
    let loaded = run.newest();
    run.assert_holds(&loaded, 1000);
    let [skipped] = loaded.skipped() else { panic!("one is damaged: {:?}", loaded.skipped()) };
    assert_eq!(skipped.folder, folder);
    let text = skipped.to_string();
    assert!(text.contains("step-00002000 is damaged"), "{text}");
    text
}

fn edit(path: &Path, edit: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = fs::read(path).unwrap();
    edit(&mut bytes);
    fs::write(path, bytes).unwrap();
}

/// Changes the manifest and makes its digest right again, as a forger would.
fn forge(folder: &Path, change: impl FnOnce(&mut Manifest)) {
    edit(&folder.join(MANIFEST), |bytes| {
        let mut manifest = Manifest::decode(bytes).unwrap();
        change(&mut manifest);
        *bytes = manifest.encode();
    });
}

#[test]
fn every_kind_of_damage_is_named_and_the_checkpoint_before_is_used() {
    let says = |text: &str, damage: &dyn Fn(&Path)| {
        let said = damage_of_the_newest(damage);
        assert!(said.contains(text), "{said}\nshould say: {text}");
    };
    let (rank_1, manifest) = (rank_file(1), MANIFEST);
    says("rank-00001.safetensors is missing", &|dir| fs::remove_file(dir.join(&rank_1)).unwrap());
    says("manifest.json is missing", &|dir| fs::remove_file(dir.join(manifest)).unwrap());
    says("bytes, expected", &|dir| edit(&dir.join(&rank_1), |bytes| bytes.truncate(bytes.len() - 1)));
    says("has 0 bytes, expected", &|dir| edit(&dir.join(&rank_1), |bytes| bytes.clear()));
    says("rank-00001.safetensors has the hash", &|dir| edit(&dir.join(&rank_1), |bytes| bytes[9999] ^= 1));
    says("it may be cut short", &|dir| {
        edit(&dir.join(manifest), |bytes| {
            // A cut after which it is JSON still.
            *bytes = br#"{"format": "phalanx checkpoint", "version": 1}"#.to_vec();
        });
    });
    says("manifest.json cannot be read", &|dir| edit(&dir.join(manifest), |bytes| bytes.truncate(500)));
    says("manifest.json has the digest", &|dir| edit(&dir.join(manifest), |bytes| bytes[400] ^= 1));
    says("format version 9, this program reads version 1", &|dir| {
        fs::write(dir.join(manifest), r#"{"format": "phalanx checkpoint", "version": 9}"#).unwrap();
    });
    says("it is of step 1999", &|dir| forge(dir, |manifest| manifest.state.step = 1999));
    says("names the file \"../../config.toml\"", &|dir| {
        forge(dir, |manifest| manifest.files[1].name = "../../config.toml".into());
    });
    says("no slice holds elements 12288..20000 of wte (param)", &|dir| {
        forge(dir, |manifest| drop(manifest.files[1].slices.remove(0)));
    });
    says("two slices hold elements 0..12288 of wte (param)", &|dir| {
        forge(dir, |manifest| {
            let first = manifest.files[0].slices[0].clone();
            manifest.files[1].slices.push(first);
        });
    });
    says("it has no tensor", &|dir| {
        // The two ranks' slices change places in the manifest only.
        forge(dir, |manifest| {
            let (first, second) = manifest.files.split_at_mut(1);
            std::mem::swap(&mut first[0].slices[0], &mut second[0].slices[0]);
        });
    });
    says("lies outside the model's segments", &|dir| {
        forge(dir, |manifest| manifest.files[0].slices[0].len = usize::MAX);
    });
    says("it is not a plain file", &|dir| {
        fs::remove_file(dir.join(&rank_1)).unwrap();
        fs::create_dir(dir.join(&rank_1)).unwrap();
    });
}

#[test]
fn a_run_whose_checkpoints_are_all_damaged_does_not_start_from_nothing() {
    let run = Run::new();
    assert!(run.checkpoints().newest_good().unwrap().is_none(), "a run without checkpoints may");
    let start = run.start();
    for step in [1, 2] {
        fs::remove_file(run.save(&start, step, 1).join(rank_file(0))).unwrap();
    }
    let error = run.checkpoints().newest_good().unwrap_err();
    let CheckpointError::NoneGood(damaged) = &error else { panic!("{error}") };
    assert_eq!(damaged.len(), 2);
    let text = error.to_string();
    assert!(
        text.contains("step-00000001") && text.contains("step-00000002") && text.contains("hint:"),
        "{text}"
    );
}

#[test]
fn a_crash_while_writing_leaves_the_checkpoint_before_and_no_trouble() {
    let run = Run::new();
    let start = run.start();
    run.save(&start, 1000, 2);

    // Killed at three moments: after prepare, after one rank's file, and before the rename.
    start.1.prepare(2000, &run.segments).unwrap();
    run.assert_holds(&run.newest(), 1000);
    CheckpointWriter::start(&run.run, run.snapshot(2000, start.0, 0, 2)).wait().unwrap();
    run.assert_holds(&run.newest(), 1000);
    let unfinished = run.run.checkpoints_dir().join("step-00002000.tmp");
    fs::write(unfinished.join("rank-00001.safetensors.77-0-1.tmp"), "half").unwrap();
    fs::write(unfinished.join(MANIFEST), "{").unwrap();
    run.assert_holds(&run.newest(), 1000);

    // The next start, on another number of ranks, gets there again; nothing of the first attempt is left.
    let start = run.start();
    let folder = run.save(&start, 2000, 3);
    run.assert_holds(&run.newest(), 2000);
    assert_eq!(folder_names(&folder).unwrap().len(), 4);
    assert_eq!(run.names(), ["step-00001000", "step-00002000"]);
}

#[test]
fn a_start_clears_what_earlier_ones_left_half_done() {
    let run = Run::new();
    let start = run.start();
    run.save(&start, 1000, 1);
    start.1.prepare(3000, &run.segments).unwrap();
    let dir = run.run.checkpoints_dir();
    fs::create_dir(dir.join("step-00000500.old.tmp")).unwrap();
    fs::create_dir(dir.join("notes.tmp")).unwrap();
    run.start().1.clear_unfinished().unwrap();
    assert_eq!(run.names(), ["notes.tmp", "step-00001000"], "and leaves alone what is not ours");
}

#[test]
fn a_checkpoint_is_not_published_before_every_rank_has_written() {
    let run = Run::new();
    let (generation, publisher) = run.start();
    publisher.prepare(1000, &run.segments).unwrap();
    CheckpointWriter::start(&run.run, run.snapshot(1000, generation, 0, 2)).wait().unwrap();
    let error = publisher.publish(&run.state(1000), 2).unwrap_err();
    assert!(matches!(error, CheckpointError::RankReport { rank: 1, .. }), "{error}");

    // A rank that left something out is caught too.
    let mut snapshot = run.snapshot(1000, generation, 1, 2);
    snapshot.slices.pop();
    CheckpointWriter::start(&run.run, snapshot).wait().unwrap();
    let error = publisher.publish(&run.state(1000), 2).unwrap_err();
    assert!(matches!(error, CheckpointError::Incomplete { step: 1000, .. }), "{error}");
    publisher.abandon(1000).unwrap();
    assert!(run.names().is_empty());
}

#[test]
fn a_report_that_does_not_fit_its_file_or_this_attempt_is_refused() {
    let run = Run::new();
    let (generation, publisher) = run.start();
    publisher.prepare(1000, &run.segments).unwrap();
    CheckpointWriter::start(&run.run, run.snapshot(1000, generation, 0, 1)).wait().unwrap();
    let error = publisher.publish(&run.state(1000), 2).unwrap_err().to_string();
    assert!(error.contains("(1000, 1, 0, 1), expected (1000, 1, 0, 2)"), "{error}");

    let folder = run.run.checkpoints_dir().join("step-00001000.tmp");
    edit(&folder.join(rank_file(0)), |bytes| bytes.truncate(100));
    let error = publisher.publish(&run.state(1000), 1).unwrap_err().to_string();
    assert!(error.contains("rank-00000.safetensors has 100"), "{error}");
    fs::write(folder.join(report_file(0)), "{").unwrap();
    assert!(matches!(publisher.publish(&run.state(1000), 1), Err(CheckpointError::RankReport { .. })));
}

#[test]
fn a_start_that_was_overtaken_cannot_write_publish_or_remove() {
    let run = Run::new();
    let old = run.start();
    run.save(&old, 1000, 1);
    old.1.prepare(2000, &run.segments).unwrap();
    CheckpointWriter::start(&run.run, run.snapshot(2000, old.0, 0, 1)).wait().unwrap();

    let new = run.start();
    let stale = |result: Result<(), CheckpointError>| {
        let error = result.unwrap_err();
        assert!(matches!(error, CheckpointError::StaleGeneration { mine: 1, newest: 2, .. }), "{error}");
    };
    stale(old.1.publish(&run.state(2000), 1).map(drop));
    stale(old.1.prepare(3000, &run.segments));
    stale(old.1.clear_unfinished());
    stale(old.1.abandon(2000));
    stale(old.1.prune(&keep(1), 1000).map(drop));
    stale(CheckpointWriter::start(&run.run, run.snapshot(2000, old.0, 0, 1)).wait().map(drop));
    run.assert_holds(&run.newest(), 1000);

    run.save(&new, 2000, 2);
    run.assert_holds(&run.newest(), 2000);
}

#[test]
fn what_is_left_out_is_written_into_a_published_checkpoint_and_nothing_else_changes() {
    let run = Run::new();
    let start = run.start();
    run.save(&start, 10, 2);
    let before = run.newest().manifest().clone();
    let skips = [Skip { step: 13, first_sample: 768, end_sample: 832 }];
    start.1.record_skips(10, &skips).unwrap();
    let after = run.newest(); // proved, files and all
    assert_eq!(after.state().skips, skips);
    let without = TrainState { skips: Vec::new(), ..after.state().clone() };
    assert_eq!((without, &after.manifest().files), (before.state, &before.files));

    run.start();
    let overtaken = start.1.record_skips(10, &[]).unwrap_err();
    assert!(matches!(overtaken, CheckpointError::StaleGeneration { .. }), "{overtaken}");
}

#[test]
fn the_newest_checkpoints_are_kept() {
    let run = Run::new();
    let start = run.start();
    for step in 1..=5 {
        run.save(&start, step, 1);
    }
    start.1.prepare(4, &run.segments).unwrap();
    start.1.prepare(6, &run.segments).unwrap();
    assert_eq!(start.1.prune(&keep(2), 5).unwrap(), [1, 2, 3]);
    let left = ["step-00000004", "step-00000005", "step-00000006.tmp"];
    assert_eq!(run.names(), left, "and what is being written");
    assert_eq!(start.1.prune(&keep(0), 5).unwrap(), [4], "the newest good one is never removed");
}

#[test]
fn checkpoints_of_round_steps_stay_for_good() {
    let run = Run::new();
    let start = run.start();
    for step in 1..=6 {
        run.save(&start, step, 1);
    }
    let keep = CheckpointConfig { keep_every_steps: 3, ..keep(1) };
    assert_eq!(start.1.prune(&keep, 6).unwrap(), [1, 2, 4, 5]);
    assert_eq!(run.checkpoints().steps().unwrap(), [3, 6]);
}

#[test]
fn a_list_names_every_checkpoint_with_its_state() {
    let run = Run::new();
    let start = run.start();
    run.save(&start, 1, 1);
    fs::remove_file(run.save(&start, 2, 2).join(rank_file(1))).unwrap();
    start.1.prepare(3, &run.segments).unwrap();
    let (text, exit) = commands::list(run.run.dir()).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!((lines.len(), exit), (4, Exit::Done), "{text}");
    assert!(lines[1].ends_with("complete"), "{text}");
    assert!(lines[2].ends_with("damaged: rank-00001.safetensors is missing"), "{text}");
    assert!(lines[3].starts_with("step-00000003.tmp: being written"), "{text}");
}

#[test]
fn verifying_says_of_each_whether_it_is_whole() {
    let run = Run::new();
    let start = run.start();
    run.save(&start, 1, 2);
    assert_eq!(commands::verify(run.run.dir(), None).unwrap().1, Exit::Done);
    let file = run.save(&start, 2, 2).join(rank_file(1));
    let mut bytes = fs::read(&file).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&file, bytes).unwrap();
    let (text, exit) = commands::verify(run.run.dir(), None).unwrap();
    assert_eq!(exit, Exit::UserError);
    assert!(text.contains("step 1: whole") && text.contains("step 2: damaged: rank-00001"), "{text}");
    assert_eq!(commands::verify(run.run.dir(), Some(1)).unwrap().1, Exit::Done);
    assert!(commands::show(run.run.dir(), Some(1)).unwrap().0.contains("by 2 ranks, in start 1"));
}

#[test]
fn pruning_by_hand_never_takes_the_newest_whole_one() {
    let run = Run::new();
    let start = run.start();
    for step in 1..=4 {
        run.save(&start, step, 1);
    }
    for step in [3, 4] {
        fs::write(run.checkpoints().folder(step).join(rank_file(0)), "").unwrap();
    }
    let said = commands::prune(run.run.dir(), &keep(1), true).unwrap().0;
    assert!(said.contains("would remove") && said.ends_with("steps that stay: 2, 4\n"), "{said}");
    assert_eq!(run.checkpoints().steps().unwrap(), [1, 2, 3, 4], "nothing was removed");
    commands::prune(run.run.dir(), &keep(1), false).unwrap();
    assert_eq!(run.checkpoints().steps().unwrap(), [2, 4]);
    run.assert_holds(&run.newest(), 2);
}

#[test]
fn two_checkpoints_are_compared_by_what_they_hold() {
    let (run, other) = (Run::new(), Run::new());
    run.save(&run.start(), 7, 1);
    other.save(&other.start(), 7, 3);
    let compare = || commands::compare((run.run.dir(), None), (other.run.dir(), Some(7))).unwrap();
    assert_eq!(compare().1, Exit::Done, "{}", compare().0);

    // The same state but for one bit of one value.
    let start = other.start();
    start.1.prepare(7, &other.segments).unwrap();
    let mut snapshot = other.snapshot(7, start.0, 0, 1);
    let value = &mut snapshot.slices[4].values[11];
    *value = f32::from_bits(value.to_bits() ^ 1);
    CheckpointWriter::start(&other.run, snapshot).wait().unwrap();
    start.1.publish(&other.state(7), 1).unwrap();
    let (text, exit) = compare();
    assert_eq!(exit, Exit::Failed);
    assert!(text.contains("  exp_avg of h.0, first at element 11: "), "{text}");
}

#[test]
fn a_damaged_later_checkpoint_does_not_push_out_the_good_one() {
    let run = Run::new();
    let start = run.start();
    run.save(&start, 500, 1);
    fs::remove_file(run.save(&start, 1000, 1).join(rank_file(0))).unwrap();

    // The next start falls back to 500 and gets to 750, then to 1000 again.
    let start = run.start();
    run.save(&start, 750, 1);
    start.1.prune(&keep(1), 750).unwrap();
    run.assert_holds(&run.newest(), 750);
    run.save(&start, 1000, 2);
    start.1.prune(&keep(1), 1000).unwrap();
    run.assert_holds(&run.newest(), 1000);
    assert_eq!(run.names(), ["step-00001000"]);
}

#[test]
fn without_room_nothing_is_written_and_the_run_can_go_on() {
    let run = Run::new();
    let start = run.start();
    run.save(&start, 1000, 1);
    let poor = start.1.clone().with_free_space(|_| Ok(1_000_000));
    let error = poor.prepare(2000, &run.segments).unwrap_err();
    let CheckpointError::DiskFull { need_bytes, have_bytes: 1_000_000, .. } = error else {
        panic!("{error}")
    };
    assert_eq!(need_bytes, 12 * (20_000 + 4096 + 64) + (64 << 20));
    assert!(error.to_string().contains("hint:"), "{error}");
    assert_eq!(run.names(), ["step-00001000"]);
    run.save(&start, 3000, 1);
    run.assert_holds(&run.newest(), 3000);
}

#[test]
fn a_disk_that_fills_up_while_writing_is_told_as_such() {
    let error = |kind: io::ErrorKind| {
        let failed = FileError::of("write", Path::new("rank-00000.safetensors"))(kind.into());
        CheckpointError::of_write(Path::new("/"), 4096, failed)
    };
    assert!(matches!(error(io::ErrorKind::StorageFull), CheckpointError::DiskFull { need_bytes: 4096, .. }));
    assert!(matches!(error(io::ErrorKind::QuotaExceeded), CheckpointError::DiskFull { .. }));
    assert!(matches!(error(io::ErrorKind::PermissionDenied), CheckpointError::File(_)));
}

#[test]
fn a_writer_tells_its_outcome_without_waiting_and_again() {
    let run = Run::new();
    let (generation, publisher) = run.start();
    let mut lost = CheckpointWriter::start(&run.run, run.snapshot(7, generation, 0, 1));
    lost.block();
    let error = lost.finished().unwrap().as_ref().unwrap_err().to_string();
    assert!(error.contains("step-00000007.tmp"), "no folder was prepared: {error}");

    publisher.prepare(7, &run.segments).unwrap();
    let mut writer = CheckpointWriter::start(&run.run, run.snapshot(7, generation, 0, 1));
    while writer.finished().is_none() {
        std::thread::yield_now();
    }
    let bytes = writer.finished().unwrap().as_ref().unwrap().bytes;
    assert_eq!((writer.step(), writer.wait().unwrap().bytes), (7, bytes));
}

#[test]
fn another_model_is_refused_with_the_difference() {
    let run = Run::new();
    run.save(&run.start(), 1, 1);
    let loaded = run.newest();
    loaded.check_layout(&run.segments).unwrap();
    let error = loaded.check_layout(&Run::with_segments(&[("wte", 20_032)]).segments).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("segment wte has 0 tensors in 20000 elements") && text.contains("hint:"), "{text}");
    for (segment, len) in [("wte", 19_999), ("wte", 20_001), ("h.9", 64)] {
        let result = loaded.fill(segment, StateKind::Param, &mut vec![0.0; len]);
        assert!(matches!(result, Err(CheckpointError::Layout { .. })), "{segment} {len}");
    }
    let beyond = loaded.fill_from("ln_f", StateKind::Param, usize::MAX, &mut [0.0; 2]);
    assert!(matches!(beyond, Err(CheckpointError::Layout { .. })));
}

#[test]
fn only_our_own_names_are_checkpoints() {
    assert_eq!(step_folder(1000), "step-00001000");
    assert_eq!(published_step("step-00001000"), Some(1000));
    assert_eq!(published_step("step-123456789012"), Some(123_456_789_012));
    for name in ["step-1000", "step-00001000.tmp", "step-+0001000", "step-", "Step-00001000", "step-0000100x"]
    {
        assert_eq!(published_step(name), None, "{name}");
    }
    assert_eq!(unfinished_step("step-00001000.tmp"), Some(1000));
    assert_eq!(unfinished_step("step-00001000.old.tmp"), Some(1000));
    for name in ["step-00001000", "notes.tmp", "step-00001000.mine.tmp"] {
        assert_eq!(unfinished_step(name), None, "{name}");
    }
}
