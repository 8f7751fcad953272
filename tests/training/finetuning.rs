//! Fine-tuning, seen from outside: the four kinds of task on made-up data with a rule in it, going on after a
//! kill, the same bits on any number of ranks, predictions, and what is refused.

use crate::Bench;
use crate::left::{Left, assert_same};
use crate::support::{Command, of_kind, phalanx};
use std::fmt::Write;

const WORDS: [&str; 4] = ["king", "river", "stone", "ships"];

/// `n` examples, each made from two numbers below four.
fn rows(n: usize, seed: u64, row: impl Fn(usize, usize) -> String) -> String {
    let mut state = seed;
    let mut draw = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 62) as usize
    };
    let mut text = String::new();
    for _ in 0..n {
        let (a, b) = (draw(), draw());
        writeln!(text, "{}", row(a, b)).unwrap();
    }
    text
}

impl Bench {
    /// A trained base `runs/base`, and a task file `NAME.toml` with made-up examples of this kind.
    fn with_task(name: &str, kind: &str, more: &str, row: impl Fn(usize, usize) -> String) -> Bench {
        let bench = Bench::new(name, 10);
        bench.trained("base", 1, "");
        bench.task(kind, more, row);
        bench
    }

    fn task(&self, kind: &str, more: &str, row: impl Fn(usize, usize) -> String) {
        self.scratch.write(&format!("{kind}.train.jsonl"), rows(160, 1, &row));
        self.scratch.write(&format!("{kind}.val.jsonl"), rows(64, 2, &row));
        let text = format!(
            "[data]\ntrain = \"{kind}.train.jsonl\"\nval = \"{kind}.val.jsonl\"\n[model]\ndropout = 0.0\n[optim]\n\
             lr = 5e-3\n[parallel]\ndevice = \"cpu\"\ndtype = \"fp32\"\n[task]\nkind = \"{kind}\"\nbatch_examples = 16\n\
             warmup_fraction = 0.1\n{more}\n"
        );
        self.scratch.write(&format!("{kind}.toml"), text);
    }

    fn finetune(&self, task: &str, run: &str, ranks: usize, arguments: &str) -> Command {
        let (file, ranks) = (format!("{task}.toml"), ranks.to_string());
        let launcher = ["finetune", &file, "--from", "runs/base", "--oversubscribe", "-n", &ranks];
        self.command(&phalanx(), &launcher, run, &format!("--max-restarts 0 {arguments}"))
    }

    #[track_caller]
    fn finetuned(&self, task: &str, run: &str, ranks: usize, arguments: &str) -> Left {
        self.finetune(task, run, ranks, arguments).run().expect_code(0);
        self.left(run)
    }
}

/// The last value of a metric.
fn score(left: &Left, name: &str) -> f64 {
    let events = crate::support::metrics(left.folder());
    of_kind(&events, "score").last().unwrap()[name].as_f64().unwrap()
}

