//! `phalanx data`: makes data sets from text, shows what is in them, checks them. Owns the arguments
//! and what is printed; what data is, and every error about it, belongs to `dataloader`.

mod convert;
mod curate;
mod prepare;
mod progress;
mod table;
mod tokenize;
mod which;

use anyhow::Result;
use clap::{Args, Subcommand};
use configs::Exit;
use convert::ConvertArgs;
use curate::{ClassifyArgs, DecontaminateArgs, DedupArgs, RunFilterArgs, TrainClassifierArgs};
use dataloader::{DataError, DataSet, MANIFEST_NAME, Overlap, overlap};
use prepare::PrepareArgs;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
pub(crate) use table::grouped;
use table::{Table, hex};
use tokenize::{TokenizeArgs, TrainTokenizerArgs};
use which::WhichArgs;

/// `phalanx data`
#[derive(Debug, Args)]
pub struct DataArgs {
    /// What to do.
    #[command(subcommand)]
    pub command: DataCommand,
}

/// The subcommands of `phalanx data`.
#[derive(Debug, Subcommand)]
pub enum DataCommand {
    /// Make DIR/train and DIR/val from text.
    Prepare(PrepareArgs),
    /// Print the token ids of each document, as one JSON list a line.
    Tokenize(TokenizeArgs),
    /// Keep documents by their metadata and by simple rules.
    Filter(RunFilterArgs),
    /// Learn to tell good text from the rest.
    TrainClassifier(TrainClassifierArgs),
    /// Keep documents by a classifier's score, as GPT-3's data was.
    Classify(ClassifyArgs),
    /// Drop documents with the same, or nearly the same, text as an earlier one.
    Dedup(DedupArgs),
    /// Drop documents that share words in a row with evaluation sets.
    Decontaminate(DecontaminateArgs),
    /// Learn a byte-pair encoding from text.
    TrainTokenizer(TrainTokenizerArgs),
    /// Write a data set as llm.c, nanoGPT or Megatron have theirs, or theirs as ours.
    Convert(ConvertArgs),
    /// List the documents of a step of a run.
    Which(WhichArgs),
    /// Show the shards, totals and first characters of a data set.
    Inspect(InspectArgs),
    /// Read all of a data set and check every checksum, document and token.
    Verify {
        /// A data set, or a folder with train and val.
        #[arg(value_name = "DIR")]
        folder: PathBuf,
    },
    /// Say how much of a sample comes from a text: its words, and its longest run copied from it.
    Overlap {
        /// What a model wrote.
        sample: PathBuf,
        /// What it was trained on.
        #[arg(long, value_name = "FILE")]
        text: PathBuf,
    },
}

/// `phalanx data inspect`
#[derive(Debug, Args)]
pub struct InspectArgs {
    /// A data set, or a folder with train and val.
    #[arg(value_name = "DIR")]
    pub folder: PathBuf,
    /// Print the text of one document instead, counted from 0; of DIR/train if DIR holds both.
    #[arg(long, value_name = "N")]
    pub document: Option<u64>,
}

/// Runs `phalanx data`, with what it finds on stdout.
///
/// # Errors
/// [`dataloader::DataError`] and [`dataloader::PrepareError`], which are for the user to mend; others
/// only where stdout cannot be written.
pub fn run(args: &DataArgs) -> Result<Exit> {
    let mut out = BufWriter::new(io::stdout().lock());
    let result = match &args.command {
        DataCommand::Prepare(args) => prepare::run(args, &mut out),
        DataCommand::Tokenize(args) => tokenize::run(args, &mut out),
        DataCommand::TrainTokenizer(args) => tokenize::run_train(args, &mut out),
        DataCommand::Filter(args) => curate::run_filter(args, &mut out),
        DataCommand::TrainClassifier(args) => curate::run_train_classifier(args, &mut out),
        DataCommand::Classify(args) => curate::run_classify(args, &mut out),
        DataCommand::Dedup(args) => curate::run_dedup(args, &mut out),
        DataCommand::Decontaminate(args) => curate::run_decontaminate(args, &mut out),
        DataCommand::Convert(args) => convert::run(args, &mut out),
        DataCommand::Which(args) => which::run(args, &mut out),
        DataCommand::Inspect(args) => run_inspect(args, &mut out),
        DataCommand::Verify { folder } => run_verify(folder, &mut out),
        DataCommand::Overlap { sample, text } => run_overlap(sample, text, &mut out),
    };
    // Whoever reads the table may stop when he has seen enough (`| head`).
    let closed = |error: &anyhow::Error| {
        error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
    };
    match result.and_then(|()| Ok(out.flush()?)) {
        Err(error) if !closed(&error) => Err(error),
        _ => Ok(Exit::Done),
    }
}

