//! What goes in comes out: text through prepare and back, shards as one sequence, samples and
//! validation windows that cover what they should.

#![allow(clippy::unwrap_used)] // a test that cannot make its data has failed

use dataloader::{
    DataError, DataSet, DataSetWriter, Inputs, Order, PrepareError, PrepareOptions, PrepareReport, Samples,
    SplitRule, Tokenizer, ValidationSet, prepare,
};
use proptest::prelude::*;
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

fn scratch_with(files: &[(&str, &[u8])]) -> (TempDir, Vec<PathBuf>) {
    let scratch = tempfile::tempdir().unwrap();
    let paths = files.iter().map(|(name, content)| {
        let path = scratch.path().join(name);
        fs::write(&path, content).unwrap();
        path
    });
    let paths = paths.collect();
    (scratch, paths)
}

fn options(val_fraction: f64) -> PrepareOptions {
    PrepareOptions { val_fraction, ..PrepareOptions::default() }
}

fn text_of(folder: &Path) -> Vec<u8> {
    let data = DataSet::open(folder).unwrap();
    data.text(0..data.tokens()).unwrap()
}

/// A data set of documents that each have their own text, in shards of at most `max_shard_tokens`.
fn written(documents: &[Vec<u8>], max_shard_tokens: u64) -> (TempDir, DataSet) {
    let scratch = tempfile::tempdir().unwrap();
    let mut writer = DataSetWriter::create(scratch.path(), Tokenizer::Bytes, max_shard_tokens).unwrap();
    for (i, document) in documents.iter().enumerate() {
        writer.push(0, i as u64 + 1, document).unwrap();
    }
    writer.finish(vec!["all.jsonl".into()]).unwrap();
    let data = DataSet::open(scratch.path()).unwrap();
    (scratch, data)
}

fn numbered_documents(n: usize) -> Vec<Vec<u8>> {
    (0..n).map(|i| format!("document {i}{}\n", "!".repeat(i % 7)).into_bytes()).collect()
}

fn all_tokens(data: &DataSet) -> Vec<i64> {
    let mut tokens = vec![0; data.tokens() as usize];
    data.read(0, &mut tokens).unwrap();
    tokens
}

#[test]
fn prepared_text_reads_back_byte_for_byte() {
    let every_byte: Vec<u8> = (0..=255).cycle().take(70_000).collect(); // no UTF-8, more than one piece
    let (scratch, files) = scratch_with(&[("a.txt", &every_byte), ("b.TXT", b"plain\n")]);
    let out = scratch.path().join("out");
    let report = prepare(&Inputs::new(&files), &out, &options(0.0)).unwrap();
    assert_eq!(text_of(&out.join("train")), [&every_byte[..], b"plain\n"].concat());
    assert_eq!((report.rule, report.val), (SplitRule::Nothing, None));
    assert_eq!((report.train.tokens, report.source_bytes), (70_000 + 6 + 2, 70_006));
    assert!(!out.join("val").exists());
    DataSet::open(&out.join("train")).unwrap().verify().unwrap();
}

#[test]
fn end_of_text_follows_every_document() {
    let (_scratch, data) = written(&[b"ab".to_vec(), b"".to_vec(), b"c".to_vec()], 1 << 20);
    assert_eq!(all_tokens(&data), [97, 98, 256, 99, 256]);
    assert_eq!(data.documents(), 2); // the empty one is none
}

#[test]
fn with_few_documents_the_end_of_each_is_held_out_at_a_line_end() {
    let text = "A line of forty characters, newline too.\n".repeat(200);
    let (scratch, files) = scratch_with(&[("a.txt", text.as_bytes()), ("b.txt", text.as_bytes())]);
    let out = scratch.path().join("out");
    let report = prepare(&Inputs::new(&files), &out, &options(0.1)).unwrap();
    let (train, val) = (text_of(&out.join("train")), text_of(&out.join("val")));
    assert_eq!(report.rule, SplitRule::Ends);
    assert_eq!(train, text[..41 * 180].repeat(2).as_bytes());
    assert_eq!(val, text[..41 * 20].repeat(2).as_bytes());
}

