//! What the commands take that `phalanx` hands on to this program, read from the definition that parses them.
//! Knows no command.

use clap::{Arg, Command};
use configs::{HANDED_ON, HandedOnArgument, HandedOnCommand};

/// The commands of `cli` that are handed on, with their arguments.
///
/// # Panics
/// `cli` has not all of them.
pub fn handed_on(cli: &Command) -> Vec<HandedOnCommand> {
    let commands = HANDED_ON.map(|name| {
        let command = cli.find_subcommand(name).expect("what is handed on is a command of phalanx-rank");
        let arguments = command.get_arguments().filter(|arg| !arg.is_hide_set()).map(described);
        HandedOnCommand { name: name.into(), arguments: arguments.collect() }
    });
    commands.into()
}

fn described(arg: &Arg) -> HandedOnArgument {
    let takes_value = arg.get_action().takes_values();
    let value = || match arg.get_value_names() {
        Some([name, ..]) => name.to_string(),
        _ => arg.get_id().as_str().to_uppercase(),
    };
    let possible = arg.get_possible_values();
    HandedOnArgument {
        name: arg.get_id().to_string(),
        long: arg.get_long().map(Into::into),
        short: arg.get_short(),
        value: takes_value.then(value),
        values: possible.iter().filter(|_| takes_value).map(|value| value.get_name().into()).collect(),
        required: arg.is_required_set(),
        help: arg.get_help().map(ToString::to_string).unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_values_and_places_are_told_as_they_are_parsed() {
        let what = || {
            [
                Arg::new("run").required(true).help("The run."),
                Arg::new("format").long("format").value_name("FORM").value_parser(["hf-gpt2", "llmc"]),
                Arg::new("greedy").long("greedy").short('g').action(clap::ArgAction::SetTrue),
            ]
        };
        let cli = Command::new("rank").subcommands(HANDED_ON.map(|name| Command::new(name).args(what())));
        let told = handed_on(&cli).swap_remove(0).arguments;
        assert_eq!(
            (told[0].long.as_deref(), told[0].value.as_deref(), told[0].required),
            (None, Some("RUN"), true)
        );
        assert_eq!((told[1].long.as_deref(), told[1].value.as_deref()), (Some("format"), Some("FORM")));
        assert_eq!(told[1].values, ["hf-gpt2", "llmc"]);
        assert_eq!((told[2].short, told[2].value.as_deref()), (Some('g'), None));
    }
}
