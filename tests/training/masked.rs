//! A masked model, seen from outside: the same bits on any number of ranks and in every sharding mode, going on, what
//! it learns, what it is fine-tuned to, and what it refuses.

use crate::Bench;
use crate::left::assert_same;
use crate::support::{metrics, of_kind};

/// Rows of 32 tokens, of which about five are hidden: micro-batches of one, so that ranks differ in theirs.
const MASKED: &str =
    "--set model.objective=masked --set batch.micro_batch=1 --set batch.global_batch_tokens=256";

#[test]
fn one_two_and_four_ranks_give_the_same_bits_in_every_sharding_mode() {
    let bench = Bench::new("masked-ranks", 8);
    let dropout = format!("{MASKED} --set model.dropout=0.1");
    let one = bench.trained("one", 1, &dropout);
    let cases = [(2, "none"), (4, "parameters"), (2, "gradients")];
    for (ranks, shard) in cases {
        let more = format!("{dropout} --set parallel.shard={shard}");
        let many = bench.trained(&format!("on-{ranks}-{shard}"), ranks, &more);
        assert_same(&one, &many, 8);
        assert_eq!(one.of_evals("val_loss"), many.of_evals("val_loss"), "{ranks} ranks, {shard}");
    }
}

#[test]
fn a_masked_run_goes_on_on_more_ranks_and_with_recomputation_as_if_it_had_not_ended() {
    let bench = Bench::new("masked-resume", 8);
    let whole = bench.trained("whole", 1, MASKED);
    bench.trained(
        "parts",
        2,
        &format!("{MASKED} --set schedule.max_steps=4 --set schedule.decay_tokens=2048"),
    );
    let more = format!("{MASKED} --set schedule.decay_tokens=2048 --set parallel.recompute=full");
    assert_same(&whole, &bench.trained("parts", 1, &more), 8);
}

#[test]
fn the_loss_is_per_target_from_the_uniform_one_down_and_is_not_told_in_bits_per_byte() {
    let bench = Bench::new("masked-loss", 150);
    let left = bench.trained("run", 1, "--set model.objective=masked --set optim.lr=5e-3");
    // The tokenizer has 257 ids, and the mask is one more.
    let losses = left.of_steps("loss");
    assert!((losses[0] - 258f64.ln()).abs() < 0.2, "{}", losses[0]);
    let events = metrics(left.folder());
    let evals = of_kind(&events, "eval");
    let first = evals[0]["val_loss"].as_f64().unwrap();
    let last = evals[evals.len() - 1]["val_loss"].as_f64().unwrap();
    assert!((first - 258f64.ln()).abs() < 0.2 && last < 3.6, "{first} {last}");
    // About 15 % of the validation text, the same each time.
    assert_eq!(evals[0]["targets"], evals[evals.len() - 1]["targets"]);
    assert!(evals.iter().all(|eval| eval.get("bits_per_byte").is_none()), "{evals:?}");
    assert!(!left.folder().join("sample.txt").exists());
}

#[test]
fn what_does_not_go_with_the_objective_is_refused_with_its_key() {
    let bench = Bench::new("masked-refused", 2);
    let refused = |more: &str, told: &[&str]| {
        bench.train_alone("run", more).run().expect_code(2).expect_stderr(told);
    };
    refused(
        "--set model.objective=masked --set model.norm=pre --set model.attention=[\"dense\"]",
        &["model.norm: \"pre\" has no masked form", "model.attention: \"dense\" sees no later tokens"],
    );
    refused("--set model.attention=[\"bidirectional\"]", &["sees the tokens that it is asked to predict"]);
    refused(
        "--set model.objective=masked --set model.vocab_size=257",
        &["model.vocab_size = 257 has no room for the mask", "at least 258"],
    );
    refused("--set model.token_types=3", &["model.token_types: 3 is neither 0"]);
}
