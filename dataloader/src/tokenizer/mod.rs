//! From bytes to token ids and back. Owns which tokenizers there are and how each is known; refuses to
//! know where text comes from and where tokens go.

mod bpe;
mod hugging_face;
mod train;
mod wordpiece;
mod words;

pub(crate) use train::{WordCounts, train};

use crate::{DataError, files};
use bpe::{Bpe, BpeEncoder};
use std::path::Path;
use std::sync::Arc;
use wordpiece::WordPiece;

/// A tokenizer, known by its id and a digest of all that decides which ids it gives.
#[derive(Debug, Clone)]
pub enum Tokenizer {
    /// Every byte is a token: ids 0-255, end-of-text 256. Reads any bytes, UTF-8 or not.
    Bytes,
    /// GPT-2's byte-pair encoding (Radford et al. 2019): 50,257 ids, end-of-text 50256. Reads any bytes.
    Gpt2,
    /// A byte-pair encoding of one's own, made by `phalanx data train-tokenizer`.
    Bpe(Arc<Table>),
    /// BERT's uncased WordPiece with a vocabulary file. Case, accents and spaces do not survive.
    WordPiece(Arc<Table>),
}

/// A tokenizer that is read from a file.
#[derive(Debug)]
pub struct Table {
    digest: [u8; 32],
    kind: TableKind,
}

#[derive(Debug)]
enum TableKind {
    Bpe(Box<Bpe>),
    WordPiece(WordPiece),
}

/// Two are the same if they give the same ids.
impl PartialEq for Tokenizer {
    fn eq(&self, other: &Tokenizer) -> bool {
        (self.id(), self.digest()) == (other.id(), other.digest())
    }
}

impl Eq for Tokenizer {}

impl Tokenizer {
    /// The ids that there are.
    pub const IDS: [&'static str; 4] = ["bytes", "gpt2", "bpe", "wordpiece"];

    /// The tokenizer of that id, if it needs no file.
    pub fn from_id(id: &str) -> Option<Tokenizer> {
        match id {
            "bytes" => Some(Tokenizer::Bytes),
            "gpt2" => Some(Tokenizer::Gpt2),
            _ => None,
        }
    }

    /// A tokenizer from its file: a byte-pair table in tiktoken's form (`.tiktoken`), or a WordPiece
    /// vocabulary with one piece a line (`.txt`).
    ///
    /// # Errors
    /// A file of another kind, one that cannot be read, and what is wrong with the table.
    pub fn load(file: &Path) -> Result<Tokenizer, DataError> {
        let invalid = |what: String| DataError::TokenizerInvalid { file: file.into(), what };
        let extension = file.extension().map(|extension| extension.to_string_lossy().into_owned());
        let is_bpe = match extension.as_deref() {
            Some("tiktoken") => true,
            Some("txt") => false,
            _ => return Err(invalid("expected a .tiktoken or a .txt file".into())),
        };
        let bytes = std::fs::read(file).map_err(DataError::io(file, "read"))?;
        let text = String::from_utf8(bytes).map_err(|error| invalid(error.to_string()))?;
        if is_bpe {
            return Ok(Tokenizer::of_bpe(Bpe::parse(&text).map_err(invalid)?));
        }
        let vocabulary = WordPiece::parse(&text).map_err(invalid)?;
        let digest = digest_of("wordpiece uncased", &vocabulary.to_text());
        Ok(Tokenizer::WordPiece(Arc::new(Table { digest, kind: TableKind::WordPiece(vocabulary) })))
    }

    /// A byte-pair encoding with these tokens, in the order of their ids.
    ///
    /// # Errors
    /// What makes the tokens no table.
    pub fn bpe(tokens: Vec<Vec<u8>>) -> Result<Tokenizer, String> {
        Bpe::of(tokens).map(Tokenizer::of_bpe)
    }

    fn of_bpe(table: Bpe) -> Tokenizer {
        let digest = digest_of("bpe", &table.to_text());
        Tokenizer::Bpe(Arc::new(Table { digest, kind: TableKind::Bpe(Box::new(table)) }))
    }

    /// The tokenizer of that id in a folder that [`Tokenizer::write_into`] wrote to; none where no tokenizer
    /// has the id.
    pub fn in_folder(folder: &Path, id: &str) -> Option<Result<Tokenizer, DataError>> {
        match id {
            "bpe" => Some(Tokenizer::load(&folder.join(BPE_FILE))),
            "wordpiece" => Some(Tokenizer::load(&folder.join(WORDPIECE_FILE))),
            _ => Tokenizer::from_id(id).map(Ok),
        }
    }

    /// Writes the file of a tokenizer that has one into a folder: complete, or not there.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn write_into(&self, folder: &Path) -> Result<(), DataError> {
        match self {
            Tokenizer::Bytes | Tokenizer::Gpt2 => Ok(()),
            Tokenizer::Bpe(_) => self.save(&folder.join(BPE_FILE)),
            Tokenizer::WordPiece(_) => self.save(&folder.join(WORDPIECE_FILE)),
        }
    }

