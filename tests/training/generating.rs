//! What a run has learnt to write, asked for from outside: `phalanx generate`.

use crate::Bench;
use crate::support::{Command, phalanx};

impl Bench {
    /// `phalanx generate runs/tiny`; arguments are split at spaces.
    fn generate(&self, arguments: &str) -> Command {
        let first = ["generate", "runs/tiny"];
        Command::new(phalanx())
            .args(first)
            .args(arguments.split_whitespace())
            .current_dir(self.scratch.path())
    }
}

#[test]
fn a_run_writes_the_same_text_for_the_same_seed_alone_and_among_others() {
    let bench = Bench::new("writes", 30);
    bench.train_alone("tiny", "--set optim.lr=1e-2").run().expect_code(0);
    let text = |arguments: &str| {
        let done = bench.generate(arguments).run().expect_code(0);
        done.expect_stderr(&["40 tokens in", "tokens/s"]).stdout
    };
    let one = text("--prompt the --max-tokens 40 --ignore-end --seed 3");
    assert_eq!(one.trim_end_matches('\n').len(), 40, "{one:?}");
    assert_eq!(one, text("--prompt the --max-tokens 40 --ignore-end --seed 3"));

    bench.scratch.write("prompts.jsonl", "{\"prompt\": \"the\"}\n{\"text\": \"a river ran\"}\n");
    let lines = "--prompts prompts.jsonl --samples 2 --max-tokens 40 --ignore-end --seed 3";
    let three = bench.generate(&format!("{lines} --batch 3")).run().expect_code(0).stdout;
    assert_eq!(three, bench.generate(&format!("{lines} --batch 1")).run().expect_code(0).stdout);
    let first: serde_json::Value = serde_json::from_str(three.lines().next().unwrap()).unwrap();
    assert_eq!(first["text"].as_str().unwrap(), one.trim_end_matches('\n'));
    assert_eq!(three.lines().count(), 4);
}

#[test]
fn what_cannot_be_written_is_refused_with_a_way_out() {
    let bench = Bench::new("unwritten", 1);
    bench.generate("").run().expect_code(2).expect_stderr(&["runs/tiny is no run", "hint:"]);
    bench.train_alone("tiny", "").run().expect_code(0);
    for (arguments, what) in [
        ("--prompt a --top-p 0", "--top-p 0, expected above 0"),
        ("--prompt-ids 1,300", "token id 300 in a prompt; the model has ids 0 to 256"),
        ("--prompt a --dtype int8", "int8"),
    ] {
        bench.generate(arguments).run().expect_code(2).expect_stderr(&[what]);
    }
}
