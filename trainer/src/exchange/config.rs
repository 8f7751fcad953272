//! A model's shape as `config.json` of each format and back, and which models a format has no place for. Knows no
//! weights.

use super::{ExchangeError, Format, bert};
use configs::{Activation, ModelConfig, Norm, Pattern};
use serde_json::{Value, json};
use std::path::Path;

/// Refuses what the format cannot say.
///
/// # Errors
/// [`ExchangeError::NoPlace`], with the reason.
pub(super) fn check(model: &ModelConfig, format: Format) -> Result<(), ExchangeError> {
    let refuse = |what: String, hint: &str| Err(ExchangeError::NoPlace { format, what, hint: hint.into() });
    let gpt =
        model.norm_eps == 1e-5 && model.activation == Activation::GeluTanh && model.has_plain_embedding();
    if format == Format::Safetensors && (gpt || model.is_masked()) {
        return Ok(());
    }
    if format == Format::HfBert {
        return bert::check(model);
    }
    if model.is_masked() {
        let hint = "--format hf-bert has a place for it, --format safetensors holds any model";
        return refuse("model.objective = \"masked\"; it predicts the next token".into(), hint);
    }
    if !gpt {
        let what = "a model that predicts the next token has the tanh form of GELU there, an epsilon of 1e-5 and an \
                    embedding without a norm and without types";
        return refuse(what.into(), "leave model.activation, norm_eps, embedding_norm and token_types out");
    }
    check_decoder(model, format)
}

/// Refuses bf16 where the format's values are not ours: what is divided by a root that is no power of two is rounded
/// twice.
///
/// # Errors
/// [`ExchangeError::NoPlace`], with the reason.
pub(super) fn check_precision(model: &ModelConfig, format: Format, bf16: bool) -> Result<(), ExchangeError> {
    let d = model.head_dim();
    let exact = d.is_power_of_two() && d.trailing_zeros().is_multiple_of(2);
    if !bf16 || format != Format::HfGptNeo || exact {
        return Ok(());
    }
    let what = format!("queries in bf16, divided by the root of {d}, are other queries");
    let hint = "leave --bf16 out, or train with heads that are 16, 64 or 256 wide".into();
    Err(ExchangeError::NoPlace { format, what, hint })
}

/// The same of a model that is a GPT in all but its blocks.
fn check_decoder(model: &ModelConfig, format: Format) -> Result<(), ExchangeError> {
    let refuse = |what: String, hint: &str| Err(ExchangeError::NoPlace { format, what, hint: hint.into() });
    let post = model.norm == Norm::Post;
    if post != (format == Format::OpenaiGpt) {
        let (what, hint) = if post {
            (
                "model.norm = \"post\"; it normalises before the sublayers",
                "--format openai-gpt has norms after them",
            )
        } else {
            (
                "model.norm = \"pre\"; it normalises after the sublayers",
                "--format hf-gpt2 has norms before them",
            )
        };
        return refuse(what.into(), hint);
    }
    let patterns = (0..model.n_layer).map(|layer| effective(model, layer));
    if format == Format::HfGptNeo {
        if model.qkv_bias {
            let what = "queries, keys and values have biases, GPT-Neo's have none";
            return refuse(
                what.into(),
                "train with model.qkv_bias = false, as configs/gpt-neo-125m.toml does",
            );
        }
        let mut windows: Vec<usize> = Vec::new();
        for pattern in patterns {
            match pattern {
                Pattern::Dense => {}
                Pattern::Banded(w) => windows.push(w),
                other => {
                    let hint = "--format safetensors holds any model";
                    return refuse(
                        format!("a layer has the pattern {other}; it knows dense and banded"),
                        hint,
                    );
                }
            }
        }
        windows.dedup();
        if windows.len() > 1 {
            return refuse(
                format!("bands of {} and {} keys; it has one width", windows[0], windows[1]),
                "--format safetensors holds any model",
            );
        }
        return Ok(());
    }
    match patterns.into_iter().find(|pattern| *pattern != Pattern::Dense) {
        None => Ok(()),
        Some(Pattern::Banded(w)) if !model.qkv_bias => refuse(
            format!("a layer is banded:{w}; it knows dense ones"),
            "--format hf-gpt-neo has banded layers",
        ),
        Some(Pattern::Banded(w)) => refuse(
            format!("a layer is banded:{w}; it knows dense ones"),
            "--format hf-gpt-neo has banded layers, for models with model.qkv_bias = false; --format safetensors \
             holds any model",
        ),
        Some(other) => {
            refuse(format!("a layer is {other}; it knows dense ones"), "--format safetensors holds any model")
        }
    }
}

