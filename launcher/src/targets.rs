//! `targets.json` in the run folder: where the launcher and each rank serve metrics, in the form that
//! Prometheus reads by itself (`file_sd_configs`), rewritten whenever that changes. Prometheus takes a pattern
//! for a file but not for a folder, so while a run goes on a link in `.targets`, beside the run folders, leads to
//! its list.
//! Knows addresses and names, not what is served there.

use configs::Heartbeat;
use serde::Serialize;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

/// The places of a run, and the file that lists them. Emptied when dropped: who has ended is not missing.
#[derive(Debug)]
pub struct Targets {
    path: PathBuf,
    /// `runs/.targets/NAME.json`.
    link: Option<PathBuf>,
    run: String,
    /// This machine, as it calls itself.
    host: String,
    launcher: Option<SocketAddr>,
    /// By rank, with its machine.
    ranks: BTreeMap<usize, (String, SocketAddr)>,
    written: String,
}

/// One element of the list.
#[derive(Debug, Serialize)]
struct Target<'a> {
    targets: [String; 1],
    labels: BTreeMap<&'static str, &'a str>,
}

impl Targets {
    /// Of the run of this name, with no ranks yet.
    pub fn new(folder: &Path, run: &str, host: &str, launcher: Option<SocketAddr>) -> Targets {
        let (run, host) = (run.to_string(), host.to_string());
        let path = folder.join("targets.json");
        let link = link_to(folder).ok();
        Targets { path, link, run, host, launcher, ranks: BTreeMap::new(), written: String::new() }
    }

    /// What a rank says of itself. Whether its place is one that nobody here can reach: the loopback of
    /// another machine.
    pub fn hear(&mut self, beat: &Heartbeat) -> bool {
        let Some(address) = beat.metrics else { return false };
        if address.ip().is_loopback() && beat.host != self.host {
            return true;
        }
        self.ranks.insert(beat.rank, (beat.host.clone(), address));
        false
    }

    /// The ranks have ended.
    pub fn forget_ranks(&mut self) {
        self.ranks.clear();
    }

    /// Replaces the file as a whole, if there is something new.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&mut self) -> std::io::Result<()> {
        let text = self.text();
        if text == self.written {
            return Ok(());
        }
        let temporary = self.path.with_extension("json.tmp");
        std::fs::write(&temporary, &text)?;
        std::fs::rename(&temporary, &self.path)?;
        self.written = text;
        Ok(())
    }

    fn text(&self) -> String {
        let launcher = self.launcher.map(|address| Target {
            targets: [reached_at(&self.host, address)],
            labels: [("run", &*self.run), ("role", "launcher"), ("host", &*self.host)].into(),
        });
        let numbers: Vec<String> = self.ranks.keys().map(usize::to_string).collect();
        let ranks = self.ranks.values().zip(&numbers).map(|((host, address), rank)| Target {
            targets: [reached_at(host, *address)],
            labels: [("run", &*self.run), ("role", "rank"), ("rank", rank), ("host", host)].into(),
        });
        let all: Vec<Target<'_>> = launcher.into_iter().chain(ranks).collect();
        serde_json::to_string_pretty(&all).expect("strings have a JSON form") + "\n"
    }
}

impl Drop for Targets {
    fn drop(&mut self) {
        self.launcher = None;
        self.ranks.clear();
        let _ = self.write(); // what is left there then points at nothing
        if let Some(link) = &self.link {
            let _ = std::fs::remove_file(link);
            let _ = link.parent().map(std::fs::remove_dir); // it stays while another run has a link in it
        }
    }
}

/// Makes the link; one of an earlier start is replaced.
fn link_to(run: &Path) -> std::io::Result<PathBuf> {
    let run = std::fs::canonicalize(run)?;
    let (Some(runs), Some(name)) = (run.parent(), run.file_name()) else {
        return Err(std::io::ErrorKind::NotFound.into());
    };
    let folder = runs.join(".targets");
    let link = folder.join(format!("{}.json", name.to_string_lossy()));
    let make = || {
        std::fs::create_dir_all(&folder)?;
        let _ = std::fs::remove_file(&link);
        std::os::unix::fs::symlink(Path::new("..").join(name).join("targets.json"), &link)
    };
    make().or_else(|_| make())?; // a run that ends just now may take the empty folder away in between
    Ok(link)
}

/// Who listens everywhere is found by the name of the machine.
fn reached_at(host: &str, address: SocketAddr) -> String {
    if address.ip().is_unspecified() { format!("{host}:{}", address.port()) } else { address.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn beat(rank: usize, host: &str, metrics: &str) -> Heartbeat {
        Heartbeat { rank, host: host.into(), metrics: metrics.parse().ok(), ..Heartbeat::default() }
    }

    #[test]
    fn targets_are_listed_with_their_rank_and_follow_it_from_start_to_start() {
        let runs = tempfile::tempdir().unwrap();
        let (folder, link) = (runs.path().join("tiny"), runs.path().join(".targets/tiny.json"));
        std::fs::create_dir(&folder).unwrap();
        let read = |file: &Path| -> serde_json::Value {
            serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap()
        };
        let mut targets = Targets::new(&folder, "tiny", "a", "127.0.0.1:9400".parse().ok());
        assert!(!targets.hear(&beat(1, "a", "127.0.0.1:9402")) && !targets.hear(&beat(0, "a", "")));
        assert!(!targets.hear(&beat(2, "b", "0.0.0.0:9401")));
        assert!(targets.hear(&beat(3, "b", "127.0.0.1:9402")), "out of reach");
        targets.write().unwrap();
        let list = read(&link);
        assert_eq!(list.as_array().unwrap().len(), 3, "{list}");
        assert_eq!(list[0]["labels"]["role"], "launcher");
        assert_eq!(list[1]["targets"][0], "127.0.0.1:9402");
        assert_eq!((&list[1]["labels"]["rank"], &list[1]["labels"]["run"]), (&"1".into(), &"tiny".into()));
        assert_eq!((&list[2]["targets"][0], &list[2]["labels"]["host"]), (&"b:9401".into(), &"b".into()));
        targets.forget_ranks();
        targets.hear(&beat(1, "a", "127.0.0.1:40001"));
        targets.write().unwrap();
        assert_eq!(read(&link)[1]["targets"][0], "127.0.0.1:40001");
        drop(targets);
        assert_eq!(read(&folder.join("targets.json")), serde_json::json!([]));
        assert!(!runs.path().join(".targets").exists());
        assert_eq!(std::fs::read_dir(folder).unwrap().count(), 1, "nothing else is left");
    }
}
