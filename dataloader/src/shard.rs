//! Reading one shard. Opening checks the header, the file's size and the root of the index, whatever
//! the shard's length; a document's place is checked when it is looked up, a block's checksum when
//! it is first read, and everything by `verify`. Refuses to know the other shards.

use crate::files::hex;
use crate::header::{HEADER_BYTES, Header};
use crate::index::{ArchivedIndex, Document};
use crate::manifest::check_tokenizer;
use crate::mmap::Map;
use crate::{BLOCK_BYTES, DataError, Tokenizer};
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// One open shard: tokens on disk, read as they are asked for. Threads may share it.
#[derive(Debug)]
pub struct Shard {
    file: PathBuf,
    map: Map,
    header: Header,
    vocab_size: usize,
    /// One bit for each block whose checksum was right. Threads may check the same block twice.
    checked: Vec<AtomicU64>,
}

impl Shard {
    /// Opens a shard that `tokenizer` must have made.
    ///
    /// # Errors
    /// What can be known from the header, the file's size and the root of the index.
    pub fn open(file: &Path, tokenizer: &Tokenizer) -> Result<Shard, DataError> {
        let open = File::open(file).map_err(|source| match source.kind() {
            std::io::ErrorKind::NotFound => DataError::MissingShard { file: file.into() },
            _ => DataError::Io { file: file.into(), action: "opened", source },
        })?;
        let map = Map::of(&open).map_err(DataError::io(file, "mapped into memory"))?;
        let file_bytes = map.bytes().len();
        let header = Header::decode(&map.bytes()[..file_bytes.min(HEADER_BYTES)], file_bytes as u64, file)?;
        let id = String::from_utf8_lossy(&header.tokenizer_id);
        check_tokenizer(tokenizer, id.trim_end_matches('\0'), &header.tokenizer_digest, file)?;

        let blocks = header.payload_bytes.div_ceil(BLOCK_BYTES as u64);
        let checked = (0..blocks.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        let shard = Shard { file: file.into(), map, header, vocab_size: tokenizer.vocab_size(), checked };
        let index = shard.index()?;
        shard.check_count("documents", index.documents.len(), shard.header.documents)?;
        shard.check_count("block checksums", index.block_checksums.len(), blocks)?;
        Ok(shard)
    }

    /// The shard's file.
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// Number of tokens.
    pub fn tokens(&self) -> u64 {
        self.header.tokens
    }

    /// Number of documents.
    pub fn documents(&self) -> u64 {
        self.header.documents
    }

    /// Bytes of text that the tokens stand for.
    pub fn source_bytes(&self) -> u64 {
        self.header.source_bytes
    }

    /// BLAKE3 of the tokens as they lie on disk.
    pub fn digest(&self) -> [u8; 32] {
        self.header.digest
    }

    /// Fills `out` with the tokens from `start` on.
    ///
    /// # Errors
    /// Past the end; a damaged block, the first time that it is touched; a token outside the
    /// vocabulary.
    pub fn read(&self, start: u64, out: &mut [i64]) -> Result<(), DataError> {
        let end = start.saturating_add(out.len() as u64);
        let tokens = self.header.tokens;
        if end > tokens {
            return Err(DataError::OutOfRange { place: self.file.clone(), start, end, tokens });
        }
        let bytes = self.bytes_of(start..end);
        self.check_blocks(&bytes)?;
        self.widen(&self.payload()[bytes], out);
        self.check_vocabulary(start, out)
    }

    /// The n-th document and its tokens' positions in the shard.
    ///
    /// # Errors
    /// There is no such document, or its place is impossible.
    pub(crate) fn document(&self, n: u64) -> Result<(Document, Range<u64>), DataError> {
        let documents = &self.index()?.documents;
        let at =
            |n: u64| usize::try_from(n).ok().and_then(|n| documents.get(n)).map(|document| document.get());
        let document = at(n).ok_or_else(|| {
            self.invalid(format!("document {n} was asked for, there are {}", documents.len()))
        })?;
        let start = document.first_token;
        let end = at(n.saturating_add(1)).map_or(self.header.tokens, |next| next.first_token);
        if start >= end || end > self.header.tokens || (n == 0) != (start == 0) {
            let tokens = self.header.tokens;
            let what =
                format!("document {n} has tokens {start}..{end}, expected a part of 0..{tokens}, rising");
            return Err(self.invalid(what));
        }
        Ok((document, start..end))
    }

    /// Which document a token of the shard belongs to.
    ///
    /// # Errors
    /// The index leads to a document without that token.
    pub(crate) fn document_number(&self, token: u64) -> Result<u64, DataError> {
        let after =
            self.index()?.documents.partition_point(|document| document.first_token.to_native() <= token);
        let n = (after as u64).saturating_sub(1);
        let (_, tokens) = self.document(n)?;
        if !tokens.contains(&token) {
            let what = format!("token {token} leads to document {n} with tokens {tokens:?}");
            return Err(self.invalid(what));
        }
        Ok(n)
    }

    /// Reads and checks everything, whatever was checked before; `sources` is how many source files
    /// documents can refer to. Returns the number of blocks.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub(crate) fn verify(&self, sources: u64) -> Result<u64, DataError> {
        let (got, expected) = (crc32fast::hash(self.index_bytes()), self.header.index_checksum);
        if got != expected {
            return Err(DataError::IndexChecksum { file: self.file.clone(), got, expected });
        }
        self.verify_padding()?;
        self.verify_documents(sources)?;

        let mut digest = blake3::Hasher::new();
        let mut tokens = Vec::new();
        let width = self.header.token_width as usize;
        let mut blocks = 0;
        for block in self.payload().chunks(BLOCK_BYTES) {
            self.check_block(blocks)?;
            digest.update(block);
            tokens.resize(block.len() / width, 0);
            self.widen(block, &mut tokens);
            self.check_vocabulary(blocks as u64 * (BLOCK_BYTES / width) as u64, &tokens)?;
            blocks += 1;
        }
        let digest = *digest.finalize().as_bytes();
        if digest != self.header.digest {
            let (got, expected) = (hex(&digest), hex(&self.header.digest));
            return Err(DataError::DigestMismatch { file: self.file.clone(), got, expected });
        }
        Ok(blocks as u64)
    }

