//! The folder of a run: where its files lie, which start of the run owns it, and how a file is
//! written so that a crash leaves the old one or the new one, never half of either.
//! Refuses to know what is in a checkpoint, a metric or a configuration.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

/// Something that the file system refused.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} {}: {error}", path.display())]
pub struct FileError {
    /// What was tried, as a verb.
    pub action: &'static str,
    /// On which file or folder.
    pub path: PathBuf,
    /// What the system said; printed with the message, so it is not a source of its own.
    pub error: io::Error,
}

impl FileError {
    /// For `map_err`: names what was tried, and where.
    pub fn of(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> FileError {
        move |error| FileError { action, path: path.to_path_buf(), error }
    }
}

/// The folder of one run, `runs/NAME`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunFolder {
    dir: PathBuf,
}

impl RunFolder {
    /// The folder with its subfolders, which are made where they are missing. Every rank may call it.
    ///
    /// # Errors
    /// A folder that cannot be made.
    pub fn open(dir: &Path) -> Result<RunFolder, FileError> {
        let run = RunFolder::at(dir);
        for folder in [run.checkpoints_dir(), run.logs_dir(), run.generation_dir()] {
            fs::create_dir_all(&folder).map_err(FileError::of("create the folder", &folder))?;
        }
        Ok(run)
    }

    /// The folder as it is, for those who only read; touches nothing.
    pub fn at(dir: &Path) -> RunFolder {
        RunFolder { dir: dir.to_path_buf() }
    }

    /// `runs/NAME` itself.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The resolved configuration.
    pub fn config_path(&self) -> PathBuf {
        self.dir.join("config.toml")
    }

    /// One event a line.
    pub fn metrics_path(&self) -> PathBuf {
        self.dir.join("metrics.jsonl")
    }

    /// What the model wrote at the end of the run.
    pub fn sample_path(&self) -> PathBuf {
        self.dir.join("sample.txt")
    }

    /// What one rank had to say.
    pub fn log_path(&self, rank: usize) -> PathBuf {
        self.logs_dir().join(format!("rank-{rank:05}.log"))
    }

    /// The folder of the ranks' logs.
    pub fn logs_dir(&self) -> PathBuf {
        self.dir.join("logs")
    }

    /// The folder of the checkpoints.
    pub fn checkpoints_dir(&self) -> PathBuf {
        self.dir.join("checkpoints")
    }

    /// Writes the resolved configuration, as TOML text.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn write_config(&self, toml: &str) -> Result<(), FileError> {
        write_atomically(&self.config_path(), toml.as_bytes())
    }

    /// Claims the next generation: one start of the run, counted from 1. Creating the file
    /// `generation/00000001` exclusively is the claim, so two starts never get the same number. One
    /// rank claims and tells the others.
    ///
    /// # Errors
    /// A folder that cannot be read or written.
    pub fn claim_generation(&self) -> Result<u64, FileError> {
        let mut generation = self.newest_generation()? + 1;
        loop {
            let path = self.generation_path(generation);
            match OpenOptions::new().write(true).create_new(true).open(&path) {
                Ok(mut file) => {
                    // Who it was, for people who look.
                    let (pid, host) = (std::process::id(), host_name());
                    let who = format!("pid {pid} on {host}, {} s after 1970\n", unix_seconds());
                    let written = file.write_all(who.as_bytes()).and_then(|()| file.sync_all());
                    written.map_err(FileError::of("write", &path))?;
                    sync_folder(&self.generation_dir())?;
                    return Ok(generation);
                }
                // Counting on instead of listing again: a network file system may list late.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => generation += 1,
                Err(error) => return Err(FileError::of("claim a generation in", &path)(error)),
            }
        }
    }

    /// The newest generation claimed, 0 before the first.
    ///
    /// # Errors
    /// A folder that cannot be read.
    pub fn newest_generation(&self) -> Result<u64, FileError> {
        let dir = self.generation_dir();
        let claimed = folder_names(&dir)?.into_iter().filter_map(|name| name.parse::<u32>().ok());
        Ok(claimed.max().map_or(0, u64::from))
    }

    fn generation_dir(&self) -> PathBuf {
        self.dir.join("generation")
    }

    fn generation_path(&self, generation: u64) -> PathBuf {
        self.generation_dir().join(format!("{generation:08}"))
    }
}

/// Writes a file as a whole: to a temporary name beside it, flushed to the disk, renamed over `path`,
/// and the folder flushed. After a crash `path` holds the old bytes or the new ones.
///
/// # Errors
/// A file that cannot be written; the temporary one is then removed.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result<(), FileError> {
    write_atomically_with(path, |file| file.write_all(bytes))
}

