//! The samples that a run trains on: numbered by the order, cut from the data set. Owns no state, so
//! that going on is asking for the next number; refuses to know ranks and tensors.

use crate::{DataError, DataSet, Order};
use std::ops::Range;

/// A data set cut into sequences, in a run's order.
#[derive(Debug)]
pub struct Samples {
    data: DataSet,
    seq_len: usize,
    order: Order,
}

/// Rows of tokens of one length, row after row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// `[rows, row_len]`.
    pub tokens: Vec<i64>,
    /// Number of rows.
    pub rows: usize,
    /// Tokens per row: inputs are all but the last, targets all but the first.
    pub row_len: usize,
}

impl Samples {
    /// Cuts a data set into sequences: sequence j is the `seq_len + 1` tokens from `j seq_len` on, so
    /// that neighbours share the token that ends one's targets and starts the other's inputs.
    ///
    /// # Errors
    /// Fewer than `seq_len + 1` tokens.
    pub fn open(data: DataSet, seq_len: usize, seed: u64) -> Result<Samples, DataError> {
        require_tokens(&data, seq_len as u64 + 1)?;
        let n_sequences = (data.tokens() - 1) / seq_len as u64;
        let order = Order::new(data.digest(), seq_len, n_sequences, seed);
        Ok(Samples { data, seq_len, order })
    }

    /// The data set.
    pub fn data(&self) -> &DataSet {
        &self.data
    }

    /// Tokens that a sample predicts, T.
    pub fn seq_len(&self) -> usize {
        self.seq_len
    }

    /// Samples in one epoch; the `(tokens - 1) mod seq_len` tokens at the end are in none.
    pub fn n_sequences(&self) -> u64 {
        self.order.n_sequences()
    }

    /// Which sequence is sample `i` of the run.
    pub fn sequence(&self, i: u64) -> u64 {
        self.order.sequence(i)
    }

    /// The tokens of these samples, one row each, `[samples, seq_len + 1]`.
    ///
    /// # Errors
    /// Those of [`DataSet::read`].
    pub fn batch(&self, samples: Range<u64>) -> Result<Batch, DataError> {
        let row_len = self.seq_len + 1;
        let rows = samples.end.saturating_sub(samples.start) as usize;
        let mut tokens = vec![0; rows * row_len];
        for (i, row) in samples.zip(tokens.chunks_exact_mut(row_len)) {
            self.data.read(self.sequence(i) * self.seq_len as u64, row)?;
        }
        Ok(Batch { tokens, rows, row_len })
    }
}

/// Refuses a data set with fewer tokens than one sample takes.
pub(crate) fn require_tokens(data: &DataSet, needed: u64) -> Result<(), DataError> {
    let tokens = data.tokens();
    if tokens < needed {
        return Err(DataError::TooFewTokens { folder: data.folder().into(), tokens, needed });
    }
    Ok(())
}
