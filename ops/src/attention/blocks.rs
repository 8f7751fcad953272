//! Attention in blocks of queries, for what no kernel takes: libtorch's under a mask, of one block at a time, made
//! where it is used. Knows which keys a block reads and which of them each query sees; not what computes them.

use super::assert_fit;
use crate::outside::{Backward, differentiable};
use crate::{OpsError, device};
use configs::{Documents, Pattern};
use std::ops::Range;
use tch::{Device, Kind, Tensor};

/// Queries of a block: enough for a GPU to be busy with, few enough for the masks of a long context.
pub(super) const ROWS: usize = 256;

/// As [`attention`](super::attention). Keeps its inputs for backward, which computes each block again. Beyond inputs,
/// output and gradients both take memory for one block: the mask of `ROWS` x T of each sequence, and where libtorch
/// has no fused attention for the kind and size of the heads as many scores of each head.
pub(super) fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    pattern: Pattern,
    documents: Option<&[Documents]>,
) -> Result<Tensor, OpsError> {
    let size = q.size();
    if let Some(documents) = documents {
        assert_fit(documents, &size);
    }
    let blocks = Blocks::of(pattern, size[2] as usize, documents, q.device());
    let inputs = [q, k, v].map(Tensor::detach);
    let out = tch::no_grad(|| blocks.forward(&inputs))?;
    let backward: Backward = Box::new(move |arrived| match &arrived[0] {
        Some(grad) => Ok(blocks.backward(&inputs, grad)?.map(Some).into()),
        None => Ok(vec![None, None, None]),
    });
    differentiable(&[q, k, v], &[&out], backward)?;
    Ok(out)
}

/// Positions of queries, and of the keys that they read.
#[derive(Debug, PartialEq, Eq)]
struct Block {
    queries: Range<usize>,
    keys: Range<usize>,
}

impl Block {
    fn of(pattern: Pattern, queries: Range<usize>, t: usize, documents: Option<&[Documents]>) -> Block {
        let (first, end) = match pattern {
            Pattern::Banded(w) => ((queries.start + 1).saturating_sub(w), queries.end),
            Pattern::Bidirectional => (0, t),
            Pattern::Dense | Pattern::Strided(_) | Pattern::Fixed(..) => (0, queries.end),
        };
        // The first query's document begins before all others' of the block, and the last one's ends after them.
        let documents = documents.unwrap_or_default().iter();
        let begin = documents.clone().map(|of| of.around(queries.start).start).min();
        let last = documents.map(|of| of.around(queries.end - 1).end).max();
        let keys = first.max(begin.unwrap_or(0))..end.min(last.unwrap_or(t));
        Block { queries, keys }
    }

    /// The block's part of queries, keys and values `[B, H, T, D]`.
    fn parts(&self, [q, k, v]: &[Tensor; 3]) -> [Tensor; 3] {
        [of_rows(q, &self.queries), of_rows(k, &self.keys), of_rows(v, &self.keys)]
    }
}

/// Some positions of `[B, H, T, D]`, as they lie there.
fn of_rows(x: &Tensor, rows: &Range<usize>) -> Tensor {
    x.narrow(2, rows.start as i64, rows.len() as i64)
}

/// All blocks of a pattern, and what it takes to make their masks.
#[derive(Debug)]
struct Blocks {
    blocks: Vec<Block>,
    pattern: Pattern,
    /// Where the document of each position begins, `[B, T]` i32.
    begins: Option<Tensor>,
    device: Device,
}

impl Blocks {
    fn of(pattern: Pattern, t: usize, documents: Option<&[Documents]>, device: Device) -> Blocks {
        let queries = (0..t).step_by(ROWS).map(|begin| begin..t.min(begin + ROWS));
        let blocks = queries.map(|queries| Block::of(pattern, queries, t, documents)).collect();
        let begins = documents.map(|documents| {
            let of_one = |of: &Documents| -> Vec<i32> { (0..t).map(|i| of.around(i).start as i32).collect() };
            let all: Vec<i32> = documents.iter().flat_map(of_one).collect();
            device::sent(&Tensor::from_slice(&all).view([documents.len() as i64, t as i64]), device)
        });
        Blocks { blocks, pattern, begins, device }
    }

    fn forward(&self, inputs: &[Tensor; 3]) -> Result<Tensor, OpsError> {
        let out = inputs[0].f_empty_like()?;
        for block in &self.blocks {
            of_rows(&out, &block.queries).f_copy_(&self.attend(block, &block.parts(inputs))?)?;
        }
        Ok(out)
    }

