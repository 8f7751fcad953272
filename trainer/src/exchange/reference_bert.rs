//! BERT as it stands in exported files, computed by a way of its own, as `reference` does: its own reading of the
//! files, float64, attention written out. Knows no layout of Phalanx but the names in its plain safetensors.

use super::{ExchangeError, Format, reference};
use crate::run_folder::FileError;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use std::collections::HashMap;
use std::path::Path;
use tch::{Kind, Tensor};

/// The encoder: every tensor by its name in `transformers`.
pub(super) struct Encoder {
    values: HashMap<String, Tensor>,
    layers: i64,
    heads: i64,
    eps: f64,
    tanh: bool,
}

/// Names of `transformers` for those of the plain form, in the order in which they are replaced.
const NAMES: [(&str, &str); 14] = [
    ("wte.", "bert.embeddings.word_embeddings."),
    ("wpe.type.", "bert.embeddings.token_type_embeddings."),
    ("wpe.ln_0.", "bert.embeddings.LayerNorm."),
    ("wpe.", "bert.embeddings.position_embeddings."),
    ("mlm.head.", "cls.predictions."),
    ("mlm.dense.", "cls.predictions.transform.dense."),
    ("mlm.ln_f.", "cls.predictions.transform.LayerNorm."),
    ("h.", "bert.encoder.layer."),
    (".attn.c_proj.", ".attention.output.dense."),
    (".ln_1.", ".attention.output.LayerNorm."),
    (".mlp.c_fc.", ".intermediate.dense."),
    (".mlp.c_proj.", ".output.dense."),
    (".ln_2.", ".output.LayerNorm."),
    (".attn.c_attn.", ".attention.self.all."),
];

impl Encoder {
    /// What is in the folder; none where that is no masked model.
    ///
    /// # Errors
    /// Files that cannot be read.
    pub(super) fn open(folder: &Path, format: Format) -> Result<Option<Encoder>, ExchangeError> {
        let about = folder.join("config.json");
        if !about.is_file() {
            return Ok(None);
        }
        let text = std::fs::read(&about).map_err(FileError::of("read", &about))?;
        let malformed = |what: String| ExchangeError::Malformed { path: folder.into(), what };
        let config: Value = serde_json::from_slice(&text).map_err(|error| malformed(error.to_string()))?;
        let plain = format == Format::Safetensors;
        if format != Format::HfBert && !(plain && config["objective"] == "masked") {
            return Ok(None);
        }
        let path = folder.join("model.safetensors");
        let bytes = std::fs::read(&path).map_err(FileError::of("read", &path))?;
        let file = SafeTensors::deserialize(&bytes).map_err(|error| malformed(error.to_string()))?;
        let mut values = HashMap::new();
        for (name, view) in file.tensors() {
            let shape: Vec<i64> = view.shape().iter().map(|&n| n as i64).collect();
            let tensor = reference::values(view.data(), view.dtype() == Dtype::BF16).view(&shape[..]);
            for (name, tensor) in if plain { renamed(&name, tensor) } else { vec![(name, tensor)] } {
                values.insert(name, tensor);
            }
        }
        let number = |ours: &str, theirs: &str| {
            let key = if plain { ours } else { theirs };
            config[key].as_f64().ok_or_else(|| malformed(format!("config.json has no {key}")))
        };
        let activation = if plain { &config["activation"] } else { &config["hidden_act"] };
        Ok(Some(Encoder {
            values,
            layers: number("n_layer", "num_hidden_layers")? as i64,
            heads: number("n_head", "num_attention_heads")? as i64,
            eps: number("norm_eps", "layer_norm_eps")?,
            tanh: activation != "gelu",
        }))
    }

