//! Models that `transformers` saved: read, equal to it by their logits, and written again as they were.

use crate::Golden;
use crate::support::Scratch;
use ops::collectives::Solo;
use safetensors::SafeTensors;
use std::path::{Path, PathBuf};
use tch::{Device, Kind, Tensor};
use trainer::exchange::{Form, Format, export, import};
use trainer::{Engine, Gpt, Gradients, Trained};

/// Largest accepted difference of a logit, beside the largest logit.
const LIMIT: f64 = 1e-4;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(name)
}

fn logits(run: &Path, tokens: &Tensor) -> Tensor {
    let (comm, trained) = (Solo::new(), Trained::open(run, None).unwrap());
    let parameters = trained.parameters(Kind::Float, Device::Cpu, &comm).unwrap();
    let gradients = Gradients::new(&parameters, 1, false, &comm).unwrap();
    let model: Gpt = trained.model();
    Engine::new(model, parameters, gradients, configs::Recompute::None).logits(tokens).unwrap()
}

/// Imports into `run`, and compares with the logits beside the model.
fn imported(from: &Path, run: &Path, name: &str) {
    import(from, run, &Solo::new()).unwrap();
    let values = Golden::read(&format!("{name}/logits.safetensors"));
    let (ours, theirs) = (logits(run, &values.get("tokens")), values.get("logits"));
    let largest = |x: &Tensor| x.abs().max().double_value(&[]);
    let off = largest(&(ours - &theirs)) / largest(&theirs);
    assert!(off <= LIMIT, "{name}: logits are off by {off:e}");
}

/// Values of two files by name; the largest difference.
fn apart(a: &Path, b: &Path) -> f64 {
    let [a, b] = [a, b].map(|folder| std::fs::read(folder.join("model.safetensors")).unwrap());
    let [a, b] = [&a, &b].map(|bytes| SafeTensors::deserialize(bytes).unwrap());
    let sorted = |file: &SafeTensors<'_>| {
        let mut names: Vec<String> = file.names().into_iter().map(ToString::to_string).collect();
        names.sort();
        names
    };
    assert_eq!(sorted(&a), sorted(&b));
    let mut largest = 0f64;
    for name in a.names() {
        let (x, y) = (a.tensor(name).unwrap(), b.tensor(name).unwrap());
        assert_eq!(x.shape(), y.shape(), "{name}");
        let values = |bytes: &[u8]| -> Vec<f32> {
            bytes.as_chunks().0.iter().map(|four| f32::from_le_bytes(*four)).collect()
        };
        for (x, y) in values(x.data()).into_iter().zip(values(y.data())) {
            largest = largest.max(f64::from((x - y).abs()));
        }
    }
    largest
}

#[test]
fn gpt2_gpt_neo_openai_gpt_and_bert_come_in_with_transformers_logits_and_go_out_as_they_were() {
    let scratch = Scratch::new("exchange");
    for (name, format, exact) in [
        ("hf-gpt2", Format::HfGpt2, true),
        ("openai-gpt", Format::OpenaiGpt, true),
        ("hf-bert", Format::HfBert, true),
        ("hf-gpt-neo", Format::HfGptNeo, false), // queries go through the root of 8 and back
    ] {
        let (run, out) = (scratch.join(format!("run-{name}")), scratch.join(format!("out-{name}")));
        imported(&golden(name), &run, name);
        let trained = Trained::open(&run, None).unwrap();
        let done = export(&trained, format.into(), &out, &Solo::new()).unwrap();
        assert!(done.off <= LIMIT && done.files.contains(&"README.md".to_string()), "{done:?}");
        let apart = apart(&golden(name), &out);
        assert!(apart <= if exact { 0.0 } else { 1e-6 }, "{name}: {apart:e}");
    }
}

#[test]
fn a_masked_model_survives_plain_safetensors_and_goes_into_no_decoders_format() {
    let scratch = Scratch::new("exchange-masked");
    let (run, plain, back) = (scratch.join("run"), scratch.join("plain"), scratch.join("back"));
    imported(&golden("hf-bert"), &run, "hf-bert");
    let trained = Trained::open(&run, None).unwrap();
    export(&trained, Format::Safetensors.into(), &plain, &Solo::new()).unwrap();
    imported(&plain, &back, "hf-bert");
    let refusal = export(&trained, Format::OpenaiGpt.into(), &scratch.join("out"), &Solo::new()).unwrap_err();
    assert!(refusal.to_string().contains("model.objective = \"masked\""), "{refusal}");
}

