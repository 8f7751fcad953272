//! `phalanx eval`: ranks that score a model and are gone. What of a suite can be checked without the model is, before
//! one starts; nothing is left behind that could be gone on from, so nobody is started again.

use crate::banners::Banners;
use crate::mpirun::{self, Job};
use crate::train::hosts;
use crate::{Hosts, LaunchError, agent, hand_on};
use anyhow::Result;
use clap::Args;
use configs::Exit;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};

/// `phalanx eval`
#[derive(Debug, Args)]
pub struct EvalArgs {
    /// The model: a run's folder, or one of its checkpoints.
    #[arg(value_name = "CHECKPOINT")]
    pub model: String,
    /// What is asked (TOML).
    #[arg(long, value_name = "FILE")]
    pub suite: String,
    /// Which checkpoint of the run [default: the newest good one].
    #[arg(long, value_name = "N")]
    pub step: Option<u64>,
    /// Write the scores as JSON too.
    #[arg(long, value_name = "FILE")]
    pub out: Option<String>,
    /// Draw scores over the number of shots (SVG).
    #[arg(long, value_name = "FILE")]
    pub plot: Option<String>,
    /// Ranks, which share the examples [default: as many as the slots hold].
    #[arg(short = 'n', value_name = "RANKS")]
    pub ranks: Option<usize>,
    /// Hosts and their slots, like a:4,b:4 [default: this machine and its cores].
    #[arg(long, value_name = "LIST", conflicts_with = "hostfile")]
    pub hosts: Option<String>,
    /// File of hosts in Open MPI's form: one `host slots=4` per line.
    #[arg(long, value_name = "FILE")]
    pub hostfile: Option<String>,
    /// Threads that compute, of each rank.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub threads: usize,
    /// auto, cpu or cuda.
    #[arg(long, default_value = "auto")]
    pub device: String,
    /// auto, fp32 or bf16.
    #[arg(long, default_value = "fp32")]
    pub dtype: String,
    /// Allow more ranks than slots.
    #[arg(long)]
    pub oversubscribe: bool,
    /// Parameter of Open MPI, like btl_tcp_if_include=eth0.
    #[arg(long, value_name = "KEY=VALUE")]
    pub mca: Vec<String>,
    /// Print the mpirun command and start nothing.
    #[arg(long)]
    pub dry_run: bool,
}

/// Checks the suite, and has ranks score the model.
///
/// # Errors
/// What is wrong with the suite, hosts or installation.
pub fn run(args: &EvalArgs) -> Result<Exit> {
    let suite = configs::load_suite(Path::new(&args.suite))?;
    if let Some(task) = suite.tasks.iter().find(|task| !task.data.exists()) {
        return Err(LaunchError::NoSuiteData { task: task.name.clone(), data: task.data.clone() }.into());
    }
    let hosts = hosts(args.hosts.as_deref(), args.hostfile.as_deref())?;
    let (slots, given) = (hosts.slots(args.threads), args.ranks);
    let ranks = match (given, slots) {
        (Some(0), _) => return Err(LaunchError::NoRanks.into()),
        (Some(ranks), Some(slots)) if ranks > slots && !args.oversubscribe => {
            let stated = hosts.describe(args.threads);
            return Err(LaunchError::TooManyRanks { ranks, slots, stated }.into());
        }
        (Some(ranks), _) => ranks,
        (None, Some(slots)) => slots,
        (None, None) => {
            return Err(LaunchError::UnknownSlots { hosts: args.hostfile.clone().unwrap_or_default() }.into());
        }
    };
    let words = words(args);
    if ranks == 1 && hosts.list().is_empty() && !args.dry_run {
        return hand_on::run(&words);
    }
    let command = command(args, ranks, &hosts, words)?;
    if args.dry_run {
        writeln!(std::io::stdout(), "{}", mpirun::shell_quoted(&command))?;
        return Ok(Exit::Done);
    }
    mpirun::find_mpirun(std::env::var_os("PATH").as_deref())?;
    watched(&command)
}

/// What `phalanx-rank` is told.
fn words(args: &EvalArgs) -> Vec<String> {
    let mut words = ["eval", &args.model, "--suite", &args.suite].map(String::from).to_vec();
    let threads = Some(args.threads.to_string());
    for (flag, value) in [
        ("--step", args.step.map(|step| step.to_string())),
        ("--out", args.out.clone()),
        ("--plot", args.plot.clone()),
        ("--threads", threads),
        ("--device", Some(args.device.clone())),
        ("--dtype", Some(args.dtype.clone())),
    ] {
        words.extend(value.into_iter().flat_map(|value| [flag.to_string(), value]));
    }
    words
}

fn command(args: &EvalArgs, ranks: usize, hosts: &Hosts, words: Vec<String>) -> Result<Vec<String>> {
    let program: Vec<String> = std::iter::once(mpirun::rank_binary()?).chain(words).collect();
    Ok(mpirun::mpirun_command(&Job {
        ranks,
        hosts,
        several: hosts.list().iter().any(|host| !agent::is_this_machine(&host.name)),
        tagged: false,
        oversubscribe: args.oversubscribe,
        as_root: rustix::process::geteuid().is_root(),
        mca: &args.mca,
        program: &program,
    })?)
}

/// Runs the ranks; what mpirun says of their end, they have said better.
fn watched(command: &[String]) -> Result<Exit> {
    let system = |what: &str| {
        let what = what.to_string();
        |source| LaunchError::System { what, source }
    };
    let mut child = Command::new(&command[0])
        .args(&command[1..])
        .stderr(Stdio::piped())
        .spawn()
        .map_err(system("mpirun could not be started"))?;
    let (mut banners, mut stderr) = (Banners::default(), std::io::stderr());
    for line in child.stderr.take().into_iter().flat_map(|stderr| BufReader::new(stderr).lines()) {
        let line = line.map_err(system("what the ranks say could not be read"))?;
        if !banners.take_last_words(&line) {
            for line in banners.take(line) {
                let _ = writeln!(stderr, "{line}");
            }
        }
    }
    for line in banners.finish() {
        let _ = writeln!(stderr, "{line}");
    }
    let status = child.wait().map_err(system("mpirun's exit code could not be read"))?;
    Ok(status.code().map_or(Exit::Failed, Exit::from_code))
}
