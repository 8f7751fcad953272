//! Examples as a model reads them: each form of task as sequences of tokens, in the order in which a run sees
//! them. Owns the layout and the order; refuses to know tensors and what a model makes of them.
//!
//! Radford et al. 2018, figure 1: a text stands between a start and an extract token, two texts have a delimiter
//! between them; texts that are compared come in both orders, and each choice comes after the context.

use crate::{Answer, DataError, Order, TaskExample, Tokenizer, read_examples};
use configs::{TASK_TOKENS, TaskConfig, TaskKind};
use std::path::Path;

/// One sequence of an example.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TaskSequence {
    /// From the start token to the extract token.
    pub tokens: Vec<u32>,
    /// Where the second text begins; the length where there is none.
    pub second: usize,
}

/// An example as a model reads it.
#[derive(Debug, Clone, PartialEq)]
pub struct LaidOut {
    /// As many in each example of a set.
    pub sequences: Vec<TaskSequence>,
    /// What is right, if it is known.
    pub answer: Option<Answer>,
}

/// The examples of a file, ready for a model.
#[derive(Debug, Clone)]
pub struct TaskSet {
    examples: Vec<LaidOut>,
    digest: [u8; 32],
}

impl TaskSet {
    /// Reads and lays out a file, as [`read_examples`]. `base_vocab` is the vocabulary of the model before its
    /// three new tokens; sequences have at most `seq_len` tokens, the longer text being cut at its end.
    ///
    /// # Errors
    /// As `read_examples`; a context that has no room for two texts.
    pub fn open(
        file: &Path,
        task: &TaskConfig,
        tokenizer: &Tokenizer,
        base_vocab: usize,
        seq_len: usize,
        answers: bool,
    ) -> Result<TaskSet, DataError> {
        if seq_len < TASK_TOKENS + 2 {
            return Err(DataError::ShortContext { seq_len });
        }
        let layout = Layout { kind: task.kind, start: base_vocab as u32, seq_len };
        let mut encoder = tokenizer.encoder();
        let mut encode = |text: &String| {
            let mut tokens = Vec::new();
            encoder.encode(text.as_bytes(), &mut tokens);
            tokens
        };
        let lay_out = |TaskExample { texts, answer, .. }| {
            let texts: Vec<Vec<u32>> = texts.iter().map(&mut encode).collect();
            LaidOut { sequences: layout.sequences(&texts), answer }
        };
        let examples: Vec<LaidOut> = read_examples(file, task, answers)?.into_iter().map(lay_out).collect();
        let digest = digest_of(&examples);
        Ok(TaskSet { examples, digest })
    }

    /// How many there are, at least one.
    pub fn len(&self) -> usize {
        self.examples.len()
    }

    /// Never true.
    pub fn is_empty(&self) -> bool {
        self.examples.is_empty()
    }

    /// In the order of the file.
    pub fn examples(&self) -> &[LaidOut] {
        &self.examples
    }

    /// Sequences of each example.
    pub fn sequences_per_example(&self) -> usize {
        self.examples[0].sequences.len()
    }

    /// Digest of all sequences and answers.
    pub fn digest(&self) -> [u8; 32] {
        self.digest
    }

    /// The order of a run: which example is number i, each once an epoch.
    pub fn order(&self, seed: u64) -> Order {
        Order::new(self.digest, 1, self.len() as u64, seed)
    }
}

/// How texts become sequences.
#[derive(Debug, Clone, Copy)]
struct Layout {
    kind: TaskKind,
    /// The start token; delimiter and extract follow it.
    start: u32,
    seq_len: usize,
}

impl Layout {
    fn sequences(self, texts: &[Vec<u32>]) -> Vec<TaskSequence> {
        let pair = |first: &[u32], second: &[u32]| self.pair(first, second);
        match self.kind {
            TaskKind::Classification => vec![self.single(&texts[0])],
            TaskKind::Entailment => vec![pair(&texts[0], &texts[1])],
            TaskKind::Similarity => vec![pair(&texts[0], &texts[1]), pair(&texts[1], &texts[0])],
            TaskKind::MultipleChoice => texts[1..].iter().map(|choice| pair(&texts[0], choice)).collect(),
        }
    }

    fn single(self, text: &[u32]) -> TaskSequence {
        let text = &text[..text.len().min(self.seq_len - 2)];
        let tokens = [&[self.start], text, &[self.start + 2]].concat();
        TaskSequence { second: tokens.len(), tokens }
    }

    fn pair(self, first: &[u32], second: &[u32]) -> TaskSequence {
        let (a, b) = kept(first.len(), second.len(), self.seq_len - 3);
        let [start, delimiter, extract] = [0, 1, 2].map(|i| [self.start + i]);
        let tokens = [&start, &first[..a], &delimiter, &second[..b], &extract].concat();
        TaskSequence { second: a + 2, tokens }
    }
}

