//! A data set in another format: ours, llm.c's, nanoGPT's or Megatron's, to and fro. Owns how each is
//! written and where each has its end-of-text; refuses to know text.

use crate::foreign::{INDEX_MAGIC, LLMC_HEADER_BYTES, LLMC_MAGIC, LLMC_VERSION};
use crate::{DataError, DataSet, DataSetWriter, Format, files};
use std::fs::File;
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// What was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Converted {
    /// Documents.
    pub documents: u64,
    /// Tokens, end-of-text included.
    pub tokens: u64,
}

/// Tokens that are in memory at a time.
const TOKENS: usize = 1 << 16;

/// Writes a data set as a folder of ours. Documents have the number that they had as their record.
///
/// # Errors
/// Those of reading and writing.
pub fn convert_to_ours(data: &DataSet, folder: &Path, max_shard_tokens: u64) -> Result<Converted, DataError> {
    let tokenizer = data.tokenizer().clone();
    let mut writer = DataSetWriter::create(folder, tokenizer, max_shard_tokens)?;
    let mut tokens = Vec::new();
    for n in 0..data.documents() {
        tokens.clear();
        for_pieces(data, n, |piece| {
            tokens.extend(piece.iter().map(|&token| token as u32)); // below the vocabulary's size
            Ok(())
        })?;
        writer.push_tokens(0, n + 1, &tokens)?;
    }
    let manifest = writer.finish(vec![data.folder().display().to_string()])?;
    Ok(Converted { documents: manifest.documents, tokens: manifest.tokens })
}

/// Writes a data set as a token file of another program: `file`, and for Megatron the index beside it.
///
/// # Errors
/// More tokens or a larger vocabulary than the format can have, and those of reading and writing.
pub fn convert_to(data: &DataSet, format: Format, file: &Path) -> Result<Converted, DataError> {
    let vocab_size = data.vocab_size();
    let fits_u16 = vocab_size <= 1 << 16;
    if !fits_u16 && format != Format::Megatron {
        let what = format!("{format} has tokens of 16 bits, the vocabulary has {vocab_size}");
        return Err(DataError::NotConvertible { file: file.into(), what });
    }
    let end_of_text = i64::from(data.tokenizer().end_of_text());
    let mut out = Tokens::create(file, if fits_u16 { 2 } else { 4 })?;
    if format == Format::LlmC {
        out.write_bytes(&[0; LLMC_HEADER_BYTES])?; // filled in at the end
    }
    let mut lengths: Vec<i32> = Vec::new();
    for n in 0..data.documents() {
        let before = out.tokens;
        if format == Format::LlmC {
            out.write(&[end_of_text])?;
        }
        for_pieces(data, n, |piece| out.write(piece))?;
        if format != Format::LlmC {
            out.write(&[end_of_text])?;
        }
        if format == Format::Megatron {
            let length = i32::try_from(out.tokens - before).map_err(|_| {
                let what = format!(
                    "document {n} has {} tokens, Megatron's sequences less than 2^31",
                    out.tokens - before
                );
                DataError::NotConvertible { file: file.into(), what }
            })?;
            lengths.push(length);
        }
    }
    let converted = Converted { documents: data.documents(), tokens: out.tokens };
    if format == Format::LlmC {
        let count = i32::try_from(out.tokens).map_err(|_| {
            let what = format!("{} tokens, llm.c's files have less than 2^31", out.tokens);
            DataError::NotConvertible { file: file.into(), what }
        })?;
        let header = [LLMC_MAGIC, LLMC_VERSION, count as u32].map(u32::to_le_bytes);
        out.rewrite_start(header.as_flattened())?;
    }
    out.finish()?;
    if format == Format::Megatron {
        files::write(&file.with_extension("idx"), &index_of(&lengths, fits_u16))?;
    }
    Ok(converted)
}

/// Megatron's index of documents with one sequence each.
fn index_of(lengths: &[i32], u16s: bool) -> Vec<u8> {
    let mut index = INDEX_MAGIC.to_vec();
    index.extend(1u64.to_le_bytes());
    index.push(if u16s { 8 } else { 4 });
    index.extend((lengths.len() as u64).to_le_bytes());
    index.extend((lengths.len() as u64 + 1).to_le_bytes());
    index.extend(lengths.iter().flat_map(|length| length.to_le_bytes()));
    let width = if u16s { 2 } else { 4 };
    let mut pointer = 0i64;
    for &length in lengths {
        index.extend(pointer.to_le_bytes());
        pointer += i64::from(length) * width;
    }
    index.extend((0..=lengths.len() as i64).flat_map(i64::to_le_bytes));
    index
}

/// The tokens of document n without end-of-text, piece by piece.
fn for_pieces(
    data: &DataSet,
    n: u64,
    mut each: impl FnMut(&[i64]) -> Result<(), DataError>,
) -> Result<(), DataError> {
    let tokens = data.bare_document(n)?;
    let mut piece = Vec::new();
    for start in tokens.clone().step_by(TOKENS) {
        piece.resize((tokens.end - start).min(TOKENS as u64) as usize, 0);
        data.read(start, &mut piece)?;
        each(&piece)?;
    }
    Ok(())
}

/// A file of tokens being written, under a temporary name until it is complete.
struct Tokens {
    file: PathBuf,
    out: BufWriter<File>,
    width: usize,
    tokens: u64,
    bytes: Vec<u8>,
}

impl Tokens {
    fn create(file: &Path, width: usize) -> Result<Tokens, DataError> {
        let temporary = files::temporary(file);
        let open = File::create(&temporary).map_err(DataError::io(&temporary, "created"))?;
        let out = BufWriter::with_capacity(1 << 20, open);
        Ok(Tokens { file: file.into(), out, width, tokens: 0, bytes: Vec::new() })
    }

    fn write(&mut self, tokens: &[i64]) -> Result<(), DataError> {
        self.bytes.clear();
        for token in tokens {
            self.bytes.extend_from_slice(&token.to_le_bytes()[..self.width]);
        }
        self.tokens += tokens.len() as u64;
        self.out.write_all(&self.bytes).map_err(DataError::io(&self.file, "written"))
    }

    fn write_bytes(&mut self, bytes: &[u8]) -> Result<(), DataError> {
        self.out.write_all(bytes).map_err(DataError::io(&self.file, "written"))
    }

    fn rewrite_start(&mut self, bytes: &[u8]) -> Result<(), DataError> {
        let mut rewrite = || {
            self.out.seek(SeekFrom::Start(0))?;
            self.out.write_all(bytes)
        };
        rewrite().map_err(DataError::io(&self.file, "written"))
    }

    fn finish(self) -> Result<(), DataError> {
        let failed = DataError::io(&self.file, "written");
        let open = self.out.into_inner().map_err(|error| failed(error.into_error()))?;
        files::publish(&open, &self.file)
    }
}
