//! Which tokens a masked model has to predict, and what it reads in their place. Counted, not drawn: a pure function
//! of seed, step, sample and position, so that ranks, their order and recomputation change nothing. Knows no model.
//!
//! Devlin et al. 2018, section 3.1: 15 % of the tokens are targets; of these 80 % become the mask, 10 % another
//! token, 10 % stay. Tokens that are no text, such as the end of a document, are never targets.

use crate::engine::MicroBatch;
use crate::error::TrainError;
use configs::{MASKED_SHARE, ModelConfig, Philox};
use dataloader::{Batch, Tokenizer};
use tch::{Device, Tensor};

/// Keeps these random numbers apart from those of the initial weights and of dropout, which have the same seed.
const DOMAIN: u64 = u64::from_be_bytes(*b"masking\0");

/// Of the targets, those that become the mask.
const BECOME_MASK: f64 = 0.8;

/// Of the targets, those that become the mask or a random token.
const CHANGE: f64 = 0.9;

/// For what tokens are hidden.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// The update after so many; each has other targets.
    Training(u64),
    /// Validation, which has the same targets every time.
    Validation,
}

/// What a run hides.
#[derive(Debug, Clone)]
pub(crate) struct Masking {
    seed: u64,
    mask: i64,
    /// Ids of the tokenizer.
    n_ids: u64,
    /// Those that are no text, ascending.
    specials: Vec<i64>,
}

impl Masking {
    /// That of a run's model over tokens of `tokenizer`; none where the next token is predicted.
    ///
    /// # Errors
    /// A vocabulary that has no room for the mask.
    pub(crate) fn of(
        model: &ModelConfig,
        seed: u64,
        tokenizer: &Tokenizer,
    ) -> Result<Option<Masking>, TrainError> {
        if !model.is_masked() {
            return Ok(None);
        }
        let n_ids = tokenizer.vocab_size();
        let mask = tokenizer.mask().map_or(n_ids, |mask| mask as usize);
        if mask >= model.vocab_size {
            let id = tokenizer.id();
            return Err(TrainError::Refused {
                what: format!(
                    "model.vocab_size = {} has no room for the mask: the tokenizer {id:?} has {n_ids} tokens and no \
                     [MASK], so it is the one after them",
                    model.vocab_size
                ),
                hint: format!("leave model.vocab_size out, or set it to at least {}", n_ids + 1),
            });
        }
        let specials = tokenizer.specials().into_iter().map(i64::from).collect();
        Ok(Some(Masking { seed, mask: mask as i64, n_ids: n_ids as u64, specials }))
    }

    /// How many targets rows `[rows, row_len]` have, the first of which is sample `first_sample`.
    pub(crate) fn targets(&self, purpose: Purpose, first_sample: u64, rows: &Batch) -> u64 {
        let samples = (first_sample..).zip(rows.tokens.chunks(rows.row_len));
        samples.map(|(sample, row)| self.hidden(purpose, sample, inputs_of(row)).count() as u64).sum()
    }

    /// What a model reads and predicts of rows `[rows, row_len]`: the last token of each, which only predicts
    /// where the next token is asked for, is left out.
    pub(crate) fn batch(
        &self,
        purpose: Purpose,
        first_sample: u64,
        rows: &Batch,
        device: Device,
    ) -> MicroBatch {
        let t = rows.row_len - 1;
        let mut inputs = Vec::with_capacity(rows.rows * t);
        let (mut targets, mut picked) = (Vec::new(), Vec::new());
        for (sample, row) in (first_sample..).zip(rows.tokens.chunks(rows.row_len)) {
            let (first, row) = (inputs.len(), inputs_of(row));
            inputs.extend_from_slice(row);
            for (position, becomes) in self.hidden(purpose, sample, row) {
                targets.push(row[position]);
                picked.push((first + position) as i64);
                inputs[first + position] = becomes;
            }
        }
        let on_device = |values: &[i64]| ops::device::sent(&Tensor::from_slice(values), device);
        let inputs = on_device(&inputs).view([-1, t as i64]);
        MicroBatch { target_rows: Some(on_device(&picked)), ..MicroBatch::new(inputs, on_device(&targets)) }
    }

    /// The positions of a sample that are targets, and what is read there.
    fn hidden<'a>(
        &'a self,
        purpose: Purpose,
        sample: u64,
        row: &'a [i64],
    ) -> impl Iterator<Item = (usize, i64)> + 'a {
        let (step, site) = match purpose {
            Purpose::Training(step) => (step, 0),
            Purpose::Validation => (0, 1),
        };
        let [a, b, ..] = Philox::new(self.seed ^ DOMAIN).at([
            step as u32,
            (step >> 32) as u32,
            sample as u32,
            (sample >> 32) as u32,
        ]);
        let random = Philox::new(u64::from(b) << 32 | u64::from(a));
        let target = move |(position, &token): (usize, &i64)| {
            let [chosen, change, other, _] = random.at([position as u32, 0, site, 0]);
            let hidden = below(chosen, MASKED_SHARE) && self.specials.binary_search(&token).is_err();
            hidden.then(|| {
                let becomes = match change {
                    change if below(change, BECOME_MASK) => self.mask,
                    change if below(change, CHANGE) => self.text_token(other),
                    _ => token,
                };
                (position, becomes)
            })
        };
        row.iter().enumerate().filter_map(target)
    }

    /// One of the tokens that are text, each as likely.
    fn text_token(&self, random: u32) -> i64 {
        let n_text = self.n_ids - self.specials.len() as u64;
        let number = (u64::from(random) * n_text) >> 32;
        // The ids of specials, ascending, are stepped over.
        self.specials.iter().fold(number as i64, |id, &special| if id >= special { id + 1 } else { id })
    }
}

