//! Which text is held out for validation. Owns the two rules; refuses to know files and tokens.

use configs::Philox;
use std::fmt;

/// How text was held out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum SplitRule {
    /// None was.
    Nothing,
    /// Whole documents, picked by their number: there are at least `2 / fraction` of them.
    Documents,
    /// The end of each document, cut at a line end where one is near: there are few.
    Ends,
}

impl fmt::Display for SplitRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            SplitRule::Nothing => "nothing is held out",
            SplitRule::Documents => "whole documents are held out",
            SplitRule::Ends => "the end of each document is held out, since there are few documents",
        })
    }
}

/// Documents from which on whole ones are held out: two are then sure to be.
pub(crate) fn enough_documents(fraction: f64) -> u64 {
    (2.0 / fraction).ceil() as u64
}

/// Whether document `n` is held out: one of each `1 / fraction` in a row, picked by a counted random
/// number, so that the share is right however few there are and no rhythm of the source is followed.
pub(crate) fn is_held_out(n: u64, fraction: f64) -> bool {
    let picks = |stratum: u64| {
        let within = Philox::new(0).uniform([stratum as u32, (stratum >> 32) as u32, 0, 0]);
        ((stratum as f64 + within) / fraction) as u64 == n
    };
    // Document n overlaps the strata from n * fraction to (n + 1) * fraction.
    (((n as f64) * fraction) as u64..=((n + 1) as f64 * fraction) as u64).any(picks)
}

/// Where the held-out end of a document starts: at the line end nearest to the wanted place, if one
/// lies within half the held-out length of it, else at a character.
pub(crate) fn end_start(text: &[u8], fraction: f64) -> usize {
    let held_out = (text.len() as f64 * fraction).round() as usize;
    let wanted = text.len() - held_out.min(text.len());
    let (low, high) = (wanted.saturating_sub(held_out / 2), wanted + held_out / 2);
    low + near(&text[low..high], wanted - low)
}

/// The line end nearest to the wanted place in a stretch of text, else a character.
pub(crate) fn near(text: &[u8], wanted: usize) -> usize {
    let before = memchr::memrchr(b'\n', &text[..wanted]).map(|i| i + 1);
    let after = memchr::memchr(b'\n', &text[wanted..]).map(|i| wanted + i + 1);
    match (before, after) {
        (Some(before), Some(after)) if wanted - before <= after - wanted => before,
        (_, Some(after)) => after,
        (Some(before), None) => before,
        (None, None) => character_start(text, wanted),
    }
}

/// The start of the UTF-8 character at `place`, which is at most three bytes before.
fn character_start(text: &[u8], place: usize) -> usize {
    let continues = |i: usize| text.get(i).is_some_and(|byte| byte & 0xC0 == 0x80);
    (place.saturating_sub(3)..=place).rev().find(|&i| !continues(i)).unwrap_or(place)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_share_of_documents_held_out_is_the_one_asked_for() {
        for fraction in [0.01, 0.05, 0.1, 0.3, 0.5, 0.9] {
            let held_out = (0..100_000).filter(|&n| is_held_out(n, fraction)).count() as f64;
            let expected = 100_000.0 * fraction;
            // Above one half neighbouring strata can pick the same document.
            assert!(held_out <= expected + 1.0 && held_out > expected * 0.7, "{fraction}: {held_out}");
            if fraction <= 0.1 {
                assert!(held_out > expected * 0.98, "{fraction}: {held_out}");
            }
        }
    }

    #[test]
    fn enough_documents_are_enough_to_hold_one_out() {
        for fraction in [0.001, 0.05, 0.07, 0.3, 0.5, 0.9] {
            assert!((0..enough_documents(fraction)).any(|n| is_held_out(n, fraction)), "{fraction}");
        }
    }

    #[test]
    fn the_end_of_a_document_starts_after_the_nearest_line_end() {
        let text = b"aaaaaaaa\nbbbbbbbb\ncccccccc\ndddddddd\n"; // 36 bytes, a quarter is 9
        assert_eq!(end_start(text, 0.25), 27);
        assert_eq!(end_start(text, 0.3), 27); // wanted 25
        assert_eq!(end_start(text, 0.4), 18); // wanted 22: 18 and 27 are at 4 and 5
    }

    #[test]
    fn without_a_line_end_near_a_document_is_cut_between_characters() {
        let text = "ääääääääää".as_bytes();
        assert_eq!(end_start(text, 0.25), 14); // wanted 15, within a character
        assert_eq!(end_start(b"abc", 0.05), 3); // too short to share
        assert_eq!(end_start(&[0x80; 10], 0.5), 5); // no UTF-8 at all
    }
}
