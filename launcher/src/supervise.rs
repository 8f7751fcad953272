//! A running job: spawns mpirun, carries its output to the user and signals to it, watches its ranks, and
//! says how it ended.
//! Knows processes, not training; what the ranks print is only told apart by its prefix.

use crate::banners::Banners;
use crate::gauges::Gauges;
use crate::listen::Listener;
use crate::progress::{Console, rank_line};
use crate::signals::StopSignals;
use crate::watch::{Finding, Watch};
use crate::{LaunchError, orphans};
use configs::{Exit, Heartbeat};
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process, kill_process_group, waitid};
use signal_hook::consts::SIGUSR1;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

/// How long mpirun may take to end after it was asked to end at once, before it is killed.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long output may still arrive after mpirun is gone.
const DRAIN: Duration = Duration::from_secs(2);
/// How often signals and ranks are looked at when nothing else happens.
const LOOK: Duration = Duration::from_millis(100);

/// How a job ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// The exit code to return.
    pub exit: Exit,
    /// One sentence for the user.
    pub told: String,
    /// What went wrong, if something did.
    pub finding: Option<Finding>,
    /// Whether somebody asked for the end.
    pub asked: bool,
}

/// A job to run.
#[derive(Debug)]
pub struct Supervised<'a> {
    /// mpirun and its arguments.
    pub command: &'a [String],
    /// Ranks that it starts.
    pub ranks: usize,
    /// Where their heartbeats arrive.
    pub listener: Listener,
    /// Seconds without a sign of life after which they hang.
    pub hang_timeout: Duration,
    /// What is shown of it, to whoever looks.
    pub gauges: Option<&'a Gauges>,
}

/// Runs a job to its end, in a process group of its own.
///
/// SIGTERM, SIGINT, SIGHUP and SIGUSR1 ask the ranks for a checkpoint, through mpirun's forwarding of
/// SIGUSR1; a second one, SIGUSR1 excepted, ends the job at once, and so does a rank that hangs. When this
/// returns, no process of the job is left on this machine.
///
/// # Errors
/// The process could not be set up.
pub fn supervise<O: Write, E: Write>(
    supervised: Supervised<'_>,
    console: &mut Console<O, E>,
    signals: &mut StopSignals,
) -> Result<Outcome, LaunchError> {
    let system = |what: &str| {
        let what = what.to_string();
        move |source| LaunchError::System { what, source }
    };
    let Supervised { command, ranks, listener, hang_timeout, gauges } = supervised;
    orphans::adopt().map_err(system("orphaned ranks could not be adopted"))?;
    let (sender, events) = channel();
    let hand_on = sender.clone();
    let heard = listener.listen(move |beat| hand_on.send(Event::Beat(beat)).is_ok());
    heard.map_err(system("heartbeats could not be listened to"))?;
    let mut child = Command::new(&command[0])
        .args(&command[1..])
        .envs(environment(&listener))
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
        watch: Watch::new(ranks, hang_timeout),
        gauges,
        finding: None,
        stopping: Stopping::No,
        open_streams: 2,
    };
    read_lines(child.stdout.take(), Stream::Out, sender.clone());
    read_lines(child.stderr.take(), Stream::Err, sender.clone());
    report_end(job.group, sender);

    job.run(&events, signals);
    let status = job.clean_up(&mut child, &events);
    drop(listener);
    Ok(job.outcome(status.map_err(system("mpirun's exit code could not be read"))?))
}

/// What mpirun is to find in its environment, and hand on to the ranks on all machines. A list of names
/// rather than flags, so that the command shown is one that can be typed, and secrets stand in none.
fn environment(listener: &Listener) -> Vec<(String, String)> {
    const LIST: &str = "OMPI_MCA_mca_base_env_list";
    let mut names: Vec<String> = std::env::var(LIST).into_iter().collect();
    let variables = listener.variables().map(|(name, value)| (name.to_string(), value));
    names.extend(variables.iter().map(|(name, _)| name.clone()));
    variables.into_iter().chain([(LIST.to_string(), names.join(";"))]).collect()
}

#[derive(Debug, Clone, Copy)]
enum Stream {
    Out,
    Err,
}

enum Event {
    Line(Stream, String),
    StreamClosed,
    Beat(Heartbeat),
    /// mpirun has ended, but its process id is still reserved.
    Ended,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stopping {
    No,
    /// The ranks were asked for a checkpoint.
    Asked,
    /// mpirun was asked to end, by a second signal or because ranks hang, and is killed at this time.
    AtOnce(Instant),
}

struct Job<'a, O: Write, E: Write> {
    /// mpirun's process id, which is also its group's.
    group: Pid,
    console: &'a mut Console<O, E>,
    banners: Banners,
    watch: Watch,
    gauges: Option<&'a Gauges>,
    /// Why this launcher ended the job, if it did.
    finding: Option<Finding>,
    stopping: Stopping,
    open_streams: usize,
}

