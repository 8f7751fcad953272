//! BERT as `transformers` has it: its `config.json`, which models it holds, the names of its tensors, and what a file
//! may lack or have beside them. Knows no files.

use super::layout::Entry;
use super::{ExchangeError, Format};
use configs::{Activation, ModelConfig, Norm, Objective, Pattern};
use dataloader::Tokenizer;
use serde_json::{Value, json};
use std::path::Path;

/// Refuses what BertForMaskedLM cannot say.
///
/// # Errors
/// [`ExchangeError::NoPlace`], with the reason.
pub(super) fn check(model: &ModelConfig) -> Result<(), ExchangeError> {
    let what = match model {
        _ if !model.is_masked() => "model.objective = \"causal\"; it finds what is hidden",
        _ if model.norm != Norm::Post => "model.norm = \"pre\"; it normalises after the sublayers",
        _ if !model.embedding_norm => "model.embedding_norm = false; it normalises the embedding",
        _ if model.token_types == 0 => "model.token_types = 0; it tells a first text from a second",
        _ if !model.qkv_bias => "model.qkv_bias = false; its queries, keys and values have biases",
        _ => return Ok(()),
    };
    let hint = "--format safetensors holds any model".into();
    Err(ExchangeError::NoPlace { format: Format::HfBert, what: what.into(), hint })
}

/// `config.json`.
pub(super) fn to_json(model: &ModelConfig, tokenizer: Option<&Tokenizer>) -> Value {
    let activation = match model.activation {
        Activation::Gelu => "gelu",
        Activation::GeluTanh => "gelu_new",
    };
    // The first of a WordPiece vocabulary is `[PAD]`; other tokenizers have no padding.
    let pad = tokenizer.filter(|tokenizer| tokenizer.mask().is_some()).map(|_| 0);
    json!({
        "model_type": "bert", "architectures": ["BertForMaskedLM"],
        "num_hidden_layers": model.n_layer, "num_attention_heads": model.n_head, "hidden_size": model.n_embd,
        "intermediate_size": 4 * model.n_embd, "max_position_embeddings": model.seq_len,
        "vocab_size": model.vocab_size, "type_vocab_size": model.token_types, "hidden_act": activation,
        "layer_norm_eps": model.norm_eps, "hidden_dropout_prob": model.dropout,
        "attention_probs_dropout_prob": model.dropout, "initializer_range": 0.02, "pad_token_id": pad,
        "tie_word_embeddings": true, "dtype": "float32",
    })
}

/// The shape that a `config.json` describes.
///
/// # Errors
/// [`ExchangeError::NotOurs`], with what is else than here.
pub(super) fn from_json(path: &Path, config: &Value) -> Result<ModelConfig, ExchangeError> {
    let wrong = |what: String| ExchangeError::NotOurs { path: path.into(), what };
    let number = |key: &str| {
        let value = config[key].as_u64().filter(|&n| n > 0 && n <= u64::from(u32::MAX));
        value.map(|n| n as usize).ok_or_else(|| wrong(format!("{key} is {}, expected a number", config[key])))
    };
    let expect = |key: &str, fine: Value| match &config[key] {
        value if *value == fine || value.is_null() => Ok(()),
        value => Err(wrong(format!("{key} is {value}, which is else than here: {fine}"))),
    };
    let (n_embd, n_head) = (number("hidden_size")?, number("num_attention_heads")?);
    expect("intermediate_size", json!(4 * n_embd))?;
    expect("type_vocab_size", json!(2))?;
    expect("position_embedding_type", json!("absolute"))?;
    expect("is_decoder", json!(false))?;
    expect("tie_word_embeddings", json!(true))?;
    let activation = match config["hidden_act"].as_str() {
        Some("gelu") | None => Activation::Gelu,
        Some("gelu_new" | "gelu_pytorch_tanh") => Activation::GeluTanh,
        Some(other) => {
            return Err(wrong(format!("hidden_act is \"{other}\", which is else than here: \"gelu\"")));
        }
    };
    let norm_eps = config["layer_norm_eps"].as_f64().unwrap_or(1e-12);
    if !(norm_eps > 0.0 && norm_eps.is_finite()) {
        return Err(wrong(format!("layer_norm_eps is {norm_eps}, expected a positive number")));
    }
    if !n_embd.is_multiple_of(n_head) {
        let what = format!("hidden_size = {n_embd} is no multiple of num_attention_heads = {n_head}");
        return Err(wrong(what));
    }
    Ok(ModelConfig {
        n_layer: number("num_hidden_layers")?,
        n_head,
        n_embd,
        seq_len: number("max_position_embeddings")?,
        vocab_size: number("vocab_size")?,
        attention: vec![Pattern::Bidirectional],
        norm: Norm::Post,
        dropout: 0.0,
        qkv_bias: true,
        objective: Objective::Masked,
        activation,
        norm_eps,
        embedding_norm: true,
        token_types: 2,
    })
}

