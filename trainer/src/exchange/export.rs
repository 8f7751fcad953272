//! Writing a model for other programs: into a folder beside the one that is asked for, read back and compared there,
//! and renamed when it is the model. Knows no command line.

use super::layout::{Entry, entries};
use super::{ExchangeError, Format, bert, card, config, file, llmc, reference};
use crate::engine::Engine;
use crate::error::TrainError;
use crate::gradients::Gradients;
use crate::model::Gpt;
use crate::run_folder::{FileError, sync_folder, write_atomically};
use crate::trained::Trained;
use crate::weights::Parameters;
use configs::{ModelConfig, Recompute};
use dataloader::Tokenizer;
use ops::collectives::Communicator;
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use tch::{Device, Kind, Tensor};

/// Largest difference of a logit that an export may have, beside the largest logit.
const LIMIT: f64 = 1e-4;

/// The script that asks `transformers`.
const VERIFY: &str = include_str!("verify.py");

/// How a model is written.
#[derive(Debug, Clone, Copy)]
pub struct Form<'a> {
    /// In which files.
    pub format: Format,
    /// In bf16 rather than fp32.
    pub bf16: bool,
    /// A Python that has `transformers`, to be asked too.
    pub python: Option<&'a str>,
}

impl From<Format> for Form<'static> {
    fn from(format: Format) -> Form<'static> {
        Form { format, bf16: false, python: None }
    }
}

impl Form<'_> {
    fn kind(self) -> Kind {
        if self.bf16 { Kind::BFloat16 } else { Kind::Float }
    }
}

/// What an export came to.
#[derive(Debug, Clone, PartialEq)]
pub struct Exported {
    /// The files, by name.
    pub files: Vec<String>,
    /// Largest difference of a logit to the model, beside the largest logit: read back here.
    pub off: f64,
    /// The same, by `transformers`, if it was asked.
    pub off_transformers: Option<f64>,
}

/// Writes a trained model into the folder `out`, which must not exist, and proves it. In bf16 the model is its
/// weights rounded, and is held to those.
///
/// # Errors
/// A format that has no place for the model; a folder that exists or cannot be written; an export that is
/// not the model, of which nothing is left.
pub fn export(
    trained: &Trained,
    form: Form<'_>,
    out: &Path,
    comm: &dyn Communicator,
) -> Result<Exported, TrainError> {
    let model = &trained.config().model;
    config::check(model, form.format)?;
    config::check_precision(model, form.format, form.bf16)?;
    if out.exists() {
        return Err(ExchangeError::Exists { path: out.into() }.into());
    }
    let tokenizer = trained.tokenizer()?;
    let mut parameters = trained.parameters(Kind::Float, Device::Cpu, comm)?;
    if form.bf16 {
        round(&mut parameters)?;
    }
    let unfinished = PathBuf::from(format!("{}.tmp", out.display()));
    if unfinished.exists() {
        fs::remove_dir_all(&unfinished).map_err(FileError::of("remove", &unfinished))?;
    }
    fs::create_dir_all(&unfinished).map_err(FileError::of("create the folder", &unfinished))?;
    let done = write(trained, form, &unfinished, &parameters, tokenizer.as_ref())
        .and_then(|()| prove(model, form, &unfinished, parameters, comm));
    match done {
        Ok((off, off_transformers)) => {
            sync_folder(&unfinished)?;
            fs::rename(&unfinished, out).map_err(FileError::of("publish", out))?;
            sync_folder(out.parent().unwrap_or(Path::new(".")))?;
            Ok(Exported { files: crate::run_folder::folder_names(out)?, off, off_transformers })
        }
        Err(error) => {
            let _ = fs::remove_dir_all(&unfinished); // the first error counts
            Err(error)
        }
    }
}

/// Rounds every weight to what bf16 holds.
fn round(parameters: &mut Parameters<'_>) -> Result<(), TrainError> {
    for index in 0..parameters.len() {
        let master = parameters.master(index);
        master.shallow_clone().copy_(&master.to_kind(Kind::BFloat16));
    }
    parameters.publish()
}

fn write(
    trained: &Trained,
    form: Form<'_>,
    folder: &Path,
    parameters: &Parameters<'_>,
    tokenizer: Option<&Tokenizer>,
) -> Result<(), TrainError> {
    let (model, format) = (&trained.config().model, form.format);
    let entries = entries(model, format);
    let ours = tensors(parameters);
    let theirs = |i: usize| entry_of(&entries[i], &ours);
    let end = tokenizer.map(Tokenizer::end_of_text).filter(|&end| (end as usize) < model.vocab_size);
    if format == Format::LlmC {
        llmc::write(&folder.join(llmc::MODEL), model, &entries, form.kind(), theirs)?;
        if let (Some(tokenizer), Some(end)) = (tokenizer, end) {
            let mut tokens = tokenizer.tokens();
            tokens.push(b"<|endoftext|>".to_vec());
            llmc::write_tokenizer(&folder.join(llmc::TOKENIZER), &tokens, end)?;
        }
    } else {
        let shapes: Vec<(String, Vec<i64>)> =
            entries.iter().map(|entry| (entry.name.clone(), entry.shape())).collect();
        let kind = if format == Format::Safetensors { "phalanx" } else { "pt" };
        let about = HashMap::from([("format".to_string(), kind.to_string())]);
        file::write(&folder.join("model.safetensors"), about, &shapes, form.kind(), theirs)?;
        let mut config = match format {
            Format::Safetensors => serde_json::to_value(model).unwrap_or_default(),
            Format::HfBert => bert::to_json(model, tokenizer),
            _ => config::to_json(model, format, end),
        };
        if form.bf16 && format != Format::Safetensors {
            config["dtype"] = "bfloat16".into();
        }
        json(&folder.join("config.json"), &config)?;
        if !matches!(format, Format::Safetensors | Format::HfBert) {
            let generation =
                serde_json::json!({ "bos_token_id": end, "eos_token_id": end, "pad_token_id": end });
            json(&folder.join("generation_config.json"), &generation)?;
        }
        for (name, content) in tokenizer.iter().flat_map(|of| of.to_hugging_face(model.seq_len)) {
            write_atomically(&folder.join(name), content.as_bytes())?;
        }
    }
    Ok(write_atomically(&folder.join("README.md"), card::card(trained, format, form.kind()).as_bytes())?)
}

