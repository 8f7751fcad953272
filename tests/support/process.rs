//! A process with a deadline, and every process that came of it.
//!
//! mpirun puts ranks into process groups of their own, so that a group is not a family here: members
//! are known by a variable that they inherit.

use std::ffi::{OsStr, OsString};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const FAMILY: &str = "PHALANX_TEST_FAMILY";

/// A command line to run. Variables by which MPI or a batch system tells processes who they are do
/// not reach it, and mpirun may be started by root.
pub struct Command {
    program: PathBuf,
    arguments: Vec<OsString>,
    variables: Vec<(String, OsString)>,
    folder: Option<PathBuf>,
    deadline: Duration,
}

impl Command {
    /// Runs `program`; 60 seconds at most.
    pub fn new(program: impl Into<PathBuf>) -> Command {
        let deadline = Duration::from_secs(60);
        Command {
            program: program.into(),
            arguments: Vec::new(),
            variables: Vec::new(),
            folder: None,
            deadline,
        }
    }

    /// Adds arguments.
    pub fn args<S: AsRef<OsStr>>(mut self, arguments: impl IntoIterator<Item = S>) -> Command {
        self.arguments.extend(arguments.into_iter().map(|argument| argument.as_ref().to_os_string()));
        self
    }

    /// Sets an environment variable.
    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Command {
        self.variables.push((name.to_string(), value.as_ref().to_os_string()));
        self
    }

    /// Runs in `folder`.
    pub fn current_dir(mut self, folder: impl AsRef<Path>) -> Command {
        self.folder = Some(folder.as_ref().to_path_buf());
        self
    }

    /// Ends it, and fails the test, after this long.
    pub fn deadline(mut self, deadline: Duration) -> Command {
        self.deadline = deadline;
        self
    }

    /// Starts it and waits for its end.
    pub fn run(self) -> Finished {
        self.start().finish()
    }

    /// Starts it.
    pub fn start(self) -> Running {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let family = format!("{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let mut command = std::process::Command::new(&self.program);
        for (name, _) in std::env::vars_os() {
            let foreign = ["OMPI_", "PMIX_", "PMI_", "PRTE_", "SLURM_"];
            if foreign.iter().any(|prefix| name.to_string_lossy().starts_with(prefix)) {
                command.env_remove(name);
            }
        }
        command.env("OMPI_ALLOW_RUN_AS_ROOT", "1").env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1");
        command.args(&self.arguments).envs(self.variables).env(FAMILY, &family);
        if let Some(folder) = &self.folder {
            command.current_dir(folder);
        }
        let started = Instant::now();
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{} does not start: {error}", self.program.display()));
        let (stdout, stderr) = (Capture::of(child.stdout.take()), Capture::of(child.stderr.take()));
        Running { child, family, stdout, stderr, started, deadline: started + self.deadline }
    }
}

/// A process that was started. Dropped, it ends with all that came of it.
pub struct Running {
    child: Child,
    family: String,
    stdout: Capture,
    stderr: Capture,
    started: Instant,
    deadline: Instant,
}

impl Running {
    /// The process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal, such as "TERM", to the process alone.
    pub fn signal(&self, signal: &str) {
        kill(signal, self.id());
    }

    /// Sends a signal to a process that came of it, by its name, such as "mpirun".
    pub fn signal_member(&self, name: &str, signal: &str) {
        self.signal_where(signal, name, |member| member.name == name);
    }

    /// Sends a signal to a rank.
    pub fn signal_rank(&self, rank: usize, signal: &str) {
        let variable = format!("OMPI_COMM_WORLD_RANK={rank}");
        let is_rank = |member: &Member| member.name == "phalanx-rank" && member.inherited(&variable);
        self.signal_where(signal, &variable, is_rank);
    }

    /// The ranks that live now.
    pub fn ranks(&self) -> Vec<usize> {
        let ranks = members(&self.family).into_iter().filter(|member| member.name == "phalanx-rank");
        let number = |member: Member| member.value("OMPI_COMM_WORLD_RANK")?.parse().ok();
        let mut ranks: Vec<usize> = ranks.filter_map(number).collect();
        ranks.sort_unstable();
        ranks
    }

    fn signal_where(&self, signal: &str, who: &str, is: impl Fn(&Member) -> bool) {
        match members(&self.family).into_iter().find(is) {
            Some(member) => kill(signal, member.id),
            None => panic!("no process is {who}\n{}", self.output()),
        }
    }

