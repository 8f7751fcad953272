//! The one memory map, and with it the one place of this crate that the compiler cannot check.
//! Owns that and nothing else: what the bytes mean is for others.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;

/// A file's bytes, read by the operating system as they are touched.
#[derive(Debug)]
pub(crate) struct Map(memmap2::Mmap);

impl Map {
    /// Maps all of a file that is open for reading.
    pub(crate) fn of(file: &File) -> io::Result<Map> {
        // SAFETY: the mapping is read-only, and it stays valid after the file is closed or unlinked.
        // What Rust asks beyond that, that nobody changes the bytes while they are borrowed, no
        // program can promise for a file. We rely on how shards are made: written under a temporary
        // name, renamed when complete, never opened for writing again. Where somebody breaks that:
        // - the file is cut short: touching what is gone raises SIGBUS and ends this process;
        // - bytes are overwritten: strictly undefined, in practice reads see old or new bytes. All
        //   readers of this crate copy integers out and compare them with bounds afterwards, so that
        //   no memory outside the map is touched; a block changed after its checksum was checked
        //   goes unnoticed until `verify`.
        unsafe { memmap2::Mmap::map(file) }.map(Map)
    }

    /// The bytes, page aligned.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0
    }
}
