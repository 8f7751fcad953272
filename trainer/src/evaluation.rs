//! Validation: the loss over held-out text, every token once, or those that are hidden of it, shared by the ranks.

use crate::engine::{Engine, MicroBatch};
use crate::error::TrainError;
use crate::masking::{Masking, Purpose};
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
    /// What a masked model has to find: the same each time.
    masking: Option<Masking>,
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
        let tokenizer = set.data().tokenizer();
        let end = i64::from(tokenizer.end_of_text());
        let document_end = config.data.document_mask.then_some(end);
        let masking = Masking::of(&config.model, config.run.seed, tokenizer)?;
        Ok(Some(Validation { set, micro_batch: config.batch.micro_batch, document_end, masking }))
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
        let mut sums = Vec::new(); // of each batch its nats, and its targets
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
            let mut rows = match &self.masking {
                Some(masking) => masking.batch(Purpose::Validation, windows.start, &batch, device),
                None => MicroBatch::from_rows(&batch.tokens, batch.row_len, device),
            };
            rows.keep_to_documents(&batch.tokens, batch.row_len, self.document_end);
            sums.extend(engine.loss(Some(&rows))?.to_le_bytes());
            sums.extend((rows.targets.numel() as f64).to_le_bytes());
        }
        let sums = comm.all_gather_bytes(&sums)?.concat();
        let sums: Vec<f64> = sums.as_chunks().0.iter().map(|eight| f64::from_le_bytes(*eight)).collect();
        let nats: f64 = sums.iter().step_by(2).sum();
        let targets = sums.iter().skip(1).step_by(2).sum::<f64>() as u64;
        // What is hidden is told from what is left, so its nats say nothing of the bytes of the text.
        let in_bytes =
            self.masking.is_none().then(|| nats / std::f64::consts::LN_2 / self.set.source_bytes());
        Ok(EvalReport {
            step,
            val_loss: nats / targets.max(1) as f64,
            bits_per_byte: in_bytes,
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
