//! Text of every kind becomes the tokens that it should, on any number of threads, whole or in parts, and a
//! preparation that was interrupted ends with the same bytes.

#![allow(clippy::unwrap_used)] // a test that cannot make its data has failed

use dataloader::{
    Curation, DataSet, DedupOptions, Filter, Inputs, PrepareError, PrepareOptions, SplitRule, Tokenizer,
    curate, prepare, tokenize, train_tokenizer,
};
use parquet::basic::Compression;
use parquet::data_type::{ByteArray, ByteArrayType, Int32Type};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

fn lines(n: usize) -> String {
    (0..n)
        .map(|i| format!("{{\"text\": \"Document {i} says: the river ran\", \"score\": {}}}\n", i % 5))
        .collect()
}

fn text_of(folder: &Path) -> String {
    let data = DataSet::open(folder).unwrap();
    String::from_utf8(data.text(0..data.tokens()).unwrap()).unwrap()
}

fn options(val_fraction: f64) -> PrepareOptions {
    PrepareOptions { val_fraction, ..PrepareOptions::default() }
}

/// All files below a folder with their bytes.
fn tree(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
        let name = PathBuf::from(entry.file_name().unwrap());
        if entry.is_dir() {
            files.extend(tree(&entry).into_iter().map(|(path, bytes)| (name.join(path), bytes)));
        } else if let Ok(bytes) = fs::read(&entry) {
            files.insert(name, bytes); // what is renamed meanwhile is not there
        }
    }
    files
}

fn write_parquet(file: &Path, texts: &[String]) {
    let schema = "message m { required binary text (UTF8); optional int32 score; }";
    let schema = Arc::new(parquet::schema::parser::parse_message_type(schema).unwrap());
    let properties = Arc::new(WriterProperties::builder().set_compression(Compression::SNAPPY).build());
    let mut writer = SerializedFileWriter::new(fs::File::create(file).unwrap(), schema, properties).unwrap();
    for texts in texts.chunks(30) {
        let mut group = writer.next_row_group().unwrap();
        let mut column = group.next_column().unwrap().unwrap();
        let values: Vec<ByteArray> = texts.iter().map(|text| text.as_str().into()).collect();
        column.typed::<ByteArrayType>().write_batch(&values, None, None).unwrap();
        column.close().unwrap();
        let mut column = group.next_column().unwrap().unwrap();
        let levels = vec![1; texts.len()];
        let scores: Vec<i32> = (0..texts.len() as i32).collect();
        column.typed::<Int32Type>().write_batch(&scores, Some(&levels), None).unwrap();
        column.close().unwrap();
        group.close().unwrap();
    }
    writer.close().unwrap();
}

#[test]
fn every_kind_of_file_gives_its_documents() {
    let scratch = tempfile::tempdir().unwrap();
    let path = |name: &str| scratch.path().join(name);
    let text = lines(100);
    fs::write(path("a.jsonl"), &text).unwrap();
    let mut gzip = flate2::write::GzEncoder::new(
        fs::File::create(path("b.jsonl.gz")).unwrap(),
        flate2::Compression::fast(),
    );
    gzip.write_all(text.as_bytes()).unwrap();
    gzip.finish().unwrap();
    fs::write(path("c.jsonl.zst"), zstd::encode_all(text.as_bytes(), 1).unwrap()).unwrap();
    let texts: Vec<String> = (0..100).map(|i| format!("Document {i} says: the river ran")).collect();
    write_parquet(&path("d.parquet"), &texts);
    fs::write(path("e.md"), texts.concat()).unwrap();
    for name in ["a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet", "e.md"] {
        let out = path(&format!("out-{name}"));
        let report = prepare(&Inputs::new(&[path(name)]), &out, &options(0.0)).unwrap();
        assert_eq!(text_of(&out.join("train")), texts.concat(), "{name}");
        let data = DataSet::open(&out.join("train")).unwrap();
        assert_eq!(report.documents, if name == "e.md" { 1 } else { 100 });
        let last = data.document(data.documents() - 1).unwrap();
        assert_eq!(last.record, report.documents);
    }
    let column = Inputs { text_key: "score".into(), ..Inputs::new(&[path("d.parquet")]) };
    let error = prepare(&column, &path("x"), &options(0.0)).unwrap_err().to_string();
    assert!(error.contains("d.parquet:1: ") && error.contains("expected a string"), "{error}");
    let column = Inputs { text_key: "body".into(), ..Inputs::new(&[path("d.parquet")]) };
    let error = prepare(&column, &path("x"), &options(0.0)).unwrap_err().to_string();
    assert!(error.contains("has no column \"body\", there are text, score"), "{error}");
}

