//! Token files of llm.c, nanoGPT and Megatron: read as they are, in a mixture with ours, to and fro without a
//! token lost, and each kind of damage with an error of its own.

#![allow(clippy::unwrap_used)] // a test that cannot make its data has failed

use dataloader::{
    DataError, DataSet, DataSetWriter, Format, Samples, Tokenizer, ValidationSet, convert_to,
    convert_to_ours, vocab_size,
};
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

const END: u32 = 50_256;

fn ours(folder: &Path) -> DataSet {
    let mut writer = DataSetWriter::create(folder, Tokenizer::Gpt2, 1000).unwrap();
    for i in 0..60u64 {
        writer
            .push(0, i + 1, format!("Document {i} says: {}", "the river ran home ".repeat(8)).as_bytes())
            .unwrap();
    }
    writer.finish(vec!["a.jsonl".into()]).unwrap();
    DataSet::open(folder).unwrap()
}

fn tokens(data: &DataSet) -> Vec<u32> {
    let mut tokens = vec![0; data.tokens() as usize];
    data.read(0, &mut tokens).unwrap();
    tokens.into_iter().map(|token| u32::try_from(token).unwrap()).collect()
}

/// The same documents in all three formats, written here by hand as their own programs write them.
fn written_by_others(scratch: &Path, documents: &[Vec<u32>]) -> [PathBuf; 3] {
    let u16s = |tokens: &[u32]| -> Vec<u8> {
        tokens.iter().flat_map(|&token| (token as u16).to_le_bytes()).collect()
    };
    let (before, after): (Vec<Vec<u32>>, Vec<Vec<u32>>) = documents
        .iter()
        .map(|tokens| ([&[END], &tokens[..]].concat(), [&tokens[..], &[END]].concat()))
        .unzip();
    let mut llmc = vec![0u8; 1024];
    for (i, word) in [20_240_520u32, 1, before.concat().len() as u32].into_iter().enumerate() {
        llmc[4 * i..4 * i + 4].copy_from_slice(&word.to_le_bytes());
    }
    llmc.extend(u16s(&before.concat()));

    let mut index = b"MMIDIDX\0\0".to_vec();
    index.extend(1u64.to_le_bytes());
    index.push(8);
    index.extend((after.len() as u64).to_le_bytes());
    index.extend((after.len() as u64 + 1).to_le_bytes());
    index.extend(after.iter().flat_map(|tokens| (tokens.len() as i32).to_le_bytes()));
    let mut pointer = 0i64;
    for tokens in &after {
        index.extend(pointer.to_le_bytes());
        pointer += 2 * tokens.len() as i64;
    }
    index.extend((0..=after.len() as i64).flat_map(i64::to_le_bytes));

    let files = ["llmc.bin", "nano.bin", "mega.bin"].map(|name| scratch.join(name));
    fs::write(&files[0], llmc).unwrap();
    fs::write(&files[1], u16s(&after.concat())).unwrap();
    fs::write(&files[2], u16s(&after.concat())).unwrap();
    fs::write(scratch.join("mega.idx"), index).unwrap();
    files
}

fn documents(n: u32) -> Vec<Vec<u32>> {
    (0..n).map(|i| (0..20 + i % 7).map(|j| (i * 31 + j * j) % 50_000).collect()).collect()
}

#[test]
fn files_of_other_programs_open_as_they_are_and_know_their_documents() {
    let scratch = tempfile::tempdir().unwrap();
    let documents = documents(50);
    let files = written_by_others(scratch.path(), &documents);
    for (file, format) in files.iter().zip([Format::LlmC, Format::NanoGpt, Format::Megatron]) {
        let data = DataSet::open(file).unwrap();
        assert_eq!((data.format(), data.documents(), vocab_size(file)), (Some(format), 50, Ok(50_257)));
        let mut at = 0;
        for (n, document) in documents.iter().enumerate() {
            let info = data.document_at(at + 5).unwrap();
            assert_eq!(
                (info.number, info.tokens.start, info.record),
                (n as u64, at, n as u64 + 1),
                "{format}"
            );
            at += document.len() as u64 + 1;
        }
        assert_eq!(at, data.tokens());
        data.verify().unwrap();
    }
    // Megatron's files are also known by their common name, and by the index.
    for name in ["mega", "mega.idx"] {
        let data = DataSet::open(&scratch.path().join(name)).unwrap();
        assert_eq!((data.format(), data.documents()), (Some(Format::Megatron), 50));
    }
}

#[test]
fn every_format_goes_to_every_other_and_back_without_a_change() {
    let scratch = tempfile::tempdir().unwrap();
    let path = |name: &str| scratch.path().join(name);
    let data = ours(&path("ours"));
    for (format, name) in [(Format::LlmC, "l.bin"), (Format::NanoGpt, "n.bin"), (Format::Megatron, "m.bin")] {
        let converted = convert_to(&data, format, &path(name)).unwrap();
        assert_eq!((converted.documents, converted.tokens), (60, data.tokens()));
        let theirs = DataSet::open(&path(name)).unwrap();
        assert_eq!(theirs.format(), Some(format));
        let back = path(&format!("back-{name}"));
        convert_to_ours(&theirs, &back, 1000).unwrap();
        let back = DataSet::open(&back).unwrap();
        assert_eq!((tokens(&back), back.digest()), (tokens(&data), data.digest()), "{format}");
        assert_eq!(back.source_bytes(), data.source_bytes());
        assert_eq!(theirs.source_bytes(), data.source_bytes());
        // And to a third format, with the same bytes as straight from ours.
        convert_to(&theirs, Format::LlmC, &path("third.bin")).unwrap();
        convert_to(&data, Format::LlmC, &path("straight.bin")).unwrap();
        assert_eq!(fs::read(path("third.bin")).unwrap(), fs::read(path("straight.bin")).unwrap());
    }
}

