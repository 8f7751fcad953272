//! Damage to shards as the ranks meet it: exit code 2, and the file and the kind of damage by name.

use crate::Bench;
use std::fs;

/// Length of a shard's header; the tokens follow.
const HEADER_BYTES: usize = 256;

/// Damages a shard of the training data and expects that a rank refuses it with `told`.
#[track_caller]
fn refused(told: &[&str], damage: impl Fn(&mut Vec<u8>)) {
    let bench = Bench::new("shard", 10);
    let shard = bench.scratch.join("data/train/shard-00000.tokens");
    let mut bytes = fs::read(&shard).unwrap();
    damage(&mut bytes);
    fs::write(&shard, bytes).unwrap();
    let refused = bench.train_alone("run", "").run().expect_code(2);
    refused.expect_stderr(&["data/train/shard-00000.tokens: ", "hint:"]).expect_stderr(told);
}

/// Puts new bytes into the header, and the checksum that then belongs to it.
fn patch_header(bytes: &mut [u8], offset: usize, field: &[u8]) {
    bytes[offset..offset + field.len()].copy_from_slice(field);
    let checksum = crc32fast::hash(&bytes[..HEADER_BYTES - 4]);
    bytes[HEADER_BYTES - 4..HEADER_BYTES].copy_from_slice(&checksum.to_le_bytes());
}

fn number(bytes: &[u8], offset: usize) -> usize {
    u64::from_le_bytes(bytes[offset..offset + 8].try_into().unwrap()) as usize
}

#[test]
fn a_truncated_shard_is_refused() {
    refused(&["truncated, got"], |bytes| bytes.truncate(bytes.len() / 2));
}

#[test]
fn a_shard_that_has_grown_is_refused() {
    refused(&["too long, got"], |bytes| bytes.extend([0; 16]));
}

#[test]
fn a_shard_with_wrong_magic_is_refused() {
    refused(&["wrong magic"], |bytes| bytes[0] = b'x');
}

#[test]
fn a_shard_of_another_version_is_refused() {
    refused(&["format version 9, expected 1"], |bytes| patch_header(bytes, 8, &9u32.to_le_bytes()));
}

#[test]
fn a_shard_whose_header_is_damaged_is_refused() {
    refused(&["header checksum"], |bytes| bytes[100] ^= 1);
}

#[test]
fn a_shard_whose_index_is_damaged_is_refused() {
    refused(&["index invalid"], |bytes| {
        let length = bytes.len();
        bytes[length - 16..].fill(0xff);
    });
}

#[test]
fn damaged_tokens_are_refused_when_they_are_read() {
    refused(&["block 0 at byte 256 has checksum"], |bytes| bytes[HEADER_BYTES + 5000] ^= 1);
}

#[test]
fn tokens_outside_the_vocabulary_are_refused_when_they_are_read() {
    refused(&["token 999"], |bytes| {
        let payload = HEADER_BYTES..HEADER_BYTES + number(bytes, 48);
        let before = crc32fast::hash(&bytes[payload.clone()]).to_le_bytes();
        // One in every sample of 32 tokens, so that the first step meets one.
        for token in bytes[payload.clone()].chunks_mut(2).step_by(32) {
            token.copy_from_slice(&999u16.to_le_bytes());
        }
        let after = crc32fast::hash(&bytes[payload]).to_le_bytes();

        // The checksums of the block, of the index and of the header as a program that wrote such
        // tokens would have computed them.
        let index = number(bytes, 56);
        let place = bytes[index..].windows(4).position(|word| word == before).unwrap();
        bytes[index + place..index + place + 4].copy_from_slice(&after);
        let checksum = crc32fast::hash(&bytes[index..]);
        patch_header(bytes, 76, &checksum.to_le_bytes());
    });
}

#[test]
fn damage_that_only_ranks_can_meet_is_told_once_and_ends_all_of_them() {
    let bench = Bench::new("ranks", 10);
    let shard = bench.scratch.join("data/train/shard-00000.tokens");
    let mut bytes = fs::read(&shard).unwrap();
    bytes[HEADER_BYTES + 5000] ^= 1;
    fs::write(&shard, bytes).unwrap();
    let told = ["shard-00000.tokens: block 0", "ended: something must be changed first"];
    let ended = bench.train("run", 2, "").run().expect_code(2).expect_stderr(&told);
    assert_eq!(ended.stderr.matches("has checksum").count(), 1, "{}", ended.stderr);
    assert_eq!(ended.survivors, Vec::<String>::new());
}