/// Its tensors, in the order of the forward pass. The vocabulary's padding is cut.
pub(super) fn entries(model: &ModelConfig) -> Vec<Entry> {
    let (c, v) = (model.n_embd as i64, model.vocab_size as i64);
    let mut all = Vec::new();
    let mut put = |name: String, ours: String, rows, columns| {
        all.push(Entry { name, ours: Some(ours), rows, columns, transposed: false, scale: 1.0 });
    };
    for (name, ours, rows) in [
        ("word_embeddings", "wte", v),
        ("position_embeddings", "wpe", model.seq_len as i64),
        ("token_type_embeddings", "wpe.type", model.token_types as i64),
    ] {
        put(format!("bert.embeddings.{name}.weight"), format!("{ours}.weight"), 0..rows, Some(c));
    }
    for part in ["weight", "bias"] {
        put(format!("bert.embeddings.LayerNorm.{part}"), format!("wpe.ln_0.{part}"), 0..c, None);
    }
    for layer in 0..model.n_layer {
        let theirs = |name: &str| format!("bert.encoder.layer.{layer}.{name}");
        let ours = |name: &str| format!("h.{layer}.{name}");
        for (part, columns) in [("weight", Some(c)), ("bias", None)] {
            for (third, name) in (0..).zip(["query", "key", "value"]) {
                let name = theirs(&format!("attention.self.{name}.{part}"));
                put(name, ours(&format!("attn.c_attn.{part}")), third * c..(third + 1) * c, columns);
            }
        }
        for (name, our_name, rows, columns) in [
            ("attention.output.dense", "attn.c_proj", c, Some(c)),
            ("attention.output.LayerNorm", "ln_1", c, None),
            ("intermediate.dense", "mlp.c_fc", 4 * c, Some(c)),
            ("output.dense", "mlp.c_proj", c, Some(4 * c)),
            ("output.LayerNorm", "ln_2", c, None),
        ] {
            put(theirs(&format!("{name}.weight")), ours(&format!("{our_name}.weight")), 0..rows, columns);
            put(theirs(&format!("{name}.bias")), ours(&format!("{our_name}.bias")), 0..rows, None);
        }
    }
    put("cls.predictions.transform.dense.weight".into(), "mlm.dense.weight".into(), 0..c, Some(c));
    for (name, ours, rows) in [
        ("transform.dense.bias", "dense.bias", c),
        ("transform.LayerNorm.weight", "ln_f.weight", c),
        ("transform.LayerNorm.bias", "ln_f.bias", c),
        ("bias", "head.bias", v),
    ] {
        put(format!("cls.predictions.{name}"), format!("mlm.{ours}"), 0..rows, None);
    }
    all
}

/// Whether a file may lack a tensor: a BertModel is an encoder without the head that finds what is hidden.
pub(super) fn may_be_absent(name: &str) -> bool {
    name.starts_with("cls.predictions.")
}

/// Refuses a head of which only a part is there.
///
/// # Errors
/// [`ExchangeError::Malformed`].
pub(super) fn whole_or_none(folder: &Path, absent: &[String]) -> Result<(), ExchangeError> {
    match absent {
        [first, ..] if absent.len() < 5 => {
            Err(ExchangeError::Malformed { path: folder.into(), what: format!("it has no tensor {first}") })
        }
        _ => Ok(()),
    }
}

/// Whether a tensor changes nothing of what is computed here: positions that are counted anyway, the head, which is
/// the embedding, and what reads the first token or judges whether two texts follow each other.
pub(super) fn is_harmless(name: &str) -> bool {
    name.ends_with("embeddings.position_ids")
        || name.starts_with("cls.predictions.decoder.")
        || name.starts_with("cls.seq_relationship.")
        || ["pooler.", "bert.pooler."].iter().any(|start| name.starts_with(start))
}
