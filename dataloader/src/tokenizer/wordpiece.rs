//! BERT's uncased WordPiece (Devlin et al. 2019, `tokenization.py`): text is cleaned, lower-cased,
//! stripped of accents and split at spaces and punctuation; a word becomes the longest pieces of the
//! vocabulary, from the left. Owns that rule; refuses to know files.

use super::words::ranges;
use rustc_hash::FxHashMap;
use std::sync::OnceLock;
use unicode_normalization::UnicodeNormalization;

/// Characters beyond which a word is unknown as a whole.
const LONGEST: usize = 100;

/// A vocabulary: one piece a line, the id its number from 0.
#[derive(Debug)]
pub(crate) struct WordPiece {
    pieces: Vec<String>,
    ids: FxHashMap<String, u32>,
    unknown: u32,
    separator: u32,
}

impl WordPiece {
    /// A vocabulary in the form of BERT's `vocab.txt`.
    ///
    /// # Errors
    /// What is wrong with it: a piece twice, or no `[UNK]` or `[SEP]`.
    pub(crate) fn parse(text: &str) -> Result<WordPiece, String> {
        let pieces: Vec<String> = text.lines().map(|line| line.trim_end().to_string()).collect();
        let mut ids = FxHashMap::default();
        for (id, piece) in pieces.iter().enumerate() {
            if let Some(earlier) = ids.insert(piece.clone(), id as u32) {
                return Err(format!("line {}: {piece:?} stands in line {} too", id + 1, earlier + 1));
            }
        }
        let special = |name: &str| ids.get(name).copied().ok_or_else(|| format!("has no {name}"));
        let (unknown, separator) = (special("[UNK]")?, special("[SEP]")?);
        Ok(WordPiece { pieces, ids, unknown, separator })
    }

    /// The vocabulary in the form that [`WordPiece::parse`] reads.
    pub(crate) fn to_text(&self) -> String {
        self.pieces.iter().flat_map(|piece| [piece, "\n"]).collect()
    }

    pub(crate) fn len(&self) -> usize {
        self.pieces.len()
    }

    /// `[SEP]`, which ends a document. Text never becomes it: brackets are words of their own.
    pub(crate) fn separator(&self) -> u32 {
        self.separator
    }

    /// `[MASK]`, which stands for a token that a masked model has to find, if the vocabulary has it.
    pub(crate) fn mask(&self) -> Option<u32> {
        self.ids.get("[MASK]").copied()
    }

    /// The ids that stand for no text, and the unknown one, ascending.
    pub(crate) fn specials(&self) -> Vec<u32> {
        let all = (0..).zip(&self.pieces);
        all.filter(|(id, piece)| *id == self.unknown || is_special(piece)).map(|(id, _)| id).collect()
    }

    /// Appends the ids of a text; bytes that are no UTF-8 are left out like control characters.
    pub(crate) fn encode(&self, text: &[u8], tokens: &mut Vec<u32>) {
        let kinds = Kinds::get();
        let mut word = String::new();
        for chunk in text.utf8_chunks() {
            for c in chunk.valid().chars().filter(|&c| !kinds.is_control(c)) {
                if c.is_whitespace() {
                    self.end_word(&mut word, tokens);
                } else if is_ideograph(c) {
                    self.end_word(&mut word, tokens);
                    word.push(c);
                    self.end_word(&mut word, tokens);
                } else {
                    for c in
                        std::iter::once(c).nfd().filter(|&c| !kinds.is_mark(c)).flat_map(char::to_lowercase)
                    {
                        if kinds.is_punctuation(c) {
                            self.end_word(&mut word, tokens);
                            word.push(c);
                            self.end_word(&mut word, tokens);
                        } else {
                            word.push(c);
                        }
                    }
                }
            }
        }
        self.end_word(&mut word, tokens);
    }

    /// Appends the pieces of a word and clears it.
    fn end_word(&self, word: &mut String, tokens: &mut Vec<u32>) {
        let from = tokens.len();
        let mut start = 0;
        let mut piece = String::new();
        while start < word.len() && word.len() <= 4 * LONGEST {
            let ends = word[start..].char_indices().map(|(i, c)| start + i + c.len_utf8()).rev();
            let found = ends.map(|end| {
                (end, {
                    piece.clear();
                    piece.push_str(if start > 0 { "##" } else { "" });
                    piece.push_str(&word[start..end]);
                    self.ids.get(&piece).copied()
                })
            });
            let Some((end, id)) = found.filter_map(|(end, id)| Some((end, id?))).next() else { break };
            tokens.push(id);
            start = end;
        }
        if start < word.len() || word.chars().count() > LONGEST {
            tokens.truncate(from);
            tokens.push(self.unknown);
        }
        word.clear();
    }