#[test]
fn a_table_that_its_library_panics_over_is_refused_by_name() {
    let scratch = tempfile::tempdir().unwrap();
    let table = scratch.path().join("a.parquet");
    fs::write(&table, include_bytes!("../../fuzz/seeds/parquet/no-dictionary.parquet")).unwrap();
    let error = prepare(&Inputs::new(&[table]), &scratch.path().join("x"), &options(0.0)).unwrap_err();
    let told = error.to_string();
    assert!(told.contains("a.parquet:1: the table contradicts itself: Decoder for dict"), "{told}");
}

#[test]
fn threads_change_no_byte() {
    let scratch = tempfile::tempdir().unwrap();
    let file = scratch.path().join("a.jsonl");
    fs::write(&file, lines(30_000)).unwrap();
    let prepared = |threads: usize| {
        let out = scratch.path().join(format!("out-{threads}"));
        let options = PrepareOptions {
            tokenizer: Tokenizer::Gpt2,
            max_shard_tokens: 50_000,
            threads,
            ..PrepareOptions::default()
        };
        let report = prepare(&Inputs::new(std::slice::from_ref(&file)), &out, &options).unwrap();
        assert_eq!(report.rule, SplitRule::Documents);
        assert!(report.train.shards > 3 && report.val.unwrap().shards > 3);
        tree(&out)
    };
    let one = prepared(1);
    for threads in [2, 3, 8] {
        assert!(prepared(threads) == one, "{threads} threads");
    }
}

#[test]
fn a_long_text_in_parts_has_the_ids_of_the_whole() {
    let scratch = tempfile::tempdir().unwrap();
    let file = scratch.path().join("long.txt");
    let text: String = (0..400_000).map(|i| format!("line {i} of it, isn't it;\n")).collect(); // 10 MB
    fs::write(&file, &text).unwrap();
    for (fraction, tokenizer) in [(0.0, Tokenizer::Gpt2), (0.1, Tokenizer::Bytes)] {
        let out = scratch.path().join(format!("out-{}", tokenizer.id()));
        let options = PrepareOptions { tokenizer: tokenizer.clone(), ..options(fraction) };
        let report = prepare(&Inputs::new(std::slice::from_ref(&file)), &out, &options).unwrap();
        assert_eq!((report.documents, report.source_bytes), (1, text.len() as u64));
        let data = DataSet::open(&out.join("train")).unwrap();
        let train = text_of(&out.join("train"));
        let mut expected = Vec::new();
        tokenizer.encode(train.as_bytes(), &mut expected);
        expected.push(tokenizer.end_of_text());
        let mut tokens = vec![0; data.tokens() as usize];
        data.read(0, &mut tokens).unwrap();
        assert!(
            tokens.iter().zip(&expected).all(|(a, b)| *a == i64::from(*b)) && tokens.len() == expected.len()
        );
        let val = if fraction > 0.0 { text_of(&out.join("val")) } else { String::new() };
        assert!(train.ends_with('\n') && train.clone() + &val == text);
        assert!((val.len() as f64 / text.len() as f64 - fraction).abs() < 1e-4);
        data.verify().unwrap();
    }
}

#[test]
fn an_interrupted_preparation_goes_on_and_ends_with_the_same_bytes() {
    let scratch = tempfile::tempdir().unwrap();
    let file = scratch.path().join("a.jsonl");
    fs::write(&file, lines(60_000)).unwrap();
    let inputs = Inputs::new(std::slice::from_ref(&file));
    let options = PrepareOptions { max_shard_tokens: 50_000, ..options(0.1) };
    let (whole, running) = (scratch.path().join("whole"), scratch.path().join("whole.tmp"));
    let (out, left) = (scratch.path().join("out"), scratch.path().join("out.tmp"));
    std::thread::scope(|scope| {
        scope.spawn(|| prepare(&inputs, &whole, &options).unwrap());
        while !running.join("train/shard-00005.tokens").exists() {
            std::thread::yield_now();
        }
        // What a killed process would have left: the progress first, then shards that may be more.
        for name in ["progress.json", "train/shard-00000.tokens", "val/shard-00000.tokens"] {
            fs::create_dir_all(left.join(name).parent().unwrap()).unwrap();
            fs::copy(running.join(name), left.join(name)).unwrap();
        }
        for (name, bytes) in tree(&running) {
            if name.extension().is_some_and(|extension| extension == "tokens") && !left.join(&name).exists() {
                fs::write(left.join(name), bytes).unwrap();
            }
        }
    });
    fs::write(left.join("train/shard-00009.tokens.tmp"), "half").unwrap();
    let first = left.join("train/shard-00000.tokens");
    let modified = |file: &Path| fs::metadata(file).unwrap().modified().unwrap();
    let before = modified(&first);

    // Another preparation does not go on with it.
    let other = PrepareOptions { tokenizer: Tokenizer::Gpt2, ..options.clone() };
    let error = prepare(&inputs, &out, &other).unwrap_err();
    assert!(matches!(error, PrepareError::Unfinished { .. }), "{error}");
    assert_eq!(modified(&first), before);

    prepare(&inputs, &out, &options).unwrap();
    assert_eq!(modified(&out.join("train/shard-00000.tokens")), before); // kept, not made again
    assert!(tree(&whole) == tree(&out));
}

