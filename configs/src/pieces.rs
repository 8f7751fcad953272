//! A pattern cut into pieces that a kernel can take: in each, every query sees consecutive keys of some
//! order of the positions. So a kernel has no rule of any pattern, and documents are cut off here.
//! Knows no tiles and no tensors.

use crate::Pattern;
use std::ops::Range;

/// A part of a pattern's pairs; the pieces of a pattern have no pair in common.
///
/// The first piece of a pattern has every position among its queries and its keys, and each query there
/// sees itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// Positions of the queries, in the piece's order.
    pub queries: Vec<i32>,
    /// Positions of the keys, in the piece's order: ascending among those that a query sees.
    pub keys: Vec<i32>,
    /// Query n sees the keys `first[n]..end[n]`, counted in the piece's order.
    pub first: Vec<i32>,
    /// One past the last key that query n sees.
    pub end: Vec<i32>,
    /// Queries at which others begin that see other keys: tiles should not go across.
    pub groups: Vec<usize>,
}

/// Which document each position of a sequence belongs to, as the positions at which documents begin and
/// end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Documents {
    start: Vec<i32>,
    end: Vec<i32>,
}

impl Documents {
    /// Those of a sequence of `t` positions, given those at which a document begins; the first one always
    /// does.
    pub fn beginning(t: usize, begins: impl Fn(usize) -> bool) -> Documents {
        let mut start = vec![0; t];
        for i in 1..t {
            start[i] = if begins(i) { i as i32 } else { start[i - 1] };
        }
        let mut end = vec![t as i32; t];
        for i in (1..t).rev() {
            end[i - 1] = if start[i] == i as i32 { i as i32 } else { end[i] };
        }
        Documents { start, end }
    }

    /// Whether two positions are in one document.
    pub fn together(&self, a: usize, b: usize) -> bool {
        self.start[a] == self.start[b]
    }

    /// The positions of the document that `position` is in.
    pub fn around(&self, position: usize) -> Range<usize> {
        self.start[position] as usize..self.end[position] as usize
    }

    /// Positions of the sequence.
    pub fn positions(&self) -> usize {
        self.start.len()
    }
}

impl Piece {
    /// Which keys each query sees within its document, as [`Piece::first`] and [`Piece::end`].
    pub fn within(&self, documents: &Documents) -> (Vec<i32>, Vec<i32>) {
        let cut = |n: usize| {
            let (position, first, end) = (self.queries[n] as usize, self.first[n], self.end[n]);
            let keys = self.keys.get(first as usize..end as usize).unwrap_or_default();
            let before = |limit: i32| first + keys.partition_point(|&key| key < limit) as i32;
            (before(documents.start[position]), before(documents.end[position]))
        };
        (0..self.queries.len()).map(cut).unzip()
    }

    /// All positions in their order; each query sees what `seen` says.
    fn plain(t: usize, group: usize, seen: impl Fn(usize) -> (usize, usize)) -> Piece {
        let all: Vec<i32> = (0..t as i32).collect();
        let (first, end) = (0..t).map(&seen).map(|(first, end)| (first as i32, end as i32)).unzip();
        Piece { queries: all.clone(), keys: all, first, end, groups: (0..t).step_by(group).collect() }
    }

    /// Positions whose distance is a multiple of l stand together: each sees all before it but itself.
    fn strides(t: usize, l: usize) -> Piece {
        let mut piece = Piece::empty();
        for residue in 0..l.min(t) {
            let begin = piece.queries.len();
            piece.groups.push(begin);
            for position in (residue..t).step_by(l) {
                piece.first.push(begin as i32);
                piece.end.push(piece.queries.len() as i32);
                piece.queries.push(position as i32);
            }
        }
        piece.keys = piece.queries.clone();
        piece
    }

