//! How fast ranks sum, scatter and gather the gradients of GPT-2 124M, against what carries them: on one
//! node copying in memory, between nodes a plain message.
//! Knows the contract of collectives; not how they are done.

use super::{Case, median, slowest};
use crate::error::TrainError;
use ops::collectives::{CommError, Communicator, Operation, Pending, Wire};
use tch::{Device, Kind, Tensor};

/// Elements of the segments of GPT-2 124M in the order in which their gradients leave: final norm,
/// blocks, positions, and the embedding with its vocabulary padded to a multiple of 128. 498 MB in fp32.
const SEGMENTS: [(usize, usize); 4] = [(1, 1536), (12, 7_087_872), (1, 1024 * 768), (1, 50_304 * 768)];

/// Measures on the ranks that are there, in turns, each as long as its slowest rank; `fraction` of each
/// segment. The same on all ranks. Collective.
///
/// # Errors
/// A failed collective.
pub fn collectives(comm: &dyn Communicator, turns: usize, fraction: f64) -> Result<Vec<Case>, TrainError> {
    let bench = Bench::new(comm, fraction)?;
    let mut seconds = vec![Vec::new(); bench.cases().len()];
    let mut reference = Vec::new();
    for turn in 0..=turns {
        let taken = bench.reference()?;
        if turn > 0 {
            reference.push(taken);
        }
        for (case, seconds) in bench.cases().iter().zip(&mut seconds) {
            let taken = slowest(comm, || bench.run(case))?;
            if turn > 0 {
                seconds.push(taken); // the first turn touches memory for the first time
            }
        }
    }
    let rate = |bytes: f64, seconds: Vec<f64>| bytes / median(seconds) / 1e9;
    let carried = rate(bench.bytes(), reference);
    let cases = bench.cases().into_iter().zip(seconds).map(|(case, seconds)| {
        let value = rate(bench.bytes() * bench.counted(&case), seconds);
        Case::more_is_better(case.name, "GB/s", value, carried)
    });
    Ok(cases.collect())
}

struct Measured {
    name: String,
    operation: fn(numel: usize, world_size: usize) -> Operation,
    /// Whether the buffers are those that ranks made together.
    shared: bool,
}

struct Bench<'a> {
    comm: &'a dyn Communicator,
    shared: Vec<Tensor>,
    ordinary: Vec<Tensor>,
    /// Memory to copy between, as large as all segments together, on one node.
    copies: std::cell::RefCell<[Vec<f32>; 2]>,
}

impl<'a> Bench<'a> {
    fn new(comm: &'a dyn Communicator, fraction: f64) -> Result<Bench<'a>, TrainError> {
        let sizes = SEGMENTS.iter().flat_map(|&(times, numel)| std::iter::repeat_n(numel, times));
        let sizes: Vec<usize> = sizes.map(|numel| (numel as f64 * fraction).ceil() as usize).collect();
        let mut shared = Vec::new();
        for &numel in &sizes {
            let mut buffer = comm.buffer(numel, Kind::Float)?;
            let _ = buffer.fill_(1.0);
            shared.push(buffer);
        }
        let one_node = comm.place().nodes == 1;
        let ordinary = match one_node {
            true => sizes.iter().map(|&n| Tensor::ones([n as i64], (Kind::Float, Device::Cpu))).collect(),
            false => Vec::new(),
        };
        let total = if one_node { sizes.iter().sum() } else { 0 };
        let copies = std::cell::RefCell::new([vec![1f32; total], vec![2f32; total]]);
        Ok(Bench { comm, shared, ordinary, copies })
    }

    /// Bytes of all segments in fp32.
    fn bytes(&self) -> f64 {
        self.shared.iter().map(Tensor::numel).sum::<usize>() as f64 * 4.0
    }

    fn cases(&self) -> Vec<Measured> {
        let place = self.comm.place();
        let over = match place.nodes {
            1 => format!("{} ranks", place.world_size),
            nodes => format!("{nodes} nodes of {}", place.local_size),
        };
        let case = |what: &str, how: &str, operation, shared| {
            let name = format!("{what} {over} {how}").trim_end().to_owned();
            Measured { name, operation, shared }
        };
        let mut cases = vec![
            case("all_reduce", "fp32", |_, _| Operation::AllReduce { wire: Wire::Fp32 }, true),
            case("all_reduce", "bf16 wire", |_, _| Operation::AllReduce { wire: Wire::Bf16 }, true),
            case(
                "reduce_scatter",
                "fp32",
                |numel, ranks| Operation::ReduceScatter {
                    shard_numel: numel.div_ceil(ranks),
                    wire: Wire::Fp32,
                },
                true,
            ),
            case(
                "all_gather",
                "fp32",
                |numel, ranks| Operation::AllGather { shard_numel: numel.div_ceil(ranks) },
                true,
            ),
        ];
        if !self.ordinary.is_empty() {
            let operation = |_, _| Operation::AllReduce { wire: Wire::Fp32 };
            cases.push(case("all_reduce", "fp32, ordinary tensors", operation, false));
        }
        cases
    }

    /// Bytes that count, as a share of the buffers': on a node the buffers', between nodes what theory has
    /// each node send.
    fn counted(&self, case: &Measured) -> f64 {
        let nodes = self.comm.place().nodes as f64;
        if nodes == 1.0 {
            return 1.0;
        }
        let once = (nodes - 1.0) / nodes;
        match (case.operation)(1, 1) {
            Operation::AllReduce { wire: Wire::Bf16 } => once,
            Operation::AllReduce { .. } => 2.0 * once,
            _ => once,
        }
    }

    fn run(&self, case: &Measured) -> Result<(), CommError> {
        let buffers = if case.shared { &self.shared } else { &self.ordinary };
        let started: Result<Vec<Pending>, CommError> = buffers
            .iter()
            .map(|buffer| self.comm.start((case.operation)(buffer.numel(), self.comm.world_size()), buffer))
            .collect();
        started?.into_iter().try_for_each(Pending::wait)
    }

    /// Seconds of carrying all segments' bytes: from memory to memory by every rank at the same time, or
    /// from one rank to all by plain messages.
    fn reference(&self) -> Result<f64, CommError> {
        if self.comm.place().nodes == 1 {
            return slowest(self.comm, || {
                let [from, to] = &mut *self.copies.borrow_mut();
                to.copy_from_slice(from);
                Ok(())
            });
        }
        slowest(self.comm, || self.shared.iter().try_for_each(|buffer| self.comm.broadcast(buffer, 0)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ops::collectives::Solo;

    #[test]
    fn one_rank_alone_has_every_case() {
        let cases = collectives(&Solo::new(), 1, 1e-4).unwrap();
        assert_eq!(cases[0].case, "all_reduce 1 ranks fp32");
        assert_eq!(cases.len(), 5);
        assert!(cases.iter().all(|case| case.unit == "GB/s" && case.reference > 0.0));
    }
}
