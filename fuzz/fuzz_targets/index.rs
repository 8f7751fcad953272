//! A shard with any bytes for its index of documents, behind a header that agrees with them. Refuses to know
//! how the index is laid out.

#![no_main]

use libfuzzer_sys::fuzz_target;
use phalanx_fuzz::{file, read_data_set};

const MANIFEST: &[u8] = include_bytes!("../seeds/manifest/manifest.json");
const SHARD: &[u8] = include_bytes!("../seeds/shard/shard-00000.tokens");

/// Where the header says where the index starts, how long it is and what its checksum is.
const INDEX_OFFSET: usize = 56;
const INDEX_BYTES: usize = 64;
const INDEX_CHECKSUM: usize = 76;

fuzz_target!(|index: &[u8]| {
    let start = SHARD[INDEX_OFFSET..].first_chunk().map_or(0, |word| u64::from_le_bytes(*word));
    let mut shard = SHARD[..start as usize].to_vec();
    shard.extend(index);
    shard[INDEX_BYTES..INDEX_BYTES + 8].copy_from_slice(&(index.len() as u64).to_le_bytes());
    shard[INDEX_CHECKSUM..INDEX_CHECKSUM + 4].copy_from_slice(&crc32fast::hash(index).to_le_bytes());
    let sum = crc32fast::hash(&shard[..252]);
    shard[252..256].copy_from_slice(&sum.to_le_bytes());
    let folder = file("data/manifest.json", MANIFEST).with_file_name("");
    file("data/shard-00000.tokens", &shard);
    read_data_set(&folder);
});
