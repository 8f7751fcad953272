//! Models of other programs as a run that `generate`, `export` and all that reads checkpoints can use: its folder,
//! its configuration, its tokenizer and a checkpoint of step 0. Knows no command line.

use super::layout::entries;
use super::{ExchangeError, Format, bert, config, file, llmc};
use crate::checkpoint::{CheckpointWriter, Publisher, Slice, Snapshot, StateKind, TrainState};
use crate::error::TrainError;
use crate::run_folder::{FileError, RunFolder};
use crate::trained::NO_TOKENIZER;
use crate::weights::Parameters;
use configs::{ModelConfig, RunConfig, Shard};
use dataloader::Tokenizer;
use ops::collectives::Communicator;
use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use tch::{Device, Kind, Tensor};

/// What an import came to.
#[derive(Debug)]
pub struct Imported {
    /// The format that was found.
    pub format: Format,
    /// The shape.
    pub model: ModelConfig,
    /// The tokenizer, or why there is none.
    pub tokenizer: Result<Tokenizer, String>,
    /// The checkpoint.
    pub checkpoint: PathBuf,
    /// What the model lacks, by its names there, and has the initial values of a new model here: the head of a
    /// BERT without one.
    pub absent: Vec<String>,
}

/// Of the values that a model lacks: that of a run which names none.
const INITIAL_SEED: u64 = 1337;

/// Reads a model from a folder of `transformers`, one of `phalanx export`, or llm.c's file, and makes the run
/// folder `out` of it, which must not exist.
///
/// # Errors
/// Files that are no model of these, or damaged; a folder that exists or cannot be written.
pub fn import(from: &Path, out: &Path, comm: &dyn Communicator) -> Result<Imported, TrainError> {
    if out.exists() {
        return Err(ExchangeError::Exists { path: out.into() }.into());
    }
    let mut found = Found::look(from)?;
    let (model, format) = (found.model().clone(), found.format);
    let segments = configs::segments(&model);
    let mut parameters = Parameters::zeros(segments, Shard::None, Kind::Float, Device::Cpu, comm)?;
    if format == Format::HfBert {
        parameters.init(INITIAL_SEED); // what the model lacks keeps these
    }
    let absent = found.fill(&parameters)?;
    let tokenizer = match format {
        Format::LlmC => Err("llm.c's file has none; copy tokenizer.tiktoken into the run folder".into()),
        _ => Tokenizer::from_hugging_face(&found.folder),
    };
    let fits = |tokenizer: Tokenizer| match tokenizer.vocab_size() {
        n if n <= model.vocab_size => Ok(tokenizer),
        n => Err(format!("it has {n} tokens, the model {}", model.vocab_size)),
    };
    let tokenizer = match tokenizer.and_then(fits) {
        // llm.c's model with GPT-2's vocabulary is GPT-2's.
        Err(_) if format == Format::LlmC && model.vocab_size == Tokenizer::Gpt2.vocab_size() => {
            Ok(Tokenizer::Gpt2)
        }
        other => other,
    };
    let unfinished = PathBuf::from(format!("{}.tmp", out.display()));
    if unfinished.exists() {
        fs::remove_dir_all(&unfinished).map_err(FileError::of("remove", &unfinished))?;
    }
    let written = write(&unfinished, out, &model, &parameters, tokenizer.as_ref().ok());
    if written.is_err() {
        let _ = fs::remove_dir_all(&unfinished); // the first error counts
    }
    let checkpoint = written?;
    fs::rename(&unfinished, out).map_err(FileError::of("publish", out))?;
    let checkpoint = out.join(checkpoint.strip_prefix(&unfinished).unwrap_or(&checkpoint));
    Ok(Imported { format, model, tokenizer, checkpoint, absent })
}

/// A model that has been found.
struct Found {
    format: Format,
    folder: PathBuf,
    content: Content,
}

enum Content {
    Tensors(file::Tensors, ModelConfig),
    LlmC(PathBuf, llmc::LlmC),
}

impl Found {
    fn look(from: &Path) -> Result<Found, ExchangeError> {
        let llmc_file = |path: PathBuf| {
            let opened = llmc::LlmC::open(&path)?;
            let folder = path.parent().unwrap_or(Path::new(".")).to_path_buf();
            Ok(Found { format: Format::LlmC, folder, content: Content::LlmC(path, opened) })
        };
        if from.is_file() && from.extension().is_none_or(|extension| extension != "safetensors") {
            return llmc_file(from.into());
        }
        let folder = if from.is_file() { from.parent().unwrap_or(Path::new(".")) } else { from };
        let about = folder.join("config.json");
        if !about.is_file() && folder.join(llmc::MODEL).is_file() {
            return llmc_file(folder.join(llmc::MODEL));
        }
        if !about.is_file() {
            let what = "there is no config.json and no model.bin".into();
            return Err(ExchangeError::NotOurs { path: folder.into(), what });
        }
        let text = fs::read(&about).map_err(FileError::of("read", &about))?;
        let json: serde_json::Value = serde_json::from_slice(&text)
            .map_err(|error| ExchangeError::Malformed { path: about.clone(), what: error.to_string() })?;
        let tensors =
            if from.is_file() { file::Tensors::open(from)? } else { file::Tensors::in_folder(folder)? };
        let (model, format) = if tensors.about().get("format").is_some_and(|format| format == "phalanx") {
            let model = serde_json::from_value(json)
                .map_err(|error| ExchangeError::Malformed { path: about.clone(), what: error.to_string() })?;
            (model, Format::Safetensors)
        } else {
            config::from_json(&about, &json)?
        };
        Ok(Found { format, folder: folder.into(), content: Content::Tensors(tensors, model) })
    }