    /// The gradients of queries, keys and values. Those of keys, which several blocks read, are added up in fp32 at
    /// least, block by block.
    fn backward(&self, inputs: &[Tensor; 3], grad: &Tensor) -> Result<[Tensor; 3], OpsError> {
        let (size, kind) = (inputs[0].size(), inputs[0].kind());
        let wide = if kind == Kind::Double { kind } else { Kind::Float };
        let of_queries = inputs[0].f_empty_like()?;
        let sums = || Tensor::f_zeros(size.as_slice(), (wide, self.device));
        let (of_keys, of_values) = (sums()?, sums()?);
        for block in &self.blocks {
            let leaves = block.parts(inputs).map(|part| part.set_requires_grad(true));
            let out = tch::with_grad(|| self.attend(block, &leaves))?;
            crate::backward(&out, &of_rows(grad, &block.queries))?;
            of_rows(&of_queries, &block.queries).f_copy_(&leaves[0].f_grad()?)?;
            let _ = of_rows(&of_keys, &block.keys).f_add_(&leaves[1].f_grad()?)?;
            let _ = of_rows(&of_values, &block.keys).f_add_(&leaves[2].f_grad()?)?;
        }
        Ok([of_queries, of_keys.f_to_kind(kind)?, of_values.f_to_kind(kind)?])
    }

    fn attend(&self, block: &Block, [q, k, v]: &[Tensor; 3]) -> Result<Tensor, OpsError> {
        let seen = tch::no_grad(|| self.seen(block));
        Ok(Tensor::f_scaled_dot_product_attention(q, k, v, seen.as_ref(), 0.0, false, None, false)?)
    }

    /// Which of its keys each query of the block sees, true, `[1, 1, queries, keys]`, or with documents
    /// `[B, 1, queries, keys]`; none where all see all.
    fn seen(&self, block: &Block) -> Option<Tensor> {
        let positions = |of: &Range<usize>| {
            Tensor::arange_start(of.start as i64, of.end as i64, (Kind::Int64, self.device))
        };
        let kept =
            kept(self.pattern, &positions(&block.queries).view([1, 1, -1, 1]), &positions(&block.keys));
        let together = self.begins.as_ref().map(|begins| {
            let of = |rows: &Range<usize>| begins.narrow(1, rows.start as i64, rows.len() as i64);
            let (queries, keys) = (of(&block.queries).unsqueeze(2), of(&block.keys).unsqueeze(1));
            queries.eq_tensor(&keys).unsqueeze(1)
        });
        match (kept, together) {
            (Some(kept), Some(together)) => Some(kept.logical_and(&together)),
            (one, other) => one.or(other),
        }
    }
}

/// [`Pattern::allows`] of each query at `[.., R, 1]` and key at `[K]`, `[.., R, K]`; none where it is always so.
fn kept(pattern: Pattern, q: &Tensor, k: &Tensor) -> Option<Tensor> {
    let so_far = k.le_tensor(q);
    let among_last = |w: usize| (k + w as i64).gt_tensor(q);
    match pattern {
        Pattern::Dense => Some(so_far),
        Pattern::Banded(w) => Some(so_far.logical_and(&among_last(w))),
        Pattern::Strided(l) => {
            let strides_apart = k.remainder(l as i64).eq_tensor(&q.remainder(l as i64));
            Some(so_far.logical_and(&among_last(l).logical_or(&strides_apart)))
        }
        Pattern::Fixed(l, c) => {
            let block_of = |x: &Tensor| x.floor_divide_scalar(l as i64);
            let own = block_of(k).eq_tensor(&block_of(q));
            Some(so_far.logical_and(&own.logical_or(&k.remainder(l as i64).ge((l - c) as i64))))
        }
        Pattern::Bidirectional => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(pattern: &str, documents: Option<&[Documents]>) -> Vec<Range<usize>> {
        let blocks = Blocks::of(pattern.parse().unwrap(), 600, documents, Device::Cpu).blocks;
        let queries: Vec<Range<usize>> = blocks.iter().map(|block| block.queries.clone()).collect();
        assert_eq!(queries, [0..256, 256..512, 512..600]);
        blocks.into_iter().map(|block| block.keys).collect()
    }

    #[test]
    fn a_block_reads_no_key_that_its_pattern_hides_from_all_its_queries() {
        assert_eq!(keys("dense", None), [0..256, 0..512, 0..600]);
        assert_eq!(keys("banded:1", None), [0..256, 256..512, 512..600]);
        assert_eq!(keys("banded:300", None), [0..256, 0..512, 213..600]);
        assert_eq!(keys("bidirectional", None), [0..600, 0..600, 0..600]);
    }

    #[test]
    fn a_block_reads_no_key_of_other_documents_than_its_queries_are_in() {
        let documents = [[100, 400], [200, 550]].map(|at| Documents::beginning(600, |i| at.contains(&i)));
        assert_eq!(keys("dense", Some(&documents)), [0..256, 100..512, 200..600]);
        assert_eq!(keys("dense", Some(&documents[..1])), [0..256, 100..512, 400..600]);
        assert_eq!(keys("banded:50", Some(&documents)), [0..256, 207..512, 463..600]);
        assert_eq!(keys("bidirectional", Some(&documents)), [0..550, 100..600, 200..600]);
    }
}
