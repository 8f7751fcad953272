//! `phalanx train`: everything that can be wrong is told before a rank starts; then `restarts` keeps it going.

use crate::cli::TrainArgs;
use crate::progress::{Console, Width};
use crate::restarts::{Plan, keep_going, largest_world};
use crate::run_lock::RunLock;
use crate::slurm::{self, Batch};
use crate::{Hosts, LaunchError, agent, allocation, mpirun};
use anyhow::{Context, Result};
use configs::{Exit, RunConfig};
use dataloader::{DataSet, Samples, SuiteSet, ValidationSet};
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Checks, starts and looks after a training run.
///
/// # Errors
/// What is wrong with configuration, data, hosts or installation.
pub fn run(args: &TrainArgs) -> Result<Exit> {
    let config = checked_config(args)?;
    launch(args, &config, &["train".into(), args.config.clone()])
}

/// Starts and looks after ranks that do what `words` say, which `phalanx` and `phalanx-rank` both understand.
///
/// # Errors
/// What is wrong with hosts or installation.
pub(crate) fn launch(args: &TrainArgs, config: &RunConfig, words: &[String]) -> Result<Exit> {
    let plan = plan(args, config, words)?;
    if args.slurm {
        write!(std::io::stdout(), "{}", slurm_script(args, words, &plan)?)?;
        return Ok(Exit::Done);
    }
    if args.dry_run {
        let command = plan.command(plan.ranks, &plan.hosts, true)?;
        writeln!(std::io::stdout(), "{}", mpirun::shell_quoted(&command))?;
        return Ok(Exit::Done);
    }
    mpirun::find_mpirun(std::env::var_os("PATH").as_deref())?;

    let mut console = console();
    if args.fresh && plan.folder.exists() {
        drop(RunLock::take(&plan.folder)?); // nobody may be at it
        if let Some(aside) = move_aside(&plan.folder)? {
            console.err(&format!("moved {} to {}", plan.folder.display(), aside.display()));
        }
    }
    let lock = RunLock::take(&plan.folder)?;
    let outcome = keep_going(&plan, &lock, &mut console)?;
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
    if let Some(file) = &config.eval.suite {
        checked_suite(file, &config).context("eval.suite")?;
    }
    Ok(config)
}

/// Lays out all of a suite as the ranks will, so that none of them finds what is wrong with it.
fn checked_suite(file: &Path, config: &RunConfig) -> Result<()> {
    let suite = configs::load_suite(file)?;
    let sources = config.data.sources();
    let data = DataSet::open(&sources[0].path)?; // all of a mixture have one tokenizer
    for task in &suite.tasks {
        for &shots in &task.shots {
            SuiteSet::open(task, shots, suite.seed, data.tokenizer(), config.model.seq_len)?;
        }
    }
    Ok(())
}

/// This command as a batch script, without what the script's own lines say.
fn slurm_script(args: &TrainArgs, words: &[String], plan: &Plan) -> Result<String> {
    let own = std::env::current_exe()?.display().to_string();
    let mut command = vec![own];
    command.extend(words.iter().cloned());
    command.extend(["-n".into(), plan.ranks.to_string()]);
    command.extend(args.sets.iter().flat_map(|set| ["--set".to_string(), set.clone()]));
    command.extend(args.mca.iter().flat_map(|pair| ["--mca".to_string(), pair.clone()]));
    command.extend(args.oversubscribe.then(|| "--oversubscribe".to_string()));
    let nodes = plan.hosts.list().len();
    Ok(slurm::script(&Batch {
        name: &plan.name,
        ranks: plan.ranks,
        nodes: (nodes > 0).then_some(nodes),
        threads: plan.threads,
        command: &mpirun::shell_quoted(&command),
    }))
}

/// What all starts of this run have in common.
fn plan(args: &TrainArgs, config: &RunConfig, words: &[String]) -> Result<Plan> {
    let hosts = hosts(args.hosts.as_deref(), args.hostfile.as_deref())?;
    let ranks = ranks(args, &hosts, config)?;
    let mut program = vec![mpirun::rank_binary()?];
    program.extend(words.iter().cloned());
    for set in &args.sets {
        program.extend(["--set".into(), set.clone()]);
    }
    Ok(Plan {
        name: config.run.name.clone(),
        folder: config.run.dir.clone(),
        listen: config.metrics.listen,
        hosts,
        ranks,
        micro_batches: config.batches().plan(0, 1)?.micro_batches,
        threads: config.parallel.threads,
        min_hosts: args.min_hosts,
        max_restarts: args.max_restarts,
        hang_timeout: Duration::from_secs(config.guard.hang_timeout_s),
        program,
        faults: args.inject.clone(),
        oversubscribe: args.oversubscribe,
        mca: args.mca.clone(),
    })
}

/// The machines that were named, or that a scheduler has allocated, or this one.
pub(crate) fn hosts(list: Option<&str>, file: Option<&str>) -> Result<Hosts, LaunchError> {
    match (list, file) {
        (Some(list), _) => Hosts::parse_list(list),
        (None, Some(file)) => Hosts::read_file(file),
        (None, None) => {
            let env = |name: &str| std::env::var(name).ok();
            let allocated = allocation::from_environment(env, agent::is_this_machine)?;
            Ok(allocated.unwrap_or_else(Hosts::this_machine))
        }
    }
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
        (None, Some(slots)) => largest_world(slots, config.batches().plan(0, 1)?.micro_batches),
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