/// How much of two texts fits into `room`: of a longer one as much as the shorter leaves.
fn kept(a: usize, b: usize, room: usize) -> (usize, usize) {
    let half = room / 2;
    match (a + b <= room, a <= half, b <= half) {
        (true, ..) => (a, b),
        (_, true, _) => (a, room - a),
        (_, _, true) => (room - b, b),
        _ => (room - half, half),
    }
}

fn digest_of(examples: &[LaidOut]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"phalanx task 1");
    for example in examples {
        hasher.update(&(example.sequences.len() as u64).to_le_bytes());
        for sequence in &example.sequences {
            hasher.update(&(sequence.tokens.len() as u64).to_le_bytes());
            hasher.update(&(sequence.second as u64).to_le_bytes());
            for token in &sequence.tokens {
                hasher.update(&token.to_le_bytes());
            }
        }
        let (kind, bits) = match example.answer {
            None => (0u64, 0),
            Some(Answer::Class(class)) => (1, class as u64),
            Some(Answer::Number(number)) => (2, number.to_bits()),
        };
        hasher.update(&kind.to_le_bytes()).update(&bits.to_le_bytes());
    }
    *hasher.finalize().as_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::examples::tests::task;

    const S: u32 = 257;
    const D: u32 = 258;
    const E: u32 = 259;

    fn lay_out(kind: TaskKind, seq_len: usize, texts: &[&[u32]]) -> Vec<(Vec<u32>, usize)> {
        let texts: Vec<Vec<u32>> = texts.iter().map(|text| text.to_vec()).collect();
        let sequences = Layout { kind, start: S, seq_len }.sequences(&texts);
        sequences.into_iter().map(|sequence| (sequence.tokens, sequence.second)).collect()
    }

    #[test]
    fn each_form_has_the_sequences_of_the_paper() {
        let one = lay_out(TaskKind::Classification, 16, &[&[1, 2]]);
        assert_eq!(one, [(vec![S, 1, 2, E], 4)]);
        let entailment = lay_out(TaskKind::Entailment, 16, &[&[1, 2], &[3]]);
        assert_eq!(entailment, [(vec![S, 1, 2, D, 3, E], 4)]);
        let similarity = lay_out(TaskKind::Similarity, 16, &[&[1, 2], &[3]]);
        assert_eq!(similarity, [(vec![S, 1, 2, D, 3, E], 4), (vec![S, 3, D, 1, 2, E], 3)]);
        let choice = lay_out(TaskKind::MultipleChoice, 16, &[&[1], &[2], &[3, 4]]);
        assert_eq!(choice, [(vec![S, 1, D, 2, E], 3), (vec![S, 1, D, 3, 4, E], 3)]);
    }

    #[test]
    fn what_is_too_long_is_cut_and_keeps_its_three_tokens() {
        assert_eq!(lay_out(TaskKind::Classification, 5, &[&[1, 2, 3, 4]]), [(vec![S, 1, 2, 3, E], 5)]);
        let texts: [&[u32]; 2] = [&[1, 2, 3, 4, 5, 6], &[7, 8]];
        assert_eq!(lay_out(TaskKind::Entailment, 8, &texts), [(vec![S, 1, 2, 3, D, 7, 8, E], 5)]);
        assert_eq!(
            [kept(2, 9, 6), kept(9, 2, 6), kept(9, 9, 7), kept(3, 3, 6)],
            [(2, 4), (4, 2), (4, 3), (3, 3)]
        );
    }

    #[test]
    fn an_epoch_has_each_example_once_and_another_order_than_the_last() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("x.jsonl");
        let lines: String =
            (0..40).map(|i| format!("{{\"text\": \"number {i}\", \"label\": \"{}\"}}\n", i % 2)).collect();
        std::fs::write(&file, lines).unwrap();
        let task = task(TaskKind::Classification, &["text"], &["0", "1"]);
        let open = |seq_len| TaskSet::open(&file, &task, &Tokenizer::Bytes, 257, seq_len, true);
        let set = open(32).unwrap();
        let order = set.order(7);
        let epoch = |number: u64| -> Vec<u64> { (0..40).map(|i| order.sequence(number * 40 + i)).collect() };
        let (first, second) = (epoch(0), epoch(1));
        assert_ne!(first, second);
        for mut epoch in [first, second] {
            epoch.sort_unstable();
            assert_eq!(epoch, (0..40).collect::<Vec<u64>>());
        }
        assert_ne!(set.digest(), open(10).unwrap().digest());
        assert!(open(4).unwrap_err().to_string().contains("4 tokens"));
    }
}
