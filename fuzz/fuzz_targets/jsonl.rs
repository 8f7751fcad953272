//! JSON lines of any bytes. Refuses to know what they mean.

#![no_main]

use libfuzzer_sys::fuzz_target;
use phalanx_fuzz::{file, read_text};

fuzz_target!(|bytes: &[u8]| read_text(&file("a.jsonl", bytes)));
