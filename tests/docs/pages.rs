//! The documentation as text: its pages, their links and headings, and the commands that they tell people to type.
//! Knows no command line; whoever has one parses them.

#![allow(dead_code)] // each of the two tests that share this needs a part of it
#![allow(clippy::unwrap_used)] // a test that cannot read the tree has failed

use std::path::{Path, PathBuf};

/// A page of the documentation.
pub(crate) struct Page {
    /// Relative to the repository.
    pub(crate) name: String,
    pub(crate) text: String,
}

/// A command of a page, in words as a shell would split it.
pub(crate) struct Typed {
    /// `page:line`.
    pub(crate) place: String,
    pub(crate) words: Vec<String>,
}

pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// README, CONTRIBUTING, CHANGELOG and everything in docs/, sorted.
pub(crate) fn pages() -> Vec<Page> {
    let mut names: Vec<String> = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"].map(String::from).to_vec();
    let entries = std::fs::read_dir(root().join("docs")).unwrap().map(|entry| entry.unwrap().file_name());
    let files = entries.map(|name| name.into_string().unwrap()).filter(|name| name.ends_with(".md"));
    names.extend(files.map(|name| format!("docs/{name}")));
    names.sort();
    let page = |name: String| Page { text: std::fs::read_to_string(root().join(&name)).unwrap(), name };
    names.into_iter().map(page).collect()
}

impl Page {
    /// Lines with their numbers from 1, and whether each is in a block of code.
    pub(crate) fn lines(&self) -> Vec<(usize, bool, &str)> {
        let mut inside = false;
        let mut lines = Vec::new();
        for (number, line) in self.text.lines().enumerate() {
            if line.trim_start().starts_with("```") {
                inside = !inside;
            } else {
                lines.push((number + 1, inside, line));
            }
        }
        lines
    }

    /// Targets of the links and pictures, with their line.
    pub(crate) fn links(&self) -> Vec<(usize, String)> {
        let mut found = Vec::new();
        for (number, _, line) in self.lines().into_iter().filter(|(_, code, _)| !code) {
            let targets = line.split("](").skip(1).filter_map(|rest| rest.split(')').next());
            found.extend(targets.map(|target| (number, target.to_string())));
        }
        found
    }

    /// What a link to each heading says after `#`, as GitHub makes it.
    pub(crate) fn anchors(&self) -> Vec<String> {
        let lines = self.lines().into_iter().filter(|(_, code, line)| !code && line.starts_with('#'));
        lines.map(|(_, _, line)| anchor(line.trim_start_matches('#').trim())).collect()
    }

    /// The commands in its blocks: lines with what goes on after a backslash, without comments, cut where a
    /// shell cuts.
    pub(crate) fn commands(&self) -> Vec<Typed> {
        let mut found = Vec::new();
        let mut begun: Option<(usize, String)> = None;
        for (number, _, line) in self.lines().into_iter().filter(|(_, code, _)| *code) {
            let (first, before) = begun.take().unwrap_or((number, String::new()));
            let all = format!("{before}{}", line.trim());
            if let Some(open) = all.strip_suffix('\\') {
                begun = Some((first, open.to_string()));
                continue;
            }
            let place = format!("{}:{first}", self.name);
            found.extend(commands_of(&all).into_iter().map(|words| Typed { place: place.clone(), words }));
        }
        found
    }
}

fn anchor(heading: &str) -> String {
    let kept = heading.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c));
    kept.map(|c| if c == ' ' { '-' } else { c.to_ascii_lowercase() }).collect()
}

/// The commands of a line: words, quotes taken off, up to a comment, a redirection or the next command.
fn commands_of(line: &str) -> Vec<Vec<String>> {
    let (mut commands, mut words) = (Vec::new(), Vec::new());
    let mut rest = line.chars().peekable();
    loop {
        while rest.next_if(|c| c.is_whitespace()).is_some() {}
        let Some(&first) = rest.peek() else { break };
        if first == '#' {
            break;
        }
        let (mut word, mut quote) = (String::new(), None);
        while let Some(&c) = rest.peek() {
            match quote {
                None if c.is_whitespace() => break,
                None if c == '"' || c == '\'' => quote = Some(c),
                Some(open) if c == open => quote = None,
                _ => word.push(c),
            }
            rest.next();
        }
        match word.as_str() {
            "|" | "&&" | ";" | "&" | "||" => commands.push(std::mem::take(&mut words)),
            _ => words.push(word),
        }
    }
    commands.push(words);
    commands.retain(|words| !words.is_empty());
    for words in &mut commands {
        let redirected = words.iter().position(|word| word.starts_with('>') || word.starts_with('<'));
        words.truncate(redirected.unwrap_or(words.len()));
    }
    commands
}

/// From the word that names `program` on, wherever it lies; what starts it stands before.
pub(crate) fn from_program(words: &[String], program: &str) -> Option<Vec<String>> {
    let at = words.iter().position(|word| word.rsplit('/').next() == Some(program))?;
    let started =
        at == 0 || words[0].ends_with("mpirun") || words[0] == "srun" || words[0] == "scripts/nodes";
    started.then(|| words[at..].to_vec())
}
