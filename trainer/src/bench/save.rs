//! What saving costs: how long the loop stands still, beside copying the state in memory; steps while a
//! checkpoint is written, beside steps alone; writing and loading, beside the same bytes written and read
//! plainly on the same disk. Knows a step as something to time, and checkpoints by what the loop calls.

use super::steps::Steps;
use super::{Case, median, most, slowest};
use crate::checkpoint::{Checkpoints, TrainState};
use crate::engine::Gradient;
use crate::error::TrainError;
use crate::report::Reporter;
use crate::resume::{load, newest_good};
use crate::run_folder::{RunFolder, folder_names};
use crate::saving::{Progress, Saver};
use crate::start::claim;
use crate::stop::StopFlag;
use crate::timing::Timing;
use configs::{RunConfig, Setup};
use ops::collectives::Communicator;
use rustix::fs::{Advice, fadvise};
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;
use tch::Tensor;

/// Bytes that plain reads and writes take at a time, as `dd bs=1M` does.
const BLOCK_BYTES: usize = 1 << 20;

/// Measures a run of `config` on the ranks that are there, saving into `folder`, which is removed
/// afterwards; one checkpoint in `steps` steps. Collective.
///
/// # Errors
/// A batch that the ranks cannot share evenly, no memory or disk, a failed collective.
pub fn save(
    config: &RunConfig,
    comm: &dyn Communicator,
    folder: &Path,
    steps: u64,
    turns: usize,
) -> Result<Vec<Case>, TrainError> {
    let setup = Setup::of(config, comm.world_size(), true, false)?;
    let run = RunFolder::open(folder)?;
    let generation = claim(&run, config, &dataloader::Tokenizer::Bytes, comm)?;
    let mut bench = Bench {
        comm,
        steps: Steps::new(config, &setup, comm)?,
        saver: Saver::new(comm, &run, generation, &config.checkpoint, template(config)),
        reporter: Reporter::open(&run.metrics_path(), config, comm.rank())?,
        run,
        tokens: config.batch.global_batch_tokens * steps,
        made: 0,
    };
    let cases = bench.measure(steps, turns);
    comm.barrier()?;
    if comm.rank() == 0 {
        std::fs::remove_dir_all(folder).map_err(TrainError::io(folder))?;
    }
    cases
}

/// A run that saves.
struct Bench<'a> {
    comm: &'a dyn Communicator,
    steps: Steps<'a>,
    saver: Saver<'a>,
    reporter: Reporter,
    run: RunFolder,
    /// Of the steps between two checkpoints.
    tokens: u64,
    made: u64,
}

