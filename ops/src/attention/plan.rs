//! How the pairs of a pattern are divided for the kernel: pieces, in blocks of queries, in chunks that are
//! computed at the same time. Depends on the shape alone, so the result does not depend on threads.
//! Knows no tensors.

use configs::{Documents, Pattern, Piece};

/// Queries of a block: what the kernel computes at once.
const BLOCK: usize = 64;

/// Queries of a chunk, at least: each has memory of its own for the gradients of the keys that it sees,
/// among them those that its neighbour sees too.
const CHUNK: usize = 512;

/// Chunks of a piece, at most: in dense patterns each sees all keys before it.
const MOST_CHUNKS: usize = 8;

/// A piece and its division.
#[derive(Debug)]
pub(crate) struct Division {
    pub(crate) piece: Piece,
    /// `[rows, queries]`: the keys of each query in the piece's order, for each sequence or once for all.
    pub(crate) first: Vec<i32>,
    pub(crate) end: Vec<i32>,
    pub(crate) rows: usize,
    /// Block b has the queries `blocks[b]..blocks[b + 1]`.
    pub(crate) blocks: Vec<i32>,
    /// Chunk c has the blocks `chunks[c]..chunks[c + 1]`.
    pub(crate) chunks: Vec<i32>,
}

/// The pieces of a pattern over `t` positions, within the documents of each sequence if there are any.
pub(crate) fn divide(pattern: Pattern, t: usize, documents: Option<&[Documents]>) -> Vec<Division> {
    pattern.pieces(t).into_iter().map(|piece| Division::of(piece, documents)).collect()
}

impl Division {
    fn of(piece: Piece, documents: Option<&[Documents]>) -> Division {
        let blocks = blocks(&piece);
        let chunks = chunks(&blocks, piece.queries.len());
        let (first, end, rows) = match documents {
            None => (piece.first.clone(), piece.end.clone(), 1),
            Some(documents) => {
                let (first, end): (Vec<_>, Vec<_>) = documents.iter().map(|of| piece.within(of)).unzip();
                (first.concat(), end.concat(), documents.len())
            }
        };
        Division { piece, first, end, rows, blocks, chunks }
    }
}

fn blocks(piece: &Piece) -> Vec<i32> {
    let ends = piece.groups.iter().skip(1).copied().chain([piece.queries.len()]);
    let groups = piece.groups.iter().zip(ends);
    let begins = groups.flat_map(|(&begin, end)| (begin..end).step_by(BLOCK));
    begins.chain([piece.queries.len()]).map(|begin| begin as i32).collect()
}

fn chunks(blocks: &[i32], queries: usize) -> Vec<i32> {
    let wanted = queries.div_ceil(MOST_CHUNKS).max(CHUNK) as i32;
    let (mut chunks, mut begin) = (vec![0], 0);
    for (block, &at) in blocks.iter().enumerate() {
        if at - begin >= wanted || block + 1 == blocks.len() {
            chunks.push(block as i32);
            begin = at;
        }
    }
    chunks.dedup();
    chunks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_query_is_in_one_block_and_every_block_in_one_chunk() {
        for text in ["dense", "banded:100", "strided:7", "strided:128", "fixed:128,16", "fixed:7,3"] {
            for t in [1, 63, 64, 65, 700, 5000] {
                for division in divide(text.parse().unwrap(), t, None) {
                    let Division { piece, blocks, chunks, .. } = division;
                    assert_eq!((blocks[0], blocks[blocks.len() - 1]), (0, piece.queries.len() as i32));
                    assert!(blocks.windows(2).all(|pair| (1..=64).contains(&(pair[1] - pair[0]))));
                    assert_eq!((chunks[0], chunks[chunks.len() - 1]), (0, blocks.len() as i32 - 1));
                    assert!(chunks.windows(2).all(|pair| pair[0] < pair[1]), "{text} {t}: {chunks:?}");
                    assert!(chunks.len() <= 1 + MOST_CHUNKS, "{text} {t}: {chunks:?}");
                    assert!(piece.groups.iter().all(|&group| blocks.contains(&(group as i32))));
                }
            }
        }
    }
}
