//! Byte-pair encoding: which ids a word becomes, and which bytes an id stands for. Owns the merging;
//! refuses to know where tables come from and what words are.

use super::words::Words;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rustc_hash::FxHashMap;
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::OnceLock;

/// OpenAI's merges of GPT-2, as they published them (`vocab.bpe`, MIT licence).
const GPT2_MERGES: &str = include_str!("gpt2.vocab.bpe");

/// The merges of GPT-2 as OpenAI's file has them.
#[cfg(test)]
pub(crate) fn gpt2_merges() -> Vec<&'static str> {
    GPT2_MERGES.lines().skip(1).filter(|line| !line.is_empty()).collect()
}

/// A table of tokens, in the order in which they are merged. End-of-text has the id after the last.
#[derive(Debug)]
pub(crate) struct Bpe {
    /// The bytes of all tokens end to end, and where each starts.
    bytes: Vec<u8>,
    starts: Vec<u32>,
    /// The id of each single byte.
    byte_ids: [u32; 256],
    /// Two neighbours to what they merge into. Made when first used.
    pairs: OnceLock<FxHashMap<u64, u32>>,
}

/// Words that an encoder remembers before it starts anew.
const REMEMBERED: usize = 1 << 17;

/// Parts beyond which a word is merged through a heap: long words must not take quadratic time.
const LONG: usize = 64;

