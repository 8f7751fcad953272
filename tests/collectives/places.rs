//! The suite where ranks find other surroundings: nodes with a network between them, and a small /dev/shm.

use crate::nodes::Nodes;
use crate::process::{Command, Finished};
use crate::{as_ranks, mpirun_arguments};
use std::time::Duration;

#[test]
fn nodes_with_a_network_between_them_pass_the_suite() {
    let Some(nodes) = Nodes::up(2, None) else { return };
    for ranks_per_node in [1, 2] {
        let suite = as_ranks(nodes.mpirun(ranks_per_node), "suite", "default");
        suite.deadline(Duration::from_secs(100)).run().expect_code(0);
    }
}

#[test]
fn a_dev_shm_too_small_for_sums_is_said_and_changes_no_bit() {
    let Some(passed) = with_dev_shm("1m") else { return };
    passed.expect_stderr(&["sums go by messages", "/dev/shm has", "hint: make /dev/shm larger"]);
}

#[test]
fn a_dev_shm_too_small_for_buffers_is_said_and_changes_no_bit() {
    let Some(passed) = with_dev_shm("24m") else { return };
    passed.expect_stderr(&["ranks of a node copy their buffers", "hint: make /dev/shm larger"]);
}

/// The suite on two ranks with another /dev/shm; `None`, and a word on stderr, where it cannot be mounted.
fn with_dev_shm(size: &str) -> Option<Finished> {
    let mount = format!("mount -t tmpfs -o size={size} tmpfs /dev/shm");
    let inside =
        |then: &str| Command::new("unshare").args(["-m", "sh", "-c", &format!("{mount} && {then}"), "sh"]);
    if inside("true").run().code != Some(0) {
        use std::io::Write;
        let _ = writeln!(std::io::stderr(), "skipped: another /dev/shm takes root");
        return None;
    }
    // MPI's own memory goes elsewhere: what is tried is ours.
    let command = inside("exec mpirun --mca btl_vader_backing_directory /tmp \"$@\"");
    Some(as_ranks(command.args(mpirun_arguments(2)), "suite", "staged").run().expect_code(0))
}
