//! The result does not depend on how many ranks made it, nor on who started them.

use crate::left::{Left, assert_same};
use crate::support::steps;
use crate::{Bench, assert_close};

#[test]
fn one_two_and_four_ranks_give_the_same_bits() {
    same_on_every_number_of_ranks("[\"dense\"]");
}

#[test]
fn one_two_and_four_ranks_give_the_same_bits_with_alternating_layers() {
    same_on_every_number_of_ranks("[\"dense\",\"banded:8\"]");
}

#[test]
fn one_two_and_four_ranks_give_the_same_bits_with_sparse_layers_within_documents() {
    same_on_every_number_of_ranks("[\"strided:8\",\"fixed:8,2\"] --set data.document_mask=true");
}

fn same_on_every_number_of_ranks(attention: &str) {
    let bench = Bench::new("ranks", 50);
    let attention = format!("--set model.attention={attention}");
    let one = bench.trained("one", 1, &attention);
    assert_eq!(one.of_steps("loss").len(), 50);
    for ranks in [2, 4] {
        let many = bench.trained(&format!("on-{ranks}"), ranks, &attention);
        assert_same(&one, &many, 50);
        assert_eq!(one.of_evals("val_loss"), many.of_evals("val_loss"));
        all_ranks_agree(&many, ranks);
    }
}

#[test]
fn the_gradient_noise_scale_is_that_of_the_batch_however_ranks_share_it() {
    let bench = Bench::new("noise", 20);
    let one = noise_scales(&bench.trained("one", 1, ""));
    assert_eq!(one.len(), 20);
    assert!(one[..9].iter().all(Option::is_none), "{one:?}");
    // A batch of 512 tokens; in some of the first steps the estimate may be of no use.
    let known: Vec<f64> = one.iter().flatten().copied().collect();
    assert!(known.len() > 5 && known.iter().all(|tokens| (1.0..1e6).contains(tokens)), "{one:?}");
    for (run, ranks, shard) in [("two", 2, "none"), ("sharded", 2, "gradients"), ("four", 4, "parameters")] {
        let left = bench.trained(run, ranks, &format!("--set parallel.shard={shard}"));
        assert_eq!(noise_scales(&left), one, "{shard} on {ranks} ranks");
    }
    // Nothing to tell by where the batch is not divided.
    let whole = bench.trained("whole", 1, "--set batch.micro_batch=16");
    assert_eq!(noise_scales(&whole), [None; 20]);
}

fn noise_scales(left: &Left) -> Vec<Option<f64>> {
    steps(left.folder()).iter().map(|step| step.get("noise_scale_tokens").and_then(|n| n.as_f64())).collect()
}

#[test]
fn without_the_tree_ranks_agree_within_rounding() {
    let bench = Bench::new("rounding", 50);
    let one = bench.trained("one", 1, "--set parallel.reproducible=false");
    for ranks in [2, 4] {
        let many = bench.trained(&format!("on-{ranks}"), ranks, "--set parallel.reproducible=false");
        assert_close(&one.of_steps("loss"), &many.of_steps("loss"), 1e-5);
        all_ranks_agree(&many, ranks);
    }
}

#[track_caller]
fn all_ranks_agree(left: &Left, ranks: usize) {
    for rank in 1..ranks {
        assert_eq!(left.digest(rank), left.digest(0), "rank {rank} of {ranks} has other parameters");
    }
}

#[test]
fn mpirun_and_the_launcher_train_the_same_bits() {
    let bench = Bench::new("mpirun", 10);
    let launched = bench.trained("launched", 2, "");
    bench.train_under_mpirun("plain", 2, "").run().expect_code(0);
    assert_same(&launched, &bench.left("plain"), 10);
}

#[test]
fn one_rank_needs_no_mpirun() {
    let bench = Bench::new("alone", 10);
    let launched = bench.trained("launched", 1, "");
    bench.train_alone("alone", "").run().expect_code(0);
    assert_same(&launched, &bench.left("alone"), 10);
}

#[test]
fn validation_covers_each_token_once_on_any_number_of_ranks() {
    // A batch that three ranks can share too.
    let bench = Bench::new("validation", 1);
    let arguments = "--set batch.global_batch_tokens=384 --set parallel.reproducible=false";
    let one = bench.trained("one", 1, arguments);
    let manifest = std::fs::read_to_string(bench.scratch.join("data/val/manifest.json")).unwrap();
    let manifest: serde_json::Value = serde_json::from_str(&manifest).unwrap();
    let tokens = manifest["shards"][0]["tokens"].as_f64().unwrap();
    assert_eq!(one.of_evals("targets"), [tokens - 1.0; 2], "the first token is nobody's target");
    for ranks in [2, 3] {
        let many = bench.trained(&format!("on-{ranks}"), ranks, arguments);
        assert_eq!(many.of_evals("targets"), one.of_evals("targets"));
        assert_close(&one.of_evals("val_loss"), &many.of_evals("val_loss"), 1e-6);
    }
}
