//! `phalanx export` and `phalanx import`: arguments, and what is said of the outcome.

use super::{Form, Format, export, import};
use crate::error::TrainError;
use crate::trained::Trained;
use clap::Args;
use ops::collectives::Communicator;
use std::io::Write;
use std::path::PathBuf;

/// `phalanx export`
#[derive(Debug, Args)]
pub struct ExportArgs {
    /// A run's folder, or a checkpoint's
    pub model: PathBuf,
    /// A step instead of the newest
    #[arg(long)]
    pub step: Option<u64>,
    /// What to write
    #[arg(long, value_enum)]
    pub format: Format,
    /// In bf16, half as large, rather than fp32
    #[arg(long)]
    pub bf16: bool,
    /// The folder to make
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Have transformers load it, and compare; names the Python that has it, if not python3
    #[arg(long, value_name = "PYTHON", num_args = 0..=1, default_missing_value = "python3")]
    pub verify_with_transformers: Option<String>,
}

/// `phalanx import`
#[derive(Debug, Args)]
pub struct ImportArgs {
    /// A folder as transformers saves it or phalanx export writes it, or llm.c's .bin file
    pub from: PathBuf,
    /// The run folder to make
    #[arg(long, value_name = "RUN")]
    pub out: PathBuf,
}

/// Runs `phalanx export`.
///
/// # Errors
/// As [`export`].
pub fn export_command(args: &ExportArgs, comm: &dyn Communicator) -> Result<(), TrainError> {
    let trained = Trained::open(&args.model, args.step)?;
    let python = args.verify_with_transformers.as_deref();
    let form = Form { format: args.format, bf16: args.bf16, python };
    let done = export(&trained, form, &args.out, comm)?;
    let mut stdout = std::io::stdout();
    let (out, format) = (args.out.display(), args.format);
    let _ = writeln!(stdout, "{out}: {format} of {}", trained.folder().display());
    let _ = writeln!(stdout, "files           {}", done.files.join(", "));
    let _ = writeln!(stdout, "read back       logits equal to {:.1e} of the largest", done.off);
    match (done.off_transformers, &args.verify_with_transformers) {
        (Some(off), _) => {
            let _ = writeln!(stdout, "transformers    logits equal to {off:.1e} of the largest");
        }
        (None, Some(_)) => {
            let _ = writeln!(stdout, "transformers    does not read {format}");
        }
        (None, None) => {}
    }
    Ok(())
}

/// Runs `phalanx import`.
///
/// # Errors
/// As [`import`].
pub fn import_command(args: &ImportArgs, comm: &dyn Communicator) -> Result<(), TrainError> {
    let done = import(&args.from, &args.out, comm)?;
    let mut stdout = std::io::stdout();
    let (from, format) = (args.from.display(), done.format);
    let _ = writeln!(stdout, "{}: {format} of {from}", done.checkpoint.display());
    let _ = writeln!(stdout, "parameters      {}", done.model.parameters());
    if !done.absent.is_empty() {
        let n = done.absent.len();
        let _ = writeln!(stdout, "not in it       {n} tensors, new here: {}", done.absent.join(", "));
    }
    let _ = match &done.tokenizer {
        Ok(tokenizer) => writeln!(stdout, "tokenizer       {}", tokenizer.id()),
        Err(why) => writeln!(stdout, "tokenizer       none: {why}"),
    };
    Ok(())
}
