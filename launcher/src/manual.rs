//! `phalanx man` and `phalanx completions`: the command line as manual pages and for shells, made from the same
//! definition that parses it; of what is handed on to `phalanx-rank`, by that one's. Knows no command.

use crate::cli::Cli;
use crate::hand_on;
use anyhow::{Context, Result};
use clap::builder::PossibleValuesParser;
use clap::{Arg, ArgAction, Args, CommandFactory};
use clap_complete::Shell;
use configs::{Exit, HANDED_ON, HandedOnArgument, HandedOnCommand};
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
    let command = command();
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
    clap_complete::generate(args.shell, &mut command(), "phalanx", &mut script);
    std::io::stdout().lock().write_all(&script)?;
    Ok(Exit::Done)
}

/// The command line, with what `phalanx-rank` says that its commands take; without that where it does not start, as
/// on a machine without MPI.
fn command() -> clap::Command {
    let told = hand_on::arguments().unwrap_or_else(|why| {
        let _ =
            writeln!(std::io::stderr(), "warning: {}: without their flags: {why:#}", HANDED_ON.join(", "));
        Vec::new()
    });
    told.into_iter().fold(Cli::command(), |command, HandedOnCommand { name, arguments }| {
        command.mut_subcommand(name.clone(), |own| {
            let bare = clap::Command::new(name).about(own.get_about().cloned().unwrap_or_default());
            arguments.into_iter().fold(bare, |command, argument| command.arg(argument_of(argument)))
        })
    })
}

fn argument_of(told: HandedOnArgument) -> Arg {
    let HandedOnArgument { name, long, short, value, values, required, help } = told;
    let mut arg = Arg::new(name).help(help).required(required);
    if let Some(long) = long {
        arg = arg.long(long);
    }
    if let Some(short) = short {
        arg = arg.short(short);
    }
    match value {
        None => arg.action(ArgAction::SetTrue),
        Some(value) if values.is_empty() => arg.value_name(value),
        Some(value) => arg.value_name(value).value_parser(PossibleValuesParser::new(values)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_handed_on_is_a_flag_with_its_values_or_has_its_place() {
        let told = |name: &str, long: Option<&str>, values: &[&str]| HandedOnArgument {
            name: name.into(),
            long: long.map(Into::into),
            short: None,
            value: Some("WHAT".into()),
            values: values.iter().map(|&value| value.into()).collect(),
            required: false,
            help: "Some.".into(),
        };
        let command = clap::Command::new("export")
            .arg(argument_of(told("run", None, &[])))
            .arg(argument_of(told("format", Some("format"), &["hf-gpt2", "llmc"])));
        let given =
            command.clone().try_get_matches_from(["export", "runs/mine", "--format", "llmc"]).unwrap();
        assert_eq!(given.get_one::<String>("run").unwrap(), "runs/mine");
        assert!(command.try_get_matches_from(["export", "--format", "zip"]).is_err());
    }
}
