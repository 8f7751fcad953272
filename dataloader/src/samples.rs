//! The samples that a run trains on: numbered by mixture and order, cut from the data sets, and which
//! documents they were cut from. Owns no state but the samples that are left out, so that going on is asking for
//! the next position; refuses to know ranks and tensors.

use crate::manifest::check_tokenizer;
use crate::{DataError, DataSet, DocumentInfo, Mixture, Order, Skips, Tokenizer};
use configs::DataConfig;
use std::fmt;
use std::ops::Range;
use std::path::Path;

/// Data sets cut into sequences, mixed and in a run's order.
///
/// The mixture says which source sample i comes from, and which of the source's samples that is; the
/// source's own order says which of its sequences. With one source that is the order alone.
#[derive(Debug)]
pub struct Samples {
    sources: Vec<Source>,
    mixture: Mixture,
    digest: [u8; 32],
    seq_len: usize,
    skips: Skips,
}

/// One data set of the mixture.
#[derive(Debug)]
struct Source {
    data: DataSet,
    order: Order,
}

/// A stretch of a document that a sample has tokens of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Passage<'a> {
    /// The sample's number in the run's order.
    pub sample: u64,
    /// The data set that it comes from, where there are several.
    pub source: Option<&'a Path>,
    /// The document.
    pub document: DocumentInfo<'a>,
    /// Positions of the tokens in the document, from 0.
    pub tokens: Range<u64>,
}

impl fmt::Display for Passage<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Passage { sample, source, document, tokens } = self;
        let length = document.tokens.end - document.tokens.start;
        write!(
            f,
            "sample {sample}: {} record {}, tokens {}..{} of {length} (document {} in {})",
            document.file, document.record, tokens.start, tokens.end, document.number, document.shard
        )?;
        source.map_or(Ok(()), |source| write!(f, " of {}", source.display()))
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
        Samples::mixed(vec![(data, 1.0)], seq_len, seed)
    }

    /// The training data of a configuration.
    ///
    /// # Errors
    /// Those of [`DataSet::open`] and [`Samples::mixed`].
    pub fn of(config: &DataConfig, seq_len: usize, seed: u64) -> Result<Samples, DataError> {
        let sources = config.sources().into_iter();
        let open = sources.map(|source| Ok((DataSet::open(&source.path)?, source.weight)));
        Samples::mixed(open.collect::<Result<_, DataError>>()?, seq_len, seed)
    }

    /// Cuts several data sets into sequences like [`Samples::open`] and mixes them by their weights,
    /// whatever these sum to.
    ///
    /// # Errors
    /// A source with fewer than `seq_len + 1` tokens, or tokens of another tokenizer than the first's.
    ///
    /// # Panics
    /// On no sources, or weights that are not positive numbers.
    pub fn mixed(sources: Vec<(DataSet, f64)>, seq_len: usize, seed: u64) -> Result<Samples, DataError> {
        let weights: Vec<f64> = sources.iter().map(|(_, weight)| *weight).collect();
        let mixture = Mixture::new(&weights);
        let digest = digest_of(&sources);
        let first = sources[0].0.tokenizer().clone();
        let cut = sources.into_iter().map(|(data, _)| {
            require_tokens(&data, seq_len as u64 + 1)?;
            let tokenizer = data.tokenizer();
            check_tokenizer(&first, tokenizer.id(), &tokenizer.digest(), data.folder())?;
            let n_sequences = (data.tokens() - 1) / seq_len as u64;
            let order = Order::new(data.digest(), seq_len, n_sequences, seed);
            Ok(Source { data, order })
        });
        let sources = cut.collect::<Result<_, DataError>>()?;
        Ok(Samples { sources, mixture, digest, seq_len, skips: Skips::default() })
    }

    /// What made the tokens.
    pub fn tokenizer(&self) -> &Tokenizer {
        self.sources[0].data.tokenizer()
    }

    /// The data set's digest; of several, that of their digests and weights in order. Samples with the
    /// same digest, `seq_len` and seed are the same.
    pub fn digest(&self) -> [u8; 32] {
        self.digest
    }

    /// The data sets, in the mixture's order.
    pub fn sources(&self) -> impl Iterator<Item = &DataSet> {
        self.sources.iter().map(|source| &source.data)
    }

    /// How often each source has been seen before sample `n`, in epochs.
    pub fn epochs(&self, n: u64) -> Vec<f64> {
        let seen = self.mixture.counts(n).into_iter().zip(&self.sources);
        seen.map(|(seen, source)| seen as f64 / source.order.n_sequences() as f64).collect()
    }

    /// Tokens that a sample predicts, T.
    pub fn seq_len(&self) -> usize {
        self.seq_len
    }

    /// Sequences of all sources; the `(tokens - 1) mod seq_len` tokens at the end of each are in none.
    pub fn n_sequences(&self) -> u64 {
        self.sources.iter().map(|source| source.order.n_sequences()).sum()
    }

    /// Which source's sequence sample `i` of the run is, and which.
    pub fn sequence(&self, i: u64) -> (usize, u64) {
        let (source, number) = self.mixture.at(i);
        (source, self.sources[source].order.sequence(number))
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
        for (first, rows) in positions.clone().step_by(2).zip(tokens.chunks_mut(2 * row_len)) {
            // Looked up in pairs; of an odd last one, its neighbour is itself.
            let second = (first + 1).min(positions.end - 1);
            let places = self.first_tokens([first, second].map(|position| self.skips.sample(position)));
            for ((source, first_token), row) in places.iter().zip(rows.chunks_mut(row_len)) {
                source.data.read(*first_token, row)?;
            }
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
        let (from, mut at) = self.first_token(sample);
        let source = (self.sources.len() > 1).then(|| from.data.folder());
        let end = at + self.seq_len as u64 + 1;
        std::iter::from_fn(move || {
            let start = Some(at).filter(|&at| at < end)?;
            at = end; // where a look-up that fails ends
            Some(from.data.document_at(start).map(|document| {
                at = document.tokens.end.min(end);
                let first = document.tokens.start;
                Passage { sample, source, tokens: start - first..at - first, document }
            }))
        })
    }

    fn first_tokens(&self, samples: [u64; 2]) -> [(&Source, u64); 2] {
        let places = samples.map(|sample| self.mixture.at(sample));
        let orders = places.map(|(source, number)| (&self.sources[source].order, number));
        let [x, y] = Order::sequences(orders).map(|sequence| sequence * self.seq_len as u64);
        [(&self.sources[places[0].0], x), (&self.sources[places[1].0], y)]
    }

    fn first_token(&self, sample: u64) -> (&Source, u64) {
        let (source, sequence) = self.sequence(sample);
        (&self.sources[source], sequence * self.seq_len as u64)
    }
}

/// What a run's data is known by.
fn digest_of(sources: &[(DataSet, f64)]) -> [u8; 32] {
    if let [(data, _)] = sources {
        return data.digest();
    }
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"phalanx mixture 1");
    for (data, weight) in sources {
        hasher.update(&data.digest());
        hasher.update(&weight.to_le_bytes());
    }
    *hasher.finalize().as_bytes()
}

/// Refuses a data set with fewer tokens than one sample takes.
pub(crate) fn require_tokens(data: &DataSet, needed: u64) -> Result<(), DataError> {
    let tokens = data.tokens();
    if tokens < needed {
        return Err(DataError::TooFewTokens { folder: data.folder().into(), tokens, needed });
    }
    Ok(())
}