    /// Waits until standard output or error holds `text` at least `times` times.
    pub fn wait_for(&mut self, text: &str, times: usize) {
        let count = |running: &Running| {
            running.stdout.text().matches(text).count() + running.stderr.text().matches(text).count()
        };
        while count(self) < times {
            let ended = matches!(self.child.try_wait(), Ok(Some(_)));
            if (ended && self.stdout.closed() && self.stderr.closed() && count(self) < times)
                || self.expired()
            {
                panic!("waited in vain for {times} x {text:?}\n{}", self.output());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits for the end. Panics, with the output, when the deadline passes first.
    pub fn finish(mut self) -> Finished {
        let status = loop {
            match self.child.try_wait().expect("a child can be waited for") {
                Some(status) => break status,
                None if self.expired() => panic!("ran past its deadline\n{}", self.output()),
                None => std::thread::sleep(Duration::from_millis(5)),
            }
        };
        let elapsed = self.started.elapsed();
        let survivors = members(&self.family).into_iter().map(|member| member.name).collect();
        end(&self.family);
        self.stdout.join();
        self.stderr.join();
        let (stdout, stderr) = (self.stdout.text(), self.stderr.text());
        Finished { code: status.code(), stdout, stderr, elapsed, survivors }
    }

    /// What it has complained about so far.
    pub fn said(&self) -> String {
        self.stderr.text()
    }

    /// Whether nothing that came of it lives any more, itself included.
    pub fn alone(&self) -> bool {
        members(&self.family).is_empty()
    }

    fn expired(&self) -> bool {
        Instant::now() > self.deadline
    }

    /// What it has written so far, to either stream.
    pub fn output(&self) -> String {
        format!("stdout:\n{}\nstderr:\n{}", self.stdout.text(), self.stderr.text())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        end(&self.family);
        // One that overwrites its environment, as sshd does, is no member.
        if let Ok(None) = self.child.try_wait() {
            let _ = self.child.kill();
        }
        let _ = self.child.wait();
    }
}

/// A process that ended.
#[derive(Debug)]
pub struct Finished {
    /// Its exit code; none if a signal ended it.
    pub code: Option<i32>,
    /// What it wrote.
    pub stdout: String,
    /// What it complained about.
    pub stderr: String,
    /// From start to end.
    pub elapsed: Duration,
    /// Names of the processes that it left behind, which have been ended since.
    pub survivors: Vec<String>,
}

impl Finished {
    /// Panics, with the output, unless it ended with `code`.
    #[track_caller]
    pub fn expect_code(self, code: i32) -> Finished {
        assert_eq!(self.code, Some(code), "stdout:\n{}\nstderr:\n{}", self.stdout, self.stderr);
        self
    }

    /// Panics, with the output, unless standard output holds each of `texts`.
    #[track_caller]
    pub fn expect_stdout(self, texts: &[&str]) -> Finished {
        for text in texts {
            assert!(self.stdout.contains(text), "no {text:?} in stdout:\n{}", self.stdout);
        }
        self
    }

    /// Panics, with the output, unless standard error holds each of `texts`.
    #[track_caller]
    pub fn expect_stderr(self, texts: &[&str]) -> Finished {
        for text in texts {
            assert!(self.stderr.contains(text), "no {text:?} in stderr:\n{}", self.stderr);
        }
        self
    }
}

/// What a stream has carried so far.
struct Capture {
    bytes: Arc<Mutex<Vec<u8>>>,
    reader: Option<JoinHandle<()>>,
}

impl Capture {
    fn of(stream: Option<impl Read + Send + 'static>) -> Capture {
        let bytes = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&bytes);
        let mut stream = stream.expect("the stream is piped");
        let reader = std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(read @ 1..) = stream.read(&mut buffer) {
                sink.lock().unwrap().extend_from_slice(&buffer[..read]);
            }
        });
        Capture { bytes, reader: Some(reader) }
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes.lock().unwrap()).into_owned()
    }

    fn closed(&self) -> bool {
        self.reader.as_ref().is_none_or(JoinHandle::is_finished)
    }

    fn join(&mut self) {
        if let Some(reader) = self.reader.take() {
            reader.join().expect("a reader does not panic");
        }
    }
}

/// A living process of a family.
struct Member {
    id: u32,
    name: String,
    environment: Vec<u8>,
}

impl Member {
    /// The value of a variable that it inherited.
    fn value(&self, name: &str) -> Option<String> {
        let mut variables = self.environment.split(|&byte| byte == 0).map(String::from_utf8_lossy);
        variables.find_map(|one| Some(one.strip_prefix(name)?.strip_prefix('=')?.to_string()))
    }

    fn inherited(&self, variable: &str) -> bool {
        self.environment.split(|&byte| byte == 0).any(|one| one == variable.as_bytes())
    }
}

/// The living processes that inherited the family's variable.
fn members(family: &str) -> Vec<Member> {
    let variable = format!("{FAMILY}={family}");
    let processes = std::fs::read_dir("/proc").expect("/proc is mounted");
    processes
        .filter_map(|entry| {
            let path = entry.ok()?.path();
            let id = path.file_name()?.to_str()?.parse().ok()?;
            // A process that has ended but was not waited for has no environment any more.
            let environment = std::fs::read(path.join("environ")).ok()?;
            let name = std::fs::read_to_string(path.join("comm")).ok()?.trim().to_string();
            let member = Member { id, name, environment };
            member.inherited(&variable).then_some(member)
        })
        .collect()
}

/// Ends a family: mpirun is asked first, since it ends its ranks; then all that is left is killed.
fn end(family: &str) {
    let deadline = Instant::now() + Duration::from_secs(2);
    let mut signal = "TERM";
    loop {
        let members = members(family);
        if members.is_empty() {
            return;
        }
        members.iter().for_each(|member| kill(signal, member.id));
        if Instant::now() > deadline {
            signal = "KILL";
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Through the shell, whose `kill` is everywhere and which keeps unsafe code out of tests.
fn kill(signal: &str, id: u32) {
    let command = format!("kill -{signal} {id}");
    let _ = std::process::Command::new("sh").args(["-c", &command]).stderr(Stdio::null()).status();
}
