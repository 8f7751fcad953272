//! `phalanx-rank`: what MPI starts, one process per rank. Parses, joins the others, runs, and turns
//! the outcome into an exit code.
#![allow(clippy::print_stderr)] // before the logger is there, and for the last word of a failed rank

use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use configs::plan::{MACHINE_FILE, Measured};
use configs::{CheckpointConfig, Exit, Fault, ParallelConfig, RunConfig};
use ops::collectives::{Communicator, DeviceSums, abort_on_panic, serve};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tch::Kind;
use trainer::bench::{AttentionBench, Calibration, Case};
use trainer::checkpoint::commands;
use trainer::exchange::{ExportArgs, ImportArgs, export_command, import_command};
use trainer::generate::{GenerateArgs, generate_command};
use trainer::suite::{EvalArgs, eval_command};
use trainer::{Faults, Log, Part, PredictOptions, Process, Pulse, StopFlag, TrainError, heartbeat};

/// One rank of a Phalanx run. `phalanx` starts it; so do mpirun and srun.
#[derive(Parser)]
#[command(name = "phalanx-rank", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Train, or go on with, the run that a configuration describes
    Train(TrainArgs),
    /// Fine-tune the model of a checkpoint to a task
    Finetune(FinetuneArgs),
    /// Write a fine-tuned model's answers for the examples of a file
    Predict(PredictArgs),
    /// Measure parts of a step against a reference, and write target/bench/*.json
    #[command(subcommand)]
    Bench(Bench),
    /// Say what this machine has, and how fast its ranks talk, as JSON: `phalanx doctor` reads it
    #[command(hide = true)]
    Doctor,
    /// Look after a run's checkpoints: what `phalanx checkpoint` runs
    #[command(subcommand, hide = true)]
    Checkpoint(AskCheckpoint),
    /// Score a trained model on the tasks of a suite
    Eval(EvalArgs),
    /// Write text with a trained model
    Generate(GenerateArgs),
    /// Write a model in the form of transformers or llm.c, and prove that it is the model
    Export(ExportArgs),
    /// Make a run of a model of transformers or llm.c
    Import(ImportArgs),
    /// Say what the commands take that `phalanx` hands on, as JSON: its completions and manual pages have it
    #[command(hide = true)]
    Arguments,
    /// Compare a GPU with the CPU, and time it: `scripts/gpu-check` runs the parts
    #[command(hide = true)]
    GpuCheck(GpuCheckArgs),
}

#[derive(Subcommand)]
enum AskCheckpoint {
    Ls {
        run: PathBuf,
    },
    Verify {
        run: PathBuf,
        #[arg(long)]
        step: Option<u64>,
    },
    Show {
        run: PathBuf,
        #[arg(long)]
        step: Option<u64>,
    },
    Prune {
        run: PathBuf,
        #[arg(long)]
        keep_last: usize,
        #[arg(long, default_value_t = 0)]
        keep_every_steps: u64,
        #[arg(long)]
        dry_run: bool,
    },
    Compare {
        first: PathBuf,
        second: PathBuf,
        #[arg(long)]
        step: Option<u64>,
    },
}