    /// Writes the file that [`Tokenizer::load`] reads: complete, or not there. The bytes have none.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn save(&self, file: &Path) -> Result<(), DataError> {
        let text = match self {
            Tokenizer::Bytes => return Ok(()),
            Tokenizer::Gpt2 => Bpe::gpt2().to_text(),
            Tokenizer::Bpe(table) | Tokenizer::WordPiece(table) => match &table.kind {
                TableKind::Bpe(table) => table.to_text(),
                TableKind::WordPiece(vocabulary) => vocabulary.to_text(),
            },
        };
        files::write(file, text.as_bytes())
    }

    /// The name that shards and manifests know it by.
    pub fn id(&self) -> &'static str {
        match self {
            Tokenizer::Bytes => "bytes",
            Tokenizer::Gpt2 => "gpt2",
            Tokenizer::Bpe(_) => "bpe",
            Tokenizer::WordPiece(_) => "wordpiece",
        }
    }

    /// Digest of all that decides which ids text becomes. The same id with another digest is another
    /// tokenizer.
    pub fn digest(&self) -> [u8; 32] {
        match self {
            Tokenizer::Bytes => {
                *blake3::hash(b"phalanx tokenizer bytes: byte b is id b, end of text is 256").as_bytes()
            }
            Tokenizer::Gpt2 => {
                *blake3::hash(b"phalanx tokenizer gpt2: r50k, end of text is 50256").as_bytes()
            }
            Tokenizer::Bpe(table) | Tokenizer::WordPiece(table) => table.digest,
        }
    }

    /// Number of token ids: every id is less than this.
    pub fn vocab_size(&self) -> usize {
        match self {
            Tokenizer::Bytes => 257,
            Tokenizer::Gpt2 => 50_257,
            Tokenizer::Bpe(table) | Tokenizer::WordPiece(table) => match &table.kind {
                TableKind::Bpe(table) => table.end_of_text() as usize + 1,
                TableKind::WordPiece(vocabulary) => vocabulary.len(),
            },
        }
    }

    /// The id that stands after every document.
    pub fn end_of_text(&self) -> u32 {
        match self {
            Tokenizer::Bytes => 256,
            Tokenizer::Gpt2 => 50_256,
            Tokenizer::Bpe(table) | Tokenizer::WordPiece(table) => match &table.kind {
                TableKind::Bpe(table) => table.end_of_text(),
                TableKind::WordPiece(vocabulary) => vocabulary.separator(),
            },
        }
    }

    /// The id that stands for a token which a masked model has to find: of WordPiece `[MASK]`; the others have
    /// none.
    pub fn mask(&self) -> Option<u32> {
        self.vocabulary().and_then(WordPiece::mask)
    }

    /// The ids below [`Tokenizer::vocab_size`] that stand for no text, ascending, the end of a document among
    /// them.
    pub fn specials(&self) -> Vec<u32> {
        self.vocabulary().map_or_else(|| vec![self.end_of_text()], WordPiece::specials)
    }

    fn vocabulary(&self) -> Option<&WordPiece> {
        match self {
            Tokenizer::WordPiece(table) => match &table.kind {
                TableKind::WordPiece(vocabulary) => Some(vocabulary),
                TableKind::Bpe(_) => None,
            },
            _ => None,
        }
    }

    /// What encodes many texts: it remembers words that it has seen.
    pub fn encoder(&self) -> Encoder<'_> {
        Encoder(match self {
            Tokenizer::Bytes => EncoderKind::Bytes,
            Tokenizer::Gpt2 => EncoderKind::Bpe(BpeEncoder::new(Bpe::gpt2())),
            Tokenizer::Bpe(table) | Tokenizer::WordPiece(table) => match &table.kind {
                TableKind::Bpe(table) => EncoderKind::Bpe(BpeEncoder::new(table)),
                TableKind::WordPiece(vocabulary) => EncoderKind::WordPiece(vocabulary),
            },
        })
    }

    /// Appends the ids of one text to `tokens`, as [`Encoder::encode`] does.
    pub fn encode(&self, text: &[u8], tokens: &mut Vec<u32>) {
        self.encoder().encode(text, tokens);
    }

    /// Where a long text can be cut so that its parts, one after the other, become the ids of the whole:
    /// the last such place in `text`, if there is one beside its start.
    pub fn last_cut(&self, text: &[u8]) -> Option<usize> {
        match self {
            Tokenizer::Bytes => Some(text.len()).filter(|&len| len > 0),
            _ => words::last_cut(text),
        }
    }

    /// The bytes that ids stand for. End-of-text stands for none, so that decoding a data set gives
    /// back its documents end to end; an id outside the vocabulary becomes U+FFFD.
    pub fn decode(&self, tokens: &[u32]) -> Vec<u8> {
        let mut text = Vec::with_capacity(tokens.len());
        for &token in tokens {
            match (self.bytes_of(token), u8::try_from(token)) {
                (Some(bytes), _) => text.extend(bytes),
                (None, Ok(byte)) if matches!(self, Tokenizer::Bytes) => text.push(byte),
                _ if token == self.end_of_text() => {}
                _ => match self {
                    Tokenizer::WordPiece(table) => table.word_piece(token, &mut text),
                    _ => text.extend("\u{FFFD}".bytes()),
                },
            }
        }
        text
    }

    /// How many bytes of text a token stands for, as far as one token can tell: end-of-text for none, a
    /// WordPiece for its letters.
    pub(crate) fn byte_len(&self, token: u32) -> usize {
        match self {
            Tokenizer::Bytes => usize::from(token < 256),
            Tokenizer::WordPiece(_) => self.decode(&[token]).len(),
            _ => self.bytes_of(token).map_or(0, <[u8]>::len),
        }
    }

    fn bytes_of(&self, token: u32) -> Option<&[u8]> {
        match self {
            Tokenizer::Bytes => None,
            Tokenizer::Gpt2 => Bpe::gpt2().token(token),
            Tokenizer::Bpe(table) | Tokenizer::WordPiece(table) => match &table.kind {
                TableKind::Bpe(table) => table.token(token),
                TableKind::WordPiece(_) => None,
            },
        }
    }
}