/// A layer's pattern; a band that is as long as the context is dense.
fn effective(model: &ModelConfig, layer: usize) -> Pattern {
    match model.pattern(layer) {
        Pattern::Banded(w) if w >= model.seq_len => Pattern::Dense,
        other => other,
    }
}

/// `config.json` of one of `transformers`' formats. `end` is the token that ends a document.
pub(super) fn to_json(model: &ModelConfig, format: Format, end: Option<u32>) -> Value {
    let (p, v) = (model.dropout, model.vocab_size);
    let mut config = match format {
        Format::HfGptNeo => {
            let layers = (0..model.n_layer).map(|layer| match effective(model, layer) {
                Pattern::Banded(_) => "local",
                _ => "global",
            });
            let layers: Vec<&str> = layers.collect();
            let window = (0..model.n_layer).find_map(|layer| match effective(model, layer) {
                Pattern::Banded(w) => Some(w),
                _ => None,
            });
            json!({
                "model_type": "gpt_neo", "architectures": ["GPTNeoForCausalLM"],
                "num_layers": model.n_layer, "num_heads": model.n_head, "hidden_size": model.n_embd,
                "max_position_embeddings": model.seq_len, "intermediate_size": null,
                "attention_types": [[layers, 1]], "attention_layers": layers,
                "window_size": window.unwrap_or(model.seq_len),
                "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
                "attention_dropout": p, "embed_dropout": p, "resid_dropout": p,
            })
        }
        Format::OpenaiGpt => json!({
            "model_type": "openai-gpt", "architectures": ["OpenAIGPTLMHeadModel"], "afn": "gelu",
        }),
        _ => json!({
            "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new",
            "n_inner": null, "scale_attn_weights": true, "scale_attn_by_inverse_layer_idx": false,
        }),
    };
    let object = config.as_object_mut().expect("it is one");
    if format != Format::HfGptNeo {
        let shape = json!({
            "n_layer": model.n_layer, "n_head": model.n_head, "n_embd": model.n_embd,
            "n_positions": model.seq_len, "layer_norm_epsilon": 1e-5,
            "attn_pdrop": p, "embd_pdrop": p, "resid_pdrop": p,
        });
        object.extend(shape.as_object().cloned().unwrap_or_default());
    }
    let common = json!({
        "vocab_size": v, "bos_token_id": end, "eos_token_id": end, "pad_token_id": null,
        "tie_word_embeddings": true, "initializer_range": 0.02, "dtype": "float32", "use_cache": true,
    });
    object.extend(common.as_object().cloned().unwrap_or_default());
    config
}