#[test]
fn tokenize_gives_the_ids_of_each_document() {
    let scratch = tempfile::tempdir().unwrap();
    let file = scratch.path().join("a.jsonl");
    fs::write(&file, "{\"text\": \"Hello, world!\"}\n\n{\"text\": \"\"}\n{\"text\": \"<|endoftext|>\"}\n")
        .unwrap();
    let mut all = Vec::new();
    let mut each = |tokens: &[u32]| {
        all.push(tokens.to_vec());
        Ok(())
    };
    tokenize(&Inputs::new(&[file]), &Tokenizer::Gpt2, 2, &mut each).unwrap();
    assert_eq!(all, [vec![15496, 11, 995, 0], vec![], vec![27, 91, 437, 1659, 5239, 91, 29]]);
}

#[test]
fn a_tokenizer_learnt_here_prepares_a_data_set_that_carries_it() {
    let scratch = tempfile::tempdir().unwrap();
    let file = scratch.path().join("a.jsonl");
    fs::write(&file, lines(2000)).unwrap();
    let inputs = Inputs::new(std::slice::from_ref(&file));
    let (tokenizer, learnt) = train_tokenizer(&inputs, 300, 2).unwrap();
    assert_eq!((tokenizer.vocab_size(), learnt.documents), (300, 2000));
    assert_eq!(train_tokenizer(&inputs, 300, 1).unwrap().0, tokenizer);
    let out = scratch.path().join("out");
    prepare(&inputs, &out, &PrepareOptions { tokenizer: tokenizer.clone(), ..options(0.1) }).unwrap();
    let data = DataSet::open(&out.join("train")).unwrap();
    assert_eq!(data.tokenizer(), &tokenizer);
    assert!(data.tokens() * 3 < data.source_bytes());
    // Without its table the data set cannot be read; with another one it is another.
    fs::write(out.join("train/tokenizer.tiktoken"), "IQ== 0\n").unwrap();
    let error = DataSet::open(&out.join("train")).unwrap_err().to_string();
    assert!(error.contains("tokenizer.tiktoken") && error.contains("has no token"), "{error}");
    assert!(train_tokenizer(&inputs, 256, 1).unwrap_err().to_string().contains("at least 257"));
}

#[test]
fn what_curation_drops_is_in_no_data_set_and_in_the_report() {
    let scratch = tempfile::tempdir().unwrap();
    let file = scratch.path().join("a.jsonl");
    fs::write(&file, lines(500) + &lines(500)).unwrap();
    let inputs = Inputs::new(std::slice::from_ref(&file));
    let curation = Curation {
        filter: Some(Filter { min: vec![("score".into(), 3.0)], ..Filter::default() }),
        dedup: Some(DedupOptions { by: None, exact: true, near: None }),
        ..Curation::default()
    };
    let kept = scratch.path().join("kept.jsonl.zst");
    let report = curate(&inputs, &curation, &kept, 2).unwrap();
    assert_eq!((report.read, report.kept), (1000, 200));
    assert_eq!(report.dropped["filter: score below 3"], 600);
    assert_eq!(report.dropped["dedup: the text of an earlier document"], 200);
    assert_eq!(report.examples.len(), 10);
    assert_eq!((report.examples[0].record, report.examples[0].detail.as_deref()), (1, Some("0")));

    let bad = scratch.path().join("bad.jsonl");
    fs::write(&bad, lines(3) + "no object\n").unwrap();
    let nowhere = scratch.path().join("nowhere.jsonl");
    let error = curate(&Inputs::new(&[bad]), &curation, &nowhere, 2).unwrap_err();
    assert!(matches!(error, PrepareError::BadLine { line: 4, .. }), "{error}");
    let left = |name: &str| scratch.path().join(name).exists();
    assert!(!left("nowhere.jsonl") && !left("nowhere.jsonl.tmp") && !left("nowhere.jsonl.scratch"));

    let (direct, staged) = (scratch.path().join("direct"), scratch.path().join("staged"));
    prepare(&Inputs::new(&[kept]), &direct, &options(0.1)).unwrap();
    let stages = PrepareOptions { curation, max_shard_tokens: 1000, ..options(0.1) };
    let also = prepare(&inputs, &staged, &stages).unwrap();
    assert_eq!(also.curation.unwrap(), report);
    for split in ["train", "val"] {
        assert_eq!(text_of(&staged.join(split)), text_of(&direct.join(split)), "{split}");
    }
}
