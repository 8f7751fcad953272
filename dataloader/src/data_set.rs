//! A data set: a folder of shards read as one sequence of tokens. Owns where each shard lies in it;
//! refuses to know samples, order and ranks.

use crate::files::hex;
use crate::{DataError, Manifest, Shard, ShardEntry, Tokenizer};
use std::ops::Range;
use std::path::{Path, PathBuf};

/// An open data set. Threads may share it.
#[derive(Debug)]
pub struct DataSet {
    folder: PathBuf,
    manifest: Manifest,
    tokenizer: Tokenizer,
    shards: Vec<Shard>,
    /// First token of each shard, and the number of tokens at the end.
    token_starts: Vec<u64>,
    /// First document of each shard, and the number of documents at the end.
    document_starts: Vec<u64>,
}

/// Where a document came from and where its tokens are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DocumentInfo<'a> {
    /// Its number in the data set, from 0.
    pub number: u64,
    /// The source file, as it was named when the data set was prepared.
    pub file: &'a str,
    /// Line or record of the source file, from 1.
    pub record: u64,
    /// The shard that holds its tokens, a file of the data set's folder.
    pub shard: &'a str,
    /// Bytes of text.
    pub source_bytes: u64,
    /// Positions of its tokens in the data set, end-of-text included.
    pub tokens: Range<u64>,
}

/// What [`DataSet::verify`] read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verified {
    /// Shards.
    pub shards: u64,
    /// Blocks of tokens whose checksums are right.
    pub blocks: u64,
    /// Tokens, all within the vocabulary.
    pub tokens: u64,
    /// Documents, all in their places.
    pub documents: u64,
}

impl DataSet {
    /// Opens a data set: the manifest, and of each shard the header, the size and the root of the
    /// index. Takes the same time however many tokens a shard has.
    ///
    /// # Errors
    /// No data set there, and all that can be known without reading tokens.
    pub fn open(folder: &Path) -> Result<DataSet, DataError> {
        let manifest = Manifest::read(folder)?;
        let tokenizer = manifest.tokenizer_in(&folder.join(crate::MANIFEST_NAME))?;
        let mut shards = Vec::new();
        for entry in &manifest.shards {
            let shard = Shard::open(&folder.join(&entry.name), &tokenizer)?;
            check_entry(&shard, entry)?;
            shards.push(shard);
        }
        let token_starts = starts(shards.iter().map(Shard::tokens));
        let document_starts = starts(shards.iter().map(Shard::documents));
        Ok(DataSet { folder: folder.into(), manifest, tokenizer, shards, token_starts, document_starts })
    }

    /// The folder that it was opened from.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// What its manifest says.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Number of tokens.
    pub fn tokens(&self) -> u64 {
        self.manifest.tokens
    }

    /// Number of documents.
    pub fn documents(&self) -> u64 {
        self.manifest.documents
    }

    /// Bytes of text that the tokens stand for; end-of-text stands for none.
    pub fn source_bytes(&self) -> u64 {
        self.manifest.source_bytes
    }

    /// Every token is less than this.
    pub fn vocab_size(&self) -> usize {
        self.tokenizer.vocab_size()
    }

    /// What made the tokens.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// BLAKE3 of the shards' digests in order: the same tokens in the same shards have the same.
    pub fn digest(&self) -> [u8; 32] {
        self.manifest.digest
    }

    /// Fills `out` with the tokens from `start` on, across shards.
    ///
    /// # Errors
    /// Past the end; a damaged block, the first time that it is touched; a token outside the
    /// vocabulary.
    pub fn read(&self, start: u64, out: &mut [i64]) -> Result<(), DataError> {
        let end = start.saturating_add(out.len() as u64);
        let tokens = self.tokens();
        if end > tokens {
            return Err(DataError::OutOfRange { place: self.folder.clone(), start, end, tokens });
        }
        let (mut position, mut rest) = (start, out);
        while !rest.is_empty() {
            let shard = holder(&self.token_starts, position);
            let left = self.token_starts[shard + 1] - position;
            let here = usize::try_from(left).unwrap_or(usize::MAX).min(rest.len());
            let (now, later) = rest.split_at_mut(here);
            self.shards[shard].read(position - self.token_starts[shard], now)?;
            (position, rest) = (position + here as u64, later);
        }
        Ok(())
    }

