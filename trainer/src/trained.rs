//! A trained model, to be used: found in a run's folder or a checkpoint's, proved, and its weights and tokenizer
//! read. Knows nothing of what it is used for, and writes nothing.

use crate::checkpoint::{CheckpointError, Checkpoints, Loaded, StateKind, TrainState, one_of};
use crate::error::TrainError;
use crate::model::Gpt;
use crate::run_folder::RunFolder;
use crate::weights::Parameters;
use configs::{RunConfig, Shard};
use dataloader::{DataSet, Tokenizer};
use ops::collectives::Communicator;
use std::path::{Path, PathBuf};
use tch::{Device, Kind, Tensor};

/// The tokenizer's id of a model that came without one that is known here.
pub const NO_TOKENIZER: &str = "none";

/// A model that was trained here or imported.
#[derive(Debug)]
pub struct Trained {
    loaded: Loaded,
    config: RunConfig,
    run: PathBuf,
}

impl Trained {
    /// The newest good checkpoint of a run, or the one of a step, or the one whose folder is named; every byte
    /// of it is proved.
    ///
    /// # Errors
    /// There is none, or it is damaged, or its configuration cannot be read.
    pub fn open(path: &Path, step: Option<u64>) -> Result<Trained, TrainError> {
        let (run, step) = one_of(path, step);
        if path.join("config.json").is_file() || path.is_file() {
            let what = format!("{} is a model of another program", path.display());
            let hint = format!("phalanx import {} --out runs/NAME makes it one of Phalanx", path.display());
            return Err(TrainError::Refused { what, hint });
        }
        if !RunFolder::at(&run).checkpoints_dir().is_dir() {
            return Err(CheckpointError::NoSuch { what: format!("{} is no run", run.display()) }.into());
        }
        let checkpoints = Checkpoints::open(&run);
        let loaded = match step {
            Some(step) if checkpoints.steps()?.contains(&step) => {
                checkpoints.verify(step).map_err(CheckpointError::Damaged)?
            }
            Some(step) => {
                let what = format!("{} has no checkpoint of step {step}", run.display());
                return Err(CheckpointError::NoSuch { what }.into());
            }
            None => checkpoints.newest_good()?.ok_or_else(|| {
                let what = format!("{} has no checkpoint", run.display());
                CheckpointError::NoSuch { what }
            })?,
        };
        loaded.skipped().iter().for_each(|damaged| tracing::warn!("{damaged}; using an earlier one"));
        let config = configs::parse(&loaded.state().config).map_err(|why| TrainError::Refused {
            what: format!("the configuration in {} cannot be read: {why}", loaded.folder().display()),
            hint: "the checkpoint may be of a later Phalanx".into(),
        })?;
        loaded.check_layout(&configs::segments(&config.model))?;
        Ok(Trained { loaded, config, run })
    }

    /// The checkpoint's folder.
    pub fn folder(&self) -> &Path {
        self.loaded.folder()
    }

    /// What it was trained with.
    pub fn config(&self) -> &RunConfig {
        &self.config
    }

    /// The run at its step.
    pub fn state(&self) -> &TrainState {
        self.loaded.state()
    }

    /// The model.
    pub fn model(&self) -> Gpt {
        Gpt::new(&self.config.model)
    }

    /// The weights, whole on this rank, to compute in `kind`.
    ///
    /// # Errors
    /// No memory, values that cannot be read.
    pub fn parameters<'a>(
        &self,
        kind: Kind,
        device: Device,
        comm: &'a dyn Communicator,
    ) -> Result<Parameters<'a>, TrainError> {
        let segments = configs::segments(&self.config.model);
        let mut parameters = Parameters::zeros(segments, Shard::None, kind, device, comm)?;
        for index in 0..parameters.len() {
            let spec = parameters.spec(index);
            let mut values = vec![0f32; spec.numel];
            self.loaded.fill(&spec.name, StateKind::Param, &mut values)?;
            parameters.master(index).shallow_clone().copy_(&Tensor::from_slice(&values));
        }
        parameters.publish()?;
        Ok(parameters)
    }

    /// The tokenizer: of its id, from the run's folder, or from the data that the run was trained on. None
    /// where the model came without one.
    ///
    /// # Errors
    /// Its file is in none of these places, or cannot be read.
    pub fn tokenizer(&self) -> Result<Option<Tokenizer>, TrainError> {
        let id = self.state().tokenizer.as_str();
        if id == NO_TOKENIZER {
            return Ok(None);
        }
        if let Some(tokenizer) = Tokenizer::from_id(id) {
            return Ok(Some(tokenizer));
        }
        if let Some(Ok(tokenizer)) = Tokenizer::in_folder(&self.run, id) {
            return Ok(Some(tokenizer));
        }
        let sources = self.config.data.sources();
        let of_data = sources.iter().find_map(|source| DataSet::open(&source.path).ok());
        match of_data.map(|data| data.tokenizer().clone()).filter(|tokenizer| tokenizer.id() == id) {
            Some(tokenizer) => Ok(Some(tokenizer)),
            None => Err(TrainError::Refused {
                what: format!("the tokenizer ({id}) is neither in {} nor with the data", self.run.display()),
                hint: format!(
                    "copy the tokenizer file of the training data's folder into {}",
                    self.run.display()
                ),
            }),
        }
    }
}
