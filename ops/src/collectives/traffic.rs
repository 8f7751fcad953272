//! How many bytes a rank has sent to others and how long its collectives took, counted as it works.
//! Knows no theory to compare with.

use super::Operation;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// What a rank's collectives have moved since the start.
///
/// Within a node, what other ranks read of this one, or this one writes for them, counts as sent by it.
/// With W ranks, theory has 2 (W - 1) / W of a buffer's bytes on the wire for an all-reduce, (W - 1) / W
/// for a reduce-scatter or an all-gather, and W - 1 times the buffer for a broadcast, all of them the
/// root's. Over NCCL, whose own ways are not seen, that is what is counted, and no time.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Traffic {
    /// Sums for all.
    pub all_reduce: Moved,
    /// Sums for their owners.
    pub reduce_scatter: Moved,
    /// Shards for all.
    pub all_gather: Moved,
    /// One rank's buffer for all.
    pub broadcast: Moved,
    /// Bytes, barriers, and what ranks tell each other before each operation; its time is not counted.
    pub control: Moved,
}

impl Traffic {
    /// What two groups of the same rank have moved together.
    pub(super) fn plus(self, other: Traffic) -> Traffic {
        Traffic {
            all_reduce: self.all_reduce.plus(other.all_reduce),
            reduce_scatter: self.reduce_scatter.plus(other.reduce_scatter),
            all_gather: self.all_gather.plus(other.all_gather),
            broadcast: self.broadcast.plus(other.broadcast),
            control: self.control.plus(other.control),
        }
    }
}

impl Moved {
    fn plus(self, other: Moved) -> Moved {
        Moved { sent_bytes: self.sent_bytes + other.sent_bytes, busy_s: self.busy_s + other.busy_s }
    }
}

/// Bytes sent by this rank, and the time it took.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Moved {
    /// Bytes this rank has sent to others.
    pub sent_bytes: u64,
    /// Seconds from the moment all ranks had come to the moment this one was done: communication
    /// alone, without waiting for a rank that is late.
    pub busy_s: f64,
}

/// The same while it grows: written by the thread that communicates, read by any.
#[derive(Debug, Default)]
pub(super) struct Counters {
    rows: [Row; 5],
}

#[derive(Debug, Default)]
struct Row {
    bytes: AtomicU64,
    nanos: AtomicU64,
}

const CONTROL: usize = 4;

impl Counters {
    /// Adds an operation.
    pub(super) fn add(&self, operation: Operation, bytes: u64, took: Duration) {
        let row = &self.rows[match operation {
            Operation::AllReduce { .. } => 0,
            Operation::ReduceScatter { .. } => 1,
            Operation::AllGather { .. } => 2,
            Operation::Broadcast { .. } => 3,
        }];
        row.bytes.fetch_add(bytes, Ordering::Relaxed);
        row.nanos.fetch_add(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// Adds what ranks told each other.
    pub(super) fn add_control(&self, bytes: usize) {
        self.rows[CONTROL].bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// What has been counted so far.
    pub(super) fn traffic(&self) -> Traffic {
        let moved = |row: &Row| Moved {
            sent_bytes: row.bytes.load(Ordering::Relaxed),
            busy_s: row.nanos.load(Ordering::Relaxed) as f64 / 1e9,
        };
        let [all_reduce, reduce_scatter, all_gather, broadcast, control] = self.rows.each_ref().map(moved);
        Traffic { all_reduce, reduce_scatter, all_gather, broadcast, control }
    }
}
