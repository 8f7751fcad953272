//! `phalanx plan`: what a run will take, before anything is paid for. Owns the arguments; the arithmetic is
//! `configs`', how it reads is in `text` and `plot`.

mod plot;
mod simulate;
mod text;

use crate::{Hosts, LaunchError};
use anyhow::{Context, Result, bail};
use clap::Args;
use configs::plan::RANK_HOURS_BETWEEN_FAILURES;
use configs::plan::{Cluster, Link, MACHINE_FILE, Machine, Measured, PUBLISHED, Plan, PlanError, Question};
use configs::{Device, Exit, RunConfig};
use serde::Serialize;
use std::io::Write;
use std::path::{Path, PathBuf};

/// `phalanx plan`
#[derive(Debug, Args)]
pub struct PlanArgs {
    /// Configuration of the run (TOML).
    #[arg(required_unless_present = "published")]
    pub config: Option<PathBuf>,
    /// Ranks [default: those of one node].
    #[arg(long, short = 'n', value_name = "N", conflicts_with_all = ["hosts", "hostfile"])]
    pub ranks: Option<usize>,
    /// Ranks of a node [default: what the machine has].
    #[arg(long, value_name = "M", conflicts_with_all = ["hosts", "hostfile"])]
    pub per_node: Option<usize>,
    /// Hosts and their ranks, like a:8,b:8.
    #[arg(long, value_name = "LIST", conflicts_with = "hostfile")]
    pub hosts: Option<String>,
    /// File of hosts in Open MPI's form.
    #[arg(long, value_name = "FILE")]
    pub hostfile: Option<String>,
    /// What a rank computes on: h200, h100, a100-80, cpu, or measured [default: h100; cpu where the
    /// configuration says so].
    #[arg(long, value_name = "NAME")]
    pub gpu: Option<String>,
    /// File of a machine's rates, for --gpu measured; phalanx-rank bench calibrate writes it.
    #[arg(long, value_name = "FILE", default_value = MACHINE_FILE)]
    pub machine: PathBuf,
    /// Network of a node: ib400x8 is eight ports of 400 Gbit/s InfiniBand, eth100 one of Ethernet
    /// [default: the machine's].
    #[arg(long, value_name = "NAME")]
    pub link: Option<String>,
    /// Price of a rank and hour, in any money.
    #[arg(long, value_name = "MONEY")]
    pub price: Option<f64>,
    /// Hours that one rank runs, on average, until it ends a job.
    #[arg(long, value_name = "HOURS", default_value_t = RANK_HOURS_BETWEEN_FAILURES.round())]
    pub mtbf: f64,
    /// Where a node writes checkpoints to, GB/s.
    #[arg(long, value_name = "GB/S")]
    pub disk: Option<f64>,
    /// Override a key of the configuration, like batch.micro_batch=4.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub sets: Vec<String>,
    /// Print all of it as JSON.
    #[arg(long)]
    pub json: bool,
    /// Draw the scaling curve into this file (SVG).
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,
    /// Simulate so many steps of all ranks, and a whole run with failures.
    #[arg(long, value_name = "STEPS")]
    pub simulate: Option<u64>,
    /// Seed of the simulation's chances.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
    /// In the simulation, how much a rank's computation varies from step to step, like 0.02.
    #[arg(long, value_name = "SHARE", default_value_t = 0.0)]
    pub jitter: f64,
    /// In the simulation, a rank that takes longer, like 37:1.5.
    #[arg(long = "slow-rank", value_name = "RANK:FACTOR")]
    pub slow_ranks: Vec<String>,
    /// In the simulation, a node whose link takes longer, like 3:10.
    #[arg(long = "slow-link", value_name = "NODE:FACTOR")]
    pub slow_links: Vec<String>,
    /// Print what the same arithmetic says of published runs, beside what they report.
    #[arg(long)]
    pub published: bool,
}

/// What `--json` prints.
#[derive(Serialize)]
struct Answer<'a> {
    #[serde(flatten)]
    plan: &'a Plan,
    #[serde(skip_serializing_if = "Option::is_none")]
    simulated: Option<&'a simulate::Simulated>,
}

