//! The binary `phalanx`: parses, runs, and turns what came of it into an exit code.

use clap::Parser;
use launcher::cli::{Cli, Command};
use std::io::Write;
use std::process::ExitCode;

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Train(args) => launcher::train::run(&args),
        Command::Plan(args) => launcher::plan::run(&args),
        Command::Finetune(args) => launcher::finetune::run(&args),
        Command::Predict(args) => launcher::hand_on::run_named("predict", &args),
        Command::Eval(args) => launcher::eval::run(&args),
        Command::Data(args) => launcher::data::run(&args),
        Command::Doctor(args) => launcher::doctor::run(&args),
        Command::Watch(args) => launcher::live::watch(&args),
        Command::ExportMetrics(args) => launcher::live::export_metrics(&args),
        Command::Generate(args) => launcher::hand_on::run_named("generate", &args),
        Command::Export(args) => launcher::hand_on::run_named("export", &args),
        Command::Import(args) => launcher::hand_on::run_named("import", &args),
        Command::Checkpoint(args) => launcher::checkpoint::run(&args),
        Command::Completions(args) => launcher::manual::completions(&args),
        Command::Man(args) => launcher::manual::man(&args),
    };
    let exit = result.unwrap_or_else(|error| {
        let _ = writeln!(std::io::stderr(), "error: {error:#}");
        launcher::exit_of(&error)
    });
    ExitCode::from(exit.code() as u8)
}
