//! What a run has learnt, measured from outside: `phalanx eval`.

use crate::Bench;
use crate::support::{Command, metrics, of_kind, phalanx};

const SUITE: &str = r#"[suite]
seed = 7
batch_tokens = 100

[[task]]
name = "text"
kind = "perplexity"
data = "text.jsonl"
stride = 8

[[task]]
name = "folder"
kind = "perplexity"
data = "data/val"
max_examples = 3

[[task]]
name = "words"
kind = "last_word"
data = "text.jsonl"
shots = [0, 1, 4]

[[task]]
name = "choice"
kind = "multiple_choice"
data = "choices.csv"
train = "text.jsonl.choices.csv"
prompt = "{question}"
choices = ["first", "second"]
shots = [0, 2]

[[task]]
name = "writes"
kind = "generate"
data = "choices.csv"
prompt = "{question}"
answer = " {first}"
max_tokens = 4
temperature = 0.7
"#;

impl Bench {
    fn with_suite(name: &str) -> Bench {
        let bench = Bench::new(name, 30);
        let texts = ["the king spoke", "a river ran under old stones", "seven ships came home slowly"];
        let rows: String =
            (0..21).map(|i| format!("{{\"text\": \"{}\"}}\n", &texts[i % 3][..14 - i % 2])).collect();
        bench.scratch.write("text.jsonl", rows);
        let rows: String = (0..13).map(|i| format!("the old {i},stones,came,{}\n", i % 2)).collect();
        for name in ["choices.csv", "text.jsonl.choices.csv"] {
            bench.scratch.write(name, format!("question,first,second,label\n{rows}"));
        }
        bench.scratch.write("suite.toml", SUITE);
        bench
    }

    /// `phalanx eval runs/tiny --suite suite.toml`; more arguments are split at spaces.
    fn eval(&self, arguments: &str) -> Command {
        Command::new(phalanx())
            .args(["eval", "runs/tiny", "--suite", "suite.toml"])
            .args(arguments.split_whitespace())
            .current_dir(self.scratch.path())
    }

    /// What was written, without how long it took.
    fn scores(&self, file: &str) -> serde_json::Value {
        let text = std::fs::read_to_string(self.scratch.join(file)).unwrap();
        let mut report: serde_json::Value = serde_json::from_str(&text).unwrap();
        for result in report["results"].as_array_mut().unwrap() {
            result.as_object_mut().unwrap().remove("seconds").unwrap();
        }
        report
    }
}

#[test]
fn a_suite_has_the_same_scores_on_one_and_on_two_ranks_and_of_a_run_and_its_checkpoint() {
    let bench = Bench::with_suite("evaluates");
    bench.train_alone("tiny", "--set optim.lr=1e-2").run().expect_code(0);
    let one = bench.eval("-n 1 --out one.json --plot curve.svg").run().expect_code(0).stdout;
    let two = bench.eval("-n 2 --oversubscribe --out two.json").run().expect_code(0).stdout;
    assert_eq!(one, two);
    assert_eq!(bench.scores("one.json"), bench.scores("two.json"));
    let results = bench.scores("one.json")["results"].as_array().unwrap().clone();
    let parts: Vec<(&str, u64)> = results
        .iter()
        .map(|part| (part["task"].as_str().unwrap(), part["shots"].as_u64().unwrap()))
        .collect();
    let expected = [
        ("text", 0),
        ("folder", 0),
        ("words", 0),
        ("words", 1),
        ("words", 4),
        ("choice", 0),
        ("choice", 2),
        ("writes", 0),
    ];
    assert_eq!(parts, expected);
    // 32 tokens hold one shot of 13 or 14 and a text, but not four.
    assert!(results[4]["shots_dropped"].as_u64().unwrap() > 0 && one.contains("shots left out"), "{one}");
    assert!(one.contains("bits_per_byte") && one.contains("accuracy_unconditional"), "{one}");
    let plot = std::fs::read_to_string(bench.scratch.join("curve.svg")).unwrap();
    assert!(plot.starts_with("<svg") && plot.contains("words accuracy"));
    let of_checkpoint = Command::new(phalanx())
        .args(["eval", "runs/tiny/checkpoints/step-00000030", "--suite", "suite.toml", "-n", "1"])
        .current_dir(bench.scratch.path())
        .run();
    assert_eq!(of_checkpoint.expect_code(0).stdout, one);
}

#[test]
fn a_run_is_measured_while_it_goes_on_with_the_same_scores_however_ranks_share_it() {
    let bench = Bench::with_suite("measures");
    let scores = |run: &str, ranks: usize, arguments: &str| -> Vec<serde_json::Value> {
        let suite = "--set eval.suite=suite.toml --set eval.suite_every_steps=2 --set schedule.max_steps=4";
        bench.trained(run, ranks, &format!("{suite} {arguments}"));
        let events = metrics(&bench.scratch.join("runs").join(run));
        let mut events: Vec<serde_json::Value> = of_kind(&events, "suite").into_iter().cloned().collect();
        events.iter_mut().for_each(|event| drop(event.as_object_mut().unwrap().remove("seconds").unwrap()));
        events
    };
    let one = scores("one", 1, "");
    assert_eq!(one.len(), 3 * 8); // before the first update, after two, and at the end
    assert_eq!((&one[8]["step"], &one[8]["task"]), (&2.into(), &"text".into()));
    assert!(one[16]["bits_per_byte"].as_f64().unwrap() < one[0]["bits_per_byte"].as_f64().unwrap());
    assert_eq!(one, scores("two", 2, "--set parallel.shard=parameters"));
    let told = ["eval.suite", "third"];
    bench.scratch.write("suite.toml", SUITE.replace("\"first\", \"second\"", "\"first\", \"third\""));
    bench.train("wrong", 1, "--set eval.suite=suite.toml").run().expect_code(2).expect_stderr(&told);
    assert!(!bench.scratch.join("runs/wrong").exists());
}

#[test]
fn what_cannot_be_measured_is_refused_with_its_place() {
    let bench = Bench::with_suite("unmeasured");
    let suite = |from: &str, to: &str| drop(bench.scratch.write("suite.toml", SUITE.replace(from, to)));
    bench.eval("-n 1").run().expect_code(2).expect_stderr(&["runs/tiny is no run"]);
    suite("stride", "strid");
    bench
        .eval("")
        .run()
        .expect_code(2)
        .expect_stderr(&["suite.toml:9: unknown key strid of [[task]]; did you mean stride?"]);
    suite("choices.csv\"\ntrain", "none.csv\"\ntrain");
    bench.eval("").run().expect_code(2).expect_stderr(&["task \"choice\": none.csv is not there"]);
    bench.train_alone("tiny", "--set schedule.max_steps=1").run().expect_code(0);
    suite("\"first\", \"second\"", "\"first\", \"third\"");
    let told = "choices.csv:2: field \"third\": is not there; there are first, label, question, second";
    bench.eval("-n 1").run().expect_code(2).expect_stderr(&[told]);
    let two = bench.eval("-n 2 --oversubscribe").run().expect_code(2).expect_stderr(&[told]);
    assert!(!two.stderr.contains("MPI_ABORT"), "{}", two.stderr);
    suite("", "");
    bench
        .eval("-n 1 --step 7")
        .run()
        .expect_code(2)
        .expect_stderr(&["runs/tiny has no checkpoint of step 7"]);
}
