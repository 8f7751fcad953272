//! Signals as a flag. All of SIGUSR1, SIGTERM and SIGINT mean: agree on a step, save, end with exit
//! code 3. A second one ends the process at once.

use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Whether this rank was asked to stop. Ranks act on it only together, through the step's reduction.
#[derive(Debug, Clone, Default)]
pub struct StopFlag {
    asked: Arc<AtomicBool>,
}

impl StopFlag {
    /// A flag that the process's signals raise.
    ///
    /// # Errors
    /// The system refuses a handler.
    pub fn on_signals() -> io::Result<StopFlag> {
        let flag = StopFlag::default();
        for signal in [SIGUSR1, SIGTERM, SIGINT] {
            // Handlers run in this order: with the flag already up, the first ends the process.
            signal_hook::flag::register_conditional_shutdown(signal, 128 + signal, Arc::clone(&flag.asked))?;
            signal_hook::flag::register(signal, Arc::clone(&flag.asked))?;
        }
        Ok(flag)
    }

    /// Raises the flag, as a signal would.
    pub fn raise(&self) {
        self.asked.store(true, Ordering::Relaxed);
    }

    /// Whether it is up.
    pub fn is_raised(&self) -> bool {
        self.asked.load(Ordering::Relaxed)
    }
}
