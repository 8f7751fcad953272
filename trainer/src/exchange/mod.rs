//! Models to and from other programs. Owns which formats there are, what each can hold, and the proof that what
//! was written is the model that it was written from.
//!
//! An export is read back by a way of its own (`reference`): another reader, float64, masks written out. Refuses
//! to know training, and how a checkpoint lies on disk.

mod bert;
mod card;
mod command;
mod config;
mod export;
mod file;
mod import;
mod layout;
mod llmc;
mod reference;
mod reference_bert;
#[cfg(test)]
mod tests;

pub use command::{ExportArgs, ImportArgs, export_command, import_command};
pub use export::{Exported, Form, export};
pub use import::{Imported, import};

use crate::run_folder::FileError;
use clap::ValueEnum;
use std::fmt;
use std::path::PathBuf;

/// The form in which a model is written or read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// `transformers`' GPT2LMHeadModel: dense layers, norms before the sublayers.
    HfGpt2,
    /// `transformers`' GPTNeoForCausalLM: dense and banded layers, no biases of queries, keys and values.
    HfGptNeo,
    /// `transformers`' OpenAIGPTLMHeadModel, GPT-1: dense layers, norms after the sublayers.
    OpenaiGpt,
    /// `transformers`' BertForMaskedLM: a masked model, bidirectional, norms after the sublayers.
    HfBert,
    /// llm.c's `.bin` and its tokenizer file: as GPT-2.
    #[value(name = "llm.c")]
    LlmC,
    /// The tensors by the names that they have here, in one safetensors file: any model.
    Safetensors,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let value = self.to_possible_value();
        f.write_str(value.as_ref().map_or("", |value| value.get_name()))
    }
}

/// A model that cannot be written or read.
#[derive(Debug, thiserror::Error)]
pub enum ExchangeError {
    /// The format has no place for something in the model.
    #[error("{format} cannot hold this model: {what}\nhint: {hint}")]
    NoPlace {
        /// The format.
        format: Format,
        /// What in the model.
        what: String,
        /// What can.
        hint: String,
    },
    /// A model that is not one of these here.
    #[error("{}: {what}\nhint: read are GPT-2, GPT-Neo, OpenAI GPT and BERT as transformers saves them, llm.c's .bin, \
             and what phalanx export --format safetensors wrote", path.display())]
    NotOurs {
        /// The file.
        path: PathBuf,
        /// What is else than expected.
        what: String,
    },
    /// A file that is no such file, or is cut short.
    #[error("{}: {what}\nhint: it may not have been copied whole", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// Something is there already.
    #[error("{} exists\nhint: give another --out, or remove it", path.display())]
    Exists {
        /// What.
        path: PathBuf,
    },
    /// What was written is not the model.
    #[error(
        "{}, read back by {by}, gives other logits: off by {off:.1e}, at most {limit:.1e} is allowed; nothing was \
         kept\nhint: this is a mistake of Phalanx, please report it with the model's config.toml", path.display()
    )]
    Differs {
        /// Where it was written.
        path: PathBuf,
        /// Who read it.
        by: String,
        /// Largest difference of a logit.
        off: f64,
        /// What is allowed.
        limit: f64,
    },
    /// Python did not do what it was asked to.
    #[error(
        "{python} could not compare with transformers: {what}\nhint: {python} -m pip install torch transformers"
    )]
    Python {
        /// The program.
        python: String,
        /// What it said.
        what: String,
    },
    /// The file system refused.
    #[error(transparent)]
    File(#[from] FileError),
}
