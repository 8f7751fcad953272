//! What ranks share out, what is computed again and how many ranks there are changes no bit; what the
//! fast mode changes stays within its tolerance. On a model with dropout and a banded layer.

use crate::left::{Left, assert_same};
use crate::{Bench, assert_close};

const STEPS: u64 = 30;

/// The end of the schedule is fixed, so that a run may stop half way and go on along the same curve.
const MODEL: &str = "--set model.dropout=0.1 --set model.attention=[\"dense\",\"banded:8\"] \
                     --set schedule.decay_tokens=15360 --set eval.max_tokens=64";

/// A way to train the same run.
#[derive(Clone, Copy, Debug)]
struct Cell {
    ranks: usize,
    shard: &'static str,
    recompute: &'static str,
}

impl Cell {
    const fn new(ranks: usize, shard: &'static str, recompute: &'static str) -> Cell {
        Cell { ranks, shard, recompute }
    }

    fn run(self, bench: &Bench, run: &str, more: &str) -> Left {
        let Cell { ranks, shard, recompute } = self;
        let how = format!("--set parallel.shard={shard} --set parallel.recompute={recompute}");
        bench.trained(run, ranks, &format!("{MODEL} {how} {more}"))
    }

    fn name(self) -> String {
        format!("{}-{}-{}", self.ranks, self.shard, self.recompute)
    }
}

const PLAIN: Cell = Cell::new(1, "none", "none");

/// Every cell has the bits of one rank alone that shares nothing out.
fn same_in(cells: &[Cell], dtype: &str) {
    let bench = Bench::new("sharding", STEPS);
    let dtype = format!("--set parallel.dtype={dtype}");
    let plain = PLAIN.run(&bench, "plain", &dtype);
    assert_eq!(plain.of_steps("loss").len(), STEPS as usize);
    for cell in cells {
        let other = cell.run(&bench, &cell.name(), &dtype);
        assert_same(&plain, &other, STEPS);
        for rank in 0..cell.ranks {
            assert_eq!(plain.digest(0), other.digest(rank), "weights on rank {rank} of {cell:?}");
        }
    }
}

#[test]
fn sharding_changes_no_bit_in_fp32() {
    same_in(
        &[
            Cell::new(2, "optimizer", "full"),
            Cell::new(4, "gradients", "none"),
            Cell::new(2, "parameters", "none"),
            Cell::new(4, "parameters", "full"),
        ],
        "fp32",
    );
}

#[test]
fn sharding_changes_no_bit_in_bf16() {
    same_in(
        &[
            Cell::new(2, "none", "full"),
            Cell::new(4, "optimizer", "none"),
            Cell::new(2, "gradients", "full"),
            Cell::new(4, "parameters", "none"),
        ],
        "bf16",
    );
}

#[test]
fn a_checkpoint_leads_from_one_way_of_sharding_to_another_without_changing_a_bit() {
    crossing_changes_no_bit("fp32");
}

fn crossing_changes_no_bit(dtype: &str) {
    let bench = Bench::new("crossing", STEPS);
    let dtype = format!("--set parallel.dtype={dtype}");
    let plain = PLAIN.run(&bench, "plain", &dtype);
    let half = format!("{dtype} --set schedule.max_steps=15");
    Cell::new(2, "gradients", "none").run(&bench, "crossing", &half);
    let crossed = Cell::new(4, "parameters", "none").run(&bench, "crossing", &dtype);
    assert_same(&plain, &crossed, STEPS);
    assert_eq!(plain.digest(0), crossed.digest(3));
}

#[test]
fn the_fast_mode_stays_within_its_tolerance() {
    let fp32 = (Cell::new(4, "parameters", "none"), "fp32", 1e-5);
    let bf16 = (Cell::new(2, "none", "none"), "bf16", 2e-3);
    for (cell, dtype, tolerance) in [fp32, bf16] {
        let bench = Bench::new("fast", STEPS);
        let dtype = format!("--set parallel.dtype={dtype}");
        let plain = PLAIN.run(&bench, "plain", &dtype);
        let fast = format!("{dtype} --set parallel.reproducible=false");
        let other = cell.run(&bench, &cell.name(), &fast);
        assert_close(&plain.of_steps("loss"), &other.of_steps("loss"), tolerance);
        assert_eq!(other.digest(0), other.digest(1));
    }
}

#[test]
fn three_ranks_share_segments_that_do_not_divide_by_three() {
    three_ranks_stay_close("parameters");
}

fn three_ranks_stay_close(shard: &'static str) {
    let bench = Bench::new("three", STEPS);
    let batch = "--set batch.global_batch_tokens=384 --set parallel.reproducible=false";
    let plain = PLAIN.run(&bench, "plain", batch);
    let other = Cell::new(3, shard, "none").run(&bench, shard, batch);
    assert_close(&plain.of_steps("loss"), &other.of_steps("loss"), 1e-5);
    assert_eq!(other.digest(0), other.digest(2));
}

/// All that a number of ranks can do; part of `make test-full`.
mod whole_table {
    use super::*;

    fn all(ranks: usize, dtype: &str) {
        let shards = ["none", "optimizer", "gradients", "parameters"];
        let cells: Vec<Cell> = shards
            .into_iter()
            .flat_map(|shard| ["none", "full"].map(|recompute| Cell::new(ranks, shard, recompute)))
            .collect();
        same_in(&cells, dtype);
    }

    #[test]
    fn of_one_rank_in_fp32() {
        all(1, "fp32");
    }

    #[test]
    fn of_two_ranks_in_fp32() {
        all(2, "fp32");
    }

    #[test]
    fn of_four_ranks_in_fp32() {
        all(4, "fp32");
    }

    #[test]
    fn of_one_rank_in_bf16() {
        all(1, "bf16");
    }

    #[test]
    fn of_two_ranks_in_bf16() {
        all(2, "bf16");
    }

    #[test]
    fn of_four_ranks_in_bf16() {
        all(4, "bf16");
    }

    #[test]
    fn of_crossings_in_bf16() {
        crossing_changes_no_bit("bf16");
    }

    #[test]
    fn of_three_ranks() {
        ["optimizer", "gradients"].into_iter().for_each(three_ranks_stay_close);
    }
}
