//! Stop signals to the launcher, for whoever looks after the run at the moment: a job, or the wait
//! between two of them.

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1};
use signal_hook::iterator::Signals;
use std::time::{Duration, Instant};

/// How often a wait looks.
const LOOK: Duration = Duration::from_millis(50);

/// SIGTERM, SIGINT, SIGUSR1 and SIGHUP, the last unless it was ignored when the program started.
#[derive(Debug)]
pub struct StopSignals {
    signals: Signals,
}

impl StopSignals {
    /// Watches for them from now on.
    ///
    /// # Errors
    /// The system refuses a handler.
    pub fn watch() -> std::io::Result<StopSignals> {
        let mut wanted = vec![SIGTERM, SIGINT, SIGUSR1];
        // Under nohup a lost terminal is no reason to stop.
        if !ignored_at_start(SIGHUP) {
            wanted.push(SIGHUP);
        }
        Ok(StopSignals { signals: Signals::new(wanted)? })
    }

    /// One that has come since the last call, if any has.
    pub fn take(&mut self) -> Option<i32> {
        self.signals.pending().next()
    }

    /// Waits so long, or until one comes.
    pub fn wait(&mut self, patience: Duration) -> Option<i32> {
        let deadline = Instant::now() + patience;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.take() {
                None if left > Duration::ZERO => std::thread::sleep(left.min(LOOK)),
                come => return come,
            }
        }
    }
}

fn ignored_at_start(signal: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    mask >> (signal - 1) & 1 == 1
}
