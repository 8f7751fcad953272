//! A data set: a folder of shards, or a token file of another program, read as one sequence of tokens.
//! Owns where each shard lies in it; refuses to know samples, order and ranks.

use crate::files::hex;
use crate::foreign::{self, Foreign};
use crate::{DataError, Format, Manifest, Shard, ShardEntry, Tokenizer};
use std::ops::Range;
use std::path::{Path, PathBuf};

/// An open data set. Threads may share it.
#[derive(Debug)]
pub struct DataSet {
    folder: PathBuf,
    tokenizer: Tokenizer,
    content: Content,
}

#[derive(Debug)]
enum Content {
    Shards(Box<Shards>),
    Foreign(Box<Foreign>),
}

/// The shards of a folder.
#[derive(Debug)]
struct Shards {
    manifest: Manifest,
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
    /// Bytes of text; 0 where only reading it would tell.
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
    /// index. Takes the same time however many tokens a shard has. A `.bin`, an `.idx`, or what two of
    /// these have in common, is a token file of llm.c, nanoGPT or Megatron, whose tokens are taken for
    /// GPT-2's.
    ///
    /// # Errors
    /// No data set there, and all that can be known without reading tokens.
    pub fn open(folder: &Path) -> Result<DataSet, DataError> {
        if let Some((file, index)) = foreign::find(folder) {
            let tokenizer = Tokenizer::Gpt2;
            let foreign = Foreign::open(&file, index.as_deref(), tokenizer.clone())?;
            return Ok(DataSet {
                folder: folder.into(),
                tokenizer,
                content: Content::Foreign(Box::new(foreign)),
            });
        }
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
        let content = Content::Shards(Box::new(Shards { manifest, shards, token_starts, document_starts }));
        Ok(DataSet { folder: folder.into(), tokenizer, content })
    }

    /// The folder, or file, that it was opened from.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// What its manifest says, if it is a folder of ours.
    pub fn manifest(&self) -> Option<&Manifest> {
        match &self.content {
            Content::Shards(shards) => Some(&shards.manifest),
            Content::Foreign(_) => None,
        }
    }

    /// Whose token file it is, if it is another program's.
    pub fn format(&self) -> Option<Format> {
        match &self.content {
            Content::Shards(_) => None,
            Content::Foreign(foreign) => Some(foreign.format),
        }
    }

    /// Number of tokens.
    pub fn tokens(&self) -> u64 {
        match &self.content {
            Content::Shards(shards) => shards.manifest.tokens,
            Content::Foreign(foreign) => foreign.tokens(),
        }
    }

    /// Number of documents. Of llm.c's and nanoGPT's files this reads all tokens, once.
    pub fn documents(&self) -> u64 {
        match &self.content {
            Content::Shards(shards) => shards.manifest.documents,
            Content::Foreign(foreign) => foreign.documents(),
        }
    }

    /// Bytes of text that the tokens stand for; end-of-text stands for none. Of other programs' files
    /// this reads all tokens, once, and adds their lengths.
    pub fn source_bytes(&self) -> u64 {
        match &self.content {
            Content::Shards(shards) => shards.manifest.source_bytes,
            Content::Foreign(foreign) => foreign.source_bytes(),
        }
    }

    /// Every token is less than this.
    pub fn vocab_size(&self) -> usize {
        self.tokenizer.vocab_size()
    }

    /// What made the tokens.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// BLAKE3 of the shards' digests in order: the same tokens in the same shards have the same. Of other
    /// programs' files, that of their length and a sample of their bytes (docs/FORMATS.md).
    pub fn digest(&self) -> [u8; 32] {
        match &self.content {
            Content::Shards(shards) => shards.manifest.digest,
            Content::Foreign(foreign) => foreign.digest(),
        }
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
        match &self.content {
            Content::Shards(shards) => shards.read(start, out),
            Content::Foreign(foreign) => foreign.read(start, out),
        }
    }

    /// The document that a token belongs to.
    ///
    /// # Errors
    /// Past the end, or an index that leads astray.
    pub fn document_at(&self, token: u64) -> Result<DocumentInfo<'_>, DataError> {
        let tokens = self.tokens();
        if token >= tokens {
            let (place, end) = (self.folder.clone(), token.saturating_add(1));
            return Err(DataError::OutOfRange { place, start: token, end, tokens });
        }
        match &self.content {
            Content::Shards(shards) => {
                let shard = holder(&shards.token_starts, token);
                let number = shards.shards[shard].document_number(token - shards.token_starts[shard])?;
                shards.document_in(shard, number)
            }
            Content::Foreign(foreign) => of_foreign(foreign, foreign.document_number(token)?),
        }
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
        match &self.content {
            Content::Shards(shards) => {
                let shard = holder(&shards.document_starts, n);
                shards.document_in(shard, n - shards.document_starts[shard])
            }
            Content::Foreign(foreign) => of_foreign(foreign, n),
        }
    }

    /// The positions of the n-th document's tokens, without end-of-text.
    pub(crate) fn bare_document(&self, n: u64) -> Result<Range<u64>, DataError> {
        let tokens = self.document(n)?.tokens;
        match &self.content {
            Content::Shards(_) => Ok(tokens.start..tokens.end - 1),
            Content::Foreign(foreign) => foreign.bare(tokens),
        }
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
        let (mut shards, mut blocks) = (1, 0);
        match &self.content {
            Content::Shards(content) => {
                shards = content.shards.len() as u64;
                for shard in &content.shards {
                    blocks += shard.verify(content.manifest.sources.len() as u64)?;
                }
            }
            Content::Foreign(foreign) => foreign.verify()?,
        }
        Ok(Verified { shards, blocks, tokens: self.tokens(), documents: self.documents() })
    }
}

