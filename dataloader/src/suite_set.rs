//! A task of a suite as tokens: the sequences whose likelihood a model is asked for, or the prompts that it goes
//! on from. Owns how context and answer become tokens, how windows slide, and what gives way in a prompt that is
//! too long; refuses to know what a model says.

use crate::prompts::{Examples, Row};
use crate::rows::{missing, read_rows, wrong};
use crate::{DataError, DataSet, Encoder, Tokenizer};
use configs::{Overlong, SuiteKind, SuiteTask, Template};
use serde_json::Value;
use std::ops::Range;
use std::path::Path;

/// Some tokens in a row, of which the last are predicted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    /// Which of the set's sequences it is cut from.
    sequence: usize,
    /// Where: at most the context and one token more.
    tokens: Range<usize>,
    /// How many of the last are predicted, at least one, and at most all but the first.
    pub targets: usize,
}

/// What is asked about one example.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Asked {
    /// How likely a document of so many bytes and words is, over all of its spans.
    Document {
        /// UTF-8.
        bytes: usize,
        /// White space and one more: as many as it parts.
        words: usize,
    },
    /// How likely the last word is: one span.
    Word,
    /// Which choice is the likeliest: a span for each, and as many again without the question where these differ.
    Choice {
        /// Bytes of each answer, white space at its beginning left out.
        bytes: Vec<usize>,
        /// The number of the right one.
        right: usize,
    },
    /// What follows a prompt: one span, the prompt, of which nothing is predicted.
    Text {
        /// What should.
        right: String,
    },
}

/// One example.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SuiteItem {
    /// In the order in which `asked` has them.
    pub spans: Vec<Span>,
    /// What is asked.
    pub asked: Asked,
}

/// A task of a suite, for one number of shots, ready for a model.
#[derive(Debug, Clone, Default)]
pub struct SuiteSet {
    sequences: Vec<Vec<u32>>,
    items: Vec<SuiteItem>,
    shots_dropped: u64,
    prompts_cut: u64,
}

impl SuiteSet {
    /// Reads the data of a task and lays it out for a model that reads `seq_len` tokens, with `shots` examples
    /// before each.
    ///
    /// # Errors
    /// Data that cannot be read, the first example that is not what the task says, too few to draw from, and
    /// prompts that are too long where the task refuses these.
    pub fn open(
        task: &SuiteTask,
        shots: usize,
        seed: u64,
        tokenizer: &Tokenizer,
        seq_len: usize,
    ) -> Result<SuiteSet, DataError> {
        let mut maker = Maker {
            task,
            seq_len,
            end: tokenizer.end_of_text(),
            encoder: tokenizer.encoder(),
            set: SuiteSet::default(),
        };
        if task.kind == SuiteKind::Perplexity {
            maker.documents(tokenizer)?;
        } else {
            maker.examples(shots, seed)?;
        }
        Ok(maker.set)
    }

    /// In the order of the data, at least one.
    pub fn items(&self) -> &[SuiteItem] {
        &self.items
    }

    /// The tokens of a span.
    pub fn tokens(&self, span: &Span) -> &[u32] {
        &self.sequences[span.sequence][span.tokens.clone()]
    }

    /// Shots that were left out because a prompt was too long, over all examples.
    pub fn shots_dropped(&self) -> u64 {
        self.shots_dropped
    }

    /// Examples whose prompt was too long without any shot, and lost its beginning.
    pub fn prompts_cut(&self) -> u64 {
        self.prompts_cut
    }
}

/// A set that is being made.
struct Maker<'a> {
    task: &'a SuiteTask,
    seq_len: usize,
    /// What stands before a text that nothing stands before.
    end: u32,
    encoder: Encoder<'a>,
    set: SuiteSet,
}

