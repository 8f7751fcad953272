//! Several nodes on this machine, made by `scripts/nodes`. Without root there are none: then a test says
//! so on stderr, and counts as passed.

use super::process::Command;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// Network namespaces with a host name each. Gone when dropped; end their processes first.
pub struct Nodes {
    name: String,
    count: usize,
}

impl Nodes {
    /// `count` nodes, each sending at most `mbit` million bits a second if that is given; `None`, and a
    /// word on stderr, where namespaces are not to be had.
    pub fn up(count: usize, mbit: Option<u32>) -> Option<Nodes> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let name = format!("t{}x{}n", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let mut arguments = vec!["up".to_string(), name.clone(), count.to_string()];
        arguments.extend(mbit.map(|mbit| mbit.to_string()));
        let made = Command::new(script()).args(arguments).run();
        if made.code == Some(77) {
            use std::io::Write;
            let _ = writeln!(std::io::stderr(), "skipped: {}", made.stderr.trim());
            return None;
        }
        made.expect_code(0);
        Some(Nodes { name, count })
    }

    /// mpirun on the first of them, with so many ranks on each; what they run is to be added.
    pub fn mpirun(&self, ranks_per_node: usize) -> Command {
        let (count, slots) = (self.count.to_string(), ranks_per_node.to_string());
        Command::new(script()).args(["mpirun", &self.name, &count, &slots])
    }

    /// A program on one of them; what it is to do is to be added.
    pub fn run(&self, node: usize, program: &Path) -> Command {
        Command::new(script()).args(["run".as_ref(), self.name(node).as_ref(), program.as_os_str()])
    }

    /// The parameter of Open MPI by which mpirun on a node reaches the others.
    pub fn agent(&self) -> String {
        format!("plm_rsh_agent={} agent", script().canonicalize().unwrap().display())
    }

    /// A node's name.
    pub fn name(&self, node: usize) -> String {
        format!("{}{node}", self.name)
    }

    /// Cuts a node off, or joins it again.
    pub fn link(&self, node: usize, up: bool) {
        let state = if up { "up" } else { "down" };
        Command::new(script()).args(["link", &self.name(node), state]).run().expect_code(0);
    }
}

impl Drop for Nodes {
    fn drop(&mut self) {
        let _ = Command::new(script()).args(["down", &self.name]).run();
    }
}

fn script() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../scripts/nodes")
}
