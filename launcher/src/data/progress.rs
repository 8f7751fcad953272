//! How far the reading of files has come: a bar with rate and time left, on a terminal only.

use dataloader::Inputs;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::IsTerminal;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

const EVERY: Duration = Duration::from_millis(200);

/// Does something with the inputs and shows meanwhile how many of their bytes were read.
pub(super) fn shown<T>(inputs: &Inputs, work: impl FnOnce() -> T) -> T {
    if !std::io::stderr().is_terminal() {
        return work();
    }
    let bar = ProgressBar::with_draw_target(Some(inputs.bytes()), ProgressDrawTarget::stderr());
    let template = "{bar:30} {percent:>3} % | {decimal_bytes} of {decimal_total_bytes} | {decimal_bytes_per_sec} | ETA {eta}";
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    let (done, wait) = channel::<()>();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let wait = wait; // ends when the other end is dropped
            while wait.recv_timeout(EVERY) == Err(RecvTimeoutError::Timeout) {
                bar.set_position(inputs.meter.load(Ordering::Relaxed));
            }
            bar.finish_and_clear();
        });
        let result = work();
        drop(done);
        result
    })
}
