//! The words that GPT-2's tokenizer merges within: `'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|
//! \s+(?!\S)|\s+` (Radford et al. 2019, `encoder.py`), as a scan by character class. Owns that rule and the
//! classes of characters; refuses to know tokens.

use regex_syntax::hir::{Class, HirKind};
use std::sync::OnceLock;

/// What the pattern tells apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Kind {
    Other = 0,
    Letter = 1,
    Number = 2,
    Space = 3,
}

/// The characters of a Unicode class, such as `\p{L}`, as ranges.
pub(super) fn ranges(class: &str) -> Vec<(char, char)> {
    let hir = regex_syntax::parse(class).expect("the classes asked for here are classes");
    match hir.kind() {
        HirKind::Class(Class::Unicode(class)) => {
            class.ranges().iter().map(|range| (range.start(), range.end())).collect()
        }
        _ => unreachable!("a class of characters parses to one"),
    }
}

/// The kind of every character, a byte each.
fn kinds() -> &'static [Kind] {
    static KINDS: OnceLock<Vec<Kind>> = OnceLock::new();
    KINDS.get_or_init(|| {
        let mut kinds = vec![Kind::Other; char::MAX as usize + 1];
        for (class, kind) in [(r"\p{L}", Kind::Letter), (r"\p{N}", Kind::Number)] {
            for (first, last) in ranges(class) {
                kinds[first as usize..=last as usize].fill(kind);
            }
        }
        for space in (0..=0x3000).filter_map(char::from_u32).filter(|c| c.is_whitespace()) {
            kinds[space as usize] = Kind::Space; // there is none beyond U+3000
        }
        kinds
    })
}

/// The words of a text, end to end.
pub(super) struct Words<'a> {
    text: &'a str,
    at: usize,
    kinds: &'static [Kind],
}

impl<'a> Words<'a> {
    pub(super) fn of(text: &'a str) -> Words<'a> {
        Words { text, at: 0, kinds: kinds() }
    }

    /// The kind and the length in bytes of the character at a byte.
    fn look(&self, at: usize) -> Option<(Kind, usize)> {
        let first = *self.text.as_bytes().get(at)?;
        if first < 0x80 {
            return Some((self.kinds[first as usize], 1));
        }
        let c = self.text[at..].chars().next()?;
        Some((self.kinds[c as usize], c.len_utf8()))
    }

    /// Where a run of characters of one kind ends, from `at` on, and where its last character starts.
    fn run(&self, mut at: usize, kind: Kind) -> (usize, usize) {
        let mut last = at;
        while let Some((next, len)) = self.look(at).filter(|(next, _)| *next == kind) {
            debug_assert_eq!(next, kind);
            (last, at) = (at, at + len);
        }
        (at, last)
    }

    fn end(&self, start: usize) -> Option<usize> {
        let bytes = self.text.as_bytes();
        let (kind, len) = self.look(start)?;
        if bytes[start] == b'\'' {
            match (bytes.get(start + 1), bytes.get(start + 2)) {
                (Some(b's' | b'd' | b'm' | b't'), _) => return Some(start + 2),
                (Some(b'l'), Some(b'l')) | (Some(b'v' | b'r'), Some(b'e')) => return Some(start + 3),
                _ => {}
            }
        }
        if kind != Kind::Space {
            return Some(self.run(start, kind).0);
        }
        match self.look(start + len) {
            // One space goes with the word behind it.
            Some((next, _)) if bytes[start] == b' ' && next != Kind::Space => {
                Some(self.run(start + 1, next).0)
            }
            _ => {
                // Of a run of spaces before a word, the last stays behind.
                let (end, last) = self.run(start, Kind::Space);
                Some(if end < bytes.len() && last > start { last } else { end })
            }
        }
    }
}

impl<'a> Iterator for Words<'a> {
    type Item = &'a str;

    fn next(&mut self) -> Option<&'a str> {
        let end = self.end(self.at)?;
        let word = &self.text[self.at..end];
        self.at = end;
        Some(word)
    }
}

/// The last place in a text at which it can be cut in two without any word of the whole being cut or
/// changed: before a single space between two characters that are none. None if there is no such place
/// but the start.
pub(super) fn last_cut(text: &[u8]) -> Option<usize> {
    let ends_word = |byte: u8| byte.is_ascii_graphic();
    memchr::memrchr_iter(b' ', text).find(|&at| {
        at > 0 && ends_word(text[at - 1]) && text.get(at + 1).is_some_and(|&next| ends_word(next))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn words(text: &str) -> Vec<&str> {
        Words::of(text).collect()
    }

    #[test]
    fn words_are_those_of_the_pattern() {
        assert_eq!(words("Hello, world!"), ["Hello", ",", " world", "!"]);
        assert_eq!(words("I'm you're  'sa'LL"), ["I", "'m", " you", "'re", " ", " '", "sa", "'", "LL"]);
        assert_eq!(words("a  b\n\n c \u{a0}d "), ["a", " ", " b", "\n\n", " c", " ", "\u{a0}", "d", " "]);
        assert_eq!(words(" x²3 ½\u{301}"), [" x", "²3", " ½", "\u{301}"]);
        assert_eq!(words("<|endoftext|>"), ["<|", "endoftext", "|>"]);
        assert_eq!(words("\t\tx   "), ["\t", "\t", "x", "   "]);
    }

    proptest! {
        #[test]
        fn a_cut_changes_no_word(text in "[a ',\n1é]{0,40}") {
            if let Some(at) = last_cut(text.as_bytes()) {
                let halves = [words(&text[..at]), words(&text[at..])].concat();
                prop_assert_eq!(halves, words(&text));
            }
        }
    }
}
