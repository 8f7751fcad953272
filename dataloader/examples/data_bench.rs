//! How fast text becomes tokens and tokens become samples: a table, and `target/bench/data.json`.
//! `cargo run --release -p dataloader --example data_bench -- TEXT.jsonl [MB/S OF A REFERENCE]`; with the rate
//! of a reference tokeniser, measured beside, tokenising has a ratio.

use dataloader::{
    DataSet, Inputs, Mixture, Order, PrepareError, PrepareOptions, Samples, Tokenizer, prepare, tokenize,
};
use std::error::Error;
use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;

struct Case {
    name: String,
    value: f64,
    unit: &'static str,
    reference: Option<f64>,
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let text = PathBuf::from(arguments.next().ok_or("which text? (a .jsonl)")?);
    let reference: Option<f64> = arguments.next().map(|rate| rate.parse()).transpose()?;
    let mut cases = tokenising(&text, reference)?;
    cases.extend(orders());
    cases.extend(loading(&text)?);

    let mut out = std::io::stdout().lock();
    for Case { name, value, unit, reference } in &cases {
        let ratio = reference
            .map_or(String::new(), |reference| format!("  {:.2}x of {reference:.2}", value / reference));
        writeln!(out, "{name:<44} {value:>10.1} {unit}{ratio}")?;
    }
    let json = cases.iter().map(|case| {
        let ratio = case.reference.map(|reference| case.value / reference);
        serde_json::json!({
            "case": case.name, "value": case.value, "unit": case.unit, "reference": case.reference, "ratio": ratio
        })
    });
    std::fs::create_dir_all("target/bench")?;
    std::fs::write("target/bench/data.json", serde_json::to_string_pretty(&json.collect::<Vec<_>>())?)?;
    Ok(())
}

/// The best of three passes, after one that warms the pages.
fn tokenising(text: &PathBuf, reference: Option<f64>) -> Result<Vec<Case>, PrepareError> {
    let bytes = {
        let mut bytes = 0;
        tokenize(&Inputs::new(std::slice::from_ref(text)), &Tokenizer::Bytes, 2, |tokens| {
            bytes += tokens.len();
            Ok(())
        })?;
        bytes as f64
    };
    let mut cases = Vec::new();
    for threads in [1, 2] {
        let (mut best, mut count) = (f64::INFINITY, 0);
        for _ in 0..3 {
            let started = Instant::now();
            count = 0;
            tokenize(&Inputs::new(std::slice::from_ref(text)), &Tokenizer::Gpt2, threads, |tokens| {
                count += tokens.len();
                Ok(())
            })?;
            best = best.min(started.elapsed().as_secs_f64());
        }
        let name = format!("gpt2 tokens, {threads} threads ({count} tokens)");
        let reference = reference.filter(|_| threads == 2);
        cases.push(Case { name, value: bytes / best / 1e6, unit: "MB/s", reference });
    }
    Ok(cases)
}

/// Pair by pair, as batches look them up.
fn orders() -> [Case; 3] {
    const N: u64 = 2_000_000;
    let order = Order::new([1; 32], 1024, 9_765_625, 1337);
    let started = Instant::now();
    let sum = (0..N).fold(0u64, |sum, i| sum.wrapping_add(order.sequence(i * 7919)));
    let single = started.elapsed().as_secs_f64() / N as f64 * 1e9;
    let started = Instant::now();
    let sum = (0..N).step_by(2).fold(sum, |sum, i| {
        let [a, b] = Order::sequences([(&order, i * 7919), (&order, (i + 1) * 7919)]);
        sum.wrapping_add(a ^ b)
    });
    let alone = started.elapsed().as_secs_f64() / N as f64 * 1e9;
    let mixture = Mixture::new(&[60.0, 22.0, 8.0, 8.0, 3.0]);
    let started = Instant::now();
    let mixed = (0..N).step_by(2).fold(sum, |sum, i| {
        let [(source, a), (other, b)] = [i, i + 1].map(|i| mixture.at(i * 7919));
        let [a, b] = Order::sequences([(&order, a), (&order, b)]);
        sum.wrapping_add((source + other) as u64 + (a ^ b))
    });
    let mixture = started.elapsed().as_secs_f64() / N as f64 * 1e9;
    std::hint::black_box(mixed);
    let case = |name: &str, value| Case { name: name.into(), value, unit: "ns a sample", reference: None };
    [
        case("order, one source", alone),
        case("order, GPT-3's five sources", mixture),
        case("order, a single sample", single),
    ]
}

/// Batches of 8 samples of 1024 tokens, from warm pages, on one thread.
fn loading(text: &PathBuf) -> Result<[Case; 1], Box<dyn Error>> {
    let out = std::env::temp_dir().join(format!("phalanx-data-bench-{}", std::process::id()));
    let options =
        PrepareOptions { tokenizer: Tokenizer::Gpt2, val_fraction: 0.0, ..PrepareOptions::default() };
    prepare(&Inputs::new(std::slice::from_ref(text)), &out, &options)?;
    let samples = Samples::open(DataSet::open(&out.join("train"))?, 1024, 1337)?;
    let n = samples.n_sequences();
    let mut best = f64::INFINITY;
    for _ in 0..3 {
        let started = Instant::now();
        for first in (0..n.saturating_sub(8)).step_by(8) {
            std::hint::black_box(samples.batch(first..first + 8)?);
        }
        best = best.min(started.elapsed().as_secs_f64());
    }
    std::fs::remove_dir_all(&out)?;
    let value = (n * 1024) as f64 / best / 1e6;
    Ok([Case { name: "loading, one thread, warm".into(), value, unit: "million tokens/s", reference: None }])
}
