//! A Parquet table of any bytes. Refuses to know what they mean.

#![no_main]

use libfuzzer_sys::fuzz_target;
use phalanx_fuzz::{file, read_text};

// The library's panics are caught where tables are read: only one that gets out is a finding.
fuzz_target!(init: drop(std::panic::take_hook()), |bytes: &[u8]| read_text(&file("a.parquet", bytes)));
