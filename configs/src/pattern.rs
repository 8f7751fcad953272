//! Attention patterns as data: which keys a query sees, and how many pairs that makes.
//! Knows no tensors; the kernels are in `ops`.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Which positions a query attends to.
///
/// Written as in `dense`, `banded:256`, `strided:128`, `fixed:128,16` or `bidirectional` in TOML. Source:
/// Child et al. 2019 (Sparse Transformer), whose two factors are here one layer's union, and Brown et al.
/// 2020 (GPT-3), which alternates dense and locally banded layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Pattern {
    /// Every position up to and including the query's own.
    Dense,
    /// The last `w` positions, the query's own included.
    Banded(usize),
    /// The last `l` positions, the query's own included, and before them every `l`-th.
    Strided(usize),
    /// The positions so far of the query's own block of `l`, and the last `c` of each earlier block.
    Fixed(usize, usize),
    /// Every position, later ones too (BERT).
    Bidirectional,
}

/// A pattern that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "unknown attention pattern \"{0}\"; expected \"dense\", \"banded:W\", \"strided:L\", \"fixed:L,C\" or \
     \"bidirectional\", with W, L and C at least 1 and C at most L; hint: \"banded:256\" sees 256 keys, self \
     included"
)]
pub struct PatternError(pub String);

impl Pattern {
    /// Whether the query at `q` sees the key at `k`.
    pub fn allows(self, q: usize, k: usize) -> bool {
        match self {
            Pattern::Dense => k <= q,
            Pattern::Banded(w) => k <= q && q - k < w,
            Pattern::Strided(l) => k <= q && (q - k < l || (q - k).is_multiple_of(l)),
            Pattern::Fixed(l, c) => k <= q && (q / l == k / l || k % l >= l - c),
            Pattern::Bidirectional => true,
        }
    }

    /// Whether no query sees a later position: what predicts the next token needs it.
    pub fn is_causal(self) -> bool {
        self != Pattern::Bidirectional
    }

    /// How many (query, key) pairs are kept in a sequence of `t` positions that is one document.
    pub fn pairs(self, t: usize) -> u64 {
        let triangle = |n: usize| n as u64 * (n as u64 + 1) / 2;
        // The sum of i / l over all positions i: how many whole blocks of l are before each.
        let blocks_before = |l: usize| {
            let (whole, rest) = ((t / l) as u64, (t % l) as u64);
            l as u64 * (whole * whole.saturating_sub(1) / 2) + rest * whole
        };
        match self {
            Pattern::Dense => triangle(t),
            // The first w queries form a triangle, each later one sees w keys.
            Pattern::Banded(w) => triangle(t.min(w)) + t.saturating_sub(w) as u64 * w as u64,
            Pattern::Strided(l) => Pattern::Banded(l).pairs(t) + blocks_before(l),
            Pattern::Fixed(l, c) => {
                (t / l) as u64 * triangle(l) + triangle(t % l) + c as u64 * blocks_before(l)
            }
            Pattern::Bidirectional => t as u64 * t as u64,
        }
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Pattern::Dense => f.write_str("dense"),
            Pattern::Banded(w) => write!(f, "banded:{w}"),
            Pattern::Strided(l) => write!(f, "strided:{l}"),
            Pattern::Fixed(l, c) => write!(f, "fixed:{l},{c}"),
            Pattern::Bidirectional => f.write_str("bidirectional"),
        }
    }
}

impl FromStr for Pattern {
    type Err = PatternError;

    fn from_str(text: &str) -> Result<Self, PatternError> {
        let number = |text: &str| text.parse::<u32>().ok().filter(|&n| n > 0).map(|n| n as usize);
        let pattern = match text.split_once(':') {
            None if text == "dense" => Some(Pattern::Dense),
            None if text == "bidirectional" => Some(Pattern::Bidirectional),
            Some(("banded", w)) => number(w).map(Pattern::Banded),
            Some(("strided", l)) => number(l).map(Pattern::Strided),
            Some(("fixed", both)) => both.split_once(',').and_then(|(l, c)| {
                let (l, c) = (number(l)?, number(c)?);
                (c <= l).then_some(Pattern::Fixed(l, c))
            }),
            _ => None,
        };
        pattern.ok_or_else(|| PatternError(text.to_string()))
    }
}

impl TryFrom<String> for Pattern {
    type Error = PatternError;

    fn try_from(text: String) -> Result<Self, PatternError> {
        text.parse()
    }
}

impl From<Pattern> for String {
    fn from(pattern: Pattern) -> String {
        pattern.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn banded_w_keeps_w_keys_with_self_among_them() {
        let kept: Vec<usize> = (0..10).filter(|&k| Pattern::Banded(3).allows(7, k)).collect();
        assert_eq!(kept, [5, 6, 7]);
    }

    #[test]
    fn strided_keeps_the_last_l_keys_and_every_lth_before_them() {
        let kept: Vec<usize> = (0..20).filter(|&k| Pattern::Strided(4).allows(13, k)).collect();
        assert_eq!(kept, [1, 5, 9, 10, 11, 12, 13]);
    }

    #[test]
    fn fixed_keeps_the_own_block_and_the_last_c_of_each_block_before() {
        let kept: Vec<usize> = (0..20).filter(|&k| Pattern::Fixed(5, 2).allows(12, k)).collect();
        assert_eq!(kept, [3, 4, 8, 9, 10, 11, 12]);
    }

    #[test]
    fn pairs_count_what_allows_allows() {
        for text in ALL {
            let pattern: Pattern = text.parse().unwrap();
            for t in [0, 1, 3, 4, 5, 17, 40] {
                let counted = (0..t).flat_map(|q| (0..t).map(move |k| (q, k)));
                let counted = counted.filter(|&(q, k)| pattern.allows(q, k)).count() as u64;
                assert_eq!(pattern.pairs(t), counted, "{pattern} over {t}");
            }
        }
    }

    const ALL: [&str; 14] = [
        "dense",
        "bidirectional",
        "banded:1",
        "banded:4",
        "banded:99",
        "strided:1",
        "strided:2",
        "strided:5",
        "strided:99",
        "fixed:1,1",
        "fixed:4,1",
        "fixed:4,4",
        "fixed:5,2",
        "fixed:99,3",
    ];

    #[test]
    fn patterns_read_back_as_they_are_written() {
        for text in ALL {
            assert_eq!(text.parse::<Pattern>().unwrap().to_string(), text);
        }
        let wrong = [
            "",
            "banded",
            "banded:0",
            "banded:-1",
            "Dense",
            "banded:2x",
            "dense:3",
            "strided:",
            "strided:0",
            "fixed:8",
            "fixed:8,0",
            "fixed:8,9",
            "fixed:8,1,1",
            "bidirectional:1",
            "banded:99999999999",
        ];
        for wrong in wrong {
            let error = wrong.parse::<Pattern>().unwrap_err().to_string();
            assert!(error.contains(&format!("\"{wrong}\"")) && error.contains("hint: "), "{error}");
        }
    }

    #[test]
    fn sparse_patterns_keep_a_small_share_of_the_pairs() {
        let share = |text: &str| {
            Pattern::Dense.pairs(8192) as f64 / text.parse::<Pattern>().unwrap().pairs(8192) as f64
        };
        let shares = ["banded:256", "strided:128", "fixed:128,16"].map(|text| (share(text) * 10.0).round());
        assert_eq!(shares, [163.0, 258.0, 72.0]);
    }
}
