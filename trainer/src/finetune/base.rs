//! The model that fine-tuning starts from: a checkpoint, proved, with its configuration and its tokenizer, and
//! its weights in a model with three more tokens and a layer on top. Trains nothing.

use crate::checkpoint::{CheckpointError, Checkpoints, Loaded, StateKind, one_of};
use crate::error::TrainError;
use crate::resume::{fill, newest_good};
use crate::run_folder::RunFolder;
use crate::weights::{Parameters, narrow};
use configs::{RunConfig, SegmentSpec};
use dataloader::Tokenizer;
use ops::collectives::Communicator;
use std::path::{Path, PathBuf};

/// A checkpoint, and what it was made with.
#[derive(Debug)]
pub(crate) struct Base {
    pub(crate) loaded: Loaded,
    pub(crate) config: RunConfig,
    run: PathBuf,
}

impl Base {
    /// Opens the newest good checkpoint of a run's folder, or the one whose folder is given; each rank proves
    /// a share. Collective.
    ///
    /// # Errors
    /// There is none, it is damaged, or its configuration cannot be read here.
    pub(crate) fn open(path: &Path, comm: &dyn Communicator) -> Result<Base, TrainError> {
        let (run, step) = one_of(path, None);
        let loaded = match step {
            Some(step) => {
                let proved = Checkpoints::open(&run).verify_share(step, comm.rank(), comm.world_size());
                Some(proved.map_err(CheckpointError::Damaged)?)
            }
            None => newest_good(&RunFolder::at(&run), comm)?,
        };
        let Some(loaded) = loaded else {
            let what = format!("{} has no checkpoint to start from", path.display());
            return Err(CheckpointError::NoSuch { what }.into());
        };
        let config = configs::parse(&loaded.state().config).map_err(|what| TrainError::Base {
            checkpoint: loaded.folder().to_path_buf(),
            what: format!("its configuration cannot be read here: {what}"),
        })?;
        Ok(Base { loaded, config, run })
    }

    /// Which checkpoint it is: its step, and a digest of all its values.
    pub(crate) fn name(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        for file in &self.loaded.manifest().files {
            hasher.update(file.blake3.as_bytes());
        }
        format!("step {}, {}", self.loaded.state().step, &hasher.finalize().to_hex()[..16])
    }

    /// The tokenizer that it was trained with: from its run's folder, or that of its data.
    ///
    /// # Errors
    /// A table that is in neither.
    pub(crate) fn tokenizer(&self) -> Result<Tokenizer, TrainError> {
        let id = self.loaded.state().tokenizer.as_str();
        let data = self.config.data.sources().into_iter().map(|source| source.path);
        let folders = std::iter::once(self.run.clone()).chain(data);
        let mut last = None;
        for folder in folders {
            match Tokenizer::in_folder(&folder, id) {
                Some(Ok(tokenizer)) => return Ok(tokenizer),
                Some(Err(error)) => last = Some(TrainError::from(error)),
                None => {}
            }
        }
        Err(last.unwrap_or_else(|| TrainError::Base {
            checkpoint: self.loaded.folder().to_path_buf(),
            what: format!("it has tokenizer {id:?}, which is not known here"),
        }))
    }

    /// Fills what this rank holds of `parameters` from the checkpoint, by segment. What the checkpoint has not,
    /// the new tokens' embeddings and the task's layer, keeps its initial values.
    ///
    /// # Errors
    /// A checkpoint of another shape, values that cannot be read.
    pub(crate) fn fill(&self, parameters: &Parameters<'_>) -> Result<(), TrainError> {
        let c = self.config.model.n_embd;
        for index in 0..parameters.len() {
            let (spec, held) = (parameters.spec(index), parameters.held(index));
            let Some(theirs) = self.loaded.state().segments.iter().find(|theirs| theirs.name == spec.name)
            else {
                continue;
            };
            let model = &self.config.model;
            // Where the vocabulary is the last that there is, what its new tokens have comes after all else.
            let known = match (spec.name.as_str(), spec.tensors.last()) {
                ("wte", _) => Some(model.vocab_size * c),
                ("mlm", Some(bias)) => Some(bias.offset + model.vocab_size),
                _ => None,
            };
            self.require(theirs, known.is_some() || theirs.numel == spec.numel)?;
            let known = known.unwrap_or(spec.numel);
            let from = held.start..held.end.min(known);
            if from.start < from.end {
                let within = narrow(parameters.master(index), &(0..from.len()));
                fill(&self.loaded, (&spec.name, StateKind::Param), from, &within)?;
            }
        }
        Ok(())
    }

    fn require(&self, theirs: &SegmentSpec, fits: bool) -> Result<(), TrainError> {
        if fits {
            return Ok(());
        }
        let (name, numel) = (&theirs.name, theirs.numel);
        let what =
            format!("its segment {name} has {numel} elements, which is not what its configuration says");
        Err(TrainError::Base { checkpoint: self.loaded.folder().to_path_buf(), what })
    }
}
