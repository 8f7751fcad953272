//! The house rules that a machine can check: which crate knows which, headers, unsafe code, lengths,
//! names of tests, that presets, configuration keys and their documentation agree, and the map of the
//! code.
//!
//! Owns no knowledge of what the code does; reads the tree as text, and `cargo metadata`.

#![allow(clippy::unwrap_used)] // a test that cannot read the tree has failed

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Who may depend on whom within the workspace, whatever the kind of dependency.
const EDGES: &[(&str, &[&str])] = &[
    ("configs", &[]),
    ("dataloader", &["configs"]),
    ("monitor", &[]),
    ("ops", &["configs"]),
    ("trainer", &["configs", "dataloader", "monitor", "ops"]),
    ("launcher", &["configs", "dataloader", "monitor"]),
];

/// Who may use what brings a world of its own.
const FENCES: &[(&str, &[&str])] = &[
    ("mpi", &["ops"]),
    ("tch", &["ops", "trainer"]),
    ("torch-sys", &["ops", "trainer"]),
    ("tokio", &["launcher", "trainer"]),
];

/// Where unsafe code may be, folders with a slash at the end.
const UNSAFE: &[&str] = &["ops/", "dataloader/src/mmap.rs"];

/// Lines above which a file splits, or its header says in a sentence with "long" why not.
const LONG: usize = 600;

#[test]
fn every_crate_knows_only_those_that_it_may() {
    for package in packages() {
        let name = package["name"].as_str().unwrap();
        let allowed = EDGES.iter().find(|(crate_name, _)| *crate_name == name);
        let (_, allowed) = allowed.unwrap_or_else(|| panic!("{name} is new: give it its edges in EDGES"));
        for dependency in dependencies(&package) {
            let inside = EDGES.iter().any(|(crate_name, _)| *crate_name == dependency);
            assert!(!inside || allowed.contains(&dependency.as_str()), "{name} may not know {dependency}");
        }
    }
}

#[test]
fn torch_mpi_and_tokio_stay_behind_their_fences() {
    for package in packages() {
        let name = package["name"].as_str().unwrap();
        for dependency in dependencies(&package) {
            let fence = FENCES.iter().find(|(fenced, _)| *fenced == dependency);
            let Some((_, allowed)) = fence else { continue };
            assert!(allowed.contains(&name), "{name} may not use {dependency}; {allowed:?} may");
        }
    }
}

#[test]
fn every_source_file_opens_with_what_it_owns() {
    let bare = sources().filter(|file| !file.text.starts_with("//! "));
    assert_none("files that do not open with a //! header", bare.map(|file| file.name));
}

#[test]
fn a_long_file_says_why_it_is_long() {
    let silent = sources().filter(|file| {
        let mut header = file.text.lines().take_while(|line| line.starts_with("//!"));
        file.text.lines().count() > LONG && !header.any(|line| line.to_lowercase().contains("long"))
    });
    assert_none("files over 600 lines whose header does not say why", silent.map(|file| file.name));
}

#[test]
fn no_test_is_ignored() {
    let attribute = ["#[", "ignore"].concat();
    assert_none("ignored tests", places(&[&attribute], |_| true));
}

#[test]
fn every_test_is_named_by_a_sentence() {
    let mut words = Vec::new();
    for file in sources() {
        let mut lines = file.text.lines();
        while let Some(line) = lines.next() {
            if line.trim() != "#[test]" {
                continue;
            }
            let function = lines.by_ref().find_map(|line| line.trim().strip_prefix("fn "));
            let name = function.unwrap_or_default().split('(').next().unwrap_or_default();
            if name.split('_').count() < 3 {
                words.push(format!("{}: {name}", file.name));
            }
        }
    }
    assert_none("tests whose name claims nothing", words);
}

#[test]
fn unsafe_code_stays_where_it_may_be() {
    let allowed = |name: &str| {
        UNSAFE.iter().any(|place| name == *place || place.ends_with('/') && name.starts_with(place))
    };
    let kinds = ["{", "fn", "impl", "extern", "trait"].map(|what| ["unsafe", what].join(" "));
    let kinds: Vec<&str> = kinds.iter().map(String::as_str).collect();
    assert_none("unsafe code", places(&kinds, |name| !allowed(name)));
}

#[test]
fn every_unsafe_block_says_who_meets_its_obligations() {
    let block = ["unsafe", "{"].join(" ");
    let mut silent = Vec::new();
    for file in sources() {
        let lines: Vec<&str> = file.text.lines().collect();
        for (number, line) in lines.iter().enumerate() {
            if !code(line).contains(&block) {
                continue;
            }
            // The comment stands above the statement, which may have begun some lines before.
            let above = &lines[number.saturating_sub(12)..=number];
            if !above.iter().any(|line| line.contains("SAFETY:")) {
                silent.push(format!("{}:{}", file.name, number + 1));
            }
        }
    }
    assert_none("unsafe blocks without a SAFETY comment", silent);
}

