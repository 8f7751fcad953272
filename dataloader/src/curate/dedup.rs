//! Duplicates of earlier documents: by a key such as the URL, of the same text, or of nearly the same text,
//! found by MinHash and locality-sensitive hashing (Broder 1997; Leskovec, Rajaraman, Ullman, ch. 3) and then
//! measured. Owns the search, on disk but for one byte a document; refuses to know what else is wrong with a
//! document.

use super::contamination::words;
use super::{Curation, Document, Dropped};
use crate::documents::{Inputs, Raw, Reader};
use crate::mmap::Map;
use crate::pipeline::{self, Flow};
use crate::{DataError, PrepareError};
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

/// Hashes of a signature: 25 bands of 5. Documents whose sets of three words in a row overlap by 0.8
/// (Jaccard) share a band all but once in twenty thousand times.
const MINHASHES: usize = BANDS * ROWS;
const BANDS: usize = 25;
const ROWS: usize = 5;

/// Words in a row that a document is a set of.
const SHINGLE: usize = 3;

/// Word triples that are kept of a document to measure an overlap by: those with the smallest hashes, all of
/// them for most documents. Of longer ones the overlap is an estimate, off by 0.0125 at 0.8.
const SKETCH: usize = 1024;

/// Files that candidates are spread over, so that each fits memory.
const BUCKETS: usize = 256;

/// Earlier members of a band's group that a document is compared with.
const COMPARED: usize = 8;

/// What counts as a duplicate.
#[derive(Debug, Clone, PartialEq)]
pub struct DedupOptions {
    /// Key whose value two documents must not share, such as `url`.
    pub by: Option<String>,
    /// Whether two documents must not have the same text, spaces at the ends aside.
    pub exact: bool,
    /// How much of their word triples (Jaccard) two documents may share less than.
    pub near: Option<f64>,
}

/// How each document, in order, duplicates an earlier one.
#[derive(Debug, Default)]
pub(crate) struct Duplicates(Vec<u8>);

const BY_KEY: u8 = 1;
const EXACT: u8 = 2;
const NEAR: u8 = 3;

impl Duplicates {
    /// Why document n, counted from 0 over all that are read, is dropped.
    pub(crate) fn verdict(&self, n: u64) -> Option<Dropped> {
        let reason = match *self.0.get(n as usize)? {
            BY_KEY => "the key of an earlier document",
            EXACT => "the text of an earlier document",
            NEAR => "nearly the text of an earlier document",
            _ => return None,
        };
        Some(Dropped { stage: "dedup", reason: reason.into(), detail: None })
    }

    fn mark(&mut self, n: u64, kind: u8) {
        let mark = &mut self.0[n as usize];
        *mark = if *mark == 0 { kind } else { kind.min(*mark) };
    }
}

/// What is known of a document for the search.
struct Traces {
    key: Option<u64>,
    exact: Option<u64>,
    near: Option<Near>,
}

/// What near duplicates are found and measured by.
struct Near {
    /// A hash of each band of the signature.
    bands: [u64; BANDS],
    sketch: Vec<u32>,
}

/// Finds the duplicates among the documents that the other stages keep.
///
/// # Errors
/// Those of reading, and of the file system.
pub(super) fn find(
    inputs: &Inputs,
    curation: &Curation,
    options: &DedupOptions,
    threads: usize,
    folder: &Path,
) -> Result<Duplicates, PrepareError> {
    let mut scratch = Scratch::create(folder)?;
    let hashes = Hashes::new();
    let worker = || {
        let (curation, hashes) = (curation, &hashes);
        move |batch: Vec<Raw>| {
            let traces = |raw: &Raw| {
                let document = Document::of(inputs, raw, curation.wants_fields())?;
                let dropped = curation.verdict(&document).is_some();
                Ok((!dropped).then(|| Traces::of(&document, options, hashes)))
            };
            batch.iter().map(traces).collect::<Result<Vec<_>, PrepareError>>()
        }
    };
    let mut duplicates = Duplicates::default();
    pipeline::run(Reader::new(inputs, None, (0, 1)), threads, worker, |batch| {
        for traces in batch {
            let n = duplicates.0.len() as u64;
            duplicates.0.push(0);
            scratch.push(n, traces)?;
        }
        Ok(Flow::Continue)
    })?;
    scratch.compare(options.near.unwrap_or(1.0), &mut duplicates)?;
    Ok(duplicates)
}

