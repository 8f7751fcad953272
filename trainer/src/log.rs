//! Logs: one prefix `[rank r]` on stderr, where rank 0 speaks at info and the others warn, and every
//! rank's own file in the run folder with times and details.

use std::fmt;
use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::filter::{LevelFilter, dynamic_filter_fn};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::prelude::*;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::{Layer, Registry};

/// The log of this process, to which joining the other ranks and opening the run folder add what was
/// not known before: the rank, and a file.
#[derive(Debug, Clone, Default)]
pub struct Log {
    rank: Arc<OnceLock<usize>>,
    file: Arc<Mutex<Option<File>>>,
}

impl Log {
    /// Starts logging to stderr.
    pub fn start() -> Log {
        let log = Log::default();
        let file = OwnFile(Arc::clone(&log.file));
        let own = tracing_subscriber::fmt::layer().with_ansi(false).with_target(false);
        let own = own.with_writer(move || file.clone()).with_filter(LevelFilter::DEBUG);
        let rank = Arc::clone(&log.rank);
        let spoken = dynamic_filter_fn(move |event, _| {
            *event.level() <= if rank.get() == Some(&0) { Level::INFO } else { Level::WARN }
        });
        let prefixed = Prefixed { rank: Arc::clone(&log.rank) };
        let terminal = tracing_subscriber::fmt::layer().event_format(prefixed).with_writer(io::stderr);
        // Side by side on the registry: joined to one layer, the stricter filter would hold for both.
        let layers = Registry::default().with(own).with(terminal.with_filter(spoken));
        // A second start in one process keeps the first logger; only tests do that.
        let _ = tracing::subscriber::set_global_default(layers);
        log
    }

    /// Says which rank speaks.
    pub fn joined(&self, rank: usize) {
        let _ = self.rank.set(rank);
    }

    /// From now on everything also goes to the end of this file.
    ///
    /// # Errors
    /// The file cannot be opened for appending.
    pub(crate) fn to_file(&self, path: &Path) -> io::Result<()> {
        let opened = File::options().create(true).append(true).open(path)?;
        *self.file.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(opened);
        Ok(())
    }
}

/// The rank's own file, once there is one.
#[derive(Clone)]
struct OwnFile(Arc<Mutex<Option<File>>>);

impl Write for OwnFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &mut *self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner) {
            Some(file) => file.write(bytes),
            None => Ok(bytes.len()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(()) // a file has no buffer of ours
    }
}

/// `[rank 3] warning: message`, info without a word of its own, no rank before it is known.
struct Prefixed {
    rank: Arc<OnceLock<usize>>,
}

impl<S, N> FormatEvent<S, N> for Prefixed
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let word = match *event.metadata().level() {
            Level::ERROR => "error: ",
            Level::WARN => "warning: ",
            _ => "",
        };
        if let Some(rank) = self.rank.get() {
            write!(writer, "[rank {rank}] ")?;
        }
        write!(writer, "{word}")?;
        context.format_fields(writer.by_ref(), event)?;
        writeln!(writer)
    }
}