#[test]
fn files_that_others_wrote_come_back_byte_for_byte() {
    let scratch = tempfile::tempdir().unwrap();
    let files = written_by_others(scratch.path(), &documents(50));
    for (file, format) in files.iter().zip([Format::LlmC, Format::NanoGpt, Format::Megatron]) {
        let folder = scratch.path().join(format!("ours-{format}"));
        convert_to_ours(&DataSet::open(file).unwrap(), &folder, 1 << 28).unwrap();
        let again = scratch.path().join("again.bin");
        convert_to(&DataSet::open(&folder).unwrap(), format, &again).unwrap();
        assert_eq!(fs::read(&again).unwrap(), fs::read(file).unwrap(), "{format}");
    }
    let again = fs::read(scratch.path().join("again.idx")).unwrap();
    assert_eq!(again, fs::read(scratch.path().join("mega.idx")).unwrap());
}

#[test]
fn a_mixture_of_all_four_is_sampled_and_validated_on() {
    let scratch = tempfile::tempdir().unwrap();
    let files = written_by_others(scratch.path(), &documents(50));
    ours(&scratch.path().join("ours"));
    let all = [&files[0], &files[1], &files[2], &scratch.path().join("ours")];
    let sources = all.map(|path| (DataSet::open(path).unwrap(), 1.0));
    let samples = Samples::mixed(sources.into(), 16, 1).unwrap();
    assert_eq!(samples.batch(0..100).unwrap().rows, 100);
    let named: Vec<PathBuf> =
        samples.documents(0..100).map(|passage| passage.unwrap().source.unwrap().to_path_buf()).collect();
    assert!(all.iter().all(|path| named.contains(path)));
    let validation = ValidationSet::open(DataSet::open(&files[1]).unwrap(), 16, None).unwrap();
    assert!(validation.source_bytes() > validation.n_targets() as f64);
}

fn damaged(damage: impl FnOnce(&Path)) -> DataError {
    let scratch: TempDir = tempfile::tempdir().unwrap();
    written_by_others(scratch.path(), &documents(50));
    damage(scratch.path());
    let read =
        |name: &str| DataSet::open(&scratch.path().join(name)).and_then(|data| data.verify().map(drop));
    let errors = ["llmc.bin", "nano.bin", "mega.bin"].map(read).into_iter().filter_map(Result::err);
    let [error] = errors.collect::<Vec<_>>().try_into().unwrap();
    let text = error.to_string();
    assert!(text.contains(&scratch.path().display().to_string()) && text.contains("hint: "), "{text}");
    error
}

fn change(file: PathBuf, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = fs::read(&file).unwrap();
    change(&mut bytes);
    fs::write(file, bytes).unwrap();
}

#[test]
fn a_file_that_is_too_short_or_too_long_is_refused() {
    for name in ["llmc.bin", "nano.bin", "mega.bin", "mega.idx"] {
        let error = damaged(|folder| change(folder.join(name), |bytes| bytes.push(0)));
        assert!(matches!(error, DataError::TooLong { .. }), "{name}: {error}");
    }
    for name in ["llmc.bin", "mega.bin", "mega.idx"] {
        let error = damaged(|folder| change(folder.join(name), |bytes| bytes.truncate(bytes.len() - 2)));
        assert!(matches!(error, DataError::Truncated { .. }), "{name}: {error}");
    }
    let error = damaged(|folder| change(folder.join("llmc.bin"), |bytes| bytes.truncate(100)));
    assert!(matches!(error, DataError::Truncated { got: 100, expected: 1024, .. }), "{error}");
}

#[test]
fn a_token_that_gpt2_does_not_have_is_named_with_its_byte() {
    let error = damaged(|folder| change(folder.join("nano.bin"), |bytes| bytes[200..202].fill(0xFF)));
    assert!(
        matches!(error, DataError::ForeignToken { position: 100, offset: 200, token: 65_535, .. }),
        "{error}"
    );
}

#[test]
fn every_lie_of_an_index_is_told_with_its_byte() {
    let put = |at: usize, value: u64| {
        move |bytes: &mut Vec<u8>| bytes[at..at + 8].copy_from_slice(&value.to_le_bytes())
    };
    let pointers = 34 + 4 * 50;
    let ends = 34 + 12 * 50;
    type Lie = Box<dyn FnOnce(&mut Vec<u8>)>;
    let lies: [(Lie, &str); 9] = [
        (Box::new(|bytes| bytes[0] = b'X'), "starts with"),
        (Box::new(put(9, 2)), "version 2 at byte 9"),
        (Box::new(|bytes| bytes[17] = 6), "dtype code 6 at byte 17 is a float"),
        (Box::new(|bytes| bytes[17] = 99), "dtype code 99 at byte 17"),
        (Box::new(put(18, u64::MAX / 2)), "fit no file"),
        (Box::new(put(26, 0)), "0 document boundaries at byte 26"),
        (Box::new(put(pointers + 8, 7)), "sequence 1 starts at byte 7"),
        (Box::new(|bytes| bytes[34..38].fill(0xFF)), "negative length"),
        (Box::new(put(ends + 8, 1 << 40)), "document 1 starts at sequence"),
    ];
    for (lie, what) in lies {
        let error = damaged(|folder| change(folder.join("mega.idx"), lie));
        assert!(
            matches!(error, DataError::ForeignIndex { .. }) && error.to_string().contains(what),
            "{error}"
        );
    }
}
