//! A pattern as pieces that a kernel with a window can compute: libtorch's flash attention on GPUs, which
//! csrc/windowed.cpp merges. Knows which arrangements there are; not how they are made.

use configs::Pattern;
use tch::{Kind, Tensor};

/// A piece of a pattern in which, after positions are arranged anew, each query sees a window of keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Windowed {
    /// As it is: the last `w` keys, or all so far.
    Whole(Option<usize>),
    /// Blocks by themselves.
    Blocks(usize),
    /// Positions `l` apart stand together; each sees those before it.
    Strides(usize),
    /// The key at `column` of every block of `l` before the query's.
    Column { l: usize, column: usize },
}

impl Windowed {
    /// As the shim takes it.
    pub(crate) fn numbers(self) -> [i64; 3] {
        let numbers = match self {
            Windowed::Whole(window) => [0, window.unwrap_or(0), 0],
            Windowed::Blocks(l) => [1, l, 0],
            Windowed::Strides(l) => [2, l, 0],
            Windowed::Column { l, column } => [3, l, column],
        };
        numbers.map(|number| number as i64)
    }
}

/// The pieces of a pattern over `t` positions; none where it looks ahead.
pub(crate) fn windows(pattern: Pattern, t: usize) -> Option<Vec<Windowed>> {
    match pattern {
        Pattern::Dense => Some(vec![Windowed::Whole(None)]),
        Pattern::Banded(w) => Some(vec![Windowed::Whole(Some(w.min(t)))]),
        Pattern::Strided(l) if l >= t => Some(vec![Windowed::Whole(None)]),
        Pattern::Strided(l) => Some(vec![Windowed::Whole(Some(l)), Windowed::Strides(l)]),
        Pattern::Fixed(l, _) if l >= t => Some(vec![Windowed::Whole(None)]),
        Pattern::Fixed(l, c) => {
            let columns = (l - c..l).map(|column| Windowed::Column { l, column });
            Some(std::iter::once(Windowed::Blocks(l)).chain(columns).collect())
        }
        Pattern::Bidirectional => None,
    }
}

/// Whether libtorch's flash attention takes these.
pub(super) fn has_windows(q: &Tensor) -> bool {
    let d = q.size()[3];
    q.device().is_cuda() && matches!(q.kind(), Kind::BFloat16 | Kind::Half) && d % 8 == 0 && d <= 256
}
