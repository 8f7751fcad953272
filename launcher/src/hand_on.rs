//! Commands that need tensors, handed on to `phalanx-rank`, which is found beside `phalanx`: arguments, input,
//! output and exit code are its. Knows nothing of what they do.

use crate::LaunchError;
use crate::cli::HandedOn;
use crate::mpirun::rank_binary;
use anyhow::Result;
use configs::{Exit, HandedOnCommand};
use std::ffi::{OsStr, OsString};
use std::os::unix::process::CommandExt;
use std::process::Command;

/// Runs `phalanx-rank NAME` with the arguments that were given.
///
/// # Errors
/// The installation is not complete.
pub fn run_named(name: &str, given: &HandedOn) -> Result<Exit> {
    run([OsStr::new(name)].into_iter().chain(given.arguments.iter().map(OsString::as_os_str)))
}

/// What the commands that are handed on take, as `phalanx-rank` says.
///
/// # Errors
/// The installation is not complete, or does not start here.
pub(crate) fn arguments() -> Result<Vec<HandedOnCommand>> {
    let output = Command::new(rank_binary()?).arg("arguments").output()?;
    anyhow::ensure!(
        output.status.success(),
        "phalanx-rank does not start: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// Runs `phalanx-rank` with these arguments.
///
/// # Errors
/// The installation is not complete.
pub(crate) fn run(arguments: impl IntoIterator<Item: AsRef<OsStr>>) -> Result<Exit> {
    let status = Command::new(rank_binary()?)
        // What was typed is what its help and its errors show.
        .arg0("phalanx")
        .args(arguments)
        .status()
        .map_err(|source| LaunchError::System { what: "phalanx-rank could not be started".into(), source })?;
    Ok(status.code().map_or(Exit::Failed, Exit::from_code))
}