#[test]
fn with_many_documents_whole_ones_are_held_out() {
    let lines: String = (0..200).map(|i| format!("{{\"text\": \"<document {i}>\"}}\n")).collect();
    let (scratch, files) = scratch_with(&[("a.jsonl", lines.as_bytes())]);
    let out = scratch.path().join("out");
    let report = prepare(&Inputs::new(&files), &out, &options(0.1)).unwrap();
    assert_eq!(report.rule, SplitRule::Documents);
    assert_eq!(report.val.unwrap().documents, 20);
    let together = [text_of(&out.join("train")), text_of(&out.join("val"))].concat();
    let together = String::from_utf8(together).unwrap();
    for i in 0..200 {
        assert_eq!(together.matches(&format!("<document {i}>")).count(), 1);
    }
}

#[test]
fn preparing_twice_gives_the_same_data_set() {
    let (scratch, files) = scratch_with(&[("a.txt", &b"to be or not to be\n".repeat(100))]);
    let digest = |out: &str| {
        prepare(&Inputs::new(&files), &scratch.path().join(out), &options(0.1)).unwrap();
        let folder = scratch.path().join(out).join("train");
        (DataSet::open(&folder).unwrap().digest(), fs::read(folder.join("shard-00000.tokens")).unwrap())
    };
    assert_eq!(digest("one"), digest("two"));
}

#[test]
fn a_document_is_found_from_any_of_its_tokens() {
    let documents = numbered_documents(50);
    let (_scratch, data) = written(&documents, 100);
    assert!(data.manifest().unwrap().shards.len() > 5);
    let mut position = 0;
    for (i, document) in documents.iter().enumerate() {
        let end = position + document.len() as u64 + 1;
        for token in position..end {
            let info = data.document_at(token).unwrap();
            assert_eq!((info.number, info.record, info.file), (i as u64, i as u64 + 1, "all.jsonl"));
            assert_eq!((info.tokens, info.source_bytes), (position..end, document.len() as u64));
        }
        assert_eq!(data.text(position..end).unwrap(), *document);
        position = end;
    }
    data.verify().unwrap();
}

#[test]
fn jsonl_records_are_numbered_by_line_and_blank_lines_are_none() {
    let lines = b"{\"text\": \"one\"}\r\n\n{\"id\": 1, \"text\": \"\"}\n{\"text\": \"two\"}";
    let (scratch, files) = scratch_with(&[("a.jsonl", lines)]);
    let out = scratch.path().join("out");
    let PrepareReport { documents, skipped_documents, .. } =
        prepare(&Inputs::new(&files), &out, &options(0.0)).unwrap();
    assert_eq!((documents, skipped_documents), (2, 1));
    let data = DataSet::open(&out.join("train")).unwrap();
    assert_eq!(data.document(1).unwrap().record, 4);
    assert!(data.document(1).unwrap().file.ends_with("a.jsonl"));
}

#[test]
fn a_bad_line_is_named_and_nothing_is_left_behind() {
    let (scratch, files) = scratch_with(&[("a.jsonl", b"{\"text\": \"one\"}\n{\"test\": \"two\"}\n")]);
    let out = scratch.path().join("out");
    let error = prepare(&Inputs::new(&files), &out, &options(0.0)).unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, PrepareError::BadLine { line: 2, .. }));
    assert!(text.contains("a.jsonl:2: the object has no \"text\"") && text.contains("hint: "), "{text}");
    let left: Vec<_> =
        fs::read_dir(scratch.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["a.jsonl"]);
}

#[test]
fn input_that_cannot_be_prepared_is_refused_with_a_hint() {
    let (scratch, files) =
        scratch_with(&[("a.pdf", b"x"), ("b", b"x"), ("empty.txt", b""), ("tiny.txt", b"ab")]);
    let [pdf, bare, empty, tiny] = [0, 1, 2, 3].map(|i| &files[i..=i]);
    let out = scratch.path().join("out");
    let error =
        |files: &[PathBuf], fraction| prepare(&Inputs::new(files), &out, &options(fraction)).unwrap_err();
    for (error, expected) in [
        (error(pdf, 0.0), "a.pdf: unknown kind of file .pdf, expected one of: .txt, .md, .jsonl"),
        (error(bare, 0.0), "has no extension"),
        (error(empty, 0.0), "hold no text"),
        (error(tiny, 0.05), "nothing is left for val"),
        (error(tiny, 1.0), "--val-fraction is 1, expected at least 0 and less than 1"),
        (error(tiny, f64::NAN), "--val-fraction is NaN"),
        (error(&[], 0.0), "no input files"),
    ] {
        let text = error.to_string();
        assert!(text.contains(expected) && text.contains("hint: "), "{text}");
    }
    let missing = scratch.path().join("missing.txt");
    assert!(matches!(error(&[missing], 0.0), PrepareError::Data(DataError::Io { .. })));
    assert!(!out.exists());
}

