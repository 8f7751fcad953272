//! The thread that tells the launcher twice a second, at first more often, what this rank is doing, and ends the
//! rank where nobody looks after it any more: when the launcher is lost, and, where there is none, when the step
//! hangs. Knows sockets and time; what is told is the pulse's.
//!
//! A rank whose peers wait for it must not be taken for one that hangs: what counts as life is progress,
//! bytes written while a checkpoint is being saved among it, and within a single operation the processor time of
//! the thread that trains. Waiting ranks have neither; so under plain mpirun, where a rank knows nothing
//! of the others, it may wait twice as long as it computed for the step before it counts the time that hangs.

use crate::pulse::{Beat, Pulse};
use crate::run_folder::{host_name, unix_ms};
use configs::{Doing, Exit, Heartbeat, LAUNCHER_VARIABLE, MOST_MESSAGE_BYTES, SECRET_VARIABLE, Secret};
use std::io::ErrorKind;
use std::net::UdpSocket;
use std::time::{Duration, Instant};
use tracing::error;

/// Between two heartbeats.
const INTERVAL: Duration = Duration::from_millis(500);

/// The same in a rank's first seconds, so that of one that ends then it is known how far it was.
const AT_FIRST: (Duration, Duration) = (Duration::from_secs(5), Duration::from_millis(100));

/// How long the launcher's machine may refuse heartbeats: a port that nobody listens on.
const REFUSED: Duration = Duration::from_secs(4);

/// How long nobody may answer: a machine or a link that is gone. A launcher that was stopped for a moment
/// is not lost.
const SILENT: Duration = Duration::from_secs(20);

/// Before the first update, and while a thread is busy with a single operation, hanging takes this many times
/// as long.
const PATIENT: u32 = 10;

/// Starts the thread for the calling thread, which is to be the one that trains. Ends with the process.
///
/// # Errors
/// What stands in the environment is no address and secret, or the system has no socket or thread.
pub fn start(pulse: &Pulse) -> std::io::Result<()> {
    let line = Line::from_environment(|name| std::env::var(name).ok())?;
    let (pulse, life) = (pulse.clone(), Life::of_this_thread());
    std::thread::Builder::new().name("heartbeat".into()).spawn(move || beat(&pulse, life, line))?;
    Ok(())
}

fn beat(pulse: &Pulse, mut life: Life, mut line: Option<Line>) {
    let began = Instant::now();
    let mut watchdog = Watchdog::new(began);
    let mut seen = None;
    loop {
        let mut beat = pulse.look();
        life.look(beat.doing);
        beat.progress += life.writes;
        if seen.replace(beat.progress) != Some(beat.progress) {
            pulse.grew(unix_ms());
        }
        let ended = match &mut line {
            Some(line) => line.tell(pulse, &beat, life.signs, Instant::now()),
            None => watchdog.look(&beat, life.signs, pulse.hang_timeout(), Instant::now()),
        };
        if let Some(why) = ended {
            error!("{why}");
            let rank = pulse.who().map_or(0, |who| who.rank);
            ops::collectives::abort(rank, Exit::Failed.code(), &why);
        }
        std::thread::sleep(if began.elapsed() < AT_FIRST.0 { AT_FIRST.1 } else { INTERVAL });
    }
}

/// Signs of life within an operation.
#[derive(Debug)]
struct Life {
    /// The thread that trains, as Linux counts its time.
    thread_stat: String,
    ticks: u64,
    /// Bytes written, and how often there were more of them.
    written: u64,
    writes: u64,
    /// How often the thread was seen computing.
    signs: u64,
}

impl Life {
    fn of_this_thread() -> Life {
        let thread = rustix::thread::gettid().as_raw_nonzero();
        Life {
            thread_stat: format!("/proc/self/task/{thread}/stat"),
            ticks: 0,
            written: 0,
            writes: 0,
            signs: 0,
        }
    }

    fn look(&mut self, doing: Doing) {
        let ticks = std::fs::read_to_string(&self.thread_stat).ok().and_then(|stat| ticks(&stat));
        let ticks = ticks.unwrap_or(self.ticks);
        let written = if doing == Doing::Saving { written_bytes().unwrap_or(0) } else { self.written };
        // A thread that wakes to wait on uses next to nothing: of a hundredth of a second it takes two.
        self.signs += u64::from(ticks >= self.ticks + 2);
        self.writes += u64::from(written > self.written);
        (self.ticks, self.written) = (ticks, written);
    }
}

/// User and system time from a line of `/proc/*/stat`, whose second field may hold anything, in ticks.
fn ticks(stat: &str) -> Option<u64> {
    let mut fields = stat.rsplit_once(") ")?.1.split(' ').skip(11);
    Some(fields.next()?.parse::<u64>().ok()? + fields.next()?.parse::<u64>().ok()?)
}

/// Bytes that this process has written to files.
fn written_bytes() -> Option<u64> {
    let io = std::fs::read_to_string("/proc/self/io").ok()?;
    io.lines().find_map(|line| line.strip_prefix("wchar: "))?.parse().ok()
}

