//! `phalanx man` and `phalanx completions`: the command line as manual pages and for shells, made from the same
//! definition that parses it. Knows no command.

use crate::cli::Cli;
use anyhow::{Context, Result};
use clap::{Args, CommandFactory};
use clap_complete::Shell;
use configs::Exit;
use std::io::Write;
use std::path::PathBuf;

/// `phalanx man`
#[derive(Debug, Args)]
pub struct ManArgs {
    /// Folder for one page of each command: phalanx.1, phalanx-train.1 and so on [default: the page of phalanx
    /// itself, to standard output].
    #[arg(value_name = "DIR")]
    pub folder: Option<PathBuf>,
}

/// `phalanx completions`
#[derive(Debug, Args)]
pub struct CompletionsArgs {
    /// The shell.
    #[arg(value_enum)]
    pub shell: Shell,
}

/// Writes manual pages.
///
/// # Errors
/// A folder that cannot be written.
pub fn man(args: &ManArgs) -> Result<Exit> {
    let command = Cli::command();
    match &args.folder {
        Some(folder) => std::fs::create_dir_all(folder)
            .and_then(|()| clap_mangen::generate_to(command, folder))
            .with_context(|| format!("{}", folder.display()))?,
        None => clap_mangen::Man::new(command).render(&mut std::io::stdout().lock())?,
    }
    Ok(Exit::Done)
}

/// Writes what a shell reads to complete commands, to standard output.
///
/// # Errors
/// A closed output.
pub fn completions(args: &CompletionsArgs) -> Result<Exit> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "phalanx", &mut script);
    std::io::stdout().lock().write_all(&script)?;
    Ok(Exit::Done)
}
