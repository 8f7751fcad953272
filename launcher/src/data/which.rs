//! `phalanx data which`: the documents that a step of a run was, or will be, made of.

use anyhow::{Context, Result};
use clap::Args;
use configs::RunConfig;
use dataloader::{Samples, Skips};
use serde_json::Value;
use std::io::Write;
use std::path::{Path, PathBuf};

/// `phalanx data which`
#[derive(Debug, Args)]
pub struct WhichArgs {
    /// The run folder.
    #[arg(value_name = "RUN")]
    pub run: PathBuf,
    /// The update, counted from 1.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub step: u64,
    /// One JSON object a line.
    #[arg(long)]
    pub json: bool,
}

pub(super) fn run(args: &WhichArgs, out: &mut impl Write) -> Result<()> {
    let file = args.run.join("config.toml");
    let failed = |action| {
        let file = file.clone();
        move |source| dataloader::DataError::Io { file, action, source }
    };
    let text = std::fs::read_to_string(&file).map_err(failed("read"))?;
    let config: RunConfig =
        configs::parse(&text).map_err(anyhow::Error::msg).with_context(|| file.display().to_string())?;
    let mut samples =
        Samples::of(&config.data, config.model.seq_len, config.run.seed).context(config.data.train_key())?;
    samples.leave_out(skips(&args.run));
    let before = |step| config.batches().samples_before(step);
    let positions = before(args.step - 1)..before(args.step);
    for passage in samples.documents(positions) {
        let passage = passage?;
        if args.json {
            let line = serde_json::json!({
                "sample": passage.sample,
                "source": passage.source.map(|source| source.display().to_string()),
                "file": passage.document.file,
                "record": passage.document.record,
                "document": passage.document.number,
                "shard": passage.document.shard,
                "first_token": passage.tokens.start,
                "end_token": passage.tokens.end,
            });
            writeln!(out, "{line}")?;
        } else {
            writeln!(out, "{passage}")?;
        }
    }
    Ok(())
}

/// What the run leaves out, by its newest checkpoint; nothing if there is none that says.
fn skips(run: &Path) -> Skips {
    let folders = std::fs::read_dir(run.join("checkpoints")).into_iter().flatten().flatten();
    let complete = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        name.strip_prefix("step-").is_some_and(|step| step.bytes().all(|byte| byte.is_ascii_digit()))
    };
    let newest = folders.map(|entry| entry.path()).filter(complete).max();
    let manifest = newest.and_then(|folder| std::fs::read(folder.join("manifest.json")).ok());
    let manifest: Value = manifest.and_then(|json| serde_json::from_slice(&json).ok()).unwrap_or_default();
    let skips = manifest["state"]["skips"].as_array().into_iter().flatten();
    skips.filter_map(|skip| Some(skip["first_sample"].as_u64()?..skip["end_sample"].as_u64()?)).collect()
}
