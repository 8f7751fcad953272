//! The live page: one HTML document that asks for nothing but `api/runs`, and the runs that it shows, from their
//! folders or from others who serve them.

use crate::history::{History, View};
use crate::http::Reply;
use crate::ranks;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// How long another server may take.
const PATIENCE: Duration = Duration::from_secs(5);

const PAGE: &str = include_str!("page.html");

/// What `api/runs` answers.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Runs {
    runs: Vec<View>,
}

/// Runs to be shown, laid over each other if there are several.
#[derive(Debug)]
pub struct Page {
    sources: Vec<Source>,
}

#[derive(Debug)]
enum Source {
    Folder {
        folder: PathBuf,
        history: Box<Mutex<History>>,
    },
    /// Host and port of a server that has such a page.
    Server(String),
}

impl Page {
    /// Of each of these: a run folder, or the `http://host:port` of somebody who shows one.
    pub fn of(sources: impl IntoIterator<Item = String>) -> Page {
        let source = |name: String| match name.strip_prefix("http://") {
            Some(address) => Source::Server(address.split('/').next().unwrap_or_default().to_string()),
            None => Source::folder(Path::new(&name)),
        };
        Page { sources: sources.into_iter().map(source).collect() }
    }

    /// The page and its data; nothing at other paths.
    pub fn answer(&self, target: &str) -> Option<Reply> {
        match target {
            "/" => Some(Reply::of("text/html; charset=utf-8", PAGE)),
            "/api/runs" => {
                let runs = self.look().into_iter().filter_map(Result::ok).collect();
                let text = serde_json::to_string(&Runs { runs }).expect("a view has a JSON form");
                Some(Reply::of("application/json", text))
            }
            _ => None,
        }
    }

    /// All runs as they are now, or why one cannot be shown.
    pub fn look(&self) -> Vec<Result<View, String>> {
        self.sources
            .iter()
            .flat_map(|source| {
                source.look().map_or_else(|why| vec![Err(why)], |views| views.into_iter().map(Ok).collect())
            })
            .collect()
    }
}

impl Source {
    fn folder(folder: &Path) -> Source {
        Source::Folder { folder: folder.to_path_buf(), history: Box::new(Mutex::new(History::of(folder))) }
    }

    fn look(&self) -> Result<Vec<View>, String> {
        match self {
            Source::Folder { folder, history } => {
                let view = history.lock().unwrap_or_else(PoisonError::into_inner).look();
                let mut view = view.map_err(|error| {
                    format!(
                        "{}: {error}\nhint: a run has a folder like runs/demo",
                        folder.join("metrics.jsonl").display()
                    )
                })?;
                if view.live {
                    view.ranks = ranks::ask(folder);
                }
                Ok(vec![view])
            }
            Source::Server(address) => {
                let told = |what: String| {
                    format!(
                        "http://{address}: {what}\nhint: rank 0 of a run serves it; its address is in targets.json"
                    )
                };
                match ranks::get(address, "/api/runs", PATIENCE) {
                    Ok((200, text)) => serde_json::from_str(&text)
                        .map(|Runs { runs }| runs)
                        .map_err(|error| told(error.to_string())),
                    Ok((status, _)) => Err(told(format!("answers {status}"))),
                    Err(error) => Err(told(error.to_string())),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Server;

    #[test]
    fn runs_are_shown_from_folders_and_through_another_server() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("a")).unwrap();
        let line = "{\"kind\":\"step\",\"step\":1,\"loss\":2.5}\n";
        std::fs::write(folder.path().join("a/metrics.jsonl"), line).unwrap();
        let path = folder.path().join("a").display().to_string();
        let first = Page::of([path.clone()]);
        let answer = move |target: &str| first.answer(target).unwrap_or_else(|| Reply::error(404, ""));
        let (server, _) = Server::start("127.0.0.1:0".parse().unwrap(), answer).unwrap();
        let both = Page::of([path, format!("http://{}/", server.address()), "nowhere".to_string()]);
        let seen = both.look();
        assert_eq!(seen.len(), 3);
        for view in &seen[..2] {
            let view = view.as_ref().unwrap();
            assert_eq!((view.name.as_str(), view.newest("loss")), ("a", Some(2.5)));
        }
        assert!(seen[2].as_ref().unwrap_err().contains("hint:"));
        assert!(both.answer("/other").is_none());
    }

    #[test]
    fn the_page_names_no_other_server() {
        for word in ["http://", "https://", "src=", "@import", "url("] {
            let elsewhere = PAGE.replace("http://www.w3.org/2000/svg", "");
            assert!(!elsewhere.contains(word), "{word}");
        }
    }
}
