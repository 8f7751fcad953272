//! llm.c's model file (`gpt2_124M.bin`) and tokenizer file: a header of 256 32-bit integers, then each kind of
//! tensor for all layers. Knows its order and no more.

use super::file::bytes_of;
use super::layout::Entry;
use super::{ExchangeError, Format};
use crate::run_folder::{FileError, write_atomically_with};
use configs::ModelConfig;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;
use tch::{Kind, Tensor};

/// The name of an exported model.
pub(super) const MODEL: &str = "model.bin";

/// The name of an exported tokenizer.
pub(super) const TOKENIZER: &str = "tokenizer.bin";

const MODEL_MAGIC: i32 = 20_240_326;
const TOKENIZER_MAGIC: u32 = 20_240_328;
const HEADER_BYTES: u64 = 1024;

/// Each kind of tensor, in the order of the file.
const ORDER: [&str; 16] = [
    "wte.weight",
    "wpe.weight",
    "ln_1.weight",
    "ln_1.bias",
    "attn.c_attn.weight",
    "attn.c_attn.bias",
    "attn.c_proj.weight",
    "attn.c_proj.bias",
    "ln_2.weight",
    "ln_2.bias",
    "mlp.c_fc.weight",
    "mlp.c_fc.bias",
    "mlp.c_proj.weight",
    "mlp.c_proj.bias",
    "ln_f.weight",
    "ln_f.bias",
];

/// The format's tensors in the order of the file.
fn in_order(entries: &[Entry]) -> impl Iterator<Item = (usize, &Entry)> {
    let of_kind = |entry: &Entry, kind: &str| match entry.name.strip_prefix("h.") {
        Some(rest) => rest.split_once('.').is_some_and(|(_, name)| name == kind),
        None => entry.name == kind,
    };
    ORDER
        .into_iter()
        .flat_map(move |kind| entries.iter().enumerate().filter(move |(_, entry)| of_kind(entry, kind)))
}

/// Writes a model in fp32 or bf16; the vocabulary is padded with zeros.
///
/// # Errors
/// What the file system refuses.
pub(super) fn write(
    path: &Path,
    model: &ModelConfig,
    entries: &[Entry],
    kind: Kind,
    tensor: impl Fn(usize) -> Tensor,
) -> Result<(), FileError> {
    let numbers = [
        MODEL_MAGIC as usize,
        if kind == Kind::BFloat16 { 5 } else { 3 },
        model.seq_len,
        model.vocab_size,
        model.n_layer,
        model.n_head,
        model.n_embd,
        model.padded_vocab_size(),
    ];
    let mut header: Vec<u8> = numbers.iter().flat_map(|&number| (number as i32).to_le_bytes()).collect();
    header.resize(HEADER_BYTES as usize, 0);
    write_atomically_with(path, |file| {
        file.write_all(&header)?;
        for (i, entry) in in_order(entries) {
            file.write_all(&bytes_of(&tensor(i), kind))?;
            if entry.name == ORDER[0] {
                let padding = (model.padded_vocab_size() - model.vocab_size) * model.n_embd;
                file.write_all(&vec![0; padding * kind.elt_size_in_bytes()])?;
            }
        }
        Ok(())
    })
}

/// Writes a tokenizer: the bytes of every token.
///
/// # Errors
/// What the file system refuses.
pub(super) fn write_tokenizer(path: &Path, tokens: &[Vec<u8>], end: u32) -> Result<(), FileError> {
    let mut header: Vec<u8> =
        [TOKENIZER_MAGIC, 2, tokens.len() as u32, end].iter().flat_map(|n| n.to_le_bytes()).collect();
    header.resize(HEADER_BYTES as usize, 0);
    write_atomically_with(path, |file| {
        file.write_all(&header)?;
        for token in tokens {
            let length = token.len().min(usize::from(u8::MAX));
            file.write_all(&[length as u8])?;
            file.write_all(&token[..length])?;
        }
        Ok(())
    })
}

/// A model file that has been opened.
#[derive(Debug)]
pub(super) struct LlmC {
    file: File,
    kind: Kind,
    padded_vocab: i64,
    /// The shape of its model.
    pub(super) model: ModelConfig,
}

impl LlmC {
    /// Opens a model file, fp32 or bf16, and checks its length.
    ///
    /// # Errors
    /// A file that is none.
    pub(super) fn open(path: &Path) -> Result<LlmC, ExchangeError> {
        let malformed = |what: String| ExchangeError::Malformed { path: path.into(), what };
        let mut file = File::open(path).map_err(FileError::of("open", path))?;
        let mut header = [0; HEADER_BYTES as usize];
        file.read_exact(&mut header).map_err(|error| malformed(error.to_string()))?;
        let number = |i: usize| i32::from_le_bytes([0, 1, 2, 3].map(|byte| header[4 * i + byte]));
        if number(0) != MODEL_MAGIC {
            let what = format!("its magic number is {}, expected {MODEL_MAGIC}", number(0));
            return Err(ExchangeError::NotOurs { path: path.into(), what });
        }
        let kind = match number(1) {
            3 => Kind::Float,
            5 => Kind::BFloat16,
            other => return Err(malformed(format!("its version is {other}, expected 3 (fp32) or 5 (bf16)"))),
        };
        let mut sizes = [0usize; 6];
        for (i, size) in sizes.iter_mut().enumerate() {
            let got = number(2 + i);
            *size = usize::try_from(got)
                .ok()
                .filter(|&size| size > 0)
                .ok_or_else(|| malformed(format!("number {} of its header is {got}", 2 + i)))?;
        }
        let [seq_len, vocab_size, n_layer, n_head, n_embd, padded] = sizes;
        if padded < vocab_size || !n_embd.is_multiple_of(n_head) {
            return Err(malformed("the numbers of its header contradict each other".into()));
        }
        let model = ModelConfig { n_layer, n_head, n_embd, seq_len, vocab_size, ..ModelConfig::default() };
        let values = u128::from(model.parameters()) + ((padded - vocab_size) as u128) * n_embd as u128;
        let expected = u128::from(HEADER_BYTES) + values * kind.elt_size_in_bytes() as u128;
        let got = file.metadata().map_err(FileError::of("look at", path))?.len();
        if u128::from(got) != expected {
            return Err(malformed(format!("it has {got} bytes, expected {expected}")));
        }
        Ok(LlmC { file, kind, padded_vocab: padded as i64, model })
    }

    /// Gives every tensor, by its place among the entries of this model.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub(super) fn each(
        &mut self,
        path: &Path,
        mut take: impl FnMut(&Entry, &Tensor),
    ) -> Result<(), ExchangeError> {
        let entries = super::layout::entries(&self.model, Format::LlmC);
        self.file.seek(SeekFrom::Start(HEADER_BYTES)).map_err(FileError::of("read", path))?;
        for (_, entry) in in_order(&entries) {
            let mut shape = entry.shape();
            let rows = shape[0];
            if entry.name == ORDER[0] {
                shape[0] = self.padded_vocab;
            }
            let mut bytes = vec![0; shape.iter().product::<i64>() as usize * self.kind.elt_size_in_bytes()];
            self.file.read_exact(&mut bytes).map_err(FileError::of("read", path))?;
            let tensor = Tensor::from_data_size(&bytes, &shape, self.kind).to_kind(Kind::Float);
            take(entry, &tensor.narrow(0, 0, rows));
        }
        Ok(())
    }
}