    /// Appends what ids stand for, words with a space before each; special tokens stand for nothing.
    pub(crate) fn decode(&self, tokens: &[u32], text: &mut Vec<u8>) {
        for &token in tokens {
            match self.pieces.get(token as usize).map(String::as_str) {
                None => text.extend("\u{FFFD}".bytes()),
                Some(piece) if token == self.separator || token != self.unknown && is_special(piece) => {}
                Some(piece) => match piece.strip_prefix("##") {
                    Some(rest) => text.extend(rest.bytes()),
                    None => {
                        text.extend((!text.is_empty()).then_some(b' '));
                        text.extend(piece.bytes());
                    }
                },
            }
        }
    }
}

fn is_special(piece: &str) -> bool {
    ["[PAD]", "[CLS]", "[SEP]", "[MASK]"].contains(&piece)
}

/// The classes of characters that the rule needs, a bit each.
struct Kinds(Vec<u8>);

const MARK: u8 = 1;
const PUNCTUATION: u8 = 2;
const CONTROL: u8 = 4;

impl Kinds {
    fn get() -> &'static Kinds {
        static KINDS: OnceLock<Kinds> = OnceLock::new();
        KINDS.get_or_init(|| {
            let mut kinds = vec![0; char::MAX as usize + 1];
            for (class, bit) in
                [(r"\p{Mn}", MARK), (r"\p{P}", PUNCTUATION), (r"[\p{Cc}\p{Cf}\p{Co}]", CONTROL)]
            {
                for (first, last) in ranges(class) {
                    kinds[first as usize..=last as usize].iter_mut().for_each(|kind| *kind |= bit);
                }
            }
            (0x21..0x7F).filter_map(char::from_u32).filter(char::is_ascii_punctuation).for_each(|c| {
                kinds[c as usize] |= PUNCTUATION; // all of ASCII's, also `^` and `$`
            });
            ['\t', '\n', '\r'].into_iter().for_each(|c| kinds[c as usize] = 0);
            kinds['\u{FFFD}' as usize] |= CONTROL;
            Kinds(kinds)
        })
    }

    fn is_mark(&self, c: char) -> bool {
        self.0[c as usize] & MARK != 0
    }

    fn is_punctuation(&self, c: char) -> bool {
        self.0[c as usize] & PUNCTUATION != 0
    }

    fn is_control(&self, c: char) -> bool {
        self.0[c as usize] & CONTROL != 0
    }
}

/// CJK ideographs, which are words one by one: the blocks that BERT lists.
fn is_ideograph(c: char) -> bool {
    matches!(c,
        '\u{4E00}'..='\u{9FFF}' | '\u{3400}'..='\u{4DBF}' | '\u{20000}'..='\u{2A6DF}'
        | '\u{2A700}'..='\u{2B73F}' | '\u{2B740}'..='\u{2B81F}' | '\u{2B920}'..='\u{2CEAF}'
        | '\u{F900}'..='\u{FAFF}' | '\u{2F800}'..='\u{2FA1F}')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vocabulary() -> WordPiece {
        let pieces =
            "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nun\n##aff\n##able\naffable\n,\ncafe\n[\n]\nsep\n中\n";
        WordPiece::parse(pieces).unwrap()
    }

    fn encode(text: &str) -> Vec<u32> {
        let mut tokens = Vec::new();
        vocabulary().encode(text.as_bytes(), &mut tokens);
        tokens
    }

    #[test]
    fn words_become_their_longest_pieces_and_unknown_ones_one_token() {
        assert_eq!(encode("UNaffable, Café\u{301} unaffablex"), [5, 6, 7, 9, 10, 1]);
        assert_eq!(encode("中中\u{0}affable"), [14, 14, 8]);
        assert_eq!(encode(&"un".repeat(60)), [1]);
    }

    #[test]
    fn a_vocabulary_knows_its_mask_and_what_is_no_text() {
        assert_eq!((vocabulary().mask(), vocabulary().specials()), (Some(4), vec![0, 1, 2, 3, 4]));
        let small = WordPiece::parse("a\n[UNK]\n[SEP]\n").unwrap();
        assert_eq!((small.mask(), small.specials()), (None, vec![1, 2]));
    }

    #[test]
    fn special_tokens_in_text_are_text() {
        assert_eq!(encode("[SEP]"), [11, 13, 12]);
    }

    #[test]
    fn ids_decode_to_words_with_spaces() {
        let mut text = Vec::new();
        vocabulary().decode(&[2, 5, 6, 7, 9, 10, 3, 99], &mut text);
        assert_eq!(String::from_utf8(text).unwrap(), "unaffable , cafe\u{FFFD}");
    }

    #[test]
    fn a_vocabulary_that_cannot_be_used_says_why() {
        assert!(
            WordPiece::parse("[UNK]\n[SEP]\na\na\n").unwrap_err().contains("line 4: \"a\" stands in line 3")
        );
        assert!(WordPiece::parse("[UNK]\na\n").unwrap_err().contains("has no [SEP]"));
    }
}
