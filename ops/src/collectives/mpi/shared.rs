//! Memory that the ranks of a node share: one file in /dev/shm for each rank, mapped by all of them and
//! without a name as soon as they have it, so that nothing is left behind however a rank ends.
//!
//! Not a window of MPI's (12.2.3, MPI_Win_allocate_shared): that memory is gone with MPI while a tensor may
//! still lie in it, and where /dev/shm is full, touching it is a bus error. Files are allocated before they
//! are mapped, so that a lack of space is an answer.

use super::raw::Comm;
use crate::collectives::{CommError, machine};
use memmap2::MmapRaw;
use std::fs::{File, OpenOptions};
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

/// Each rank's part, as mapped here.
#[derive(Debug)]
pub(super) struct Shared {
    parts: Vec<MmapRaw>,
}

impl Shared {
    /// `bytes` of zeros for each rank of `node`; or why the node has no such memory, which ranks may know in
    /// different words. Collective.
    pub(super) fn allocate(node: Comm, bytes: usize) -> Result<Result<Shared, String>, CommError> {
        let (_, local_size) = node.rank_and_size()?;
        let bytes = bytes.max(1);
        // An eighth stays free, for MPI and others. All have looked before one takes.
        let (free, size) = machine::shared_memory();
        let fits = bytes.saturating_mul(local_size) <= free.saturating_sub(size / 8);
        if node.all_gather_u64([u64::from(fits)])?.iter().any(|[fits]| *fits == 0) {
            let need = bytes.saturating_mul(local_size);
            return Ok(Err(format!("/dev/shm has {free} of {size} bytes free, {need} more are needed")));
        }
        let name = RandomState::new().hash_one(node.rank_and_size()?.0);
        let own = create(name, bytes);
        let names = node.all_gather_u64([name])?;
        let parts: io::Result<Vec<MmapRaw>> = match &own {
            Ok(_) => names.iter().map(|[name]| map(*name)).collect(),
            Err(error) => Err(io::Error::new(error.kind(), error.to_string())),
        };
        let mapped = node.all_gather_u64([u64::from(parts.is_ok())])?.iter().all(|[ok]| *ok == 1);
        if own.is_ok() {
            let _ = std::fs::remove_file(path(name)); // nobody's any more, at worst
        }
        Ok(match parts {
            Ok(parts) if mapped => Ok(Shared { parts }),
            Ok(_) => Err("another rank of this node could not share memory".to_owned()),
            Err(error) => Err(format!("{}: {error}", path(name).display())),
        })
    }

    /// Where a local rank's part starts.
    pub(super) fn part(&self, local_rank: usize) -> *mut u8 {
        self.parts[local_rank].as_mut_ptr()
    }

    /// Bytes of a part.
    pub(super) fn len(&self) -> usize {
        self.parts.first().map_or(0, MmapRaw::len)
    }
}

fn path(name: u64) -> PathBuf {
    format!("/dev/shm/phalanx-{name:016x}").into()
}

fn create(name: u64, bytes: usize) -> io::Result<File> {
    let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path(name))?;
    let allocated = rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, bytes as u64);
    if let Err(error) = allocated {
        let _ = std::fs::remove_file(path(name));
        return Err(error.into());
    }
    Ok(file)
}

fn map(name: u64) -> io::Result<MmapRaw> {
    MmapRaw::map_raw(&OpenOptions::new().read(true).write(true).open(path(name))?)
}
