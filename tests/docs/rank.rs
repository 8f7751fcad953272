//! What the documentation claims of the command line of `phalanx-rank`, and of the commands that `phalanx` hands
//! on to it: each parses.

#[path = "pages.rs"]
mod pages;

use crate::Cli;
use clap::Parser;
use configs::HANDED_ON;
use pages::{Page, from_program, pages};

#[test]
fn every_command_of_phalanx_rank_in_the_documentation_parses() {
    let (mut refused, mut count) = (Vec::new(), 0);
    for typed in pages().iter().flat_map(Page::commands) {
        let handed_on = from_program(&typed.words, "phalanx")
            .filter(|words| words.get(1).is_some_and(|name| HANDED_ON.contains(&name.as_str())));
        let Some(words) = from_program(&typed.words, "phalanx-rank").or(handed_on) else { continue };
        count += 1;
        if let Err(error) = Cli::try_parse_from(&words) {
            refused.push(format!("{}: {}\n{error}", typed.place, words.join(" ")));
        }
    }
    assert!(count > 10, "only {count} commands were found");
    assert!(refused.is_empty(), "commands that do not parse:\n{}", refused.join("\n"));
}
