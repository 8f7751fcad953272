//! Processes and machines: turns a configuration and a list of hosts into a running job, looks
//! after it and says how it ended.
//!
//! Owns the command line of `phalanx`, hosts and slots, the mpirun command, signals, output and exit
//! codes. Refuses to know tensors and MPI: links neither, so that it starts at once on a login node.

pub mod agent;
pub mod allocation;
pub mod banners;
pub mod checkpoint;
pub mod cli;
pub mod data;
pub mod doctor;
mod error;
pub mod eval;
pub mod finetune;
pub mod gauges;
pub mod hand_on;
mod hosts;
pub mod listen;
pub mod live;
pub mod manual;
pub mod mpirun;
pub mod orphans;
pub mod plan;
pub mod progress;
pub mod prove;
pub mod restarts;
pub mod run_lock;
pub mod signals;
pub mod slurm;
pub mod supervise;
pub mod targets;
pub mod train;
pub mod watch;

pub use error::{LaunchError, exit_of};
pub use hosts::{Host, Hosts};