/// [`write_atomically`] for what is better streamed than held in memory.
///
/// # Errors
/// As `write_atomically`, and whatever `fill` returns.
pub fn write_atomically_with<T>(
    path: &Path,
    fill: impl FnOnce(&mut File) -> io::Result<T>,
) -> Result<T, FileError> {
    let temporary = temporary_beside(path);
    let written = OpenOptions::new().write(true).create_new(true).open(&temporary).and_then(|mut file| {
        let value = fill(&mut file)?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        Ok(value)
    });
    let value = written.map_err(|error| {
        let _ = fs::remove_file(&temporary); // it may never have been made; the first error counts
        FileError::of("write", path)(error)
    })?;
    sync_folder(path.parent().unwrap_or(Path::new(".")))?;
    Ok(value)
}

/// Flushes a folder, so that the names in it survive a power cut.
///
/// # Errors
/// A folder that cannot be flushed.
pub fn sync_folder(dir: &Path) -> Result<(), FileError> {
    let dir = if dir.as_os_str().is_empty() { Path::new(".") } else { dir };
    match File::open(dir).and_then(|folder| folder.sync_all()) {
        // Some network file systems keep names without being told and do not know the call.
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(()),
        done => done.map_err(FileError::of("flush the folder", dir)),
    }
}

/// What this machine calls itself.
pub(crate) fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// Milliseconds since 1970.
pub(crate) fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

/// Seconds since 1970.
pub(crate) fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// The names in a folder, sorted; none where there is no folder. Names that are not UTF-8 are not ours.
pub(crate) fn folder_names(dir: &Path) -> Result<Vec<String>, FileError> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(FileError::of("list", dir))?,
    };
    let mut names = Vec::new();
    for entry in entries {
        let name = entry.map_err(FileError::of("list", dir))?.file_name();
        names.extend(name.into_string().ok());
    }
    names.sort();
    Ok(names)
}

/// A name that no other writer uses at the same time.
fn temporary_beside(path: &Path) -> PathBuf {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let nanos = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.subsec_nanos());
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!("{name}.{:x}-{count:x}-{nanos:x}.tmp", std::process::id()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn a_run_folder_is_made_once_and_opened_again() {
        let scratch = tempfile::tempdir().unwrap();
        let dir = scratch.path().join("runs/tiny");
        for _ in 0..2 {
            let run = RunFolder::open(&dir).unwrap();
            assert!(run.checkpoints_dir().is_dir() && run.logs_dir().is_dir());
        }
        assert_eq!(RunFolder::at(&dir).log_path(3), dir.join("logs/rank-00003.log"));
    }

    #[test]
    fn the_configuration_is_replaced_as_a_whole_and_nothing_else_is_left() {
        let scratch = tempfile::tempdir().unwrap();
        let run = RunFolder::open(scratch.path()).unwrap();
        run.write_config("a = 1\n").unwrap();
        run.write_config("b = 2\n").unwrap();
        assert_eq!(fs::read_to_string(run.config_path()).unwrap(), "b = 2\n");
        assert_eq!(folder_names(run.dir()).unwrap(), ["checkpoints", "config.toml", "generation", "logs"]);
    }

    #[test]
    fn a_write_that_fails_leaves_the_old_file_and_no_temporary_one() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("config.toml");
        write_atomically(&path, b"old").unwrap();
        let result = write_atomically_with(&path, |file| {
            file.write_all(b"ne")?;
            Err::<(), _>(io::Error::from(io::ErrorKind::StorageFull))
        });
        assert!(result.unwrap_err().to_string().starts_with(&format!("cannot write {}", path.display())));
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(folder_names(scratch.path()).unwrap(), ["config.toml"]);
    }

    #[test]
    fn starts_at_the_same_moment_get_different_generations() {
        let scratch = tempfile::tempdir().unwrap();
        let run = RunFolder::open(scratch.path()).unwrap();
        assert_eq!(run.newest_generation().unwrap(), 0);
        let claimed: BTreeSet<u64> = std::thread::scope(|scope| {
            let starts: Vec<_> = (0..8).map(|_| scope.spawn(|| run.claim_generation().unwrap())).collect();
            starts.into_iter().map(|start| start.join().unwrap()).collect()
        });
        assert_eq!(claimed, (1..=8).collect());
        assert_eq!(run.newest_generation().unwrap(), 8);
    }

    #[test]
    fn names_that_are_no_generations_are_ignored() {
        let scratch = tempfile::tempdir().unwrap();
        let run = RunFolder::open(scratch.path()).unwrap();
        fs::write(run.generation_dir().join(".nfs0001"), "").unwrap();
        assert_eq!(run.claim_generation().unwrap(), 1);
    }
}
