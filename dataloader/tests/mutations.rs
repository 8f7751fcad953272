//! Readers against bytes that nobody wrote: files with random damage are read or refused, by an error that
//! names the file, and nothing else happens. A few hundred damages each time; half a minute a reader in
//! `make test-full`, or as many seconds as PHALANX_FUZZ_SECONDS says. `make fuzz` is led by what is reached.

#![allow(clippy::unwrap_used)] // a test that cannot make its data has failed

use configs::Philox;
use dataloader::{
    DataSet, DataSetWriter, Format, Inputs, PrepareOptions, Samples, Tokenizer, convert_to, prepare, tokenize,
};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tempfile::TempDir;

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

/// Damages some bytes: flipped bits, numbers that are near a limit, cuts, repeats and additions.
fn damage(bytes: &mut Vec<u8>, dice: &mut Dice) {
    for _ in 0..=dice.below(6) {
        if bytes.is_empty() {
            return;
        }
        // Half of the damage is where headers are.
        let reach = if dice.below(2) == 0 { bytes.len() } else { bytes.len().min(300) };
        let at = dice.below(reach);
        match dice.below(7) {
            0 => bytes[at] ^= 1 << dice.below(8),
            1 => bytes[at] = dice.below(256) as u8,
            2 => {
                let limits = [0, 1, u64::MAX, i64::MAX as u64, 1 << 31, 1 << 32, bytes.len() as u64, 1 << 62];
                let number = limits[dice.below(limits.len())].wrapping_add(dice.below(3) as u64);
                let bytes = &mut bytes[at..];
                let width = bytes.len().min([2, 4, 8][dice.below(3)]);
                bytes[..width].copy_from_slice(&number.to_le_bytes()[..width]);
            }
            3 => bytes.truncate(at),
            4 => {
                let again = bytes[at..bytes.len().min(at + 64)].to_vec();
                bytes.splice(at..at, again);
            }
            5 => drop(bytes.drain(at..bytes.len().min(at + 1 + dice.below(16)))),
            _ => bytes.extend((0..dice.below(20)).map(|i| i as u8 * 37)),
        }
    }
}

/// Damages one of the files again and again, and tries it each time.
fn try_all(
    seed: u64,
    budget: Budget,
    files: &[PathBuf],
    reseal: fn(&mut [u8], usize),
    read: impl Fn() -> Result<(), String>,
) {
    let whole: Vec<Vec<u8>> = files.iter().map(|file| fs::read(file).unwrap()).collect();
    read().unwrap();
    let mut dice = Dice { philox: Philox::new(seed), count: 0 };
    let started = Instant::now();
    let mut refused = 0;
    for round in 0.. {
        if match budget {
            Budget::Rounds(rounds) => round == rounds,
            Budget::Time(time) => started.elapsed() > time,
        } {
            break;
        }
        dice.philox = Philox::new(seed + round); // each round can be done again alone
        dice.count = 0;
        let which = dice.below(files.len());
        let mut bytes = whole[which].clone();
        damage(&mut bytes, &mut dice);
        let kind = dice.below(4);
        reseal(&mut bytes, kind);
        fs::write(&files[which], &bytes).unwrap();
        if let Err(error) = read() {
            refused += 1;
            let named = files.iter().any(|file| error.contains(file.parent().unwrap().to_str().unwrap()));
            assert!(named, "round {round}: {error}");
        }
        fs::write(&files[which], &whole[which]).unwrap();
    }
    assert!(refused > 0);
}

#[derive(Clone, Copy)]
enum Budget {
    Rounds(u64),
    Time(Duration),
}

/// Opens, reads every token and every document, verifies.
fn read_all(path: &Path) -> Result<(), String> {
    let read = || {
        let data = DataSet::open(path)?;
        let mut tokens = vec![0; data.tokens().min(1 << 20) as usize];
        data.read(0, &mut tokens)?;
        for n in 0..data.documents().min(500) {
            let document = data.document(n)?;
            if document.tokens.start < document.tokens.end {
                data.document_at(document.tokens.start)?;
            }
        }
        data.verify()?;
        let samples = Samples::open(data, 8, 1)?;
        samples.documents(0..4).try_for_each(|passage| passage.map(drop))
    };
    read().map_err(|error: dataloader::DataError| error.to_string())
}

fn nothing(_: &mut [u8], _: usize) {}

fn documents(n: u64) -> impl Iterator<Item = (u64, String)> {
    (1..=n).map(|i| (i, format!("Document {i} says: {}", "the river ran ".repeat(i as usize % 9))))
}

fn ours() -> (TempDir, PathBuf) {
    let scratch = tempfile::tempdir().unwrap();
    let folder = scratch.path().join("data");
    let mut writer = DataSetWriter::create(&folder, Tokenizer::Gpt2, 1 << 28).unwrap();
    documents(60).for_each(|(i, text)| writer.push(0, i, text.as_bytes()).unwrap());
    writer.finish(vec!["a.jsonl".into()]).unwrap();
    (scratch, folder)
}