    /// The last c of each block of l, for the queries of later blocks.
    fn summaries(t: usize, l: usize, c: usize) -> Piece {
        let mut piece = Piece::empty();
        piece.keys = (0..t / l).flat_map(|b| b * l + l - c..b * l + l).map(|key| key as i32).collect();
        piece.groups.push(0);
        for position in l..t {
            piece.queries.push(position as i32);
            piece.first.push(0);
            piece.end.push((position / l * c) as i32);
        }
        piece
    }

    fn empty() -> Piece {
        let (queries, keys, first, end, groups) = (vec![], vec![], vec![], vec![], vec![]);
        Piece { queries, keys, first, end, groups }
    }
}

impl Pattern {
    /// The pattern over `t` positions, in pieces.
    pub fn pieces(self, t: usize) -> Vec<Piece> {
        let one = t.max(1);
        let band = |w: usize| Piece::plain(t, one, |i| ((i + 1).saturating_sub(w), i + 1));
        match self {
            Pattern::Dense => vec![band(t)],
            Pattern::Banded(w) => vec![band(w)],
            Pattern::Strided(l) if l >= t => vec![band(l)],
            Pattern::Strided(l) => vec![band(l), Piece::strides(t, l)],
            Pattern::Fixed(l, c) => {
                let own = Piece::plain(t, l, |i| (i / l * l, i + 1));
                if l >= t { vec![own] } else { vec![own, Piece::summaries(t, l, c)] }
            }
            Pattern::Bidirectional => vec![Piece::plain(t, one, |_| (0, t))],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    const PATTERNS: [&str; 16] = [
        "dense",
        "bidirectional",
        "banded:1",
        "banded:4",
        "banded:39",
        "banded:40",
        "banded:99",
        "strided:1",
        "strided:2",
        "strided:7",
        "strided:99",
        "fixed:1,1",
        "fixed:4,1",
        "fixed:4,4",
        "fixed:7,3",
        "fixed:99,3",
    ];

    /// Each pair of the pieces; panics where there is one twice.
    fn pairs(pieces: &[Piece], documents: Option<&Documents>) -> HashSet<(i32, i32)> {
        let mut pairs = HashSet::new();
        for piece in pieces {
            let (first, end) = match documents {
                Some(documents) => piece.within(documents),
                None => (piece.first.clone(), piece.end.clone()),
            };
            for (n, &query) in piece.queries.iter().enumerate() {
                for &key in &piece.keys[first[n] as usize..end[n] as usize] {
                    assert!(pairs.insert((query, key)), "({query}, {key}) twice");
                }
            }
        }
        pairs
    }

    #[test]
    fn pieces_have_the_pairs_of_the_pattern_each_once() {
        for pattern in PATTERNS.map(|text| text.parse::<Pattern>().unwrap()) {
            for t in [0, 1, 2, 7, 40] {
                let got = pairs(&pattern.pieces(t), None);
                assert_eq!(got.len() as u64, pattern.pairs(t), "{pattern} over {t}");
                assert!(got.iter().all(|&(q, k)| pattern.allows(q as usize, k as usize)), "{pattern}");
            }
        }
    }

    #[test]
    fn within_documents_pieces_have_the_pairs_of_one_document() {
        let documents = Documents::beginning(40, |i| [3, 4, 17, 36].contains(&i));
        for pattern in PATTERNS.map(|text| text.parse::<Pattern>().unwrap()) {
            let got = pairs(&pattern.pieces(40), Some(&documents));
            let all = (0..40usize).flat_map(|q| (0..40).map(move |k| (q, k)));
            let expected = all.filter(|&(q, k)| pattern.allows(q, k) && documents.together(q, k)).count();
            assert_eq!(got.len(), expected, "{pattern}");
        }
    }

    #[test]
    fn the_first_piece_shows_every_query_itself() {
        for pattern in PATTERNS.map(|text| text.parse::<Pattern>().unwrap()) {
            let first = &pattern.pieces(40)[..1];
            let pairs = pairs(first, Some(&Documents::beginning(40, |i| i % 9 == 4)));
            assert!((0..40).all(|i| pairs.contains(&(i, i))), "{pattern}");
        }
    }
}
