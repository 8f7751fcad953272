//! `phalanx data`: makes data sets from text, shows what is in them, checks them. Owns the arguments
//! and the tables; what data is, and every error about it, belongs to `dataloader`.

use anyhow::Result;
use clap::{Args, Subcommand};
use configs::Exit;
use dataloader::{
    DataError, DataSet, MANIFEST_NAME, Overlap, PrepareOptions, PrepareReport, SplitTotals, overlap, prepare,
};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

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

/// `phalanx data prepare`
#[derive(Debug, Args)]
pub struct PrepareArgs {
    /// Text: .txt is one document, .jsonl has one object with a "text" in each line.
    #[arg(required = true)]
    pub files: Vec<PathBuf>,
    /// Where to write; the folder appears when it is complete.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Share of the text to hold out for validation; 0 for none.
    #[arg(long, value_name = "F", default_value_t = 0.05)]
    pub val_fraction: f64,
    /// Replace an earlier preparation in DIR.
    #[arg(long)]
    pub force: bool,
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
        DataCommand::Prepare(args) => run_prepare(args, &mut out),
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

fn run_prepare(args: &PrepareArgs, out: &mut impl Write) -> Result<()> {
    let options =
        PrepareOptions { val_fraction: args.val_fraction, force: args.force, ..PrepareOptions::default() };
    let report = prepare(&args.files, &args.out, &options)?;
    let PrepareReport { files, documents, skipped_documents, source_bytes, rule, train, val } = report;
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
    let manifest = data.manifest();
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
    writeln!(out, "from {}", list(&manifest.sources))?;
    let mut table = Table::new(["shard", "tokens", "documents", "bytes", "digest"]);
    for shard in &manifest.shards {
        let numbers = [shard.tokens, shard.documents, shard.source_bytes].map(grouped);
        let [tokens, documents, bytes] = numbers;
        table.row(shard.name.clone(), [tokens, documents, bytes, hex(&shard.digest)[..16].to_string()]);
    }
    table.print(out)?;
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

/// A number as people read it: 4,108,123.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut grouped = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

fn hex(digest: &[u8]) -> String {
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A table: names to the left, the rest to the right, as wide as what is in it.
struct Table {
    rows: Vec<[String; 5]>,
}

impl Table {
    fn new(heads: [&str; 5]) -> Table {
        Table { rows: vec![heads.map(str::to_string)] }
    }

    fn row(&mut self, name: String, [a, b, c, d]: [String; 4]) {
        self.rows.push([name, a, b, c, d]);
    }

    fn print(&self, out: &mut impl Write) -> Result<()> {
        let width =
            |column: usize| self.rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
        let widths: [usize; 5] = std::array::from_fn(width);
        for [name, rest @ ..] in &self.rows {
            write!(out, "{name:<0$}", widths[0])?;
            for (cell, width) in rest.iter().zip(&widths[1..]) {
                write!(out, "  {cell:>width$}")?;
            }
            writeln!(out)?;
        }
        Ok(())
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
        let args = PrepareArgs { files: vec![text], out: out.clone(), val_fraction: 0.1, force: false };
        run_prepare(&args, &mut Vec::new()).unwrap();
        (scratch, out)
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
    fn numbers_are_grouped_by_thousands() {
        assert_eq!([0, 999, 1000, 1_234_567].map(grouped), ["0", "999", "1,000", "1,234,567"]);
    }

    #[test]
    fn text_that_steers_a_terminal_is_not_shown_as_it_is() {
        assert_eq!(printable(b"a\x1b[2Jb\n"), "a\u{FFFD}[2Jb\n");
    }
}
