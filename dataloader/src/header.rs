//! A shard's header: 256 bytes, little-endian, with a checksum of its own. Owns where each field
//! lies (`docs/FORMATS.md` has the table) and that the fields agree with each other; refuses to
//! know what the payload and the index hold.

use crate::{BLOCK_BYTES, DataError};
use std::path::Path;

/// First bytes of a shard. Not text, and with line ends, so that a transfer in text mode shows.
pub(crate) const MAGIC: [u8; 8] = *b"\x89PHX\r\n\x1a\n";
/// The shard format that is written and read here.
pub(crate) const VERSION: u32 = 1;
/// Length of the header; the payload follows at once.
pub(crate) const HEADER_BYTES: usize = 256;
/// Longest tokenizer id.
pub(crate) const ID_BYTES: usize = 32;
/// The index starts at a multiple of this, as rkyv's aligned types need.
const INDEX_ALIGNMENT: u64 = 16;

/// What a shard says about itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Header {
    /// Bytes per token: 2 or 4.
    pub(crate) token_width: u32,
    pub(crate) tokens: u64,
    pub(crate) documents: u64,
    /// Bytes of text that the tokens stand for.
    pub(crate) source_bytes: u64,
    pub(crate) payload_bytes: u64,
    /// From the start of the file.
    pub(crate) index_offset: u64,
    pub(crate) index_bytes: u64,
    pub(crate) index_checksum: u32,
    /// ASCII, zero padded.
    pub(crate) tokenizer_id: [u8; ID_BYTES],
    pub(crate) tokenizer_digest: [u8; 32],
    /// BLAKE3 of the payload.
    pub(crate) digest: [u8; 32],
}

impl Header {
    /// The header as it lies on disk.
    pub(crate) fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let mut put =
            |offset: usize, field: &[u8]| bytes[offset..offset + field.len()].copy_from_slice(field);
        put(0, &MAGIC);
        put(8, &VERSION.to_le_bytes());
        put(12, &self.token_width.to_le_bytes());
        put(16, &self.tokens.to_le_bytes());
        put(24, &self.documents.to_le_bytes());
        put(32, &self.source_bytes.to_le_bytes());
        put(40, &(HEADER_BYTES as u64).to_le_bytes());
        put(48, &self.payload_bytes.to_le_bytes());
        put(56, &self.index_offset.to_le_bytes());
        put(64, &self.index_bytes.to_le_bytes());
        put(72, &(BLOCK_BYTES as u32).to_le_bytes());
        put(76, &self.index_checksum.to_le_bytes());
        put(80, &self.tokenizer_id);
        put(112, &self.tokenizer_digest);
        put(144, &self.digest);
        let checksum = crc32fast::hash(&bytes[..252]);
        bytes[252..].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// Reads and checks the header of a file of `file_bytes` bytes, whose first bytes are `bytes`
    /// (all of them if there are fewer than [`HEADER_BYTES`]).
    ///
    /// # Errors
    /// In this order: wrong magic, too short for a header, unknown version, checksum, fields that
    /// contradict each other, a file shorter or longer than they say.
    pub(crate) fn decode(bytes: &[u8], file_bytes: u64, file: &Path) -> Result<Header, DataError> {
        let magic: [u8; 8] = field(bytes, 0).unwrap_or(MAGIC);
        if magic != MAGIC {
            return Err(DataError::WrongMagic { file: file.into(), got: magic, expected: MAGIC });
        }
        let Some(bytes) = bytes.first_chunk::<HEADER_BYTES>() else {
            let expected = HEADER_BYTES as u64;
            return Err(DataError::Truncated { file: file.into(), got: file_bytes, expected });
        };
        let version = u32_at(bytes, 8);
        if version != VERSION {
            return Err(DataError::UnknownVersion { file: file.into(), got: version, expected: VERSION });
        }
        let (got, expected) = (crc32fast::hash(&bytes[..252]), u32_at(bytes, 252));
        if got != expected {
            return Err(DataError::HeaderChecksum { file: file.into(), got, expected });
        }
        let header = Header {
            token_width: u32_at(bytes, 12),
            tokens: u64_at(bytes, 16),
            documents: u64_at(bytes, 24),
            source_bytes: u64_at(bytes, 32),
            payload_bytes: u64_at(bytes, 48),
            index_offset: u64_at(bytes, 56),
            index_bytes: u64_at(bytes, 64),
            index_checksum: u32_at(bytes, 76),
            tokenizer_id: field(bytes, 80).unwrap_or_default(),
            tokenizer_digest: field(bytes, 112).unwrap_or_default(),
            digest: field(bytes, 144).unwrap_or_default(),
        };
        header.check_lengths(u64_at(bytes, 40), u32_at(bytes, 72), file_bytes, file)?;
        Ok(header)
    }

    /// Whether the counts, offsets and lengths agree with each other and with the file's size.
    /// A sum that does not fit 64 bits agrees with nothing.
    fn check_lengths(
        &self,
        payload_offset: u64,
        block_bytes: u32,
        file_bytes: u64,
        file: &Path,
    ) -> Result<(), DataError> {
        let width = if self.token_width == 4 { 4 } else { 2 };
        let payload_bytes = self.tokens.saturating_mul(width);
        let index_offset = index_offset(payload_bytes);
        for (what, got, expected) in [
            ("token width", u64::from(self.token_width), width),
            ("payload offset", payload_offset, HEADER_BYTES as u64),
            ("block length", u64::from(block_bytes), BLOCK_BYTES as u64),
            ("payload length", self.payload_bytes, payload_bytes),
            ("index offset", self.index_offset, index_offset),
        ] {
            if got != expected {
                return Err(DataError::LengthMismatch { file: file.into(), what, got, expected });
            }
        }
        let (file, got) = (file.into(), file_bytes);
        let expected = self.index_offset.saturating_add(self.index_bytes);
        match got.cmp(&expected) {
            std::cmp::Ordering::Less => Err(DataError::Truncated { file, got, expected }),
            std::cmp::Ordering::Greater => Err(DataError::TooLong { file, got, expected }),
            std::cmp::Ordering::Equal => Ok(()),
        }
    }
}

/// Where the index of a shard with so much payload starts.
pub(crate) fn index_offset(payload_bytes: u64) -> u64 {
    (HEADER_BYTES as u64)
        .saturating_add(payload_bytes)
        .checked_next_multiple_of(INDEX_ALIGNMENT)
        .unwrap_or(u64::MAX)
}

/// A tokenizer id as the header holds it.
///
/// # Panics
/// On an id longer than 32 bytes: ids are ours.
pub(crate) fn padded_id(id: &str) -> [u8; ID_BYTES] {
    assert!(id.len() <= ID_BYTES, "tokenizer id {id:?} is longer than {ID_BYTES} bytes");
    let mut padded = [0; ID_BYTES];
    padded[..id.len()].copy_from_slice(id.as_bytes());
    padded
}

fn field<const N: usize>(bytes: &[u8], offset: usize) -> Option<[u8; N]> {
    bytes.get(offset..)?.first_chunk::<N>().copied()
}

fn u32_at(bytes: &[u8; HEADER_BYTES], offset: usize) -> u32 {
    u32::from_le_bytes(field(bytes, offset).unwrap_or_default())
}

fn u64_at(bytes: &[u8; HEADER_BYTES], offset: usize) -> u64 {
    u64::from_le_bytes(field(bytes, offset).unwrap_or_default())
}
