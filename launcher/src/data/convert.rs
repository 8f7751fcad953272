//! `phalanx data convert`: data sets to and from other programs' token files.

use super::table::grouped;
use anyhow::Result;
use clap::{Args, ValueEnum};
use dataloader::{DEFAULT_MAX_SHARD_TOKENS, DataSet, Format, convert_to, convert_to_ours};
use std::io::Write;
use std::path::PathBuf;

/// `phalanx data convert`
#[derive(Debug, Args)]
pub struct ConvertArgs {
    /// A data set, or a token file of llm.c, nanoGPT or Megatron.
    #[arg(value_name = "DATA")]
    pub from: PathBuf,
    /// The format to write.
    #[arg(long, value_enum)]
    pub to: To,
    /// Where to write: a folder for ours, else a .bin file.
    #[arg(long, value_name = "PATH")]
    pub out: PathBuf,
}

/// Formats that are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum To {
    /// A folder of shards.
    Phalanx,
    /// A .bin with a header, u16.
    LlmC,
    /// A .bin of u16 and nothing else.
    Nanogpt,
    /// A .bin with an .idx beside it.
    Megatron,
}

pub(super) fn run(args: &ConvertArgs, out: &mut impl Write) -> Result<()> {
    let data = DataSet::open(&args.from)?;
    let converted = match args.to {
        To::Phalanx => convert_to_ours(&data, &args.out, DEFAULT_MAX_SHARD_TOKENS)?,
        To::LlmC => convert_to(&data, Format::LlmC, &args.out)?,
        To::Nanogpt => convert_to(&data, Format::NanoGpt, &args.out)?,
        To::Megatron => convert_to(&data, Format::Megatron, &args.out)?,
    };
    let (documents, tokens) = (grouped(converted.documents), grouped(converted.tokens));
    writeln!(out, "{}: {documents} documents, {tokens} tokens", args.out.display())?;
    Ok(())
}
