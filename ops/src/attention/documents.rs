//! Patterns within documents as sequences that a kernel for sequences of any lengths can compute: libtorch's
//! flash attention on GPUs, which csrc/documents.cpp merges. Knows which rows stand together; not how they are
//! computed.

use crate::device;
use configs::{Documents, Pattern};
use std::ops::Range;
use tch::{Device, Tensor};

/// A piece of a pattern: sequences of rows of `[B T]`, in which each query sees keys up to that of its own
/// number.
#[derive(Debug)]
pub(crate) struct Sequences {
    /// Rows of the queries, i64; none: all, in their order.
    pub(crate) queries: Option<Tensor>,
    /// Rows of the keys.
    pub(crate) keys: Option<Tensor>,
    /// 0, and where each sequence ends, i32.
    pub(crate) ends: Tensor,
    /// Of the longest sequence, rows.
    pub(crate) longest: i64,
    /// The last keys that a query sees; 0 for all.
    pub(crate) window: i64,
}

/// The same in the making.
#[derive(Default)]
struct Rows {
    queries: Vec<i64>,
    keys: Vec<i64>,
    lengths: Vec<usize>,
}

impl Rows {
    /// One more sequence, if it has any rows: pairs of a query and the last key that it sees.
    fn sequence(&mut self, pairs: impl Iterator<Item = (usize, usize)>) {
        let before = self.queries.len();
        for (query, key) in pairs {
            self.queries.push(query as i64);
            self.keys.push(key as i64);
        }
        self.lengths.extend((self.queries.len() > before).then(|| self.queries.len() - before));
    }

    fn finish(self, device: Device) -> Option<Sequences> {
        let rows = |rows: &[i64]| Some(device::sent(&Tensor::from_slice(rows), device));
        let all = all(&self.lengths, 0, device);
        (!self.lengths.is_empty()).then(|| Sequences {
            queries: rows(&self.queries),
            keys: rows(&self.keys),
            ..all
        })
    }
}

/// All rows in their order, in sequences of these lengths.
fn all(lengths: &[usize], window: usize, device: Device) -> Sequences {
    let mut ends = vec![0i32];
    for length in lengths {
        ends.push(ends[ends.len() - 1] + *length as i32);
    }
    let longest = lengths.iter().copied().max().unwrap_or(0) as i64;
    let ends = device::sent(&Tensor::from_slice(&ends), device);
    Sequences { queries: None, keys: None, ends, longest, window: window as i64 }
}

/// The pieces of a pattern that looks back, within the documents of each sequence; the first has every row.
pub(crate) fn sequences(pattern: Pattern, documents: &[Documents], device: Device) -> Vec<Sequences> {
    let spans: Vec<Range<usize>> = spans(documents);
    let whole: Vec<usize> = spans.iter().map(Range::len).collect();
    let t = documents.first().map_or(1, Documents::positions);
    match pattern {
        Pattern::Dense => vec![all(&whole, 0, device)],
        Pattern::Banded(w) => vec![all(&whole, w, device)],
        Pattern::Strided(l) => {
            let apart = strides(&spans, l).finish(device);
            std::iter::once(all(&whole, l, device)).chain(apart).collect()
        }
        Pattern::Fixed(l, c) => {
            let own: Vec<usize> = spans.iter().flat_map(|span| blocks(span, t, l)).collect();
            let columns = (l - c..l).filter_map(|column| summaries(&spans, t, l, column).finish(device));
            std::iter::once(all(&own, 0, device)).chain(columns).collect()
        }
        Pattern::Bidirectional => panic!("what looks ahead is no sequence of what is seen"),
    }
}

/// The documents as rows of `[B T]`.
fn spans(documents: &[Documents]) -> Vec<Range<usize>> {
    let mut spans = Vec::new();
    for (sequence, of) in documents.iter().enumerate() {
        let (t, mut begin) = (of.positions(), 0);
        for i in 1..=t {
            if i == t || !of.together(i - 1, i) {
                spans.push(sequence * t + begin..sequence * t + i);
                begin = i;
            }
        }
    }
    spans
}

