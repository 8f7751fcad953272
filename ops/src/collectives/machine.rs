//! What this machine says about itself: its name and its shared memory.

/// Name of this machine.
pub(super) fn host_name() -> String {
    let mut name = [0u8; 256];
    // SAFETY: gethostname writes at most 255 bytes into an array of 256, so a zero byte remains.
    let code = unsafe { libc::gethostname(name.as_mut_ptr().cast(), name.len() - 1) };
    let length = name.iter().position(|&byte| byte == 0).unwrap_or(0);
    if code == 0 { String::from_utf8_lossy(&name[..length]).into_owned() } else { "localhost".to_owned() }
}

/// Bytes free and bytes in all where ranks of one machine share memory, `/dev/shm`; 0 if there is none.
pub(super) fn shared_memory() -> (usize, usize) {
    rustix::fs::statvfs("/dev/shm").map_or((0, 0), |shm| {
        let bytes = |blocks: u64| usize::try_from(blocks.saturating_mul(shm.f_frsize)).unwrap_or(usize::MAX);
        (bytes(shm.f_bavail), bytes(shm.f_blocks))
    })
}
