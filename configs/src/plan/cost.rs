//! Seconds of what a rank does: products by the matrix rate, everything else by the bytes that it moves
//! through memory, collectives by links. Knows no order; that is `timeline`'s.

use super::machine::Cluster;
use super::measured::{Computing, Rates};
use crate::memory::block_activations;
use crate::{Call, ModelConfig, SegmentSpec, Setup, Work, logits_at_once, segments};

/// Bytes moved for each logit: written by the product, then five passes of the loss read and write it as
/// fp32 (`ops`' loss), the last one into the precision of two more products.
pub const LOGIT_BYTES: f64 = 44.0;

/// Bytes moved for each element of an update: fp32 gradient, master and two moments in; master and moments out.
pub const UPDATE_BYTES: f64 = 16.0 + 12.0;

/// Bytes around it: the gradient is read for its norm, and set to zero.
const GRADIENT_BYTES: f64 = 4.0 + 4.0;

/// What things cost on ranks of a cluster.
#[derive(Debug, Clone)]
pub struct Costs<'a> {
    cluster: &'a Cluster,
    model: &'a ModelConfig,
    setup: &'a Setup,
    segments: Vec<SegmentSpec>,
    /// Seconds of each block's forward pass.
    forward: Vec<f64>,
}

/// Seconds of a collective, by what takes them; a pipeline, of which the slower part counts.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct CallSeconds {
    /// Within nodes.
    pub within: f64,
    /// Between nodes.
    pub between: f64,
    /// Messages.
    pub latency: f64,
    /// The part of all that takes the time of the cores that compute.
    pub cores: f64,
}

impl CallSeconds {
    /// All of it.
    pub fn total(&self) -> f64 {
        self.within.max(self.between) + self.latency
    }
}

