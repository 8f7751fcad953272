//! The smallest run that is still one: a text, data sets made from it, a configuration, and its
//! metrics read back.

use super::{Command, Scratch, phalanx};
use std::path::{Path, PathBuf};

/// Prepares `data/train` and `data/val` in the scratch folder and writes `tiny.toml`, all with paths
/// relative to it: 2 layers of 2 heads and 32 channels, 32 tokens, 8 micro-batches of 2 sequences a
/// step. The run folder is `runs/tiny`. Returns the configuration's name.
pub fn tiny_run(scratch: &Scratch, max_steps: u64) -> PathBuf {
    scratch.write("corpus.txt", corpus(40_000));
    Command::new(phalanx())
        .args(["data", "prepare", "corpus.txt", "--out", "data", "--val-fraction", "0.1"])
        .current_dir(scratch.path())
        .run()
        .expect_code(0);
    let config = format!(
        r#"
[model]
n_layer = 2
n_head = 2
n_embd = 32
seq_len = 32
[data]
train = "data/train"
val = "data/val"
[batch]
global_batch_tokens = 512
micro_batch = 2
[optim]
lr = 1e-3
[schedule]
max_steps = {max_steps}
[parallel]
device = "cpu"
dtype = "fp32"
"#
    );
    scratch.write("tiny.toml", config);
    "tiny.toml".into()
}

/// At least `bytes` bytes of sentences, the same each time.
pub fn corpus(bytes: usize) -> String {
    const WORDS: [&str; 16] = [
        "the", "king", "spoke", "and", "a", "river", "ran", "under", "old", "stones", "while", "seven",
        "ships", "came", "home", "slowly",
    ];
    let mut state = 1u64;
    let mut text = String::new();
    while text.len() < bytes {
        for place in 0..8 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            text.push_str(if place == 0 { "" } else { " " });
            text.push_str(WORDS[(state >> 60) as usize]);
        }
        text.push_str(".\n");
    }
    text
}

/// The events of a run, in the order in which they were written.
pub fn metrics(run_folder: &Path) -> Vec<serde_json::Value> {
    let file = run_folder.join("metrics.jsonl");
    let text = std::fs::read_to_string(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    let parse = |(i, line)| {
        serde_json::from_str(line).unwrap_or_else(|error| panic!("{}:{}: {error}", file.display(), i + 1))
    };
    text.lines().enumerate().map(parse).collect()
}

/// The events of one kind, such as "step".
pub fn of_kind<'a>(events: &'a [serde_json::Value], kind: &str) -> Vec<&'a serde_json::Value> {
    events.iter().filter(|event| event["kind"] == kind).collect()
}

/// The steps of a run from the first to the last, each as it was done last. Panics unless there are
/// `1..=n` of them, without a gap.
pub fn steps(run_folder: &Path) -> Vec<serde_json::Value> {
    let mut steps = std::collections::BTreeMap::new();
    for event in metrics(run_folder).into_iter().filter(|event| event["kind"] == "step") {
        steps.insert(event["step"].as_u64().expect("a step has a number"), event);
    }
    let expected = (1..=steps.len() as u64).collect::<Vec<u64>>();
    assert_eq!(steps.keys().copied().collect::<Vec<u64>>(), expected, "{}", run_folder.display());
    steps.into_values().collect()
}
