//! `phalanx finetune`: what of a task can be checked without the model, before a rank starts. The model is
//! the ranks'; looking after them is `train`'s.

use crate::LaunchError;
use crate::cli::TrainArgs;
use crate::train::launch;
use anyhow::{Context, Result};
use clap::Args;
use configs::{Exit, ModelConfig, TaskFile};
use dataloader::read_examples;
use std::path::Path;

/// `phalanx finetune`
#[derive(Debug, Args)]
pub struct FinetuneArgs {
    /// Where and how it runs, as any run.
    #[command(flatten)]
    pub job: TrainArgs,
    /// The model to start from: a run's folder, or one of its checkpoints.
    #[arg(long, value_name = "CHECKPOINT")]
    pub from: String,
    /// Run folder [default: runs/NAME]
    #[arg(long, value_name = "DIR")]
    pub out: Option<String>,
}

/// Checks, starts and looks after a fine-tuning run.
///
/// # Errors
/// What is wrong with the task, its data, hosts or installation.
pub fn run(args: &FinetuneArgs) -> Result<Exit> {
    let mut job = args.job.clone();
    job.sets.extend(args.out.iter().map(|out| format!("run.dir={}", toml_string(out))));
    let file = configs::load_task(Path::new(&job.config), &job.sets)?;
    let examples = checked_examples(&file)?;
    let micro_batches = file.micro_batches();
    if let Some(ranks) = job.ranks.filter(|&ranks| ranks > 0 && !micro_batches.is_multiple_of(ranks as u64)) {
        return Err(LaunchError::TaskRanks { ranks, micro_batches }.into());
    }
    // All that a launch has to know of a run follows from the task; the model's shape does not matter to it.
    let config = file.run_config(&ModelConfig::default(), examples, String::new());
    let words = ["finetune", &job.config, "--from", &args.from].map(String::from);
    launch(&job, &config, &words)
}

/// The number of training examples, once all examples are known to be what the task says.
fn checked_examples(file: &TaskFile) -> Result<u64> {
    if let Some(val) = &file.data.val {
        read_examples(val, &file.task, true).context("data.val")?;
    }
    let train = file.data.train.as_deref().unwrap_or(Path::new(""));
    Ok(read_examples(train, &file.task, true).context("data.train")?.len() as u64)
}

/// A path as a TOML string, whatever it looks like.
fn toml_string(text: &str) -> String {
    format!("{text:?}")
}