impl<'a> Costs<'a> {
    /// Those of a model's step on `cluster`.
    pub fn new(cluster: &'a Cluster, model: &'a ModelConfig, setup: &'a Setup) -> Costs<'a> {
        let mut costs = Costs { cluster, model, setup, segments: segments(model), forward: Vec::new() };
        costs.forward = (0..model.n_layer).map(|layer| costs.block(layer)).collect();
        costs
    }

    /// Seconds of a piece of computation.
    pub fn work(&self, work: Work) -> f64 {
        let (tokens, c) = (self.tokens(), self.model.n_embd as f64);
        let width = self.setup.width() as f64;
        match work {
            // Two rows are read for each token, and their sum written.
            Work::Embed => self.moving(3.0 * width * c * tokens),
            Work::Forward(layer) | Work::Recompute(layer) => self.forward[layer],
            Work::Backward(layer) => 2.0 * self.forward[layer] + self.accumulating(2 + layer, width),
            Work::Head => self.head(),
            Work::EmbedBackward => self.moving(2.0 * 8.0 * c * tokens),
            Work::Update => {
                let held: u64 = self.segments.iter().map(|segment| self.held(segment)).sum();
                // In bf16 the masters are read once more, and the weights written.
                let around = GRADIENT_BYTES + if self.setup.bf16 { 4.0 + width } else { 0.0 };
                let update = UPDATE_BYTES * held as f64;
                self.rates().map_or_else(|| self.moving(update), |rates| update / rates.update_bytes_per_s)
                    + self.moving(around * held as f64)
            }
        }
    }

    /// Seconds of a collective: of a buffer of n bytes each pass takes (p - 1) / p n over the link of a rank
    /// within a node of p ranks, and (N - 1) / N n over the link of a node of N. Rings pass on N - 1
    /// times; the sum for all goes up and down a tree.
    pub fn call(&self, call: &Call) -> CallSeconds {
        let ranks = self.setup.world_size;
        if ranks < 2 {
            return CallSeconds::default();
        }
        let (machine, bytes) = (&self.cluster.machine, (call.passes() * call.bytes()) as f64);
        let share = |parts: usize| (parts as f64 - 1.0) / parts as f64;
        let (here, nodes) = (ranks.min(self.cluster.per_node), self.cluster.nodes(ranks));
        if let Some(measured) = machine.measured.as_ref().filter(|m| m.nodes == nodes && m.ranks > 1) {
            // The same bytes on other numbers of ranks: by the share that travels.
            let scale = share(ranks) / share(measured.ranks);
            if let Some(seconds) = measured.seconds(call.collective, call.width, call.bytes() as f64) {
                let seconds = seconds * scale;
                let (within, between) = if nodes == 1 { (seconds, 0.0) } else { (0.0, seconds) };
                let cores = within + measured.cores_share * between;
                return CallSeconds { within, between, latency: 0.0, cores };
            }
        }
        let hops = |parts: usize| match call.passes() {
            1 => parts as f64 - 1.0,
            _ => 2.0 * (parts as f64).log2().ceil(),
        };
        let within = bytes * share(here) / (machine.within.bytes_per_s * machine.reached);
        CallSeconds {
            within,
            cores: if machine.cpu { within } else { 0.0 },
            between: bytes * share(nodes) / (self.cluster.between.bytes_per_s * machine.reached),
            latency: hops(here) * machine.within.latency_s + hops(nodes) * self.cluster.between.latency_s,
        }
    }

    /// Seconds until all ranks agree on a few numbers.
    pub fn agree(&self) -> f64 {
        let up_and_down = |parts: usize| 2.0 * (parts as f64).log2().ceil();
        let ranks = self.setup.world_size;
        up_and_down(ranks.min(self.cluster.per_node)) * self.cluster.machine.within.latency_s
            + up_and_down(self.cluster.nodes(ranks)) * self.cluster.between.latency_s
    }

    /// A block's forward pass: its products, and what it keeps written once and read once.
    fn block(&self, layer: usize) -> f64 {
        let (tokens, c, t) = (self.tokens(), self.model.n_embd as f64, self.model.seq_len as f64);
        // Queries, keys and values; attention's output; into the MLP, and out of it.
        let shapes = [[c, 3.0 * c], [c, c], [c, 4.0 * c], [4.0 * c, c]];
        let products: f64 = shapes.iter().map(|&[from, to]| self.multiplying([tokens, from, to])).sum();
        let pairs =
            self.setup.micro_batch as f64 * self.model.pattern(layer).pairs(self.model.seq_len) as f64;
        let attention = 4.0 * c * pairs;
        let kept = self.setup.width() as f64 * block_activations(self.model) as f64 * tokens;
        let (attention, passes) = match self.computing() {
            Some(computing) => {
                (attention / computing.attending(t), 2.0 * kept / computing.passing(tokens * c))
            }
            None => (attention / self.products_per_s(), self.moving(2.0 * kept)),
        };
        products + attention + passes
    }

    /// The head with its loss, a chunk of rows at a time: three products, what each logit moves, and the weight's
    /// gradient, which each chunk adds to that of all: read and written, in bf16 from a product of its own.
    fn head(&self) -> f64 {
        let (tokens, vocab_size) = (self.tokens(), self.model.vocab_size as f64);
        let chunk = logits_at_once(!self.cluster.machine.cpu, self.setup.bf16) as f64 / vocab_size;
        let rows = chunk.floor().clamp(1.0, tokens);
        let chunks = (tokens / rows).ceil();
        let product = self.multiplying([rows, self.model.n_embd as f64, vocab_size]);
        let logits = LOGIT_BYTES * tokens * vocab_size;
        let passes = self.computing().map(|computing| logits / computing.loss_bytes_per_s);
        let apart = if self.setup.bf16 { 2.0 * self.setup.width() as f64 } else { 0.0 };
        let sums = (chunks * (8.0 + apart) + self.tree_bytes()) * self.segments[0].numel as f64;
        3.0 * tokens / rows * product + passes.unwrap_or_else(|| self.moving(logits)) + self.moving(sums)
    }

    /// A segment's gradient is added to its fp32 sum: autograd's `width` bytes written and read, the sum read
    /// and written; in a tree, a level's read and the next one's written.
    fn accumulating(&self, segment: usize, width: f64) -> f64 {
        self.moving((2.0 * width + 8.0 + self.tree_bytes()) * self.segments[segment].numel as f64)
    }

    /// Bytes that the tree moves for each element of a gradient.
    fn tree_bytes(&self) -> f64 {
        if self.setup.reproducible { 12.0 } else { 0.0 }
    }

    /// Elements of a segment whose master a rank holds.
    fn held(&self, segment: &SegmentSpec) -> u64 {
        let whole = self.setup.shard == crate::Shard::None;
        if whole { segment.numel as u64 } else { self.setup.owned(segment) }
    }

    fn tokens(&self) -> f64 {
        (self.setup.micro_batch * self.model.seq_len) as f64
    }

    /// Seconds of a product of `[rows, inner]` and `[inner, columns]`.
    fn multiplying(&self, shape: [f64; 3]) -> f64 {
        let flops = 2.0 * shape.iter().product::<f64>();
        flops / self.computing().map_or_else(|| self.products_per_s(), |computing| computing.product(shape))
    }

    fn products_per_s(&self) -> f64 {
        self.cluster.machine.peak(self.setup.bf16) * self.cluster.machine.reached
    }

    fn rates(&self) -> Option<&Rates> {
        self.cluster.machine.rates.as_ref()
    }

    /// What was measured of the precision that computes.
    fn computing(&self) -> Option<&Computing> {
        let rates = self.rates()?;
        Some(if self.setup.bf16 { rates.bf16.as_ref().unwrap_or(&rates.fp32) } else { &rates.fp32 })
    }

    fn moving(&self, bytes: f64) -> f64 {
        bytes / (self.cluster.machine.memory_bytes_per_s * self.cluster.machine.reached)
    }
}
