//! A real Prometheus with our files, shortened so that what takes minutes there takes seconds here: what it
//! collects of a real run, and which alert each fault raises. Where there is none a test says so and passes.

use super::rules::ours;
use super::support::{Command, Running};
use super::{Watched, web};
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// What takes minutes in our files, and what it is here.
const SHORTER: [(&str, &str); 13] = [
    ("interval: 5s", "interval: 1s"),
    ("timeout: 4s", "timeout: 1s"),
    ("for: 5m", "for: 5s"),
    ("for: 1m", "for: 6s"),
    ("for: 30s", "for: 3s"),
    ("[5m]", "[10s]"),
    ("[2m]", "[5s]"),
    ("[1h]", "[60s]"),
    ("age_seconds > 15", "age_seconds > 3"),
    ("age_seconds > 10", "age_seconds > 2"),
    ("age_seconds > 5", "age_seconds > 2"),
    ("min > 30", "min > 5"),
    ("max > 7200", "max > 10"),
];

pub(crate) struct Prometheus {
    _server: Running,
    address: String,
}

impl Prometheus {
    /// One that collects what the run lists; none where it is not installed.
    pub(crate) fn start(run: &Watched) -> Option<Prometheus> {
        let program = web::program("prometheus")?;
        for name in ["prometheus.yml", "rules/recording.yml", "rules/alerts.yml"] {
            let text = std::fs::read_to_string(ours(name)).unwrap();
            let text = SHORTER.iter().fold(text, |text, (long, short)| text.replace(long, short));
            run.scratch.write(&format!("configs/monitoring/{name}"), text);
        }
        let address = free_address();
        let server = Command::new(program)
            .args(["--config.file=configs/monitoring/prometheus.yml", "--storage.tsdb.path=tsdb"])
            .args([format!("--web.listen-address={address}")])
            .current_dir(run.scratch.path())
            .deadline(Duration::from_secs(400))
            .start();
        Some(Prometheus { _server: server, address })
    }

    /// The series of an expression, each with its labels and value.
    pub(crate) fn query(&self, expression: &str) -> Vec<serde_json::Value> {
        let encoded: String = expression.bytes().map(|byte| format!("%{byte:02X}")).collect();
        let answer = web::get(&self.address, &format!("/api/v1/query?query={encoded}"));
        let answer: serde_json::Value = serde_json::from_str(&answer).unwrap_or_default();
        answer["data"]["result"].as_array().cloned().unwrap_or_default()
    }

    /// Names of the alerts that have fired so far.
    fn fired(&self) -> BTreeSet<String> {
        let seen = self.query("max by (alertname) (max_over_time(ALERTS{alertstate=\"firing\"}[10m]))");
        seen.iter().map(|one| one["metric"]["alertname"].as_str().unwrap().to_string()).collect()
    }

    /// Waits until `alert` fires, and as long again; no other may.
    fn only_fires(&self, run: &Watched, alert: &str) {
        let began = Instant::now();
        run.until(alert, || self.fired().contains(alert).then_some(()));
        std::thread::sleep(began.elapsed().max(Duration::from_secs(8)));
        assert_eq!(self.fired(), BTreeSet::from([alert.to_string()]), "{}", run.job.output());
    }
}

/// An address that is free now.
pub(crate) fn free_address() -> String {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string()
}

/// A run and a Prometheus that has seen it train.
fn watched(name: &str, arguments: &str) -> Option<(Watched, Prometheus)> {
    let run = Watched::start(
        name,
        &format!("--set eval.every_steps=50 --set checkpoint.every_steps=50 {arguments}"),
    );
    let prometheus = Prometheus::start(&run)?;
    run.until("a step in Prometheus", || (!prometheus.query("phalanx_step > 0").is_empty()).then_some(()));
    Some((run, prometheus))
}

/// Lets the run end well.
fn stop(run: Watched) {
    run.job.signal("TERM");
    run.job.finish().expect_code(3);
}

mod whole_table {
    use super::*;

    /// The expressions of the dashboard's panels, for all runs and ranks; those of GPUs have none here.
    fn panels() -> Vec<(String, String)> {
        let text = std::fs::read_to_string(ours("dashboard.json")).unwrap();
        let dashboard: serde_json::Value = serde_json::from_str(&text).unwrap();
        let mut found = Vec::new();
        for panel in dashboard["panels"].as_array().unwrap() {
            for target in panel["targets"].as_array().into_iter().flatten() {
                let expression =
                    target["expr"].as_str().unwrap().replace("$run", ".*").replace("$rank", ".*");
                if expression.starts_with("phalanx_gpu_") {
                    continue;
                }
                found.push((panel["title"].as_str().unwrap().to_string(), expression));
            }
        }
        assert!(found.len() > 25, "{}", found.len());
        found
    }

