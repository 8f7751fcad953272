//! What the launcher shows to Prometheus: how many ranks are heard of, restarts and what they were for, and
//! what a look at the run folder tells. It goes on when a rank hangs or all of them are gone; and it lists, in
//! `targets.json`, where the ranks' own numbers are.
//!
//! Names, units and labels are in docs/MONITORING.md.

use crate::signals::StopSignals;
use crate::targets::Targets;
use configs::{Heartbeat, Listen};
use monitor::{FolderGauges, Reply, Server, exposition};
use prometheus::core::Collector;
use prometheus::{Gauge, GaugeVec, IntCounter, IntCounterVec, Opts, Registry};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Heartbeats come twice a second; a rank that is silent for longer does not live.
const LIVES: Duration = Duration::from_secs(3);

/// Of a run that fails, its last numbers are served until somebody who comes regularly has come once more, but
/// no longer than this.
const MOST_LINGERING: Duration = Duration::from_secs(60);

/// What can end a start, each counted from 0 so that the first one is seen to be new.
const FAULTS: [&str; 8] = ["dead", "stopped", "hung", "host", "job", "not_finite", "replicas", "error"];

/// The numbers of a launcher.
#[derive(Debug)]
pub struct Gauges {
    shown: Arc<Shown>,
    targets: Mutex<Targets>,
    restarts: IntCounter,
    failures: IntCounterVec,
    failed: GaugeVec,
    ranks: Gauge,
}

/// What is served.
#[derive(Debug)]
struct Shown {
    registry: Registry,
    folder: FolderGauges,
    live: Gauge,
    heartbeat: GaugeVec,
    heard: Mutex<BTreeMap<usize, Instant>>,
    scrapes: Mutex<Scrapes>,
}

/// Who looks, and how often.
#[derive(Debug, Default, Clone, Copy)]
struct Scrapes {
    count: u64,
    last: Option<Instant>,
    interval: Duration,
}

impl Gauges {
    /// Serves them where the run says, and lists the places in the run folder. The strings are for the user:
    /// a run does not fail for want of a port.
    pub fn serve(folder: &Path, run: &str, listen: Listen) -> (Option<Gauges>, Vec<String>) {
        let Some(address) = listen.launcher() else { return (None, Vec::new()) };
        let mut told = Vec::new();
        let gauges = Gauges::start(folder, run, address, &mut told);
        let gauges =
            gauges.map_err(|error| told.push(format!("warning: no metrics are served: {error}"))).ok();
        (gauges, told)
    }

    fn start(
        folder: &Path,
        run: &str,
        address: SocketAddr,
        told: &mut Vec<String>,
    ) -> Result<Gauges, Box<dyn std::error::Error>> {
        let registry = Registry::new();
        let vec = |name: &str, help: &str, label: &str| {
            registered(&registry, GaugeVec::new(Opts::new(name, help), &[label])?)
        };
        let gauge = |name: &str, help: &str| registered(&registry, Gauge::new(name, help)?);
        let restarts = IntCounter::new("phalanx_restarts_total", "Restarts by this launcher.")?;
        let help = "Starts that failed, by what ended them.";
        let failures = IntCounterVec::new(Opts::new("phalanx_failures_total", help), &["fault"])?;
        let (restarts, failures) = (registered(&registry, restarts)?, registered(&registry, failures)?);
        for fault in FAULTS {
            failures.with_label_values(&[fault]);
        }
        let failed = vec("phalanx_run_failed", "1 once the run is given up, by what ended it.", "fault")?;
        let ranks = gauge("phalanx_ranks", "Ranks of this start.")?;
        let shown = Arc::new(Shown {
            folder: FolderGauges::new(folder, &registry)?,
            live: gauge("phalanx_ranks_live", "Ranks that have been heard of in the last 3 s.")?,
            heartbeat: vec(
                "phalanx_heartbeat_timestamp_seconds",
                "When this rank was last heard of; Unix time.",
                "rank",
            )?,
            heard: Mutex::default(),
            scrapes: Mutex::default(),
            registry,
        });
        let served = Arc::clone(&shown);
        let (server, taken) = Server::start(address, move |target| served.answer(target))?;
        if let Some(error) = taken {
            told.push(format!(
                "warning: metrics.listen: {address}: {error}; the launcher's metrics are at {} instead",
                server.address()
            ));
        }
        let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
        let targets = Mutex::new(Targets::new(folder, run, &host, Some(server.address())));
        let gauges = Gauges { shown, targets, restarts, failures, failed, ranks };
        lock(&gauges.targets).write()?;
        Ok(gauges)
    }

    /// A start of so many ranks.
    pub fn started(&self, ranks: usize, is_restart: bool) {
        self.ranks.set(ranks as f64);
        self.restarts.inc_by(u64::from(is_restart));
    }