fn json(path: &Path, value: &serde_json::Value) -> Result<(), FileError> {
    let text = serde_json::to_string_pretty(value).unwrap_or_default() + "\n";
    write_atomically(path, text.as_bytes())
}

/// Every tensor of the model by its name.
fn tensors(parameters: &Parameters<'_>) -> HashMap<String, Tensor> {
    let mut all = HashMap::new();
    for index in 0..parameters.len() {
        for spec in &parameters.spec(index).tensors {
            let view = ops::view(parameters.master(index), spec).expect("a tensor lies within its segment");
            all.insert(spec.name.clone(), view.detach());
        }
    }
    all
}

fn entry_of(entry: &Entry, ours: &HashMap<String, Tensor>) -> Tensor {
    entry.theirs(entry.ours.as_ref().map(|name| &ours[name]))
}

/// Compares what was written with the model, by its logits for made-up tokens.
fn prove(
    model: &ModelConfig,
    form: Form<'_>,
    folder: &Path,
    parameters: Parameters<'_>,
    comm: &dyn Communicator,
) -> Result<(f64, Option<f64>), TrainError> {
    let gradients = Gradients::new(&parameters, 1, false, comm)?;
    let mut engine = Engine::new(Gpt::new(model), parameters, gradients, Recompute::None);
    let tokens = reference::made_up_tokens(model.vocab_size, model.seq_len);
    let ours = engine.logits(&tokens)?;
    let allowed = |by: &str, theirs: &Tensor| {
        let off = distance(&ours, theirs);
        if off <= LIMIT {
            return Ok(off);
        }
        Err(ExchangeError::Differs { path: folder.into(), by: by.into(), off, limit: LIMIT })
    };
    let format = form.format;
    let off = allowed("another reader in float64", &reference::logits(folder, format, &tokens)?)?;
    let hugging_face = !matches!(format, Format::LlmC | Format::Safetensors);
    let off_transformers = match form.python {
        Some(python) if hugging_face => {
            Some(allowed("transformers", &by_transformers(python, folder, &tokens)?)?)
        }
        _ => None,
    };
    Ok((off, off_transformers))
}

/// The largest difference beside the largest value, or beside 1 if that is less; infinite where one is no
/// number.
pub(super) fn distance(ours: &Tensor, theirs: &Tensor) -> f64 {
    let ours = ours.to_kind(Kind::Double);
    let largest = |x: &Tensor| x.abs().max().double_value(&[]);
    let off = largest(&(&ours - theirs.to_kind(Kind::Double))) / largest(&ours).max(1.0);
    if off.is_finite() { off } else { f64::INFINITY }
}

/// Logits of tokens `[B, T]` by `from_pretrained`: `[B, T, V]`.
fn by_transformers(python: &str, folder: &Path, tokens: &Tensor) -> Result<Tensor, ExchangeError> {
    let failed = |what: String| ExchangeError::Python { python: python.into(), what };
    let rows: Vec<Vec<i64>> =
        Vec::try_from(tokens).map_err(|error: tch::TchError| failed(error.to_string()))?;
    let written = folder.join("logits.tmp");
    let output = Command::new(python)
        .args(["-c", VERIFY])
        .args([folder, &written])
        .arg(serde_json::json!(rows).to_string())
        .stdin(Stdio::null())
        .output()
        .map_err(|error| failed(error.to_string()))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        let last: Vec<&str> = said.lines().rev().take(3).collect();
        return Err(failed(last.into_iter().rev().collect::<Vec<&str>>().join("\n")));
    }
    let bytes = fs::read(&written).map_err(FileError::of("read", &written))?;
    fs::remove_file(&written).map_err(FileError::of("remove", &written))?;
    let values: Vec<f32> = bytes.as_chunks().0.iter().map(|four| f32::from_le_bytes(*four)).collect();
    let size = tokens.size();
    let vocab = values.len() as i64 / (size[0] * size[1]);
    if vocab * size[0] * size[1] != values.len() as i64 {
        return Err(failed(format!("it wrote {} values", values.len())));
    }
    Ok(Tensor::from_slice(&values).view([size[0], size[1], vocab]))
}