#[derive(Subcommand)]
enum Bench {
    /// Sums and gathers of 124M gradients, against memory on one node and a plain message between nodes
    Collectives {
        /// Measured turns of each side
        #[arg(long, default_value_t = 7)]
        turns: usize,
        /// Part of the gradients that is taken
        #[arg(long, default_value_t = 1.0)]
        fraction: f64,
    },
    /// Attention patterns, forward and backward on the CPU, against libtorch's dense causal attention
    Attention {
        /// Threads that compute
        #[arg(long, default_value_t = 2)]
        threads: usize,
        /// Measured turns of each side
        #[arg(long, default_value_t = 5)]
        turns: usize,
    },
    /// What a token costs by its position, dense, alternating and banded
    Decode {
        /// Threads that compute
        #[arg(long, default_value_t = 2)]
        threads: usize,
        /// Measured turns of each side
        #[arg(long, default_value_t = 5)]
        turns: usize,
    },
    /// What a banded layer takes of memory, in bytes: `attention` asks it in a process of its own
    #[command(hide = true)]
    BandMemory {
        #[arg(value_enum)]
        dtype: BenchDtype,
        seq_len: i64,
    },
    /// Memory of parameters, gradients and optimizer state, against the formula
    Memory {
        /// The run's configuration; its data need not exist if it has a vocabulary
        config: PathBuf,
        /// Set a key over the file: section.key=value
        #[arg(long = "set", value_name = "KEY=VALUE")]
        sets: Vec<String>,
    },
    /// What checkpoints of a configuration cost its steps, and their speed beside the disk's
    Save {
        /// The configuration
        config: PathBuf,
        /// Set a key over the file: section.key=value
        #[arg(long = "set", value_name = "KEY=VALUE")]
        sets: Vec<String>,
        /// Steps between checkpoints
        #[arg(long, default_value_t = 20)]
        steps: u64,
        /// Measured turns of each side
        #[arg(long, default_value_t = 3)]
        turns: usize,
        /// Where to save: on the disk that is meant
        #[arg(long, value_name = "DIR", default_value = "target/bench/save")]
        folder: PathBuf,
    },
    /// How fast a configuration's steps are, as a line of JSON: `scripts/bench-train` compares it
    Speed {
        /// The configuration
        config: PathBuf,
        /// Set a key over the file: section.key=value
        #[arg(long = "set", value_name = "KEY=VALUE")]
        sets: Vec<String>,
        /// Timed steps
        #[arg(long, default_value_t = 8)]
        steps: u64,
        /// Steps before them
        #[arg(long, default_value_t = 3)]
        warmup: u64,
        /// Measure the process's matrix rate too
        #[arg(long)]
        peak: bool,
    },
    /// Rates of this machine for `phalanx plan --gpu measured`: products, attention, memory, collectives on the
    /// ranks that are there, disk
    Calibrate {
        /// The machine file that is written
        #[arg(long, value_name = "FILE", default_value = MACHINE_FILE)]
        out: PathBuf,
    },
    /// Steps of a configuration beside what the plan says of them on a machine as measured
    Plan {
        /// The configuration; its data need not exist
        config: PathBuf,
        /// Set a key over the file: section.key=value
        #[arg(long = "set", value_name = "KEY=VALUE")]
        sets: Vec<String>,
        /// The machine file that `calibrate` wrote on as many ranks
        #[arg(long, value_name = "FILE", default_value = MACHINE_FILE)]
        machine: PathBuf,
    },
    /// How much of the communication of a configuration's steps is hidden, and the bytes they send
    Overlap {
        /// The configuration
        config: PathBuf,
        /// Set a key over the file: section.key=value
        #[arg(long = "set", value_name = "KEY=VALUE")]
        sets: Vec<String>,
        /// Measured turns of each side
        #[arg(long, default_value_t = 5)]
        turns: usize,
    },
}

#[derive(Clone, Copy, ValueEnum)]
enum BenchDtype {
    Fp32,
    Bf16,
}

#[derive(Args)]
struct GpuCheckArgs {
    #[arg(value_enum)]
    part: CheckPart,
    /// Folder for what is found
    #[arg(long)]
    out: PathBuf,
    #[arg(long, value_enum, default_value = "cuda")]
    device: CheckDevice,
}