    /// The document that a token belongs to.
    ///
    /// # Errors
    /// Past the end, or an index that leads astray.
    pub fn document_at(&self, token: u64) -> Result<DocumentInfo<'_>, DataError> {
        self.require(token, self.tokens())?;
        let shard = holder(&self.token_starts, token);
        let number = self.shards[shard].document_number(token - self.token_starts[shard])?;
        self.document_in(shard, number)
    }

    /// The n-th document, from 0.
    ///
    /// # Errors
    /// Past the end, or an index that leads astray.
    pub fn document(&self, n: u64) -> Result<DocumentInfo<'_>, DataError> {
        if n >= self.documents() {
            let (document, documents) = (n, self.documents());
            return Err(DataError::NoSuchDocument { folder: self.folder.clone(), document, documents });
        }
        let shard = holder(&self.document_starts, n);
        self.document_in(shard, n - self.document_starts[shard])
    }

    /// The text of a range of tokens.
    ///
    /// # Errors
    /// Those of [`DataSet::read`].
    pub fn text(&self, tokens: Range<u64>) -> Result<Vec<u8>, DataError> {
        let mut text = Vec::new();
        let mut buffer = Vec::new();
        let mut ids = Vec::new();
        for start in tokens.clone().step_by(TEXT_TOKENS) {
            buffer.resize((tokens.end - start).min(TEXT_TOKENS as u64) as usize, 0);
            self.read(start, &mut buffer)?;
            ids.clear();
            ids.extend(buffer.iter().map(|&token| token as u32)); // read() keeps it below vocab_size
            text.extend(self.tokenizer.decode(&ids));
        }
        Ok(text)
    }

    /// Reads and checks everything.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn verify(&self) -> Result<Verified, DataError> {
        let mut blocks = 0;
        for shard in &self.shards {
            blocks += shard.verify(self.manifest.sources.len() as u64)?;
        }
        let shards = self.shards.len() as u64;
        Ok(Verified { shards, blocks, tokens: self.tokens(), documents: self.documents() })
    }

    fn document_in(&self, shard: usize, n: u64) -> Result<DocumentInfo<'_>, DataError> {
        let sources = &self.manifest.sources;
        let (document, tokens) = self.shards[shard].document(n)?;
        self.shards[shard].check_source(n, &document, sources.len() as u64)?;
        let first = self.token_starts[shard];
        Ok(DocumentInfo {
            number: self.document_starts[shard] + n,
            file: &sources[document.source as usize],
            record: document.record,
            shard: &self.manifest.shards[shard].name,
            source_bytes: document.source_bytes,
            tokens: first + tokens.start..first + tokens.end,
        })
    }

    fn require(&self, token: u64, tokens: u64) -> Result<(), DataError> {
        if token < tokens {
            return Ok(());
        }
        let (place, end) = (self.folder.clone(), token.saturating_add(1));
        Err(DataError::OutOfRange { place, start: token, end, tokens })
    }
}

/// The vocabulary size of a prepared data set, from its manifest alone; the error is ready to print.
/// What `configs::load` asks for.
///
/// # Errors
/// No data set there, or a manifest that cannot be used.
pub fn vocab_size(folder: &Path) -> Result<usize, String> {
    Manifest::read(folder)
        .and_then(|manifest| manifest.tokenizer_in(&folder.join(crate::MANIFEST_NAME)))
        .map(|tokenizer| tokenizer.vocab_size())
        .map_err(|error| error.to_string())
}

/// Tokens that are decoded at a time.
const TEXT_TOKENS: usize = 1 << 16;

fn check_entry(shard: &Shard, entry: &ShardEntry) -> Result<(), DataError> {
    for (what, got, expected) in [
        ("number of tokens", shard.tokens().to_string(), entry.tokens.to_string()),
        ("number of documents", shard.documents().to_string(), entry.documents.to_string()),
        ("number of source bytes", shard.source_bytes().to_string(), entry.source_bytes.to_string()),
        ("content digest", hex(&shard.digest()), hex(&entry.digest)),
    ] {
        if got != expected {
            return Err(DataError::ShardDiffers { file: shard.file().into(), what, got, expected });
        }
    }
    Ok(())
}

/// Running sums from 0 on. They fit: the manifest was checked, and the shards agree with it.
fn starts(lengths: impl Iterator<Item = u64>) -> Vec<u64> {
    let mut starts = vec![0];
    let mut sum = 0u64;
    for length in lengths {
        sum = sum.saturating_add(length);
        starts.push(sum);
    }
    starts
}

/// Which shard holds a position that lies below the last of `starts`.
fn holder(starts: &[u64], position: u64) -> usize {
    starts.partition_point(|&start| start <= position) - 1
}