/// The shape and the format that a `config.json` describes.
///
/// # Errors
/// [`ExchangeError::NotOurs`], with what is else than here.
pub(super) fn from_json(path: &Path, config: &Value) -> Result<(ModelConfig, Format), ExchangeError> {
    let wrong = |what: String| ExchangeError::NotOurs { path: path.into(), what };
    let number = |key: &str| {
        let value = config[key].as_u64().filter(|&n| n > 0 && n <= u64::from(u32::MAX));
        value.map(|n| n as usize).ok_or_else(|| wrong(format!("{key} is {}, expected a number", config[key])))
    };
    let expect = |key: &str, fine: &[Value]| match &config[key] {
        value if fine.contains(value) => Ok(()),
        value => Err(wrong(format!("{key} is {value}, which is else than here: {}", fine[0]))),
    };
    let format = match config["model_type"].as_str() {
        Some("bert") => return Ok((bert::from_json(path, config)?, Format::HfBert)),
        Some("gpt2") => Format::HfGpt2,
        Some("gpt_neo") => Format::HfGptNeo,
        Some("openai-gpt") => Format::OpenaiGpt,
        _ => return Err(wrong(format!("model_type is {}", config["model_type"]))),
    };
    let eps = config["layer_norm_epsilon"].as_f64().unwrap_or(1e-5);
    if (eps / 1e-5 - 1.0).abs() > 1e-6 {
        return Err(wrong(format!("layer_norm_epsilon is {eps}, here it is 1e-5")));
    }
    expect("tie_word_embeddings", &[json!(true), Value::Null])?;
    let tanh = [json!("gelu_new"), json!("gelu_pytorch_tanh"), Value::Null];
    let neo = format == Format::HfGptNeo;
    let [layers, heads, width, positions] = if neo {
        ["num_layers", "num_heads", "hidden_size", "max_position_embeddings"]
    } else {
        ["n_layer", "n_head", "n_embd", "n_positions"]
    };
    let (n_layer, n_embd) = (number(layers)?, number(width)?);
    match format {
        Format::OpenaiGpt => expect("afn", &[json!("gelu"), json!("gelu_new"), Value::Null])?,
        _ => expect("activation_function", &tanh)?,
    }
    let inner = if neo { "intermediate_size" } else { "n_inner" };
    expect(inner, &[Value::Null, json!(4 * n_embd)])?;
    expect("scale_attn_weights", &[json!(true), Value::Null])?;
    expect("scale_attn_by_inverse_layer_idx", &[json!(false), Value::Null])?;
    let attention = if neo { neo_patterns(config, n_layer).map_err(wrong)? } else { vec![Pattern::Dense] };
    let model = ModelConfig {
        n_layer,
        n_head: number(heads)?,
        n_embd,
        seq_len: number(positions)?,
        vocab_size: number("vocab_size")?,
        attention,
        norm: if format == Format::OpenaiGpt { Norm::Post } else { Norm::Pre },
        qkv_bias: !neo,
        ..ModelConfig::default()
    };
    if !model.n_embd.is_multiple_of(model.n_head) {
        return Err(wrong(format!(
            "{width} = {} is no multiple of {heads} = {}",
            model.n_embd, model.n_head
        )));
    }
    Ok((model, format))
}

/// GPT-Neo's layers: `attention_layers`, or `attention_types`, from which they are expanded.
fn neo_patterns(config: &Value, n_layer: usize) -> Result<Vec<Pattern>, String> {
    let window = config["window_size"].as_u64().unwrap_or(256).max(1) as usize;
    let mut names: Vec<&Value> = config["attention_layers"].as_array().into_iter().flatten().collect();
    if names.is_empty() {
        for group in config["attention_types"].as_array().into_iter().flatten() {
            let times = group[1].as_u64().unwrap_or(0).min(n_layer as u64);
            let kinds = group[0].as_array().map(Vec::as_slice).unwrap_or_default();
            (0..times).for_each(|_| names.extend(kinds));
        }
    }
    if names.len() != n_layer {
        return Err(format!("attention_layers has {} entries for {n_layer} layers", names.len()));
    }
    let pattern = |name: &&Value| match name.as_str() {
        Some("global") => Ok(Pattern::Dense),
        Some("local") => Ok(Pattern::Banded(window)),
        _ => Err(format!("a layer's attention is {name}, expected \"global\" or \"local\"")),
    };
    names.iter().map(pattern).collect()
}
