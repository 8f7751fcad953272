//! `phalanx train`: everything that can be wrong is told before a rank starts; then mpirun runs.

use crate::cli::TrainArgs;
use crate::mpirun::{self, Job};
use crate::progress::{Console, Width};
use crate::supervise::supervise;
use crate::{Hosts, LaunchError};
use anyhow::{Context, Result};
use configs::{Exit, RunConfig};
use dataloader::{DataSet, Samples, ValidationSet};
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};

/// Checks, starts and looks after a training run.
///
/// # Errors
/// What is wrong with configuration, data, hosts or installation.
pub fn run(args: &TrainArgs) -> Result<Exit> {
    let config = checked_config(args)?;
    let command = command(args, &config)?;
    if args.dry_run {
        writeln!(std::io::stdout(), "{}", mpirun::shell_quoted(&command))?;
        return Ok(Exit::Done);
    }
    mpirun::find_mpirun(std::env::var_os("PATH").as_deref())?;

    let mut console = console();
    if args.fresh
        && let Some(aside) = move_aside(&config.run.dir)?
    {
        console.err(&format!("moved {} to {}", config.run.dir.display(), aside.display()));
    }
    console.err(&mpirun::shell_quoted(&command));
    let outcome = supervise(&command, console)?;
    let _ = writeln!(std::io::stderr(), "{}", outcome.told);
    Ok(outcome.exit)
}

/// The configuration, once it and the data that it names are known to be usable.
fn checked_config(args: &TrainArgs) -> Result<RunConfig> {
    let config = configs::load(Path::new(&args.config), &args.sets, &dataloader::vocab_size)?;
    let seq_len = config.model.seq_len;
    Samples::of(&config.data, seq_len, config.run.seed).context(config.data.train_key())?;
    if let Some(val) = &config.data.val {
        DataSet::open(val)
            .and_then(|data| ValidationSet::open(data, seq_len, config.eval.max_tokens))
            .context("data.val")?;
    }
    Ok(config)
}

/// The mpirun command of this run.
fn command(args: &TrainArgs, config: &RunConfig) -> Result<Vec<String>> {
    let hosts = match (&args.hosts, &args.hostfile) {
        (Some(list), _) => Hosts::parse_list(list)?,
        (None, Some(file)) => Hosts::read_file(file)?,
        (None, None) => Hosts::this_machine(),
    };
    let ranks = ranks(args, &hosts, config)?;
    let mut program = vec![mpirun::rank_binary()?, "train".into(), args.config.clone()];
    for set in &args.sets {
        program.extend(["--set".into(), set.clone()]);
    }
    if !args.inject.is_empty() {
        program.push("--allow-faults".into());
    }
    for fault in &args.inject {
        program.extend(["--inject".into(), fault.to_string()]);
    }
    Ok(mpirun::mpirun_command(&Job {
        ranks,
        hosts: &hosts,
        oversubscribe: args.oversubscribe,
        as_root: rustix::process::geteuid().is_root(),
        mca: &args.mca,
        program: &program,
    })?)
}

/// How many ranks: those asked for, if they fit and share the batch; else as many as fit and do.
fn ranks(args: &TrainArgs, hosts: &Hosts, config: &RunConfig) -> Result<usize> {
    let threads = config.parallel.threads;
    let slots = hosts.slots(threads);
    let ranks = match (args.ranks, slots) {
        (Some(0), _) => return Err(LaunchError::NoRanks.into()),
        (Some(ranks), Some(slots)) if ranks > slots && !args.oversubscribe => {
            return Err(LaunchError::TooManyRanks { ranks, slots, stated: hosts.describe(threads) }.into());
        }
        (Some(ranks), _) => ranks,
        // The first batch is the smallest: who shares it shares them all.
        (None, Some(slots)) => default_ranks(slots, config.batches().plan(0, 1)?.micro_batches),
        (None, None) => {
            return Err(LaunchError::UnknownSlots { hosts: args.hostfile.clone().unwrap_or_default() }.into());
        }
    };
    if args.fresh || !config.run.dir.exists() {
        config.batches().plan(0, ranks)?;
    } else {
        config.batch_plan(ranks)?; // where in its ramp the run goes on, the ranks will see
    }
    Ok(ranks)
}

/// The largest power of two that is at most `slots` and divides the step's micro-batches, so that
/// every rank does the same number of micro-steps.
fn default_ranks(slots: usize, micro_batches: u64) -> usize {
    let mut ranks = 1;
    while ranks * 2 <= slots && micro_batches.is_multiple_of(ranks as u64 * 2) {
        ranks *= 2;
    }
    ranks
}

/// Renames an existing run folder to the first free `RUN.old-N`. Returns where it went.
fn move_aside(run: &Path) -> Result<Option<PathBuf>, LaunchError> {
    if !run.exists() {
        return Ok(None);
    }
    let numbered = |n: usize| {
        let mut name = run.as_os_str().to_os_string();
        name.push(format!(".old-{n}"));
        PathBuf::from(name)
    };
    let to = (1..).map(numbered).find(|path| !path.exists()).unwrap_or_else(|| numbered(0));
    match std::fs::rename(run, &to) {
        Ok(()) => Ok(Some(to)),
        Err(source) => Err(LaunchError::MoveAside { from: run.to_path_buf(), to, source }),
    }
}

fn console() -> Console<std::io::Stdout, std::io::Stderr> {
    let width = || {
        let size = rustix::termios::tcgetwinsize(std::io::stderr()).ok()?;
        Some(usize::from(size.ws_col)).filter(|&columns| columns > 0)
    };
    let terminal = std::io::stderr().is_terminal();
    Console::new(std::io::stdout(), std::io::stderr(), terminal.then(|| Box::new(width) as Width))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_by_default_are_a_power_of_two_that_shares_the_batch() {
        for (slots, micro_batches, ranks) in
            [(1, 8, 1), (2, 8, 2), (3, 8, 2), (16, 8, 8), (8, 12, 4), (8, 7, 1)]
        {
            assert_eq!(
                default_ranks(slots, micro_batches),
                ranks,
                "{slots} slots, {micro_batches} micro-batches"
            );
        }
    }

    #[test]
    fn an_old_run_moves_to_the_first_free_name() {
        let folder = tempfile::tempdir().unwrap();
        let run = folder.path().join("run");
        assert_eq!(move_aside(&run).unwrap(), None);
        for n in 1..=2 {
            std::fs::create_dir(&run).unwrap();
            assert_eq!(move_aside(&run).unwrap(), Some(folder.path().join(format!("run.old-{n}"))));
            assert!(!run.exists());
        }
    }
}
