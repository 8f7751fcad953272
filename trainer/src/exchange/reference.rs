//! The model that stands in exported files, computed by a way of its own: its own reading of the files, float64,
//! masks written out, and each format's arithmetic as that format has it. What it shares with the rest of
//! Phalanx is tch's elementary operations.

use super::{ExchangeError, Format, llmc, reference_bert};
use crate::run_folder::FileError;
use configs::Pattern;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use std::collections::VecDeque;
use std::path::Path;
use tch::{Device, Kind, Tensor};

/// A product with a matrix `[in, out]`, and a sum.
struct Linear {
    weight: Tensor,
    bias: Option<Tensor>,
}

struct Layer {
    norms: [(Tensor, Tensor); 2],
    /// Queries, keys, values.
    qkv: [Linear; 3],
    out: Linear,
    up: Linear,
    down: Linear,
    /// Keys that a query sees, `[T, T]`.
    mask: Tensor,
}

struct Decoder {
    tokens: Tensor,
    positions: Tensor,
    layers: Vec<Layer>,
    last_norm: Option<(Tensor, Tensor)>,
    heads: i64,
    scale: f64,
    post: bool,
}

/// Logits of tokens `[B, T]` by what is in the folder: `[B, T, V]` float64.
///
/// # Errors
/// Files that cannot be read, or have not what the format asks for.
pub(super) fn logits(folder: &Path, format: Format, tokens: &Tensor) -> Result<Tensor, ExchangeError> {
    let t = tokens.size()[1];
    if let Some(encoder) = reference_bert::Encoder::open(folder, format)? {
        return Ok(encoder.logits(tokens));
    }
    let decoder = match format {
        Format::LlmC => of_llmc(&folder.join(llmc::MODEL), t)?,
        _ => of_safetensors(folder, format, t)?,
    };
    Ok(decoder.logits(tokens))
}

impl Decoder {
    fn logits(&self, tokens: &Tensor) -> Tensor {
        let (b, t) = (tokens.size()[0], tokens.size()[1]);
        let rows = self.tokens.index_select(0, &tokens.view([-1])).view([b, t, -1]);
        let mut x = rows + self.positions.narrow(0, 0, t);
        for layer in &self.layers {
            let [first, second] = &layer.norms;
            if self.post {
                x = norm(first, &(&x + self.attention(layer, &x)));
                x = norm(second, &(&x + mlp(layer, &x)));
            } else {
                x = &x + self.attention(layer, &norm(first, &x));
                x = &x + mlp(layer, &norm(second, &x));
            }
        }
        if let Some(last) = &self.last_norm {
            x = norm(last, &x);
        }
        x.matmul(&self.tokens.transpose(0, 1))
    }

    fn attention(&self, layer: &Layer, x: &Tensor) -> Tensor {
        let (b, t, c) = (x.size()[0], x.size()[1], x.size()[2]);
        let split = |y: Tensor| y.view([b, t, self.heads, c / self.heads]).transpose(1, 2);
        let [q, k, v] = [0, 1, 2].map(|i: usize| split(linear(&layer.qkv[i], x)));
        let scores = q.matmul(&k.transpose(2, 3)) * self.scale;
        let unseen = layer.mask.logical_not();
        let weights = scores.masked_fill(&unseen, f64::NEG_INFINITY).softmax(-1, Kind::Double);
        linear(&layer.out, &weights.matmul(&v).transpose(1, 2).reshape([b, t, c]))
    }
}

fn mlp(layer: &Layer, x: &Tensor) -> Tensor {
    let x = linear(&layer.up, x);
    let inner = (&x + x.pow_tensor_scalar(3) * 0.044715) * (2.0 / std::f64::consts::PI).sqrt();
    linear(&layer.down, &(&x * 0.5 * (inner.tanh() + 1.0)))
}

fn linear(by: &Linear, x: &Tensor) -> Tensor {
    let y = x.matmul(&by.weight);
    by.bias.as_ref().map_or(y.shallow_clone(), |bias| &y + bias)
}

fn norm((weight, bias): &(Tensor, Tensor), x: &Tensor) -> Tensor {
    let mean = x.mean_dim([-1i64].as_slice(), true, Kind::Double);
    let off = x - mean;
    let variance = (&off * &off).mean_dim([-1i64].as_slice(), true, Kind::Double);
    off / (variance + 1e-5).sqrt() * weight + bias
}