#[test]
fn an_output_is_replaced_only_by_force_and_only_if_it_was_prepared() {
    let (scratch, files) = scratch_with(&[("a.txt", b"first\n"), ("b.txt", b"second\n")]);
    let out = scratch.path().join("out");
    let force = PrepareOptions { force: true, ..options(0.0) };
    prepare(&Inputs::new(&files[..1]), &out, &options(0.0)).unwrap();
    let error = prepare(&Inputs::new(&files[1..]), &out, &options(0.0)).unwrap_err();
    assert!(matches!(error, PrepareError::OutExists { .. }) && error.to_string().contains("--force"));
    assert_eq!(text_of(&out.join("train")), b"first\n");
    prepare(&Inputs::new(&files[1..]), &out, &force).unwrap();
    assert_eq!(text_of(&out.join("train")), b"second\n");

    fs::write(out.join("train/thesis.tex"), "years of work").unwrap();
    let error = prepare(&Inputs::new(&files), &out, &force).unwrap_err();
    assert!(matches!(error, PrepareError::OutHoldsOtherThings { .. }), "{error}");
    assert!(out.join("train/thesis.tex").exists());
}

#[test]
fn what_an_interrupted_preparation_left_is_no_data_set_and_is_replaced_by_force() {
    let (scratch, files) = scratch_with(&[("a.txt", b"text\n")]);
    let (out, left) = (scratch.path().join("out"), scratch.path().join("out.tmp"));
    fs::create_dir_all(left.join("train")).unwrap();
    fs::write(left.join("train/shard-00000.tokens.tmp"), "half").unwrap();
    let error = prepare(&Inputs::new(&files), &out, &options(0.0)).unwrap_err();
    assert!(matches!(error, PrepareError::Unfinished { .. }), "{error}");
    prepare(&Inputs::new(&files), &out, &PrepareOptions { force: true, ..options(0.0) }).unwrap();
    assert!(!left.exists());
}

#[test]
fn an_empty_output_folder_is_used() {
    let (scratch, files) = scratch_with(&[("a.txt", b"text\n")]);
    let out = scratch.path().join("deep/out");
    fs::create_dir_all(&out).unwrap();
    prepare(&Inputs::new(&files), &out, &options(0.0)).unwrap();
    assert_eq!(text_of(&out.join("train")), b"text\n");
}

#[test]
fn tokens_four_bytes_wide_are_read_like_those_of_two() {
    // No tokenizer needs them yet, so that the shard is widened by hand (docs/FORMATS.md).
    let (scratch, data) = written(&numbered_documents(30), 1 << 28);
    let tokens = all_tokens(&data);
    let shard = scratch.path().join("shard-00000.tokens");
    let narrow = fs::read(&shard).unwrap();
    let index_offset = u64::from_le_bytes(narrow[56..64].try_into().unwrap()) as usize;

    let payload: Vec<u8> = tokens.iter().flat_map(|&token| (token as u32).to_le_bytes()).collect();
    let mut index = narrow[index_offset..].to_vec();
    index[30 * 32..][..4].copy_from_slice(&crc32fast::hash(&payload).to_le_bytes());
    let mut wide = narrow[..256].to_vec();
    wide.extend(&payload);
    wide.resize(wide.len().next_multiple_of(16), 0);
    let index_offset = wide.len() as u64;
    wide.extend(&index);
    wide[12..16].copy_from_slice(&4u32.to_le_bytes());
    wide[48..56].copy_from_slice(&(payload.len() as u64).to_le_bytes());
    wide[56..64].copy_from_slice(&index_offset.to_le_bytes());
    wide[76..80].copy_from_slice(&crc32fast::hash(&index).to_le_bytes());
    let checksum = crc32fast::hash(&wide[..252]);
    wide[252..256].copy_from_slice(&checksum.to_le_bytes());
    fs::write(&shard, wide).unwrap();

    let data = DataSet::open(scratch.path()).unwrap();
    assert_eq!(all_tokens(&data), tokens);
    assert_eq!(data.document(29).unwrap().tokens.end, tokens.len() as u64);
}

