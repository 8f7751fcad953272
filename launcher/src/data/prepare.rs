//! `phalanx data prepare`: arguments, progress and report.

use super::curate::{self, CurationArgs};
use super::progress;
use super::table::{Table, grouped};
use super::tokenize::{TextArgs, TokenizerArgs};
use anyhow::Result;
use clap::Args;
use dataloader::{PrepareOptions, PrepareReport, SplitTotals, prepare};
use std::io::Write;
use std::path::PathBuf;

/// `phalanx data prepare`
#[derive(Debug, Args)]
pub struct PrepareArgs {
    /// What is read, and how.
    #[command(flatten)]
    pub text: TextArgs,
    /// What makes the tokens.
    #[command(flatten)]
    pub tokenizer: TokenizerArgs,
    /// Where to write; the folder appears when it is complete.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Share of the text to hold out for validation; 0 for none.
    #[arg(long, value_name = "F", default_value_t = 0.05)]
    pub val_fraction: f64,
    /// Tokens after which the next shard starts; finished ones survive a killed preparation.
    #[arg(long, value_name = "N", default_value_t = dataloader::DEFAULT_MAX_SHARD_TOKENS)]
    pub shard_tokens: u64,
    /// What is left out; the report goes to DIR.curation.json.
    #[command(flatten)]
    pub curation: CurationArgs,
    /// Replace an earlier preparation in DIR.
    #[arg(long)]
    pub force: bool,
}

pub(super) fn run(args: &PrepareArgs, out: &mut impl Write) -> Result<()> {
    let (inputs, _spool) = args.text.inputs(Some(&args.out))?;
    let options = PrepareOptions {
        tokenizer: args.tokenizer.open()?,
        val_fraction: args.val_fraction,
        force: args.force,
        max_shard_tokens: args.shard_tokens,
        threads: args.text.threads(),
        curation: args.curation.curation(&args.text)?,
    };
    let report = progress::shown(&inputs, || prepare(&inputs, &args.out, &options))?;
    let PrepareReport { files, documents, skipped_documents, source_bytes, curation, rule, train, val } =
        report;
    if let Some(report) = &curation {
        curate::print(report, out)?;
        let mut name = args.out.as_os_str().to_owned();
        name.push(".curation.json");
        curate::write_report(report, &PathBuf::from(name))?;
    }
    writeln!(
        out,
        "{files} files, {} documents, {} bytes; {rule}",
        grouped(documents),
        grouped(source_bytes)
    )?;
    if skipped_documents > 0 {
        writeln!(out, "{} empty documents were passed over", grouped(skipped_documents))?;
    }
    let mut table = Table::new(["split", "tokens", "documents", "bytes", "shards"]);
    for (split, totals) in [("train", Some(train)), ("val", val)] {
        if let Some(SplitTotals { shards, documents, tokens, source_bytes }) = totals {
            let folder = args.out.join(split).display().to_string();
            let numbers = [tokens, documents, source_bytes, shards].map(grouped);
            table.row(folder, numbers);
        }
    }
    table.print(out)
}
