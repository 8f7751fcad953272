//! What `phalanx train` promises about processes: what it refuses, what it starts, what it passes on and
//! what it leaves behind. The launcher and mpirun are the real ones; the ranks are shell scripts in
//! the place of `phalanx-rank`, so that nothing here depends on training.

#![allow(clippy::unwrap_used)] // unwrap is how a test fails

#[path = "../support/mod.rs"]
mod support;

mod data;
mod plan;
mod refusals;
mod restarting;
mod running;

use std::path::PathBuf;
use support::{Command, Scratch, tiny_run};

/// A scratch folder with a tiny run and an installation whose ranks run a script.
struct Bench {
    scratch: Scratch,
}

impl Bench {
    /// `rank` is the body of the script; in it `$R` is the rank.
    fn new(name: &str, rank: &str) -> Bench {
        let scratch = Scratch::new(name);
        tiny_run(&scratch, 10);
        install(&scratch);
        scratch.write_script("bin/phalanx-rank", &format!("#!/bin/sh\nR=$OMPI_COMM_WORLD_RANK\n{rank}\n"));
        Bench { scratch }
    }

    /// Whether the tests run as root, which mpirun must be told.
    fn is_root(&self) -> bool {
        use std::os::unix::fs::MetadataExt;
        std::fs::metadata(self.scratch.path()).unwrap().uid() == 0
    }

    /// `phalanx train tiny.toml` with these arguments, split at spaces, and no restarts unless they say so.
    fn train(&self, arguments: &str) -> Command {
        let once = if arguments.contains("--max-restarts") { "" } else { " --max-restarts 0" };
        let arguments = format!("{arguments}{once}");
        Command::new(self.scratch.join("bin/phalanx"))
            .args(["train", "tiny.toml"])
            .args(arguments.split_whitespace())
            .current_dir(self.scratch.path())
    }
}

/// Puts `phalanx` into the folder `bin`, alone.
fn install(scratch: &Scratch) -> PathBuf {
    let path = scratch.join("bin/phalanx");
    std::fs::create_dir_all(scratch.join("bin")).unwrap();
    // A link rather than a copy: a file that was just written may still be open in a process that
    // another test is starting, and then cannot be run.
    std::fs::hard_link(support::phalanx(), &path).unwrap();
    path
}