impl Bench<'_> {
    fn measure(&mut self, steps: u64, turns: usize) -> Result<Vec<Case>, TrainError> {
        self.train(1, true)?; // touches memory for the first time
        let (mut still, mut copying) = (vec![], vec![]);
        let (mut writing, mut plain_writing, mut loading, mut plain_reading) =
            (vec![], vec![], vec![], vec![]);
        let (mut saving, mut alone) = (vec![], vec![]);
        let mut copies = self.state().iter().map(Tensor::zeros_like).collect::<Vec<Tensor>>();
        self.copy(&mut copies)?;
        for _ in 0..turns {
            copying.push(self.copy(&mut copies)?);
            self.train(1, false)?;
            still.push(self.save()?);
            writing.push(slowest(self.comm, || self.saver.complete(&mut self.reporter))?);
            plain_writing.push(slowest(self.comm, || self.write_plainly())?);
            plain_reading.push(self.cold(Bench::read_plainly)?);
            loading.push(self.cold(Bench::load)?);
        }
        drop(copies);
        for _ in 0..turns {
            alone.push(self.train(steps, false)?);
            saving.push(self.train(steps, true)?);
        }
        let bytes = self.sizes()?.iter().sum::<u64>() as f64;
        let rate = |seconds| bytes / 1e6 / median(seconds);
        let pace = |seconds| self.tokens as f64 / median(seconds);
        Ok(vec![
            Case::less_is_better(
                "loop stands still, and a copy in memory",
                "s",
                median(still),
                median(copying),
            ),
            Case::more_is_better(
                format!("training while saving every {steps} steps, and without"),
                "tokens/s",
                pace(saving),
                pace(alone),
            ),
            Case::more_is_better("writing, and plain writes", "MB/s", rate(writing), rate(plain_writing)),
            Case::more_is_better("loading, and plain reads", "MB/s", rate(loading), rate(plain_reading)),
        ])
    }

    /// Makes steps, the first after taking a snapshot if `saving`; seconds until the last is made.
    fn train(&mut self, steps: u64, saving: bool) -> Result<f64, TrainError> {
        self.comm.barrier()?;
        let (began, mut timing) = (Instant::now(), Timing::default());
        if saving {
            self.save()?;
        }
        for _ in 0..steps {
            self.steps.make(&mut timing)?;
            self.made += 1;
            let agreed = self.saver.agree(&Gradient::none(), &StopFlag::default())?;
            self.saver.settle(agreed, &mut self.reporter)?;
        }
        let seconds = most(self.comm, began.elapsed().as_secs_f64())?;
        self.saver.complete(&mut self.reporter)?;
        Ok(seconds)
    }

    /// Takes a snapshot and starts to write it; how long that takes.
    fn save(&mut self) -> Result<f64, TrainError> {
        let progress = Progress { step: self.made, ..Progress::default() };
        let (saver, learner, reporter) = (&mut self.saver, &mut self.steps.learner, &mut self.reporter);
        slowest(self.comm, || saver.save(&progress, learner, reporter))
    }

    /// What a checkpoint holds of what this rank has.
    fn state(&self) -> Vec<Tensor> {
        let (parameters, optimizer) = (self.steps.learner.engine.parameters(), &self.steps.learner.optimizer);
        let of = |(index, moments): (usize, &ops::Moments)| {
            let (rank, ranks) = (self.comm.rank(), self.comm.world_size());
            let (spec, held) = (parameters.spec(index), parameters.held(index));
            let owned = configs::owned_range(spec.numel, rank, ranks);
            let within = owned.start - held.start..owned.end - held.start;
            [parameters.master(index), &moments.exp_avg, &moments.exp_avg_sq]
                .map(|flat| crate::weights::narrow(flat, &within))
        };
        optimizer.moments().iter().enumerate().flat_map(of).collect()
    }

    fn copy(&self, to: &mut [Tensor]) -> Result<f64, TrainError> {
        slowest(self.comm, || {
            to.iter_mut().zip(self.state()).for_each(|(to, from)| to.copy_(&from));
            Ok(())
        })
    }

    /// As many bytes as this rank saves, flushed.
    fn write_plainly(&self) -> Result<(), TrainError> {
        let bytes: usize = self.state().iter().map(|flat| flat.numel() * size_of::<f32>()).sum();
        let path = self.run.dir().join(format!("plain-{}", self.comm.rank()));
        write_file(&path, bytes).and_then(|()| std::fs::remove_file(&path)).map_err(TrainError::io(&path))
    }

    /// Seconds of `body`, with none of the newest checkpoint in the system's cache.
    fn cold(&mut self, body: impl FnOnce(&mut Self) -> Result<(), TrainError>) -> Result<f64, TrainError> {
        for path in self.files()? {
            let file = File::open(&path).map_err(TrainError::io(&path))?;
            fadvise(&file, 0, None, Advice::DontNeed)
                .map_err(std::io::Error::from)
                .map_err(TrainError::io(&path))?;
        }
        let comm = self.comm;
        slowest(comm, || body(self))
    }

    fn read_plainly(&mut self) -> Result<(), TrainError> {
        let mut block = vec![0u8; BLOCK_BYTES];
        for path in self.files()? {
            let mut file = File::open(&path).map_err(TrainError::io(&path))?;
            while file.read(&mut block).map_err(TrainError::io(&path))? > 0 {}
        }
        Ok(())
    }

    /// All that a start does to go on: the newest checkpoint proved and read.
    fn load(&mut self) -> Result<(), TrainError> {
        let newest = newest_good(&self.run, self.comm)?;
        newest.map_or(Ok(()), |newest| Ok(load(&newest, &self.steps.learner)?))
    }

    /// The files of the newest checkpoint.
    fn files(&self) -> Result<Vec<PathBuf>, TrainError> {
        let checkpoints = Checkpoints::open(self.run.dir());
        let Some(step) = checkpoints.steps()?.pop() else { return Ok(Vec::new()) };
        let folder = checkpoints.folder(step);
        Ok(folder_names(&folder)?.iter().map(|name| folder.join(name)).collect())
    }

    fn sizes(&self) -> Result<Vec<u64>, TrainError> {
        let size = |path: PathBuf| path.metadata().map(|of| of.len()).map_err(TrainError::io(&path));
        self.files()?.into_iter().map(size).collect()
    }
}

fn write_file(path: &Path, bytes: usize) -> std::io::Result<()> {
    let (mut file, block) = (File::create(path)?, vec![1u8; BLOCK_BYTES]);
    for start in (0..bytes).step_by(BLOCK_BYTES) {
        file.write_all(&block[..BLOCK_BYTES.min(bytes - start)])?;
    }
    file.sync_all()
}

fn template(config: &RunConfig) -> TrainState {
    TrainState::start(config, "none", configs::segments(&config.model))
}

#[cfg(test)]
mod tests {
    use super::*;
    use ops::collectives::Solo;

    #[test]
    fn one_rank_alone_has_every_case_and_leaves_nothing() {
        let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/demo.toml");
        let sets = ["batch.global_batch_tokens=128", "batch.micro_batch=1"].map(str::to_owned);
        let config = configs::load(&demo, &sets, &|_| Ok(257)).unwrap();
        let scratch = tempfile::tempdir().unwrap();
        let folder = scratch.path().join("save");
        let cases = save(&config, &Solo::new(), &folder, 2, 1).unwrap();
        assert_eq!(cases.len(), 4);
        assert!(cases.iter().all(|case| case.value > 0.0 && case.reference > 0.0), "{cases:?}");
        assert!(!folder.exists());
    }
}