    fn model(&self) -> &ModelConfig {
        match &self.content {
            Content::Tensors(_, model) => model,
            Content::LlmC(_, file) => &file.model,
        }
    }

    /// Puts every tensor into the parameters; returns the names of those that the model lacks and need not have.
    fn fill(&mut self, parameters: &Parameters<'_>) -> Result<Vec<String>, ExchangeError> {
        let ours = |name: &str| {
            let specs =
                (0..parameters.len()).flat_map(|i| parameters.spec(i).tensors.iter().map(move |t| (i, t)));
            let (index, spec) = specs.into_iter().find(|(_, spec)| spec.name == name)?;
            ops::view(parameters.master(index), spec).ok()
        };
        let put = |entry: &super::layout::Entry, theirs: &Tensor| {
            if let Some(ours) = entry.ours.as_deref().and_then(ours) {
                tch::no_grad(|| entry.put(theirs, &ours));
            }
        };
        match &mut self.content {
            Content::LlmC(path, file) => file.each(path, put).map(|()| Vec::new()),
            Content::Tensors(tensors, model) => {
                let (mut known, mut absent) = (HashSet::new(), Vec::new());
                for entry in entries(model, self.format) {
                    // Models of the hub have no prefix, saved ones have.
                    let prefix = if self.format == Format::HfBert { "bert." } else { "transformer." };
                    let bare = entry.name.strip_prefix(prefix).unwrap_or(&entry.name).to_string();
                    let mut found = None;
                    for name in [&entry.name, &bare] {
                        found = if found.is_none() { tensors.get(name, &entry.shape())? } else { found };
                    }
                    known.extend([entry.name.clone(), bare]);
                    if found.is_none() && self.format == Format::HfBert && bert::may_be_absent(&entry.name) {
                        absent.push(entry.name);
                        continue;
                    }
                    let missing = || ExchangeError::Malformed {
                        path: self.folder.clone(),
                        what: format!("it has no tensor {}", entry.name),
                    };
                    put(&entry, &found.ok_or_else(missing)?);
                }
                stray(&self.folder, tensors, &known)?;
                bert::whole_or_none(&self.folder, &absent).map(|()| absent)
            }
        }
    }
}

/// Refuses a tensor that would change what the model computes, and was not read.
fn stray(folder: &Path, tensors: &file::Tensors, known: &HashSet<String>) -> Result<(), ExchangeError> {
    // Masks that old versions saved, and the head, which is the embedding.
    let harmless = |name: &str| {
        name == "lm_head.weight"
            || bert::is_harmless(name)
            || [".attn.bias", ".masked_bias", ".attention.bias"].iter().any(|end| name.ends_with(end))
    };
    match tensors.names().into_iter().find(|name| !known.contains(name) && !harmless(name)) {
        None => Ok(()),
        Some(name) => {
            Err(ExchangeError::NotOurs { path: folder.into(), what: format!("it has a tensor {name}") })
        }
    }
}

/// Writes the run folder; returns the checkpoint's.
fn write(
    folder: &Path,
    out: &Path,
    model: &ModelConfig,
    parameters: &Parameters<'_>,
    tokenizer: Option<&Tokenizer>,
) -> Result<PathBuf, TrainError> {
    let run = RunFolder::open(folder)?;
    let config = run_config(out, model, folder)?;
    run.write_config(&config.to_toml())?;
    if let Some(tokenizer) = tokenizer {
        tokenizer.write_into(folder)?;
    }
    let generation = run.claim_generation()?;
    let publisher = Publisher::new(&run, generation);
    let segments = configs::segments(model);
    publisher.prepare(0, &segments)?;
    let mut slices = Vec::new();
    for (index, segment) in segments.iter().enumerate() {
        let mut values = vec![0f32; segment.numel];
        parameters.master(index).copy_data(&mut values, segment.numel);
        let zeros = vec![0f32; segment.numel];
        for (kind, values) in
            [(StateKind::Param, &values), (StateKind::ExpAvg, &zeros), (StateKind::ExpAvgSq, &zeros)]
        {
            slices.extend(Slice::owned(&segment.name, kind, values, 0, 1));
        }
    }
    CheckpointWriter::start(&run, Snapshot { step: 0, generation, rank: 0, world_size: 1, slices }).wait()?;
    let state = TrainState::start(&config, tokenizer.map_or(NO_TOKENIZER, Tokenizer::id), segments);
    Ok(publisher.publish(&state, 1)?)
}

/// A configuration with this model. What it says of training is what the keys require: nothing was trained here.
fn run_config(out: &Path, model: &ModelConfig, folder: &Path) -> Result<RunConfig, TrainError> {
    let name = out.file_name().map_or("imported".into(), |name| name.to_string_lossy());
    let shape = toml::to_string(model).expect("every value of a ModelConfig has a TOML form");
    let text = format!(
        "[run]\nname = {name:?}\ndir = {:?}\n[model]\n{shape}[data]\ntrain = \"none\"\n[batch]\n\
         global_batch_tokens = {}\n[optim]\nlr = 1e-4\n[schedule]\nmax_steps = 1\n",
        out.display().to_string(),
        model.seq_len,
    );
    let typed = folder.join("typed.toml");
    fs::write(&typed, text).map_err(TrainError::io(&typed))?;
    let config = configs::load(&typed, &[], &|_| Ok(model.vocab_size))?;
    fs::remove_file(&typed).map_err(TrainError::io(&typed))?;
    Ok(config)
}
