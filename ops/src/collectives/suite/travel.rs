//! Claims about how numbers travel: rounded on the wire, as bf16, in buffers that ranks share, and how
//! many bytes are counted. Part of the suite; the rest of it is about what arrives.

use super::{Outcome, SMALLER, awkward, equal, filled, text, tree, values};
use crate::collectives::{Communicator, Operation, Wire, shard};
use tch::{Kind, Tensor};

pub(super) fn a_bf16_wire_rounds_every_contribution(comm: &dyn Communicator) -> Outcome {
    // Sums of multiples of 256 up to 255 of them are bf16, so only contributions are rounded; 257 lies
    // halfway between two bf16 numbers and goes to the even one, 256.
    let multiple = |rank: usize, i: usize| 1 + (i + rank) % 8;
    let sum = |i: usize| (0..comm.world_size()).map(|rank| multiple(rank, i)).sum::<usize>() as f32 * 256.0;
    let alone = comm.world_size() == 1;
    let expected = |i: usize| if alone { sum(i) + 1.0 } else { sum(i) };
    for numel in SMALLER {
        let buffer = || filled(comm, numel, |i| multiple(comm.rank(), i) as f32 * 256.0 + 1.0);
        let all = buffer();
        comm.start(Operation::AllReduce { wire: Wire::Bf16 }, &all).and_then(|p| p.wait()).map_err(text)?;
        equal(&all, numel, expected)?;
        let (shared, shard_numel) = (buffer(), numel.div_ceil(comm.world_size()));
        let scatter = Operation::ReduceScatter { shard_numel, wire: Wire::Bf16 };
        comm.start(scatter, &shared).and_then(|p| p.wait()).map_err(text)?;
        let mine = shard(numel, shard_numel, comm.rank());
        let shared = shared.narrow(0, mine.start as i64, mine.len() as i64);
        equal(&shared, mine.len(), |i| expected(mine.start + i))?;
    }
    Ok(())
}

pub(super) fn a_bf16_wire_loses_no_more_than_its_roundings(comm: &dyn Communicator) -> Outcome {
    let (numel, world_size) = (30_011, comm.world_size());
    let buffer = filled(comm, numel, |i| awkward(comm, comm.rank(), i));
    comm.start(Operation::AllReduce { wire: Wire::Bf16 }, &buffer).and_then(|p| p.wait()).map_err(text)?;
    let bytes: Vec<u8> = values(&buffer).iter().flat_map(|value| value.to_ne_bytes()).collect();
    let rows = comm.all_gather_bytes(&bytes).map_err(text)?;
    if let Some(rank) = rows.iter().position(|row| *row != bytes) {
        return Err(format!("the sum differs from that on rank {rank}"));
    }
    for (i, got) in values(&buffer).into_iter().enumerate() {
        let exact = tree(0, world_size, &|rank| awkward(comm, rank, i));
        // Three roundings, each of half a unit in the eighth bit, of numbers no larger than this.
        let largest: f32 = (0..world_size).map(|rank| awkward(comm, rank, i).abs()).sum();
        if (got - exact).abs() > 3.0 * largest / 256.0 {
            return Err(format!("element {i}: got {got:e}, exact {exact:e}"));
        }
        if world_size > 1 && got.to_bits() & 0xFFFF != 0 {
            return Err(format!("element {i}: {got:e} is no bf16 number"));
        }
    }
    Ok(())
}

pub(super) fn bf16_buffers_are_copied_bit_by_bit(comm: &dyn Communicator) -> Outcome {
    for numel in SMALLER {
        let of = |rank: usize| filled(comm, numel, |i| awkward(comm, rank, i)).to_kind(Kind::BFloat16);
        let even = numel.div_ceil(comm.world_size());
        for shard_numel in [even, even + even / 8 + 1] {
            let buffer = of(comm.rank());
            comm.all_gather(&buffer, shard_numel).map_err(text)?;
            for rank in 0..comm.world_size() {
                let range = shard(numel, shard_numel, rank);
                let part = |tensor: &Tensor| tensor.narrow(0, range.start as i64, range.len() as i64);
                if !part(&buffer).equal(&part(&of(rank))) {
                    return Err(format!("shard {rank} of {numel} in shards of {shard_numel} changed"));
                }
            }
        }
        let (buffer, root) = (of(comm.rank()), comm.world_size() - 1);
        comm.broadcast(&buffer, root).map_err(text)?;
        if !buffer.equal(&of(root)) {
            return Err(format!("a broadcast of {numel} elements changed them"));
        }
    }
    Ok(())
}