#[test]
fn no_file_names_a_developers_own_machine() {
    let homes = ["/home/", "/root/", "/Users/", "/work/"].map(|folder| {
        // As the start of a path, not in the middle of one.
        ["\"", " ", "=", "`", "("].map(|before| [before, folder].concat())
    });
    let homes: Vec<&str> = homes.iter().flatten().map(String::as_str).collect();
    let mut told = Vec::new();
    for file in files(&["rs", "toml", "md", "py", "sh", "yml", "json", ""]) {
        let lines = file.text.lines().enumerate();
        let hits = lines.filter(|(_, line)| homes.iter().any(|home| line.contains(home)));
        told.extend(hits.map(|(number, _)| format!("{}:{}", file.name, number + 1)));
    }
    assert_none("paths of one machine", told.into_iter().filter(|place| !place.starts_with("tests/tidy/")));
}

#[test]
fn every_preset_can_be_used() {
    for preset in presets() {
        let loaded = configs::load(&preset, &[], &|_| Ok(257));
        assert!(loaded.is_ok(), "{}", loaded.unwrap_err());
    }
}

#[test]
fn every_task_file_can_be_used() {
    for file in task_files() {
        let loaded = configs::load_task(&file, &[]);
        assert!(loaded.is_ok(), "{}", loaded.unwrap_err());
    }
}

#[test]
fn every_suite_can_be_used() {
    for file in suites() {
        let loaded = configs::load_suite(&file);
        assert!(loaded.is_ok(), "{}", loaded.unwrap_err());
    }
}

#[test]
fn every_key_of_a_suite_is_set_by_one_and_documented_and_no_other_is() {
    let mut set = BTreeSet::new();
    for file in suites() {
        let table: toml::Table = std::fs::read_to_string(file).unwrap().parse().unwrap();
        let tasks = table["task"].as_array().unwrap().iter().map(|task| ("task", task));
        for (section, values) in tasks.chain([("suite", &table["suite"])]) {
            set.extend(values.as_table().unwrap().keys().map(|key| format!("{section}.{key}")));
        }
    }
    let text = std::fs::read_to_string(root().join("docs/EVALUATION.md")).unwrap();
    let is_of_suite = |span: &String| span.starts_with("suite.") || span.starts_with("task.");
    let documented: BTreeSet<String> =
        code_spans(&text).filter(|span| is_key(span) && is_of_suite(span)).collect();
    let exist: BTreeSet<String> = keys_of_suites().into_iter().collect();
    assert_none("keys that no file in configs/suites/ sets", exist.difference(&set).cloned());
    assert_none("keys that docs/EVALUATION.md does not have", exist.difference(&documented).cloned());
    assert_none("keys in docs/EVALUATION.md that do not exist", documented.difference(&exist).cloned());
}

#[test]
fn every_key_that_exists_is_set_by_a_preset() {
    let mut set = BTreeSet::new();
    for preset in presets().chain(task_files()) {
        let table: toml::Table = std::fs::read_to_string(preset).unwrap().parse().unwrap();
        for (section, keys) in table.iter().filter_map(|(name, value)| Some((name, value.as_table()?))) {
            set.extend(keys.keys().map(|key| format!("{section}.{key}")));
        }
    }
    let unset: Vec<String> = keys_that_exist().into_iter().filter(|key| !set.contains(key)).collect();
    assert_none("keys that no file in configs/ sets", unset);
}

#[test]
fn every_key_is_documented_and_no_other_is() {
    let text = std::fs::read_to_string(root().join("docs/CONFIGURATION.md")).unwrap();
    let documented: BTreeSet<String> = code_spans(&text).filter(|span| is_key(span)).collect();
    let exist: BTreeSet<String> = keys_that_exist().into_iter().collect();
    assert_none("keys that docs/CONFIGURATION.md does not have", exist.difference(&documented).cloned());
    assert_none("keys in docs/CONFIGURATION.md that do not exist", documented.difference(&exist).cloned());
}

#[test]
fn the_map_of_the_code_has_every_file() {
    let is_source = |name: &str| name.contains("/src/") || name.contains("/csrc/");
    let there: BTreeSet<String> =
        files(&["rs", "cpp", "h"]).into_iter().map(|file| file.name).filter(|name| is_source(name)).collect();
    let text = std::fs::read_to_string(root().join("docs/ARCHITECTURE.md")).unwrap();
    let mapped: BTreeSet<String> = code_spans(&text).filter(|span| is_source(span)).collect();
    assert_none("files that docs/ARCHITECTURE.md does not have", there.difference(&mapped).cloned());
    assert_none("files in docs/ARCHITECTURE.md that do not exist", mapped.difference(&there).cloned());
}