impl Table {
    fn word_piece(&self, token: u32, text: &mut Vec<u8>) {
        if let TableKind::WordPiece(vocabulary) = &self.kind {
            vocabulary.decode(&[token], text);
        }
    }
}

/// Encodes texts one after the other, each as if it were the first.
#[derive(Debug)]
pub struct Encoder<'a>(EncoderKind<'a>);

#[derive(Debug)]
enum EncoderKind<'a> {
    Bytes,
    Bpe(BpeEncoder<'a>),
    WordPiece(&'a WordPiece),
}

impl Encoder<'_> {
    /// Appends the ids of `text` to `tokens`, without end-of-text: text never encodes to it, so a
    /// document cannot forge its own end.
    pub fn encode(&mut self, text: &[u8], tokens: &mut Vec<u32>) {
        match &mut self.0 {
            EncoderKind::Bytes => tokens.extend(text.iter().map(|&byte| u32::from(byte))),
            EncoderKind::Bpe(encoder) => encoder.encode(text, tokens),
            EncoderKind::WordPiece(vocabulary) => vocabulary.encode(text, tokens),
        }
    }
}

/// The files that a data set's folder has of its tokenizer.
const BPE_FILE: &str = "tokenizer.tiktoken";
const WORDPIECE_FILE: &str = "tokenizer.txt";