impl Bpe {
    /// GPT-2's table.
    pub(crate) fn gpt2() -> &'static Bpe {
        static GPT2: OnceLock<Bpe> = OnceLock::new();
        GPT2.get_or_init(|| {
            // In the file printable bytes stand for themselves and all others for characters from
            // U+0100 on; single bytes have their ids in that order.
            let printable = |byte: &u8| matches!(byte, 0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF);
            let shown = (0..=255u8).filter(printable).map(|byte| (byte as char, byte));
            let hidden = (0..=255u8).filter(|byte| !printable(byte));
            let hidden = (0x100..).filter_map(char::from_u32).zip(hidden);
            let alphabet: Vec<(char, u8)> = shown.chain(hidden).collect();
            let byte_of: FxHashMap<char, u8> = alphabet.iter().copied().collect();
            let singles = alphabet.iter().map(|&(_, byte)| vec![byte]);
            let merges = GPT2_MERGES.lines().skip(1).filter(|line| !line.is_empty());
            let merged = merges.map(|line| line.chars().filter_map(|c| byte_of.get(&c).copied()).collect());
            Bpe::of(singles.chain(merged)).expect("GPT-2's table is one")
        })
    }

    /// A table of tokens in the order of their ids.
    ///
    /// # Errors
    /// What is wrong with it: a byte that is missing, a token twice, an empty one, or too many.
    pub(crate) fn of(tokens: impl IntoIterator<Item = Vec<u8>>) -> Result<Bpe, String> {
        let (mut bytes, mut starts) = (Vec::new(), vec![0]);
        let mut byte_ids = [u32::MAX; 256];
        let mut seen = rustc_hash::FxHashSet::default();
        for (id, token) in tokens.into_iter().enumerate() {
            match token[..] {
                [] => return Err(format!("token {id} is empty")),
                [byte] => byte_ids[byte as usize] = id as u32,
                _ => {}
            }
            bytes.extend(&token);
            if !seen.insert(token) {
                return Err(format!("token {id} is there twice"));
            }
            starts.push(u32::try_from(bytes.len()).map_err(|_| "more than 4 GiB of tokens")?);
        }
        match byte_ids.iter().position(|&id| id == u32::MAX) {
            Some(byte) => Err(format!("byte {byte:#04x} has no token; every byte needs one")),
            None => Ok(Bpe { bytes, starts, byte_ids, pairs: OnceLock::new() }),
        }
    }

    /// A table in tiktoken's form: in each line a token in base64 and its id, which counts up from 0.
    ///
    /// # Errors
    /// What is wrong, with the line.
    pub(crate) fn parse(text: &str) -> Result<Bpe, String> {
        let token = |(number, line): (usize, &str)| {
            let wrong = |what: &str| format!("line {}: {what}", number + 1);
            let (token, id) = line.split_once(' ').ok_or_else(|| wrong("expected a token and its id"))?;
            if id.parse() != Ok(number) {
                return Err(wrong(&format!("id {id:?}, expected {number}")));
            }
            STANDARD.decode(token).map_err(|error| wrong(&format!("no base64: {error}")))
        };
        let tokens: Result<Vec<Vec<u8>>, String> = text.lines().enumerate().map(token).collect();
        Bpe::of(tokens?)
    }

    /// The table in the form that [`Bpe::parse`] reads.
    pub(crate) fn to_text(&self) -> String {
        let line = |id: u32| format!("{} {id}\n", STANDARD.encode(self.token(id).unwrap_or_default()));
        (0..self.end_of_text()).map(line).collect()
    }

    /// The two tokens that each token of more than a byte is merged from, in the order of the tokens; a token
    /// that no merging reaches has none.
    pub(crate) fn merges(&self) -> Vec<[u32; 2]> {
        let pairs = self.pairs();
        let of = |id: u32| {
            let mut parts: Vec<u32> =
                self.token(id).unwrap_or_default().iter().map(|&byte| self.byte_ids[byte as usize]).collect();
            // As a word is merged, with the tokens before this one.
            while parts.len() > 2 {
                let merged = |i: usize| pairs.get(&pair(parts[i - 1], parts[i])).copied().unwrap_or(u32::MAX);
                let (into, at) = (1..parts.len()).map(|i| (merged(i), i)).min()?;
                if into >= id {
                    return None;
                }
                parts[at - 1] = into;
                parts.remove(at);
            }
            parts.try_into().ok()
        };
        (0..self.end_of_text()).filter_map(of).collect()
    }

    /// The id after the last token.
    pub(crate) fn end_of_text(&self) -> u32 {
        self.starts.len() as u32 - 1
    }

    /// The bytes of a token; none for end-of-text and what is beyond.
    pub(crate) fn token(&self, id: u32) -> Option<&[u8]> {
        let (start, end) = (self.starts.get(id as usize)?, self.starts.get(id as usize + 1)?);
        Some(&self.bytes[*start as usize..*end as usize])
    }

    /// For every token and every way to cut it into two tokens: these two to it. So a pair merges into
    /// whatever token its bytes are, as in OpenAI's tiktoken.
    fn pairs(&self) -> &FxHashMap<u64, u32> {
        self.pairs.get_or_init(|| {
            let tokens = |id| self.token(id).unwrap_or_default();
            let ids: FxHashMap<&[u8], u32> = (0..self.end_of_text()).map(|id| (tokens(id), id)).collect();
            let mut pairs = FxHashMap::default();
            for id in 0..self.end_of_text() {
                let whole = tokens(id);
                for cut in 1..whole.len() {
                    if let (Some(&left), Some(&right)) = (ids.get(&whole[..cut]), ids.get(&whole[cut..])) {
                        pairs.insert(pair(left, right), id);
                    }
                }
            }
            pairs
        })
    }
}

fn pair(left: u32, right: u32) -> u64 {
    u64::from(left) << 32 | u64::from(right)
}

/// Encodes with a table and remembers the words that it has seen.
#[derive(Debug)]
pub(crate) struct BpeEncoder<'a> {
    table: &'a Bpe,
    pairs: &'a FxHashMap<u64, u32>,
    /// Words of up to 15 bytes, as [`key`] packs them, to their ids' places in `remembered`.
    seen: FxHashMap<u128, (u32, u8)>,
    remembered: Vec<u32>,
    /// A word being merged: ids, and what each merges into with the next.
    parts: Vec<(u32, u32)>,
}