    fn verify_padding(&self) -> Result<(), DataError> {
        let end = HEADER_BYTES + self.payload().len();
        let padding = &self.map.bytes()[end..self.header.index_offset as usize];
        match padding.iter().all(|&byte| byte == 0) {
            true => Ok(()),
            false => Err(self.invalid(format!("padding before it is {padding:02x?}, expected zeros"))),
        }
    }

    fn verify_documents(&self, sources: u64) -> Result<(), DataError> {
        let mut source_bytes = 0u64;
        for n in 0..self.header.documents {
            let (document, _) = self.document(n)?;
            self.check_source(n, &document, sources)?;
            source_bytes = source_bytes.saturating_add(document.source_bytes);
        }
        let (what, got, expected) = ("source bytes", self.header.source_bytes, source_bytes);
        if got != expected {
            return Err(DataError::LengthMismatch { file: self.file.clone(), what, got, expected });
        }
        Ok(())
    }

    /// Whether a document's source is one of the manifest's.
    pub(crate) fn check_source(&self, n: u64, document: &Document, sources: u64) -> Result<(), DataError> {
        if document.source < sources {
            return Ok(());
        }
        Err(self
            .invalid(format!("document {n} is of source {}, expected less than {sources}", document.source)))
    }

    fn check_blocks(&self, bytes: &Range<usize>) -> Result<(), DataError> {
        for block in bytes.start / BLOCK_BYTES..bytes.end.div_ceil(BLOCK_BYTES) {
            let (word, bit) = (&self.checked[block / 64], 1u64 << (block % 64));
            if word.load(Ordering::Relaxed) & bit == 0 {
                self.check_block(block)?;
                word.fetch_or(bit, Ordering::Relaxed);
            }
        }
        Ok(())
    }

    fn check_block(&self, block: usize) -> Result<(), DataError> {
        let start = block * BLOCK_BYTES;
        let payload = self.payload();
        let got = crc32fast::hash(&payload[start..payload.len().min(start + BLOCK_BYTES)]);
        let Some(expected) = self.index()?.block_checksums.get(block).map(|sum| sum.to_native()) else {
            return Err(self.invalid(format!("no checksum of block {block}")));
        };
        if got != expected {
            let offset = (HEADER_BYTES + start) as u64;
            let (file, block) = (self.file.clone(), block as u64);
            return Err(DataError::BlockChecksum { file, block, offset, got, expected });
        }
        Ok(())
    }

    fn check_vocabulary(&self, start: u64, tokens: &[i64]) -> Result<(), DataError> {
        let vocab_size = self.vocab_size;
        match tokens.iter().position(|&token| token >= vocab_size as i64) {
            None => Ok(()),
            Some(i) => {
                let (position, token) = (start + i as u64, tokens[i] as u64);
                Err(DataError::TokenOutsideVocabulary {
                    file: self.file.clone(),
                    position,
                    token,
                    vocab_size,
                })
            }
        }
    }

    fn check_count(&self, what: &str, got: usize, expected: u64) -> Result<(), DataError> {
        match got as u64 == expected {
            true => Ok(()),
            false => Err(self.invalid(format!("{got} {what}, expected {expected} by the header"))),
        }
    }

    fn widen(&self, bytes: &[u8], out: &mut [i64]) {
        if self.header.token_width == 2 {
            for (out, token) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *out = i64::from(u16::from_le_bytes(*token));
            }
        } else {
            for (out, token) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                *out = i64::from(u32::from_le_bytes(*token));
            }
        }
    }

    /// Where tokens lie in the payload. The map is as long as the header says, so that a position
    /// within the shard fits a `usize`.
    fn bytes_of(&self, tokens: Range<u64>) -> Range<usize> {
        let width = self.header.token_width as usize;
        tokens.start as usize * width..tokens.end as usize * width
    }

    fn payload(&self) -> &[u8] {
        &self.map.bytes()[HEADER_BYTES..HEADER_BYTES + self.header.payload_bytes as usize]
    }

    fn index_bytes(&self) -> &[u8] {
        &self.map.bytes()[self.header.index_offset as usize..]
    }

    fn index(&self) -> Result<&ArchivedIndex, DataError> {
        ArchivedIndex::check(self.index_bytes()).map_err(|what| self.invalid(what))
    }

    fn invalid(&self, what: String) -> DataError {
        DataError::IndexInvalid { file: self.file.clone(), what }
    }
}
