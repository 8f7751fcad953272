//! What this rank is doing, as a few numbers that the training loop sets as it goes and any thread may
//! look at: the step, the phase, the segment, and a count that grows with each of them.
//! Knows nobody who looks.

use configs::Doing;
use ops::collectives::Activity;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

/// The pulse of a rank. Copies are the same one.
#[derive(Debug, Clone, Default)]
pub struct Pulse(Arc<Cells>);

#[derive(Debug, Default)]
struct Cells {
    progress: AtomicU64,
    step: AtomicU64,
    own_steps: AtomicU64,
    generation: AtomicU64,
    /// The number of a [`Doing`], and above it a segment's index plus one, or 0.
    place: AtomicU64,
    own_ms: AtomicU64,
    /// When it last grew, milliseconds since 1970, to within a heartbeat.
    grew_unix_ms: AtomicU64,
    metrics: OnceLock<SocketAddr>,
    joined: OnceLock<Joined>,
    run: OnceLock<RunNames>,
}

/// What is known once the ranks have joined.
#[derive(Debug, Clone)]
pub(crate) struct Joined {
    pub(crate) rank: usize,
    pub(crate) activity: Activity,
}

/// What is known once the configuration is read.
#[derive(Debug, Clone)]
pub(crate) struct RunNames {
    pub(crate) segments: Vec<String>,
    pub(crate) hang_timeout: Duration,
}

/// What a look at a pulse shows.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Beat {
    pub(crate) progress: u64,
    pub(crate) step: u64,
    pub(crate) own_steps: u64,
    pub(crate) generation: u64,
    pub(crate) doing: Doing,
    pub(crate) segment: Option<String>,
    pub(crate) collective: Option<&'static str>,
    pub(crate) begun: u64,
    pub(crate) own_ms: u64,
    pub(crate) metrics: Option<SocketAddr>,
}

impl Pulse {
    /// The ranks have joined.
    pub fn joined(&self, rank: usize, activity: Activity) {
        // A rank joins once.
        let _ = self.0.joined.set(Joined { rank, activity });
    }

    /// A run begins, with segments of these names.
    pub(crate) fn begin(&self, segments: Vec<String>, hang_timeout_s: u64) {
        let hang_timeout = Duration::from_secs(hang_timeout_s);
        let _ = self.0.run.set(RunNames { segments, hang_timeout }); // a process trains once
    }

    /// The run goes on from `step`, in this start of it.
    pub(crate) fn goes_on(&self, step: u64, generation: u64) {
        self.0.step.store(step, Ordering::Relaxed);
        self.0.generation.store(generation, Ordering::Relaxed);
        self.touch();
    }

    /// An update is done, for which this rank computed so long.
    pub(crate) fn stepped(&self, step: u64, own_seconds: f64) {
        self.0.step.store(step, Ordering::Relaxed);
        self.0.own_steps.fetch_add(1, Ordering::Relaxed);
        self.0.own_ms.store((own_seconds * 1e3) as u64, Ordering::Relaxed);
        self.touch();
    }

    /// Metrics are served here from now on.
    pub(crate) fn serves_at(&self, address: SocketAddr) {
        let _ = self.0.metrics.set(address); // a process trains once
    }

    /// Who looks often saw that it has grown.
    pub(crate) fn grew(&self, unix_ms: u64) {
        self.0.grew_unix_ms.store(unix_ms, Ordering::Relaxed);
    }

    /// When it was last seen to have grown, seconds since 1970.
    pub(crate) fn grew_unix_s(&self) -> f64 {
        self.0.grew_unix_ms.load(Ordering::Relaxed) as f64 / 1e3
    }

    /// A phase begins.
    pub(crate) fn at(&self, doing: Doing) {
        self.enter(doing as u64);
    }

    /// A phase begins, or goes on, in this segment.
    pub(crate) fn on(&self, doing: Doing, segment: usize) {
        self.enter(place(doing, segment));
    }

    /// Something within a phase is done.
    pub(crate) fn touch(&self) {
        self.0.progress.fetch_add(1, Ordering::Relaxed);
    }

    /// Waits for a segment of others, as a part of another phase.
    pub(crate) fn waiting<T>(&self, segment: usize, wait: impl FnOnce() -> T) -> T {
        let before = self.0.place.swap(place(Doing::Reduce, segment), Ordering::Relaxed);
        let outcome = wait();
        self.enter(before);
        outcome
    }

    fn enter(&self, place: u64) {
        self.0.place.store(place, Ordering::Relaxed);
        self.touch();
    }

    /// What is known of the others, once there is something.
    pub(crate) fn who(&self) -> Option<&Joined> {
        self.0.joined.get()
    }

    /// How long nothing may happen, once that is known.
    pub(crate) fn hang_timeout(&self) -> Option<Duration> {
        self.0.run.get().map(|run| run.hang_timeout)
    }

    /// What it shows now.
    pub(crate) fn look(&self) -> Beat {
        let cells = &*self.0;
        let place = cells.place.load(Ordering::Relaxed);
        let activity = cells.joined.get().map(|joined| &joined.activity);
        let index = (place >> 8).checked_sub(1).and_then(|index| usize::try_from(index).ok());
        let segment = index.zip(cells.run.get()).and_then(|(index, run)| run.segments.get(index).cloned());
        Beat {
            // Collectives end in another thread.
            progress: cells.progress.load(Ordering::Relaxed) + activity.map_or(0, Activity::ended),
            step: cells.step.load(Ordering::Relaxed),
            own_steps: cells.own_steps.load(Ordering::Relaxed),
            generation: cells.generation.load(Ordering::Relaxed),
            doing: Doing::from_number((place & 0xff) as u8),
            segment,
            collective: activity.and_then(Activity::under_way),
            begun: activity.map_or(0, Activity::begun),
            own_ms: cells.own_ms.load(Ordering::Relaxed),
            metrics: cells.metrics.get().copied(),
        }
    }
}

fn place(doing: Doing, segment: usize) -> u64 {
    doing as u64 | (segment as u64 + 1) << 8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pulse_shows_where_the_loop_is_and_grows_with_all_that_it_does() {
        let pulse = Pulse::default();
        assert_eq!(pulse.look(), Beat::default());
        pulse.begin(["wte", "wpe", "h.0"].map(String::from).to_vec(), 60);
        pulse.goes_on(20, 3);
        pulse.on(Doing::Backward, 2);
        let beat = pulse.look();
        assert_eq!((beat.step, beat.generation, beat.doing), (20, 3, Doing::Backward));
        assert_eq!(beat.segment.as_deref(), Some("h.0"));
        let within = pulse.waiting(0, || pulse.look());
        assert_eq!((within.doing, within.segment.as_deref()), (Doing::Reduce, Some("wte")));
        assert_eq!((pulse.look().doing, pulse.look().segment.as_deref()), (Doing::Backward, Some("h.0")));
        let before = pulse.look().progress;
        pulse.touch();
        pulse.stepped(21, 0.25);
        let beat = pulse.look();
        assert_eq!((beat.step, beat.own_steps, beat.own_ms, beat.progress), (21, 1, 250, before + 2));
    }

    #[test]
    fn what_others_do_for_a_rank_counts_as_its_progress_and_is_named() {
        let pulse = Pulse::default();
        pulse.joined(1, Activity::default());
        assert_eq!(pulse.look().collective, None);
        assert_eq!(pulse.who().map(|who| who.rank), Some(1));
    }
}
