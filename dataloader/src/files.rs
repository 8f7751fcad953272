//! Files that are complete or absent: written under a temporary name, synced, renamed.
//! Refuses to know what is in them.

use crate::DataError;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

/// The name that a file has until it is complete.
pub(crate) fn temporary(file: &Path) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(".tmp");
    PathBuf::from(name)
}

/// Gives a complete temporary file its name: sync, rename, sync the folder.
pub(crate) fn publish(open: &File, file: &Path) -> Result<(), DataError> {
    open.sync_all().map_err(DataError::io(file, "synced"))?;
    fs::rename(temporary(file), file).map_err(DataError::io(file, "renamed from its temporary name"))?;
    sync_folder(parent(file))
}

/// Writes a small file at once: complete, or not there.
pub(crate) fn write(file: &Path, content: &[u8]) -> Result<(), DataError> {
    let temporary = temporary(file);
    let mut open = File::create(&temporary).map_err(DataError::io(&temporary, "created"))?;
    open.write_all(content).map_err(DataError::io(&temporary, "written"))?;
    publish(&open, file)
}

/// Makes the names in a folder outlive a power cut.
pub(crate) fn sync_folder(folder: &Path) -> Result<(), DataError> {
    File::open(folder).and_then(|open| open.sync_all()).map_err(DataError::io(folder, "synced"))
}

/// The folder that holds a file; `.` for a bare name.
pub(crate) fn parent(file: &Path) -> &Path {
    match file.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// A digest as people compare it.
pub(crate) fn hex(digest: &[u8]) -> String {
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The digest that [`hex`] wrote; none for any other text.
pub(crate) fn unhex(text: &str) -> Option<[u8; 32]> {
    let bytes = text.as_bytes();
    if bytes.len() != 64 || !bytes.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    let mut digest = [0; 32];
    for (byte, pair) in digest.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        let digit = |c: u8| (c as char).to_digit(16).unwrap_or(0) as u8;
        *byte = digit(pair[0]) << 4 | digit(pair[1]);
    }
    Some(digest)
}