/// The way to the launcher.
#[derive(Debug)]
struct Line {
    socket: UdpSocket,
    secret: Secret,
    rank: usize,
    host: String,
    sequence: u64,
    heard: Instant,
    refused_since: Option<Instant>,
}

impl Line {
    /// None where no launcher is named.
    fn from_environment(env: impl Fn(&str) -> Option<String>) -> std::io::Result<Option<Line>> {
        let Some(address) = env(LAUNCHER_VARIABLE) else { return Ok(None) };
        let wrong = |what: String| std::io::Error::new(ErrorKind::InvalidInput, what);
        let address: std::net::SocketAddr = address
            .parse()
            .map_err(|_| wrong(format!("{LAUNCHER_VARIABLE}={address:?} is no address with a port")))?;
        let secret = env(SECRET_VARIABLE).and_then(|text| Secret::from_hex(&text));
        let secret = secret.ok_or_else(|| wrong(format!("{SECRET_VARIABLE} is no secret of 64 digits")))?;
        // Before the ranks have joined only the environment tells.
        let rank = ["OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK"].iter().find_map(|name| env(name));
        let rank = rank.and_then(|rank| rank.parse().ok()).unwrap_or(0);
        let any = if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let socket = UdpSocket::bind(any)?;
        socket.connect(address)?;
        socket.set_nonblocking(true)?;
        let (sequence, heard) = (0, Instant::now());
        Ok(Some(Line { socket, secret, rank, host: host_name(), sequence, heard, refused_since: None }))
    }

    /// Sends a heartbeat and reads the answers to earlier ones. Returns why the rank must end, if it must.
    fn tell(&mut self, pulse: &Pulse, beat: &Beat, alive: u64, now: Instant) -> Option<String> {
        if let Some(who) = pulse.who() {
            self.rank = who.rank;
        }
        self.sequence += 1;
        let message = self.secret.seal_heartbeat(&self.heartbeat(beat, alive));
        let sent = self.socket.send(message.as_bytes()).map(drop);
        let mut refused = matches!(&sent, Err(error) if error.kind() == ErrorKind::ConnectionRefused);
        let mut buffer = [0; MOST_MESSAGE_BYTES];
        loop {
            match self.socket.recv(&mut buffer) {
                Ok(length) => {
                    if self.secret.open_answer(self.rank, &buffer[..length]).is_some() {
                        (self.heard, self.refused_since, refused) = (now, None, false);
                    }
                }
                Err(error) if error.kind() == ErrorKind::ConnectionRefused => refused = true,
                Err(_) => break, // nothing more has come
            }
        }
        if refused {
            self.refused_since.get_or_insert(now);
        }
        let gone = self.refused_since.is_some_and(|since| now - since > REFUSED && self.heard < since);
        (gone || now - self.heard > SILENT).then(|| {
            format!(
                "the launcher is lost: it has not answered for {:.0} s, {}; this rank ends\n\
                 hint: the command that started the run goes on from the last checkpoint",
                (now - self.heard).as_secs_f64(),
                self.heartbeat(beat, alive).place(),
            )
        })
    }

    fn heartbeat(&self, beat: &Beat, alive: u64) -> Heartbeat {
        Heartbeat {
            rank: self.rank,
            host: self.host.chars().take(64).collect(),
            pid: std::process::id(),
            sequence: self.sequence,
            generation: beat.generation,
            step: beat.step,
            own_steps: beat.own_steps,
            doing: beat.doing,
            segment: beat.segment.clone(),
            collective: beat.collective.map(str::to_string),
            begun: beat.begun,
            progress: beat.progress,
            alive,
            own_ms: beat.own_ms,
            metrics: beat.metrics,
        }
    }
}

/// Ends a rank that hangs where no launcher watches.
#[derive(Debug)]
struct Watchdog {
    last: (u64, u64),
    /// The last progress or sign of life, and the last progress.
    moved: (Instant, Instant),
    own_steps: u64,
    step_began: Instant,
}

impl Watchdog {
    fn new(now: Instant) -> Watchdog {
        Watchdog { last: (0, 0), moved: (now, now), own_steps: 0, step_began: now }
    }