/// Whether a file of a data set's folder is a tokenizer's.
pub(crate) fn is_table_name(name: &str) -> bool {
    [BPE_FILE, WORDPIECE_FILE].contains(&name)
}

fn digest_of(kind: &str, text: &str) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"phalanx tokenizer ").update(kind.as_bytes()).update(b": ").update(text.as_bytes());
    *hasher.finalize().as_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_survives_the_round_trip() {
        let text: Vec<u8> = (0..=255).collect();
        for tokenizer in [Tokenizer::Bytes, Tokenizer::Gpt2] {
            let mut tokens = Vec::new();
            tokenizer.encode(&text, &mut tokens);
            assert_eq!(tokenizer.decode(&tokens), text);
            let bytes: usize = tokens.iter().map(|&token| tokenizer.byte_len(token)).sum();
            assert_eq!(bytes, text.len());
        }
    }

    #[test]
    fn end_of_text_decodes_to_nothing_and_a_foreign_id_to_the_replacement_character() {
        assert_eq!(Tokenizer::Bytes.decode(&[104, 256, 105]), b"hi");
        assert_eq!(Tokenizer::Bytes.decode(&[104, 257]), "h\u{FFFD}".as_bytes());
        assert_eq!(Tokenizer::Gpt2.decode(&[15496, 50256, 11, 50257]), "Hello,\u{FFFD}".as_bytes());
    }

    #[test]
    fn every_tokenizer_without_a_file_is_found_by_its_id() {
        for id in ["bytes", "gpt2"] {
            let tokenizer = Tokenizer::from_id(id).unwrap();
            assert_eq!(tokenizer.id(), id);
            assert!((tokenizer.end_of_text() as usize) < tokenizer.vocab_size());
        }
        assert_eq!(Tokenizer::from_id("runes"), None);
    }

    #[test]
    fn a_table_of_ones_own_reads_back_as_the_same_tokenizer() {
        let scratch = tempfile::tempdir().unwrap();
        let mut counts = WordCounts::default();
        counts.add("the king and the river ".repeat(20).as_bytes());
        let tokenizer = Tokenizer::bpe(train(counts, 270)).unwrap();
        let file = scratch.path().join("mine.tiktoken");
        tokenizer.save(&file).unwrap();
        assert_eq!(Tokenizer::load(&file).unwrap(), tokenizer);
        assert_ne!(tokenizer, Tokenizer::Gpt2);
        let mut tokens = Vec::new();
        tokenizer.encode(b"the kingdom", &mut tokens);
        assert!(tokens.len() < 8);
        assert_eq!(tokenizer.decode(&tokens), b"the kingdom");
    }

    #[test]
    fn a_file_that_is_no_tokenizer_is_refused_by_name() {
        let scratch = tempfile::tempdir().unwrap();
        for (name, content, what) in [
            ("a.json", "{}", "expected a .tiktoken or a .txt file"),
            ("b.tiktoken", "IQ== 1\n", "line 1: id \"1\", expected 0"),
            ("c.txt", "the\n", "has no [UNK]"),
        ] {
            let file = scratch.path().join(name);
            std::fs::write(&file, content).unwrap();
            let error = Tokenizer::load(&file).unwrap_err().to_string();
            assert!(error.contains(name) && error.contains(what) && error.contains("hint: "), "{error}");
        }
    }
}
