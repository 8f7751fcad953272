//! The model card that goes with an export: what the model is, where it comes from, how it is loaded. Knows no files.

use super::Format;
use crate::trained::Trained;
use tch::Kind;

/// The text of README.md.
pub(super) fn card(trained: &Trained, format: Format, kind: Kind) -> String {
    let (config, state) = (trained.config(), trained.state());
    let model = &config.model;
    let patterns: Vec<String> = model.attention.iter().map(ToString::to_string).collect();
    let loss =
        state.recent_losses.last().map_or("not recorded".into(), |loss| format!("{loss:.4} nats per target"));
    let loading = match format {
        Format::LlmC => "`model.bin` and `tokenizer.bin` are llm.c's.".to_string(),
        Format::Safetensors => {
            "`phalanx import` reads this folder. Matrices are [out, in]; queries, keys and values are one matrix; \
             `config.json` has the shape."
                .to_string()
        }
        Format::HfBert => "```python\nfrom transformers import AutoModelForMaskedLM, AutoTokenizer\n\
              model = AutoModelForMaskedLM.from_pretrained(\"this/folder\")\n\
              tokenizer = AutoTokenizer.from_pretrained(\"this/folder\")\n```"
            .to_string(),
        _ => "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\
              model = AutoModelForCausalLM.from_pretrained(\"this/folder\")\n\
              tokenizer = AutoTokenizer.from_pretrained(\"this/folder\")\n```"
            .to_string(),
    };
    let head = match format {
        Format::HfGpt2 | Format::HfGptNeo | Format::OpenaiGpt => {
            "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n"
        }
        Format::HfBert => "---\nlibrary_name: transformers\npipeline_tag: fill-mask\n---\n\n",
        Format::LlmC | Format::Safetensors => "",
    };
    let precision = if kind == Kind::BFloat16 { "bf16, rounded from fp32" } else { "fp32" };
    let what = if model.is_masked() { "A masked encoder" } else { "A decoder" };
    let rows = [
        ("parameters", model.parameters().to_string()),
        ("blocks, heads, width", format!("{}, {}, {}", model.n_layer, model.n_head, model.n_embd)),
        ("context", format!("{} tokens", model.seq_len)),
        ("vocabulary", format!("{} ({})", model.vocab_size, state.tokenizer)),
        ("attention", patterns.join(", ")),
        ("values", precision.into()),
        ("trained for", format!("{} updates, {} tokens", state.step, state.tokens)),
        ("last training loss", loss),
        ("training data", digest(&state.train_digest)),
        ("validation data", state.val_digest.as_deref().map_or("none".into(), digest)),
    ];
    let rows: String = rows.iter().map(|(name, value)| format!("| {name} | {value} |\n")).collect();
    let name = &config.run.name;
    format!(
        "{head}# {name}\n\n{what} that Phalanx {version} exported as `{format}`.\n\n| | |\n|---|---|\n{rows}\n\
         {loading}\n\nWhat it was trained on, for what it may be used and where it fails is not known to the \
         program that wrote this card.\n",
        version = env!("CARGO_PKG_VERSION"),
    )
}

fn digest(hex: &str) -> String {
    if hex.is_empty() { "not known".into() } else { format!("digest `{hex}`") }
}
