//! Text as token ids without a data set, and learning a tokenizer from text. Owns the two passes; refuses
//! to know shards.

use crate::documents::{Body, Inputs, Raw, Reader, whole_text};
use crate::pipeline::{self, Flow};
use crate::tokenizer::{WordCounts, train};
use crate::{PrepareError, Tokenizer};

/// The ids of every document, in order, without end-of-text; a document without text has none.
///
/// # Errors
/// Files that cannot be read, bad lines, and what `each` returns.
pub fn tokenize(
    inputs: &Inputs,
    tokenizer: &Tokenizer,
    threads: usize,
    mut each: impl FnMut(&[u32]) -> Result<(), PrepareError>,
) -> Result<(), PrepareError> {
    inputs.check()?;
    let worker = || {
        let mut encoder = tokenizer.encoder();
        move |batch: Vec<Raw>| {
            let (mut tokens, mut ends) = (Vec::new(), Vec::new());
            for raw in &batch {
                encoder.encode(&whole_text(inputs, raw)?, &mut tokens);
                ends.push(tokens.len());
            }
            Ok((tokens, ends))
        }
    };
    pipeline::run(Reader::new(inputs, None, (0, 1)), threads, worker, |(tokens, ends)| {
        let mut start = 0;
        for end in ends {
            each(&tokens[start..end])?;
            start = end;
        }
        Ok(Flow::Continue)
    })
}

/// What a tokenizer was learnt from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Learnt {
    /// Documents read.
    pub documents: u64,
    /// Bytes of their text.
    pub bytes: u64,
    /// Different words in it.
    pub words: u64,
}

/// Learns a byte-pair encoding with at most `vocab_size` ids, end-of-text included, from text. The same
/// files give the same table on any number of threads.
///
/// # Errors
/// Files that cannot be read, bad lines, a vocabulary that cannot hold every byte.
pub fn train_tokenizer(
    inputs: &Inputs,
    vocab_size: usize,
    threads: usize,
) -> Result<(Tokenizer, Learnt), PrepareError> {
    inputs.check()?;
    if vocab_size < 257 {
        return Err(PrepareError::VocabularyTooSmall { got: vocab_size });
    }
    let worker = || {
        move |batch: Vec<Raw>| {
            let (mut counts, mut bytes) = (WordCounts::default(), 0);
            for raw in &batch {
                let text = whole_text(inputs, raw)?;
                counts.add(&text);
                bytes += text.len() as u64;
            }
            // A part of a long text is counted as a document where it begins.
            let begins = |raw: &&Raw| !matches!(&raw.body, Body::Part(part) if !part.begins);
            Ok((counts, batch.iter().filter(begins).count() as u64, bytes))
        }
    };
    let mut counts = WordCounts::default();
    let mut learnt = Learnt { documents: 0, bytes: 0, words: 0 };
    let last_cut = |text: &[u8]| Tokenizer::Gpt2.last_cut(text);
    let parts = crate::documents::Parts { last_cut: &last_cut, ends_fraction: None };
    pipeline::run(Reader::new(inputs, Some(parts), (0, 1)), threads, worker, |(more, documents, bytes)| {
        counts.merge(more);
        learnt.documents += documents;
        learnt.bytes += bytes;
        Ok(Flow::Continue)
    })?;
    learnt.words = counts.len() as u64;
    let tokens = train(counts, vocab_size);
    Ok((Tokenizer::bpe(tokens).expect("every byte, and merges that differ, are a table"), learnt))
}
