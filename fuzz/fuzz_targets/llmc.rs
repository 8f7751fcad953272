//! A `.bin` of any bytes, from seeds of llm.c's. Refuses to know what it says.

#![no_main]

use libfuzzer_sys::fuzz_target;
use phalanx_fuzz::{file, read_data_set};

fuzz_target!(|bytes: &[u8]| read_data_set(&file("llmc.bin", bytes)));
