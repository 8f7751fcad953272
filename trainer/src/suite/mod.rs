//! What a trained model is measured on: the tasks of a suite, each with every number of shots, shared by the ranks.
//! Owns what is done with a model's likelihoods and texts; what is asked is laid out by `dataloader`.
//!
//! Brown et al. 2020, section 2.4; definitions as EleutherAI's lm-eval 0.4.13 has them.

mod command;
mod likelihood;
mod plot;
mod report;
mod scores;
#[cfg(test)]
mod tests;
mod writing;

pub use command::{EvalArgs, eval_command};
pub use report::Report;
pub use scores::{Score, TaskScores};

use crate::engine::Engine;
use crate::error::TrainError;
use configs::{ModelConfig, Pattern, RunConfig, Suite, SuiteKind, SuiteTask};
use dataloader::{DataSet, SuiteSet, Tokenizer};
use ops::collectives::Communicator;
use std::time::Instant;

/// A suite with its data, ready for a model.
#[derive(Debug)]
pub struct Measure {
    parts: Vec<Part>,
    seed: u64,
    batch_tokens: usize,
    tokenizer: Tokenizer,
    /// The token that ends a document, where attention keeps to documents.
    document_end: Option<i64>,
}

/// A task with one number of shots.
#[derive(Debug)]
struct Part {
    task: SuiteTask,
    shots: usize,
    set: SuiteSet,
}

impl Measure {
    /// Reads all data of a suite, for a model of this shape with this tokenizer.
    ///
    /// # Errors
    /// A model that does not read from left to right; data that is not what the suite says.
    pub fn open(
        suite: &Suite,
        model: &ModelConfig,
        tokenizer: &Tokenizer,
        document_mask: bool,
    ) -> Result<Measure, TrainError> {
        if model.attention.contains(&Pattern::Bidirectional) {
            return Err(TrainError::Refused {
                what: "the model sees the tokens that it would have to predict (attention \"bidirectional\")".into(),
                hint: "a suite asks how likely texts are, which only a model that reads from left to right can say"
                    .into(),
            });
        }
        let mut parts = Vec::new();
        for task in &suite.tasks {
            let shots = if task.kind == SuiteKind::Perplexity { &[0][..] } else { &task.shots };
            for &shots in shots {
                let set = SuiteSet::open(task, shots, suite.seed, tokenizer, model.seq_len)?;
                parts.push(Part { task: task.clone(), shots, set });
            }
        }
        let document_end = document_mask.then(|| i64::from(tokenizer.end_of_text()));
        Ok(Measure {
            parts,
            seed: suite.seed,
            batch_tokens: suite.batch_tokens,
            tokenizer: tokenizer.clone(),
            document_end,
        })
    }

    /// What a run is measured on while it goes on; none where its configuration names no suite.
    ///
    /// # Errors
    /// As [`Measure::open`]; a suite or data that cannot be read.
    pub(crate) fn of_run(config: &RunConfig) -> Result<Option<Measure>, TrainError> {
        let Some(file) = &config.eval.suite else { return Ok(None) };
        let suite = configs::load_suite(file)?;
        let sources = config.data.sources();
        let data = DataSet::open(&sources[0].path)?; // all of a mixture have one tokenizer
        Measure::open(&suite, &config.model, data.tokenizer(), config.data.document_mask).map(Some)
    }

    /// The scores of a model, in the order of the suite: the same numbers on any number of ranks, and on each of
    /// them. Collective.
    ///
    /// # Errors
    /// A failed collective.
    pub fn run(
        &self,
        engine: &mut Engine<'_>,
        comm: &dyn Communicator,
    ) -> Result<Vec<TaskScores>, TrainError> {
        let mut all = Vec::new();
        for part in &self.parts {
            let started = Instant::now();
            let (items, n) = (part.set.items(), part.set.items().len());
            let scores = match part.task.kind {
                SuiteKind::Generate => {
                    let texts = writing::texts(self, part, engine, comm)?;
                    scores::of_texts(items, &texts)
                }
                _ => {
                    let all =
                        likelihood::of_spans(&part.set, self.batch_tokens, self.document_end, engine, comm)?;
                    scores::of_likelihoods(items, &all)
                }
            };
            all.push(TaskScores {
                task: part.task.name.clone(),
                kind: part.task.kind,
                shots: part.shots,
                examples: n,
                shots_dropped: part.set.shots_dropped(),
                prompts_cut: part.set.prompts_cut(),
                scores,
                seconds: started.elapsed().as_secs_f64(),
            });
        }
        Ok(all)
    }
}