impl Maker<'_> {
    fn encode(&mut self, text: &str) -> Vec<u32> {
        let mut tokens = Vec::new();
        self.encoder.encode(text.as_bytes(), &mut tokens);
        tokens
    }

    fn documents(&mut self, tokenizer: &Tokenizer) -> Result<(), DataError> {
        let (file, most) = (self.task.data.as_path(), self.task.max_examples.unwrap_or(usize::MAX));
        let extension = file.extension().map(|extension| extension.to_string_lossy().to_lowercase());
        match extension.as_deref() {
            Some("txt" | "md") => {
                let bytes = std::fs::read(file).map_err(DataError::io(file, "read"))?;
                self.text(&String::from_utf8_lossy(&bytes));
            }
            Some("jsonl" | "json" | "csv" | "tsv") => {
                for (line, fields) in read_rows(file)?.into_iter().take(most) {
                    let name = &self.task.text;
                    let text = match fields.get(name) {
                        Some(Value::String(text)) => Ok(text),
                        Some(other) => Err(format!("got {other}, expected text")),
                        None => Err(missing(&fields)),
                    };
                    self.text(text.map_err(|what| wrong(file, line, name, what))?);
                }
            }
            _ => self.folder(file, tokenizer, most)?,
        }
        if self.set.items.is_empty() { Err(DataError::NoExamples { file: file.into() }) } else { Ok(()) }
    }

    fn text(&mut self, text: &str) {
        let tokens = self.encode(text);
        self.document(&tokens, text);
    }

    fn folder(&mut self, folder: &Path, tokenizer: &Tokenizer, most: usize) -> Result<(), DataError> {
        let data = DataSet::open(folder)?;
        if data.tokenizer() != tokenizer {
            let (got, expected) = (data.tokenizer().id(), tokenizer.id());
            return Err(DataError::ForeignTokens { folder: folder.into(), got, expected });
        }
        for number in 0..data.documents().min(most as u64) {
            let place = data.bare_document(number)?;
            let mut tokens = vec![0; (place.end - place.start) as usize];
            data.read(place.start, &mut tokens)?;
            let tokens: Vec<u32> = tokens.into_iter().map(|token| token as u32).collect();
            self.document(&tokens, &String::from_utf8_lossy(&tokenizer.decode(&tokens)));
        }
        Ok(())
    }

    /// A document after the end of another, in windows; an empty one asks nothing.
    fn document(&mut self, tokens: &[u32], text: &str) {
        if tokens.is_empty() {
            return;
        }
        let sequence = self.set.sequences.len();
        let spans = windows(tokens.len(), self.seq_len, self.task.stride.unwrap_or(self.seq_len))
            .map(|(tokens, targets)| Span { sequence, tokens, targets })
            .collect();
        self.set.sequences.push([&[self.end], tokens].concat());
        let asked = Asked::Document { bytes: text.len(), words: words(text) };
        self.set.items.push(SuiteItem { spans, asked });
    }

    fn examples(&mut self, shots: usize, seed: u64) -> Result<(), DataError> {
        let task = self.task;
        let asked = Examples::open(&task.data, task, task.max_examples)?;
        let train = match (&task.train, shots) {
            (_, 0) => None,
            (None, _) => Some(Examples::open(&task.data, task, None)?),
            (Some(train), _) => Some(Examples::open(train, task, None)?),
        };
        for (number, row) in asked.rows().iter().enumerate() {
            let drawn = match &train {
                Some(train) => train.shots((number as u64, task.train.is_none()), shots, seed)?,
                None => Vec::new(),
            };
            let item = self.example(row, &drawn).map_err(|what| asked.wrong(row, "", what))?;
            self.set.items.push(item);
        }
        Ok(())
    }

    /// One example with its shots, as many of the last as there is room for.
    fn example(&mut self, row: &Row, shots: &[&Row]) -> Result<SuiteItem, String> {
        let task = self.task;
        let fill = |row: &Row, choice: usize| -> Result<[String; 2], String> {
            let part = |template| {
                row.fill(template, choice).map_err(|(field, what)| format!("field {field:?}: {what}"))
            };
            Ok([part(&task.prompt)?, part(&task.answer)?])
        };
        let head = if task.description.is_empty() {
            String::new()
        } else {
            format!("{}{}", task.description, task.separator)
        };
        let shots: Vec<String> = shots
            .iter()
            .map(|shot| Ok(fill(shot, shot.right)?.concat() + &task.separator))
            .collect::<Result<_, String>>()?;
        let own =
            (0..row.choices.len().max(1)).map(|choice| fill(row, choice)).collect::<Result<Vec<_>, _>>()?;
        let generates = task.kind == SuiteKind::Generate;
        let room =
            if generates { (self.seq_len + 1).saturating_sub(task.max_tokens) } else { self.seq_len + 1 };
        let mut dropped = 0;
        let pairs = loop {
            let before = format!("{head}{}", shots[dropped..].concat());
            let pairs: Vec<(Vec<u32>, usize)> = own
                .iter()
                .map(|[prompt, answer]| {
                    self.pair(&format!("{before}{prompt}"), if generates { "" } else { answer })
                })
                .collect();
            if dropped == shots.len() || pairs.iter().all(|(tokens, _)| tokens.len() <= room) {
                break pairs;
            }
            dropped += 1;
        };
        let longest = pairs.iter().map(|(tokens, _)| tokens.len()).max().unwrap_or(0);
        if task.overlong == Overlong::Refuse && (dropped > 0 || longest > room) {
            return Err(format!(
                "the prompt with its answer has {longest} tokens with {} of {} shots, and there is room for {room}",
                shots.len() - dropped,
                shots.len()
            ));
        }
        self.set.shots_dropped += dropped as u64;
        self.set.prompts_cut += u64::from(longest > room);
        let mut spans = Vec::new();
        for (tokens, targets) in pairs {
            spans.push(self.span(tokens, targets, room, generates)?);
        }
        let asked = match task.kind {
            SuiteKind::Perplexity | SuiteKind::LastWord => Asked::Word,
            SuiteKind::MultipleChoice => {
                if unconditional_differs(task) {
                    for [_, answer] in &own {
                        let (tokens, targets) = self.pair(&task.unconditional, answer);
                        spans.push(self.span(tokens, targets, room, false)?);
                    }
                }
                let bytes = own.iter().map(|[_, answer]| answer.trim_start().len()).collect();
                Asked::Choice { bytes, right: row.right }
            }
            SuiteKind::Generate => Asked::Text { right: own[0][1].trim().to_string() },
        };
        Ok(SuiteItem { spans, asked })
    }

    /// Context and answer as tokens, and how many of these are the answer's: those that come after as many as
    /// the context has by itself. White space at the context's end goes to the answer, as tokenizers have it.
    fn pair(&mut self, context: &str, answer: &str) -> (Vec<u32>, usize) {
        let kept = if answer.is_empty() { context } else { context.trim_end() };
        let whole = self.encode(&format!("{context}{answer}"));
        let before = self.encode(kept).len();
        let targets = whole.len().saturating_sub(before);
        if before > 0 {
            return (whole, targets);
        }
        ([&[self.end], &whole[..]].concat(), targets)
    }

    /// A sequence of its own, without its beginning if it is longer than `room`.
    fn span(
        &mut self,
        tokens: Vec<u32>,
        targets: usize,
        room: usize,
        generates: bool,
    ) -> Result<Span, String> {
        let from = tokens.len().saturating_sub(room);
        if !generates && targets == 0 {
            return Err("the answer has no token of its own".into());
        }
        if targets >= tokens.len() - from || room == 0 {
            return Err(format!("its answer alone fills the context of {} tokens", self.seq_len));
        }
        self.set.sequences.push(tokens);
        let sequence = self.set.sequences.len() - 1;
        Ok(Span { sequence, tokens: from..self.set.sequences[sequence].len(), targets })
    }
}