    /// Logits of tokens `[B, T]`, all of a first text: `[B, T, V]` float64.
    pub(super) fn logits(&self, tokens: &Tensor) -> Tensor {
        let (b, t) = (tokens.size()[0], tokens.size()[1]);
        let embedding = |name: &str| self.get(&format!("bert.embeddings.{name}_embeddings.weight"));
        let words = embedding("word");
        let rows = words.index_select(0, &tokens.view([-1])).view([b, t, -1]);
        let mut x = rows + embedding("position").narrow(0, 0, t);
        if let Some(types) = self.values.get("bert.embeddings.token_type_embeddings.weight") {
            x += types.get(0);
        }
        if self.values.contains_key("bert.embeddings.LayerNorm.weight") {
            x = self.norm("bert.embeddings.LayerNorm", &x);
        }
        for layer in 0..self.layers {
            let h = |name: &str| format!("bert.encoder.layer.{layer}.{name}");
            let attended = self.linear(&h("attention.output.dense"), &self.attention(&h, &x));
            x = self.norm(&h("attention.output.LayerNorm"), &(&x + attended));
            let hidden = self.gelu(&self.linear(&h("intermediate.dense"), &x));
            x = self.norm(&h("output.LayerNorm"), &(&x + self.linear(&h("output.dense"), &hidden)));
        }
        let x = self.gelu(&self.linear("cls.predictions.transform.dense", &x));
        let x = self.norm("cls.predictions.transform.LayerNorm", &x);
        x.matmul(&words.transpose(0, 1)) + self.get("cls.predictions.bias")
    }

    fn attention(&self, h: &impl Fn(&str) -> String, x: &Tensor) -> Tensor {
        let (b, t, c) = (x.size()[0], x.size()[1], x.size()[2]);
        let split = |name: &str| {
            let y = self.linear(&h(&format!("attention.self.{name}")), x);
            y.view([b, t, self.heads, c / self.heads]).transpose(1, 2)
        };
        let [q, k, v] = ["query", "key", "value"].map(split);
        let scores = q.matmul(&k.transpose(2, 3)) / ((c / self.heads) as f64).sqrt();
        scores.softmax(-1, Kind::Double).matmul(&v).transpose(1, 2).reshape([b, t, c])
    }

    fn get(&self, name: &str) -> &Tensor {
        self.values.get(name).unwrap_or_else(|| panic!("what was just written has a tensor {name}"))
    }

    fn linear(&self, name: &str, x: &Tensor) -> Tensor {
        let y = x.matmul(&self.get(&format!("{name}.weight")).transpose(0, 1));
        self.values.get(&format!("{name}.bias")).map_or(y.shallow_clone(), |bias| &y + bias)
    }

    fn norm(&self, name: &str, x: &Tensor) -> Tensor {
        let off = x - x.mean_dim([-1i64].as_slice(), true, Kind::Double);
        let variance = (&off * &off).mean_dim([-1i64].as_slice(), true, Kind::Double);
        off / (variance + self.eps).sqrt() * self.get(&format!("{name}.weight"))
            + self.get(&format!("{name}.bias"))
    }

    fn gelu(&self, x: &Tensor) -> Tensor {
        if self.tanh {
            let inner = (x + x.pow_tensor_scalar(3) * 0.044715) * (2.0 / std::f64::consts::PI).sqrt();
            return x * 0.5 * (inner.tanh() + 1.0);
        }
        x * 0.5 * ((x / std::f64::consts::SQRT_2).erf() + 1.0)
    }
}

/// A tensor of the plain form under the name that `transformers` has for it; queries, keys and values come apart.
fn renamed(name: &str, tensor: Tensor) -> Vec<(String, Tensor)> {
    let mut theirs = name.to_string();
    for (from, to) in NAMES {
        let begins = !from.starts_with('.');
        match theirs.strip_prefix(from) {
            Some(rest) if begins => theirs = format!("{to}{rest}"),
            None if !begins => theirs = theirs.replacen(from, to, 1),
            _ => {}
        }
    }
    if !theirs.contains(".self.all.") {
        return vec![(theirs, tensor)];
    }
    let c = tensor.size()[0] / 3;
    let part = |(i, name): (i64, &str)| (theirs.replace(".all.", name), tensor.narrow(0, i * c, c));
    (0..).zip([".query.", ".key.", ".value."]).map(part).collect()
}
