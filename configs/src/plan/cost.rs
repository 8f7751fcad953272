//! Seconds of what a rank does: products by the matrix rate, everything else by the bytes that it moves
//! through memory, collectives by links. Knows no order; that is `timeline`'s.

use super::machine::Cluster;
use super::measured::{Computing, Rates};
use crate::memory::block_activations;
use crate::{Call, Cargo, ModelConfig, SegmentSpec, Setup, Shard, Work, logits_at_once, segments};

/// Bytes moved for each logit: written by the product, then five passes of the loss read and write it as
/// fp32 (`ops`' loss), the last one into the precision of two more products.
pub const LOGIT_BYTES: f64 = 44.0;

/// Bytes moved for each element of an update: fp32 gradient, master and two moments in; master and moments out.
pub const UPDATE_BYTES: f64 = 16.0 + 12.0;

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
    /// Making its buffer, and writing into it what the rank has.
    pub before: f64,
    /// The part of all that takes the time of the cores that compute.
    pub cores: f64,
}

impl CallSeconds {
    /// All of it.
    pub fn total(&self) -> f64 {
        self.before + self.within.max(self.between) + self.latency
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
            Work::Backward(layer) => 2.0 * self.forward[layer] + self.accumulating(2 + layer),
            Work::Head => self.head(),
            Work::EmbedBackward => self.moving(2.0 * 8.0 * c * tokens),
            Work::Update(segment) => self.update(&self.segments[segment]),
        }
    }

    /// The update of what the rank holds of a segment, and what is around it: its gradients are read for their norm
    /// and, but in the tree, those that it sums set to zero; in bf16 the weights are written beside the masters.
    fn update(&self, segment: &SegmentSpec) -> f64 {
        let (whole, owned) = (segment.numel as f64, self.setup.owned(segment) as f64);
        let held = if self.setup.shard == Shard::None { whole } else { owned };
        let zeroed = match self.setup.shard.leaves_at_once() {
            _ if self.setup.reproducible => 0.0,
            true => owned,
            false => whole,
        };
        let rounded = match self.setup.shard {
            Shard::Parameters => 0.0, // as they are gathered
            _ if self.setup.bf16 => self.setup.width() as f64 * held,
            _ => 0.0,
        };
        let update = UPDATE_BYTES * held;
        self.rates().map_or_else(|| self.moving(update), |rates| update / rates.update_bytes_per_s)
            + self.moving(4.0 * owned + 4.0 * zeroed + rounded)
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
            if let Some(seconds) = measured.seconds(call) {
                let seconds = seconds * scale;
                let (within, between) = if nodes == 1 { (seconds, 0.0) } else { (0.0, seconds) };
                let before = self.gathers(call);
                let cores = before + within + measured.cores_share * between;
                return CallSeconds { before, within, between, latency: 0.0, cores };
            }
        }
        let hops = |parts: usize| match call.passes() {
            1 => parts as f64 - 1.0,
            _ => 2.0 * (parts as f64).log2().ceil(),
        };
        let within = bytes * share(here) / (machine.within.bytes_per_s * machine.reached);
        let before = self.gathers(call);
        CallSeconds {
            before,
            within,
            cores: if machine.cpu { before + within } else { before },
            between: bytes * share(nodes) / (self.cluster.between.bytes_per_s * machine.reached),
            latency: hops(here) * machine.within.latency_s + hops(nodes) * self.cluster.between.latency_s,
        }
    }

    /// Weights that are gathered for a moment have a buffer made for them, into which the rank rounds its slice.
    fn gathers(&self, call: &Call) -> f64 {
        if !call.passing || call.cargo != Cargo::Weights {
            return 0.0;
        }
        let owned = self.setup.owned(&self.segments[call.segment]) as f64;
        self.mapping(call.bytes() as f64) + self.moving((4 + call.width) as f64 * owned)
    }

    /// Seconds until all ranks agree on a few numbers.
    pub fn agree(&self) -> f64 {
        let up_and_down = |parts: usize| 2.0 * (parts as f64).log2().ceil();
        let ranks = self.setup.world_size;
        up_and_down(ranks.min(self.cluster.per_node)) * self.cluster.machine.within.latency_s
            + up_and_down(self.cluster.nodes(ranks)) * self.cluster.between.latency_s
    }

    /// A block's forward pass: its products, and what it keeps, with what comes of the GELU, written once and read
    /// once.
    fn block(&self, layer: usize) -> f64 {
        let (tokens, c, t) = (self.tokens(), self.model.n_embd as f64, self.model.seq_len as f64);
        // Queries, keys and values; attention's output; into the MLP, and out of it.
        let shapes = [[c, 3.0 * c], [c, c], [c, 4.0 * c], [4.0 * c, c]];
        let products: f64 = shapes.iter().map(|&[from, to]| self.multiplying([tokens, from, to])).sum();
        let pairs =
            self.setup.micro_batch as f64 * self.model.pattern(layer).pairs(self.model.seq_len) as f64;
        let attention = 4.0 * c * pairs;
        let numbers = block_activations(self.model) as f64 + 4.0 * c;
        let kept = self.setup.width() as f64 * numbers * tokens;
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
        let by_matrix_unit = self.setup.bf16 && self.cluster.machine.matrix_unit;
        let chunk = logits_at_once(!self.cluster.machine.cpu, by_matrix_unit) as f64 / vocab_size;
        let rows = chunk.floor().clamp(1.0, tokens);
        let chunks = (tokens / rows).ceil();
        let product = self.multiplying([rows, self.model.n_embd as f64, vocab_size]);
        let logits = LOGIT_BYTES * tokens * vocab_size;
        let passes = self.computing().map(|computing| logits / computing.loss_bytes_per_s);
        let apart = if self.setup.bf16 { 2.0 * self.setup.width() as f64 } else { 0.0 };
        let adding = if self.adds_within() { 0.0 } else { chunks * (8.0 + apart) };
        let sums = self.moving(adding * self.segments[0].numel as f64) + self.summing(0);
        3.0 * tokens / rows * product + passes.unwrap_or_else(|| self.moving(logits)) + sums
    }

    /// A segment's gradient is added to its fp32 sum: autograd's number written and read, the sum read and
    /// written, unless that is in the product's rate.
    fn accumulating(&self, segment: usize) -> f64 {
        let adding = if self.adds_within() { 0.0 } else { 2.0 * self.setup.width() as f64 + 8.0 };
        self.moving(adding * self.segments[segment].numel as f64) + self.summing(segment)
    }

    /// What a micro-batch's gradient of a segment costs beside: its buffer begins at zero in the tree, or comes
    /// from the system where it leaves at once; then what stays of it is added to what the rank has of others.
    /// In the tree, of n of them n - 1 are put aside, read and written, and n - 1 times one that waits is added.
    fn summing(&self, segment: usize) -> f64 {
        let segment = &self.segments[segment];
        let (leaves, tree) = (self.setup.shard.leaves_at_once(), self.setup.reproducible);
        let others = 1.0 - 1.0 / self.setup.micro_steps as f64;
        let stays = if leaves { self.setup.owned(segment) } else { segment.numel as u64 } as f64;
        let begins = 4.0 * segment.numel as f64;
        let added = match (tree, leaves) {
            (true, true) => (8.0 + 12.0) * others + 8.0 * (1.0 - others), // and the last is copied to the sum
            (true, false) => (8.0 + 12.0) * others,
            (false, true) => 12.0,
            (false, false) => 0.0, // backward adds to the sum itself
        };
        self.moving(added * stays)
            + match (leaves, tree) {
                (true, _) => self.mapping(begins),
                (false, true) => self.moving(begins),
                (false, false) => 0.0,
            }
    }

    /// Whether the rate of a product has in it that gradients are added to their fp32 sums: a measured one's.
    fn adds_within(&self) -> bool {
        self.rates().is_some()
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

    /// Seconds until the system has given so many bytes, cleared.
    fn mapping(&self, bytes: f64) -> f64 {
        self.rates().map_or_else(|| self.moving(bytes), |rates| bytes / rates.mapping_bytes_per_s)
    }

    fn moving(&self, bytes: f64) -> f64 {
        bytes / (self.cluster.machine.memory_bytes_per_s * self.cluster.machine.reached)
    }
}
