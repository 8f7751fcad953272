//! What is refused before a rank starts, and how it is said.

use super::{Bench, install};
use crate::support::{Command, Scratch, phalanx, tiny_run};

/// A rank that must not run.
const NEVER: &str = "touch started; exit 1";

fn refused(bench: &Bench, arguments: &str, told: &[&str]) {
    bench.train(arguments).run().expect_code(2).expect_stderr(told);
    assert!(!bench.scratch.join("started").exists(), "{arguments}: a rank was started");
}

#[test]
fn an_unknown_key_is_told_with_a_suggestion() {
    let bench = Bench::new("key", NEVER);
    refused(&bench, "--set model.n_layers=3", &["--set model.n_layers=3", "did you mean n_layer?"]);
    let config = std::fs::read_to_string(bench.scratch.join("tiny.toml")).unwrap();
    bench.scratch.write("tiny.toml", config.replace("n_embd", "n_emb"));
    refused(&bench, "", &["tiny.toml:5: unknown key model.n_emb; did you mean n_embd?"]);
}

#[test]
fn a_batch_that_does_not_divide_names_the_two_that_do() {
    let bench = Bench::new("batch", NEVER);
    refused(&bench, "--set batch.global_batch_tokens=500", &["448 and 512 work"]);
    refused(&bench, "-n 3 --oversubscribe", &["3 ranks", "384 and 576 work"]);
}

#[test]
fn missing_data_is_told_under_its_key() {
    let bench = Bench::new("data", NEVER);
    refused(&bench, "--set data.train=nowhere", &["data.train", "nowhere: no data set here"]);
    refused(&bench, "--set data.val=nowhere", &["data.val", "phalanx data prepare"]);
}

#[test]
fn damaged_data_is_told_once_and_not_by_every_rank() {
    let bench = Bench::new("damage", NEVER);
    let shard = bench.scratch.join("data/train/shard-00000.tokens");
    let bytes = std::fs::read(&shard).unwrap();
    std::fs::write(&shard, &bytes[..bytes.len() - 100]).unwrap();
    refused(&bench, "-n 2", &["shard-00000.tokens: truncated"]);
}

#[test]
fn more_ranks_than_slots_are_refused_with_both_ways_out() {
    let bench = Bench::new("slots", NEVER);
    let ways_out = ["4 ranks", "2 slots", "--hostfile", "--oversubscribe"];
    refused(&bench, "-n 4 --hosts localhost:2", &ways_out);
    bench.scratch.write("hosts", "localhost slots=2 # only\n");
    refused(&bench, "-n 4 --hostfile hosts", &ways_out);
    bench.train("-n 4 --hosts localhost:2 --oversubscribe --dry-run").run().expect_code(0);
}

#[test]
fn hosts_that_do_not_parse_are_told_with_their_place() {
    let bench = Bench::new("hosts", NEVER);
    refused(&bench, "--hosts a:many", &["--hosts a:many", "hint: write --hosts a:4,b:4"]);
    bench.scratch.write("hosts", "a slots=2\nb sluts=2\n");
    refused(&bench, "--hostfile hosts", &["hosts:2: \"sluts=2\" means nothing here"]);
    refused(&bench, "-n 0", &["at least one rank"]);
    refused(&bench, "--mca btl", &["--mca btl: expected key=value"]);
}

#[test]
fn a_missing_phalanx_rank_is_told_with_the_place_where_it_belongs() {
    let scratch = Scratch::new("alone");
    let config = tiny_run(&scratch, 10);
    let place = scratch.join("bin/phalanx-rank").display().to_string();
    Command::new(install(&scratch))
        .args(["train".as_ref(), config.as_os_str()])
        .current_dir(scratch.path())
        .run()
        .expect_code(2)
        .expect_stderr(&[&place, "is not there", "hint:"]);
}

#[test]
fn a_missing_mpirun_is_told_with_what_to_install() {
    let bench = Bench::new("no-mpirun", NEVER);
    let told = ["mpirun was not found", "apt-get install openmpi-bin"];
    bench.train("-n 2").env("PATH", bench.scratch.path()).run().expect_code(2).expect_stderr(&told);
}

#[test]
fn the_launcher_links_neither_torch_nor_mpi() {
    let linked = Command::new("ldd").args([phalanx()]).run().expect_code(0).stdout;
    for library in ["torch", "libc10", "libmpi", "libopen-pal"] {
        assert!(!linked.contains(library), "{linked}");
    }
}
