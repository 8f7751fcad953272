//! Validation: the loss over held-out text, every token once, shared by the ranks.

use crate::engine::MicroBatch;
use crate::error::TrainError;
use crate::metrics::EvalReport;
use crate::model::Gpt;
use configs::RunConfig;
use dataloader::{DataSet, ValidationSet};
use ops::collectives::Communicator;
use std::time::Instant;

/// The held-out text of a run and this rank's share of it.
#[derive(Debug)]
pub(crate) struct Validation {
    set: ValidationSet,
    micro_batch: usize,
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
        Ok(Some(Validation { set, micro_batch: config.batch.micro_batch }))
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
        model: &Gpt,
        step: u64,
        comm: &dyn Communicator,
    ) -> Result<EvalReport, TrainError> {
        let started = Instant::now();
        let share = self.set.share(comm.rank(), comm.world_size());
        let mut totals = [0.0, 0.0]; // nats, targets
        for windows in self.set.batches(share, self.micro_batch) {
            let batch = self.set.batch(windows)?;
            let rows = MicroBatch::from_rows(&batch.tokens, batch.row_len, model.device());
            let hidden = model.hidden(&rows.inputs).reshape([-1, model.config().n_embd as i64]);
            totals[0] += tch::no_grad(|| model.head().loss(&hidden, &rows.targets.reshape([-1])));
            totals[1] += rows.targets.numel() as f64;
        }
        comm.all_reduce_f64(&mut totals)?;
        let [nats, targets] = totals;
        Ok(EvalReport {
            step,
            val_loss: nats / targets,
            bits_per_byte: nats / std::f64::consts::LN_2 / self.set.source_bytes(),
            targets: targets as u64,
            seconds: started.elapsed().as_secs_f64(),
        })
    }
}
