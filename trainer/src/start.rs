//! What every start of a run does with its folder, whatever it learns: looks for what to go on from, claims the
//! next generation, and opens checkpoints, reports and metrics. Knows no data and no model.

use crate::checkpoint::{Loaded, Publisher, TrainState};
use crate::error::TrainError;
use crate::gauges::Gauges;
use crate::report::Reporter;
use crate::resume::{check_same_run, newest_good};
use crate::run_folder::RunFolder;
use crate::saving::Saver;
use crate::train::Process;
use configs::{BatchPlan, RunConfig};
use dataloader::Tokenizer;
use ops::collectives::Communicator;

/// A start of a run that is claimed.
pub(crate) struct Start<'a> {
    /// The run folder.
    pub(crate) folder: RunFolder,
    /// Which start it is, from 1.
    pub(crate) generation: u64,
    /// The checkpoint to go on from.
    pub(crate) resume: Option<Loaded>,
    /// How its first step falls on the ranks.
    pub(crate) plan: BatchPlan,
    /// Checkpoints to come.
    pub(crate) saver: Saver<'a>,
    /// Who is told.
    pub(crate) reporter: Reporter,
    /// Matrix rate of all ranks together, FLOP/s.
    pub(crate) peak_flops: f64,
}

impl<'a> Start<'a> {
    /// Claims a start of the run whose state before the first step is `template`. Collective.
    ///
    /// # Errors
    /// A checkpoint of another run, a batch that the ranks cannot share, and what the system refuses.
    pub(crate) fn claim(
        config: &RunConfig,
        template: TrainState,
        tokenizer: &Tokenizer,
        comm: &'a dyn Communicator,
        process: &Process,
    ) -> Result<Start<'a>, TrainError> {
        let device = process.device;
        let names = template.segments.iter().map(|segment| segment.name.clone()).collect();
        process.pulse.begin(names, config.guard.hang_timeout_s);
        let folder = RunFolder::open(&config.run.dir)?;
        let log_path = folder.log_path(comm.rank());
        process.log.to_file(&log_path).map_err(TrainError::io(&log_path))?;
        // Looked at before the run is claimed: a start that is refused takes nothing from one that runs.
        let resume = newest_good(&folder, comm)?;
        if let Some(loaded) = &resume {
            check_same_run(config, &template, loaded)?;
        }
        let step = resume.as_ref().map_or(0, |loaded| loaded.state().step);
        let plan = config.batches().plan(step, comm.world_size())?;
        let generation = claim(&folder, config, tokenizer, comm)?;
        let saver = Saver::new(comm, &folder, generation, &config.checkpoint, template);
        let mut reporter = Reporter::open(&folder.metrics_path(), config, comm.rank())?;
        reporter.show(Gauges::serve(config, step, (comm.place(), device), &process.pulse));
        let mut peak = [ops::device::peak_flops(device, ops::device::dtype(config.parallel.dtype, device))];
        comm.all_reduce_f64(&mut peak)?;
        let [peak_flops] = peak;
        Ok(Start { folder, generation, resume, plan, saver, reporter, peak_flops })
    }
}

/// Rank 0 claims the next generation, clears what earlier ones left unfinished, writes down what is
/// run, and tells the others.
pub(crate) fn claim(
    folder: &RunFolder,
    config: &RunConfig,
    tokenizer: &Tokenizer,
    comm: &dyn Communicator,
) -> Result<u64, TrainError> {
    let mut generation = Vec::new();
    if comm.rank() == 0 {
        let claimed = folder.claim_generation()?;
        Publisher::new(folder, claimed).clear_unfinished()?;
        folder.write_config(&config.to_toml())?;
        // So that the model can be used where the data is not.
        tokenizer.write_into(folder.dir())?;
        generation = claimed.to_le_bytes().to_vec();
    }
    comm.broadcast_bytes(&mut generation, 0)?;
    let claimed = generation.try_into().map(u64::from_le_bytes);
    Ok(claimed.expect("rank 0 sends eight bytes"))
}
