//! The samples that a run trains on: numbered by the order, cut from the data set, and which documents
//! they were cut from. Owns no state but the samples that are left out, so that going on is asking for
//! the next position; refuses to know ranks and tensors.

use crate::{DataError, DataSet, DocumentInfo, Order, Skips};
use std::fmt;
use std::ops::Range;

/// A data set cut into sequences, in a run's order.
#[derive(Debug)]
pub struct Samples {
    data: DataSet,
    seq_len: usize,
    order: Order,
    skips: Skips,
}

/// A stretch of a document that a sample has tokens of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Passage<'a> {
    /// The sample's number in the run's order.
    pub sample: u64,
    /// The document.
    pub document: DocumentInfo<'a>,
    /// Positions of the tokens in the document, from 0.
    pub tokens: Range<u64>,
}

impl fmt::Display for Passage<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Passage { sample, document, tokens } = self;
        let length = document.tokens.end - document.tokens.start;
        write!(
            f,
            "sample {sample}: {} record {}, tokens {}..{} of {length} (document {} in {})",
            document.file, document.record, tokens.start, tokens.end, document.number, document.shard
        )
    }
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
        Ok(Samples { data, seq_len, order, skips: Skips::default() })
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

    /// Leaves samples out of the run from now on, these and no others.
    pub fn leave_out(&mut self, skips: Skips) {
        self.skips = skips;
    }

    /// What is left out.
    pub fn skips(&self) -> &Skips {
        &self.skips
    }

    /// The numbers of the samples at these positions of the run, from the first to one past the last.
    /// Those between them that are skipped are counted in.
    pub fn numbers(&self, positions: Range<u64>) -> Range<u64> {
        let first = self.skips.sample(positions.start);
        match positions.end.checked_sub(1).filter(|&last| last >= positions.start) {
            Some(last) => first..self.skips.sample(last).saturating_add(1),
            None => first..first,
        }
    }

    /// The tokens of the samples at these positions of the run, one row each, `[samples, seq_len + 1]`.
    /// Without skips, the sample at position i is sample i.
    ///
    /// # Errors
    /// Those of [`DataSet::read`].
    pub fn batch(&self, positions: Range<u64>) -> Result<Batch, DataError> {
        let row_len = self.seq_len + 1;
        let rows = positions.end.saturating_sub(positions.start) as usize;
        let mut tokens = vec![0; rows * row_len];
        for (position, row) in positions.zip(tokens.chunks_exact_mut(row_len)) {
            self.data.read(self.first_token(self.skips.sample(position)), row)?;
        }
        Ok(Batch { tokens, rows, row_len })
    }

    /// What the samples at these positions of the run were cut from: passage after passage, looked up
    /// through the shards' indexes as they are asked for, without reading tokens.
    ///
    /// # Errors
    /// An index that leads astray, once for each sample that meets it.
    pub fn documents(
        &self,
        positions: Range<u64>,
    ) -> impl Iterator<Item = Result<Passage<'_>, DataError>> + '_ {
        positions.flat_map(|position| self.passages(self.skips.sample(position)))
    }

    fn passages(&self, sample: u64) -> impl Iterator<Item = Result<Passage<'_>, DataError>> + '_ {
        let mut at = self.first_token(sample);
        let end = at + self.seq_len as u64 + 1;
        std::iter::from_fn(move || {
            let start = Some(at).filter(|&at| at < end)?;
            at = end; // where a look-up that fails ends
            Some(self.data.document_at(start).map(|document| {
                at = document.tokens.end.min(end);
                let first = document.tokens.start;
                Passage { sample, tokens: start - first..at - first, document }
            }))
        })
    }

    fn first_token(&self, sample: u64) -> u64 {
        self.sequence(sample) * self.seq_len as u64
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
