//! Token files of other programs, read as they are: llm.c's `.bin`, nanoGPT's raw `.bin`, and Megatron's or
//! GPT-NeoX's `.bin` with `.idx`. Owns how each is laid out and that nothing in it is believed unchecked;
//! refuses to know samples and order.
//!
//! None of them says what made its tokens: GPT-2's are assumed.

use crate::mmap::Map;
use crate::{DataError, Tokenizer};
use std::fmt;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// Whose layout a token file has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// llm.c: a header of 1024 bytes, then u16; end-of-text stands before each document.
    LlmC,
    /// nanoGPT: u16 and nothing else; end-of-text stands after each document.
    NanoGpt,
    /// Megatron-LM and GPT-NeoX: raw tokens, and an index of sequences and documents beside them.
    Megatron,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Format::LlmC => "llm.c",
            Format::NanoGpt => "nanoGPT",
            Format::Megatron => "Megatron",
        })
    }
}

/// llm.c's header: 256 i32, of which the first three are these.
pub(crate) const LLMC_MAGIC: u32 = 20_240_520;
pub(crate) const LLMC_VERSION: u32 = 1;
pub(crate) const LLMC_HEADER_BYTES: usize = 1024;

/// The first bytes of a Megatron index, and what follows them up to the tables.
pub(crate) const INDEX_MAGIC: [u8; 9] = *b"MMIDIDX\0\0";
pub(crate) const INDEX_HEADER_BYTES: usize = 34;

/// An open token file of another program.
#[derive(Debug)]
pub(crate) struct Foreign {
    file: PathBuf,
    pub(crate) format: Format,
    map: Map,
    /// Where the tokens start in the file.
    offset: usize,
    kind: TokenKind,
    tokens: u64,
    index: Option<MegatronIndex>,
    tokenizer: Tokenizer,
    digest: [u8; 32],
    /// First token of each document, found by reading all tokens once; not for Megatron.
    starts: OnceLock<Vec<u64>>,
    source_bytes: OnceLock<u64>,
}

/// How a token lies on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum TokenKind {
    U8,
    I8,
    I16,
    U16,
    I32,
    I64,
}

impl TokenKind {
    /// Of a code in Megatron's index. Megatron and GPT-NeoX have the same codes but for 6 and 7, which
    /// are both floats, in either order: what they say of tokens is wrong in both.
    fn of_code(code: u8) -> Result<TokenKind, String> {
        match code {
            1 => Ok(TokenKind::U8),
            2 => Ok(TokenKind::I8),
            3 => Ok(TokenKind::I16),
            4 => Ok(TokenKind::I32),
            5 => Ok(TokenKind::I64),
            8 => Ok(TokenKind::U16),
            6 | 7 => Err(format!(
                "dtype code {code} at byte 17 is a float (float64 and float32 in Megatron, the other way round \
                 in GPT-NeoX), and tokens are integers"
            )),
            _ => Err(format!("dtype code {code} at byte 17, expected 1 to 5 or 8")),
        }
    }

    fn width(self) -> usize {
        match self {
            TokenKind::U8 | TokenKind::I8 => 1,
            TokenKind::I16 | TokenKind::U16 => 2,
            TokenKind::I32 => 4,
            TokenKind::I64 => 8,
        }
    }

    fn widen(self, bytes: &[u8], out: &mut [i64]) {
        fn each<const N: usize>(bytes: &[u8], out: &mut [i64], get: impl Fn([u8; N]) -> i64) {
            for (out, token) in out.iter_mut().zip(bytes.as_chunks::<N>().0) {
                *out = get(*token);
            }
        }
        match self {
            TokenKind::U8 => each(bytes, out, |[byte]: [u8; 1]| byte.into()),
            TokenKind::I8 => each(bytes, out, |byte| i8::from_le_bytes(byte).into()),
            TokenKind::I16 => each(bytes, out, |bytes| i16::from_le_bytes(bytes).into()),
            TokenKind::U16 => each(bytes, out, |bytes| u16::from_le_bytes(bytes).into()),
            TokenKind::I32 => each(bytes, out, |bytes| i32::from_le_bytes(bytes).into()),
            TokenKind::I64 => each(bytes, out, i64::from_le_bytes),
        }
    }
}