    #[test]
    fn a_real_prometheus_finds_all_targets_up_and_data_for_every_rule_and_panel() {
        let Some((run, prometheus)) = watched("collect", "") else { return };
        let up = run.until("three targets", || Some(prometheus.query("up")).filter(|up| up.len() == 3));
        assert!(up.iter().all(|one| one["value"][1] == "1"), "{up:?}");
        let rules = std::fs::read_to_string(ours("rules/recording.yml")).unwrap();
        let records = rules.lines().filter_map(|line| line.trim().strip_prefix("- record: "));
        let records = records.map(|name| (name.to_string(), name.to_string()));
        for (name, expression) in records.chain(panels()) {
            run.until(&format!("{name}: {expression}"), || {
                (!prometheus.query(&expression).is_empty()).then_some(())
            });
        }
        let ranks: BTreeSet<String> = prometheus
            .query("phalanx_rank_step_seconds")
            .iter()
            .map(|one| one["metric"]["rank"].as_str().unwrap().to_string())
            .collect();
        assert_eq!(ranks, BTreeSet::from(["0".to_string(), "1".to_string()]));
        assert_eq!(prometheus.fired(), BTreeSet::new());
        stop(run);
    }

    #[test]
    fn a_rank_that_is_stopped_is_silent_and_nothing_else_is_said() {
        let Some((run, prometheus)) = watched("stopped", "") else { return };
        run.job.signal_rank(1, "STOP");
        prometheus.only_fires(&run, "PhalanxRankSilent");
        let who = prometheus.query("ALERTS{alertname=\"PhalanxRankSilent\",alertstate=\"firing\"}");
        assert_eq!(who[0]["metric"]["rank"], "1", "{who:?}");
        run.job.signal_rank(1, "CONT");
        stop(run);
    }

    #[test]
    fn a_slow_rank_is_named_as_the_straggler() {
        let Some((run, prometheus)) = watched("slow", "--inject slow@ms=60,rank=1 --allow-faults") else {
            return;
        };
        prometheus.only_fires(&run, "PhalanxStraggler");
        let who = prometheus.query("ALERTS{alertname=\"PhalanxStraggler\",alertstate=\"firing\"}");
        assert_eq!(who[0]["metric"]["rank"], "1", "{who:?}");
        stop(run);
    }

    #[test]
    fn a_loss_that_is_no_number_is_told_after_the_run_has_ended() {
        // Late enough to have been looked at before.
        let Some((run, prometheus)) = watched("nan", "--inject nan@step=800,rank=1 --allow-faults") else {
            return;
        };
        prometheus.only_fires(&run, "PhalanxLossNotFinite");
        run.job.finish().expect_code(2);
    }

    #[test]
    fn without_checkpoints_the_newest_grows_old() {
        let Some((run, prometheus)) = watched("old", "--set checkpoint.every_steps=0") else { return };
        prometheus.only_fires(&run, "PhalanxCheckpointOld");
        stop(run);
    }

    #[test]
    fn a_disk_that_is_full_is_told_and_not_the_checkpoint_that_follows_from_it() {
        let scratch = super::super::Scratch::new("disk");
        let disk = scratch.join("disk");
        std::fs::create_dir(&disk).unwrap();
        let mounted =
            Command::new("mount").args(["-t", "tmpfs", "-o", "size=16m", "none"]).args([&disk]).run();
        if mounted.code != Some(0) {
            use std::io::Write;
            let _ = writeln!(
                std::io::stderr(),
                "skipped: no file system can be mounted here ({})",
                mounted.stderr
            );
            return;
        }
        let _mount = Mount(disk.clone());
        let arguments = format!("--set run.dir={}/runs/tiny --set checkpoint.every_steps=0", disk.display());
        let Some(run) = web::program("prometheus").map(|_| Watched::start("full", &arguments)) else {
            return;
        };
        // Prometheus looks where the list is.
        let list = disk.join("runs/tiny/targets.json");
        run.until("the list", || list.exists().then_some(()));
        std::fs::create_dir_all(run.scratch.join("runs")).unwrap();
        std::os::unix::fs::symlink(disk.join("runs/.targets"), run.scratch.join("runs/.targets")).unwrap();
        let prometheus = Prometheus::start(&run).expect("it is installed");
        run.until("a step", || (!prometheus.query("phalanx_step > 0").is_empty()).then_some(()));
        std::fs::write(disk.join("ballast"), vec![7; 15_600 << 10]).unwrap();
        prometheus.only_fires(&run, "PhalanxDiskNearlyFull");
        drop(run); // its end cannot be saved, so it has none that is good
    }

    struct Mount(PathBuf);

    impl Drop for Mount {
        fn drop(&mut self) {
            let _ = Command::new("umount").args(["-l"]).args([&self.0]).run();
        }
    }
}