#[test]
fn a_data_set_without_documents_opens_and_has_no_text() {
    let (_scratch, data) = written(&[], 1 << 28);
    assert_eq!((data.tokens(), data.text(0..0).unwrap()), (0, vec![]));
    assert!(data.document(0).is_err() && data.document_at(0).is_err() && data.text(0..1).is_err());
    assert!(matches!(ValidationSet::open(data, 10, None), Err(DataError::TooFewTokens { .. })));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn sharded_equals_whole_wherever_a_read_starts_and_ends(
        documents in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 1..30),
        max_shard_tokens in 1u64..60,
        from: prop::sample::Index,
        to: prop::sample::Index,
    ) {
        let (_a, whole) = written(&documents, 1 << 28);
        let (_b, sharded) = written(&documents, max_shard_tokens);
        let tokens = all_tokens(&whole);
        prop_assert_eq!(&all_tokens(&sharded), &tokens);
        let (from, to) = (from.index(tokens.len() + 1), to.index(tokens.len() + 1));
        let (from, to) = (from.min(to), from.max(to));
        let mut part = vec![0; to - from];
        sharded.read(from as u64, &mut part).unwrap();
        prop_assert_eq!(&part[..], &tokens[from..to]);
        let text: Vec<u8> = documents.concat();
        prop_assert_eq!(sharded.text(0..sharded.tokens()).unwrap(), text);
        sharded.verify().unwrap();
    }

    #[test]
    fn shares_of_ranks_cover_every_target_once(
        n_documents in 1usize..40,
        seq_len in 1usize..50,
        world_size in 1usize..9,
        rows in 1usize..7,
        max_tokens in prop::option::of(0u64..400),
    ) {
        let (_scratch, data) = written(&numbered_documents(n_documents), 1 << 28);
        let tokens = all_tokens(&data);
        let set = ValidationSet::open(data, seq_len, max_tokens).unwrap();
        let mut targets = Vec::new();
        for rank in 0..world_size {
            for windows in set.batches(rows, rank, world_size) {
                let batch = set.batch(windows).unwrap();
                prop_assert!(batch.rows <= rows && batch.row_len <= seq_len + 1);
                for row in batch.tokens.chunks(batch.row_len) {
                    targets.extend_from_slice(&row[1..]);
                }
            }
        }
        prop_assert_eq!(targets.len() as u64, set.n_targets());
        prop_assert_eq!(&targets[..], &tokens[1..=targets.len()]);
        match max_tokens {
            None => prop_assert_eq!(targets.len(), tokens.len() - 1),
            Some(max) => prop_assert!(targets.len() as u64 <= max.max(seq_len as u64)),
        }
    }
}

#[test]
fn validation_counts_all_bytes_of_the_whole_set_and_a_share_of_a_part() {
    let documents = numbered_documents(40);
    let bytes: usize = documents.iter().map(Vec::len).sum();
    let (scratch, data) = written(&documents, 1 << 28);
    let set = ValidationSet::open(data, 16, None).unwrap();
    assert_eq!(set.source_bytes(), bytes as f64);
    let data = DataSet::open(scratch.path()).unwrap();
    let half = ValidationSet::open(data, 16, Some(set.n_targets() / 2)).unwrap();
    let share = half.n_targets() as f64 / set.n_targets() as f64;
    assert!(share > 0.4 && (half.source_bytes() / bytes as f64 - share).abs() < 1e-12);
}

