//! The GPT-2/3 decoder on flat segments: what each segment computes, and nothing of how a step runs it.
//!
//! Radford et al. 2019 and Brown et al. 2020: learned positions, pre-LN blocks, tanh-GELU, tied head.
//! Shapes: B sequences, T positions, C = n_embd, H heads of D = C / H, V tokens.

use configs::{ModelConfig, segments};
use ops::{FlatSegment, Head, OpsError};
use tch::{Device, Kind, Tensor};

const LAYER_NORM_EPS: f64 = 1e-5;

/// A decoder: its shape and its segments, in the order of the forward pass.
#[derive(Debug)]
pub struct Gpt {
    config: ModelConfig,
    segments: Vec<FlatSegment>,
}

impl Gpt {
    /// A decoder of zeros; [`Gpt::init`] or a checkpoint fills it.
    ///
    /// # Errors
    /// What libtorch says, such as out of memory.
    pub fn zeros(config: &ModelConfig, device: Device) -> Result<Gpt, OpsError> {
        let segments = segments(config).into_iter().map(|spec| FlatSegment::zeros(spec, device));
        Ok(Gpt { config: config.clone(), segments: segments.collect::<Result<_, _>>()? })
    }

    /// Sets the initial weights, a pure function of the seed.
    pub fn init(&mut self, seed: u64) {
        self.segments.iter_mut().for_each(|segment| segment.init(seed));
    }

    /// The shape.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// All segments: `wte`, `wpe`, `h.0` ..., `ln_f`.
    pub fn segments(&self) -> &[FlatSegment] {
        &self.segments
    }

    /// All segments, to be filled.
    pub fn segments_mut(&mut self) -> &mut [FlatSegment] {
        &mut self.segments
    }

    /// Where the parameters live.
    pub fn device(&self) -> Device {
        self.segments[0].param().device()
    }

    /// BLAKE3 of all parameters as little-endian fp32, segment by segment, in hexadecimal: what ranks
    /// and runs are compared by.
    pub fn digest(&self) -> String {
        let mut hash = blake3::Hasher::new();
        for segment in &self.segments {
            let mut values = vec![0f32; segment.param().numel()];
            segment.param().copy_data(&mut values, segment.param().numel());
            for values in values.chunks(1 << 16) {
                let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
                hash.update(&bytes);
            }
        }
        hash.finalize().to_hex().to_string()
    }

    /// The segment of a block.
    pub fn block_segment(&self, layer: usize) -> usize {
        2 + layer
    }

    /// The segment of the final norm.
    pub fn norm_segment(&self) -> usize {
        self.segments.len() - 1
    }

    /// Tokens `[B, T]` i64 to the residual stream `[B, T, C]`: token plus position.
    pub fn embed(&self, tokens: &Tensor) -> Tensor {
        let t = tokens.size()[1];
        let (wte, wpe) = (self.segments[0].tensor(0), self.segments[1].tensor(0));
        Tensor::embedding(wte, tokens, -1, false, false) + wpe.narrow(0, 0, t)
    }

    /// Adds the embedding's gradients, given that of its output `[B, T, C]`: rows of the tokens that
    /// occur, and sums over the batch for the positions.
    pub fn embed_backward(&self, tokens: &Tensor, grad: &Tensor) {
        let size = grad.size();
        let rows = grad.reshape([-1, size[2]]);
        let _ = self.segments[0].tensor_grad(0).shallow_clone().index_add_(0, &tokens.reshape([-1]), &rows);
        let positions = grad.sum_dim_intlist([0i64].as_slice(), false, Kind::Float);
        let _ = self.segments[1].tensor_grad(0).narrow(0, 0, size[1]).g_add_(&positions);
    }

    /// One block: `[B, T, C]` to `[B, T, C]`.
    pub fn block(&self, layer: usize, x: &Tensor) -> Tensor {
        let p = Block { segment: &self.segments[self.block_segment(layer)] };
        let x = x + self.attention(layer, &p, &p.layer_norm("ln_1", x));
        let hidden = p.linear("mlp.c_fc", &p.layer_norm("ln_2", &x)).gelu("tanh");
        x + p.linear("mlp.c_proj", &hidden)
    }

    fn attention(&self, layer: usize, p: &Block<'_>, x: &Tensor) -> Tensor {
        let [b, t, c] = x.size()[..] else { panic!("a residual stream is [B, T, C]") };
        let heads = [b, t, self.config.n_head as i64, self.config.head_dim() as i64];
        let qkv = p.linear("attn.c_attn", x).split(c, 2); // three of [B, T, C]
        let [q, k, v] = [0, 1, 2].map(|i: usize| qkv[i].view(heads).transpose(1, 2)); // [B, H, T, D]
        let y = ops::attention(&q, &k, &v, self.config.pattern(layer));
        p.linear("attn.c_proj", &y.transpose(1, 2).reshape([b, t, c]))
    }

    /// The norm before the head: `[B, T, C]` to `[B, T, C]`.
    pub fn final_norm(&self, x: &Tensor) -> Tensor {
        let p = Block { segment: &self.segments[self.norm_segment()] };
        p.layer_norm("ln_f", x)
    }

    /// The head, tied to the token embedding.
    pub fn head(&self) -> Head<'_> {
        Head { weight: self.segments[0].tensor(0), vocab_size: self.config.vocab_size as i64 }
    }

    /// The token embedding's gradient, `[V padded, C]`, where the head's part is added too.
    pub fn head_grad(&self) -> &Tensor {
        self.segments[0].tensor_grad(0)
    }

    /// Hidden states before the head, `[B, T, C]`, without a graph: for evaluation and generation.
    pub fn hidden(&self, tokens: &Tensor) -> Tensor {
        tch::no_grad(|| {
            let blocks = 0..self.config.n_layer;
            let x = blocks.fold(self.embed(tokens), |x, layer| self.block(layer, &x));
            self.final_norm(&x)
        })
    }
}

/// A segment's tensors by their names within it.
struct Block<'a> {
    segment: &'a FlatSegment,
}

impl Block<'_> {
    fn tensor(&self, name: &str, part: &str) -> &Tensor {
        let is = |full: &str| {
            full.strip_suffix(part)
                .is_some_and(|rest| rest.strip_suffix('.').is_some_and(|rest| rest.ends_with(name)))
        };
        let i = self.segment.spec().tensors.iter().position(|tensor| is(&tensor.name));
        self.segment.tensor(i.expect("the layout in configs has every tensor of a block"))
    }

    fn linear(&self, name: &str, x: &Tensor) -> Tensor {
        x.linear(self.tensor(name, "weight"), Some(self.tensor(name, "bias")))
    }

    fn layer_norm(&self, name: &str, x: &Tensor) -> Tensor {
        let (weight, bias) = (self.tensor(name, "weight"), self.tensor(name, "bias"));
        x.layer_norm(weight.size(), Some(weight), Some(bias), LAYER_NORM_EPS, false)
    }
}