fn shards(budget: Budget) {
    let (_scratch, folder) = ours();
    // Behind checksums made right again there is the damage itself: of the header, and of the index too.
    let reseal = |bytes: &mut [u8], kind: usize| {
        let index =
            |bytes: &[u8]| usize::try_from(u64::from_le_bytes(bytes[56..64].try_into().unwrap())).ok();
        if kind > 1
            && bytes.len() >= 256
            && let Some(sum) = index(bytes).and_then(|at| bytes.get(at..)).map(crc32fast::hash)
        {
            bytes[76..80].copy_from_slice(&sum.to_le_bytes());
        }
        if kind > 0 && bytes.len() >= 256 {
            let sum = crc32fast::hash(&bytes[..252]);
            bytes[252..256].copy_from_slice(&sum.to_le_bytes());
        }
    };
    let files = [folder.join("shard-00000.tokens")];
    try_all(1, budget, &files, reseal, || read_all(&folder));
}

fn manifests(budget: Budget) {
    let (_scratch, folder) = ours();
    try_all(2, budget, &[folder.join("manifest.json")], nothing, || read_all(&folder));
}

fn foreign(budget: Budget) {
    let (scratch, folder) = ours();
    let data = DataSet::open(&folder).unwrap();
    let path = |name: &str| scratch.path().join(name);
    for (format, name) in [(Format::LlmC, "l.bin"), (Format::NanoGpt, "n.bin"), (Format::Megatron, "m.bin")] {
        convert_to(&data, format, &path(name)).unwrap();
    }
    let files = [path("m.idx"), path("m.idx"), path("m.bin"), path("l.bin"), path("n.bin")];
    try_all(3, budget, &files, nothing, || {
        ["l.bin", "n.bin", "m.bin"].iter().try_for_each(|name| read_all(&path(name)))
    });
}

fn text(budget: Budget) {
    let scratch = tempfile::tempdir().unwrap();
    let path = |name: &str| scratch.path().join(name);
    let lines: String = documents(60)
        .map(|(i, text)| serde_json::json!({"id": i, "text": text}).to_string() + "\n")
        .collect();
    fs::write(path("a.jsonl"), &lines).unwrap();
    fs::write(path("b.jsonl.zst"), zstd::encode_all(lines.as_bytes(), 1).unwrap()).unwrap();
    fs::write(path("c.txt"), &lines).unwrap();
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    gzip.write_all(lines.as_bytes()).unwrap();
    fs::write(path("d.jsonl.gz"), gzip.finish().unwrap()).unwrap();
    fs::write(path("e.parquet"), include_bytes!("../../fuzz/seeds/parquet/snappy.parquet")).unwrap();
    let files = ["a.jsonl", "b.jsonl.zst", "c.txt", "d.jsonl.gz", "e.parquet"].map(path);
    try_all(4, budget, &files, nothing, || {
        let read = tokenize(&Inputs::new(&files), &Tokenizer::Bytes, 1, |_| Ok(()));
        read.map_err(|error| format!("{:#}", Told(&error)))
    });
}

/// An error with what caused it.
struct Told<'a>(&'a dyn std::error::Error);

impl std::fmt::Display for Told<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)?;
        self.0.source().map_or(Ok(()), |source| write!(f, ": {}", Told(source)))
    }
}

fn tokenizers(budget: Budget) {
    let scratch = tempfile::tempdir().unwrap();
    let file = scratch.path().join("a.jsonl");
    let lines: String =
        documents(60).map(|(_, text)| serde_json::json!({"text": text}).to_string() + "\n").collect();
    fs::write(&file, lines).unwrap();
    let inputs = Inputs::new(&[file]);
    let (tokenizer, _) = dataloader::train_tokenizer(&inputs, 280, 1).unwrap();
    let out = scratch.path().join("out");
    prepare(&inputs, &out, &PrepareOptions { tokenizer, val_fraction: 0.0, ..PrepareOptions::default() })
        .unwrap();
    let folder = out.join("train");
    try_all(5, budget, &[folder.join("tokenizer.tiktoken")], nothing, || read_all(&folder));
}

const SOME: Budget = Budget::Rounds(400);

#[test]
fn a_damaged_shard_is_read_or_refused() {
    shards(SOME);
}

#[test]
fn a_damaged_manifest_is_read_or_refused() {
    manifests(SOME);
}

#[test]
fn damaged_files_of_other_programs_are_read_or_refused() {
    foreign(SOME);
}

#[test]
fn damaged_text_is_read_or_refused() {
    text(SOME);
}

#[test]
fn a_damaged_tokenizer_is_read_or_refused() {
    tokenizers(SOME);
}

mod whole_table {
    use super::*;

    /// For as long as a reader is tried where there is time.
    fn long() -> Budget {
        let seconds = std::env::var("PHALANX_FUZZ_SECONDS").map_or(30, |seconds| seconds.parse().unwrap());
        Budget::Time(Duration::from_secs(seconds))
    }

    #[test]
    fn shards_and_manifests_stand_damage_for_minutes() {
        shards(long());
        manifests(long());
    }

    #[test]
    fn other_programs_files_stand_damage_for_minutes() {
        foreign(long());
    }

    #[test]
    fn text_and_tokenizers_stand_damage_for_minutes() {
        text(long());
        tokenizers(long());
    }
}
