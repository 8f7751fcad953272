//! Starting this test executable as ranks, with a deadline, and what came of it.

use std::fmt;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, geteuid, kill_process_group};

/// The environment variable that makes a process a rank and says what it does.
pub(crate) const BODY: &str = "PHALANX_TEST_BODY";

/// No start takes as long on a loaded machine of two cores.
const DEADLINE: Duration = Duration::from_secs(60);

/// Starts by these tests go one at a time: ranks poll, and cores are few.
static TURN: Mutex<()> = Mutex::new(());

/// A finished start.
pub(crate) struct Run {
    /// The exit code; `None` if a signal or the deadline ended it.
    pub(crate) code: Option<i32>,
    /// From start to end.
    pub(crate) took: Duration,
    /// stdout and stderr.
    pub(crate) output: String,
}

impl fmt::Display for Run {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "code {:?} after {:?}\n{}", self.code, self.took, self.output)
    }
}

/// Runs `ranks` ranks with a body.
pub(crate) fn mpirun(ranks: usize, body: &str, env: &[(&str, &str)]) -> Run {
    let mut command = Command::new("mpirun");
    command.args(["-n", &ranks.to_string(), "--oversubscribe", "--bind-to", "none"]);
    if geteuid().is_root() {
        command.arg("--allow-run-as-root");
    }
    command.arg(std::env::current_exe().unwrap());
    Run::of(command, body, env)
}

impl Run {
    /// Runs a body in one process without mpirun.
    pub(crate) fn alone(body: &str, env: &[(&str, &str)]) -> Run {
        Run::of(Command::new(std::env::current_exe().unwrap()), body, env)
    }

    /// It ended well.
    pub(crate) fn assert_done(&self) {
        assert_eq!(self.code, Some(0), "{self}");
    }

    fn of(mut command: Command, body: &str, env: &[(&str, &str)]) -> Run {
        let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("output");
        let file = std::fs::File::create(&path).unwrap();
        command
            .args(["--exact", "what_a_rank_does", "--nocapture"])
            .env(BODY, body)
            .envs(env.iter().copied());
        command.stdin(Stdio::null()).stdout(file.try_clone().unwrap()).stderr(file);
        let began = Instant::now();
        let mut child = command.process_group(0).spawn().expect("mpirun is installed");
        let mut status = None;
        while status.is_none() && began.elapsed() < DEADLINE {
            std::thread::sleep(Duration::from_millis(10));
            status = child.try_wait().unwrap();
        }
        let took = began.elapsed();
        if status.is_none() {
            // mpirun ends its ranks on SIGTERM, and is ended itself if it does not.
            let group = Pid::from_child(&child);
            let _ = kill_process_group(group, Signal::TERM);
            std::thread::sleep(Duration::from_secs(3));
            let _ = kill_process_group(group, Signal::KILL);
            let _ = child.wait();
        }
        Run {
            code: status.and_then(|status| status.code()),
            took,
            output: std::fs::read_to_string(&path).unwrap(),
        }
    }
}

/// Says something that the output will hold.
pub(crate) fn say(what: &str) {
    let _ = writeln!(std::io::stderr(), "{what}");
}
