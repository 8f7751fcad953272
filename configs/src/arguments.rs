//! What the commands take that `phalanx` hands on to `phalanx-rank`, as the one tells the other: for completions and
//! manual pages. Knows neither command line nor shell.

use serde::{Deserialize, Serialize};

/// The commands.
pub const HANDED_ON: [&str; 4] = ["predict", "generate", "export", "import"];

/// A command and its arguments.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HandedOnCommand {
    /// One of [`HANDED_ON`].
    pub name: String,
    /// In the order of its help.
    pub arguments: Vec<HandedOnArgument>,
}

/// An argument: a flag where it has a long or a short form, else told by its place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HandedOnArgument {
    /// Its name within the command.
    pub name: String,
    /// `--LONG`.
    pub long: Option<String>,
    /// `-S`.
    pub short: Option<char>,
    /// What stands for its value in the help; none where it takes none.
    pub value: Option<String>,
    /// The values that it may have, where these are a few.
    pub values: Vec<String>,
    /// Whether it has to be given.
    pub required: bool,
    /// What it is for.
    pub help: String,
}