impl<O: Write, E: Write> Job<'_, O, E> {
    /// Carries output and signals until mpirun has ended.
    fn run(&mut self, events: &Receiver<Event>, signals: &mut StopSignals) {
        loop {
            match events.recv_timeout(LOOK) {
                Ok(Event::Ended) => return,
                Ok(event) => self.handle(event),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            if let Some(signal) = signals.take() {
                self.stop(signal);
            }
            match self.stopping {
                Stopping::AtOnce(kill_at) if Instant::now() >= kill_at => {
                    self.signal_group(Signal::KILL);
                    return;
                }
                Stopping::AtOnce(_) => {}
                Stopping::No | Stopping::Asked => self.look_after_ranks(),
            }
        }
    }

    /// Ends the job if its ranks hang.
    fn look_after_ranks(&mut self) {
        self.watch.tick(Instant::now());
        let Some(finding) = self.watch.verdict() else { return };
        self.console.err(&format!("{}; ending what is left of the job", finding.what));
        self.finding = Some(finding);
        self.end_at_once();
    }

    fn end_at_once(&mut self) {
        self.signal_group(Signal::TERM);
        self.stopping = Stopping::AtOnce(Instant::now() + PATIENCE);
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Line(Stream::Out, line) => self.console.out(&rank_line(&line).unwrap_or(line)),
            Event::Line(Stream::Err, line) => match rank_line(&line) {
                Some(line) if self.banners.take_last_words(&line) => {}
                Some(line) => self.console.err(&line),
                // Ended in the middle of ending, mpirun may say anything, down to a backtrace.
                None if matches!(self.stopping, Stopping::AtOnce(_)) => {}
                None => self.banners.take(line).iter().for_each(|line| self.console.err(line)),
            },
            Event::StreamClosed => self.open_streams -= 1,
            Event::Beat(beat) => {
                self.watch.tick(Instant::now());
                let shown = self.gauges.and_then(|gauges| gauges.hear(&beat));
                for warning in shown.into_iter().chain(self.watch.hear(beat)) {
                    self.console.err(&warning);
                }
            }
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
                self.end_at_once();
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
        let asked = self.stopping != Stopping::No && self.finding.is_none();
        let told = |exit, told: String, finding| Outcome { exit, told, finding, asked };
        // A signal that ends mpirun itself leaves no code.
        let exit = status.code().map_or(Exit::Failed, Exit::from_code);
        match exit {
            _ if self.finding.is_some() => {
                let finding = self.finding.clone();
                let what = finding.as_ref().map(|finding| finding.what.clone()).unwrap_or_default();
                told(Exit::Failed, format!("failed: {what}; {go_on}"), finding)
            }
            Exit::Failed if matches!(self.stopping, Stopping::AtOnce(_)) => {
                told(exit, format!("ended at once; {go_on}"), None)
            }
            Exit::Done => told(exit, "finished".into(), None),
            Exit::Stopped => told(exit, "stopped with a checkpoint; the same command goes on".into(), None),
            Exit::UserError => {
                told(exit, "ended: something must be changed first, as said above".into(), None)
            }
            Exit::Failed => {
                let finding = self.dead(status);
                told(exit, format!("failed: {}; {go_on}", finding.what), Some(finding))
            }
        }
    }

    /// Who ended the job, from what mpirun said of it and what was heard of the rank.
    fn dead(&self, status: ExitStatus) -> Finding {
        let what = self.banners.cause().map_or_else(|| describe(status), String::from);
        let rank = self.banners.rank();
        let last = rank.and_then(|rank| self.watch.last(rank));
        let host = last.map(|beat| beat.host.clone());
        let host = host.or_else(|| self.banners.host().or(self.watch.silent_host()).map(str::to_string));
        let fault = match (rank, &host) {
            (Some(_), _) => "dead",
            (None, Some(_)) => "host",
            (None, None) => "job",
        };
        let what = match (last, &host) {
            (Some(beat), _) if !what.contains(&beat.host) => {
                format!("{what} on {} ({})", beat.host, beat.place())
            }
            (Some(beat), _) => format!("{what} ({})", beat.place()),
            (None, Some(host)) if !what.contains(host.as_str()) => {
                format!("{what}; nothing is heard of {host}")
            }
            _ => what,
        };
        let (step, place) = (last.map(|beat| beat.step), last.map(Heartbeat::place));
        Finding { fault, rank, host, step, place, what }
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