impl Traces {
    fn of(document: &Document<'_>, options: &DedupOptions, hashes: &Hashes) -> Traces {
        let value =
            options.by.as_ref().and_then(|key| document.fields.get(key)).filter(|value| !value.is_null());
        let text = document.text.trim();
        let of_text = || {
            let whole = blake3::hash(text.as_bytes());
            whole.as_bytes().first_chunk().map_or(0, |first| u64::from_le_bytes(*first))
        };
        Traces {
            key: value.map(|value| hash(value.to_string().as_bytes())),
            exact: (options.exact && !text.is_empty()).then(of_text),
            near: options.near.and_then(|_| hashes.near(text)),
        }
    }
}

/// The hash functions of signatures.
pub(super) struct Hashes {
    keys: [(u32, u32); MINHASHES],
}

impl Hashes {
    pub(super) fn new() -> Hashes {
        let key = |i: usize| {
            let random = mix(i as u64 + 1);
            (random as u32, (random >> 32) as u32 | 1)
        };
        Hashes { keys: std::array::from_fn(key) }
    }

    /// The bands of a text's signature and the sketch of its word triples; none without words.
    fn near(&self, text: &str) -> Option<Near> {
        let words: Vec<u64> = words(text).iter().map(|word| hash(word.as_bytes())).collect();
        if words.is_empty() {
            return None;
        }
        let shingle = |words: &[u64]| {
            let shingle = words.iter().fold(0u64, |sum, word| mix(sum.rotate_left(5) ^ word));
            (shingle ^ shingle >> 32) as u32
        };
        let mut sketch: Vec<u32> = words.windows(SHINGLE.min(words.len())).map(shingle).collect();
        sketch.sort_unstable();
        sketch.dedup();
        // The smallest value of each hash function over all of them.
        let mut signature = [u32::MAX; MINHASHES];
        for shingle in &sketch {
            for (least, (xor, factor)) in signature.iter_mut().zip(&self.keys) {
                let hash = (shingle ^ xor).wrapping_mul(*factor);
                *least = (*least).min(hash ^ hash >> 15);
            }
        }
        let band = |band: usize| {
            let rows = &signature[band * ROWS..][..ROWS];
            rows.iter().fold(mix(band as u64), |sum, row| mix(sum ^ u64::from(*row)))
        };
        sketch.truncate(SKETCH);
        Some(Near { bands: std::array::from_fn(band), sketch })
    }
}

/// How much two sets overlap (Jaccard), by sketches of them: the share of the smallest hashes of both together
/// that are in both (Broder 1997). With all hashes of both that is the overlap itself.
fn overlap(a: &[[u8; 4]], b: &[[u8; 4]]) -> f64 {
    let (mut a, mut b) = (a.iter().peekable(), b.iter().peekable());
    let (mut either, mut both) = (0, 0);
    while either < SKETCH {
        let value = |hash: &&[u8; 4]| u32::from_le_bytes(**hash);
        match (a.peek().map(value), b.peek().map(value)) {
            (None, None) => break,
            (Some(x), Some(y)) if x == y => {
                both += 1;
                a.next();
                b.next();
            }
            (Some(x), y) if y.is_none_or(|y| x < y) => drop(a.next()),
            _ => drop(b.next()),
        }
        either += 1;
    }
    f64::from(both) / either.max(1) as f64
}

/// A folder with the sketches of all documents, and what they are grouped by.
struct Scratch {
    folder: PathBuf,
    sketches: BufWriter<File>,
    /// Where each document's sketch ends in `sketches`, in bytes, u64.
    ends: BufWriter<File>,
    end: u64,
    buckets: Vec<BufWriter<File>>,
}

/// What a group has in common and who is in it; the kind of duplicate is in the top byte.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Member {
    hash: u64,
    kind_and_number: u64,
}

impl Scratch {
    fn create(folder: &Path) -> Result<Scratch, DataError> {
        if folder.exists() {
            fs::remove_dir_all(folder).map_err(DataError::io(folder, "removed"))?;
        }
        fs::create_dir_all(folder).map_err(DataError::io(folder, "created"))?;
        let create = |name: String, buffer: usize| {
            let file = folder.join(name);
            let open = File::create(&file).map_err(DataError::io(&file, "created"))?;
            Ok::<_, DataError>(BufWriter::with_capacity(buffer, open))
        };
        let buckets = (0..BUCKETS).map(|bucket| create(format!("bucket-{bucket:03}"), 1 << 14));
        let buckets = buckets.collect::<Result<_, _>>()?;
        let (sketches, ends) = (create("sketches".into(), 1 << 20)?, create("ends".into(), 1 << 16)?);
        Ok(Scratch { folder: folder.into(), sketches, ends, end: 0, buckets })
    }

