//! How much of a sample comes from a text: its words, and its longest run copied from it. Owns these
//! two measures; refuses to know models.

use memchr::memmem::Finder;
use std::collections::HashSet;

/// What a sample shares with a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Overlap {
    /// Words in the sample.
    pub words: usize,
    /// Those of them that are words of the text.
    pub known_words: usize,
    /// The longest run of bytes that occurs in both; the first of them in the sample.
    pub longest_run: Vec<u8>,
}

impl Overlap {
    /// Share of the sample's words that occur in the text; 0 for a sample without words.
    pub fn known_share(&self) -> f64 {
        if self.words == 0 { 0.0 } else { self.known_words as f64 / self.words as f64 }
    }
}

/// Compares a sample with a text. A word is a longest run of letters and apostrophes, without
/// apostrophes at its ends; case does not matter, and only whole words are equal.
pub fn overlap(sample: &[u8], text: &[u8]) -> Overlap {
    let mut vocabulary = HashSet::new();
    for_each_word(text, |word| {
        if !vocabulary.contains(word) {
            vocabulary.insert(word.to_string());
        }
    });
    let (mut words, mut known_words) = (0, 0);
    for_each_word(sample, |word| {
        words += 1;
        known_words += usize::from(vocabulary.contains(word));
    });
    Overlap { words, known_words, longest_run: longest_run(sample, text).to_vec() }
}

fn for_each_word(text: &[u8], mut each: impl FnMut(&str)) {
    for line in text.split(|&byte| byte == b'\n') {
        let line = String::from_utf8_lossy(line).to_lowercase();
        for word in line.split(|c: char| !c.is_alphabetic() && c != '\'') {
            let word = word.trim_matches('\'');
            if !word.is_empty() {
                each(word);
            }
        }
    }
}

/// The longest part of `sample` that occurs in `text`. Two ends move forward only: the window grows
/// while it occurs, and when a start allows no longer one than the best, the next start is tried.
fn longest_run<'a>(sample: &'a [u8], text: &[u8]) -> &'a [u8] {
    let mut best = &sample[..0];
    let mut start = 0;
    while start + best.len() < sample.len() {
        let longer = &sample[start..=start + best.len()];
        match Finder::new(longer).find(text) {
            Some(_) => best = longer,
            None => start += 1,
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_compared_whole_and_without_case() {
        let found = overlap(b"The CAT sat; the ca isn't 'here'", b"the cat sat there. It isn't here.");
        assert_eq!((found.words, found.known_words), (7, 6)); // "ca" is no word of the text
        assert!((found.known_share() - 6.0 / 7.0).abs() < 1e-12);
    }

    #[test]
    fn the_longest_copied_run_is_found_wherever_it_lies() {
        let text = b"in the beginning was the word";
        assert_eq!(overlap(b"so the beginning is", text).longest_run, b" the beginning ");
        assert_eq!(overlap(text, text).longest_run, text);
        assert_eq!(overlap(b"QQQ", text).longest_run, b"");
        assert_eq!(overlap(b"", text).longest_run, b"");
        assert_eq!(overlap(b"word", b"").longest_run, b"");
    }

    #[test]
    fn a_sample_without_words_knows_none() {
        assert_eq!(overlap(b"1 2 3 '", b"one two").known_share(), 0.0);
    }
}
