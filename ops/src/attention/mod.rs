//! Attention over the pairs that a pattern keeps, at a cost that grows with them, and which way to compute
//! it where: on the CPU a kernel of our own, or libtorch's. Knows no model.

mod blocks;
mod documents;
mod plan;
mod sdpa;
#[cfg(test)]
mod tests;
mod windowed;

pub(crate) use documents::Sequences;
pub(crate) use plan::Division;
pub use sdpa::attention_with_mask;
pub(crate) use windowed::Windowed;

use crate::OpsError;
use crate::device::has_matrix_unit;
use crate::linear::has_products;
use configs::{Documents, Pattern};
use tch::{Device, Kind, Tensor};

/// Attention of queries, keys and values `[B, H, T, D]`, scaled by 1/sqrt(D), within the documents of each
/// sequence if they are given: `[B, H, T, D]`. No mask of T x T is made: what is taken beyond inputs, output and
/// gradients grows with T, where no kernel has the pattern with the mask of a block of 256 queries, 256 x T.
///
/// # Panics
/// As tch's operations do: shapes or kinds that differ, no memory; and where documents are not those of
/// these sequences.
pub fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    pattern: Pattern,
    documents: Option<&[Documents]>,
) -> Tensor {
    let t = q.size()[2] as usize;
    let narrow = match pattern {
        Pattern::Banded(w) if w >= t => Pattern::Dense, // the same pairs
        other => other,
    };
    match (narrow, documents) {
        (Pattern::Dense | Pattern::Bidirectional, None) if !is_widened(q) && !is_ours(q) => {
            sdpa::dense(q, k, v, narrow.is_causal())
        }
        _ if has_kernel(q) => {
            kernel(q, k, v, narrow, documents, false).unwrap_or_else(|error| panic!("attention: {error}"))
        }
        (narrow, None) if windowed::has_windows(q) && narrow.is_causal() => {
            let pieces = windowed::windows(narrow, t).expect("a causal pattern has windows");
            crate::shim::windowed_attention(q, k, v, &pieces)
                .unwrap_or_else(|error| panic!("attention: {error}"))
        }
        (narrow, Some(documents)) if windowed::has_windows(q) && narrow.is_causal() => {
            let pieces = documents::sequences(narrow, documents, q.device());
            crate::shim::document_attention(q, k, v, &pieces)
                .unwrap_or_else(|error| panic!("attention: {error}"))
        }
        // All blocks of a narrow band are one call.
        (Pattern::Banded(w), None) if w <= blocks::ROWS => sdpa::banded(q, k, v, w as i64),
        _ => {
            blocks::attention(q, k, v, narrow, documents).unwrap_or_else(|error| panic!("attention: {error}"))
        }
    }
}

/// The kernel, also where libtorch's attention is the faster way; with `half`, of bf16 products where the
/// CPU has to emulate them too.
fn kernel(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    pattern: Pattern,
    documents: Option<&[Documents]>,
    half: bool,
) -> Result<Tensor, OpsError> {
    let size = q.size();
    if let Some(documents) = documents {
        assert_fit(documents, &size);
    }
    crate::shim::attention(q, k, v, &plan::divide(pattern, size[2] as usize, documents), half)
}

fn assert_fit(documents: &[Documents], size: &[i64]) {
    let fits =
        documents.len() as i64 == size[0] && documents.iter().all(|of| of.positions() as i64 == size[2]);
    assert!(fits, "documents are those of each of the {} sequences of {} positions", size[0], size[2]);
}

fn has_kernel(q: &Tensor) -> bool {
    q.device() == Device::Cpu && matches!(q.kind(), Kind::Float | Kind::BFloat16)
}

/// Whether the kernel multiplies by the matrix unit, and is the faster one for all pairs too.
fn is_ours(q: &Tensor) -> bool {
    has_products(q) && q.size()[3] % 32 == 0
}

/// Whether bf16 is faster widened to fp32, in which the kernel then computes, than as libtorch multiplies it.
fn is_widened(q: &Tensor) -> bool {
    q.device() == Device::Cpu && q.kind() == Kind::BFloat16 && !has_matrix_unit()
}