    /// A rank was heard of. Returns what the user should know.
    pub fn hear(&self, beat: &Heartbeat) -> Option<String> {
        let first = lock(&self.shown.heard).insert(beat.rank, Instant::now()).is_none();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.shown.heartbeat.with_label_values(&[&beat.rank.to_string()]).set(now.as_secs_f64());
        let mut targets = lock(&self.targets);
        if targets.hear(beat) && first {
            return Some(format!(
                "rank {} on {} serves its metrics to its own machine only\nhint: metrics.listen = \"0.0.0.0:9400\" \
                 serves them to all",
                beat.rank, beat.host
            ));
        }
        targets.write().err().map(|error| format!("warning: targets.json cannot be written: {error}"))
    }

    /// A start has ended, by this fault if it failed; and the run with it, if it is given up.
    pub fn ended(&self, fault: Option<&str>, given_up: bool) {
        lock(&self.shown.heard).clear();
        self.shown.heartbeat.reset();
        let mut targets = lock(&self.targets);
        targets.forget_ranks();
        let _ = targets.write(); // told when it was tried first
        if let Some(fault) = fault {
            let fault = FAULTS.into_iter().find(|known| *known == fault).unwrap_or("error");
            self.failures.with_label_values(&[fault]).inc();
            if given_up {
                self.failed.with_label_values(&[fault]).set(1.0);
            }
        }
    }

    /// Waits until who looks regularly has looked once more, so that a run's failure is seen. A signal ends it.
    pub fn linger(&self, signals: &mut StopSignals) {
        let before = *lock(&self.shown.scrapes);
        let Some(last) = before.last else { return };
        let expected = (before.interval * 2).min(MOST_LINGERING);
        while last.elapsed() < expected && lock(&self.shown.scrapes).count == before.count {
            if signals.wait(Duration::from_millis(50)).is_some() {
                return;
            }
        }
        std::thread::sleep(Duration::from_millis(100)); // for the answer to leave
    }
}

impl Shown {
    fn answer(&self, target: &str) -> Reply {
        if target != "/metrics" {
            return Reply::error(404, "there is /metrics");
        }
        self.folder.look();
        let live = lock(&self.heard).values().filter(|heard| heard.elapsed() < LIVES).count();
        self.live.set(live as f64);
        let mut scrapes = lock(&self.scrapes);
        let now = Instant::now();
        scrapes.count += 1;
        scrapes.interval = scrapes.last.map_or(Duration::ZERO, |last| now - last);
        scrapes.last = Some(now);
        drop(scrapes);
        exposition(&[&self.registry])
    }
}

/// What is behind such a lock is set as a whole, so a thread that panicked has left nothing half done.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn registered<C: Collector + Clone + 'static>(registry: &Registry, what: C) -> prometheus::Result<C> {
    registry.register(Box::new(what.clone()))?;
    Ok(what)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(gauges: &Gauges) -> String {
        gauges.shown.answer("/metrics");
        prometheus::TextEncoder::new().encode_to_string(&gauges.shown.registry.gather()).unwrap()
    }

    #[test]
    fn restarts_failures_and_ranks_that_live_are_counted() {
        let runs = tempfile::tempdir().unwrap();
        let folder = runs.path().join("tiny");
        std::fs::create_dir(&folder).unwrap();
        let (gauges, told) = Gauges::serve(&folder, "tiny", Listen::default());
        let gauges = gauges.unwrap();
        assert!(told.is_empty(), "{told:?}");
        gauges.started(2, false);
        let metrics = "127.0.0.1:9401".parse().ok();
        let beat = Heartbeat { rank: 1, host: "elsewhere".into(), metrics, ..Heartbeat::default() };
        assert!(gauges.hear(&beat).unwrap().contains("metrics.listen"));
        assert_eq!(gauges.hear(&beat), None, "it is told once");
        let shown = text(&gauges);
        for line in ["phalanx_ranks 2", "phalanx_ranks_live 1", "phalanx_restarts_total 0"] {
            assert!(shown.lines().any(|one| one == line), "{line} is not in\n{shown}");
        }
        assert!(shown.contains("phalanx_heartbeat_timestamp_seconds{rank=\"1\"} "), "{shown}");
        gauges.ended(Some("dead"), false);
        gauges.started(2, true);
        gauges.ended(Some("not_finite"), true);
        let shown = text(&gauges);
        for line in [
            "phalanx_restarts_total 1",
            "phalanx_failures_total{fault=\"dead\"} 1",
            "phalanx_failures_total{fault=\"hung\"} 0",
            "phalanx_run_failed{fault=\"not_finite\"} 1",
            "phalanx_ranks_live 0",
        ] {
            assert!(shown.lines().any(|one| one == line), "{line} is not in\n{shown}");
        }
        assert!(!shown.contains("phalanx_heartbeat"), "who has ended is not silent");
    }

    #[test]
    fn nothing_is_served_or_listed_where_that_is_turned_off() {
        let folder = tempfile::tempdir().unwrap();
        assert!(Gauges::serve(folder.path(), "tiny", Listen::Off).0.is_none());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