/// The n-th document of another program's file.
fn of_foreign(foreign: &Foreign, n: u64) -> Result<DocumentInfo<'_>, DataError> {
    let tokens = foreign.document(n)?;
    let name = foreign.file().file_name().and_then(|name| name.to_str()).unwrap_or("?");
    let file = foreign.file().to_str().unwrap_or(name);
    // What a document's own bytes are would take reading it.
    Ok(DocumentInfo { number: n, file, record: n + 1, shard: name, source_bytes: 0, tokens })
}

impl Shards {
    fn read(&self, start: u64, out: &mut [i64]) -> Result<(), DataError> {
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
}

/// The vocabulary size of a data set, from its manifest alone or that it is another program's; the error is ready to print.
/// What `configs::load` asks for.
///
/// # Errors
/// No data set there, or a manifest that cannot be used.
pub fn vocab_size(folder: &Path) -> Result<usize, String> {
    if foreign::find(folder).is_some() {
        return Ok(Tokenizer::Gpt2.vocab_size());
    }
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

#[cfg(test)]
mod tests {
    /// Half a gigabyte of files, so only in `make test-full`.
    mod whole_table {
        use crate::header::{HEADER_BYTES, Header, index_offset, padded_id};
        use crate::index::{Document, Index};
        use crate::{BLOCK_BYTES, DataSet, Manifest, ShardEntry, Tokenizer};
        use std::fs::File;
        use std::io::{Seek, SeekFrom, Write};
        use std::time::Instant;

        const SHARDS: u64 = 100;
        const TOKENS: u64 = 100_000_000;
        const DOCUMENTS: u64 = 100_000;

        #[test]
        fn ten_billion_tokens_in_ten_million_documents_open_at_once() {
            let scratch = tempfile::tempdir().unwrap();
            let tokenizer = Tokenizer::Gpt2;
            let step = TOKENS / DOCUMENTS;
            let documents = (0..DOCUMENTS).map(|n| Document {
                first_token: n * step,
                source: 0,
                record: n + 1,
                source_bytes: 4 * step,
            });
            let blocks = (2 * TOKENS).div_ceil(BLOCK_BYTES as u64) as usize;
            let index = Index { documents: documents.collect(), block_checksums: vec![0; blocks] }.archive();
            let header = Header {
                token_width: 2,
                tokens: TOKENS,
                documents: DOCUMENTS,
                source_bytes: 4 * TOKENS,
                payload_bytes: 2 * TOKENS,
                index_offset: index_offset(2 * TOKENS),
                index_bytes: index.len() as u64,
                index_checksum: crc32fast::hash(&index),
                tokenizer_id: padded_id(tokenizer.id()),
                tokenizer_digest: tokenizer.digest(),
                digest: [7; 32],
            };
            let shards = (0..SHARDS).map(|n| {
                let name = format!("shard-{n:05}.tokens");
                let mut file = File::create(scratch.path().join(&name)).unwrap();
                file.write_all(&header.encode()).unwrap();
                assert_eq!(HEADER_BYTES, 256);
                file.seek(SeekFrom::Start(header.index_offset)).unwrap(); // the payload is a hole
                file.write_all(&index).unwrap();
                let (tokens, documents, source_bytes) = (TOKENS, DOCUMENTS, header.source_bytes);
                ShardEntry { name, tokens, documents, source_bytes, digest: header.digest }
            });
            Manifest::new(&tokenizer, shards.collect(), vec!["a.jsonl".into()])
                .write(scratch.path())
                .unwrap();

            let before = resident_bytes();
            let started = Instant::now();
            let data = DataSet::open(scratch.path()).unwrap();
            let (took, grown) = (started.elapsed(), resident_bytes().saturating_sub(before));
            assert_eq!((data.tokens(), data.documents()), (10_000_000_000, 10_000_000));
            assert_eq!(data.document_at(9_999_999_999).unwrap().number, 9_999_999);
            let found = format!("{took:?}, {} bytes", grown);
            assert!(took.as_millis() < 50 && grown < 50_000_000, "{found}");
            let _ = writeln!(std::io::stderr(), "opened in {found}");
        }

        /// Resident memory of this process.
        fn resident_bytes() -> u64 {
            let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
            pages.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
        }
    }
}
