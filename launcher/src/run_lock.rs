//! Who looks after a run: one launcher at a time, known by a lock on a file of the run folder; and what an
//! earlier one has left behind when it was killed.
//!
//! Processes of a run carry the run's id in their environment, so that they are found whoever their parent
//! is by now, and nobody else's are.

use crate::LaunchError;
use configs::START_VARIABLE;
use rustix::fs::FlockOperation;
use rustix::process::{Pid, Signal, kill_process};
use std::fs::File;
use std::io::{Read, Seek, Write};
use std::path::Path;
use std::time::{Duration, Instant};

/// File in the run folder.
const FILE: &str = "launcher.lock";

/// How long killed processes may take to be gone.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long a launcher that was just killed may hold its lock.
const LINGERING: Duration = Duration::from_secs(1);

/// The right to look after a run, as long as it lives.
#[derive(Debug)]
pub struct RunLock {
    _file: Option<File>,
    id: String,
}

fn lock(file: &File) -> rustix::io::Result<()> {
    let began = Instant::now();
    loop {
        let locked = rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive);
        if locked != Err(rustix::io::Errno::WOULDBLOCK) || began.elapsed() > LINGERING {
            return locked;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

impl RunLock {
    /// Takes the lock of the run in `folder`, which is made if it is not there, and ends what an earlier
    /// launcher has left on this machine.
    ///
    /// # Errors
    /// Another launcher looks after this run; a folder or file that cannot be made.
    pub fn take(folder: &Path) -> Result<RunLock, LaunchError> {
        let path = folder.join(FILE);
        let system =
            |source| LaunchError::System { what: format!("{} cannot be used", path.display()), source };
        std::fs::create_dir_all(folder).map_err(system)?;
        let mut file = File::options()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(&path)
            .map_err(system)?;
        let locked = lock(&file);
        let mut text = String::new();
        file.read_to_string(&mut text).map_err(system)?;
        if locked == Err(rustix::io::Errno::WOULDBLOCK) {
            let holder = text.lines().nth(1).unwrap_or("nobody knows who").to_string();
            return Err(LaunchError::RunIsHeld { folder: folder.to_path_buf(), holder });
        }
        // Where a file system knows no locks, generations still keep two starts apart.
        let id = match text.lines().next() {
            Some(id) if id.len() == 16 && id.bytes().all(|byte| byte.is_ascii_hexdigit()) => id.to_string(),
            _ => crate::listen::random().map_err(system)?[..8].iter().map(|b| format!("{b:02x}")).collect(),
        };
        let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
        file.rewind().and_then(|()| file.set_len(0)).map_err(system)?;
        writeln!(file, "{id}\npid {} on {host}", std::process::id()).map_err(system)?;
        end_processes(&id);
        Ok(RunLock { _file: Some(file), id })
    }

    /// What the run's processes are known by.
    pub fn id(&self) -> &str {
        &self.id
    }
}

/// Kills every process of the run on this machine. Returns how many there were.
pub fn end_processes(id: &str) -> usize {
    let deadline = Instant::now() + PATIENCE;
    let mut ended = std::collections::BTreeSet::new();
    loop {
        let left = processes(id);
        for &process in &left {
            let _ = kill_process(process, Signal::KILL); // it may be gone already
            ended.insert(process.as_raw_pid());
        }
        if left.is_empty() || Instant::now() > deadline {
            return ended.len();
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A shell command that does the same on another machine, and then says that it was there.
pub fn remote_cleanup(id: &str) -> String {
    format!(
        "for p in $(grep -lzs '^{START_VARIABLE}={id}\\.' /proc/[0-9]*/environ); do p=${{p#/proc/}}; \
         kill -KILL ${{p%/environ}} 2>/dev/null; done; echo phalanx-was-here"
    )
}

fn processes(id: &str) -> Vec<Pid> {
    let mark = format!("{START_VARIABLE}={id}.");
    let Ok(all) = std::fs::read_dir("/proc") else { return Vec::new() };
    all.filter_map(|entry| {
        let entry = entry.ok()?;
        let pid = entry.file_name().to_str()?.parse().ok()?;
        // Of a process that has ended, and is only not waited for, the environment is empty.
        let environment = std::fs::read(entry.path().join("environ")).ok()?;
        let marked = environment.split(|&byte| byte == 0).any(|one| one.starts_with(mark.as_bytes()));
        marked.then(|| Pid::from_raw(pid)).flatten()
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    fn sleeper(start: &str) -> std::process::Child {
        Command::new("sleep").arg("300").env(START_VARIABLE, start).stdin(Stdio::null()).spawn().unwrap()
    }

    #[test]
    fn a_run_is_looked_after_by_one_launcher_at_a_time_and_keeps_its_id() {
        let folder = tempfile::tempdir().unwrap();
        let run = folder.path().join("runs/tiny");
        let lock = RunLock::take(&run).unwrap();
        let id = lock.id().to_string();
        let refused = RunLock::take(&run).unwrap_err().to_string();
        assert!(refused.contains(&format!("pid {}", std::process::id())), "{refused}");
        drop(lock);
        assert_eq!(RunLock::take(&run).unwrap().id(), id);
    }

    #[test]
    fn what_an_earlier_launcher_left_is_ended_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let id = RunLock::take(folder.path()).unwrap().id().to_string();
        let (mut left, mut other) = (sleeper(&format!("{id}.0000abcd")), sleeper("ffff.0000abcd"));
        RunLock::take(folder.path()).unwrap();
        assert!(!left.wait().unwrap().success());
        assert!(other.try_wait().unwrap().is_none(), "another run's");
        other.kill().unwrap();
        other.wait().unwrap();
    }

    #[test]
    fn on_another_machine_a_shell_does_the_same() {
        let mut left = sleeper("0123456789abcdef.0000abcd");
        let said = Command::new("sh").args(["-c", &remote_cleanup("0123456789abcdef")]).output().unwrap();
        assert_eq!(said.stdout, b"phalanx-was-here\n");
        assert!(!left.wait().unwrap().success());
    }
}
