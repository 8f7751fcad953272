//! The behaviour suite: what every backend must do, checked on the ranks that are there.
//!
//! Owns claims and their evidence, not how ranks are started. Tests run it alone and under mpirun.
//! Kept apart from the tests, so that a program can run it on a user's machines.

mod travel;

use super::{CommError, Communicator, Operation, Wire, shard};
use configs::Philox;
use tch::{Kind, Tensor};

/// One claim, and whether it held.
#[derive(Debug, Clone)]
pub struct Check {
    /// The claim, as a sentence.
    pub name: &'static str,
    /// What contradicts it, by the lowest rank that saw it. The same on all ranks.
    pub outcome: Result<(), String>,
}

/// Runs every check. Collective; takes seconds.
pub fn suite(comm: &dyn Communicator) -> Vec<Check> {
    let checks: [(&'static str, Claim); 16] = [
        ("sums of small integers are exact", sums_of_small_integers_are_exact),
        ("sums are taken in the balanced tree over ranks", sums_are_taken_in_the_balanced_tree),
        ("every rank ends with the same bits", every_rank_ends_with_the_same_bits),
        ("operations in flight complete in order", operations_in_flight_complete_in_order),
        ("reduce_scatter and all_gather make an all_reduce", scatter_and_gather_make_an_all_reduce),
        ("a view's neighbours are left alone", neighbours_of_a_view_are_left_alone),
        ("broadcast gives the root's buffer to all", broadcast_gives_the_roots_buffer),
        ("bytes of any length reach all ranks", bytes_of_any_length_reach_all_ranks),
        ("numbers in f64 are summed in the tree", numbers_in_f64_are_summed_in_the_tree),
        ("a bf16 wire rounds every contribution", travel::a_bf16_wire_rounds_every_contribution),
        (
            "a bf16 wire loses no more than its roundings",
            travel::a_bf16_wire_loses_no_more_than_its_roundings,
        ),
        ("bf16 buffers are copied bit by bit", travel::bf16_buffers_are_copied_bit_by_bit),
        ("buffers between ranks work as any other", travel::buffers_between_ranks_work_as_any_other),
        ("bytes sent are those of theory", travel::bytes_sent_are_those_of_theory),
        ("what is no flat buffer is refused before it is sent", what_is_no_flat_buffer_is_refused),
        ("arguments that do not fit are refused before anything is sent", misfits_are_refused),
    ];
    let promised = |check: &(&'static str, Claim)| comm.sums_in_tree() || !IN_TREE.contains(&check.0);
    let run = |(name, check): (&'static str, Claim)| Check { name, outcome: on_all_ranks(comm, check(comm)) };
    checks.into_iter().filter(promised).map(run).collect()
}

/// What a group does not claim whose sums are in an order of their own.
const IN_TREE: [&str; 1] = ["sums are taken in the balanced tree over ranks"];

type Outcome = Result<(), String>;
type Claim = fn(&dyn Communicator) -> Outcome;

/// Sizes with nothing, less than a rank each, an odd few, and many pieces with a ragged end.
const SIZES: [usize; 4] = [0, 1, 7, 1_000_003];
/// The same for checks that go through many cases.
const SMALLER: [usize; 4] = [0, 1, 7, 300_007];

fn sums_of_small_integers_are_exact(comm: &dyn Communicator) -> Outcome {
    for numel in SIZES {
        let buffer = filled(comm, numel, |i| (i % 1000 + comm.rank()) as f32);
        comm.all_reduce(&buffer).map_err(text)?;
        let world_size = comm.world_size();
        let ranks = world_size * (world_size - 1) / 2;
        equal(&buffer, numel, |i| (i % 1000 * world_size + ranks) as f32)?;
    }
    Ok(())
}

fn sums_are_taken_in_the_balanced_tree(comm: &dyn Communicator) -> Outcome {
    for numel in SIZES {
        let buffer = filled(comm, numel, |i| awkward(comm, comm.rank(), i));
        comm.all_reduce(&buffer).map_err(text)?;
        equal(&buffer, numel, |i| tree(0, comm.world_size(), &|rank| awkward(comm, rank, i)))?;
    }
    Ok(())
}

fn every_rank_ends_with_the_same_bits(comm: &dyn Communicator) -> Outcome {
    let buffer = filled(comm, 100_003, |i| awkward(comm, comm.rank(), i) * 1.1);
    comm.all_reduce(&buffer).map_err(text)?;
    let bytes: Vec<u8> = values(&buffer).iter().flat_map(|value| value.to_ne_bytes()).collect();
    let rows = comm.all_gather_bytes(&bytes).map_err(text)?;
    match rows.iter().position(|row| *row != bytes) {
        None => Ok(()),
        Some(rank) => Err(format!("the sum differs from that on rank {rank}")),
    }
}

fn operations_in_flight_complete_in_order(comm: &dyn Communicator) -> Outcome {
    let numel = 70_001;
    let buffers: Vec<Tensor> =
        (0..6).map(|k| filled(comm, numel, |i| awkward(comm, comm.rank(), i + k * numel))).collect();
    let mut pending = Vec::new();
    for buffer in &buffers {
        pending.push(comm.start(Operation::AllReduce { wire: Wire::Fp32 }, buffer).map_err(text)?);
    }
    // With the last one complete, all are.
    let last = pending.pop().map_or(Ok(()), |last| last.wait());
    for (k, buffer) in buffers.iter().enumerate() {
        equal(buffer, numel, |i| tree(0, comm.world_size(), &|rank| awkward(comm, rank, i + k * numel)))?;
    }
    pending.into_iter().map(|pending| pending.wait()).fold(last, Result::and).map_err(text)
}

fn scatter_and_gather_make_an_all_reduce(comm: &dyn Communicator) -> Outcome {
    for numel in SMALLER {
        let even = numel.div_ceil(comm.world_size());
        // Even shards; odd ones, the last short; large ones that leave some ranks none.
        for shard_numel in [even, even + even / 8 + 1, numel + 5] {
            let buffer = filled(comm, numel, |i| awkward(comm, comm.rank(), i));
            comm.reduce_scatter(&buffer, shard_numel).map_err(text)?;
            let mine = shard(numel, shard_numel, comm.rank());
            let sums = values(&buffer);
            let others = filled(comm, numel, |i| if mine.contains(&i) { sums[i] } else { f32::NAN });
            comm.all_gather(&others, shard_numel).map_err(text)?;
            equal(&others, numel, |i| tree(0, comm.world_size(), &|rank| awkward(comm, rank, i)))?;
        }
    }
    Ok(())
}

fn neighbours_of_a_view_are_left_alone(comm: &dyn Communicator) -> Outcome {
    let whole = filled(comm, 1000, |i| i as f32);
    let view = whole.narrow(0, 3, 501);
    comm.all_reduce(&view).map_err(text)?;
    comm.broadcast(&view, 0).map_err(text)?;
    let world_size = comm.world_size();
    equal(&whole, 1000, |i| if (3..504).contains(&i) { (i * world_size) as f32 } else { i as f32 })
}

fn broadcast_gives_the_roots_buffer(comm: &dyn Communicator) -> Outcome {
    for root in 0..comm.world_size() {
        for numel in SMALLER {
            let buffer = filled(comm, numel, |i| awkward(comm, comm.rank(), i));
            comm.broadcast(&buffer, root).map_err(text)?;
            equal(&buffer, numel, |i| awkward(comm, root, i))?;
        }
    }
    Ok(())
}

fn bytes_of_any_length_reach_all_ranks(comm: &dyn Communicator) -> Outcome {
    let of = |rank: usize, unit: usize| vec![rank as u8 + 1; rank * unit];
    for unit in [0, 1, 100_000] {
        let rows = comm.all_gather_bytes(&of(comm.rank(), unit)).map_err(text)?;
        if rows.len() != comm.world_size() || (0..rows.len()).any(|rank| rows[rank] != of(rank, unit)) {
            return Err(format!("bytes arrived changed at {unit} a rank"));
        }
    }
    let root = comm.world_size() - 1;
    let mut bytes = of(comm.rank(), 3);
    comm.broadcast_bytes(&mut bytes, root).map_err(text)?;
    if bytes == of(root, 3) { comm.barrier().map_err(text) } else { Err(format!("{bytes:?} from {root}")) }
}

fn numbers_in_f64_are_summed_in_the_tree(comm: &dyn Communicator) -> Outcome {
    let of = |rank: usize, i: usize| f64::from(awkward(comm, rank, i)) / 3.0;
    let mut sums: Vec<f64> = (0..5).map(|i| of(comm.rank(), i)).collect();
    comm.all_reduce_f64(&mut sums).map_err(text)?;
    let expected: Vec<f64> = (0..5).map(|i| tree(0, comm.world_size(), &|rank| of(rank, i))).collect();
    if sums == expected { Ok(()) } else { Err(format!("{sums:?}, expected {expected:?}")) }
}

fn what_is_no_flat_buffer_is_refused(comm: &dyn Communicator) -> Outcome {
    let device = comm.device();
    let misfits = [
        Tensor::zeros([4], (Kind::Double, device)),
        Tensor::zeros([4], (Kind::BFloat16, device)),
        Tensor::zeros([2, 2], (Kind::Float, device)),
        Tensor::zeros([8], (Kind::Float, device)).slice(0, 0, 8, 2),
        Tensor::new(),
    ];
    for tensor in &misfits {
        match comm.all_reduce(tensor) {
            Err(CommError::Buffer { .. }) => {}
            other => return Err(format!("all_reduce of {tensor:?} gave {other:?}")),
        }
    }
    comm.barrier().map_err(text)
}

fn misfits_are_refused(comm: &dyn Communicator) -> Outcome {
    let (buffer, world_size) = (filled(comm, 8 * comm.world_size(), |i| i as f32), comm.world_size());
    let outcomes = [
        comm.broadcast(&buffer, world_size),
        comm.broadcast_bytes(&mut Vec::new(), world_size),
        comm.reduce_scatter(&buffer, 7),
        comm.all_gather(&buffer, 0),
    ];
    for (index, outcome) in outcomes.iter().enumerate() {
        if !matches!(outcome, Err(CommError::Argument { .. })) {
            return Err(format!("case {index} gave {outcome:?}"));
        }
    }
    comm.barrier().map_err(text)
}

/// Tells every rank what the others saw.
fn on_all_ranks(comm: &dyn Communicator, mine: Outcome) -> Outcome {
    let mine = mine.err().unwrap_or_default();
    let all = comm.all_gather_bytes(mine.as_bytes()).map_err(text)?;
    match all.iter().position(|what| !what.is_empty()) {
        None => Ok(()),
        Some(rank) => Err(format!("rank {rank}: {}", String::from_utf8_lossy(&all[rank]))),
    }
}

/// A number whose sums depend on their order: either sign, 24 random bits, 20 orders of two. For a
/// group that promises no order, a small integer, whose sums do not.
fn awkward(comm: &dyn Communicator, rank: usize, i: usize) -> f32 {
    if !comm.sums_in_tree() {
        return ((7 * i + 13 * rank) % 1000) as f32;
    }
    let [bits, exponent, ..] = Philox::new(7).at([i as u32, rank as u32, 0, 0]);
    (bits.cast_signed() >> 8) as f32 * 2f32.powi((exponent % 20).cast_signed() - 20)
}

/// The balanced tree over `n` ranks from `first` on, one element at a time: the claim in its plainest form.
fn tree<T: std::ops::Add<Output = T>>(first: usize, n: usize, leaf: &dyn Fn(usize) -> T) -> T {
    if n == 1 {
        return leaf(first);
    }
    let left = n.next_power_of_two() / 2;
    tree(first, left, leaf) + tree(first + left, n - left, leaf)
}

fn filled(comm: &dyn Communicator, numel: usize, value: impl Fn(usize) -> f32) -> Tensor {
    Tensor::from_slice(&(0..numel).map(value).collect::<Vec<f32>>()).to_device(comm.device())
}

fn values(buffer: &Tensor) -> Vec<f32> {
    let mut values = vec![0f32; buffer.numel()];
    buffer.to_device(tch::Device::Cpu).copy_data(&mut values, buffer.numel());
    values
}

/// The buffer's bits are those of the expected values.
fn equal(buffer: &Tensor, numel: usize, expected: impl Fn(usize) -> f32) -> Outcome {
    for (i, got) in values(buffer).into_iter().enumerate() {
        let expected = expected(i);
        if got.to_bits() != expected.to_bits() {
            return Err(format!("element {i} of {numel}: got {got:e}, expected {expected:e}"));
        }
    }
    Ok(())
}

fn text(error: CommError) -> String {
    error.to_string()
}
