//! Every way in which a shard or its folder can be damaged has an error of its own, which names the
//! file and says what to do.

#![allow(clippy::unwrap_used)] // a test that cannot make its data has failed

use dataloader::{DataError, DataSet, DataSetWriter, Tokenizer};
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// A data set of two documents and more than two blocks in one shard.
fn data_set() -> (TempDir, PathBuf) {
    let scratch = tempfile::tempdir().unwrap();
    let folder = scratch.path().join("data");
    let mut writer = DataSetWriter::create(&folder, Tokenizer::Bytes, 1 << 28).unwrap();
    writer.push(0, 1, &b"some text ".repeat(60_000)).unwrap();
    writer.push(0, 2, &b"more text ".repeat(60_000)).unwrap();
    writer.finish(vec!["a.jsonl".into()]).unwrap();
    let shard = folder.join("shard-00000.tokens");
    (scratch, shard)
}

fn change(file: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = fs::read(file).unwrap();
    change(&mut bytes);
    fs::write(file, bytes).unwrap();
}

/// Writes a field of the header and makes the header's checksum right again.
fn change_field(file: &Path, offset: usize, field: &[u8]) {
    change(file, |bytes| {
        bytes[offset..offset + field.len()].copy_from_slice(field);
        reseal(bytes);
    });
}

fn reseal(bytes: &mut [u8]) {
    let checksum = crc32fast::hash(&bytes[..252]);
    bytes[252..256].copy_from_slice(&checksum.to_le_bytes());
}

fn u64_at(file: &Path, offset: usize) -> u64 {
    u64::from_le_bytes(fs::read(file).unwrap()[offset..offset + 8].try_into().unwrap())
}

fn folder(shard: &Path) -> &Path {
    shard.parent().unwrap()
}

/// The error of opening, which must name the shard and give a hint.
fn open_error(shard: &Path) -> DataError {
    said_well(DataSet::open(folder(shard)).unwrap_err(), shard)
}

/// The error of reading everything in a data set that opens.
fn verify_error(shard: &Path) -> DataError {
    said_well(DataSet::open(folder(shard)).unwrap().verify().unwrap_err(), shard)
}

fn said_well(error: DataError, file: &Path) -> DataError {
    let text = error.to_string();
    assert!(text.contains(&file.display().to_string()), "no file in: {text}");
    assert!(text.contains("hint: "), "no hint in: {text}");
    error
}

#[test]
fn a_truncated_shard_is_refused_at_every_length() {
    let (_scratch, shard) = data_set();
    let whole = fs::read(&shard).unwrap();
    for length in [0, 1, 8, 255, 256, 300, 1_000_000, whole.len() - 1] {
        fs::write(&shard, &whole[..length]).unwrap();
        match open_error(&shard) {
            DataError::Truncated { got, expected, .. } => {
                assert_eq!(got, length as u64);
                assert_eq!(expected, if length < 256 { 256 } else { whole.len() as u64 });
            }
            other => panic!("{length} bytes: {other:?}"),
        }
    }
}

#[test]
fn a_shard_with_bytes_behind_it_is_refused() {
    let (_scratch, shard) = data_set();
    change(&shard, |bytes| bytes.push(0));
    assert!(matches!(open_error(&shard), DataError::TooLong { .. }));
}

#[test]
fn a_file_with_wrong_magic_is_refused() {
    let (_scratch, shard) = data_set();
    change(&shard, |bytes| bytes[0] = b'P');
    assert!(matches!(open_error(&shard), DataError::WrongMagic { .. }));
    fs::write(&shard, "This is no shard.").unwrap();
    assert!(matches!(open_error(&shard), DataError::WrongMagic { .. }));
}

#[test]
fn an_unknown_version_is_refused() {
    let (_scratch, shard) = data_set();
    change_field(&shard, 8, &2u32.to_le_bytes());
    assert!(matches!(open_error(&shard), DataError::UnknownVersion { got: 2, expected: 1, .. }));
}

#[test]
fn a_flipped_bit_anywhere_in_the_header_is_refused() {
    let (_scratch, shard) = data_set();
    let whole = fs::read(&shard).unwrap();
    for byte in 12..256 {
        let mut bytes = whole.clone();
        bytes[byte] ^= 0x10;
        fs::write(&shard, bytes).unwrap();
        assert!(matches!(open_error(&shard), DataError::HeaderChecksum { .. }), "byte {byte}");
    }
}

#[test]
fn a_header_that_contradicts_itself_is_refused() {
    for (offset, field, what) in [
        (12, &3u32.to_le_bytes()[..], "token width"),
        (16, &7u64.to_le_bytes(), "payload length"),
        (16, &u64::MAX.to_le_bytes(), "payload length"),
        (40, &512u64.to_le_bytes(), "payload offset"),
        (48, &u64::MAX.to_le_bytes(), "payload length"),
        (56, &0u64.to_le_bytes(), "index offset"),
        (72, &1u32.to_le_bytes(), "block length"),
    ] {
        let (_scratch, shard) = data_set();
        change_field(&shard, offset, field);
        match open_error(&shard) {
            DataError::LengthMismatch { what: got, .. } => assert_eq!(got, what),
            other => panic!("{what}: {other:?}"),
        }
    }
}