fn run_inspect(args: &InspectArgs, out: &mut impl Write) -> Result<()> {
    let folders = data_sets(&args.folder);
    if let Some(n) = args.document {
        let data = DataSet::open(&folders[0])?;
        let text = data.text(data.document(n)?.tokens)?;
        return Ok(out.write_all(&text)?);
    }
    for (i, folder) in folders.iter().enumerate() {
        if i > 0 {
            writeln!(out)?;
        }
        inspect(&DataSet::open(folder)?, out)?;
    }
    Ok(())
}

fn inspect(data: &DataSet, out: &mut impl Write) -> Result<()> {
    let (tokens, bytes) = (data.tokens(), data.source_bytes());
    writeln!(out, "{}", data.folder().display())?;
    writeln!(
        out,
        "{} tokens, {} documents, {} bytes of text, {:.3} bytes per token",
        grouped(tokens),
        grouped(data.documents()),
        grouped(bytes),
        bytes as f64 / tokens.max(1) as f64
    )?;
    writeln!(
        out,
        "tokenizer {}, {} ids; digest {}",
        data.tokenizer().id(),
        data.vocab_size(),
        hex(&data.digest())
    )?;
    match (data.manifest(), data.format()) {
        (Some(manifest), _) => {
            writeln!(out, "from {}", list(&manifest.sources))?;
            let mut table = Table::new(["shard", "tokens", "documents", "bytes", "digest"]);
            for shard in &manifest.shards {
                let numbers = [shard.tokens, shard.documents, shard.source_bytes].map(grouped);
                let [tokens, documents, bytes] = numbers;
                let digest = hex(&shard.digest)[..16].to_string();
                table.row(shard.name.clone(), [tokens, documents, bytes, digest]);
            }
            table.print(out)?;
        }
        (None, format) => {
            let whose = format.map_or(String::new(), |format| format.to_string());
            writeln!(out, "a token file of {whose}; its tokens are taken for GPT-2's")?;
        }
    }
    if data.documents() > 0 {
        let first = data.document(0)?.tokens;
        let text = data.text(first.start..first.end.min(first.start + 4 * SHOWN_CHARACTERS as u64))?;
        writeln!(out, "\n{}", printable(&text))?;
    }
    Ok(())
}

fn run_verify(folder: &Path, out: &mut impl Write) -> Result<()> {
    for folder in data_sets(folder) {
        let verified = DataSet::open(&folder)?.verify()?;
        writeln!(
            out,
            "{}: whole; {} shards, {} blocks, {} documents, {} tokens",
            folder.display(),
            grouped(verified.shards),
            grouped(verified.blocks),
            grouped(verified.documents),
            grouped(verified.tokens)
        )?;
    }
    Ok(())
}

fn run_overlap(sample: &Path, text: &Path, out: &mut impl Write) -> Result<()> {
    let found = overlap(&read(sample)?, &read(text)?);
    let Overlap { words, known_words, longest_run } = &found;
    let percent = 100.0 * found.known_share();
    writeln!(out, "{known_words} of {words} words ({percent:.1} %) occur in {}", text.display())?;
    let run = String::from_utf8_lossy(longest_run);
    writeln!(out, "longest run copied from it: {} bytes, {run:?}", longest_run.len())?;
    Ok(())
}

fn read(file: &Path) -> Result<Vec<u8>, DataError> {
    std::fs::read(file).map_err(|source| DataError::Io { file: file.into(), action: "read", source })
}