impl<'a> BpeEncoder<'a> {
    pub(crate) fn new(table: &'a Bpe) -> BpeEncoder<'a> {
        let (seen, remembered, parts) = (FxHashMap::default(), Vec::new(), Vec::new());
        BpeEncoder { table, pairs: table.pairs(), seen, remembered, parts }
    }

    /// Appends the ids of a text. Bytes that are no UTF-8 become single-byte tokens.
    pub(crate) fn encode(&mut self, text: &[u8], tokens: &mut Vec<u32>) {
        for chunk in text.utf8_chunks() {
            for word in Words::of(chunk.valid()) {
                self.encode_word(word.as_bytes(), tokens);
            }
            tokens.extend(chunk.invalid().iter().map(|&byte| self.table.byte_ids[byte as usize]));
        }
    }

    fn encode_word(&mut self, word: &[u8], tokens: &mut Vec<u32>) {
        if let [byte] = word {
            return tokens.push(self.table.byte_ids[*byte as usize]);
        }
        let Some(key) = key(word) else { return self.merge(word, tokens) };
        if let Some(&(start, len)) = self.seen.get(&key) {
            let start = start as usize;
            return tokens.extend_from_slice(&self.remembered[start..start + len as usize]);
        }
        let from = tokens.len();
        self.merge(word, tokens);
        if self.seen.len() == REMEMBERED {
            self.seen.clear();
            self.remembered.clear();
        }
        // At most 15 ids for each of so many words.
        self.seen.insert(key, (self.remembered.len() as u32, (tokens.len() - from) as u8));
        self.remembered.extend_from_slice(&tokens[from..]);
    }

    /// Merges the bytes of a word: always the pair that makes the token with the lowest id, the
    /// leftmost of these.
    fn merge(&mut self, word: &[u8], tokens: &mut Vec<u32>) {
        if word.len() > LONG {
            return self.merge_long(word, tokens);
        }
        let single = |byte: &u8| (self.table.byte_ids[*byte as usize], u32::MAX);
        self.parts.clear();
        self.parts.extend(word.iter().map(single));
        for i in 0..self.parts.len().saturating_sub(1) {
            self.parts[i].1 = self.merged(self.parts[i].0, self.parts[i + 1].0);
        }
        loop {
            let mut best = (u32::MAX, 0);
            for (i, &(_, into)) in self.parts.iter().enumerate() {
                best = if into < best.0 { (into, i) } else { best };
            }
            let (into, at) = best;
            if into == u32::MAX {
                break;
            }
            self.parts.remove(at + 1);
            let next = self.parts.get(at + 1).map_or(u32::MAX, |&(next, _)| self.merged(into, next));
            self.parts[at] = (into, next);
            if let Some(before) = at.checked_sub(1) {
                self.parts[before].1 = self.merged(self.parts[before].0, into);
            }
        }
        tokens.extend(self.parts.iter().map(|&(id, _)| id));
    }

    /// The same through a heap and links, in time n log n.
    fn merge_long(&self, word: &[u8], tokens: &mut Vec<u32>) {
        const GONE: u32 = u32::MAX;
        let mut ids: Vec<u32> = word.iter().map(|&byte| self.table.byte_ids[byte as usize]).collect();
        let mut before: Vec<usize> = (0..ids.len()).map(|i| i.wrapping_sub(1)).collect();
        let mut after: Vec<usize> = (1..=ids.len()).collect();
        let into = |ids: &[u32], left: usize, right: usize| match ids.get(right) {
            Some(&right) if left < ids.len() => self.merged(ids[left], right),
            _ => u32::MAX,
        };
        let mut heap: BinaryHeap<Reverse<(u32, usize)>> =
            (0..ids.len()).map(|i| Reverse((into(&ids, i, i + 1), i))).collect();
        while let Some(Reverse((merged, left))) = heap.pop() {
            if merged == u32::MAX {
                break;
            }
            // What was pushed for neighbours that have merged since is passed over.
            if ids[left] == GONE || into(&ids, left, after[left]) != merged {
                continue;
            }
            let right = after[left];
            (ids[left], ids[right]) = (merged, GONE);
            after[left] = after[right];
            if let Some(next) = before.get_mut(after[left]) {
                *next = left;
            }
            heap.push(Reverse((into(&ids, left, after[left]), left)));
            if before[left] < ids.len() {
                heap.push(Reverse((into(&ids, before[left], left), before[left])));
            }
        }
        tokens.extend(ids.into_iter().filter(|&id| id != GONE));
    }

    fn merged(&self, left: u32, right: u32) -> u32 {
        self.pairs.get(&pair(left, right)).copied().unwrap_or(u32::MAX)
    }
}

/// A word of at most 15 bytes as an integer; different words differ.
fn key(word: &[u8]) -> Option<u128> {
    let mut bytes = [0; 16];
    bytes.get_mut(..word.len()).filter(|place| place.len() < 16)?.copy_from_slice(word);
    bytes[15] = word.len() as u8;
    Some(u128::from_le_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn encode(text: &[u8]) -> Vec<u32> {
        let mut tokens = Vec::new();
        BpeEncoder::new(Bpe::gpt2()).encode(text, &mut tokens);
        tokens
    }

    #[test]
    fn gpt2s_ids_are_openais() {
        assert_eq!(encode(b"Hello, world!"), [15496, 11, 995, 0]);
        assert_eq!(encode(b"<|endoftext|>"), [27, 91, 437, 1659, 5239, 91, 29]);
        assert_eq!((Bpe::gpt2().end_of_text(), Bpe::gpt2().token(50256)), (50256, None));
    }

    #[test]
    fn a_table_reads_back_from_its_text_and_a_bad_one_is_refused_with_its_line() {
        let text = Bpe::gpt2().to_text();
        assert_eq!(Bpe::parse(&text).unwrap().to_text(), text);
        for (line, what) in [
            ("IQ==", "line 2: expected"),
            ("Ig== 7", "line 2: id \"7\", expected 1"),
            ("!! 1", "line 2: no base64"),
        ] {
            let wrong = text.replacen("Ig== 1", line, 1);
            assert!(Bpe::parse(&wrong).unwrap_err().contains(what), "{line}");
        }
        assert!(Bpe::parse("IQ== 0\nIQ== 1\n").unwrap_err().contains("twice"));
        assert!(Bpe::parse("IQ== 0\n").unwrap_err().contains("byte 0x00 has no token"));
    }

    proptest! {
        #[test]
        fn any_bytes_survive_and_a_cache_changes_nothing(text: Vec<u8>, words in "( ?[a-z]{1,20}){0,30}") {
            for text in [&text[..], words.as_bytes()] {
                let tokens = encode(text);
                let bytes: Vec<u8> = tokens.iter().flat_map(|&id| Bpe::gpt2().token(id).unwrap()).copied().collect();
                prop_assert_eq!(&bytes, text);
                let mut twice = BpeEncoder::new(Bpe::gpt2());
                let mut again = Vec::new();
                twice.encode(text, &mut Vec::new());
                twice.encode(text, &mut again);
                prop_assert_eq!(again, tokens);
            }
        }

        #[test]
        fn long_words_merge_like_short_ones(word in "[ab]{2,200}") {
            let mut encoder = BpeEncoder::new(Bpe::gpt2());
            let (mut quick, mut plain) = (Vec::new(), Vec::new());
            encoder.merge_long(word.as_bytes(), &mut quick);
            let mut parts: Vec<u32> = word.bytes().map(|byte| encoder.table.byte_ids[byte as usize]).collect();
            loop {
                let best = (1..parts.len()).map(|i| (encoder.merged(parts[i - 1], parts[i]), i)).min();
                let Some((into, at)) = best.filter(|(into, _)| *into != u32::MAX) else { break };
                parts[at - 1] = into;
                parts.remove(at);
            }
            encoder.merge(word.as_bytes(), &mut plain);
            prop_assert_eq!(&quick, &parts);
            prop_assert_eq!(plain, parts);
        }
    }
}
