//! The command line of `phalanx`, as data.

use crate::checkpoint::CheckpointArgs;
use crate::data::DataArgs;
use crate::doctor::DoctorArgs;
use crate::eval::EvalArgs;
use crate::finetune::FinetuneArgs;
use crate::manual::{CompletionsArgs, ManArgs};
use crate::plan::PlanArgs;
use clap::{Args, Parser, Subcommand};
use configs::Fault;
use std::ffi::OsString;

/// Trains GPT models on MPI ranks that advance in lockstep.
#[derive(Debug, Parser)]
#[command(name = "phalanx", version, arg_required_else_help = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Train a model, or go on where the run stopped.
    Train(TrainArgs),
    /// Say what a run will take before it is paid for: memory, time, traffic, money.
    Plan(PlanArgs),
    /// Fine-tune a trained model to a task, or go on where that stopped.
    Finetune(FinetuneArgs),
    /// Write a fine-tuned model's answers for the examples of a file.
    #[command(disable_help_flag = true)]
    Predict(HandedOn),
    /// Score a trained model on the tasks of a suite: perplexity, choices, what it writes, with K examples before.
    Eval(EvalArgs),
    /// Make data sets from text, look into them and check them.
    Data(DataArgs),
    /// Look at machines, network and installation: what a run needs, with a verdict on each.
    Doctor(DoctorArgs),
    /// Show a run while it goes on, or one that is over: a page for a browser, or text. Several are laid over each other.
    Watch(WatchArgs),
    /// Write what a run measured in another program's form.
    ExportMetrics(ExportMetricsArgs),
    /// Write text with a trained model.
    #[command(disable_help_flag = true)]
    Generate(HandedOn),
    /// Write a model in the form of transformers or llm.c, and prove that it is the model.
    #[command(disable_help_flag = true)]
    Export(HandedOn),
    /// Make a run of a model of transformers or llm.c.
    #[command(disable_help_flag = true)]
    Import(HandedOn),
    /// List, verify, show, prune and compare checkpoints, and prove that a run resumes bit for bit.
    Checkpoint(CheckpointArgs),
    /// Print what a shell reads to complete these commands.
    Completions(CompletionsArgs),
    /// Print the manual page, or write one for each command into a folder.
    Man(ManArgs),
}

/// A command that needs tensors: its arguments are `phalanx-rank`'s, which has the help for them too.
#[derive(Debug, Args)]
pub struct HandedOn {
    /// What the command takes; with --help it says so.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGUMENTS")]
    pub arguments: Vec<OsString>,
}

/// `phalanx train`
#[derive(Debug, Clone, Args)]
pub struct TrainArgs {
    /// Configuration of the run, or task to fine-tune to (TOML).
    pub config: String,
    /// Ranks [default: the largest power of two that the slots hold and the batch allows].
    #[arg(short = 'n', value_name = "RANKS")]
    pub ranks: Option<usize>,
    /// Hosts and their slots, like a:4,b:4 [default: this machine and its cores].
    #[arg(long, value_name = "LIST", conflicts_with = "hostfile")]
    pub hosts: Option<String>,
    /// File of hosts in Open MPI's form: one `host slots=4` per line.
    #[arg(long, value_name = "FILE")]
    pub hostfile: Option<String>,
    /// Override a key of the configuration, like optim.lr=3e-4.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub sets: Vec<String>,
    /// Move an earlier run folder aside and start anew.
    #[arg(long)]
    pub fresh: bool,
    /// Restarts without a new checkpoint in between, after which the run is given up.
    #[arg(long, value_name = "N", default_value_t = 5)]
    pub max_restarts: u32,
    /// Hosts without which the run waits; with as many, it goes on without those that do not answer.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub min_hosts: usize,
    /// Allow more ranks than slots.
    #[arg(long)]
    pub oversubscribe: bool,
    /// Parameter of Open MPI, like btl_tcp_if_include=eth0.
    #[arg(long, value_name = "KEY=VALUE")]
    pub mca: Vec<String>,
    /// Print a batch script for Slurm that does what this command does, and start nothing.
    #[arg(long)]
    pub slurm: bool,
    /// Print the mpirun command and start nothing.
    #[arg(long)]
    pub dry_run: bool,
    /// Make something go wrong, for tests.
    #[arg(long, value_name = "FAULT", hide = true, requires = "allow_faults")]
    pub inject: Vec<Fault>,
    /// Confirm that the run may be spoilt.
    #[arg(long, hide = true)]
    pub allow_faults: bool,
}

/// `phalanx watch`
#[derive(Debug, Args)]
pub struct WatchArgs {
    /// Run folders, like runs/demo, or addresses of rank 0, like http://127.0.0.1:9401.
    #[arg(required = true, value_name = "RUN|URL")]
    pub runs: Vec<String>,
    /// Show it here, as text; once, where standard output is no terminal.
    #[arg(long)]
    pub text: bool,
    /// Where the page is served; port 0 is a free one, and 127.0.0.1 this machine only.
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:0", conflicts_with = "text")]
    pub listen: std::net::SocketAddr,
}

/// `phalanx export-metrics`
#[derive(Debug, Args)]
pub struct ExportMetricsArgs {
    /// Run folder, like runs/demo.
    pub run: std::path::PathBuf,
    /// Folder for an event file of TensorBoard.
    #[arg(long, value_name = "DIR")]
    pub tensorboard: std::path::PathBuf,
}
