//! Runs over a mixture of our own data and the files of three other programs: the same on any number of ranks,
//! after a restart on others exactly the rest, and `phalanx data which` knows what they saw.

use crate::Bench;
use crate::left::{Left, assert_same};
use crate::support::{Command, phalanx, steps};
use std::ops::Range;

const STEPS: u64 = 8;
const SAMPLES_PER_STEP: u64 = 16;
const WEIGHTS: [f64; 4] = [60.0, 22.0, 11.0, 8.0]; // the sum is 101, as GPT-3's

fn data(bench: &Bench, arguments: &str) -> String {
    let command = Command::new(phalanx()).args(["data"]).args(arguments.split(' '));
    command.current_dir(bench.scratch.path()).run().expect_code(0).stdout
}

/// A tiny run on GPT-2's tokens, from four sources.
fn bench(name: &str) -> Bench {
    let bench = Bench::new(name, STEPS);
    data(&bench, "prepare corpus.txt --tokenizer gpt2 --out gpt2");
    data(&bench, "convert gpt2/train --to llm-c --out l.bin");
    data(&bench, "convert gpt2/train --to nanogpt --out n.bin");
    data(&bench, "convert gpt2/train --to megatron --out m.bin");
    let source = |(path, weight)| format!("[[data.source]]\npath = \"{path}\"\nweight = {weight}\n");
    let sources: String =
        ["gpt2/train", "l.bin", "n.bin", "m"].into_iter().zip(WEIGHTS).map(source).collect();
    let config = std::fs::read_to_string(bench.scratch.join("tiny.toml")).unwrap();
    let config = config.replace("train = \"data/train\"\n", "").replace("data/val", "gpt2/val");
    bench.scratch.write("tiny.toml", config.replace("[batch]", &format!("{sources}[batch]")));
    bench
}

/// The samples of each step on all ranks together, sorted.
fn samples(left: &Left, ranks: usize) -> Vec<(u64, Vec<u64>)> {
    let sorted = |ranges: Vec<Range<u64>>| {
        let mut samples: Vec<u64> = ranges.into_iter().flatten().collect();
        samples.sort_unstable();
        samples
    };
    left.samples_of_the_last_start(ranks).into_iter().map(|(step, ranges)| (step, sorted(ranges))).collect()
}

/// What steps see that leave nothing out and see nothing twice.
fn expected(steps: Range<u64>) -> Vec<(u64, Vec<u64>)> {
    steps.map(|step| (step, ((step - 1) * SAMPLES_PER_STEP..step * SAMPLES_PER_STEP).collect())).collect()
}

mod whole_table {
    use super::*;

    #[test]
    fn a_mixture_of_four_kinds_of_files_is_the_same_on_any_ranks_and_goes_on_with_exactly_the_rest() {
        let bench = bench("mixture");
        let one = bench.trained("one", 1, "");
        assert_eq!(samples(&one, 1), expected(1..STEPS + 1));
        for ranks in [2, 4] {
            let more = bench.trained(&format!("on-{ranks}"), ranks, "");
            assert_same(&one, &more, STEPS);
            assert_eq!(samples(&more, ranks), expected(1..STEPS + 1), "{ranks} ranks");
        }

        // Three steps on four ranks, and the rest on others.
        let decay = "--set schedule.decay_tokens=4096";
        bench.trained("stopped", 4, &format!("--set schedule.max_steps=3 {decay}"));
        for ranks in [1, 2] {
            let run = format!("rest-{ranks}");
            bench.copy_run("stopped", &run);
            let rest = bench.trained(&run, ranks, decay);
            assert_eq!(samples(&rest, ranks), expected(4..STEPS + 1), "{ranks} ranks");
            assert_same(&one, &rest, STEPS);
        }

        which_agrees(&bench);
        shares_are_the_weights(&one);

        let config = std::fs::read_to_string(bench.scratch.join("tiny.toml")).unwrap();
        bench.scratch.write("tiny.toml", config.replace("weight = 60", "weight = 61"));
        let other = bench.train("one", 1, "--set schedule.max_steps=9").run().expect_code(2);
        other.expect_stderr(&["data.source has the digest "]);
    }

    /// Each sample of each step, all of its tokens, from sources in the weights' shares.
    fn which_agrees(bench: &Bench) {
        let mut of_source = std::collections::BTreeMap::<String, usize>::new();
        for (step, expected) in expected(1..STEPS + 1) {
            let told = data(bench, &format!("which runs/rest-2 --step {step} --json"));
            let passages: Vec<serde_json::Value> =
                told.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
            for sample in &expected {
                let of_sample = passages.iter().filter(|passage| passage["sample"] == *sample);
                let tokens: u64 = of_sample
                    .clone()
                    .map(|passage| {
                        passage["end_token"].as_u64().unwrap() - passage["first_token"].as_u64().unwrap()
                    })
                    .sum();
                assert_eq!(tokens, 33, "step {step}, sample {sample}");
                let sources: Vec<&str> =
                    of_sample.map(|passage| passage["source"].as_str().unwrap()).collect();
                assert!(sources.iter().all(|source| *source == sources[0]), "{sources:?}");
                *of_source.entry(sources[0].to_string()).or_default() += 1;
            }
            let all = passages.iter().all(|passage| expected.contains(&passage["sample"].as_u64().unwrap()));
            assert!(all, "step {step}: {told}");
        }
        let samples = (STEPS * SAMPLES_PER_STEP) as f64;
        let sum: f64 = WEIGHTS.iter().sum();
        for (source, weight) in ["gpt2/train", "l.bin", "n.bin", "m"].into_iter().zip(WEIGHTS) {
            let (_, seen) = of_source.iter().find(|(path, _)| path.ends_with(source)).unwrap();
            assert!((*seen as f64 - samples * weight / sum).abs() < 2.0, "{of_source:?}");
        }
    }

    fn shares_are_the_weights(left: &Left) {
        let last = steps(left.folder()).pop().unwrap();
        let epochs: Vec<f64> =
            last["epochs"].as_array().unwrap().iter().map(|epochs| epochs.as_f64().unwrap()).collect();
        let (seen, sum): (f64, f64) = (epochs.iter().sum(), WEIGHTS.iter().sum());
        for (epochs, weight) in epochs.iter().zip(WEIGHTS) {
            assert!((epochs / seen - weight / sum).abs() < 0.02, "{epochs:?}"); // all are equally long
        }
    }
}