#[test]
fn an_epoch_shows_every_sequence_once_with_neighbours_sharing_one_token() {
    let (scratch, data) = written(&numbered_documents(60), 100);
    let tokens = all_tokens(&data);
    let samples = Samples::open(data, 10, 1337).unwrap();
    let n = samples.n_sequences();
    assert_eq!(n, (tokens.len() as u64 - 1) / 10);
    for epoch in 0..2 {
        let batch = samples.batch(epoch * n..(epoch + 1) * n).unwrap();
        assert_eq!((batch.rows, batch.row_len), (n as usize, 11));
        let mut seen: Vec<&[i64]> = batch.tokens.chunks(11).collect();
        let mut expected: Vec<&[i64]> = (0..n as usize).map(|j| &tokens[10 * j..10 * j + 11]).collect();
        assert_ne!(seen, expected);
        seen.sort_unstable();
        expected.sort_unstable();
        assert_eq!(seen, expected);
    }
    // The same from a cold start in the middle: there is no state to have missed.
    let again = Samples::open(DataSet::open(scratch.path()).unwrap(), 10, 1337).unwrap();
    assert_eq!(again.batch(n + 3..n + 5).unwrap(), samples.batch(n + 3..n + 5).unwrap());
}

#[test]
fn interleaved_ranks_see_what_one_rank_sees() {
    let (_scratch, data) = written(&numbered_documents(60), 100);
    let samples = Samples::open(data, 10, 7).unwrap();
    let plan = |world_size| configs::BatchPlan::new(160, 2, 10, world_size).unwrap();
    let steps = |world_size: usize| {
        let plan = plan(world_size);
        let mut tokens = Vec::new();
        for first in (0..5).map(|step| step * plan.samples_per_step()) {
            for rank in 0..world_size {
                for micro_step in 0..plan.grad_accum_steps {
                    tokens.extend(samples.batch(plan.samples(first, rank, micro_step)).unwrap().tokens);
                }
            }
        }
        tokens
    };
    let one = steps(1);
    for world_size in [2, 4, 8] {
        assert_eq!(steps(world_size), one, "{world_size} ranks");
    }
}

#[test]
fn the_documents_of_a_batch_are_those_whose_tokens_it_has() {
    let documents = numbered_documents(60);
    let (_scratch, data) = written(&documents, 100);
    let samples = Samples::open(data, 30, 1337).unwrap();
    let n = samples.n_sequences();
    let mut tokens = Vec::<i64>::new();
    for passage in samples.documents(0..n) {
        let passage = passage.unwrap();
        let (number, range) = (passage.document.number as usize, &passage.tokens);
        let mut whole: Vec<i64> = documents[number].iter().map(|&byte| i64::from(byte)).collect();
        whole.push(256); // end-of-text
        tokens.extend(&whole[range.start as usize..range.end as usize]);
        assert_eq!(passage.document.record, number as u64 + 1);
        assert!(
            samples
                .sources()
                .next()
                .unwrap()
                .manifest()
                .unwrap()
                .shards
                .iter()
                .any(|shard| shard.name == passage.document.shard)
        );
    }
    assert_eq!(tokens, samples.batch(0..n).unwrap().tokens);

    let first = samples.documents(5..6).next().unwrap().unwrap().to_string();
    assert!(first.starts_with("sample 5: all.jsonl record "), "{first}");
}

#[test]
fn samples_that_are_left_out_are_never_seen_and_all_others_move_up() {
    let (_scratch, data) = written(&numbered_documents(60), 100);
    let mut samples = Samples::open(data, 10, 1337).unwrap();
    let before = samples.batch(0..30).unwrap().tokens;
    assert_eq!(samples.numbers(4..6), 4..6);
    samples.leave_out(std::iter::once(5..10).collect());
    let after = samples.batch(0..25).unwrap().tokens;
    assert_eq!(after, [&before[..5 * 11], &before[10 * 11..]].concat());
    assert_eq!([samples.numbers(3..5), samples.numbers(4..6), samples.numbers(5..7)], [3..5, 4..11, 10..12]);
    assert_eq!(samples.documents(5..6).next().unwrap().unwrap().sample, 10);
}

#[test]
fn a_data_set_too_small_for_one_sample_is_refused() {
    let (scratch, data) = written(&[b"nine byte".to_vec()], 1 << 28);
    let error = Samples::open(data, 10, 1).unwrap_err();
    assert!(matches!(error, DataError::TooFewTokens { tokens: 10, needed: 11, .. }), "{error}");
    let data = DataSet::open(scratch.path()).unwrap();
    assert_eq!(Samples::open(data, 9, 1).unwrap().batch(0..3).unwrap().rows, 3);
}

#[test]
fn data_sets_and_orders_are_shared_between_threads() {
    fn shared<T: Send + Sync>() {}
    shared::<DataSet>();
    shared::<Samples>();
    shared::<Order>();
}
