//! A running job: spawns mpirun, carries its output to the user and signals to it, and says how it ended.
//! Knows processes, not training; what the ranks print is only told apart by its prefix.

use crate::banners::Banners;
use crate::progress::{Console, rank_line};
use crate::{LaunchError, orphans};
use configs::Exit;
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process, kill_process_group, waitid};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1};
use signal_hook::iterator::{Handle, Signals};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

/// How long mpirun may take to end after a second signal before it is killed.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long output may still arrive after mpirun is gone.
const DRAIN: Duration = Duration::from_secs(2);

/// How a job ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// The exit code to return.
    pub exit: Exit,
    /// One sentence for the user.
    pub told: String,
}

/// Runs `command` to its end, in a process group of its own.
///
/// SIGTERM, SIGINT, SIGHUP and SIGUSR1 ask the ranks for a checkpoint, through mpirun's forwarding of
/// SIGUSR1; a second one, SIGUSR1 excepted, ends the job at once. When this returns, no process of the
/// job is left on this machine.
///
/// # Errors
/// The process or its signals could not be set up.
pub fn supervise<O: Write, E: Write>(
    command: &[String],
    console: Console<O, E>,
) -> Result<Outcome, LaunchError> {
    let system = |what: &str| {
        let what = what.to_string();
        move |source| LaunchError::System { what, source }
    };
    orphans::adopt().map_err(system("orphaned ranks could not be adopted"))?;
    let (sender, events) = channel();
    let signals = forward_signals(sender.clone()).map_err(system("signals could not be watched"))?;
    let mut child = Command::new(&command[0])
        .args(&command[1..])
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(system("mpirun could not be started"))?;
    let mut job = Job {
        group: Pid::from_child(&child),
        console,
        banners: Banners::default(),
        stopping: Stopping::No,
        open_streams: 2,
    };
    read_lines(child.stdout.take(), Stream::Out, sender.clone());
    read_lines(child.stderr.take(), Stream::Err, sender.clone());
    report_end(job.group, sender);

    job.run(&events);
    let status = job.clean_up(&mut child, &events);
    signals.close();
    Ok(job.outcome(status.map_err(system("mpirun's exit code could not be read"))?))
}

#[derive(Debug, Clone, Copy)]
enum Stream {
    Out,
    Err,
}

enum Event {
    Line(Stream, String),
    StreamClosed,
    Signal(i32),
    /// mpirun has ended, but its process id is still reserved.
    Ended,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stopping {
    No,
    /// The ranks were asked for a checkpoint.
    Asked,
    /// mpirun was asked to end, and is killed at this time.
    AtOnce(Instant),
}

struct Job<O: Write, E: Write> {
    /// mpirun's process id, which is also its group's.
    group: Pid,
    console: Console<O, E>,
    banners: Banners,
    stopping: Stopping,
    open_streams: usize,
}

impl<O: Write, E: Write> Job<O, E> {
    /// Carries output and signals until mpirun has ended.
    fn run(&mut self, events: &Receiver<Event>) {
        loop {
            let event = match self.stopping {
                Stopping::AtOnce(kill_at) => {
                    events.recv_timeout(kill_at.saturating_duration_since(Instant::now())).ok()
                }
                _ => events.recv().ok(),
            };
            match event {
                Some(Event::Ended) => return,
                Some(event) => self.handle(event),
                None => {
                    self.signal_group(Signal::KILL);
                    return;
                }
            }
        }
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Line(Stream::Out, line) => self.console.out(&rank_line(&line).unwrap_or(line)),
            Event::Line(Stream::Err, line) => match rank_line(&line) {
                Some(line) => self.console.err(&line),
                // Ended in the middle of ending, mpirun may say anything, down to a backtrace.
                None if matches!(self.stopping, Stopping::AtOnce(_)) => {}
                None => self.banners.take(line).iter().for_each(|line| self.console.err(line)),
            },
            Event::StreamClosed => self.open_streams -= 1,
            Event::Signal(signal) => self.stop(signal),
            Event::Ended => {}
        }
    }

