//! What a rank's collectives are doing right now, to be looked at from any thread: which one is under way
//! and how many have begun and ended. Counts; judges nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

/// What is under way. Copies look at the same rank.
#[derive(Debug, Clone, Default)]
pub struct Activity(Arc<Cells>);

#[derive(Debug, Default)]
struct Cells {
    begun: AtomicU64,
    ended: AtomicU64,
    kind: AtomicU8,
}

/// Words for what a rank can be doing with others; the first is never under way.
const NAMES: [&str; 9] = [
    "nothing",
    "all_reduce",
    "reduce_scatter",
    "all_gather",
    "broadcast",
    "all_gather_bytes",
    "buffer",
    "barrier",
    "finalize",
];

impl Activity {
    /// A collective of this name begins: this rank waits for others from here on.
    pub(super) fn begin(&self, name: &str) {
        let kind = NAMES.iter().position(|known| *known == name).unwrap_or(0);
        self.0.kind.store(kind as u8, Ordering::Relaxed);
        self.0.begun.fetch_add(1, Ordering::Relaxed);
    }

    /// It has ended.
    pub(super) fn end(&self) {
        self.0.kind.store(0, Ordering::Relaxed);
        self.0.ended.fetch_add(1, Ordering::Relaxed);
    }

    /// MPI's word for the collective under way, if there is one.
    pub fn under_way(&self) -> Option<&'static str> {
        match self.0.kind.load(Ordering::Relaxed) {
            0 => None,
            kind => NAMES.get(usize::from(kind)).copied(),
        }
    }

    /// Collectives begun. Where all ranks stand still, those that wait have begun one more than the one
    /// that they wait for.
    pub fn begun(&self) -> u64 {
        self.0.begun.load(Ordering::Relaxed)
    }

    /// Collectives ended.
    pub fn ended(&self) -> u64 {
        self.0.ended.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_under_way_is_named_until_it_ends() {
        let (activity, seen) = {
            let activity = Activity::default();
            (activity.clone(), activity)
        };
        assert_eq!((seen.under_way(), seen.begun(), seen.ended()), (None, 0, 0));
        for name in &NAMES[1..] {
            activity.begin(name);
            assert_eq!(seen.under_way(), Some(*name));
            activity.end();
        }
        assert_eq!((seen.under_way(), seen.begun(), seen.ended()), (None, 8, 8));
    }
}
