//! What black-box tests share: scratch folders, processes with a deadline, tiny runs, and the two
//! binaries. Knows how to start and end things; what they should do is for the tests to know.

// Each test target uses its own part of this, and none is a library; unwrap is how a test fails.
#![allow(dead_code, unreachable_pub, unused_imports, clippy::unwrap_used)]

mod nodes;
mod process;
mod tiny;

pub use nodes::Nodes;
pub use process::{Command, Finished, Running};
pub use tiny::{metrics, of_kind, steps, tiny_run};

use std::path::{Path, PathBuf};

/// A folder for one test. Removed when the test succeeds, kept and named when it fails.
pub struct Scratch {
    folder: Option<tempfile::TempDir>,
}

impl Scratch {
    /// A new, empty folder whose name begins with `name`, on the disk of the binaries.
    pub fn new(name: &str) -> Scratch {
        let parent = env!("CARGO_TARGET_TMPDIR");
        std::fs::create_dir_all(parent).unwrap();
        let folder = tempfile::Builder::new().prefix(&format!("{name}-")).tempdir_in(parent).unwrap();
        Scratch { folder: Some(folder) }
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        self.folder.as_ref().expect("a scratch folder lives as long as its test").path()
    }

    /// A path in the folder.
    pub fn join(&self, name: impl AsRef<Path>) -> PathBuf {
        self.path().join(name)
    }

    /// Writes a file, and the folders that lead to it.
    pub fn write(&self, name: &str, text: impl AsRef<[u8]>) -> PathBuf {
        let path = self.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, text).unwrap();
        path
    }

    /// Writes a shell script that can be run.
    pub fn write_script(&self, name: &str, text: &str) -> PathBuf {
        use std::os::unix::fs::PermissionsExt;
        let path = self.write(name, text);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if std::thread::panicking()
            && let Some(folder) = self.folder.take()
        {
            use std::io::Write;
            let _ = writeln!(std::io::stderr(), "kept {}", folder.keep().display());
        }
    }
}

/// The binary `phalanx`.
pub fn phalanx() -> PathBuf {
    binary("phalanx", option_env!("CARGO_BIN_EXE_phalanx"))
}

/// The binary `phalanx-rank`.
pub fn phalanx_rank() -> PathBuf {
    binary("phalanx-rank", option_env!("CARGO_BIN_EXE_phalanx-rank"))
}

/// Cargo names the binaries of the crate whose test this is; the other lies beside it.
fn binary(name: &str, of_this_crate: Option<&str>) -> PathBuf {
    if let Some(path) = of_this_crate {
        return path.into();
    }
    let known = option_env!("CARGO_BIN_EXE_phalanx").or(option_env!("CARGO_BIN_EXE_phalanx-rank"));
    let known = known.expect("this test is registered by a crate with a binary");
    let path = Path::new(known).with_file_name(name);
    assert!(
        path.is_file(),
        "{} is not there: run make test, which builds all binaries first",
        path.display()
    );
    path
}
