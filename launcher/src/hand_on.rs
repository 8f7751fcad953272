//! Commands that need tensors, handed on to `phalanx-rank`, which is found beside `phalanx`: arguments, input,
//! output and exit code are its. Knows nothing of what they do.

use crate::LaunchError;
use crate::cli::HandedOn;
use crate::mpirun::rank_binary;
use crate::prove::ended;
use anyhow::Result;
use configs::Exit;
use std::process::Command;

/// Runs `phalanx-rank NAME` with these arguments.
///
/// # Errors
/// The installation is not complete.
pub fn run(name: &str, args: &HandedOn) -> Result<Exit> {
    let status =
        Command::new(rank_binary()?).arg(name).args(&args.arguments).status().map_err(|source| {
            LaunchError::System { what: "phalanx-rank could not be started".into(), source }
        })?;
    Ok(ended(status))
}
