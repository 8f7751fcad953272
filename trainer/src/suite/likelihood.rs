//! How likely a model finds the last tokens of given sequences. Owns the cut into batches and their way over the
//! ranks; knows no tasks.

use crate::engine::{Engine, MicroBatch};
use crate::error::TrainError;
use dataloader::{Span, SuiteSet};
use ops::collectives::Communicator;
use tch::Tensor;

/// What a model says of a span.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Likelihood {
    /// The sum of the log-probabilities of its targets, in nats.
    pub(crate) log: f64,
    /// Whether each target is the likeliest token.
    pub(crate) greedy: bool,
}

/// Bytes of a likelihood on its way to the other ranks.
const BYTES: usize = 9;

/// The likelihood of every span of a set, in the order of its items, on every rank. Batches are made of all spans
/// and dealt out whole, so that a span is computed beside the same others on any number of ranks, and its bits are
/// the same. Collective.
///
/// # Errors
/// A failed collective.
pub(crate) fn of_spans(
    set: &SuiteSet,
    batch_tokens: usize,
    document_end: Option<i64>,
    engine: &mut Engine<'_>,
    comm: &dyn Communicator,
) -> Result<Vec<Likelihood>, TrainError> {
    let spans: Vec<&Span> = set.items().iter().flat_map(|item| &item.spans).collect();
    let lengths: Vec<usize> = spans.iter().map(|span| set.tokens(span).len()).collect();
    let batches = batches(&lengths, batch_tokens);
    let (rank, ranks) = (comm.rank(), comm.world_size());
    let mut own = Vec::new();
    for pass in 0..batches.len().div_ceil(ranks) {
        // A rank without a batch helps the others to their weights, where these are shared out.
        let Some(batch) = batches.get(pass * ranks + rank) else {
            engine.scores(None)?;
            continue;
        };
        let rows: Vec<(&[u32], usize)> =
            batch.iter().map(|&number| (set.tokens(spans[number]), spans[number].targets)).collect();
        let scores = engine.scores(Some(&micro_batch(&rows, document_end, engine.parameters().device())))?;
        let mut scores = scores.into_iter();
        for (_, targets) in rows {
            let (mut log, mut greedy) = (0.0, true);
            for (target, likeliest) in scores.by_ref().take(targets) {
                log += f64::from(target);
                greedy &= likeliest;
            }
            own.extend(log.to_le_bytes());
            own.push(u8::from(greedy));
        }
    }
    let all = comm.all_gather_bytes(&own)?;
    let mut found = vec![Likelihood { log: f64::NAN, greedy: false }; spans.len()];
    for (rank, bytes) in all.iter().enumerate() {
        let numbers = batches.iter().skip(rank).step_by(ranks).flatten();
        for (&number, bytes) in numbers.zip(bytes.chunks_exact(BYTES)) {
            let (log, greedy) = bytes.split_at(BYTES - 1);
            let log = f64::from_le_bytes(log.try_into().expect("eight bytes stand before the last"));
            found[number] = Likelihood { log, greedy: greedy[0] == 1 };
        }
    }
    Ok(found)
}

/// The numbers of each batch: the longest first, as many as make about `batch_tokens` with what pads them.
fn batches(lengths: &[usize], batch_tokens: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    order.sort_by_key(|&number| std::cmp::Reverse(lengths[number]));
    let mut batches = Vec::new();
    let mut rest = &order[..];
    while let Some(&longest) = rest.first() {
        let rows = (batch_tokens / lengths[longest].max(1)).clamp(1, rest.len());
        let (batch, after) = rest.split_at(rows);
        batches.push(batch.to_vec());
        rest = after;
    }
    batches
}

/// Rows of different lengths as one batch; what stands after a row changes nothing before it.
fn micro_batch(rows: &[(&[u32], usize)], document_end: Option<i64>, device: tch::Device) -> MicroBatch {
    let row_len = rows.iter().map(|(tokens, _)| tokens.len()).max().unwrap_or(2).max(2);
    let mut tokens = vec![0i64; rows.len() * row_len];
    let (mut targets, mut places) = (Vec::new(), Vec::new());
    for (row, ((ids, n), place)) in
        tokens.chunks_mut(row_len).zip(rows.iter().zip((0..).step_by(row_len - 1)))
    {
        for (token, &id) in row.iter_mut().zip(*ids) {
            *token = i64::from(id);
        }
        let from = ids.len() - n;
        targets.extend_from_slice(&row[from..ids.len()]);
        places.extend((from - 1..ids.len() - 1).map(|position| place + position as i64));
    }
    let mut batch = MicroBatch::from_rows(&tokens, row_len, device);
    batch.keep_to_documents(&tokens, row_len, document_end);
    batch.targets = Tensor::from_slice(&targets).to_device(device);
    batch.target_rows = Some(Tensor::from_slice(&places).to_device(device));
    batch
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_have_every_span_once_and_about_as_many_tokens_as_asked_for() {
        let lengths: Vec<usize> = (0..50).map(|i| 1 + i * 7 % 13).collect();
        for batch_tokens in [1, 13, 40, 10_000] {
            let batches = batches(&lengths, batch_tokens);
            let mut all: Vec<usize> = batches.concat();
            let padded = |batch: &Vec<usize>| batch.len() * lengths[batch[0]];
            assert!(batches.iter().all(|batch| batch.len() == 1 || padded(batch) <= batch_tokens));
            all.sort_unstable();
            assert_eq!(all, (0..50).collect::<Vec<usize>>());
        }
    }
}
