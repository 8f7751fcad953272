//! What the documentation claims of the tree and of the command line of `phalanx`: links lead somewhere, commands
//! parse, targets and presets exist. What `phalanx-rank` takes is checked where its command line is.

#![allow(clippy::unwrap_used)] // a test that cannot read the tree has failed

mod pages;

use clap::Parser;
use launcher::cli::Cli;
use pages::{Page, from_program, pages, root};
use std::collections::BTreeSet;
use std::process::Command;

#[test]
fn every_link_of_the_documentation_leads_to_a_file_and_a_heading() {
    let mut broken = Vec::new();
    for page in pages() {
        let folder = root().join(&page.name).parent().unwrap().to_path_buf();
        for (line, target) in page.links() {
            if target.starts_with("http") {
                continue;
            }
            let (file, heading) = target.split_once('#').unwrap_or((&target, ""));
            let path = if file.is_empty() { root().join(&page.name) } else { folder.join(file) };
            let there = path.exists() && (heading.is_empty() || has_heading(&path, heading));
            broken.extend((!there).then(|| format!("{}:{line}: {target}", page.name)));
        }
    }
    assert!(broken.is_empty(), "links that lead nowhere:\n  {}", broken.join("\n  "));
}

fn has_heading(path: &std::path::Path, heading: &str) -> bool {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    Page { name: String::new(), text }.anchors().iter().any(|anchor| anchor == heading)
}

#[test]
fn every_command_of_phalanx_in_the_documentation_parses() {
    let (mut refused, mut count) = (Vec::new(), 0);
    for typed in pages().iter().flat_map(Page::commands) {
        let Some(words) = from_program(&typed.words, "phalanx") else { continue };
        count += 1;
        if let Err(error) = Cli::try_parse_from(&words)
            && !matches!(error.kind(), clap::error::ErrorKind::DisplayHelp)
        {
            refused.push(format!("{}: {}\n{error}", typed.place, words.join(" ")));
        }
    }
    assert!(count > 60, "only {count} commands were found");
    assert!(refused.is_empty(), "commands that do not parse:\n{}", refused.join("\n"));
}

#[test]
fn every_target_and_every_preset_that_the_documentation_names_exists() {
    let makefile = std::fs::read_to_string(root().join("Makefile")).unwrap();
    let targets: BTreeSet<&str> = makefile
        .lines()
        .filter_map(|line| line.split_once(':').map(|(name, _)| name))
        .filter(|name| !name.is_empty() && name.chars().all(|c| c.is_ascii_lowercase() || c == '-'))
        .collect();
    let mut missing = Vec::new();
    for page in pages() {
        let typed = page.commands().into_iter().map(|typed| typed.words.join(" "));
        let spans = page.text.split('`').skip(1).step_by(2).map(String::from);
        for command in typed.chain(spans) {
            let Some(rest) = command.strip_prefix("make ") else { continue };
            let wrong = rest.split_whitespace().filter(|name| !targets.contains(name));
            missing.extend(wrong.map(|name| format!("{}: make {name}", page.name)));
        }
        for rest in page.text.split("configs/").skip(1) {
            let name: String =
                rest.chars().take_while(|c| c.is_alphanumeric() || "-_./".contains(*c)).collect();
            let there = !name.ends_with(".toml") || root().join("configs").join(&name).exists();
            missing.extend((!there).then(|| format!("{}: configs/{name}", page.name)));
        }
    }
    assert!(missing.is_empty(), "what is named and not there:\n  {}", missing.join("\n  "));
}

#[test]
fn every_page_is_in_the_table_of_contents() {
    let contents = std::fs::read_to_string(root().join("docs/README.md")).unwrap();
    let page = |page: &Page| page.name.strip_prefix("docs/").map(|name| format!("]({name})"));
    let all = pages().iter().filter_map(page).collect::<Vec<_>>();
    let left_out: Vec<&String> =
        all.iter().filter(|link| *link != "](README.md)" && !contents.contains(*link)).collect();
    assert!(left_out.is_empty(), "docs/README.md does not have {left_out:?}");
}

#[test]
fn every_command_has_a_manual_page_and_is_completed_by_each_shell() {
    let folder = tempfile::tempdir().unwrap();
    let run = |arguments: &[&str]| {
        let ended = Command::new(env!("CARGO_BIN_EXE_phalanx")).args(arguments).output().unwrap();
        assert!(ended.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&ended.stderr));
        String::from_utf8(ended.stdout).unwrap()
    };
    run(&["man", folder.path().to_str().unwrap()]);
    for page in
        ["phalanx.1", "phalanx-train.1", "phalanx-data-prepare.1", "phalanx-checkpoint-prove-resume.1"]
    {
        let text = std::fs::read_to_string(folder.path().join(page)).unwrap();
        assert!(text.contains(".SH NAME") && text.contains("phalanx"), "{page}: {text}");
    }
    assert!(run(&["man"]).contains("lockstep"));
    for shell in ["bash", "zsh", "fish"] {
        let script = run(&["completions", shell]);
        for word in ["prove-resume", "oversubscribe"] {
            assert!(script.contains(word), "{shell} does not know {word}");
        }
    }
    // What bash is given is bash.
    let script = folder.path().join("phalanx.bash");
    std::fs::write(&script, run(&["completions", "bash"])).unwrap();
    assert!(Command::new("bash").arg("-n").arg(&script).status().unwrap().success());
}
