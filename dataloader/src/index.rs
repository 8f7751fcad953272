//! A shard's index as rkyv lays it out: where documents start and what each block's checksum is.
//! Owns the layout and the check of its root; refuses to know files and tokens.

use rkyv::rancor;

/// The index: `documents` by first token, `block_checksums` by block.
#[derive(Debug, Default, rkyv::Archive, rkyv::Serialize)]
pub(crate) struct Index {
    pub(crate) documents: Vec<Document>,
    /// CRC-32 (IEEE) of each block of the payload.
    pub(crate) block_checksums: Vec<u32>,
}

/// One document of a shard; four words, so that there is no padding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, rkyv::Archive, rkyv::Serialize)]
pub(crate) struct Document {
    /// Position in the shard.
    pub(crate) first_token: u64,
    /// Position in the manifest's list of source files.
    pub(crate) source: u64,
    /// Line or record of the source file, from 1.
    pub(crate) record: u64,
    /// Bytes of text.
    pub(crate) source_bytes: u64,
}

impl Index {
    /// The archived bytes.
    pub(crate) fn archive(&self) -> rkyv::util::AlignedVec {
        rkyv::to_bytes::<rancor::Error>(self).expect("two vectors of integers always have an archive")
    }
}

impl ArchivedIndex {
    /// The index in `bytes`, with its root checked: both tables lie within. What they say is checked
    /// where it is looked up. Takes the same time whatever their length, since every bit pattern of
    /// an integer is one and the optimizer removes rkyv's walk over them.
    pub(crate) fn check(bytes: &[u8]) -> Result<&ArchivedIndex, String> {
        rkyv::access::<ArchivedIndex, rancor::Error>(bytes).map_err(|error| error.to_string())
    }
}

impl ArchivedDocument {
    /// The document in this machine's byte order.
    pub(crate) fn get(&self) -> Document {
        Document {
            first_token: self.first_token.to_native(),
            source: self.source.to_native(),
            record: self.record.to_native(),
            source_bytes: self.source_bytes.to_native(),
        }
    }
}