pub(super) fn buffers_between_ranks_work_as_any_other(comm: &dyn Communicator) -> Outcome {
    let (numel, world_size) = (300_007, comm.world_size());
    let sum = |i: usize| tree(0, world_size, &|rank| awkward(comm, rank, i));
    let shared = comm.buffer(numel, Kind::Float).map_err(text)?;
    equal(&shared, numel, |_| 0.0)?;
    let mut whole = shared.shallow_clone();
    let fill = |whole: &mut Tensor| whole.copy_(&filled(comm, numel, |i| awkward(comm, comm.rank(), i)));
    fill(&mut whole);
    comm.all_reduce(&shared).map_err(text)?;
    equal(&shared, numel, sum)?;

    // A view at the same offset on all ranks, and one at another offset on each.
    for start in [1000, 1000 + comm.rank()] {
        fill(&mut whole);
        let view = shared.narrow(0, start as i64, 200_001);
        view.shallow_clone().copy_(&filled(comm, 200_001, |i| awkward(comm, comm.rank(), i)));
        comm.all_reduce(&view).map_err(text)?;
        equal(&view, 200_001, sum)?;
        equal(&shared.narrow(0, 0, start as i64), start, |i| awkward(comm, comm.rank(), i))?;
        let rest = numel - start - 200_001;
        let tail = shared.narrow(0, (numel - rest) as i64, rest as i64);
        equal(&tail, rest, |i| awkward(comm, comm.rank(), numel - rest + i))?;
    }

    // Odd shards of bf16, two buffers in flight, a buffer on some ranks only.
    let of = |rank: usize| filled(comm, 70_001, |i| awkward(comm, rank, i)).to_kind(Kind::BFloat16);
    let filled = || -> Result<Tensor, String> {
        let mut buffer = comm.buffer(70_001, Kind::BFloat16).map_err(text)?;
        buffer.copy_(&of(comm.rank()));
        Ok(buffer)
    };
    let (first, second, mut mixed) = (filled()?, filled()?, filled()?);
    if comm.rank() == 0 {
        mixed = mixed.copy();
    }
    let gather = Operation::AllGather { shard_numel: 70_001usize.div_ceil(world_size) };
    let broadcast = Operation::Broadcast { root: world_size - 1 };
    let pending = [(gather, &first), (gather, &mixed), (broadcast, &second)]
        .map(|(operation, buffer)| comm.start(operation, buffer));
    for pending in pending {
        pending.map_err(text)?.wait().map_err(text)?;
    }
    if !first.equal(&mixed) || !second.equal(&of(world_size - 1)) {
        return Err("buffers in flight were mixed up".to_owned());
    }
    match comm.buffer(8, Kind::Int64) {
        Err(crate::collectives::CommError::Kind { .. }) => comm.barrier().map_err(text),
        other => Err(format!("a buffer of integers gave {other:?}")),
    }
}

pub(super) fn bytes_sent_are_those_of_theory(comm: &dyn Communicator) -> Outcome {
    let world_size = comm.world_size();
    let shard_numel = 48_000;
    let numel = shard_numel * world_size;
    let (fp32, bf16) =
        (filled(comm, numel, |i| i as f32), filled(comm, numel, |i| i as f32).to_kind(Kind::BFloat16));
    let operations = [
        (Operation::AllReduce { wire: Wire::Fp32 }, &fp32, 2 * shard_numel * 4),
        (Operation::AllReduce { wire: Wire::Bf16 }, &fp32, 2 * shard_numel * 2),
        (Operation::ReduceScatter { shard_numel, wire: Wire::Fp32 }, &fp32, shard_numel * 4),
        (Operation::ReduceScatter { shard_numel, wire: Wire::Bf16 }, &fp32, shard_numel * 2),
        (Operation::AllGather { shard_numel }, &fp32, shard_numel * 4),
        (Operation::AllGather { shard_numel }, &bf16, shard_numel * 2),
    ];
    for (operation, buffer, per_peer) in operations {
        let sent = || {
            let traffic = comm.traffic();
            let rows = [traffic.all_reduce, traffic.reduce_scatter, traffic.all_gather];
            rows.iter().map(|moved| moved.sent_bytes).sum::<u64>()
        };
        let before = sent();
        comm.start(operation, buffer).and_then(|p| p.wait()).map_err(text)?;
        let (got, expected) = (sent() - before, ((world_size - 1) * per_peer) as u64);
        // Ranks of a node read each other's fp32, whatever the wire between nodes.
        let rounded = matches!(
            operation,
            Operation::AllReduce { wire: Wire::Bf16 } | Operation::ReduceScatter { wire: Wire::Bf16, .. }
        );
        let shown = rounded && comm.place().local_size > 1 && (expected..=2 * expected).contains(&got);
        if got != expected && !shown {
            return Err(format!("{operation:?} of {numel} elements sent {got} bytes, theory {expected}"));
        }
    }
    Ok(())
}
