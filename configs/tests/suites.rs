//! Suite files: what follows from a good one, and what is said of a bad one.
#![allow(clippy::unwrap_used)] // unwrap is how a test fails

use configs::{Overlong, Suite, SuiteKind, load_suite};

const SUITE: &str = r#"[suite]
seed = 7

[[task]]
name = "words"
kind = "last_word"
data = "words.jsonl"
shots = [0, 4]

[[task]]
name = "text"
kind = "perplexity"
data = "text.jsonl"
stride = 32
"#;

fn load(text: &str) -> Result<Suite, String> {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("suite.toml");
    std::fs::write(&file, text).unwrap();
    load_suite(&file).map_err(|error| error.to_string())
}

#[test]
fn a_plain_suite_has_its_defaults() {
    let suite = load(SUITE).unwrap();
    assert_eq!((suite.seed, suite.batch_tokens, suite.tasks.len()), (7, 4096, 2));
    let [words, text] = &suite.tasks[..] else { panic!("two tasks") };
    assert_eq!(
        (words.kind, &words.shots[..], words.overlong),
        (SuiteKind::LastWord, &[0, 4][..], Overlong::Cut)
    );
    assert_eq!(words.prompt.fields().chain(words.answer.fields()).collect::<Vec<_>>(), ["context", "word"]);
    assert_eq!((text.kind, text.stride, text.text.as_str()), (SuiteKind::Perplexity, Some(32), "text"));
}

#[test]
fn an_unknown_key_is_told_with_its_line_and_what_may_have_been_meant() {
    let told = load(&SUITE.replace("stride", "strid").replace("seed", "sede")).unwrap_err();
    assert!(told.contains("suite.toml:2: unknown key suite.sede; did you mean seed?"), "{told}");
    assert!(told.contains("suite.toml:14: unknown key strid of [[task]]; did you mean stride?"), "{told}");
    let told = load(&SUITE.replace("[suite]", "[suit]")).unwrap_err();
    assert!(told.contains("suite.toml:1: unknown section suit; did you mean suite?"), "{told}");
    let told = load(&SUITE.replace("last_word", "first_word")).unwrap_err();
    assert!(told.contains("suite.toml:6") && told.contains("last_word"), "{told}");
    let told = load(&SUITE.replace("seed = 7", "seed = 7\n[task]\nname = \"x\"").replace("[[task]]", "[x]"));
    assert!(told.is_err());
}

#[test]
fn what_is_wrong_with_tasks_is_told_all_at_once_with_lines() {
    let text = SUITE
        .replace("name = \"text\"", "name = \"words\"\nshots = [1]")
        .replace("stride = 32", "stride = 0")
        .replace("[0, 4]", "[4, 0]");
    let told = load(&text).unwrap_err();
    for what in [
        "suite.toml:8: task.shots: expected numbers that rise",
        "suite.toml:11: task.name: \"words\" is the name of another task too",
        "suite.toml:12: task.shots: says nothing of a task of kind perplexity",
        "suite.toml:15: task.stride: must be at least 1",
    ] {
        assert!(told.contains(what), "no {what:?} in: {told}");
    }
    let choice =
        "[[task]]\nname = \"c\"\nkind = \"multiple_choice\"\nlabels = [\"a\"]\nanswer = \" {word\"\n";
    assert!(load(choice).unwrap_err().contains("suite.toml:5"), "{choice}");
    let told = load(&choice.replace("{word", "word")).unwrap_err();
    for what in
        ["task.data: is missing", "suite.toml:4: task.labels: got 1", "suite.toml:5: task.answer: {choice}"]
    {
        assert!(told.contains(what), "no {what:?} in: {told}");
    }
    assert!(load("").unwrap_err().contains("there is no [[task]] in it"));
}
