//! Logs: one prefix `[rank r]` on stderr, where rank 0 speaks at info and the others warn, and every
//! rank's own file in the run folder with times and details.

use std::fmt;
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Mutex;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::prelude::*;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::{Layer, Registry};

/// Starts logging of this process to stderr and, from then on, to `file`.
///
/// # Errors
/// The file cannot be opened for appending.
pub(crate) fn start(rank: usize, file: &Path) -> io::Result<()> {
    let file = File::options().create(true).append(true).open(file)?;
    let own =
        tracing_subscriber::fmt::layer().with_ansi(false).with_target(false).with_writer(Mutex::new(file));
    let level = if rank == 0 { LevelFilter::INFO } else { LevelFilter::WARN };
    let terminal = tracing_subscriber::fmt::layer().event_format(Prefixed { rank }).with_writer(io::stderr);
    // Side by side on the registry: joined to one layer, the stricter filter would hold for both.
    let layers =
        Registry::default().with(own.with_filter(LevelFilter::DEBUG)).with(terminal.with_filter(level));
    // A second start in one process keeps the first logger; only tests do that.
    let _ = tracing::subscriber::set_global_default(layers);
    Ok(())
}

/// `[rank 3] warning: message`, info without a word of its own.
struct Prefixed {
    rank: usize,
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
        write!(writer, "[rank {}] {word}", self.rank)?;
        context.format_fields(writer.by_ref(), event)?;
        writeln!(writer)
    }
}