#[derive(Clone, Copy, ValueEnum)]
enum CheckPart {
    One,
    Ranks,
    Speed,
    Report,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum CheckDevice {
    Cuda,
    /// The CPU in the place of a GPU
    Cpu,
}

#[derive(Args)]
struct TrainArgs {
    /// The run's configuration
    config: PathBuf,
    /// Set a key over the file: section.key=value
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// Make something go wrong, for tests
    #[arg(long, value_name = "FAULT", hide = true, requires = "allow_faults")]
    inject: Vec<Fault>,
    /// Confirm that the run may be spoilt
    #[arg(long, hide = true)]
    allow_faults: bool,
}

#[derive(Args)]
struct FinetuneArgs {
    #[command(flatten)]
    job: TrainArgs,
    /// The checkpoint to start from: a run's folder, or one of its checkpoints
    #[arg(long, value_name = "CHECKPOINT")]
    from: PathBuf,
}

#[derive(Args)]
struct PredictArgs {
    /// A fine-tuned run's folder, or one of its checkpoints
    checkpoint: PathBuf,
    /// Examples, as JSON lines or as a table
    file: PathBuf,
    /// Where to write instead of standard output
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Examples of a pass
    #[arg(long, default_value_t = 32)]
    batch: usize,
    /// Threads that compute
    #[arg(long, default_value_t = 1)]
    threads: usize,
}

fn main() {
    let cli = Cli::parse();
    // Before anything that takes time: a signal that finds no handler ends the process.
    let stop = StopFlag::on_signals().unwrap_or_else(|error| {
        eprintln!("error: signal handlers: {error}");
        std::process::exit(Exit::Failed.code());
    });
    let (log, pulse) = (Log::start(), Pulse::default());
    if matches!(cli.command, Command::Train(_) | Command::Finetune(_))
        && let Err(error) = heartbeat::start(&pulse)
    {
        eprintln!("error: heartbeats: {error}");
        std::process::exit(Exit::Failed.code());
    }
    let mut comm = ops::collectives::init().unwrap_or_else(|error| {
        eprintln!("error: {error}");
        std::process::exit(TrainError::from(error).exit().code());
    });
    log.joined(comm.rank());
    pulse.joined(comm.rank(), comm.activity());
    abort_on_panic(&*comm);
    let outcome = match &cli.command {
        Command::Train(args) => train(args, &mut comm, stop, log, pulse),
        Command::Finetune(args) => finetune(args, &mut comm, stop, log, pulse),
        Command::Predict(args) => predict(args, &*comm),
        Command::Checkpoint(ask) => Ok(checkpoint(ask)),
        Command::Eval(args) => eval_command(args, &*comm).map(|()| Exit::Done),
        Command::Generate(args) => generate_command(args, &*comm).map(|()| Exit::Done),
        Command::Export(args) => export_command(args, &*comm).map(|()| Exit::Done),
        Command::Import(args) => import_command(args, &*comm).map(|()| Exit::Done),
        Command::Bench(what) => bench(what, &*comm),
        Command::Doctor => doctor(&*comm),
        Command::Arguments => arguments(),
        Command::GpuCheck(args) => gpu_check(args, &mut comm),
    };
    match outcome {
        Ok(exit) => match comm.finalize() {
            Ok(()) => std::process::exit(exit.code()),
            Err(error) => {
                eprintln!("error: {error}");
                std::process::exit(Exit::Failed.code());
            }
        },
        Err(error) => {
            // What is wrong for everybody is told once: rank 0 ends the others before they speak.
            if error.is_everybodys() && comm.rank() != 0 {
                std::thread::sleep(Duration::from_secs(2));
            }
            comm.abort(error.exit().code(), &error.to_string())
        }
    }
}

fn train(
    args: &TrainArgs,
    comm: &mut Box<dyn Communicator>,
    stop: StopFlag,
    log: Log,
    pulse: Pulse,
) -> Result<Exit, TrainError> {
    let config: RunConfig = configs::load(&args.config, &args.sets, &dataloader::vocab_size)?;
    let reproducible = config.reproducible(false);
    let process = process(&args.inject, (&config.parallel, reproducible), comm, stop, log, pulse)?;
    trainer::train(&config, &**comm, &process)
}

fn finetune(
    args: &FinetuneArgs,
    comm: &mut Box<dyn Communicator>,
    stop: StopFlag,
    log: Log,
    pulse: Pulse,
) -> Result<Exit, TrainError> {
    let file = configs::load_task(&args.job.config, &args.job.sets)?;
    let reproducible = file.parallel.reproducible(false);
    let process = process(&args.job.inject, (&file.parallel, reproducible), comm, stop, log, pulse)?;
    trainer::finetune(&file, &args.from, &**comm, &process)
}

/// What this process brings to a run: device, threads and the way to sum buffers, as configured.
fn process(
    inject: &[Fault],
    (parallel, reproducible): (&ParallelConfig, bool),
    comm: &mut Box<dyn Communicator>,
    stop: StopFlag,
    log: Log,
    pulse: Pulse,
) -> Result<Process, TrainError> {
    // First of all that touches libtorch: it looks once for the part of it that knows CUDA.
    let device = ops::device::select(parallel.device, comm.local_rank())?;
    ops::device::configure_process(parallel.threads);
    // On a GPU the promise of the same bits is kept by sums in host memory.
    let sums = if reproducible { DeviceSums::Tree } else { DeviceSums::Fast };
    serve(comm, device, sums)?;
    Ok(Process { stop, log, device, faults: Faults::new(inject), pulse })
}

fn predict(args: &PredictArgs, comm: &dyn Communicator) -> Result<Exit, TrainError> {
    let device = ops::device::select(configs::Device::Auto, comm.local_rank())?;
    ops::device::configure_process(args.threads);
    let options = PredictOptions { batch: args.batch.max(1), device };
    let mut out: Box<dyn Write> = match &args.out {
        Some(path) => Box::new(std::fs::File::create(path).map_err(TrainError::io(path))?),
        None => Box::new(std::io::stdout()),
    };
    trainer::predict(&args.checkpoint, &args.file, options, &mut *out, comm)?;
    Ok(Exit::Done)
}

fn doctor(comm: &dyn Communicator) -> Result<Exit, TrainError> {
    let found = trainer::doctor(comm)?;
    let _ = writeln!(std::io::stdout(), "{found}");
    Ok(Exit::Done)
}

fn checkpoint(ask: &AskCheckpoint) -> Exit {
    let answer = match ask {
        AskCheckpoint::Ls { run } => commands::list(run),
        AskCheckpoint::Verify { run, step } => commands::verify(run, *step),
        AskCheckpoint::Show { run, step } => commands::show(run, *step),
        AskCheckpoint::Prune { run, keep_last, keep_every_steps, dry_run } => {
            let (keep_last, keep_every_steps) = (*keep_last, *keep_every_steps);
            let keep = CheckpointConfig { every_steps: 0, keep_last, keep_every_steps };
            commands::prune(run, &keep, *dry_run)
        }
        AskCheckpoint::Compare { first, second, step } => commands::compare((first, *step), (second, *step)),
    };
    match answer {
        Ok((text, exit)) => {
            let _ = std::io::stdout().write_all(text.as_bytes());
            exit
        }
        Err(error) => {
            eprintln!("error: {error}");
            TrainError::from(error).exit()
        }
    }
}

fn gpu_check(args: &GpuCheckArgs, comm: &mut Box<dyn Communicator>) -> Result<Exit, TrainError> {
    let part = match args.part {
        CheckPart::One => Part::One,
        CheckPart::Ranks => Part::Ranks,
        CheckPart::Speed => Part::Speed,
        CheckPart::Report => return trainer::gpu_check_report(&args.out),
    };
    trainer::gpu_check(part, &args.out, args.device == CheckDevice::Cpu, comm)
}

/// Says what is handed on.
fn arguments() -> Result<Exit, TrainError> {
    let told = trainer::arguments::handed_on(&Cli::command());
    let text = serde_json::to_string(&told).expect("names and flags are JSON");
    let _ = writeln!(std::io::stdout(), "{text}");
    Ok(Exit::Done)
}

/// A configuration's steps beside their plan, by a machine file.
fn planned(
    config: &Path,
    sets: &[String],
    machine: &Path,
    comm: &dyn Communicator,
) -> Result<Vec<Case>, TrainError> {
    let measured = std::fs::read_to_string(machine).map_err(|error| error.to_string());
    let measured = measured.and_then(|text| Measured::parse(&text));
    let measured = measured.map_err(|why| TrainError::Machine { file: machine.to_path_buf(), why })?;
    let config = configs::load(config, sets, &|_| Ok(257))?;
    ops::device::configure_process(config.parallel.threads);
    let compared = trainer::bench::planned(&config, &measured, comm)?;
    if comm.rank() == 0 {
        let [least, most] = compared.spread;
        let _ = writeln!(std::io::stdout(), "step, planned over measured: {least:.2} to {most:.2}");
    }
    Ok(compared.cases)
}

/// Measures this machine, and writes its file.
fn calibrate(out: &Path, comm: &dyn Communicator) -> Result<Exit, TrainError> {
    let folder = out.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let measured = Calibration::default().run(comm, folder)?;
    if comm.rank() == 0 {
        std::fs::write(out, measured.to_toml()).map_err(TrainError::io(out))?;
        let _ = std::io::stdout().write_all(measured.describe().as_bytes());
    }
    Ok(Exit::Done)
}

fn bench(what: &Bench, comm: &dyn Communicator) -> Result<Exit, TrainError> {
    let (name, cases) = match what {
        Bench::Collectives { turns, fraction } => {
            let name = if comm.place().nodes == 1 { "collectives" } else { "link" };
            (name.to_string(), trainer::bench::collectives(comm, *turns, *fraction)?)
        }
        Bench::Attention { threads, turns } => {
            let bench = AttentionBench { threads: *threads, turns: *turns, ..AttentionBench::default() };
            ("attention".to_string(), bench.run()?)
        }
        Bench::Decode { threads, turns } => {
            ("decode".to_string(), trainer::bench::decode(comm, *threads, *turns)?)
        }
        Bench::BandMemory { dtype, seq_len } => {
            let kind = match dtype {
                BenchDtype::Fp32 => Kind::Float,
                BenchDtype::Bf16 => Kind::BFloat16,
            };
            let _ = writeln!(std::io::stdout(), "{}", trainer::bench::band_memory(kind, *seq_len));
            return Ok(Exit::Done);
        }
        Bench::Memory { config, sets } => {
            let config: RunConfig = configs::load(config, sets, &dataloader::vocab_size)?;
            ops::device::configure_process(config.parallel.threads);
            let shard = format!("{:?}", config.parallel.shard).to_lowercase();
            (format!("memory-{}-{shard}", config.run.name), trainer::bench::memory(&config, comm)?)
        }
        Bench::Save { config, sets, steps, turns, folder } => {
            let config = configs::load(config, sets, &|_| Ok(257))?;
            ops::device::configure_process(config.parallel.threads);
            ("save".to_string(), trainer::bench::save(&config, comm, folder, *steps, *turns)?)
        }
        Bench::Speed { config, sets, steps, warmup, peak } => {
            let config = configs::load(config, sets, &|_| Ok(257))?;
            ops::device::configure_process(config.parallel.threads);
            let speed = trainer::bench::speed(&config, comm, (*warmup, *steps), *peak)?;
            if comm.rank() == 0 {
                let line = serde_json::to_string(&speed).expect("numbers and names are JSON");
                let _ = writeln!(std::io::stdout(), "{line}");
            }
            return Ok(Exit::Done);
        }
        Bench::Calibrate { out } => return calibrate(out, comm),
        Bench::Plan { config, sets, machine } => ("plan".to_string(), planned(config, sets, machine, comm)?),
        Bench::Overlap { config, sets, turns } => {
            // No data is read: bytes, unless the vocabulary is set.
            let config = configs::load(config, sets, &|_| Ok(257))?;
            ops::device::configure_process(config.parallel.threads);
            let name = format!("overlap-{:?}", config.parallel.shard).to_lowercase();
            (name, trainer::bench::overlap(&config, comm, *turns)?)
        }
    };
    if comm.rank() == 0 {
        let table = trainer::bench::report(&name, &cases)?;
        let _ = std::io::stdout().write_all(table.as_bytes());
    }
    Ok(Exit::Done)
}

#[cfg(test)]
#[path = "../../tests/docs/rank.rs"]
mod documented;