#[test]
fn lengths_that_overflow_are_refused_without_a_panic() {
    let (_scratch, shard) = data_set();
    change_field(&shard, 64, &u64::MAX.to_le_bytes()); // of the index
    assert!(matches!(open_error(&shard), DataError::Truncated { expected: u64::MAX, .. }));
    // All counts as large as they go, and agreeing with each other as far as 64 bits can.
    change_field(&shard, 16, &(u64::MAX / 2).to_le_bytes());
    change_field(&shard, 48, &(u64::MAX - 1).to_le_bytes());
    change_field(&shard, 56, &u64::MAX.to_le_bytes());
    assert!(matches!(open_error(&shard), DataError::Truncated { .. }));
}

#[test]
fn a_damaged_block_is_named_when_it_is_first_read_and_not_before() {
    let (_scratch, shard) = data_set();
    change(&shard, |bytes| bytes[256 + (1 << 20) + 77] ^= 1); // in block 1
    let data = DataSet::open(folder(&shard)).unwrap();
    let mut tokens = [0; 10];
    data.read(0, &mut tokens).unwrap();
    data.read((1 << 19) - 10, &mut tokens).unwrap(); // the end of block 0
    for _ in 0..2 {
        let error = said_well(data.read((1 << 19) - 5, &mut tokens).unwrap_err(), &shard);
        let offset_expected = 256 + (1 << 20);
        assert!(
            matches!(error, DataError::BlockChecksum { block: 1, offset, .. } if offset == offset_expected),
            "{error:?}"
        );
    }
    assert!(matches!(verify_error(&shard), DataError::BlockChecksum { block: 1, .. }));
}

#[test]
fn tokens_changed_together_with_their_checksum_are_found_by_verify() {
    let (_scratch, shard) = data_set();
    change(&shard, |bytes| {
        bytes[256] ^= 1;
        replace_block_checksum(bytes, 0);
    });
    assert!(matches!(verify_error(&shard), DataError::DigestMismatch { .. }));
}

#[test]
fn a_token_outside_the_vocabulary_is_named_with_its_position() {
    let (_scratch, shard) = data_set();
    change(&shard, |bytes| {
        bytes[256 + 2 * 1000..][..2].copy_from_slice(&257u16.to_le_bytes());
        replace_block_checksum(bytes, 0);
    });
    let data = DataSet::open(folder(&shard)).unwrap();
    let error = said_well(data.read(990, &mut [0; 20]).unwrap_err(), &shard);
    let expected = |error: &DataError| {
        matches!(error, DataError::TokenOutsideVocabulary { position: 1000, token: 257, vocab_size: 257, .. })
    };
    assert!(expected(&error), "{error:?}");
    assert!(expected(&verify_error(&shard)));
}

#[test]
fn an_index_that_is_none_is_refused() {
    let (_scratch, shard) = data_set();
    change(&shard, |bytes| {
        let root = bytes.len() - 32;
        bytes[root..].fill(0x7f);
    });
    assert!(matches!(open_error(&shard), DataError::IndexInvalid { .. }));
}

#[test]
fn an_index_cut_to_any_length_never_panics() {
    let (_scratch, shard) = data_set();
    let whole = fs::read(&shard).unwrap();
    let index_offset = u64_at(&shard, 56) as usize;
    for length in 0..whole.len() - index_offset {
        let mut bytes = whole[..index_offset + length].to_vec();
        bytes[64..72].copy_from_slice(&(length as u64).to_le_bytes());
        reseal(&mut bytes);
        fs::write(&shard, bytes).unwrap();
        assert!(matches!(open_error(&shard), DataError::IndexInvalid { .. }), "length {length}");
    }
}

#[test]
fn an_index_with_other_counts_than_the_header_is_refused() {
    let (_scratch, shard) = data_set();
    change_field(&shard, 24, &3u64.to_le_bytes()); // documents
    assert!(matches!(open_error(&shard), DataError::IndexInvalid { .. }));
}

#[test]
fn a_document_in_an_impossible_place_is_found_where_it_is_looked_up() {
    // The second document's first token lies one record of four words after the first's.
    for first_token in [0, 2_000_000, u64::MAX] {
        let (_scratch, shard) = data_set();
        change_field_of_index(&shard, 32, first_token);
        let data = DataSet::open(folder(&shard)).unwrap();
        data.read(0, &mut [0; 100]).unwrap();
        let error = said_well(data.document(0).unwrap_err(), &shard);
        assert!(matches!(error, DataError::IndexInvalid { .. }), "{error:?}");
        assert!(data.document_at(700_000).is_err());
    }
}

#[test]
fn a_document_of_no_source_is_found_where_it_is_looked_up() {
    let (_scratch, shard) = data_set();
    change_field_of_index(&shard, 8, 1);
    let data = DataSet::open(folder(&shard)).unwrap();
    assert!(matches!(data.document(0).unwrap_err(), DataError::IndexInvalid { .. }));
    data.document(1).unwrap();
}

