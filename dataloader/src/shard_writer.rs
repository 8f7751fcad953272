//! Writing one shard: tokens stream through, only the index stays in memory, and the file has its
//! name when it is complete. Refuses to know where documents come from.

use crate::header::{HEADER_BYTES, Header, index_offset, padded_id};
use crate::index::{Document, Index};
use crate::{BLOCK_BYTES, DataError, ShardEntry, Tokenizer, files};
use std::fs::File;
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// A shard being written, under a temporary name until [`ShardWriter::finish`].
#[derive(Debug)]
pub struct ShardWriter {
    file: PathBuf,
    out: BufWriter<File>,
    tokenizer: Tokenizer,
    tokens: u64,
    source_bytes: u64,
    index: Index,
    digest: blake3::Hasher,
    /// The checksum of the block that is being filled, and the bytes in it.
    block: crc32fast::Hasher,
    block_fill: usize,
    bytes: Vec<u8>,
}

impl ShardWriter {
    /// Starts a shard; what is under its temporary name is overwritten.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn create(file: &Path, tokenizer: &Tokenizer) -> Result<ShardWriter, DataError> {
        let temporary = files::temporary(file);
        let open = File::create(&temporary).map_err(DataError::io(&temporary, "created"))?;
        let mut out = BufWriter::with_capacity(BLOCK_BYTES, open);
        out.write_all(&[0; HEADER_BYTES]).map_err(DataError::io(file, "written"))?; // filled in at the end
        Ok(ShardWriter {
            file: file.into(),
            out,
            tokenizer: tokenizer.clone(),
            tokens: 0,
            source_bytes: 0,
            index: Index::default(),
            digest: blake3::Hasher::new(),
            block: crc32fast::Hasher::new(),
            block_fill: 0,
            bytes: Vec::new(),
        })
    }

    /// Tokens so far.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Documents so far.
    pub fn documents(&self) -> u64 {
        self.index.documents.len() as u64
    }

    /// Appends one document: `tokens` with end-of-text last, made from `source_bytes` bytes of record
    /// `record` of source `source`. A document without tokens is left out.
    ///
    /// # Errors
    /// A token outside the vocabulary, and those of the file system.
    pub fn push(
        &mut self,
        source: u64,
        record: u64,
        source_bytes: u64,
        tokens: &[u32],
    ) -> Result<(), DataError> {
        if tokens.is_empty() {
            return Ok(());
        }
        self.begin(source, record);
        self.extend(source_bytes, tokens)
    }

    /// Starts a document whose tokens come in parts; it must get at least one.
    pub(crate) fn begin(&mut self, source: u64, record: u64) {
        self.index.documents.push(Document { first_token: self.tokens, source, record, source_bytes: 0 });
    }

    /// Appends to the document that was begun last: `tokens`, made from `source_bytes` more bytes.
    ///
    /// # Errors
    /// A token outside the vocabulary, and those of the file system.
    pub(crate) fn extend(&mut self, source_bytes: u64, tokens: &[u32]) -> Result<(), DataError> {
        let vocab_size = self.tokenizer.vocab_size();
        if let Some(i) = tokens.iter().position(|&token| token as usize >= vocab_size) {
            let (position, token) = (self.tokens + i as u64, u64::from(tokens[i]));
            let file = self.file.clone();
            return Err(DataError::TokenOutsideVocabulary { file, position, token, vocab_size });
        }
        if let Some(document) = self.index.documents.last_mut() {
            document.source_bytes += source_bytes;
        }
        self.tokens += tokens.len() as u64;
        self.source_bytes += source_bytes;
        for piece in tokens.chunks(BLOCK_BYTES) {
            self.write(piece)?;
        }
        Ok(())
    }

    /// Completes the shard and gives it its name. Returns its entry for the manifest.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn finish(mut self) -> Result<ShardEntry, DataError> {
        if self.block_fill > 0 {
            end_block(&mut self.block, &mut self.block_fill, &mut self.index);
        }
        let payload_bytes = self.tokens * u64::from(width(&self.tokenizer));
        let index_offset = index_offset(payload_bytes);
        let padding = vec![0; (index_offset - HEADER_BYTES as u64 - payload_bytes) as usize];
        let index = self.index.archive();
        let header = Header {
            token_width: width(&self.tokenizer),
            tokens: self.tokens,
            documents: self.index.documents.len() as u64,
            source_bytes: self.source_bytes,
            payload_bytes,
            index_offset,
            index_bytes: index.len() as u64,
            index_checksum: crc32fast::hash(&index),
            tokenizer_id: padded_id(self.tokenizer.id()),
            tokenizer_digest: self.tokenizer.digest(),
            digest: *self.digest.finalize().as_bytes(),
        };
        let mut write_rest = || {
            self.out.write_all(&padding)?;
            self.out.write_all(&index)?;
            self.out.seek(SeekFrom::Start(0))?;
            self.out.write_all(&header.encode())?;
            self.out.flush()
        };
        write_rest().map_err(DataError::io(&self.file, "written"))?;
        files::publish(self.out.get_ref(), &self.file)?;
        Ok(ShardEntry {
            name: self.file.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            tokens: header.tokens,
            documents: header.documents,
            source_bytes: header.source_bytes,
            digest: header.digest,
        })
    }

    fn write(&mut self, tokens: &[u32]) -> Result<(), DataError> {
        self.bytes.clear();
        if width(&self.tokenizer) == 2 {
            self.bytes.extend(tokens.iter().flat_map(|&token| (token as u16).to_le_bytes()));
        } else {
            self.bytes.extend(tokens.iter().flat_map(|token| token.to_le_bytes()));
        }
        self.digest.update(&self.bytes);
        let mut rest = self.bytes.as_slice();
        while !rest.is_empty() {
            let (head, tail) = rest.split_at(rest.len().min(BLOCK_BYTES - self.block_fill));
            self.block.update(head);
            self.block_fill += head.len();
            rest = tail;
            if self.block_fill == BLOCK_BYTES {
                end_block(&mut self.block, &mut self.block_fill, &mut self.index);
            }
        }
        self.out.write_all(&self.bytes).map_err(DataError::io(&self.file, "written"))
    }
}

fn end_block(block: &mut crc32fast::Hasher, fill: &mut usize, index: &mut Index) {
    index.block_checksums.push(std::mem::take(block).finalize());
    *fill = 0;
}

/// Bytes per token: 2 where every id of the tokenizer fits, else 4.
fn width(tokenizer: &Tokenizer) -> u32 {
    if tokenizer.vocab_size() <= 1 << 16 { 2 } else { 4 }
}