    fn push(&mut self, n: u64, traces: Option<Traces>) -> Result<(), DataError> {
        let Traces { key, exact, near } = traces.unwrap_or(Traces { key: None, exact: None, near: None });
        let failed = DataError::io(&self.folder, "written");
        let mut write = || -> std::io::Result<()> {
            for hash in near.iter().flat_map(|near| &near.sketch) {
                self.sketches.write_all(&hash.to_le_bytes())?;
                self.end += size_of::<u32>() as u64;
            }
            self.ends.write_all(&self.end.to_le_bytes())?;
            let bands = near.iter().flat_map(|near| near.bands).map(|band| (NEAR, band));
            let keys = key.map(|key| (BY_KEY, key)).into_iter().chain(exact.map(|exact| (EXACT, exact)));
            for (kind, hash) in keys.chain(bands) {
                let hash = mix(hash ^ u64::from(kind) << 56);
                let bucket = &mut self.buckets[(hash >> 56) as usize % BUCKETS];
                bucket.write_all(&hash.to_le_bytes())?;
                bucket.write_all(&(n | u64::from(kind) << 56).to_le_bytes())?;
            }
            Ok(())
        };
        write().map_err(failed)
    }

    /// Groups bucket by bucket, marks what duplicates an earlier member, and removes the folder.
    fn compare(mut self, near: f64, duplicates: &mut Duplicates) -> Result<(), DataError> {
        let written = DataError::io(&self.folder, "written");
        let flush = |file: &mut BufWriter<File>| file.flush();
        flush(&mut self.sketches)
            .and_then(|()| flush(&mut self.ends))
            .and_then(|()| self.buckets.iter_mut().try_for_each(flush))
            .map_err(written)?;
        let read = |name: String| {
            let file = self.folder.join(name);
            let map = File::open(&file).and_then(|open| Map::of(&open));
            map.map_err(DataError::io(&file, "read"))
        };
        let (sketches, ends) = (read("sketches".into())?, read("ends".into())?);
        let end =
            |n: u64| ends.bytes().as_chunks().0.get(n as usize).map_or(0, |end| u64::from_le_bytes(*end));
        let sketch = |n: u64| {
            let start = n.checked_sub(1).map_or(0, end);
            sketches.bytes()[start as usize..end(n) as usize].as_chunks().0
        };
        for bucket in 0..BUCKETS {
            let bytes = read(format!("bucket-{bucket:03}"))?;
            let member = |bytes: &[u8; 16]| Member {
                hash: bytes.first_chunk().map_or(0, |word| u64::from_le_bytes(*word)),
                kind_and_number: bytes.last_chunk().map_or(0, |word| u64::from_le_bytes(*word)),
            };
            let mut members: Vec<Member> = bytes.bytes().as_chunks().0.iter().map(member).collect();
            members.sort_unstable();
            for group in members.chunk_by(|a, b| a.hash == b.hash) {
                for (i, member) in group.iter().enumerate().skip(1) {
                    let (kind, n) = member.parts();
                    let earlier = group[i.saturating_sub(COMPARED)..i].iter().map(Member::parts);
                    let is_near = |(_, other)| overlap(sketch(other), sketch(n)) >= near;
                    if kind != NEAR || duplicates.0[n as usize] == 0 && earlier.rev().any(is_near) {
                        duplicates.mark(n, kind);
                    }
                }
            }
        }
        fs::remove_dir_all(&self.folder).map_err(DataError::io(&self.folder, "removed"))
    }
}

impl Member {
    fn parts(&self) -> (u8, u64) {
        ((self.kind_and_number >> 56) as u8, self.kind_and_number & ((1 << 56) - 1))
    }
}

/// A hash of bytes that never changes: FNV-1a, mixed.
pub(super) fn hash(bytes: &[u8]) -> u64 {
    let fnv = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01B3);
    mix(bytes.iter().fold(0xCBF2_9CE4_8422_2325, fnv))
}

