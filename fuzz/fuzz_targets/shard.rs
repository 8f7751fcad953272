//! A shard with any bytes, read as part of a data set; a second time with a checksum that is right again, so
//! that there is more behind it than the check. Refuses to know what it says.

#![no_main]

use dataloader::{Shard, Tokenizer};
use libfuzzer_sys::fuzz_target;
use phalanx_fuzz::{file, read_data_set, require_place};
use std::path::Path;

const MANIFEST: &[u8] = include_bytes!("../seeds/manifest/manifest.json");

fuzz_target!(|bytes: &[u8]| {
    file("data/manifest.json", MANIFEST);
    read(&file("data/shard-00000.tokens", bytes));
    if bytes.len() >= 256 {
        let mut bytes = bytes.to_vec();
        let sum = crc32fast::hash(&bytes[..252]);
        bytes[252..256].copy_from_slice(&sum.to_le_bytes());
        read(&file("data/shard-00000.tokens", &bytes));
    }
});

/// Within its data set, and alone, where no manifest says what should be in it.
fn read(shard: &Path) {
    read_data_set(shard.parent().unwrap_or(shard));
    let alone = || {
        let shard = Shard::open(shard, &Tokenizer::Bytes)?;
        let mut tokens = vec![0; shard.tokens().min(1 << 20) as usize];
        shard.read(0, &mut tokens)
    };
    require_place(alone().map_err(Into::into));
}
