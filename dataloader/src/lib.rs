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

mod shard;
mod shard_writer;

mod data_set;
mod data_set_writer;

mod mixture;
mod order;
mod samples;
mod skips;
mod validation;

mod documents;
mod prepare;
mod split;

mod overlap;

pub use data_set::{DataSet, DocumentInfo, Verified, vocab_size};
pub use data_set_writer::DataSetWriter;
pub use documents::KNOWN_EXTENSIONS;
pub use error::{DataError, PrepareError};
pub use manifest::{MANIFEST_NAME, MANIFEST_VERSION, Manifest, ShardEntry, TokenizerEntry};
pub use mixture::Mixture;
pub use order::Order;
pub use overlap::{Overlap, overlap};
pub use prepare::{PrepareOptions, PrepareReport, SplitTotals, prepare};
pub use samples::{Batch, Passage, Samples};
pub use shard::Shard;
pub use shard_writer::ShardWriter;
pub use skips::Skips;
pub use split::SplitRule;
pub use tokenizer::Tokenizer;
pub use validation::ValidationSet;

/// Payload bytes that one block checksum covers, 1 MiB; the last block of a shard may be shorter.
pub const BLOCK_BYTES: usize = 1 << 20;

/// Tokens after which a writer starts the next shard: 2^28, half a gigabyte of u16.
pub const DEFAULT_MAX_SHARD_TOKENS: u64 = 1 << 28;