/// What stands between single backticks in Markdown, fenced blocks left out.
fn code_spans(markdown: &str) -> impl Iterator<Item = String> {
    let fenced = markdown.split("```").step_by(2);
    fenced.flat_map(|text| text.split('`').skip(1).step_by(2)).map(str::to_string)
}

/// Whether a word has the form `section.key`.
fn is_key(word: &str) -> bool {
    let name = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_lowercase() || b == b'_');
    word.split_once('.').is_some_and(|(section, key)| name(section) && name(key))
}

/// Asks for what does not exist: the refusal lists what does.
fn keys_that_exist() -> Vec<String> {
    let preset = presets().next().expect("configs/ has presets");
    let listed = |path: &str| -> Vec<String> {
        let refusal = configs::load(&preset, &[format!("{path}=0")], &|_| Ok(257)).unwrap_err().to_string();
        let (_, list) = refusal.split_once("there are ").unwrap_or_else(|| panic!("no list in: {refusal}"));
        list.trim().split(", ").map(str::to_string).collect()
    };
    let sections = listed("?.?");
    sections
        .iter()
        .flat_map(|name| listed(&format!("{name}.?")).into_iter().map(move |key| format!("{name}.{key}")))
        .collect()
}

/// The same of suites.
fn keys_of_suites() -> Vec<String> {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("suite.toml");
    let listed = |text: &str, section: &str| -> Vec<String> {
        std::fs::write(&file, text).unwrap();
        let refusal = configs::load_suite(&file).unwrap_err().to_string();
        let (_, list) = refusal.split_once("there are ").unwrap_or_else(|| panic!("no list in: {refusal}"));
        list.trim().split(", ").map(|key| format!("{section}.{key}")).collect()
    };
    [listed("[suite]\n\"?\" = 0\n", "suite"), listed("[[task]]\n\"?\" = 0\n", "task")].concat()
}

struct File {
    /// Relative to the repository, with slashes.
    name: String,
    text: String,
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate is a folder of the repository")
}

fn presets() -> impl Iterator<Item = PathBuf> {
    toml_files("configs")
}

fn task_files() -> impl Iterator<Item = PathBuf> {
    toml_files("configs/tasks")
}

fn suites() -> impl Iterator<Item = PathBuf> {
    toml_files("configs/suites")
}

fn toml_files(folder: &str) -> impl Iterator<Item = PathBuf> + use<> {
    let mut presets: Vec<PathBuf> = std::fs::read_dir(root().join(folder))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| {
            path.extension().is_some_and(|ending| ending == "toml") && !path.ends_with("Cargo.toml")
        })
        .collect();
    presets.sort();
    presets.into_iter()
}

fn sources() -> impl Iterator<Item = File> {
    files(&["rs"]).into_iter()
}

/// Files of the repository with one of these endings, sorted; nothing that is built or downloaded.
fn files(endings: &[&str]) -> Vec<File> {
    let mut found = Vec::new();
    let mut folders = vec![root().to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.strip_prefix(root()).unwrap().to_string_lossy().into_owned();
            if path.is_symlink() || ["target", ".git", ".local", "runs", "data"].contains(&name.as_str()) {
                continue;
            }
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let ending = path.extension().unwrap_or_default().to_string_lossy().into_owned();
            if endings.contains(&ending.as_str())
                && let Ok(text) = std::fs::read_to_string(&path)
            {
                found.push(File { name, text });
            }
        }
    }
    found.sort_by(|a, b| a.name.cmp(&b.name));
    found
}

/// A line without its comment. Strings are not understood: a test here that needs to name what it
/// looks for puts it together from parts.
fn code(line: &str) -> &str {
    line.split("//").next().unwrap_or_default()
}

/// `file:line` of each of `words` in the code of the files that `looked_at` chooses.
fn places(words: &[&str], looked_at: impl Fn(&str) -> bool) -> Vec<String> {
    let mut found = Vec::new();
    for file in sources().filter(|file| looked_at(&file.name)) {
        for (number, line) in file.text.lines().enumerate() {
            if words.iter().any(|word| code(line).contains(word)) {
                found.push(format!("{}:{}", file.name, number + 1));
            }
        }
    }
    found
}

fn assert_none(what: &str, found: impl IntoIterator<Item = String>) {
    let found: Vec<String> = found.into_iter().collect();
    assert!(found.is_empty(), "{what}:\n  {}", found.join("\n  "));
}

fn packages() -> Vec<serde_json::Value> {
    let cargo = std::env::var_os("CARGO").unwrap_or("cargo".into());
    let output = Command::new(cargo)
        .args(["metadata", "--no-deps", "--offline", "--format-version", "1"])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    metadata["packages"].as_array().unwrap().clone()
}

fn dependencies(package: &serde_json::Value) -> Vec<String> {
    let listed = package["dependencies"].as_array().unwrap();
    listed.iter().map(|dependency| dependency["name"].as_str().unwrap().to_string()).collect()
}