/// Rows of a document that are l apart: each sees those before it.
fn strides(spans: &[Range<usize>], l: usize) -> Rows {
    let mut rows = Rows::default();
    for span in spans {
        for first in span.start..span.end.min(span.start + l) {
            rows.sequence((first + l..span.end).step_by(l).map(|row| (row, row - l)));
        }
    }
    rows
}

/// How long a document's parts in each block of its sequence are.
fn blocks(span: &Range<usize>, t: usize, l: usize) -> Vec<usize> {
    let (begin, mut at, mut lengths) = (span.start / t * t, span.start, Vec::new());
    while at < span.end {
        let end = span.end.min(begin + ((at - begin) / l + 1) * l);
        lengths.push(end - at);
        at = end;
    }
    lengths
}

/// For each place in a block, the queries there, which see the key at `column` of all blocks before theirs.
fn summaries(spans: &[Range<usize>], t: usize, l: usize, column: usize) -> Rows {
    let mut rows = Rows::default();
    for span in spans {
        let begin = span.start / t * t;
        // The first block whose column is in the document.
        let first = (span.start - begin).saturating_sub(column).div_ceil(l);
        for place in 0..l {
            let blocks = (first + 1..).map(|block| (begin + block * l + place, block));
            let within = blocks.take_while(|(query, _)| *query < span.end);
            rows.sequence(within.map(|(query, block)| (query, begin + (block - 1) * l + column)));
        }
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    fn rows(of: &Option<Tensor>, all: i64) -> Vec<i64> {
        of.as_ref().map_or_else(|| (0..all).collect(), |rows| Vec::try_from(rows).unwrap())
    }

    #[test]
    fn sequences_have_the_pairs_of_the_pattern_within_documents_each_once() {
        let t = 40;
        let begins: [&[usize]; 3] = [&[], &[3, 4, 17, 36], &[20]];
        let documents = begins.map(|begins| Documents::beginning(t, |i| begins.contains(&i)));
        for text in [
            "dense",
            "banded:4",
            "banded:99",
            "strided:1",
            "strided:7",
            "strided:99",
            "fixed:1,1",
            "fixed:7,3",
            "fixed:4,4",
            "fixed:99,2",
        ] {
            let pattern: Pattern = text.parse().unwrap();
            let mut pairs = HashSet::new();
            for piece in sequences(pattern, &documents, Device::Cpu) {
                let (queries, keys) = (rows(&piece.queries, 3 * t as i64), rows(&piece.keys, 3 * t as i64));
                let ends = Vec::<i32>::try_from(&piece.ends).unwrap();
                assert_eq!(ends[ends.len() - 1] as usize, queries.len(), "{text}");
                for span in ends.windows(2) {
                    let (begin, end) = (span[0] as usize, span[1] as usize);
                    assert!((end - begin) as i64 <= piece.longest);
                    for (n, query) in queries.iter().enumerate().take(end).skip(begin) {
                        let window = if piece.window == 0 { t } else { piece.window as usize };
                        let seen = &keys[begin.max((n + 1).saturating_sub(window))..=n];
                        for key in seen {
                            assert!(pairs.insert((*query, *key)), "{text}: a pair twice");
                        }
                    }
                }
            }
            let all = (0..3 * t).flat_map(|q| (0..3 * t).map(move |k| (q, k)));
            let kept = all
                .filter(|(q, k)| q / t == k / t)
                .filter(|(q, k)| pattern.allows(q % t, k % t) && documents[q / t].together(q % t, k % t));
            let kept: HashSet<_> = kept.map(|(q, k)| (q as i64, k as i64)).collect();
            assert_eq!(pairs, kept, "{text}");
        }
    }
}