    fn look(&mut self, beat: &Beat, signs: u64, limit: Option<Duration>, now: Instant) -> Option<String> {
        if beat.own_steps != self.own_steps {
            (self.own_steps, self.step_began) = (beat.own_steps, now);
        }
        if beat.progress != self.last.0 {
            self.moved = (now, now);
        } else if signs != self.last.1 {
            self.moved.0 = now;
        }
        self.last = (beat.progress, signs);
        let mut limit = limit?;
        if beat.own_steps == 0 || beat.doing == Doing::Saving || beat.doing == Doing::Starting {
            limit *= PATIENT;
        } else {
            // Others may need longer for a step than this rank did.
            limit += 2 * self.moved.1.saturating_duration_since(self.step_began);
        }
        let (still, busy) = (now - self.moved.0, now - self.moved.1);
        (still > limit || busy > limit * PATIENT).then(|| {
            let line = Heartbeat {
                step: beat.step,
                doing: beat.doing,
                segment: beat.segment.clone(),
                collective: beat.collective.map(str::to_string),
                ..Heartbeat::default()
            };
            format!(
                "no progress for {} s ({}), guard.hang_timeout_s = {}: this rank hangs, or waits for one that \
                 does; the job ends\nhint: the same command goes on from the last checkpoint; under phalanx \
                 train the rank that hangs is named",
                busy.as_secs(),
                line.place(),
                limit.as_secs(),
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Option<Duration> = Some(Duration::from_secs(60));

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn beat(progress: u64, own_steps: u64) -> Beat {
        Beat { progress, own_steps, doing: Doing::Backward, ..Beat::default() }
    }

    #[test]
    fn time_is_read_from_a_line_of_proc_whatever_the_name() {
        assert_eq!(ticks("1 (a) b) S 2 3 4 5 6 7 8 9 10 11 12 13 14"), Some(12 + 13));
        assert_eq!(ticks("nothing"), None);
    }

    #[test]
    fn a_rank_that_neither_moves_nor_computes_hangs() {
        let start = Instant::now();
        let mut dog = Watchdog::new(start);
        assert_eq!(dog.look(&beat(1, 1), 0, LIMIT, start), None);
        assert_eq!(dog.look(&beat(1, 1), 0, LIMIT, start + at(60)), None);
        let told = dog.look(&beat(1, 1), 0, LIMIT, start + at(61)).unwrap();
        assert!(told.contains("backward") && told.contains("guard.hang_timeout_s"), "{told}");
    }

    #[test]
    fn a_step_of_ten_minutes_is_no_hang() {
        let start = Instant::now();
        let mut dog = Watchdog::new(start);
        // A segment every 50 s; then one operation of nine minutes, in which only the processor is busy.
        for second in 0..600 {
            assert_eq!(dog.look(&beat(second / 50, 1), 0, LIMIT, start + at(second)), None);
        }
        for second in 600..1140 {
            assert_eq!(dog.look(&beat(12, 1), second / 20, LIMIT, start + at(second)), None);
        }
        // Done with its part of the step, it may wait for one that takes twice as long.
        for second in 1140..2000 {
            let waiting = dog.look(&beat(13, 1), 57, LIMIT, start + at(second));
            assert_eq!(waiting, None, "{second}");
        }
    }

    #[test]
    fn before_the_first_update_there_is_ten_times_as_much_time() {
        let start = Instant::now();
        let mut dog = Watchdog::new(start);
        assert_eq!(dog.look(&beat(0, 0), 0, LIMIT, start + at(599)), None);
        assert!(dog.look(&beat(0, 0), 0, LIMIT, start + at(601)).is_some());
        assert_eq!(Watchdog::new(start).look(&beat(0, 0), 0, None, start + at(9999)), None);
    }

    #[test]
    fn without_a_launcher_there_is_no_line_and_half_of_one_is_an_error() {
        assert!(Line::from_environment(|_| None).unwrap().is_none());
        let only_address = |name: &str| (name == LAUNCHER_VARIABLE).then(|| "127.0.0.1:1".to_string());
        assert!(Line::from_environment(only_address).is_err());
    }

    #[test]
    fn a_launcher_that_answers_keeps_a_rank_and_one_that_is_gone_ends_it() {
        let launcher = UdpSocket::bind("127.0.0.1:0").unwrap();
        let secret = Secret::new([1; 32]);
        let env = |name: &str| match name {
            LAUNCHER_VARIABLE => Some(launcher.local_addr().unwrap().to_string()),
            SECRET_VARIABLE => Some(secret.to_hex()),
            "OMPI_COMM_WORLD_RANK" => Some("3".to_string()),
            _ => None,
        };
        let mut line = Line::from_environment(env).unwrap().unwrap();
        let (pulse, start) = (Pulse::default(), Instant::now());
        assert_eq!(line.tell(&pulse, &Beat::default(), 0, start), None);
        let mut buffer = [0; MOST_MESSAGE_BYTES];
        let (length, from) = launcher.recv_from(&mut buffer).unwrap();
        let heard = secret.open_heartbeat(&buffer[..length]).unwrap();
        assert_eq!((heard.rank, heard.sequence), (3, 1));
        launcher.send_to(secret.seal_answer(3, 1).as_bytes(), from).unwrap();
        assert_eq!(line.tell(&pulse, &Beat::default(), 0, start + at(15)), None, "it was answered");
        assert_eq!(line.tell(&pulse, &Beat::default(), 0, start + at(30)), None, "15 s ago");
        let silent = line.tell(&pulse, &Beat::default(), 0, start + at(36)).unwrap();
        assert!(silent.contains("the launcher is lost"), "{silent}");
    }
}
