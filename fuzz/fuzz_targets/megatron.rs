//! Megatron's index with any bytes, and tokens beside it that are as many as it may claim. Refuses to know
//! what it says.

#![no_main]

use libfuzzer_sys::fuzz_target;
use phalanx_fuzz::{file, read_data_set};

const TOKENS: &[u8] = include_bytes!("../seeds/nanogpt/nanogpt.bin");

fuzz_target!(|index: &[u8]| {
    let tokens = file("megatron.bin", TOKENS);
    file("megatron.idx", index);
    read_data_set(&tokens);
});
