//! What each format has a place for, and what is refused of others' files.

use super::*;
use configs::{ModelConfig, Norm};
use serde_json::{Value, json};
use std::path::Path;

fn model(attention: &[&str]) -> ModelConfig {
    ModelConfig {
        n_layer: 4,
        n_head: 2,
        n_embd: 16,
        seq_len: 32,
        vocab_size: 97,
        attention: attention.iter().map(|pattern| pattern.parse().unwrap()).collect(),
        ..ModelConfig::default()
    }
}

#[test]
fn a_format_takes_the_models_it_can_say_and_refuses_others_with_the_reason() {
    let neo = |attention: &[&str]| ModelConfig { qkv_bias: false, ..model(attention) };
    let post = ModelConfig { norm: Norm::Post, ..model(&["dense"]) };
    let bert = ModelConfig {
        norm: Norm::Post,
        objective: configs::Objective::Masked,
        activation: configs::Activation::Gelu,
        norm_eps: 1e-12,
        embedding_norm: true,
        token_types: 2,
        ..model(&["bidirectional"])
    };
    for (model, format) in [
        (bert.clone(), Format::HfBert),
        (bert.clone(), Format::Safetensors),
        (model(&["dense"]), Format::HfGpt2),
        (model(&["banded:32"]), Format::LlmC), // as long as the context
        (neo(&["dense"]), Format::HfGpt2),
        (neo(&["dense", "banded:8"]), Format::HfGptNeo),
        (post.clone(), Format::OpenaiGpt),
        (neo(&["fixed:8,2", "strided:4"]), Format::Safetensors),
    ] {
        config::check(&model, format).unwrap();
    }
    for (model, format, what) in [
        (model(&["dense", "banded:8"]), Format::HfGpt2, "banded:8; it knows dense ones"),
        (model(&["dense", "banded:8"]), Format::HfGptNeo, "have biases"),
        (neo(&["banded:8", "banded:4"]), Format::HfGptNeo, "bands of 8 and 4 keys"),
        (neo(&["strided:4"]), Format::HfGptNeo, "strided:4"),
        (post.clone(), Format::HfGpt2, "\"post\""),
        (post, Format::HfBert, "\"causal\""),
        (bert.clone(), Format::OpenaiGpt, "\"masked\""),
        (ModelConfig { token_types: 0, ..bert }, Format::HfBert, "token_types = 0"),
        (ModelConfig { norm_eps: 1e-12, ..model(&["dense"]) }, Format::HfGpt2, "epsilon"),
        (model(&["dense"]), Format::OpenaiGpt, "\"pre\""),
    ] {
        let error = config::check(&model, format).unwrap_err().to_string();
        assert!(error.contains(what) && error.contains("hint: "), "{format}: {error}");
    }
}

#[test]
fn a_shape_comes_back_from_its_config() {
    for (model, format) in [
        (model(&["dense"]), Format::HfGpt2),
        (ModelConfig { qkv_bias: false, ..model(&["dense", "banded:8"]) }, Format::HfGptNeo),
        (ModelConfig { norm: Norm::Post, ..model(&["dense"]) }, Format::OpenaiGpt),
    ] {
        let json = config::to_json(&model, format, Some(3));
        let (back, found) = config::from_json(Path::new("config.json"), &json).unwrap();
        let patterns = |model: &ModelConfig| (0..4).map(|layer| model.pattern(layer)).collect::<Vec<_>>();
        assert_eq!(patterns(&back), patterns(&model));
        assert_eq!((ModelConfig { attention: model.attention.clone(), ..back }, found), (model, format));
    }
}

#[test]
fn what_would_compute_something_else_is_refused_by_its_key() {
    let with = |key: &str, value: Value| {
        let mut json = config::to_json(&model(&["dense"]), Format::HfGpt2, None);
        json[key] = value;
        config::from_json(Path::new("config.json"), &json).unwrap_err().to_string()
    };
    for (key, value) in [
        ("model_type", json!("llama")),
        ("activation_function", json!("relu")),
        ("layer_norm_epsilon", json!(1e-6)),
        ("scale_attn_by_inverse_layer_idx", json!(true)),
        ("tie_word_embeddings", json!(false)),
        ("n_inner", json!(24)),
        ("n_layer", json!(-1)),
        ("n_head", json!(3)),
    ] {
        let error = with(key, value);
        assert!(error.contains(key) && error.contains("config.json"), "{error}");
    }
}