/// The data sets that a folder stands for: itself, or the train and val in it. A folder with neither
/// stands for itself, so that opening it says what is missing.
fn data_sets(folder: &Path) -> Vec<PathBuf> {
    let is_data_set = |folder: &PathBuf| folder.join(MANIFEST_NAME).exists();
    let splits: Vec<PathBuf> =
        ["train", "val"].iter().map(|split| folder.join(split)).filter(is_data_set).collect();
    if is_data_set(&folder.to_path_buf()) || splits.is_empty() { vec![folder.to_path_buf()] } else { splits }
}

/// Characters of text that `inspect` shows.
const SHOWN_CHARACTERS: usize = 200;

/// The first characters of a text, without what would steer a terminal.
fn printable(text: &[u8]) -> String {
    let steers = |c: &char| c.is_control() && *c != '\n' && *c != '\t';
    let text = String::from_utf8_lossy(text);
    text.chars().take(SHOWN_CHARACTERS).map(|c| if steers(&c) { '\u{FFFD}' } else { c }).collect()
}

/// The first few of many names.
fn list(names: &[String]) -> String {
    const SHOWN: usize = 8;
    let shown = names.iter().take(SHOWN).map(String::as_str).collect::<Vec<_>>().join(", ");
    match names.len().saturating_sub(SHOWN) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prepared() -> (tempfile::TempDir, PathBuf) {
        let scratch = tempfile::tempdir().unwrap();
        let text = scratch.path().join("rhyme.txt");
        std::fs::write(&text, "Humpty Dumpty sat on a wall,\n".repeat(100)).unwrap();
        let out = scratch.path().join("data");
        let args =
            ["prepare", text.to_str().unwrap(), "--out", out.to_str().unwrap(), "--val-fraction", "0.1"];
        prepare::run(&parsed(&args), &mut Vec::new()).unwrap();
        (scratch, out)
    }

    /// The arguments of `phalanx data prepare`, as typed.
    fn parsed(args: &[&str]) -> PrepareArgs {
        #[derive(clap::Parser)]
        struct Typed {
            #[command(flatten)]
            args: PrepareArgs,
        }
        <Typed as clap::Parser>::parse_from(args).args
    }

    fn printed(print: impl FnOnce(&mut Vec<u8>) -> Result<()>) -> String {
        let mut out = Vec::new();
        print(&mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn inspect_shows_both_splits_and_their_first_characters() {
        let (_scratch, folder) = prepared();
        let shown = printed(|out| run_inspect(&InspectArgs { folder, document: None }, out));
        assert!(shown.contains("2,611 tokens") && shown.contains("291 tokens"), "{shown}");
        assert!(shown.contains("shard-00000.tokens") && shown.contains("\nHumpty Dumpty sat"), "{shown}");
        assert!(shown.contains("tokenizer bytes, 257 ids"), "{shown}");
    }

    #[test]
    fn inspect_prints_one_document_and_nothing_else() {
        let (_scratch, folder) = prepared();
        let folder = folder.join("val");
        let shown = printed(|out| run_inspect(&InspectArgs { folder, document: Some(0) }, out));
        assert_eq!(shown, "Humpty Dumpty sat on a wall,\n".repeat(10));
    }

    #[test]
    fn verify_says_what_it_read() {
        let (_scratch, folder) = prepared();
        let shown = printed(|out| run_verify(&folder, out));
        assert!(shown.contains("train: whole; 1 shards, 1 blocks, 1 documents, 2,611 tokens"), "{shown}");
    }

    #[test]
    fn a_folder_without_data_says_how_to_make_some() {
        let scratch = tempfile::tempdir().unwrap();
        let error = run_verify(scratch.path(), &mut Vec::new()).unwrap_err();
        assert!(error.is::<DataError>());
        assert!(format!("{error:#}").contains("phalanx data prepare"), "{error:#}");
    }

    #[test]
    fn text_that_steers_a_terminal_is_not_shown_as_it_is() {
        assert_eq!(printable(b"a\x1b[2Jb\n"), "a\u{FFFD}[2Jb\n");
    }
}
