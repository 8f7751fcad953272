//! What a look at a run folder tells: how old its newest checkpoint is, and how much room its disk has.
//! The launcher looks; under plain mpirun rank 0 does.

use prometheus::{Gauge, Opts, Registry};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// Gauges of a run folder, as they were when it was last looked at.
#[derive(Debug)]
pub struct FolderGauges {
    folder: PathBuf,
    /// What the age is counted from where there is no checkpoint.
    since: SystemTime,
    age: Gauge,
    free: Gauge,
    size: Gauge,
}

impl FolderGauges {
    /// Of this run folder, in `registry`.
    ///
    /// # Errors
    /// A registry that has such gauges.
    pub fn new(folder: &Path, registry: &Registry) -> prometheus::Result<FolderGauges> {
        let gauge = |name: &str, help: &str| {
            let gauge = Gauge::with_opts(Opts::new(name, help))?;
            registry.register(Box::new(gauge.clone()))?;
            Ok::<_, prometheus::Error>(gauge)
        };
        let gauges = FolderGauges {
            folder: folder.to_path_buf(),
            since: SystemTime::now(),
            age: gauge(
                "phalanx_checkpoint_age_seconds",
                "Time since the newest complete checkpoint was published, or since the start if there is none.",
            )?,
            free: gauge("phalanx_disk_free_bytes", "Room on the disk of the run folder.")?,
            size: gauge("phalanx_disk_size_bytes", "Size of the disk of the run folder.")?,
        };
        gauges.look();
        Ok(gauges)
    }

    /// Brings them up to date.
    pub fn look(&self) {
        let newest = newest_checkpoint(&self.folder).unwrap_or(self.since);
        let age = SystemTime::now().duration_since(newest).unwrap_or_default();
        self.age.set(age.as_secs_f64());
        if let Ok(disk) = rustix::fs::statvfs(&self.folder) {
            self.free.set(disk.f_bavail as f64 * disk.f_frsize as f64);
            self.size.set(disk.f_blocks as f64 * disk.f_frsize as f64);
        }
    }
}

/// When the newest complete checkpoint got its name: right after its manifest was put into its folder, which
/// is what the folder's own time says.
fn newest_checkpoint(folder: &Path) -> Option<SystemTime> {
    let entries = std::fs::read_dir(folder.join("checkpoints")).ok()?;
    let complete = |name: &str| {
        name.strip_prefix("step-").is_some_and(|step| step.bytes().all(|byte| byte.is_ascii_digit()))
    };
    let modified = |entry: std::fs::DirEntry| {
        entry.file_name().to_str().filter(|name| complete(name))?;
        entry.metadata().ok()?.modified().ok()
    };
    entries.filter_map(|entry| modified(entry.ok()?)).max()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn the_age_is_that_of_the_newest_complete_checkpoint_and_before_one_that_of_the_start() {
        let run = tempfile::tempdir().unwrap();
        let registry = Registry::new();
        let gauges = FolderGauges::new(run.path(), &registry).unwrap();
        assert!(gauges.age.get() < 10.0 && gauges.free.get() > 0.0 && gauges.size.get() >= gauges.free.get());
        let aged = |name: &str, seconds: u64| {
            let folder = run.path().join("checkpoints").join(name);
            std::fs::create_dir_all(&folder).unwrap();
            let then = SystemTime::now() - Duration::from_secs(seconds);
            std::fs::File::open(folder).unwrap().set_modified(then).unwrap();
        };
        aged("step-00000100", 5000);
        aged("step-00000200", 1000);
        aged("step-00000300.tmp", 10);
        gauges.look();
        assert!((1000.0..1010.0).contains(&gauges.age.get()), "{}", gauges.age.get());
        assert_eq!(registry.gather().len(), 3);
    }
}
