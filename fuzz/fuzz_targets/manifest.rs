//! A data set with any bytes for its manifest, beside a good shard. Refuses to know what it says.

#![no_main]

use libfuzzer_sys::fuzz_target;
use phalanx_fuzz::{file, read_data_set};

const SHARD: &[u8] = include_bytes!("../seeds/shard/shard-00000.tokens");

fuzz_target!(|manifest: &[u8]| {
    let folder = file("data/manifest.json", manifest).with_file_name("");
    file("data/shard-00000.tokens", SHARD);
    read_data_set(&folder);
});