fn classification(a: usize, b: usize) -> String {
    let label = if a < 2 { "lives" } else { "lies" };
    format!(r#"{{"text": "{} {}", "label": "{label}"}}"#, WORDS[a], WORDS[b])
}

const LABELS: &str = "labels = [\"lies\", \"lives\"]\nmetrics = [\"accuracy\", \"f1\", \"matthews\"]";

#[test]
fn a_class_is_learnt_and_predicted_from_the_runs_folder_alone() {
    let bench =
        Bench::with_task("classes", "classification", &format!("epochs = 4\n{LABELS}"), classification);
    let left = bench.finetuned("classification", "tuned", 1, "");
    let [accuracy, f1, matthews] = ["accuracy", "f1", "matthews"].map(|name| score(&left, name));
    assert!(accuracy > 0.9 && f1 > 0.9 && matthews > 0.8, "{accuracy} {f1} {matthews}");

    bench.scratch.write("new.csv", "text\nking stone\nships river\n");
    let predict = |arguments: &str| {
        let command = Command::new(phalanx()).args(["predict"]).args(arguments.split_whitespace());
        command.current_dir(bench.scratch.path()).run()
    };
    let said = predict("runs/tuned new.csv").expect_code(0).stdout;
    let said: Vec<serde_json::Value> = said.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!([&said[0]["label"], &said[1]["label"]], ["lives", "lies"]);
    assert!(said[0]["probabilities"]["lives"].as_f64().unwrap() > 0.5);
    predict("runs/tuned classification.val.jsonl --out said.jsonl")
        .expect_code(0)
        .expect_stderr(&["64 examples", "accuracy"]);
    assert_eq!(std::fs::read_to_string(bench.scratch.join("said.jsonl")).unwrap().lines().count(), 64);
    predict("runs/base new.csv").expect_code(2).expect_stderr(&["it is of no task", "phalanx finetune"]);
}

#[test]
fn a_masked_base_is_tuned_alike_on_one_and_two_ranks_predicts_and_does_not_write() {
    let bench = Bench::new("masked-task", 10);
    bench.trained("base", 1, "--set model.objective=masked");
    bench.task("classification", &format!("epochs = 6\n{LABELS}"), classification);
    let one = bench.finetuned("classification", "tuned", 1, "");
    assert!(score(&one, "accuracy") > 0.75, "{}", score(&one, "accuracy"));
    assert_same(&one, &bench.finetuned("classification", "on-2", 2, ""), 60);
    bench.scratch.write("new.csv", "text\nking stone\n");
    let ask = |arguments: &str| {
        let command = Command::new(phalanx()).args(arguments.split_whitespace());
        command.current_dir(bench.scratch.path()).run()
    };
    assert!(ask("predict runs/tuned new.csv").expect_code(0).stdout.contains("\"label\":\"l"));
    let told = ["model.objective = \"masked\"", "writes no next token", "hint:"];
    ask("generate runs/base --prompt the").expect_code(2).expect_stderr(&told);
}

#[test]
fn wrong_tasks_and_examples_are_refused_before_a_rank_starts() {
    let bench = Bench::new("wrong", 10);
    bench.task("classification", LABELS, classification);
    let refused = |arguments: &str, told: &[&str]| {
        bench.finetune("classification", "refused", 1, arguments).run().expect_code(2).expect_stderr(told);
        assert!(!bench.scratch.join("runs/refused").exists());
    };
    refused("--set task.kind=entailment", &["classification.val.jsonl:1: field \"premise\": is not there"]);
    refused("--set task.epochs=0", &["task.epochs: must be at least 1"]);
    refused("--set task.labels=[\"lies\",\"lies\"]", &["task.labels: \"lies\" is there twice"]);
    refused(
        "--set task.labels=[\"lies\",\"stands\"]",
        &["classification.val.jsonl:", "field \"label\": got \"lives\""],
    );
    refused(
        "--set task.fields=[\"body\"]",
        &["classification.val.jsonl:1: field \"body\": is not there; there are label, text"],
    );
    refused("--set data.train=none.jsonl", &["data.train: none.jsonl: cannot be read"]);
    let three = bench.finetune("classification", "refused", 3, "").run().expect_code(2);
    three.expect_stderr(&["3 ranks cannot share the 2 micro-batches", "task.micro_batch"]);
    let from_nothing = ["runs/none has no checkpoint to start from", "hint:"];
    let command =
        Command::new(phalanx()).args(["finetune", "classification.toml", "--from", "runs/none", "-n", "1"]);
    command.current_dir(bench.scratch.path()).run().expect_code(2).expect_stderr(&from_nothing);
}

/// What takes longer: a kill, and tasks in which the answer lies in two texts together.
mod whole_table {
    use super::*;

    #[test]
    fn a_killed_fine_tuning_goes_on_bit_for_bit_on_other_ranks() {
        let dropout = format!("epochs = 4\n{LABELS}");
        let bench = Bench::with_task("tuned", "classification", &dropout, classification);
        let arguments = "--set model.dropout=0.1 --set checkpoint.every_steps=10 --set task.micro_batch=4";
        let straight = bench.finetuned("classification", "straight", 2, arguments);
        let sharded = format!("{arguments} --set parallel.shard=parameters");
        assert_same(&straight, &bench.finetuned("classification", "sharded", 2, &sharded), 40);
        let mut job = bench.finetune("classification", "killed", 2, arguments).start();
        job.wait_for("checkpoint checkpoints/step-00000010 is complete", 1);
        job.signal_rank(1, "KILL");
        job.finish().expect_code(1);
        bench
            .finetune("classification", "killed", 1, arguments)
            .run()
            .expect_code(0)
            .expect_stderr(&["going on from runs/killed/checkpoints/step-000000"]);
        assert_same(&straight, &bench.left("killed"), 40);
        bench
            .finetune("classification", "killed", 1, arguments)
            .run()
            .expect_code(0)
            .expect_stderr(&["is finished"]);
        let other = format!("{arguments} --set task.lambda=0.25");
        let told = ["task.lambda is 0.25, the checkpoint was made with 0.5", "--fresh"];
        bench.finetune("classification", "killed", 1, &other).run().expect_code(2).expect_stderr(&told);
    }

    /// Entailment, similarity and multiple choice: what is alike, and what stands in both texts.
    fn two_texts(bench: &Bench, epochs: usize) {
        let same = |a: usize, b: usize| usize::from(a % 2 == b % 2);
        bench.task("entailment", &format!("epochs = {epochs}\nlabels = [\"no\", \"yes\"]"), |a, b| {
            let label = ["no", "yes"][same(a, b)];
            format!(r#"{{"premise": "{}", "hypothesis": "{}", "label": "{label}"}}"#, WORDS[a], WORDS[b])
        });
        let metrics = format!("epochs = {epochs}\nmetrics = [\"pearson\", \"spearman\"]");
        bench.task("similarity", &metrics, |a, b| {
            format!(r#"{{"first": "{}", "second": "{}", "label": {}}}"#, WORDS[a], WORDS[b], same(a, b))
        });
        bench.task("multiple_choice", &format!("epochs = {epochs}"), |a, b| {
            let (right, wrong) = (WORDS[a], WORDS[(a + 1) % 4]);
            let [first, second] = if b < 2 { [right, wrong] } else { [wrong, right] };
            let label = b / 2;
            format!(r#"{{"context": "{right}", "choices": ["{first}", "{second}"], "label": {label}}}"#)
        });
    }

    /// Each is learnt, and to the same bits on two ranks.
    fn all_are_learnt_alike(bench: &Bench, updates: u64) {
        for (kind, metric, above) in [
            ("entailment", "accuracy", 0.9),
            ("similarity", "pearson", 0.8),
            ("multiple_choice", "accuracy", 0.9),
        ] {
            let one = bench.finetuned(kind, &format!("{kind}-1"), 1, "");
            let two = bench.finetuned(kind, &format!("{kind}-2"), 2, "");
            assert!(score(&one, metric) > above, "{kind}: {}", score(&one, metric));
            assert_same(&one, &two, updates);
        }
    }

    #[test]
    fn entailment_similarity_and_multiple_choice_are_learnt_on_one_and_on_two_ranks_alike() {
        let bench = Bench::new("kinds", 10);
        bench.trained("base", 1, "");
        two_texts(&bench, 16);
        all_are_learnt_alike(&bench, 160);
    }

    #[test]
    fn a_masked_base_learns_entailment_similarity_and_multiple_choice_too() {
        let bench = Bench::new("masked-kinds", 10);
        bench.trained("base", 1, "--set model.objective=masked");
        two_texts(&bench, 16);
        all_are_learnt_alike(&bench, 160);
    }
}
