//! `phalanx data tokenize` and `train-tokenizer`, and the arguments of everything that reads text.

use super::progress;
use super::table::grouped;
use anyhow::Result;
use clap::Args;
use dataloader::{DataError, Inputs, PrepareError, Tokenizer, all_threads, tokenize, train_tokenizer};
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// What is read, and how.
#[derive(Debug, Args)]
pub struct TextArgs {
    /// Text: .txt and .md are one document, .jsonl (also .gz, .zst) has one object with a "text" in each line,
    /// .parquet one row; - is standard input.
    #[arg(required = true)]
    pub files: Vec<PathBuf>,
    /// Key of JSON objects, or column of tables, that holds the text.
    #[arg(long, value_name = "KEY", default_value = dataloader::TEXT_KEY)]
    pub text_key: String,
    /// What standard input is: jsonl, txt, ... (an extension from above).
    #[arg(long, value_name = "KIND", default_value = "jsonl")]
    pub stdin_kind: String,
    /// Threads [default: one for each core].
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
}

/// A file that is removed when it is no longer needed.
pub(super) struct Spool(PathBuf);

impl Drop for Spool {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0); // in the way of nobody
    }
}

impl TextArgs {
    /// The inputs, with standard input copied into a file beside `out`, since text is read more than once.
    pub(super) fn inputs(&self, out: Option<&Path>) -> Result<(Inputs, Option<Spool>)> {
        let mut inputs = Inputs { text_key: self.text_key.clone(), ..Inputs::new(&self.files) };
        let Some(stdin) = inputs.files.iter_mut().find(|file| *file == Path::new("-")) else {
            return Ok((inputs, None));
        };
        let place = out.map_or_else(
            || std::env::temp_dir().join(format!("phalanx-{}", std::process::id())),
            Path::to_path_buf,
        );
        let mut name = place.into_os_string();
        name.push(format!(".stdin.{}", self.stdin_kind));
        *stdin = PathBuf::from(name);
        let spool = Spool(stdin.clone());
        let place = &spool.0;
        let failed = |action| move |source| DataError::Io { file: place.clone(), action, source };
        if let Some(folder) = stdin.parent() {
            std::fs::create_dir_all(folder).map_err(failed("created"))?;
        }
        let mut file = File::create(&*stdin).map_err(failed("created"))?;
        io::copy(&mut io::stdin().lock(), &mut file).map_err(failed("written"))?;
        // The same text is the same input, whenever it came.
        file.set_modified(SystemTime::UNIX_EPOCH).map_err(failed("written"))?;
        Ok((inputs, Some(spool)))
    }

    pub(super) fn threads(&self) -> usize {
        self.threads.unwrap_or_else(all_threads)
    }
}

/// What makes the tokens.
#[derive(Debug, Args)]
pub struct TokenizerArgs {
    /// bytes, gpt2, a byte-pair table (.tiktoken) or a WordPiece vocabulary (.txt).
    #[arg(long, value_name = "NAME|FILE", default_value = "bytes")]
    pub tokenizer: String,
}

impl TokenizerArgs {
    /// The tokenizer that is named.
    pub(super) fn open(&self) -> Result<Tokenizer> {
        match Tokenizer::from_id(&self.tokenizer) {
            Some(tokenizer) => Ok(tokenizer),
            None => Ok(Tokenizer::load(Path::new(&self.tokenizer))?),
        }
    }
}

/// `phalanx data tokenize`
#[derive(Debug, Args)]
pub struct TokenizeArgs {
    /// What is read, and how.
    #[command(flatten)]
    pub text: TextArgs,
    /// What makes the tokens.
    #[command(flatten)]
    pub tokenizer: TokenizerArgs,
}

pub(super) fn run(args: &TokenizeArgs, out: &mut impl Write) -> Result<()> {
    let (inputs, _spool) = args.text.inputs(None)?;
    let tokenizer = args.tokenizer.open()?;
    let mut line = String::new();
    let mut closed = None;
    let stop = || PrepareError::NoFiles; // never shown: what happened is in `closed`
    let result = tokenize(&inputs, &tokenizer, args.text.threads(), |tokens| {
        line.clear();
        line.push('[');
        for (i, token) in tokens.iter().enumerate() {
            line.push_str(if i > 0 { ", " } else { "" });
            line.push_str(&token.to_string());
        }
        line.push_str("]\n");
        out.write_all(line.as_bytes()).map_err(|error| {
            closed = Some(error);
            stop()
        })
    });
    match closed {
        Some(error) => Err(error.into()),
        None => Ok(result?),
    }
}

/// `phalanx data train-tokenizer`
#[derive(Debug, Args)]
pub struct TrainTokenizerArgs {
    /// What is learnt from.
    #[command(flatten)]
    pub text: TextArgs,
    /// Ids of the vocabulary, 256 bytes and end-of-text among them.
    #[arg(long, value_name = "N")]
    pub vocab_size: usize,
    /// Where to write the table; its name ends in .tiktoken.
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
}

pub(super) fn run_train(args: &TrainTokenizerArgs, out: &mut impl Write) -> Result<()> {
    if args.out.extension().is_none_or(|extension| extension != "tiktoken") {
        let what = "the name of a byte-pair table ends in .tiktoken".to_string();
        return Err(DataError::TokenizerInvalid { file: args.out.clone(), what }.into());
    }
    let (inputs, _spool) = args.text.inputs(Some(&args.out))?;
    let (tokenizer, learnt) =
        progress::shown(&inputs, || train_tokenizer(&inputs, args.vocab_size, args.text.threads()))?;
    tokenizer.save(&args.out)?;
    writeln!(
        out,
        "{}: {} ids, learnt from {} documents, {} bytes, {} different words",
        args.out.display(),
        grouped(tokenizer.vocab_size() as u64),
        grouped(learnt.documents),
        grouped(learnt.bytes),
        grouped(learnt.words)
    )?;
    Ok(())
}