/// The token and index files that a path stands for, if it is another program's: a `.bin`, an `.idx`, or
/// what the two have in common.
pub(crate) fn find(path: &Path) -> Option<(PathBuf, Option<PathBuf>)> {
    let with = |extension: &str| {
        let mut name = path.as_os_str().to_owned();
        name.push(extension);
        PathBuf::from(name)
    };
    let pair = |bin: PathBuf, idx: PathBuf| idx.is_file().then_some((bin, Some(idx)));
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("bin") if path.is_file() => {
            pair(path.into(), path.with_extension("idx")).or(Some((path.into(), None)))
        }
        Some("idx") if path.is_file() => Some((path.with_extension("bin"), Some(path.into()))),
        _ if path.exists() => None,
        _ => pair(with(".bin"), with(".idx")),
    }
}

impl Foreign {
    /// Opens a token file with its index, if it has one.
    ///
    /// # Errors
    /// What can be known from headers and sizes.
    pub(crate) fn open(
        file: &Path,
        index: Option<&Path>,
        tokenizer: Tokenizer,
    ) -> Result<Foreign, DataError> {
        let map = map(file)?;
        let index = index.map(MegatronIndex::open).transpose()?;
        let magic = map.bytes().first_chunk().map(|first| u32::from_le_bytes(*first));
        let (format, offset, kind) = match &index {
            Some(index) => (Format::Megatron, 0, index.kind),
            None if magic == Some(LLMC_MAGIC) => (Format::LlmC, LLMC_HEADER_BYTES, TokenKind::U16),
            None => (Format::NanoGpt, 0, TokenKind::U16),
        };
        let got = map.bytes().len() as u64;
        let expected = match (&index, format) {
            (_, Format::LlmC) => llmc_bytes(map.bytes(), file)?,
            (Some(index), _) => index.token_bytes()?,
            _ => got / 2 * 2,
        };
        if got < expected {
            return Err(DataError::Truncated { file: file.into(), got, expected });
        }
        if got > expected {
            return Err(DataError::TooLong { file: file.into(), got, expected });
        }
        let tokens = (expected - offset as u64) / kind.width() as u64;
        let digest = digest_of(format, kind, map.bytes(), index.as_ref());
        let (starts, source_bytes) = (OnceLock::new(), OnceLock::new());
        let file = file.to_path_buf();
        Ok(Foreign {
            file,
            format,
            map,
            offset,
            kind,
            tokens,
            index,
            tokenizer,
            digest,
            starts,
            source_bytes,
        })
    }

    pub(crate) fn file(&self) -> &Path {
        &self.file
    }

    pub(crate) fn tokens(&self) -> u64 {
        self.tokens
    }

    pub(crate) fn digest(&self) -> [u8; 32] {
        self.digest
    }

    /// Number of documents; but for Megatron's this reads all tokens, once.
    pub(crate) fn documents(&self) -> u64 {
        match &self.index {
            Some(index) => index.documents,
            None => self.starts().len() as u64,
        }
    }

    /// Bytes of text, by the tokens' own lengths; reads all tokens, once.
    pub(crate) fn source_bytes(&self) -> u64 {
        *self.source_bytes.get_or_init(|| {
            let vocab_size = self.tokenizer.vocab_size() as u32;
            let lengths: Vec<u64> =
                (0..vocab_size).map(|token| self.tokenizer.byte_len(token) as u64).collect();
            let mut sum = 0;
            self.scan(|_, tokens| {
                let length = |&token: &i64| usize::try_from(token).ok().and_then(|token| lengths.get(token));
                sum += tokens.iter().filter_map(length).sum::<u64>();
            });
            sum
        })
    }

