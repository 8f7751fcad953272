//! `phalanx watch` and `phalanx export-metrics`: what a run measured, for people and for other programs. Reads the
//! run folder or asks rank 0; touches neither the run nor its files.

use crate::cli::{ExportMetricsArgs, WatchArgs};
use crate::signals::StopSignals;
use anyhow::{Context, Result};
use configs::Exit;
use monitor::{Page, Reply, Server};
use std::io::{IsTerminal, Write};
use std::time::Duration;

/// Between two looks of `--text`.
const INTERVAL: Duration = Duration::from_secs(2);

/// Shows runs until a signal comes; as text, until they are over.
///
/// # Errors
/// A run that is none, a server that does not answer, a port that is taken.
pub fn watch(args: &WatchArgs) -> Result<Exit> {
    let page = Page::of(args.runs.iter().cloned());
    for view in page.look() {
        view.map_err(crate::LaunchError::NothingToWatch)?;
    }
    let mut signals = StopSignals::watch()?;
    if args.text {
        return text(&page, &mut signals);
    }
    let answer =
        move |target: &str| page.answer(target).unwrap_or_else(|| Reply::error(404, "there is a page at /"));
    let (server, taken) =
        Server::start(args.listen, answer).with_context(|| format!("--listen {}", args.listen))?;
    if let Some(error) = taken {
        writeln!(
            std::io::stderr(),
            "warning: --listen {}: {error}; another port is taken instead",
            args.listen
        )?;
    }
    writeln!(
        std::io::stdout(),
        "http://{}/ shows {}; Ctrl-C ends it",
        server.address(),
        args.runs.join(", ")
    )?;
    while signals.wait(Duration::from_secs(3600)).is_none() {}
    Ok(Exit::Done)
}

/// On a terminal in place, again and again; else once.
fn text(page: &Page, signals: &mut StopSignals) -> Result<Exit> {
    let mut stdout = std::io::stdout();
    let width = rustix::termios::tcgetwinsize(&stdout).map_or(100, |size| usize::from(size.ws_col));
    loop {
        let views: Vec<_> = page.look().into_iter().filter_map(Result::ok).collect();
        let shown: Vec<String> = views.iter().map(|view| monitor::render(view, width)).collect();
        // Home, the text with each line cleared to its end, and below it nothing.
        let (begin, clear, end) =
            if stdout.is_terminal() { ("\x1b[H", "\x1b[K\n", "\x1b[J") } else { ("", "\n", "") };
        write!(stdout, "{begin}{}{end}", shown.join("\n").replace('\n', clear))?;
        stdout.flush()?;
        let over = !views.iter().any(|view| view.live);
        if over || !stdout.is_terminal() || signals.wait(INTERVAL).is_some() {
            return Ok(Exit::Done);
        }
    }
}

/// Writes an event file for TensorBoard.
///
/// # Errors
/// A run that is none, a folder that cannot be written.
pub fn export_metrics(args: &ExportMetricsArgs) -> Result<Exit> {
    let exported = monitor::export(&args.run, &args.tensorboard)?;
    writeln!(
        std::io::stdout(),
        "{}: {} values of {} steps and {} validations\nhint: tensorboard --logdir {}",
        exported.file.display(),
        exported.values,
        exported.steps,
        exported.evals,
        args.tensorboard.display(),
    )?;
    Ok(Exit::Done)
}
