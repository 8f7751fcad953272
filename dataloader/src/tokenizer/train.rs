//! Learning a byte-pair table from text: count words, then merge the pair seen most often, again and
//! again (Sennrich et al. 2016). Owns the counting and the order of merges; refuses to know files.

use super::words::Words;
use rustc_hash::{FxHashMap, FxHashSet};
use std::collections::BinaryHeap;

/// Words that are counted at a time; when there are more, those seen once are forgotten, so that memory
/// stays bounded whatever the text.
const MOST_WORDS: usize = 4_000_000;

/// Longest word that is counted, in bytes: longer ones are no words.
const LONGEST: usize = 100;

/// How often each word of a text occurs.
#[derive(Debug, Default)]
pub(crate) struct WordCounts(FxHashMap<Box<[u8]>, u64>);

impl WordCounts {
    /// Counts the words of a document.
    pub(crate) fn add(&mut self, text: &[u8]) {
        for chunk in text.utf8_chunks() {
            for word in Words::of(chunk.valid()).filter(|word| word.len() <= LONGEST) {
                match self.0.get_mut(word.as_bytes()) {
                    Some(count) => *count += 1,
                    None => drop(self.0.insert(word.as_bytes().into(), 1)),
                }
            }
        }
    }

    /// Adds the counts of another part of the text.
    pub(crate) fn merge(&mut self, other: WordCounts) {
        for (word, count) in other.0 {
            *self.0.entry(word).or_default() += count;
        }
        if self.0.len() > MOST_WORDS {
            self.0.retain(|_, count| *count > 1);
        }
    }

    /// Different words.
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }
}

/// A word as the ids that it consists of so far.
struct Word {
    ids: Vec<u32>,
    count: u64,
}

type Pair = (u32, u32);

/// The tokens of a table with `vocab_size` ids, end-of-text included: the 256 bytes, then merges, most
/// frequent first; of equally frequent ones the pair with the smaller ids. Fewer if there is nothing
/// left to merge.
pub(crate) fn train(counts: WordCounts, vocab_size: usize) -> Vec<Vec<u8>> {
    let mut tokens: Vec<Vec<u8>> = (0..=255).map(|byte| vec![byte]).collect();
    let mut known: FxHashSet<Vec<u8>> = tokens.iter().cloned().collect();
    let mut words: Vec<Word> = counts
        .0
        .into_iter()
        .map(|(word, count)| Word { ids: word.iter().map(|&byte| u32::from(byte)).collect(), count })
        .collect();
    words.sort_unstable_by(|a, b| a.ids.cmp(&b.ids));

    let mut pair_counts: FxHashMap<Pair, i64> = FxHashMap::default();
    let mut places: FxHashMap<Pair, Vec<u32>> = FxHashMap::default();
    for (place, word) in words.iter().enumerate() {
        for pair in word.ids.windows(2).map(|pair| (pair[0], pair[1])) {
            *pair_counts.entry(pair).or_default() += word.count as i64;
            places.entry(pair).or_default().push(place as u32);
        }
    }
    let mut heap: BinaryHeap<(i64, std::cmp::Reverse<Pair>)> =
        pair_counts.iter().map(|(&pair, &count)| (count, std::cmp::Reverse(pair))).collect();

    while tokens.len() + 1 < vocab_size {
        let Some((count, std::cmp::Reverse(pair))) = heap.pop() else { break };
        let now = pair_counts.get(&pair).copied().unwrap_or(0);
        if now != count {
            if now > 0 {
                heap.push((now, std::cmp::Reverse(pair)));
            }
            continue;
        }
        if count < 2 {
            break; // what occurs once is no rule
        }
        let merged = [&tokens[pair.0 as usize][..], &tokens[pair.1 as usize]].concat();
        if !known.insert(merged.clone()) {
            pair_counts.remove(&pair); // another pair makes the same bytes
            continue;
        }
        let id = tokens.len() as u32;
        tokens.push(merged);
        let mut changed: FxHashMap<Pair, i64> = FxHashMap::default();
        for place in places.remove(&pair).unwrap_or_default() {
            let word = &mut words[place as usize];
            replace(word, pair, id, &mut changed, |new| places.entry(new).or_default().push(place));
        }
        pair_counts.remove(&pair);
        for (changed, by) in changed.into_iter().filter(|(changed, _)| *changed != pair) {
            let count = pair_counts.entry(changed).or_default();
            *count += by;
            if by > 0 {
                heap.push((*count, std::cmp::Reverse(changed)));
            }
        }
    }
    tokens
}

/// Puts `id` where `pair` stands in a word; counts what comes and goes, and tells of what is new.
fn replace(
    word: &mut Word,
    pair: Pair,
    id: u32,
    changed: &mut FxHashMap<Pair, i64>,
    mut new_at: impl FnMut(Pair),
) {
    let count = word.count as i64;
    let mut at = 0;
    while at + 1 < word.ids.len() {
        if (word.ids[at], word.ids[at + 1]) != pair {
            at += 1;
            continue;
        }
        let mut change = |left: u32, right: u32, new_left: u32, new_right: u32| {
            *changed.entry((left, right)).or_default() -= count;
            *changed.entry((new_left, new_right)).or_default() += count;
            new_at((new_left, new_right));
        };
        if let Some(before) = at.checked_sub(1).map(|before| word.ids[before]) {
            change(before, pair.0, before, id);
        }
        if let Some(&after) = word.ids.get(at + 2) {
            change(pair.1, after, id, after);
        }
        word.ids[at] = id;
        word.ids.remove(at + 1);
        at += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn learnt(text: &str, vocab_size: usize) -> Vec<String> {
        let mut counts = WordCounts::default();
        counts.add(text.as_bytes());
        let tokens = train(counts, vocab_size).split_off(256);
        tokens.iter().map(|token| String::from_utf8_lossy(token).into_owned()).collect()
    }

    #[test]
    fn the_most_frequent_pair_is_merged_first() {
        // "low" 5, " lower" 2, " newest" 6, " widest" 3: the example of Sennrich et al., table 1.
        let text = format!(
            "{}{}{}{}",
            "low.".repeat(5),
            " lower".repeat(2),
            " newest".repeat(6),
            " widest".repeat(3)
        );
        assert_eq!(learnt(&text, 262), ["es", "est", "lo", "low", " n"]);
    }

    #[test]
    fn merging_ends_when_no_pair_occurs_twice() {
        assert_eq!(learnt("abc xyz", 1000), Vec::<String>::new());
        assert_eq!(learnt("aaaa.aaaa", 1000), ["aa", "aaaa"]);
    }

    #[test]
    fn the_same_text_gives_the_same_table_in_whatever_parts_it_is_counted() {
        let text = "the king and the river and the ships ran home ".repeat(30);
        let (mut whole, mut parts) = (WordCounts::default(), WordCounts::default());
        whole.add(text.as_bytes());
        for part in text.split_inclusive('d') {
            let mut counts = WordCounts::default();
            counts.add(part.as_bytes());
            parts.merge(counts);
        }
        assert_eq!(train(whole, 300), train(parts, 300));
    }
}
