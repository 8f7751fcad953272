//! What this machine says about itself: its name and its shared memory.

/// Name of this machine.
pub(super) fn host_name() -> String {
    let mut name = [0u8; 256];
    // SAFETY: gethostname writes at most 255 bytes into an array of 256, so a zero byte remains.
    let code = unsafe { libc::gethostname(name.as_mut_ptr().cast(), name.len() - 1) };
    let length = name.iter().position(|&byte| byte == 0).unwrap_or(0);
    if code == 0 { String::from_utf8_lossy(&name[..length]).into_owned() } else { "localhost".to_owned() }
}

/// Bytes free where ranks of one machine share memory, `/dev/shm`; 0 if there is none.
pub(super) fn free_shared_memory() -> usize {
    // SAFETY: statvfs is plain integers, for which zeros are a value.
    let mut stat: libc::statvfs = unsafe { std::mem::zeroed() };
    // SAFETY: a path that ends in a zero byte, and a place to write to.
    let code = unsafe { libc::statvfs(c"/dev/shm".as_ptr(), &mut stat) };
    if code == 0 { usize::try_from(stat.f_bavail * stat.f_frsize).unwrap_or(usize::MAX) } else { 0 }
}
