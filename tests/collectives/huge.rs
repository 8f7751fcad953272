//! A buffer of more elements than 31 bits count, moved for real: 4 GiB of bf16 on each of two ranks. Part of
//! `make test-full`.

use crate::process::Command;
use crate::{as_ranks, mpirun_arguments};
use ops::collectives::{Communicator, shard};
use std::time::Duration;
use tch::{Kind, Tensor};

const NUMEL: usize = (1 << 31) + 1001;
/// Elements looked at at a time.
const LOOK: usize = 1 << 26;

#[test]
fn more_than_2_to_the_31_elements_are_gathered_through_shared_memory_and_by_messages() {
    let memory = std::fs::read_to_string("/proc/meminfo").unwrap();
    let available = memory.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kilobytes: usize = available.unwrap().trim_end_matches("kB").trim().parse().unwrap();
    if kilobytes < 12 << 20 {
        use std::io::Write;
        let _ = writeln!(std::io::stderr(), "skipped: this takes 12 GiB of memory, {kilobytes} kB are free");
        return;
    }
    for path in ["default", "messages"] {
        let command = Command::new("mpirun").args(mpirun_arguments(2));
        as_ranks(command, "huge", path).deadline(Duration::from_secs(200)).run().expect_code(0);
    }
}

/// What a rank does: gathers a buffer whose shards are told apart by their values.
pub(crate) fn gather(comm: &dyn Communicator) {
    let buffer = comm.buffer(NUMEL, Kind::BFloat16).unwrap();
    let shard_numel = NUMEL.div_ceil(comm.world_size());
    let part = |rank: usize| {
        let range = shard(NUMEL, shard_numel, rank);
        buffer.narrow(0, range.start as i64, range.len() as i64)
    };
    let value = |rank: usize, start: usize| (100 * (rank + 1) + start / LOOK) as f64;
    let pieces = |part: &Tensor| -> Vec<(usize, Tensor)> {
        let numel = part.numel();
        let piece = |start: usize| part.narrow(0, start as i64, LOOK.min(numel - start) as i64);
        (0..numel).step_by(LOOK).map(|start| (start, piece(start))).collect()
    };
    for (start, mut piece) in pieces(&part(comm.rank())) {
        let _ = piece.fill_(value(comm.rank(), start));
    }
    comm.all_gather(&buffer, shard_numel).unwrap();
    for rank in 0..comm.world_size() {
        for (start, piece) in pieces(&part(rank)) {
            let right = piece.eq(value(rank, start)).all().int64_value(&[]) == 1;
            assert!(right, "shard {rank} from its element {start} on");
        }
    }
}