fn mask(t: i64, sees: impl Fn(i64, i64) -> bool) -> Tensor {
    let pairs: Vec<bool> =
        (0..t).flat_map(|q| (0..t).map(move |k| (q, k))).map(|(q, k)| sees(q, k)).collect();
    Tensor::from_slice(&pairs).view([t, t])
}

/// Values as they lie in a file, little-endian fp32 or bf16, as float64.
pub(super) fn values(bytes: &[u8], bf16: bool) -> Tensor {
    let values: Vec<f32> = if bf16 {
        // The upper half of an fp32.
        bytes
            .as_chunks()
            .0
            .iter()
            .map(|two| f32::from_bits(u32::from(u16::from_le_bytes(*two)) << 16))
            .collect()
    } else {
        bytes.as_chunks().0.iter().map(|four| f32::from_le_bytes(*four)).collect()
    };
    Tensor::from_slice(&values).to_kind(Kind::Double)
}

fn of_safetensors(folder: &Path, format: Format, t: i64) -> Result<Decoder, ExchangeError> {
    let path = folder.join("model.safetensors");
    let bytes = std::fs::read(&path).map_err(FileError::of("read", &path))?;
    let malformed = |what: String| ExchangeError::Malformed { path: path.clone(), what };
    let file = SafeTensors::deserialize(&bytes).map_err(|error| malformed(error.to_string()))?;
    let get = |name: &str| {
        let view = file.tensor(name).map_err(|error| malformed(format!("{name}: {error}")))?;
        let shape: Vec<i64> = view.shape().iter().map(|&n| n as i64).collect();
        Ok::<Tensor, ExchangeError>(values(view.data(), view.dtype() == Dtype::BF16).view(&shape[..]))
    };
    let about = std::fs::read(folder.join("config.json")).map_err(FileError::of("read", folder))?;
    let config: Value = serde_json::from_slice(&about).map_err(|error| malformed(error.to_string()))?;
    let number = |names: [&str; 2]| {
        let value = names.iter().find_map(|name| config[*name].as_i64());
        value.ok_or_else(|| malformed(format!("config.json has no {}", names[0])))
    };
    let (layers, heads) = (number(["n_layer", "num_layers"])?, number(["n_head", "num_heads"])?);
    let prefix = if format == Format::Safetensors { "" } else { "transformer." };
    let pair = |name: String| {
        Ok::<_, ExchangeError>((
            get(&format!("{prefix}{name}.weight"))?,
            get(&format!("{prefix}{name}.bias"))?,
        ))
    };
    // transformers' Conv1D has [in, out]; its Linear and all others [out, in].
    let conv1d = matches!(format, Format::HfGpt2 | Format::OpenaiGpt);
    let product = |name: String| {
        let weight = get(&format!("{prefix}{name}.weight"))?;
        let weight = if conv1d { weight } else { weight.transpose(0, 1) };
        let bias = get(&format!("{prefix}{name}.bias")).ok();
        Ok::<_, ExchangeError>(Linear { weight, bias })
    };
    let layer = |i: i64| {
        let h = |name: &str| format!("h.{i}.{name}");
        let (qkv, out) = if format == Format::HfGptNeo {
            let of = |name: &str| product(h(&format!("attn.attention.{name}_proj")));
            ([of("q")?, of("k")?, of("v")?], of("out")?)
        } else {
            (thirds(&product(h("attn.c_attn"))?), product(h("attn.c_proj"))?)
        };
        let norms = [pair(h("ln_1"))?, pair(h("ln_2"))?];
        let (up, down) = (product(h("mlp.c_fc"))?, product(h("mlp.c_proj"))?);
        let mask = layer_mask(&config, format, i as usize, t).map_err(&malformed)?;
        Ok::<_, ExchangeError>(Layer { norms, qkv, out, up, down, mask })
    };
    let layers = (0..layers).map(layer).collect::<Result<Vec<Layer>, ExchangeError>>()?;
    let (tokens, positions) = match format {
        Format::OpenaiGpt => ("tokens_embed", "positions_embed"),
        _ => ("wte", "wpe"),
    };
    let tokens = get(&format!("{prefix}{tokens}.weight"))?;
    let width = tokens.size()[1] as f64;
    let post = format == Format::OpenaiGpt || config["norm"] == "post";
    Ok(Decoder {
        positions: get(&format!("{prefix}{positions}.weight"))?,
        tokens,
        layers,
        last_norm: if post { None } else { Some(pair("ln_f".into())?) },
        heads,
        scale: if format == Format::HfGptNeo { 1.0 } else { (heads as f64 / width).sqrt() },
        post,
    })
}

