//! Whether the ranks still hold the same weights. They compute the same from the same, so a difference
//! is a fault of a machine. Compares hashes; knows no optimizer and no schedule.

use crate::error::TrainError;
use crate::weights::{Parameters, hash_values};
use configs::Shard;
use ops::collectives::Communicator;
use std::collections::BTreeMap;
use tch::Kind;

/// blake3's 32 bytes.
type Hash = [u8; blake3::OUT_LEN];

/// Whether there is anything that ranks hold twice.
pub(crate) fn has_any(shard: Shard) -> bool {
    shard != Shard::Parameters
}

/// Compares the ranks' weights after `step` updates: those that compute, and the masters where each rank
/// has all of them. Collective; on every rank the same comes of it: nothing, or `ReplicasDiffer` with the
/// first segment that differs and whose is unlike the others'.
///
/// # Errors
/// A failed collective.
pub(crate) fn compare(
    comm: &dyn Communicator,
    parameters: &mut Parameters<'_>,
    step: u64,
) -> Result<Option<TrainError>, TrainError> {
    if !has_any(parameters.shard()) {
        return Ok(None);
    }
    let mine =
        (0..parameters.len()).map(|index| hash(parameters, index)).collect::<Result<Vec<Hash>, _>>()?;
    // One hash is enough as long as nothing is wrong.
    let all = blake3::hash(mine.as_flattened());
    if comm.all_gather_bytes(all.as_bytes())?.iter().all(|rank| rank == all.as_bytes()) {
        return Ok(None);
    }
    let everybodys = comm.all_gather_bytes(mine.as_flattened())?;
    let hosts = comm.all_gather_bytes(comm.place().host.as_bytes())?;
    let everybodys: Vec<&[Hash]> = everybodys.iter().map(|rank| rank.as_chunks().0).collect();
    let of_segment =
        |index: usize| -> Vec<Option<&Hash>> { everybodys.iter().map(|rank| rank.get(index)).collect() };
    let differs = |index: usize| of_segment(index).windows(2).any(|pair| pair[0] != pair[1]);
    let index = (0..mine.len()).find(|&index| differs(index)).unwrap_or(0);
    let name = |rank: usize| format!("rank {rank} on {}", String::from_utf8_lossy(&hosts[rank]));
    Ok(Some(TrainError::ReplicasDiffer {
        step,
        segment: parameters.spec(index).name.clone(),
        ranks: who_differs(&of_segment(index), name),
    }))
}

/// Says which ranks hold something else than most do; all of them if there is no such majority.
fn who_differs<T: Ord>(held: &[T], name: impl Fn(usize) -> String) -> String {
    let mut holders = BTreeMap::<&T, Vec<usize>>::new();
    for (rank, value) in held.iter().enumerate() {
        holders.entry(value).or_default().push(rank);
    }
    let most = holders.values().max_by_key(|ranks| ranks.len()).map_or(0, Vec::len);
    let listed = |ranks: Vec<usize>| ranks.into_iter().map(&name).collect::<Vec<_>>().join(", ");
    if 2 * most <= held.len() {
        return format!("{} do not agree, and no majority of them does", listed((0..held.len()).collect()));
    }
    let odd = holders.into_values().filter(|ranks| ranks.len() < most).flatten().collect();
    format!("{}: unlike the other {most}, which agree", listed(odd))
}

fn hash(parameters: &mut Parameters<'_>, index: usize) -> Result<Hash, TrainError> {
    let mut hash = blake3::Hasher::new();
    hash_values(&mut hash, parameters.get(index)?.flat());
    // Masters in the precision that computes are the same memory.
    if parameters.shard() == Shard::None && parameters.kind() != Kind::Float {
        hash_values(&mut hash, parameters.master(index));
    }
    Ok(*hash.finalize().as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(held: &[u8]) -> String {
        who_differs(held, |rank| format!("rank {rank}"))
    }

    #[test]
    fn the_ranks_in_the_minority_are_named() {
        assert_eq!(told(&[7, 7, 1, 7]), "rank 2: unlike the other 3, which agree");
        assert_eq!(told(&[1, 7, 7, 2, 7]), "rank 0, rank 3: unlike the other 3, which agree");
    }

    #[test]
    fn without_a_majority_nobody_is_accused_alone() {
        assert_eq!(told(&[1, 2]), "rank 0, rank 1 do not agree, and no majority of them does");
        assert_eq!(
            told(&[1, 1, 2, 2]),
            "rank 0, rank 1, rank 2, rank 3 do not agree, and no majority of them does"
        );
    }
}