    /// Fills `out` with the tokens from `start` on; the caller has checked that they are there.
    ///
    /// # Errors
    /// A token outside the vocabulary.
    pub(crate) fn read(&self, start: u64, out: &mut [i64]) -> Result<(), DataError> {
        let width = self.kind.width();
        let from = self.offset + start as usize * width;
        self.kind.widen(&self.map.bytes()[from..from + out.len() * width], out);
        let vocab_size = self.tokenizer.vocab_size();
        match out.iter().position(|&token| token < 0 || token >= vocab_size as i64) {
            None => Ok(()),
            Some(i) => {
                let (position, token) = (start + i as u64, out[i]);
                let offset = (from + i * width) as u64;
                Err(DataError::ForeignToken { file: self.file.clone(), position, offset, token, vocab_size })
            }
        }
    }

    /// The positions of the n-th document's tokens.
    ///
    /// # Errors
    /// An index that leads astray.
    pub(crate) fn document(&self, n: u64) -> Result<Range<u64>, DataError> {
        match &self.index {
            Some(index) => index.document(n),
            None => {
                let starts = self.starts();
                let end = starts.get(n as usize + 1).copied().unwrap_or(self.tokens);
                Ok(starts.get(n as usize).copied().unwrap_or(end)..end)
            }
        }
    }

    /// Which document a token belongs to.
    ///
    /// # Errors
    /// An index that leads astray.
    pub(crate) fn document_number(&self, token: u64) -> Result<u64, DataError> {
        let after = match &self.index {
            Some(index) => index.documents_up_to(token)?,
            None => self.starts().partition_point(|&start| start <= token) as u64,
        };
        Ok(after.saturating_sub(1))
    }

    /// The tokens of a document without the end-of-text before or behind it.
    pub(crate) fn bare(&self, tokens: Range<u64>) -> Result<Range<u64>, DataError> {
        if tokens.is_empty() {
            return Ok(tokens);
        }
        let end_of_text = i64::from(self.tokenizer.end_of_text());
        let at = match self.format {
            Format::LlmC => tokens.start,
            _ => tokens.end - 1,
        };
        let mut token = [0];
        self.read(at, &mut token)?;
        Ok(match (token[0] == end_of_text, self.format) {
            (false, _) => tokens,
            (true, Format::LlmC) => tokens.start + 1..tokens.end,
            (true, _) => tokens.start..tokens.end - 1,
        })
    }

    /// Reads everything: all tokens against the vocabulary, all of the index.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub(crate) fn verify(&self) -> Result<(), DataError> {
        if let Some(index) = &self.index {
            index.verify()?;
        }
        let mut buffer = vec![0; SCAN_TOKENS];
        for start in (0..self.tokens).step_by(SCAN_TOKENS) {
            let len = (self.tokens - start).min(SCAN_TOKENS as u64) as usize;
            self.read(start, &mut buffer[..len])?;
        }
        Ok(())
    }

    fn starts(&self) -> &[u64] {
        self.starts.get_or_init(|| {
            let end_of_text = i64::from(self.tokenizer.end_of_text());
            let after = u64::from(self.format != Format::LlmC);
            let mut starts = vec![];
            starts.extend((self.tokens > 0).then_some(0));
            self.scan(|first, tokens| {
                let ends = (first..).zip(tokens).filter(|(_, token)| **token == end_of_text);
                starts.extend(ends.map(|(at, _)| at + after).filter(|&at| at > 0 && at < self.tokens));
            });
            starts
        })
    }

    fn scan(&self, mut each: impl FnMut(u64, &[i64])) {
        let mut buffer = vec![0; SCAN_TOKENS];
        let bytes = &self.map.bytes()[self.offset..];
        for (i, piece) in bytes.chunks(SCAN_TOKENS * self.kind.width()).enumerate() {
            let len = piece.len() / self.kind.width();
            self.kind.widen(piece, &mut buffer[..len]);
            each((i * SCAN_TOKENS) as u64, &buffer[..len]);
        }
    }
}

const SCAN_TOKENS: usize = 1 << 16;

fn map(file: &Path) -> Result<Map, DataError> {
    let open = File::open(file).map_err(DataError::io(file, "opened"))?;
    Map::of(&open).map_err(DataError::io(file, "mapped into memory"))
}