/// Queries, keys and values out of the one matrix of them.
fn thirds(all: &Linear) -> [Linear; 3] {
    let c = all.weight.size()[1] / 3;
    [0, 1, 2].map(|i| Linear {
        weight: all.weight.narrow(1, i * c, c),
        bias: all.bias.as_ref().map(|bias| bias.narrow(0, i * c, c)),
    })
}

fn layer_mask(config: &Value, format: Format, layer: usize, t: i64) -> Result<Tensor, String> {
    match format {
        Format::HfGptNeo => {
            let window = config["window_size"].as_i64().ok_or("config.json has no window_size")?;
            let local = config["attention_layers"][layer] == "local";
            Ok(mask(t, |q, k| k <= q && (!local || q - k < window)))
        }
        Format::Safetensors => {
            let patterns = config["attention"].as_array().filter(|all| !all.is_empty());
            let patterns = patterns.ok_or("config.json has no attention")?;
            let text = patterns[layer % patterns.len()].as_str().unwrap_or_default();
            let pattern: Pattern = text.parse().map_err(|error: configs::PatternError| error.to_string())?;
            Ok(mask(t, |q, k| pattern.allows(q as usize, k as usize)))
        }
        _ => Ok(mask(t, |q, k| k <= q)),
    }
}

fn of_llmc(path: &Path, t: i64) -> Result<Decoder, ExchangeError> {
    let bytes = std::fs::read(path).map_err(FileError::of("read", path))?;
    let malformed = |what: &str| ExchangeError::Malformed { path: path.into(), what: what.into() };
    let (numbers, rest) = bytes.split_at_checked(1024).ok_or_else(|| malformed("it has no header"))?;
    let numbers: Vec<i64> =
        numbers.as_chunks().0.iter().map(|four| i64::from(i32::from_le_bytes(*four))).collect();
    let [_, version, max_t, v, l, heads, c, padded] = numbers[..8] else {
        return Err(malformed("it has no header"));
    };
    let all = values(rest, version == 5);
    let mut at = 0;
    let mut take = |shape: &[i64]| {
        let n: i64 = shape.iter().product();
        at += n;
        all.narrow(0, at - n, n).view(shape)
    };
    let tokens = take(&[padded, c]).narrow(0, 0, v);
    let positions = take(&[max_t, c]);
    let mut kinds: VecDeque<Tensor> = [
        vec![c],
        vec![c],
        vec![3 * c, c],
        vec![3 * c],
        vec![c, c],
        vec![c],
        vec![c],
        vec![c],
        vec![4 * c, c],
        vec![4 * c],
        vec![c, 4 * c],
        vec![c],
    ]
    .into_iter()
    .map(|shape| take(&[vec![l], shape].concat()))
    .collect();
    let last_norm = Some((take(&[c]), take(&[c])));
    let mut pair = || {
        let (weight, bias) = (kinds.pop_front(), kinds.pop_front());
        (weight.unwrap_or_default(), bias.unwrap_or_default())
    };
    let (first, qkv, out, second, up, down) = (pair(), pair(), pair(), pair(), pair(), pair());
    let layer = |i: i64| {
        let vectors = |(weight, bias): &(Tensor, Tensor)| (weight.get(i), bias.get(i));
        let product = |(weight, bias): &(Tensor, Tensor)| Linear {
            weight: weight.get(i).transpose(0, 1),
            bias: Some(bias.get(i)),
        };
        Layer {
            norms: [vectors(&first), vectors(&second)],
            qkv: thirds(&product(&qkv)),
            out: product(&out),
            up: product(&up),
            down: product(&down),
            mask: mask(t, |q, k| k <= q),
        }
    };
    let layers = (0..l).map(layer).collect();
    let scale = (heads as f64 / c as f64).sqrt();
    Ok(Decoder { tokens, positions, layers, last_norm, heads, scale, post: false })
}

/// Where tokens for a comparison live.
pub(super) fn made_up_tokens(vocab_size: usize, seq_len: usize) -> Tensor {
    let t = seq_len.min(96);
    let random = configs::Philox::new(20_240_620);
    let token = |i: usize| (random.uniform([i as u32, 0, 0, 0]) * vocab_size as f64) as i64;
    let tokens: Vec<i64> = (0..2 * t).map(token).collect();
    Tensor::from_slice(&tokens).view([2, t as i64]).to_device(Device::Cpu)
}
