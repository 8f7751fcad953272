//! What `phalanx plan` answers, and how it refuses.

use crate::support::{Command, phalanx};
use std::path::{Path, PathBuf};
use std::time::Instant;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn plan(arguments: &str) -> Command {
    Command::new(phalanx()).args(["plan"]).args(arguments.split_whitespace()).current_dir(root())
}

#[test]
fn gpt3_on_1024_gpus_is_planned_in_under_a_second() {
    let began = Instant::now();
    let ended = plan("configs/gpt3-175b.toml --ranks 1024 --price 2.5 --json").run();
    assert!(began.elapsed().as_secs_f64() < 1.0, "{:?}", began.elapsed());
    let plan: serde_json::Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!((plan["ranks"].as_u64(), plan["nodes"].as_u64()), (Some(1024), Some(128)));
    assert_eq!(plan["modes"][0]["fits"], true);
    assert!(plan["run"]["price"].as_f64().unwrap() > 0.0 && plan["best"]["mfu"].as_f64().unwrap() > 0.3);
    assert_eq!(plan["modes"].as_array().unwrap().len(), 7);
}

#[test]
fn a_plan_as_text_tells_what_fits_what_it_costs_and_where_it_ends() {
    let ended = plan("configs/gpt3-6.7b.toml --hosts a:8,b:8 --gpu a100-80 --link eth100").run();
    for part in [
        "on 16 x a100-80 in 2 nodes, eth100 between nodes",
        "data parallelism ends at 1,024 ranks",
        "memory ",
        "cheapest ",
        "checkpoint.every_steps = ",
        "bends ",
    ] {
        assert!(ended.stdout.contains(part), "no {part:?} in\n{}", ended.stdout);
    }
}

#[test]
fn ten_thousand_ranks_are_simulated_in_seconds_and_the_slow_one_is_named() {
    let began = Instant::now();
    let asked = "configs/gpt3-175b.toml --ranks 10000 --simulate 3 --jitter 0.02 --slow-rank 37:1.5 --seed 7";
    let ended = plan(asked).run().expect_code(0);
    assert!(began.elapsed().as_secs_f64() < 10.0, "{:?}", began.elapsed());
    assert!(ended.stdout.contains("rank 37 3 times"), "{}", ended.stdout);
    assert_eq!(plan(asked).run().stdout, ended.stdout, "the same seed gives the same course");
    let ended = plan("configs/gpt3-125m.toml --simulate 1 --slow-rank 37").run().expect_code(2);
    assert!(ended.stderr.contains("--slow-rank 37") && ended.stderr.contains("hint: "), "{}", ended.stderr);
}

#[test]
fn what_cannot_be_planned_is_refused_with_its_flag_and_a_hint() {
    for (arguments, told) in [
        ("--gpu b200", "--gpu b200"),
        ("--link nvlink9", "--link nvlink9"),
        ("--ranks 0", "--ranks 0"),
        ("--mtbf 0", "--mtbf 0"),
        ("--gpu measured --machine nowhere.toml", "nowhere.toml"),
        ("--hosts a:x", "no number of slots"),
    ] {
        let ended = plan(&format!("configs/gpt3-125m.toml {arguments}")).run();
        assert_eq!(ended.code, Some(2), "{arguments}: {}", ended.stderr);
        assert!(
            ended.stderr.contains(told) && ended.stderr.contains("hint: "),
            "{arguments}: {}",
            ended.stderr
        );
    }
    let ended = plan("configs/gpt3-125m.toml --set batch.micro_bacth=2").run();
    assert!(ended.code == Some(2) && ended.stderr.contains("did you mean micro_batch?"), "{}", ended.stderr);
}

#[test]
fn the_table_of_published_runs_in_the_documentation_is_what_the_command_prints() {
    let text = std::fs::read_to_string(root().join("docs/PLANNING.md")).unwrap();
    let table = plan("--published").run().stdout;
    assert!(text.contains(&table), "docs/PLANNING.md should have\n{table}");
}