/// How long llm.c's header says that its file is.
fn llmc_bytes(bytes: &[u8], file: &Path) -> Result<u64, DataError> {
    if bytes.len() < LLMC_HEADER_BYTES {
        let (got, expected) = (bytes.len() as u64, LLMC_HEADER_BYTES as u64);
        return Err(DataError::Truncated { file: file.into(), got, expected });
    }
    let word =
        |i: usize| u32::from_le_bytes([bytes[4 * i], bytes[4 * i + 1], bytes[4 * i + 2], bytes[4 * i + 3]]);
    if word(1) != LLMC_VERSION {
        let (got, expected) = (word(1), LLMC_VERSION);
        return Err(DataError::UnknownVersion { file: file.into(), got, expected });
    }
    Ok(LLMC_HEADER_BYTES as u64 + 2 * u64::from(word(2)))
}

/// What a run knows the file by: its length and a sample of its bytes, 4 KiB from each of 256 places spread
/// evenly over it (all of it, if it has fewer), and its index. Reading all of a file of a hundred gigabytes
/// at every start is not an option, and the formats have no digest of their own.
fn digest_of(format: Format, kind: TokenKind, bytes: &[u8], index: Option<&MegatronIndex>) -> [u8; 32] {
    const PLACES: usize = 256;
    const PAGE: usize = 4096;
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"phalanx foreign tokens 1");
    hasher.update(&[format as u8, kind as u8]);
    for bytes in [Some(bytes), index.map(|index| index.map.bytes())].into_iter().flatten() {
        hasher.update(&(bytes.len() as u64).to_le_bytes());
        if bytes.len() <= PLACES * PAGE {
            hasher.update(bytes);
            continue;
        }
        for place in 0..PLACES {
            let start = (bytes.len() - PAGE) / (PLACES - 1) * place;
            hasher.update(&bytes[start..start + PAGE]);
        }
    }
    *hasher.finalize().as_bytes()
}

/// Megatron's index: lengths (i32) and byte offsets (i64) of sequences, then the first sequence of each
/// document (i64) and one past the last. Looked up in the file, and checked there.
#[derive(Debug)]
struct MegatronIndex {
    file: PathBuf,
    map: Map,
    kind: TokenKind,
    sequences: u64,
    documents: u64,
}

impl MegatronIndex {
    fn open(file: &Path) -> Result<MegatronIndex, DataError> {
        let map = map(file)?;
        let bytes = map.bytes();
        let fail = |what: String| DataError::ForeignIndex { file: file.into(), what };
        if bytes.len() < INDEX_HEADER_BYTES {
            let (got, expected) = (bytes.len() as u64, INDEX_HEADER_BYTES as u64);
            return Err(DataError::Truncated { file: file.into(), got, expected });
        }
        if bytes[..9] != INDEX_MAGIC {
            return Err(fail(format!("starts with {:02x?}, expected {INDEX_MAGIC:02x?}", &bytes[..9])));
        }
        let word = |at: usize| bytes[at..].first_chunk().map_or(0, |word| u64::from_le_bytes(*word));
        let (version, sequences, ends) = (word(9), word(18), word(26));
        if version != 1 {
            return Err(fail(format!("version {version} at byte 9, expected 1")));
        }
        let kind = TokenKind::of_code(bytes[17]).map_err(fail)?;
        let documents = ends.checked_sub(1).ok_or_else(|| {
            fail("0 document boundaries at byte 26, expected one more than documents".into())
        })?;
        let tables = sequences.checked_mul(12).zip(ends.checked_mul(8));
        let expected = tables
            .and_then(|(sequences, ends)| sequences.checked_add(ends)?.checked_add(INDEX_HEADER_BYTES as u64))
            .ok_or_else(|| fail(format!("{sequences} sequences and {ends} boundaries fit no file")))?;
        let got = bytes.len() as u64;
        if got < expected {
            return Err(DataError::Truncated { file: file.into(), got, expected });
        }
        // Megatron's multimodal index has one more byte for each sequence.
        if got != expected && Some(got) != expected.checked_add(sequences) {
            return Err(DataError::TooLong { file: file.into(), got, expected });
        }
        Ok(MegatronIndex { file: file.into(), map, kind, sequences, documents })
    }

    /// Bytes of tokens that the index speaks of.
    fn token_bytes(&self) -> Result<u64, DataError> {
        self.sequence_start(self.sequences)
    }

