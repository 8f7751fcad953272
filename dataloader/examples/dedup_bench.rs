//! What finding near duplicates costs a document, from 10^4 to 10^6 documents of eighty words, one in ten of which
//! is a copy of an earlier one with a word changed: a table, and `target/bench/dedup.json`.
//! `cargo run --release -p dataloader --example dedup_bench [LARGEST]`.

use configs::Philox;
use dataloader::{Curation, DedupOptions, Inputs, curate};
use std::error::Error;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;
use std::time::Instant;

const WORDS: usize = 80;

fn main() -> Result<(), Box<dyn Error>> {
    let largest: u64 = std::env::args().nth(1).map_or(Ok(1_000_000), |largest| largest.parse())?;
    let scratch = std::env::temp_dir().join(format!("phalanx-dedup-bench-{}", std::process::id()));
    fs::create_dir_all(&scratch)?;
    let mut cases = Vec::new();
    let mut out = std::io::stdout().lock();
    for n in [10_000, 100_000, 1_000_000].into_iter().filter(|&n| n <= largest) {
        let (text, kept) = (scratch.join("text.jsonl"), scratch.join("kept.jsonl"));
        write(&text, n)?;
        let near = DedupOptions { by: None, exact: true, near: Some(0.8) };
        let curation = Curation { dedup: Some(near), ..Curation::default() };
        let started = Instant::now();
        let report = curate(&Inputs::new(&[text]), &curation, &kept, 2)?;
        let cost = started.elapsed().as_secs_f64() / n as f64 * 1e6;
        let (dropped, memory) = (report.read - report.kept, peak_megabytes()?);
        writeln!(
            out,
            "{n:>8} documents, {dropped:>6} dropped {cost:>6.1} us a document, {memory:>4.0} MB at most"
        )?;
        for (what, value, unit) in [("cost", cost, "us a document"), ("memory", memory, "MB")] {
            cases.push(serde_json::json!({ "case": format!("dedup {n} documents, {what}"), "value": value, "unit": unit, "reference": null, "ratio": null }));
        }
    }
    fs::remove_dir_all(&scratch)?;
    fs::create_dir_all("target/bench")?;
    fs::write("target/bench/dedup.json", serde_json::to_string_pretty(&cases)?)?;
    Ok(())
}

/// Every tenth document is the one nine before it, but for a word in the middle.
fn write(file: &Path, n: u64) -> std::io::Result<()> {
    let dice = Philox::new(7);
    let mut out = BufWriter::with_capacity(1 << 20, File::create(file)?);
    for document in 0..n {
        let copy = document % 10 == 9;
        let text = if copy { document - 9 } else { document };
        write!(out, "{{\"text\": \"")?;
        for word in 0..WORDS {
            let changed = u32::from(copy && word == WORDS / 2);
            let number = dice.at([text as u32, word as u32, changed, 0])[0] % 20_000;
            write!(out, "word{number} ")?;
        }
        writeln!(out, "\"}}")?;
    }
    out.flush()
}

/// The most memory that this process has had resident; pages of files that it looked at are counted in.
fn peak_megabytes() -> Result<f64, Box<dyn Error>> {
    let status = fs::read_to_string("/proc/self/status")?;
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).ok_or("no VmHWM")?;
    Ok(peak.trim().trim_end_matches(" kB").parse::<f64>()? / 1024.0)
}
