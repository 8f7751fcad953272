//! Attention patterns as data: which keys a query sees, and how many pairs that makes.
//! Knows no tensors; the kernels are in `ops`.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Which earlier positions a query attends to.
///
/// Written `dense` or `banded:256` in TOML. Source: Child et al. 2019 (Sparse Transformer) and
/// Brown et al. 2020 (GPT-3), which alternates dense and locally banded layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Pattern {
    /// Every position up to and including the query's own.
    Dense,
    /// The last `w` positions, the query's own included.
    Banded(usize),
}

/// A pattern that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "unknown attention pattern \"{0}\"; expected \"dense\" or \"banded:W\" with W >= 1 keys, self included"
)]
pub struct PatternError(pub String);

impl Pattern {
    /// Whether the query at `q` sees the key at `k`.
    pub fn allows(self, q: usize, k: usize) -> bool {
        match self {
            Pattern::Dense => k <= q,
            Pattern::Banded(w) => k <= q && q - k < w,
        }
    }

    /// How many (query, key) pairs are kept in a sequence of `t` positions.
    pub fn pairs(self, t: usize) -> u64 {
        let triangle = |n: usize| n as u64 * (n as u64 + 1) / 2;
        match self {
            Pattern::Dense => triangle(t),
            // The first w queries form a triangle, each later one sees w keys.
            Pattern::Banded(w) => triangle(t.min(w)) + t.saturating_sub(w) as u64 * w as u64,
        }
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Pattern::Dense => f.write_str("dense"),
            Pattern::Banded(w) => write!(f, "banded:{w}"),
        }
    }
}

impl FromStr for Pattern {
    type Err = PatternError;

    fn from_str(text: &str) -> Result<Self, PatternError> {
        let unknown = || PatternError(text.to_string());
        if text == "dense" {
            return Ok(Pattern::Dense);
        }
        let w: usize = text.strip_prefix("banded:").ok_or_else(unknown)?.parse().map_err(|_| unknown())?;
        if w == 0 { Err(unknown()) } else { Ok(Pattern::Banded(w)) }
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
    fn pairs_count_what_allows_allows() {
        for pattern in [Pattern::Dense, Pattern::Banded(1), Pattern::Banded(4), Pattern::Banded(99)] {
            for t in [0, 1, 3, 4, 5, 17] {
                let counted = (0..t).flat_map(|q| (0..t).map(move |k| (q, k)));
                let counted = counted.filter(|&(q, k)| pattern.allows(q, k)).count() as u64;
                assert_eq!(pattern.pairs(t), counted, "{pattern} over {t}");
            }
        }
    }

    #[test]
    fn patterns_read_back_as_they_are_written() {
        for text in ["dense", "banded:1", "banded:256"] {
            assert_eq!(text.parse::<Pattern>().unwrap().to_string(), text);
        }
        for wrong in ["", "banded", "banded:0", "banded:-1", "Dense", "banded:2x"] {
            assert!(wrong.parse::<Pattern>().is_err(), "{wrong}");
        }
    }
}