    fn stop(&mut self, signal: i32) {
        match self.stopping {
            Stopping::No => {
                self.console
                    .err("stopping: asked the ranks to write a checkpoint; a second signal ends at once");
                // mpirun is our child and not yet waited for: the id is its own.
                let _ = kill_process(self.group, Signal::USR1);
                self.stopping = Stopping::Asked;
            }
            Stopping::Asked if signal == SIGUSR1 => {}
            Stopping::Asked => {
                self.console.err("ending at once");
                self.signal_group(Signal::TERM);
                self.stopping = Stopping::AtOnce(Instant::now() + PATIENCE);
            }
            Stopping::AtOnce(_) => self.stopping = Stopping::AtOnce(Instant::now()),
        }
    }

    /// Ends what is left of the job and reads the last of its output.
    fn clean_up(&mut self, child: &mut Child, events: &Receiver<Event>) -> std::io::Result<ExitStatus> {
        self.signal_group(Signal::KILL);
        let status = child.wait();
        orphans::end_all(PATIENCE);
        let deadline = Instant::now() + DRAIN;
        while self.open_streams > 0 {
            match events.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(Event::Signal(_)) => {}
                Ok(event) => self.handle(event),
                Err(_) => break,
            }
        }
        for line in self.banners.finish() {
            self.console.err(&line);
        }
        self.console.end_live_line();
        status
    }

    /// Only called while mpirun is not waited for, so that the group's id cannot be another's.
    fn signal_group(&self, signal: Signal) {
        // An error means that nobody is left in the group.
        let _ = kill_process_group(self.group, signal);
    }

    fn outcome(&self, status: ExitStatus) -> Outcome {
        let go_on = "the same command goes on from the last checkpoint";
        let told = |exit, told: String| Outcome { exit, told };
        // A signal that ends mpirun itself leaves no code.
        let exit = status.code().map_or(Exit::Failed, Exit::from_code);
        match exit {
            Exit::Failed if matches!(self.stopping, Stopping::AtOnce(_)) => {
                told(exit, format!("ended at once; {go_on}"))
            }
            Exit::Done => told(exit, "finished".into()),
            Exit::Stopped => told(exit, "stopped with a checkpoint; the same command goes on".into()),
            Exit::UserError => told(exit, "ended: something must be changed first, as said above".into()),
            Exit::Failed => {
                let cause = self.banners.cause().map_or_else(|| describe(status), String::from);
                told(exit, format!("failed: {cause}; {go_on}"))
            }
        }
    }
}

/// A status that no banner explains. Shells and mpirun report a signal as 128 and its number.
fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code @ 129..=159), _) => {
            format!("mpirun ended with code {code}: a process was ended by signal {}", code - 128)
        }
        (Some(code), _) => format!("mpirun ended with code {code}"),
        (None, signal) => format!("mpirun was ended by signal {}", signal.unwrap_or_default()),
    }
}

/// Sends each stop signal as an event, from a thread.
fn forward_signals(sender: Sender<Event>) -> std::io::Result<Handle> {
    let mut wanted = vec![SIGTERM, SIGINT, SIGUSR1];
    // Under nohup a lost terminal is no reason to stop.
    if !ignored_at_start(SIGHUP) {
        wanted.push(SIGHUP);
    }
    let mut signals = Signals::new(wanted)?;
    let handle = signals.handle();
    std::thread::spawn(move || {
        for signal in signals.forever() {
            if sender.send(Event::Signal(signal)).is_err() {
                return;
            }
        }
    });
    Ok(handle)
}

fn ignored_at_start(signal: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    mask >> (signal - 1) & 1 == 1
}

/// Sends each line of a stream as an event, from a thread; what is no UTF-8 is replaced.
fn read_lines(stream: Option<impl Read + Send + 'static>, which: Stream, sender: Sender<Event>) {
    std::thread::spawn(move || {
        let mut line = Vec::new();
        let mut reader = stream.map(BufReader::new);
        while let Some(reader) = &mut reader {
            line.clear();
            match reader.read_until(b'\n', &mut line) {
                Ok(0) | Err(_) => break,
                Ok(_) => {}
            }
            let text = String::from_utf8_lossy(&line);
            let text = text.trim_end_matches(['\n', '\r']).to_string();
            if sender.send(Event::Line(which, text)).is_err() {
                return;
            }
        }
        let _ = sender.send(Event::StreamClosed);
    });
}

/// Says when mpirun has ended, without taking its process id back.
fn report_end(process: Pid, sender: Sender<Event>) {
    std::thread::spawn(move || {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
        while matches!(waitid(WaitId::Pid(process), options), Err(rustix::io::Errno::INTR)) {}
        let _ = sender.send(Event::Ended);
    });
}
