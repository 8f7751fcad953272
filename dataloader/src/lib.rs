//! The path of the data: text -> tokens -> shards on disk -> samples.
//!
//! Owns tokenizers, the shard and manifest formats (`docs/FORMATS.md`), preparation of text, and
//! the order in which a run sees its samples. Refuses to know tensors, ranks' messages and
//! training: no torch, no MPI; what leaves here are token ids as integers.

#![deny(unsafe_code)] // but for the memory map in `mmap`

mod error;
mod tokenizer;

mod files;
mod header;
mod index;
mod manifest;
mod mmap;

mod foreign;
mod shard;
mod shard_writer;

mod convert;
mod data_set;
mod data_set_writer;

mod mixture;
mod order;
mod samples;
mod skips;
mod validation;

mod curate;
mod documents;
mod pipeline;
mod prepare;
mod shard_pairs;
mod split;
mod tokenize;

mod examples;
mod rows;
mod task_set;

mod prompts;
mod suite_set;

mod overlap;

pub use convert::{Converted, convert_to, convert_to_ours};
pub use curate::{
    Classifier, ClassifierReport, Contamination, Curation, CurationReport, DedupOptions, Dropped, Example,
    Filter, Gate, curate, train_classifier,
};
pub use data_set::{DataSet, DocumentInfo, Verified, vocab_size};
pub use data_set_writer::DataSetWriter;
pub use documents::{Inputs, KNOWN_EXTENSIONS, TEXT_KEY};
pub use error::{DataError, PrepareError};
pub use examples::{Answer, TaskExample, read_examples};
pub use foreign::Format;
pub use manifest::{MANIFEST_NAME, MANIFEST_VERSION, Manifest, ShardEntry, TokenizerEntry};
pub use mixture::Mixture;
pub use order::Order;
pub use overlap::{Overlap, overlap};
pub use pipeline::all_threads;
pub use prepare::{PrepareOptions, PrepareReport, SplitTotals, prepare};
pub use samples::{Batch, Passage, Samples};
pub use shard::Shard;
pub use shard_writer::ShardWriter;
pub use skips::Skips;
pub use split::SplitRule;
pub use suite_set::{Asked, Span, SuiteItem, SuiteSet};
pub use task_set::{LaidOut, TaskSequence, TaskSet};
pub use tokenize::{Learnt, tokenize, train_tokenizer};
pub use tokenizer::{Encoder, Table, Tokenizer};
pub use validation::ValidationSet;

/// Payload bytes that one block checksum covers, 1 MiB; the last block of a shard may be shorter.
pub const BLOCK_BYTES: usize = 1 << 20;

/// Tokens after which a writer starts the next shard: 2^28, half a gigabyte of u16.
pub const DEFAULT_MAX_SHARD_TOKENS: u64 = 1 << 28;

/// Documents after which preparation starts the next shard: their index is in memory until it is written.
pub const MAX_SHARD_DOCUMENTS: u64 = 1 << 21;
