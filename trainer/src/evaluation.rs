//! Validation: the loss over held-out text, every token once, shared by the ranks.

use crate::engine::{Engine, MicroBatch};
use crate::error::TrainError;
use crate::metrics::EvalReport;
use configs::{RunConfig, Shard};
use dataloader::{DataSet, ValidationSet};
use ops::collectives::Communicator;
use std::time::Instant;

/// The held-out text of a run and this rank's share of it.
#[derive(Debug)]
pub(crate) struct Validation {
    set: ValidationSet,
    micro_batch: usize,
    /// The token that ends a document, where attention keeps to documents.
    document_end: Option<i64>,
}

impl Validation {
    /// The validation of a run; none where the configuration names no text.
    ///
    /// # Errors
    /// Data that cannot be used.
    pub(crate) fn open(config: &RunConfig) -> Result<Option<Validation>, TrainError> {
        let Some(folder) = &config.data.val else { return Ok(None) };
        let data = DataSet::open(folder)?;
        let set = ValidationSet::open(data, config.model.seq_len, config.eval.max_tokens)?;
        let end = i64::from(set.data().tokenizer().end_of_text());
        let document_end = config.data.document_mask.then_some(end);
        Ok(Some(Validation { set, micro_batch: config.batch.micro_batch, document_end }))
    }

    /// Digest of the text's tokens.
    pub(crate) fn digest(&self) -> [u8; 32] {
        self.set.data().digest()
    }

    /// The loss of the model as it is after `step` updates. Collective.
    ///
    /// # Errors
    /// Data that cannot be read, a failed collective.
    pub(crate) fn run(
        &self,
        engine: &mut Engine<'_>,
        step: u64,
        comm: &dyn Communicator,
    ) -> Result<EvalReport, TrainError> {
        let started = Instant::now();
        // The ranks' sums are gathered, not reduced, and added in the order of the text: the result
        // does not depend on their number.
        let mut sums = Vec::new();
        let share = self.set.batches(self.micro_batch, comm.rank(), comm.world_size());
        let passes = if engine.parameters().shard() == Shard::Parameters {
            most(share.len(), comm)? // those with fewer batches help the others to their weights
        } else {
            share.len()
        };
        for pass in 0..passes {
            let Some(windows) = share.get(pass) else {
                engine.loss(None)?;
                continue;
            };
            let batch = self.set.batch(windows.clone())?;
            let device = engine.parameters().device();
            let mut rows = MicroBatch::from_rows(&batch.tokens, batch.row_len, device);
            rows.keep_to_documents(&batch.tokens, batch.row_len, self.document_end);
            sums.extend(engine.loss(Some(&rows))?.to_le_bytes());
        }
        let sums = comm.all_gather_bytes(&sums)?.concat();
        let nats: f64 = sums.as_chunks().0.iter().map(|eight| f64::from_le_bytes(*eight)).sum();
        let targets = self.set.n_targets();
        Ok(EvalReport {
            step,
            val_loss: nats / targets as f64,
            bits_per_byte: nats / std::f64::consts::LN_2 / self.set.source_bytes(),
            targets,
            seconds: started.elapsed().as_secs_f64(),
        })
    }
}

/// The largest of the ranks' counts.
pub(crate) fn most(count: usize, comm: &dyn Communicator) -> Result<usize, TrainError> {
    let counts = comm.all_gather_bytes(&count.to_le_bytes())?.concat();
    Ok(counts.as_chunks().0.iter().map(|bytes| usize::from_le_bytes(*bytes)).max().unwrap_or(count))
}
