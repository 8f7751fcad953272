//! Which tensor of a format is which of ours: names, transposition, and the scale of queries. One table for both
//! directions; knows no files.

use super::{Format, bert};
use configs::{ModelConfig, Norm};
use std::ops::Range;
use tch::{Kind, Tensor};

/// A tensor of the format, and where its values are in ours.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Entry {
    /// In the format.
    pub(super) name: String,
    /// Our tensor; none is zeros, which the format wants and the model does not have.
    pub(super) ours: Option<String>,
    /// The rows of ours that it is.
    pub(super) rows: Range<i64>,
    /// Elements of such a row; none where the rows are numbers.
    pub(super) columns: Option<i64>,
    /// The format has `[in, out]`, as transformers' Conv1D does.
    pub(super) transposed: bool,
    /// Their values are ours times this.
    pub(super) scale: f64,
}

impl Entry {
    /// The shape in the format.
    pub(super) fn shape(&self) -> Vec<i64> {
        let rows = self.rows.end - self.rows.start;
        match (self.columns, self.transposed) {
            (None, _) => vec![rows],
            (Some(columns), false) => vec![rows, columns],
            (Some(columns), true) => vec![columns, rows],
        }
    }

    /// The format's values, given our whole tensor.
    pub(super) fn theirs(&self, ours: Option<&Tensor>) -> Tensor {
        let Some(ours) = ours else { return Tensor::zeros(self.shape(), (Kind::Float, tch::Device::Cpu)) };
        let rows = ours.narrow(0, self.rows.start, self.rows.end - self.rows.start);
        let rows = if self.transposed { rows.transpose(0, 1) } else { rows };
        (rows.to_kind(Kind::Double) * self.scale).to_kind(Kind::Float).contiguous()
    }

    /// Puts the format's values into our whole tensor.
    pub(super) fn put(&self, theirs: &Tensor, ours: &Tensor) {
        let rows = ours.narrow(0, self.rows.start, self.rows.end - self.rows.start);
        let values = (theirs.to_kind(Kind::Double) / self.scale).to_kind(Kind::Float);
        rows.shallow_clone().copy_(&if self.transposed { values.transpose(0, 1) } else { values });
    }
}

/// The tensors of a format for this model, in the order of the forward pass. The vocabulary's padding is cut.
pub(super) fn entries(model: &ModelConfig, format: Format) -> Vec<Entry> {
    if format == Format::HfBert {
        return bert::entries(model);
    }
    let family = Family { model, format };
    let (wte, wpe) = match format {
        Format::OpenaiGpt => ("tokens_embed.weight", "positions_embed.weight"),
        _ => ("wte.weight", "wpe.weight"),
    };
    let c = model.n_embd as i64;
    let mut all = vec![
        family.plain(wte, "wte.weight", model.vocab_size as i64, Some(c)),
        family.plain(wpe, "wpe.weight", model.seq_len as i64, Some(c)),
    ];
    // What follows is refused in all other formats.
    if model.token_types > 0 {
        all.push(family.plain("wpe.type.weight", "wpe.type.weight", model.token_types as i64, Some(c)));
    }
    if model.embedding_norm {
        all.extend(["wpe.ln_0.weight", "wpe.ln_0.bias"].map(|name| family.plain(name, name, c, None)));
    }
    (0..model.n_layer).for_each(|layer| family.block(layer, &mut all));
    if model.is_masked() {
        all.push(family.plain("mlm.dense.weight", "mlm.dense.weight", c, Some(c)));
        let vectors =
            [("dense.bias", c), ("ln_f.weight", c), ("ln_f.bias", c), ("head.bias", model.vocab_size as i64)];
        all.extend(vectors.map(|(name, rows)| {
            let name = format!("mlm.{name}");
            family.plain(&name, &name, rows, None)
        }));
    }
    if model.norm == Norm::Pre {
        all.extend(["ln_f.weight", "ln_f.bias"].map(|name| family.plain(name, name, c, None)));
    }
    all
}

struct Family<'a> {
    model: &'a ModelConfig,
    format: Format,
}

impl Family<'_> {
    fn plain(&self, name: &str, ours: &str, rows: i64, columns: Option<i64>) -> Entry {
        let prefix = match self.format {
            Format::LlmC | Format::Safetensors => "",
            _ => "transformer.",
        };
        let (name, ours) = (format!("{prefix}{name}"), Some(ours.to_string()));
        Entry { name, ours, rows: 0..rows, columns, transposed: false, scale: 1.0 }
    }

    fn block(&self, layer: usize, all: &mut Vec<Entry>) {
        let c = self.model.n_embd as i64;
        let neo = self.format == Format::HfGptNeo;
        let conv1d = matches!(self.format, Format::HfGpt2 | Format::OpenaiGpt);
        let of = |name: &str| format!("h.{layer}.{name}");
        let vector = |name: &str, rows| self.plain(&of(name), &of(name), rows, None);
        let matrix = |theirs: &str, ours: &str, rows, columns| Entry {
            transposed: conv1d,
            ..self.plain(&of(theirs), &of(ours), rows, Some(columns))
        };
        all.extend([vector("ln_1.weight", c), vector("ln_1.bias", c)]);
        if neo {
            // GPT-Neo does not divide scores by the root of a head's width: that is in its queries.
            let scale = 1.0 / (self.model.head_dim() as f64).sqrt();
            for (part, name, scale) in [(0, "q", scale), (1, "k", 1.0), (2, "v", 1.0)] {
                let name = format!("attn.attention.{name}_proj.weight");
                let entry = matrix(&name, "attn.c_attn.weight", c, c);
                all.push(Entry { rows: part * c..(part + 1) * c, scale, ..entry });
            }
            all.push(matrix("attn.attention.out_proj.weight", "attn.c_proj.weight", c, c));
            let bias = self.plain(&of("attn.attention.out_proj.bias"), &of("attn.c_proj.bias"), c, None);
            all.push(bias);
        } else {
            all.push(matrix("attn.c_attn.weight", "attn.c_attn.weight", 3 * c, c));
            let bias = vector("attn.c_attn.bias", 3 * c);
            match self.format {
                _ if self.model.qkv_bias => all.push(bias),
                Format::Safetensors => {}
                _ => all.push(Entry { ours: None, ..bias }),
            }
            all.push(matrix("attn.c_proj.weight", "attn.c_proj.weight", c, c));
            all.push(vector("attn.c_proj.bias", c));
        }
        all.extend([vector("ln_2.weight", c), vector("ln_2.bias", c)]);
        all.push(matrix("mlp.c_fc.weight", "mlp.c_fc.weight", 4 * c, c));
        all.push(vector("mlp.c_fc.bias", 4 * c));
        all.push(matrix("mlp.c_proj.weight", "mlp.c_proj.weight", c, 4 * c));
        all.push(vector("mlp.c_proj.bias", c));
    }
}
