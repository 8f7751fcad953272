//! Nothing that this launcher started, directly or not, outlives it on this machine.
//!
//! mpirun puts each rank into a process group of its own, so ending mpirun's group is not enough. Linux
//! hands orphans to the nearest ancestor that asked for them; the launcher asks, and ends what it
//! is handed. On other hosts mpirun's daemons do the same when their connection breaks.

use rustix::process::{Pid, Signal, WaitOptions, kill_process, set_child_subreaper, wait};
use std::time::{Duration, Instant};

/// From now on orphaned descendants become children of this process.
///
/// # Errors
/// The kernel refuses.
pub fn adopt() -> std::io::Result<()> {
    Ok(set_child_subreaper(Some(rustix::process::getpid()))?)
}

/// Kills every child of this process, and their children as they are handed over, until there is none
/// or `patience` is over. Returns how many were found.
pub fn end_all(patience: Duration) -> usize {
    let deadline = Instant::now() + patience;
    let mut ended = std::collections::BTreeSet::new();
    loop {
        let children = children();
        for &child in &children {
            // It may be gone already; then there is nothing to do.
            let _ = kill_process(child, Signal::KILL);
            ended.insert(child.as_raw_pid());
        }
        while let Ok(Some(_)) = wait(WaitOptions::NOHANG) {}
        if children.is_empty() || Instant::now() > deadline {
            return ended.len();
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The processes that a process has started on this machine, those that these have started, and so on.
pub fn descendants(ancestor: u32) -> Vec<Pid> {
    let processes = processes();
    let (mut found, mut parents) = (Vec::new(), vec![ancestor]);
    while let Some(parent) = parents.pop() {
        for &(pid, _) in processes.iter().filter(|(_, of)| *of == parent) {
            found.push(pid);
            parents.extend(u32::try_from(pid.as_raw_pid()));
        }
    }
    found
}

/// The children of this process, ended but unread ones included.
fn children() -> Vec<Pid> {
    let own = std::process::id();
    processes().into_iter().filter_map(|(pid, parent)| (parent == own).then_some(pid)).collect()
}

/// Every process of this machine that can be seen, with its parent.
fn processes() -> Vec<(Pid, u32)> {
    let Ok(processes) = std::fs::read_dir("/proc") else { return Vec::new() };
    processes
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let pid = entry.file_name().to_str()?.parse().ok()?;
            let stat = std::fs::read_to_string(entry.path().join("stat")).ok()?;
            // "pid (name) state parent ...", where the name may hold anything.
            let parent: u32 = stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse().ok()?;
            Some((Pid::from_raw(pid)?, parent))
        })
        .collect()
}
