//! What each rank of a run says of itself, asked at the places that `targets.json` lists. Ranks that do not answer
//! at once are left out; nobody waits for them.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::path::Path;
use std::time::{Duration, Instant};

/// Of one rank, and of all.
const PATIENCE: Duration = Duration::from_millis(300);
const PATIENCE_WITH_ALL: Duration = Duration::from_millis(1500);

/// Bytes of an answer.
const MOST_BYTES: u64 = 8 << 20;

/// A rank as it shows itself.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct RankView {
    /// Its number.
    pub rank: u64,
    /// Its machine.
    pub host: String,
    /// Mean seconds of each phase of a step, since it started.
    pub phases: BTreeMap<String, f64>,
    /// The last step, without waiting for others.
    pub step_seconds: Option<f64>,
    /// Memory of its process.
    pub resident_bytes: Option<f64>,
}

/// Asks all ranks of the run in this folder.
pub(crate) fn ask(folder: &Path) -> Vec<RankView> {
    let deadline = Instant::now() + PATIENCE_WITH_ALL;
    let text = std::fs::read_to_string(folder.join("targets.json")).unwrap_or_default();
    let targets: Vec<Value> = serde_json::from_str(&text).unwrap_or_default();
    let one = |target: &Value| {
        let rank = target["labels"]["rank"].as_str()?.parse().ok()?;
        if Instant::now() > deadline {
            return None;
        }
        let (_, text) = get(target["targets"][0].as_str()?, "/metrics", PATIENCE).ok()?;
        let host = target["labels"]["host"].as_str().unwrap_or_default().to_string();
        Some(RankView { rank, host, ..read(&text) })
    };
    targets.iter().filter_map(one).collect()
}

/// Status and body of what is at `path` there.
///
/// # Errors
/// Nobody answers in time, or not in HTTP.
pub(crate) fn get(address: &str, path: &str, patience: Duration) -> std::io::Result<(u16, String)> {
    let wrong = |what: &str| std::io::Error::new(std::io::ErrorKind::InvalidData, what.to_string());
    let to = address.to_socket_addrs()?.next().ok_or_else(|| wrong("no such address"))?;
    let mut stream = TcpStream::connect_timeout(&to, patience)?;
    stream.set_read_timeout(Some(patience))?;
    stream.set_write_timeout(Some(patience))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.take(MOST_BYTES).read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").ok_or_else(|| wrong("no HTTP"))?;
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
    Ok((status.ok_or_else(|| wrong("no HTTP"))?, body.to_string()))
}

/// The few series of Prometheus' text that are shown.
fn read(text: &str) -> RankView {
    let mut view = RankView::default();
    let (mut sums, mut counts) = (BTreeMap::new(), BTreeMap::new());
    for line in text.lines() {
        let Some((series, Ok(value))) =
            line.rsplit_once(' ').map(|(series, value)| (series, value.parse::<f64>()))
        else {
            continue;
        };
        let name = series.split('{').next().unwrap_or_default();
        let phase = || series.split_once("phase=\"")?.1.split_once('"').map(|(phase, _)| phase.to_string());
        match name {
            "phalanx_rank_step_seconds" => view.step_seconds = Some(value),
            "phalanx_memory_resident_bytes" => view.resident_bytes = Some(value),
            "phalanx_step_seconds_sum" => sums.extend(phase().map(|phase| (phase, value))),
            "phalanx_step_seconds_count" => counts.extend(phase().map(|phase| (phase, value))),
            _ => {}
        }
    }
    let mean = |(phase, sum): (String, f64)| {
        let count = *counts.get(&phase)?;
        (count > 0.0).then(|| (phase, sum / count))
    };
    view.phases = sums.into_iter().filter_map(mean).collect();
    view
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Reply, Server};

    const TEXT: &str = "# HELP phalanx_rank_step_seconds x\nphalanx_rank_step_seconds{rank=\"1\"} 0.25\n\
        phalanx_step_seconds_sum{phase=\"data\",rank=\"1\"} 3\nphalanx_step_seconds_count{phase=\"data\",rank=\"1\"} 6\n\
        phalanx_step_seconds_sum{phase=\"reduce\",rank=\"1\"} 0\nphalanx_step_seconds_count{phase=\"reduce\",rank=\"1\"} 0\n";

    #[test]
    fn ranks_that_answer_are_shown_and_others_left_out() {
        let answer = |_: &str| Reply::of("text/plain", TEXT);
        let (server, _) = Server::start("127.0.0.1:0".parse().unwrap(), answer).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let list = serde_json::json!([
            {"targets": ["127.0.0.1:1"], "labels": {"role": "launcher"}},
            {"targets": ["127.0.0.1:1"], "labels": {"rank": "0", "host": "a"}},
            {"targets": [server.address().to_string()], "labels": {"rank": "1", "host": "a"}},
        ]);
        std::fs::write(folder.path().join("targets.json"), list.to_string()).unwrap();
        let ranks = ask(folder.path());
        assert_eq!(ranks.len(), 1, "{ranks:?}");
        assert_eq!((ranks[0].rank, ranks[0].step_seconds, &*ranks[0].host), (1, Some(0.25), "a"));
        assert_eq!(ranks[0].phases, BTreeMap::from([("data".to_string(), 0.5)]));
        assert!(ask(Path::new("nowhere")).is_empty());
    }
}