/// The finalizer of SplitMix64.
fn mix(mut x: u64) -> u64 {
    x = (x ^ x >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ x >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ x >> 31
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Which of these documents are dropped.
    fn dropped(lines: &[String], options: DedupOptions) -> Vec<usize> {
        let scratch = tempfile::tempdir().unwrap();
        let file = scratch.path().join("a.jsonl");
        fs::write(&file, lines.join("\n")).unwrap();
        let curation = Curation { dedup: Some(options), ..Curation::default() };
        let found = curation.duplicates(&Inputs::new(&[file]), 2, &scratch.path().join("s")).unwrap();
        assert!(!scratch.path().join("s").exists());
        (0..lines.len()).filter(|&n| found.verdict(n as u64).is_some()).collect()
    }

    fn text(seed: usize, words: usize) -> String {
        let word = |i: usize| format!("w{}", mix((seed * 1_000_003 + i) as u64) % 5000);
        (0..words).map(word).collect::<Vec<_>>().join(" ")
    }

    fn line(text: &str) -> String {
        serde_json::json!({ "text": text }).to_string()
    }

    #[test]
    fn the_same_key_and_the_same_text_are_dropped_after_the_first() {
        let lines: Vec<String> = [("a", "one"), ("b", "two"), ("a", "three"), ("c", " two "), ("d", "four")]
            .map(|(url, text)| serde_json::json!({ "text": text, "url": url }).to_string())
            .into();
        let by = |by: Option<&str>, exact| DedupOptions { by: by.map(String::from), exact, near: None };
        assert_eq!(dropped(&lines, by(Some("url"), false)), [2]);
        assert_eq!(dropped(&lines, by(None, true)), [3]);
        assert_eq!(dropped(&lines, by(Some("url"), true)), [2, 3]);
    }

    #[test]
    fn nearly_the_same_text_is_dropped_and_other_text_is_not() {
        let mut lines: Vec<String> = (0..300).map(|seed| line(&text(seed, 150))).collect();
        // One word of 150 changed: 3 of about 150 triples on either side, Jaccard 0.96.
        lines.extend((0..300).map(|seed| {
            let text = text(seed, 150);
            let mut words: Vec<&str> = text.split(' ').collect();
            words[75] = "changed";
            line(&words.join(" "))
        }));
        let near = dropped(&lines, DedupOptions { by: None, exact: false, near: Some(0.8) });
        assert_eq!(near, (300..600).collect::<Vec<_>>());
    }

    #[test]
    fn an_overlap_of_short_documents_is_exact_and_of_long_ones_close() {
        let sketch = |numbers: std::ops::Range<u64>| -> Vec<[u8; 4]> {
            let mut hashes: Vec<u32> = numbers.map(|n| mix(n) as u32).collect();
            hashes.sort_unstable();
            hashes.iter().take(SKETCH).map(|hash| hash.to_le_bytes()).collect()
        };
        assert_eq!(overlap(&sketch(0..90), &sketch(10..100)), 0.8);
        assert_eq!(overlap(&sketch(0..10), &sketch(10..20)), 0.0);
        assert_eq!(overlap(&[], &[]), 0.0);
        // All of the one, a part of the other: 1000 of 5000.
        assert!((overlap(&sketch(0..1000), &sketch(0..5000)) - 0.2).abs() < 0.04);
        assert!((overlap(&sketch(0..9000), &sketch(1000..10_000)) - 0.8).abs() < 0.04);
    }

    #[test]
    fn documents_just_above_the_threshold_are_dropped_and_just_below_it_kept() {
        // 300 words of which the last few are others': with k of them, 298 - k triples of 298 + k are shared.
        let lines = |changed: usize| -> Vec<String> {
            let changed_end = |seed: usize| {
                let (text, other) = (text(seed, 300 - changed), text(seed + 9000, changed));
                line(&format!("{text} {other}"))
            };
            (0..100).map(|seed| line(&text(seed, 300))).chain((0..100).map(changed_end)).collect()
        };
        let near = || DedupOptions { by: None, exact: false, near: Some(0.8) };
        assert_eq!(dropped(&lines(32), near()), (100..200).collect::<Vec<_>>()); // 266 of 330: 0.806
        assert_eq!(dropped(&lines(34), near()), [0usize; 0]); // 264 of 332: 0.795
    }

    #[test]
    fn documents_that_overlap_by_half_are_kept() {
        let half = |seed: usize| line(&format!("{} {}", text(0, 100), text(seed + 1, 50)));
        let lines: Vec<String> = (0..200).map(half).collect(); // Jaccard about 0.5
        assert_eq!(dropped(&lines, DedupOptions { by: None, exact: false, near: Some(0.8) }), [0usize; 0]);
    }
}
