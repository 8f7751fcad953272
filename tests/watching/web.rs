//! A web client as small as can be, and what it reads made sense of.

use super::support::{Command, Scratch};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::time::Duration;

/// What is at a path there; empty if nobody answers.
pub(crate) fn get(address: &str, path: &str) -> String {
    let answer = || -> std::io::Result<String> {
        let mut stream = TcpStream::connect(address)?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        write!(stream, "GET {path} HTTP/1.0\r\nHost: {address}\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text.split_once("\r\n\r\n").map(|(_, body)| body.to_string()).unwrap_or_default())
    };
    answer().unwrap_or_default()
}

/// The value of a series, named as it is written.
pub(crate) fn sample(text: &str, series: &str) -> Option<f64> {
    text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' ')?.parse().ok())
}

/// A program on the path, or else a word that a test is skipped.
pub(crate) fn program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|folder| folder.join(name)).find(|file| file.is_file());
    if found.is_none() {
        let _ = writeln!(
            std::io::stderr(),
            "skipped: no {name} here (Debian's prometheus and chromium bring it)"
        );
    }
    found
}

/// Prometheus' own linter has nothing to say of names, units and help texts.
pub(crate) fn promtool_checks(scratch: &Scratch, texts: &[&str]) {
    let Some(promtool) = program("promtool") else { return };
    for text in texts {
        scratch.write("metrics.txt", text);
        let check = format!("{} check metrics < metrics.txt", promtool.display());
        let done = Command::new("sh").args(["-c", &check]).current_dir(scratch.path()).run();
        assert_eq!((done.code, &*done.stdout, &*done.stderr), (Some(0), "", ""), "{text}");
    }
}
