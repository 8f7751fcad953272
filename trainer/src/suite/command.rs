//! `phalanx-rank eval`: a model and a suite, what comes of them, and where that goes. Rank 0 speaks.

use super::report::Report;
use super::{Measure, plot};
use crate::engine::Engine;
use crate::error::TrainError;
use crate::generate::named;
use crate::gradients::Gradients;
use crate::trained::Trained;
use clap::Args;
use configs::Recompute;
use ops::collectives::Communicator;
use std::io::Write;
use std::path::{Path, PathBuf};

/// `phalanx eval`
#[derive(Debug, Args)]
pub struct EvalArgs {
    /// A run's folder, or one of its checkpoints
    pub model: PathBuf,
    /// What is asked (TOML)
    #[arg(long, value_name = "FILE")]
    pub suite: PathBuf,
    /// Which checkpoint of the run [default: the newest good one]
    #[arg(long, value_name = "N")]
    pub step: Option<u64>,
    /// Write the scores as JSON too
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
    /// Draw scores over the number of shots (SVG)
    #[arg(long, value_name = "FILE")]
    pub plot: Option<PathBuf>,
    /// Threads that compute, of each rank
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub threads: usize,
    /// auto, cpu or cuda
    #[arg(long, default_value = "auto", value_parser = named::<configs::Device>)]
    pub device: configs::Device,
    /// auto, fp32 or bf16
    #[arg(long, default_value = "fp32", value_parser = named::<configs::Dtype>)]
    pub dtype: configs::Dtype,
}

/// Runs `phalanx eval`. Collective.
///
/// # Errors
/// No such model or suite, data that is not what the suite says, files that cannot be written.
pub fn eval_command(args: &EvalArgs, comm: &dyn Communicator) -> Result<(), TrainError> {
    let suite = configs::load_suite(&args.suite)?;
    // First of all that touches libtorch: it looks once for the part of it that knows CUDA.
    let device = ops::device::select(args.device, comm.local_rank())?;
    ops::device::configure_process(args.threads.max(1));
    let trained = Trained::open(&args.model, args.step)?;
    let tokenizer = trained.tokenizer()?.ok_or_else(|| TrainError::Refused {
        what: format!("{} came without a tokenizer", args.model.display()),
        hint: "a suite is text: import the model from a folder that has its tokenizer".into(),
    })?;
    let config = trained.config();
    let measure = Measure::open(&suite, &config.model, &tokenizer, config.data.document_mask)?;
    let parameters = trained.parameters(ops::device::dtype(args.dtype, device), device, comm)?;
    let gradients = Gradients::new(&parameters, 1, false, comm)?;
    let mut engine = Engine::new(trained.model(), parameters, gradients, Recompute::None);
    let report = Report {
        checkpoint: trained.folder().display().to_string(),
        step: trained.state().step,
        tokens: trained.state().tokens,
        parameters: config.model.parameters(),
        suite: args.suite.display().to_string(),
        seed: suite.seed,
        results: measure.run(&mut engine, comm)?,
    };
    if comm.rank() > 0 {
        return Ok(());
    }
    let _ = std::io::stdout().write_all(report.table().as_bytes());
    if let Some(file) = &args.out {
        let mut text = serde_json::to_string_pretty(&report).expect("scores have a JSON form");
        text.push('\n');
        written(file, &text)?;
    }
    if let Some(file) = &args.plot {
        written(file, &plot::shots(&report))?;
    }
    Ok(())
}

fn written(file: &Path, text: &str) -> Result<(), TrainError> {
    std::fs::write(file, text).map_err(TrainError::io(file))
}