/// Whether the likelihood of an answer without the question says something: it is the choices that differ in it.
fn unconditional_differs(task: &SuiteTask) -> bool {
    let has_choice = |template: &Template| template.fields().any(|field| field == "choice");
    has_choice(&task.answer) && !has_choice(&task.prompt)
}

/// Windows over a document of `n` tokens after one more, as ranges of these n + 1, each with the number of its last
/// tokens that are predicted: the first fills the context, every later one moves on by `stride` and reads as much as
/// the context holds. Each token is predicted once.
fn windows(n: usize, seq_len: usize, stride: usize) -> impl Iterator<Item = (Range<usize>, usize)> {
    let (first, stride) = (n.min(seq_len), stride.min(seq_len));
    let later = (first..n).step_by(stride).map(move |done| {
        let end = n.min(done + stride);
        (end - seq_len..end + 1, end - done)
    });
    std::iter::once((0..first + 1, first)).chain(later)
}

/// Words as lm-eval counts them: the pieces between runs of white space, empty ones at the ends included.
fn words(text: &str) -> usize {
    let is_space = |c: char| c.is_whitespace() || ('\x1c'..='\x1f').contains(&c);
    let mut after_space = false;
    let runs = text.chars().filter(|&c| {
        let begins = is_space(c) && !after_space;
        after_space = is_space(c);
        begins
    });
    1 + runs.count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use configs::load_suite;

    /// The only task of a suite whose files lie in a folder.
    struct Bench {
        folder: tempfile::TempDir,
    }

    impl Bench {
        fn new(files: &[(&str, &str)]) -> Bench {
            let folder = tempfile::tempdir().unwrap();
            for (name, text) in files {
                std::fs::write(folder.path().join(name), text).unwrap();
            }
            Bench { folder }
        }

        fn task(&self, text: &str) -> SuiteTask {
            let file = self.folder.path().join("suite.toml");
            std::fs::write(&file, format!("[[task]]\nname = \"t\"\n{text}")).unwrap();
            let mut task = load_suite(&file).unwrap().tasks.remove(0);
            task.data = self.folder.path().join(task.data);
            task.train = task.train.map(|train| self.folder.path().join(train));
            task
        }

        fn open(&self, task: &str, shots: usize, seed: u64, seq_len: usize) -> Result<SuiteSet, String> {
            let task = self.task(task);
            SuiteSet::open(&task, shots, seed, &Tokenizer::Bytes, seq_len).map_err(|error| error.to_string())
        }
    }

    fn text(set: &SuiteSet, item: usize, span: usize) -> (String, usize) {
        let span = &set.items()[item].spans[span];
        let bytes: Vec<u8> =
            set.tokens(span).iter().map(|&token| if token == 256 { b'@' } else { token as u8 }).collect();
        (String::from_utf8(bytes).unwrap(), span.targets)
    }

    #[test]
    fn windows_predict_every_token_once_with_as_much_context_as_the_stride_leaves() {
        for (n, seq_len, stride) in
            [(1, 8, 8), (8, 8, 3), (9, 8, 8), (30, 8, 8), (30, 8, 3), (30, 8, 1), (5, 8, 99)]
        {
            let mut done = 0;
            for (number, (range, targets)) in windows(n, seq_len, stride).enumerate() {
                assert_eq!(range.end, done + targets + 1);
                assert!(range.len() <= seq_len + 1);
                assert!(number == 0 || range.len() == seq_len + 1 && targets <= stride);
                done += targets;
            }
            assert_eq!(done, n);
        }
    }

    #[test]
    fn words_are_counted_as_lm_eval_does() {
        // len(re.split(r"\s+", text))
        for (text, expected) in
            [("one", 1), ("one two", 2), (" one\n\ttwo ", 4), ("", 1), ("a\u{a0}b\x1cc", 3)]
        {
            assert_eq!(words(text), expected, "{text:?}");
        }
    }

    #[test]
    fn the_last_word_is_what_comes_after_the_last_space() {
        let bench = Bench::new(&[("x.jsonl", "{\"text\": \"to be or not\"}\n{\"text\": \"the end\"}\n")]);
        let last = "kind = \"last_word\"\ndata = \"x.jsonl\"\n";
        let set = bench.open(last, 0, 1, 64).unwrap();
        assert_eq!([text(&set, 0, 0), text(&set, 1, 0)], [("to be or not".into(), 4), ("the end".into(), 4)]);
        let set = bench.open(&format!("{last}prompt = \"{{context}} ____. ->\""), 1, 1, 64).unwrap();
        assert_eq!(text(&set, 0, 0), ("the ____. -> end\n\nto be or ____. -> not".into(), 4));
        let bench = Bench::new(&[("x.jsonl", "{\"text\": \"a b\"}\n{\"text\": \"one \"}\n")]);
        let told = bench.open(last, 0, 1, 64).unwrap_err();
        assert!(told.contains("x.jsonl:2: field \"text\": got \"one \", expected words"), "{told}");
    }

    const CHOICES: &str = "{\"q\": \"big?\", \"choices\": [\"yes\", \"no\"], \"label\": 1}\n";

    #[test]
    fn each_choice_stands_after_the_question_and_after_nothing_but_the_answers_context() {
        let bench = Bench::new(&[("x.jsonl", CHOICES)]);
        let choice = "kind = \"multiple_choice\"\ndata = \"x.jsonl\"\nprompt = \"{q}\"\n";
        let set = bench.open(choice, 0, 1, 64).unwrap();
        let spans: Vec<(String, usize)> = (0..4).map(|span| text(&set, 0, span)).collect();
        let expected = [("big? yes", 4), ("big? no", 3), ("Answer: yes", 4), ("Answer: no", 3)];
        assert_eq!(spans, expected.map(|(text, targets)| (text.to_string(), targets)));
        assert_eq!(set.items()[0].asked, Asked::Choice { bytes: vec![3, 2], right: 1 });
        // Where the choice stands in the question, what follows it is scored, and needs no other context.
        let partial =
            "kind = \"multiple_choice\"\ndata = \"x.jsonl\"\nprompt = \"{choice}\"\nanswer = \" {q}\"\n";
        let set = bench.open(partial, 0, 1, 64).unwrap();
        assert_eq!(set.items()[0].spans.len(), 2);
        assert_eq!(text(&set, 0, 0), ("yes big?".into(), 5));
        // Nothing before the answer: the end of another text.
        let bare = "kind = \"multiple_choice\"\ndata = \"x.jsonl\"\nprompt = \"\"\nanswer = \"{choice}\"\n";
        assert_eq!(text(&bench.open(bare, 0, 1, 64).unwrap(), 0, 0), ("@yes".into(), 3));
    }

    #[test]
    fn wrong_examples_are_told_with_file_line_and_field() {
        let choice = "kind = \"multiple_choice\"\ndata = \"x.jsonl\"\nprompt = \"{q}\"\n";
        for (second, told) in [
            (r#"{"q": "a", "choices": ["b"], "label": 0}"#, "x.jsonl:2: field \"choices\": got 1 choices"),
            (r#"{"q": "a", "choices": ["b", "c"], "label": 2}"#, "x.jsonl:2: field \"label\": got \"2\""),
            (
                r#"{"x": "a", "choices": ["b", "c"], "label": 1}"#,
                "x.jsonl:2: field \"q\": is not there; there are",
            ),
            (r#"{"q": "a", "choices": ["b", 7], "label": 1}"#, "x.jsonl:2: field \"choices\": 7 is no text"),
        ] {
            let bench = Bench::new(&[("x.jsonl", &format!("{CHOICES}{second}\n"))]);
            let error = bench.open(choice, 0, 1, 64).unwrap_err();
            assert!(error.contains(told), "{error}");
        }
        let bench = Bench::new(&[("x.jsonl", CHOICES)]);
        let error = bench.open(choice, 1, 1, 64).unwrap_err();
        assert!(error.contains("0 examples to draw 1 shots from"), "{error}");
        let error = bench.open(&format!("{choice}labels = [\"a\", \"b\"]"), 0, 1, 64).unwrap_err();
        assert!(error.contains("expected one of task.labels: a, b"), "{error}");
    }

    fn numbered(n: usize) -> String {
        (0..n).map(|i| format!("{{\"question\": \"q{i:02}\", \"answer\": \"a{i:02}\"}}\n")).collect()
    }

    const GENERATE: &str = "kind = \"generate\"\ndata = \"x.jsonl\"\nmax_tokens = 4\nseparator = \"|\"\n";

    #[test]
    fn shots_are_drawn_by_seed_and_example_and_more_begin_with_those_of_fewer() {
        let bench = Bench::new(&[("x.jsonl", &numbered(9)), ("train.jsonl", &numbered(40))]);
        let prompts = |more: &str, shots, seed| -> Vec<String> {
            let set = bench.open(&format!("{GENERATE}{more}"), shots, seed, 999).unwrap();
            (0..9).map(|item| text(&set, item, 0).0).collect()
        };
        let train = "train = \"train.jsonl\"\n";
        let four = prompts(train, 4, 7);
        assert_eq!(four, prompts(train, 4, 7));
        assert_ne!(four, prompts(train, 4, 8));
        assert_ne!(four[0][..8], four[1][..8]);
        let two = prompts(train, 2, 7);
        for (few, more) in two.iter().zip(&four) {
            assert_eq!((&few[..16], few.matches('|').count()), (&more[..16], 2));
        }
        // Drawn from the examples themselves: never the one that is asked.
        for (number, prompt) in prompts("", 8, 7).iter().enumerate() {
            assert_eq!(prompt.matches(&format!("q{number:02}")).count(), 1, "{prompt}");
            assert_eq!(prompt.matches(" a").count(), 8);
        }
    }

    #[test]
    fn a_long_prompt_loses_its_first_shots_and_then_its_beginning_and_both_are_counted() {
        let bench = Bench::new(&[("x.jsonl", &numbered(9))]);
        // A shot has 8 tokens, the question 3, and 4 are written, the last of which is not read.
        let set = bench.open(GENERATE, 4, 7, 8 + 8 + 3 + 3).unwrap();
        assert_eq!((set.shots_dropped(), set.prompts_cut()), (18, 0));
        assert_eq!(text(&set, 0, 0).0.matches('|').count(), 2);
        let whole = bench.open(GENERATE, 4, 7, 99).unwrap();
        assert!(text(&whole, 0, 0).0.ends_with(&text(&set, 0, 0).0));
        let set = bench.open(GENERATE, 4, 7, 5).unwrap();
        assert_eq!((set.shots_dropped(), set.prompts_cut(), text(&set, 3, 0).0), (36, 9, "03".into()));
        let told = bench.open(&format!("{GENERATE}overlong = \"refuse\""), 4, 7, 30).unwrap_err();
        assert!(told.contains("x.jsonl:1:") && told.contains("room for 27"), "{told}");
        let told = bench.open(GENERATE, 0, 7, 3).unwrap_err();
        assert!(told.contains("x.jsonl:1:") && told.contains("context of 3 tokens"), "{told}");
    }

    #[test]
    fn documents_are_lines_or_a_folder_of_the_models_tokens() {
        let bench = Bench::new(&[
            ("x.jsonl", "{\"text\": \"one two\"}\n{\"text\": \"\"}\n{\"text\": \"3\"}\n"),
            ("x.txt", "one two\n"),
        ]);
        let set = bench.open("kind = \"perplexity\"\ndata = \"x.jsonl\"\n", 0, 1, 4).unwrap();
        assert_eq!(set.items().len(), 2); // an empty one has nothing to predict
        assert_eq!(set.items()[0].asked, Asked::Document { bytes: 7, words: 2 });
        assert_eq!([text(&set, 0, 0), text(&set, 0, 1)], [("@one ".into(), 4), ("e two".into(), 3)]);
        let set = bench.open("kind = \"perplexity\"\ndata = \"x.txt\"\n", 0, 1, 64).unwrap();
        assert_eq!(text(&set, 0, 0), ("@one two\n".into(), 8));
    }
}