    /// Where sequence n starts in the token file, in bytes; the end of the last for n = `sequences`.
    /// Sequences lie end to end.
    fn sequence_start(&self, n: u64) -> Result<u64, DataError> {
        let Some(last) = n.checked_sub(1) else {
            return match self.sequences == 0 || self.i64_at(self.pointer_at(0)) == 0 {
                true => Ok(0),
                false => Err(self.fail(self.pointer_at(0), "the first sequence does not start at byte 0")),
            };
        };
        let (pointer_at, length_at) = (self.pointer_at(last), INDEX_HEADER_BYTES + 4 * last as usize);
        let length = self.map.bytes()[length_at..].first_chunk().map_or(-1, |word| i32::from_le_bytes(*word));
        let pointer = u64::try_from(self.i64_at(pointer_at));
        let (Ok(length), Ok(pointer)) = (u64::try_from(length), pointer) else {
            return Err(self.fail(length_at, &format!("sequence {last} has a negative length or offset")));
        };
        let end = length.checked_mul(self.kind.width() as u64).and_then(|bytes| pointer.checked_add(bytes));
        let end = end.filter(|end| end.is_multiple_of(self.kind.width() as u64));
        let end = end.ok_or_else(|| {
            self.fail(pointer_at, &format!("sequence {last} has {length} tokens from byte {pointer} on"))
        })?;
        if n < self.sequences && self.i64_at(self.pointer_at(n)) != end as i64 {
            let next = self.i64_at(self.pointer_at(n));
            let what =
                format!("sequence {n} starts at byte {next}, expected {end}, where the one before ends");
            return Err(self.fail(self.pointer_at(n), &what));
        }
        Ok(end)
    }

    /// The first token of document n, or one past the last for n = `documents`.
    fn document_start(&self, n: u64) -> Result<u64, DataError> {
        let at = INDEX_HEADER_BYTES + 12 * self.sequences as usize + 8 * n as usize;
        let sequence = self.i64_at(at);
        match u64::try_from(sequence).ok().filter(|&sequence| sequence <= self.sequences) {
            Some(sequence) => Ok(self.sequence_start(sequence)? / self.kind.width() as u64),
            None => {
                let sequences = self.sequences;
                let what =
                    format!("document {n} starts at sequence {sequence}, expected at most {sequences}");
                Err(self.fail(at, &what))
            }
        }
    }

    fn document(&self, n: u64) -> Result<Range<u64>, DataError> {
        let (start, end) = (self.document_start(n)?, self.document_start(n + 1)?);
        let last = n + 1 == self.documents;
        let tokens = self.token_bytes()? / self.kind.width() as u64;
        if start > end || (n == 0 && start != 0) || (last && end != tokens) {
            let at = INDEX_HEADER_BYTES + 12 * self.sequences as usize + 8 * n as usize;
            let what =
                format!("document {n} has tokens {start}..{end}, expected a part of 0..{tokens}, rising");
            return Err(self.fail(at, &what));
        }
        Ok(start..end)
    }

    /// How many documents start at or before a token.
    fn documents_up_to(&self, token: u64) -> Result<u64, DataError> {
        let (mut low, mut high) = (0, self.documents);
        while low < high {
            let middle = low + (high - low) / 2;
            if self.document_start(middle)? <= token { low = middle + 1 } else { high = middle }
        }
        Ok(low)
    }

    fn verify(&self) -> Result<(), DataError> {
        (0..=self.sequences).try_for_each(|n| self.sequence_start(n).map(drop))?;
        (0..self.documents).try_for_each(|n| self.document(n).map(drop))
    }

    fn pointer_at(&self, n: u64) -> usize {
        INDEX_HEADER_BYTES + 4 * self.sequences as usize + 8 * n as usize
    }

    fn i64_at(&self, at: usize) -> i64 {
        self.map.bytes()[at..].first_chunk().map_or(-1, |word| i64::from_le_bytes(*word))
    }

    fn fail(&self, at: usize, what: &str) -> DataError {
        DataError::ForeignIndex { file: self.file.clone(), what: format!("{what} (at byte {at})") }
    }
}