#[test]
fn a_flipped_bit_in_the_index_is_found_by_verify() {
    let (_scratch, shard) = data_set();
    change_field_of_index(&shard, 16, 9); // the record: no other check sees it
    assert!(matches!(verify_error(&shard), DataError::IndexChecksum { .. }));
}

#[test]
fn a_shard_of_another_tokenizer_is_refused() {
    let (_scratch, shard) = data_set();
    change_field(&shard, 80, b"gpt2\0");
    match open_error(&shard) {
        DataError::TokenizerMismatch { got, expected, .. } => {
            assert!(got.contains("gpt2") && expected.contains("bytes"), "{got} {expected}");
        }
        other => panic!("{other:?}"),
    }
    change_field(&shard, 80, b"bytes");
    change_field(&shard, 112, &[1; 32]); // the same id with another digest
    assert!(matches!(open_error(&shard), DataError::TokenizerMismatch { .. }));
}

#[test]
fn a_shard_that_the_manifest_does_not_describe_is_refused() {
    let (_scratch, shard) = data_set();
    let (_other_scratch, other) = data_set();
    let mut writer = DataSetWriter::create(folder(&other), Tokenizer::Bytes, 1 << 28).unwrap();
    writer.push(0, 1, b"other text").unwrap();
    writer.finish(vec!["b.txt".into()]).unwrap();
    fs::copy(&other, &shard).unwrap();
    assert!(matches!(open_error(&shard), DataError::ShardDiffers { .. }));
}

#[test]
fn a_missing_shard_is_named() {
    let (_scratch, shard) = data_set();
    fs::remove_file(&shard).unwrap();
    assert!(matches!(open_error(&shard), DataError::MissingShard { .. }));
}

#[test]
fn a_missing_folder_or_manifest_says_how_to_make_one() {
    let (_scratch, shard) = data_set();
    fs::remove_file(folder(&shard).join("manifest.json")).unwrap();
    for missing in [folder(&shard), Path::new("/no/such/folder"), shard.as_path()] {
        let error = said_well(DataSet::open(missing).unwrap_err(), missing);
        assert!(matches!(error, DataError::NoDataSet { .. }));
        assert!(error.to_string().contains("phalanx data prepare"));
        assert!(dataloader::vocab_size(missing).unwrap_err().contains("phalanx data prepare"));
    }
}

#[test]
fn a_manifest_that_cannot_be_meant_is_refused() {
    for (old, new, what) in [
        ("\"version\": 1", "\"version\": 9", "version 9"),
        ("\"id\": \"bytes\"", "\"id\": \"runes\"", "unknown tokenizer"),
        ("\"shard-00000.tokens\"", "\"../shard-00000.tokens\"", "no plain file name"),
        ("\"shard-00000.tokens\"", "\"/etc/passwd\"", "no plain file name"),
        ("\"documents\": 2", "\"documents\": 3", "documents"),
        ("\"shards\"", "\"shreds\"", "no manifest"),
        ("{", "", "no manifest"),
    ] {
        let (_scratch, shard) = data_set();
        let manifest = folder(&shard).join("manifest.json");
        let text = fs::read_to_string(&manifest).unwrap();
        fs::write(&manifest, text.replacen(old, new, 1)).unwrap();
        let error = said_well(DataSet::open(folder(&shard)).unwrap_err(), &manifest);
        assert!(error.to_string().contains(what), "{what}: {error}");
    }
}

#[test]
fn a_read_past_the_end_is_refused_however_far() {
    let (_scratch, shard) = data_set();
    let data = DataSet::open(folder(&shard)).unwrap();
    for start in [data.tokens() - 1, data.tokens(), u64::MAX] {
        let error = said_well(data.read(start, &mut [0; 2]).unwrap_err(), folder(&shard));
        assert!(matches!(error, DataError::OutOfRange { .. }));
    }
    assert!(matches!(data.document_at(data.tokens()), Err(DataError::OutOfRange { .. })));
    assert!(matches!(data.document(2), Err(DataError::NoSuchDocument { documents: 2, .. })));
    data.read(data.tokens(), &mut []).unwrap();
}

/// Makes a block's checksum in the index right, and the header's of the index.
fn replace_block_checksum(bytes: &mut [u8], block: usize) {
    let index_offset = u64::from_le_bytes(bytes[56..64].try_into().unwrap()) as usize;
    let checksum = crc32fast::hash(&bytes[256 + (block << 20)..256 + ((block + 1) << 20)]);
    let sums = index_offset + 2 * 32; // after two documents
    bytes[sums + 4 * block..][..4].copy_from_slice(&checksum.to_le_bytes());
    let index_checksum = crc32fast::hash(&bytes[index_offset..]);
    bytes[76..80].copy_from_slice(&index_checksum.to_le_bytes());
    reseal(bytes);
}

/// Writes a word of the index, whose checksum is then wrong.
fn change_field_of_index(shard: &Path, offset: usize, word: u64) {
    let index_offset = u64_at(shard, 56) as usize;
    change(shard, |bytes| {
        bytes[index_offset + offset..][..8].copy_from_slice(&word.to_le_bytes());
    });
}