/// Plans, and prints.
///
/// # Errors
/// What is wrong with configuration, names and numbers.
pub fn run(args: &PlanArgs) -> Result<Exit> {
    let mut out = std::io::stdout().lock();
    if args.published {
        write!(out, "{}", published()?)?;
        return Ok(Exit::Done);
    }
    let Some(config) = &args.config else { bail!("no configuration") };
    let config = configs::load(config, &args.sets, &dataloader::vocab_size)?;
    let question = question(args, &config)?;
    let plan = Plan::of(&config, &question);
    let simulated = match args.simulate {
        Some(_) => Some(simulate::simulate(args, &config, &question, &plan)?),
        None => None,
    };
    if args.json {
        let all = Answer { plan: &plan, simulated: simulated.as_ref() };
        writeln!(out, "{}", serde_json::to_string_pretty(&all)?)?;
    } else {
        let told = simulated.map(|simulated| simulate::text(&simulated, &plan)).unwrap_or_default();
        write!(out, "{}{told}", text::text(&plan))?;
    }
    if let Some(file) = &args.svg {
        std::fs::write(file, plot::scaling(&plan)).with_context(|| format!("--svg {}", file.display()))?;
    }
    Ok(Exit::Done)
}

/// The table of published runs, as the documentation has it.
pub(crate) fn published() -> Result<String, PlanError> {
    let mut table =
        "| who | model | ranks | micro-batch x passes | recomputes | tokens/s a GPU | predicted | ratio |\n\
                     |---|---|---|---|---|---|---|---|\n"
            .to_string();
    for run in PUBLISHED {
        table.push_str(&run.row()?);
        table.push('\n');
    }
    Ok(table)
}

/// What is asked, from the flags.
fn question(args: &PlanArgs, config: &RunConfig) -> Result<Question> {
    let machine = machine(args, config)?;
    let (ranks, per_node) = match hosts(args)? {
        Some(hosts) => spread(&hosts)?,
        None => {
            let per_node = args.per_node.unwrap_or(machine.per_node);
            (args.ranks.unwrap_or(per_node), per_node)
        }
    };
    positive("--ranks", ranks as f64, "one rank is the smallest run")?;
    positive("--per-node", per_node as f64, "a node has at least one rank")?;
    positive("--mtbf", args.mtbf, "hours that one rank runs until it ends a job, like 50000")?;
    let between = match &args.link {
        Some(link) => Link::named(link)?,
        None => machine.between.clone(),
    };
    if let Some(price) = args.price {
        positive("--price", price, "money for a rank and hour, like 2.5")?;
    }
    let measured_disk = machine.measured.as_ref().map(|measured| measured.disk_bytes_per_s);
    let disk = args.disk.map(|gigabytes| gigabytes * 1e9).or(measured_disk).unwrap_or(2e9);
    positive("--disk", disk, "GB/s of a node, like 2")?;
    Ok(Question {
        ranks,
        cluster: Cluster { machine, between, per_node, disk_bytes_per_s: disk },
        price: args.price,
        rank_hours_between_failures: args.mtbf,
    })
}

fn machine(args: &PlanArgs, config: &RunConfig) -> Result<Machine> {
    let on_cpu = config.parallel.device == Device::Cpu;
    let name = args.gpu.as_deref().unwrap_or(if on_cpu { "cpu" } else { "h100" });
    if name == "measured" {
        return Ok(Machine::measured(read_measured(&args.machine)?, config.parallel.threads));
    }
    Ok(Machine::named(name, config.parallel.threads)?)
}

fn read_measured(file: &Path) -> Result<Measured, LaunchError> {
    let refuse = |why: String| LaunchError::Calibration { file: file.to_path_buf(), why };
    let text = std::fs::read_to_string(file).map_err(|error| refuse(error.to_string()))?;
    Measured::parse(&text).map_err(refuse)
}

fn hosts(args: &PlanArgs) -> Result<Option<Hosts>, LaunchError> {
    match (&args.hosts, &args.hostfile) {
        (Some(list), _) => Hosts::parse_list(list).map(Some),
        (None, Some(file)) => Hosts::read_file(file).map(Some),
        (None, None) => Ok(None),
    }
}

/// Ranks in all, and of the fullest host.
fn spread(hosts: &Hosts) -> Result<(usize, usize), LaunchError> {
    let unknown = || LaunchError::UnknownSlots { hosts: hosts.describe(1) };
    let ranks = hosts.slots(1).ok_or_else(unknown)?;
    let fullest = hosts.list().iter().filter_map(|host| host.slots).max().unwrap_or(1);
    Ok((ranks, fullest))
}

fn positive(what: &'static str, got: f64, hint: &'static str) -> Result<(), PlanError> {
    if got.is_finite() && got > 0.0 {
        return Ok(());
    }
    Err(PlanError::NotPositive { what, got: got.to_string(), hint })
}
