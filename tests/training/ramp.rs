//! Batches that grow: which samples a step has, on any ranks, through a stop and on more ranks after it.

use crate::Bench;
use crate::left::assert_same;

/// Batches of 4, 8 and 16 sequences of 32 tokens. The line from 128 to 512 tokens over 3000 reaches 256 at
/// 1000 tokens and 512 at 3000.
const RAMP: &str = "--set batch.ramp_start_tokens=128 --set batch.ramp_tokens=3000";

/// Tokens seen after each of the first `steps` steps, by walking.
fn walked(steps: usize) -> Vec<f64> {
    let mut seen = 0;
    let walk = (0..steps).map(|_| {
        seen += match seen {
            0..1000 => 128,
            1000..3000 => 256,
            _ => 512,
        };
        seen as f64
    });
    walk.collect()
}

#[test]
fn a_growing_batch_takes_the_samples_in_order_and_has_the_same_bits_on_any_ranks_in_any_mode() {
    let bench = Bench::new("ramp", 30);
    let one = bench.trained("one", 1, RAMP);
    let tokens = walked(30);
    assert_eq!(one.of_steps("tokens"), tokens);
    let before = [&[0.0], &tokens[..29]].concat();
    assert_eq!(one.of_steps("first_sample"), before.iter().map(|tokens| tokens / 32.0).collect::<Vec<f64>>());
    for shard in ["none", "gradients"] {
        let two = bench.trained(shard, 2, &format!("{RAMP} --set parallel.shard={shard}"));
        assert_eq!(two.of_steps("first_sample"), one.of_steps("first_sample"));
        assert_same(&one, &two, 30);
    }
}

#[test]
fn a_run_goes_on_in_the_middle_of_its_ramp_and_after_it_on_more_ranks() {
    let bench = Bench::new("ramp-on", 30);
    let whole = bench.trained("whole", 2, RAMP);
    // The end of a cosine without a length is that of the run: what goes on must fall alike.
    let decay = format!("{RAMP} --set schedule.decay_tokens={}", walked(30)[29]);
    let part =
        |ranks, steps: u64| bench.train("part", ranks, &format!("{decay} --set schedule.max_steps={steps}"));
    part(2, 10).run().expect_code(0);
    part(8, 12).run().expect_code(2).expect_stderr(&[
        "the batch of step 9 on",
        "256 is no multiple of 512",
        "with this batch, 4 ranks do",
    ]);
    for (ranks, steps) in [(1, 12), (2, 20), (4, 30)] {
        part(ranks, steps).run().expect_code(0);
    }
    assert_same(&whole, &bench.left("part"), 30);
}

#[test]
fn ranks_that_cannot_share_the_first_batch_are_refused_before_any_starts() {
    let bench = Bench::new("ramp-refused", 30);
    bench.train("run", 4, RAMP).run().expect_code(2).expect_stderr(&[
        "batch.ramp_start_tokens = 128 is no multiple of 256 (micro_batch 2 x seq_len 32 x 4 ranks)",
        "hint: the smallest that works is 256; with this batch, 2 ranks do",
    ]);
    assert!(!bench.scratch.join("runs/run").exists());
}
