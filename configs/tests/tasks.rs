//! Task files: what follows from a good one, and what is said of a bad one.
#![allow(clippy::unwrap_used)] // unwrap is how a test fails

use configs::{Metric, ModelConfig, TaskFile, TaskKind};

const SPAM: &str = r#"[data]
train = "spam/train.jsonl"
[task]
kind = "classification"
labels = ["ham", "spam"]
"#;

fn load(text: &str, sets: &[&str]) -> Result<TaskFile, String> {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("spam.toml");
    std::fs::write(&file, text).unwrap();
    let sets: Vec<String> = sets.iter().map(ToString::to_string).collect();
    configs::load_task(&file, &sets).map_err(|error| error.to_string())
}

fn refusal(text: &str, sets: &[&str]) -> String {
    load(text, sets).unwrap_err()
}

#[test]
fn a_plain_task_has_the_papers_values() {
    let file = load(SPAM, &[]).unwrap();
    let task = &file.task;
    assert_eq!(
        (task.kind, task.lambda, task.epochs, task.batch_examples),
        (TaskKind::Classification, 0.5, 3, 32)
    );
    assert_eq!((&task.fields[..], &task.metrics[..]), (&["text".to_string()][..], &[Metric::Accuracy][..]));
    assert_eq!((file.micro_batch, file.micro_batches()), (8, 4));
    let base = ModelConfig { seq_len: 64, vocab_size: 257, ..ModelConfig::default() };
    let run = file.run_config(&base, 1000, "step 7".into());
    assert_eq!((run.model.vocab_size, run.model.dropout, run.optim.lr), (260, 0.1, 6.25e-5));
    assert_eq!(run.max_steps(), 94); // 3 x 1000 / 32
    // Up over 0.2 % of the updates, which is within the first, and down in a straight line.
    assert!((run.lr(0) / 6.25e-5 - 93.0 / 94.0).abs() < 0.003);
    assert!((run.lr(46) / 6.25e-5 - 0.5).abs() < 0.003);
    assert_eq!(run.lr(93), 0.0);
    assert_eq!(configs::parse(&run.to_toml()).unwrap(), run);
}

#[test]
fn what_is_wrong_is_told_with_its_line_and_key_and_all_at_once() {
    let text = SPAM
        .replace("\"classification\"", "\"entailment\"")
        .replace("[\"ham\", \"spam\"]", "[\"one\"]\nepochs = 0");
    let told = refusal(&format!("{text}fields = [\"text\"]\nmetrics = [\"pearson\"]\n"), &[]);
    for what in [
        "spam.toml:5: task.labels: got 1, expected all classes",
        "spam.toml:6: task.epochs: must be at least 1",
        "spam.toml:7: task.fields: got 1, expected two",
        "spam.toml:8: task.metrics: pearson compares numbers",
    ] {
        assert!(told.contains(what), "no {what:?} in: {told}");
    }
    let told = refusal(&SPAM.replace("kind", "kidn"), &[]);
    assert!(told.contains("spam.toml:4: unknown key task.kidn; did you mean kind?"), "{told}");
    let told = refusal(&SPAM.replace("classification", "regression"), &[]);
    assert!(told.contains("spam.toml:4:") && told.contains("multiple_choice"), "{told}");
    let told = refusal("[task]\nlambda = -1\nlabels = [\"a\", \"a\"]\n", &[]);
    for what in [
        "data.train: is missing",
        "task.kind: is missing",
        ":2: task.lambda: must not",
        "\"a\" is there twice",
    ] {
        assert!(told.contains(what), "no {what:?} in: {told}");
    }
}

#[test]
fn a_task_has_no_key_of_the_model_and_a_run_none_of_a_task() {
    let told = refusal(
        &format!("{SPAM}[model]\nn_layer = 3\n"),
        &["schedule.max_steps=3", "guard.spike_factor=2.0"],
    );
    for what in
        ["spam.toml:6: model: comes from the checkpoint", "schedule: of a task", "guard.spike_factor: a task"]
    {
        assert!(told.contains(what), "no {what:?} in: {told}");
    }
    let demo = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("demo.toml");
    let told = configs::load(&demo, &["task.epochs=3".into()], &|_| Ok(257)).unwrap_err().to_string();
    assert!(told.contains("task: is for `phalanx finetune`"), "{told}");
}

#[test]
fn a_batch_is_cut_into_a_power_of_two_of_parts() {
    let cut = |batch: u64| load(SPAM, &[&format!("task.batch_examples={batch}")]).unwrap().micro_batch;
    assert_eq!([1, 7, 12, 32, 64].map(cut), [1, 7, 6, 8, 8]);
    let told = refusal(SPAM, &["task.batch_examples=24", "task.micro_batch=8"]);
    assert!(told.contains("3 micro-batches a step"), "{told}");
    let told = refusal(SPAM, &["task.micro_batch=5"]);
    assert!(told.contains("5 does not divide task.batch_examples = 32"), "{told}");
    assert!(
        load(SPAM, &["task.batch_examples=24", "task.micro_batch=8", "parallel.reproducible=false"]).is_ok()
    );
}

#[test]
fn similarity_has_numbers_unless_it_has_labels() {
    let numbers = load("[data]\ntrain = \"a.csv\"\n[task]\nkind = \"similarity\"\n", &[]).unwrap().task;
    assert!(numbers.is_of_numbers());
    assert_eq!((&numbers.metrics[..], numbers.outputs()), (&[Metric::Pearson][..], 1));
    let set = "task.labels=[\"other\", \"same\"]";
    let classes = load("[data]\ntrain = \"a.csv\"\n[task]\nkind = \"similarity\"\n", &[set]).unwrap().task;
    assert_eq!((&classes.metrics[..], classes.outputs()), (&[Metric::Accuracy][..], 2));
}
