//! Processes and machines: turns a configuration and a list of hosts into a running job, looks
//! after it and says how it ended.
//!
//! Owns the command line of `phalanx`, hosts and slots, the mpirun command, signals, output and exit
//! codes. Refuses to know tensors and MPI: links neither, so that it starts at once on a login node.

pub mod banners;
pub mod cli;
pub mod data;
mod error;
mod hosts;
pub mod mpirun;
pub mod orphans;
pub mod progress;
pub mod supervise;
pub mod train;

pub use error::{LaunchError, exit_of};
pub use hosts::{Host, Hosts};
