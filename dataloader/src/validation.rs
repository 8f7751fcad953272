//! The tokens that a model is measured on: in their order, each predicted exactly once. Owns the cut
//! into windows and each rank's share; refuses to know losses and ranks' messages.

use crate::samples::require_tokens;
use crate::{Batch, DataError, DataSet};
use std::ops::Range;

/// A data set cut into windows. Window j has as targets the tokens `j T + 1 ..= (j + 1) T` and as
/// inputs those one before, T = `seq_len`; the last window may be shorter. Every token but the very
/// first, which nothing precedes, is a target once.
#[derive(Debug)]
pub struct ValidationSet {
    data: DataSet,
    seq_len: u64,
    n_windows: u64,
}

impl ValidationSet {
    /// Cuts a data set into windows of `seq_len` targets; with `max_tokens` only the first so many
    /// targets, rounded down to whole windows, at least one.
    ///
    /// # Errors
    /// Fewer than two tokens.
    pub fn open(data: DataSet, seq_len: usize, max_tokens: Option<u64>) -> Result<ValidationSet, DataError> {
        require_tokens(&data, 2)?;
        let seq_len = seq_len as u64;
        let all = (data.tokens() - 1).div_ceil(seq_len);
        let whole_set = |max: &u64| *max >= data.tokens() - 1;
        let n_windows = match max_tokens.filter(|max| !whole_set(max)) {
            Some(max) => (max / seq_len).clamp(1, all),
            None => all,
        };
        Ok(ValidationSet { data, seq_len, n_windows })
    }

    /// The data set.
    pub fn data(&self) -> &DataSet {
        &self.data
    }

    /// Number of windows.
    pub fn n_windows(&self) -> u64 {
        self.n_windows
    }

    /// Number of targets over all windows.
    pub fn n_targets(&self) -> u64 {
        self.n_windows.saturating_mul(self.seq_len).min(self.data.tokens() - 1)
    }

    /// Bytes of text that the targets stand for: bits per byte is the sum of the targets' losses in
    /// nats / ln 2 / this. Exact for the whole set; with a limit, the set's bytes in proportion to the
    /// targets.
    pub fn source_bytes(&self) -> f64 {
        self.data.source_bytes() as f64 * (self.n_targets() as f64 / (self.data.tokens() - 1) as f64)
    }

    /// Rank `rank`'s share of the set among `world_size` ranks, as runs of at most `rows` windows of one
    /// length: what a forward pass takes at a time. Whole runs are shared out, in order, so that a
    /// window is computed beside the same others on any number of ranks. Some ranks may have none.
    pub fn batches(&self, rows: usize, rank: usize, world_size: usize) -> Vec<Range<u64>> {
        let rows = (rows as u64).max(1);
        let whole = self.n_windows - u64::from(self.last_is_shorter()); // the shorter window goes alone
        let runs = (0..whole).step_by(usize::try_from(rows).unwrap_or(usize::MAX));
        let mut all: Vec<Range<u64>> =
            runs.map(|start| start..whole.min(start.saturating_add(rows))).collect();
        all.extend((whole < self.n_windows).then_some(whole..self.n_windows));
        let edge = |rank: usize| (all.len() as u128 * rank as u128 / world_size as u128) as usize; // at most len
        all[edge(rank)..edge(rank + 1)].to_vec()
    }

    fn last_is_shorter(&self) -> bool {
        let last = self.positions(self.n_windows - 1);
        last.end - last.start <= self.seq_len
    }

    /// Replaces `tokens` with those of window j: at most `seq_len + 1`, at least 2.
    ///
    /// # Errors
    /// Those of [`DataSet::read`].
    pub fn window(&self, j: u64, tokens: &mut Vec<i64>) -> Result<(), DataError> {
        let positions = self.positions(j);
        tokens.clear();
        tokens.resize((positions.end - positions.start) as usize, 0);
        self.data.read(positions.start, tokens)
    }

    /// The tokens of windows of one length, such as [`ValidationSet::batches`] gives, one row each.
    ///
    /// # Errors
    /// Those of [`DataSet::read`].
    ///
    /// # Panics
    /// On windows of different lengths, or none.
    pub fn batch(&self, windows: Range<u64>) -> Result<Batch, DataError> {
        let (mut tokens, mut row) = (Vec::new(), Vec::new());
        let rows = (windows.end - windows.start) as usize;
        for j in windows {
            self.window(j, &mut row)?;
            tokens.extend_from_slice(&row);
        }
        let row_len = row.len();
        assert_eq!(tokens.len(), rows * row_len, "windows of a batch have one length");
        Ok(Batch { tokens, rows, row_len })
    }

    /// Where window j's tokens are in the data set.
    fn positions(&self, j: u64) -> Range<u64> {
        let start = j.saturating_mul(self.seq_len);
        start..start.saturating_add(self.seq_len + 1).min(self.data.tokens())
    }
}
