//! The live page in a real browser. Where there is no Chromium a test says so and passes.

use super::support::{Command, metrics, of_kind, phalanx};
use super::{Watched, web};
use std::path::Path;
use std::time::Duration;

/// What a browser makes of a page: its elements, what its console says, and what it asks whom for.
struct Seen {
    dom: String,
    console: String,
    requests: Vec<String>,
}

/// Opens a page, lets two seconds pass for it, and looks.
fn look(folder: &Path, url: &str) -> Option<Seen> {
    let chromium = web::program("chromium")?;
    let log = folder.join("net.json");
    let done = Command::new(chromium)
        .args(["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--enable-logging=stderr"])
        .args(["--disable-background-networking", "--disable-component-update", "--disable-sync"])
        .args([
            format!("--log-net-log={}", log.display()),
            format!("--user-data-dir={}", folder.join("profile").display()),
        ])
        .args(["--virtual-time-budget=2000", "--dump-dom", url])
        .deadline(Duration::from_secs(90))
        .run();
    let net = std::fs::read_to_string(&log).unwrap_or_default();
    // The browser asks its makers for this and that of its own accord; what the page asks for has it as initiator.
    let events = net.lines().filter_map(|line| serde_json::from_str(line.trim_end_matches(',')).ok());
    let asked = |event: serde_json::Value| {
        let origin = event["params"]["initiator"].as_str()?;
        url.starts_with(origin).then(|| event["params"]["url"].as_str().map(str::to_string))?
    };
    let requests = events.filter_map(asked).collect();
    Some(Seen { dom: done.stdout, console: done.stderr, requests })
}

impl Seen {
    /// The number that a tile of the page stands for, in full.
    fn tile(&self, name: &str) -> Option<f64> {
        let rest = self.dom.split_once(&format!("data-name=\"{name}\" data-value=\""))?.1;
        rest.split_once('"')?.0.parse().ok()
    }

    fn is_quiet_and_asks_only(&self, address: &str) {
        assert!(!self.console.contains("CONSOLE"), "{}", self.console);
        let elsewhere: Vec<&String> =
            self.requests.iter().filter(|url| !url.starts_with(&format!("http://{address}/"))).collect();
        assert!(elsewhere.is_empty(), "{elsewhere:?}");
        assert!(self.requests.iter().any(|url| url.ends_with("/api/runs")), "{:?}", self.requests);
    }
}

mod whole_table {
    use super::*;

    #[test]
    fn the_page_has_the_numbers_of_metrics_jsonl_gets_on_with_the_run_and_asks_nobody_else() {
        let run = Watched::start("page", "--set checkpoint.every_steps=20 --set eval.every_steps=40");
        let folder = run.scratch.join("runs/tiny");
        run.until("a checkpoint", || folder.join("checkpoints/step-00000020").exists().then_some(()));
        run.job.signal_rank(1, "KILL");
        run.targets(1);
        let rank_0 = run.targets(3)[1].1.clone();
        run.until("new steps", || {
            web::sample(&web::get(&rank_0, "/metrics"), "phalanx_step").filter(|step| *step > 60.0)
        });
        let url = format!("http://{rank_0}/");
        let Some(seen) = look(run.scratch.path(), &url) else { return };
        seen.is_quiet_and_asks_only(&rank_0);
        let step = seen.tile("step").unwrap();
        let events = metrics(&folder);
        let event = of_kind(&events, "step").into_iter().rfind(|event| event["step"].as_f64() == Some(step));
        let event = event.unwrap();
        for (name, key) in [
            ("loss", "loss"),
            ("tokens", "tokens"),
            ("MFU", "mfu"),
            ("learning rate", "lr"),
            ("gradient norm", "grad_norm"),
        ] {
            assert_eq!(seen.tile(name), event[key].as_f64(), "{name}");
        }
        assert_eq!(seen.tile("restarts"), Some(1.0));
        assert!(seen.dom.contains("class=\"mark\"") && seen.dom.contains("data-rank=\"1\""), "{}", seen.dom);
        // Later it shows more.
        let later = look(run.scratch.path(), &url).unwrap();
        assert!(later.tile("step").unwrap() > step);
        run.job.signal("TERM");
        run.job.finish().expect_code(3);
    }

    #[test]
    fn a_run_that_is_over_and_another_are_laid_over_each_other_from_their_folders() {
        let first = Watched::start("over", "--set schedule.max_steps=30");
        let folder = first.scratch.join("runs/tiny");
        let scratch = first.scratch;
        first.job.finish().expect_code(0);
        let copy = scratch.join("runs/other");
        std::fs::create_dir_all(&copy).unwrap();
        for name in ["metrics.jsonl", "config.toml", "sample.txt"] {
            std::fs::copy(folder.join(name), copy.join(name)).unwrap();
        }
        let address = crate::prometheus::free_address();
        let mut served = Command::new(phalanx())
            .args(["watch", "runs/tiny", "runs/other", "--listen", &address])
            .current_dir(scratch.path())
            .start();
        served.wait_for("Ctrl-C ends it", 1);
        if let Some(seen) = look(scratch.path(), &format!("http://{address}/")) {
            seen.is_quiet_and_asks_only(&address);
            let events = metrics(&folder);
            let last = of_kind(&events, "step").last().unwrap()["loss"].as_f64();
            assert_eq!((seen.tile("step"), seen.tile("loss")), (Some(30.0), last));
            for text in ["data-run=\"tiny\"", "data-run=\"other\"", "finished", "What other writes"] {
                assert!(seen.dom.contains(text), "{text} is not in\n{}", seen.dom);
            }
        }
        served.signal("TERM");
        served.finish().expect_code(0);
    }
}