#[test]
fn an_encoder_without_a_head_comes_in_and_says_what_is_new() {
    let scratch = Scratch::new("exchange-headless");
    let (from, run) = (scratch.join("from"), scratch.join("run"));
    std::fs::create_dir(&from).unwrap();
    std::fs::copy(golden("hf-bert").join("config.json"), from.join("config.json")).unwrap();
    let bytes = std::fs::read(golden("hf-bert").join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    // As a BertModel is saved: no prefix, no head; with a pooler, which nothing here reads.
    let encoder = file
        .tensors()
        .into_iter()
        .filter_map(|(name, view)| Some((name.strip_prefix("bert.")?.to_string(), view)));
    let pooler = file.tensor("bert.encoder.layer.0.attention.output.dense.weight").unwrap();
    let encoder = encoder.chain([("pooler.dense.weight".to_string(), pooler)]);
    std::fs::write(from.join("model.safetensors"), safetensors::serialize(encoder, None).unwrap()).unwrap();
    let done = import(&from, &run, &Solo::new()).unwrap();
    assert_eq!(done.absent.len(), 5, "{:?}", done.absent);
    assert!(done.absent.iter().all(|name| name.starts_with("cls.predictions.")), "{:?}", done.absent);
    let out = scratch.join("out");
    export(&Trained::open(&run, None).unwrap(), Format::HfBert.into(), &out, &Solo::new()).unwrap();
}

#[test]
fn llmc_and_plain_safetensors_hold_the_model_bit_for_bit() {
    let scratch = Scratch::new("exchange-plain");
    let run = scratch.join("run");
    imported(&golden("hf-gpt2"), &run, "hf-gpt2");
    for (format, file) in [(Format::LlmC, "model.bin"), (Format::Safetensors, "")] {
        let (out, back) = (scratch.join(format!("{format}")), scratch.join(format!("back-{format}")));
        export(&Trained::open(&run, None).unwrap(), format.into(), &out, &Solo::new()).unwrap();
        imported(&out.join(file), &back, "hf-gpt2");
        let again = scratch.join(format!("again-{format}"));
        export(&Trained::open(&back, None).unwrap(), Format::HfGpt2.into(), &again, &Solo::new()).unwrap();
        assert_eq!(apart(&golden("hf-gpt2"), &again), 0.0, "{format}");
    }
}

#[test]
fn in_bf16_a_model_is_its_weights_rounded_half_as_large_and_comes_back_so() {
    let scratch = Scratch::new("exchange-bf16");
    for (name, format) in [
        ("hf-gpt2", Format::HfGpt2),
        ("hf-bert", Format::HfBert),
        ("hf-gpt2", Format::LlmC),
        ("hf-gpt2", Format::Safetensors),
    ] {
        let place = |part: &str| scratch.join(format!("{part}-{format}"));
        imported(&golden(name), &place("run"), name);
        let trained = Trained::open(&place("run"), None).unwrap();
        let form = Form { bf16: true, ..format.into() };
        assert!(export(&trained, form, &place("out"), &Solo::new()).unwrap().off <= LIMIT);
        let (whole, file) = (golden(name), if format == Format::LlmC { "model.bin" } else { "" });
        import(&place("out").join(file), &place("back"), &Solo::new()).unwrap();
        let back = Trained::open(&place("back"), None).unwrap();
        let again = if name == "hf-bert" { Format::HfBert } else { Format::HfGpt2 };
        export(&back, again.into(), &place("again"), &Solo::new()).unwrap();
        // Eight bits of mantissa: at most 1/256 of a value is rounded away, and something is.
        let apart = apart(&whole, &place("again"));
        assert!(apart > 0.0 && apart < 0.01, "{format}: {apart:e}");
        if file.is_empty() {
            let size = |folder: &Path| std::fs::metadata(folder.join("model.safetensors")).unwrap().len();
            assert!(size(&place("out")) < size(&whole) * 6 / 10, "{format}");
        }
    }
    let run = scratch.join("run-neo");
    imported(&golden("hf-gpt-neo"), &run, "hf-gpt-neo");
    let form = Form { bf16: true, ..Format::HfGptNeo.into() };
    let refusal = export(&Trained::open(&run, None).unwrap(), form, &scratch.join("neo"), &Solo::new());
    let refusal = refusal.unwrap_err().to_string();
    assert!(refusal.contains("divided by the root of 8") && refusal.contains("hint: "), "{refusal}");
}

#[test]
fn a_model_that_is_cut_short_or_has_no_place_in_a_format_leaves_nothing_behind() {
    let scratch = Scratch::new("exchange-refused");
    let run = scratch.join("run");
    imported(&golden("hf-gpt-neo"), &run, "hf-gpt-neo");
    let trained = Trained::open(&run, None).unwrap();
    let refusal = export(&trained, Format::HfGpt2.into(), &scratch.join("out"), &Solo::new()).unwrap_err();
    assert!(refusal.to_string().contains("hf-gpt2 cannot hold this model: a layer is banded:5"), "{refusal}");
    let again = export(&trained, Format::HfGptNeo.into(), &run, &Solo::new()).unwrap_err();
    assert!(again.to_string().contains("exists"), "{again}");

    let cut = scratch.join("cut");
    std::fs::create_dir(&cut).unwrap();
    std::fs::copy(golden("hf-gpt2").join("config.json"), cut.join("config.json")).unwrap();
    let whole = std::fs::read(golden("hf-gpt2").join("model.safetensors")).unwrap();
    for length in [0, 4, 100, whole.len() / 2, whole.len() - 1] {
        std::fs::write(cut.join("model.safetensors"), &whole[..length]).unwrap();
        let error = import(&cut, &scratch.join("none"), &Solo::new()).unwrap_err().to_string();
        assert!(error.contains("model.safetensors") && error.contains("hint: "), "{error}");
    }
    for left in ["out", "out.tmp", "none", "none.tmp"] {
        assert!(!scratch.join(left).exists(), "{left}");
    }
}