fn inputs_of(row: &[i64]) -> &[i64] {
    &row[..row.len() - 1]
}

/// Whether a random word lies in the first `share` of all.
fn below(word: u32, share: f64) -> bool {
    f64::from(word) < share * 4_294_967_296.0
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEP: Purpose = Purpose::Training(7);

    fn masking() -> Masking {
        let model =
            ModelConfig { vocab_size: 258, objective: configs::Objective::Masked, ..ModelConfig::default() };
        Masking::of(&model, 5, &Tokenizer::Bytes).unwrap().unwrap()
    }

    /// Rows of 64 bytes and one more token; every eighth token ends a document.
    fn rows(n: usize) -> Batch {
        let tokens = (0..n * 65).map(|i| if i % 8 == 0 { 256 } else { (i * 7 % 256) as i64 }).collect();
        Batch { tokens, rows: n, row_len: 65 }
    }

    fn values(tensor: &Tensor) -> Vec<i64> {
        Vec::try_from(tensor.reshape([-1])).unwrap()
    }

    #[test]
    fn fifteen_in_a_hundred_are_targets_of_which_eight_in_ten_are_masked_and_one_changed() {
        let (n, masking) = (2000, masking());
        let rows = rows(n);
        let batch = masking.batch(STEP, 100, &rows, Device::Cpu);
        let (inputs, targets) = (values(&batch.inputs), values(&batch.targets));
        let picked = values(batch.target_rows.as_ref().unwrap());
        assert_eq!(targets.len() as u64, masking.targets(STEP, 100, &rows));
        assert!(!targets.contains(&256), "the end of a document is a target");
        let text = (0..n * 65).filter(|i| i % 65 != 64 && rows.tokens[*i] != 256).count();
        let near = |got: usize, of: usize, share: f64| (got as f64 / of as f64 - share).abs() < 0.01;
        assert!(near(targets.len(), text, 0.15), "{} of {text}", targets.len());
        let read: Vec<i64> = picked.iter().map(|&row| inputs[row as usize]).collect();
        let masked = read.iter().filter(|&&token| token == 257).count();
        let stayed = read.iter().zip(&targets).filter(|(read, target)| read == target).count();
        assert!(near(masked, targets.len(), 0.8), "{masked} of {}", targets.len());
        assert!(near(stayed, targets.len(), 0.1 + 0.1 / 256.0), "{stayed} of {}", targets.len());
        assert!(!read.contains(&256), "a random token is a special one");
        // What is no target stands where it stood.
        let mut restored = inputs;
        picked.iter().zip(&targets).for_each(|(&row, &target)| restored[row as usize] = target);
        let whole: Vec<i64> = rows.tokens.chunks(65).flat_map(|row| row[..64].to_vec()).collect();
        assert_eq!(restored, whole);
    }

    #[test]
    fn a_sample_has_the_same_targets_in_whatever_batch_it_is_and_others_in_another_step() {
        let (masking, all) = (masking(), rows(6));
        let whole = values(&masking.batch(STEP, 40, &all, Device::Cpu).inputs);
        let part = Batch { tokens: all.tokens[2 * 65..4 * 65].to_vec(), rows: 2, row_len: 65 };
        let of = |purpose, first| values(&masking.batch(purpose, first, &part, Device::Cpu).inputs);
        assert_eq!(of(STEP, 42), whole[2 * 64..4 * 64]);
        let others = [of(Purpose::Training(8), 42), of(Purpose::Validation, 42), of(STEP, 43)];
        assert!(others.iter().all(|other| *other != of(STEP, 42)));
        assert_eq!(of(Purpose::Validation, 42), of(Purpose::Validation, 42));
    }

    #[test]
    fn random_tokens_step_over_the_special_ones() {
        let masking = Masking { seed: 0, mask: 4, n_ids: 8, specials: vec![0, 1, 4, 7] };
        let edges = [0, 1 << 30, 1 << 31, 3 << 30, u32::MAX].map(|random| masking.text_token(random));
        assert_eq!(edges, [2, 3, 5, 6, 6]);
    }

    #[test]
    fn a_vocabulary_without_room_for_the_mask_is_refused() {
        let model =
            ModelConfig { vocab_size: 257, objective: configs::Objective::Masked, ..ModelConfig::default() };
        let error = Masking::of(&model, 5, &Tokenizer::Bytes).unwrap_err().to_string();
        assert!(error.contains("model.vocab_size = 257") && error.contains("at least 258"), "{error}");
    }
}
