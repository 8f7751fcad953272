//! From TOML text to a resolved run: `extends`, `--set`, and problems told with file, line and
//! suggestion, as many at once as can be known. The only I/O of this crate.

use crate::raw::{LISTS, RawConfig, SECTIONS};
use crate::{RunConfig, TaskFile};
use std::fmt;
use std::path::{Path, PathBuf};
use toml::de::{DeTable, DeValue};

/// One thing that is wrong with a configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Where: `file:line`, `--set`, or nothing when the whole is meant.
    pub place: Option<String>,
    /// What, naming key and value.
    pub what: String,
}

impl Problem {
    pub(crate) fn key(key: &str, what: String) -> Problem {
        Problem { place: None, what: format!("{key}: {what}") }
    }
}

/// A configuration that cannot be used: all that is wrong with it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct ConfigError {
    /// The file that was asked for.
    pub file: PathBuf,
    /// At least one problem.
    pub problems: Vec<Problem>,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} cannot be used:", self.file.display())?;
        for problem in &self.problems {
            match &problem.place {
                Some(place) => write!(f, "\n  {place}: {}", problem.what)?,
                None => write!(f, "\n  {}", problem.what)?,
            }
        }
        Ok(())
    }
}

/// Reads a run's configuration: the file, the files that it extends, then `sets` (`section.key=value`).
/// `vocabulary_of` tells the vocabulary size of a prepared data folder; it is asked only when the
/// configuration gives none.
///
/// # Errors
/// Every problem that can be known: unreadable files, unknown keys with a suggestion and their line,
/// values of a wrong type or range.
pub fn load(
    file: &Path,
    sets: &[String],
    vocabulary_of: &dyn Fn(&Path) -> Result<usize, String>,
) -> Result<RunConfig, ConfigError> {
    let stem = file.file_stem().unwrap_or_default().to_string_lossy();
    read(file, sets)
        .and_then(|raw| RunConfig::resolve(raw, &stem, vocabulary_of))
        .map_err(|problems| refused(file, problems))
}

/// Reads a task file as [`load`] reads a run's: the file, those that it extends, then `sets`.
///
/// # Errors
/// As `load`; that the data it names cannot be used is found where it is opened.
pub fn load_task(file: &Path, sets: &[String]) -> Result<TaskFile, ConfigError> {
    let stem = file.file_stem().unwrap_or_default().to_string_lossy();
    read(file, sets).and_then(|raw| TaskFile::resolve(raw, &stem)).map_err(|problems| refused(file, problems))
}

fn read(file: &Path, sets: &[String]) -> Result<RawConfig, Vec<Problem>> {
    let mut table = read_with_bases(file, &mut Vec::new())?;
    apply_sets(&mut table, sets)?;
    table.try_into().map_err(|error: toml::de::Error| {
        vec![Problem { place: Some("--set".into()), what: error.message().to_string() }]
    })
}

/// All that is wrong with a file; a problem of a key that stands in the file itself gets its line.
fn refused(file: &Path, mut problems: Vec<Problem>) -> ConfigError {
    if let Ok(text) = std::fs::read_to_string(file)
        && let Ok(document) = DeTable::parse(&text)
    {
        let line_of = |key: &str| {
            let (section, key) = key.split_once('.').unwrap_or((key, ""));
            let (name, values) = document.get_ref().iter().find(|(name, _)| name.get_ref() == section)?;
            let mut keys = values.get_ref().as_table()?.keys();
            let key = keys.find(|word| word.get_ref() == key).unwrap_or(name);
            Some(place(file, &text, key.span().start))
        };
        for problem in problems.iter_mut().filter(|problem| problem.place.is_none()) {
            problem.place = problem.what.split(':').next().and_then(line_of);
        }
    }
    ConfigError { file: file.to_path_buf(), problems }
}

/// Reads a resolved configuration back from the text that [`RunConfig::to_toml`] wrote.
///
/// # Errors
/// Text that is no resolved configuration.
pub fn parse(text: &str) -> Result<RunConfig, String> {
    toml::from_str(text).map_err(|error| error.to_string())
}

/// A file's table laid over those that it extends.
fn read_with_bases(file: &Path, above: &mut Vec<PathBuf>) -> Result<toml::Table, Vec<Problem>> {
    let whole = |what: String| vec![Problem { place: Some(file.display().to_string()), what }];
    let identity = file.canonicalize().unwrap_or_else(|_| file.to_path_buf());
    if above.contains(&identity) {
        return Err(whole("extends itself, through the files that it extends".into()));
    }
    let text = std::fs::read_to_string(file).map_err(|error| whole(format!("cannot be read: {error}")))?;
    check_keys(file, &text)?;
    // Types are checked file by file, where lines are known; what is merged later is right by itself.
    toml::from_str::<RawConfig>(&text).map_err(|error| vec![typed_problem(file, &text, &error)])?;

    let mut table: toml::Table =
        text.parse().map_err(|error: toml::de::Error| vec![typed_problem(file, &text, &error)])?;
    let Some(base) = table.remove("extends") else { return Ok(table) };
    let base = file.parent().unwrap_or(Path::new("")).join(base.as_str().unwrap_or_default());
    above.push(identity);
    let mut merged = read_with_bases(&base, above)?;
    overlay(&mut merged, table);
    Ok(merged)
}

/// Lays `top` over `base`, section by section. A budget replaces the other kind of budget, and a folder
/// of training data a list of them.
fn overlay(base: &mut toml::Table, top: toml::Table) {
    for (section, values) in top {
        let toml::Value::Table(values) = values else { continue };
        let below = base.entry(section.clone()).or_insert_with(|| toml::Value::Table(toml::Table::new()));
        let Some(below) = below.as_table_mut() else { continue };
        if section == "schedule" && (values.contains_key("max_steps") || values.contains_key("max_tokens")) {
            below.remove("max_steps");
            below.remove("max_tokens");
        }
        if section == "data" && (values.contains_key("train") || values.contains_key("source")) {
            below.remove("train");
            below.remove("source");
        }
        below.extend(values);
    }
}

fn apply_sets(table: &mut toml::Table, sets: &[String]) -> Result<(), Vec<Problem>> {
    let mut problems = Vec::new();
    for set in sets {
        let mut wrong = |what: String| problems.push(Problem { place: Some(format!("--set {set}")), what });
        let Some((path, text)) = set.split_once('=') else {
            wrong("expected section.key=value".into());
            continue;
        };
        let (section, key) = path.trim().split_once('.').unwrap_or(("", path.trim()));
        match SECTIONS.iter().find(|(name, _)| *name == section) {
            Some((_, keys)) if keys.contains(&key) => {}
            Some((_, keys)) => {
                wrong(unknown("key", path.trim(), key, keys.iter().copied()));
                continue;
            }
            None => {
                wrong(unknown("section", path.trim(), section, SECTIONS.iter().map(|(name, _)| *name)));
                continue;
            }
        }
        // A value that is no TOML is a string, so that names need no quotes.
        let value =
            format!("v = {text}").parse::<toml::Table>().ok().and_then(|mut parsed| parsed.remove("v"));
        let value = value.unwrap_or_else(|| toml::Value::String(text.trim().to_string()));
        let mut one = toml::Table::new();
        one.insert(key.to_string(), value);
        let mut top = toml::Table::new();
        top.insert(section.to_string(), toml::Value::Table(one));
        if let Err(error) = top.clone().try_into::<RawConfig>() {
            wrong(error.message().to_string());
            continue;
        }
        overlay(table, top);
    }
    if problems.is_empty() { Ok(()) } else { Err(problems) }
}

/// Refuses every section and key that does not exist, each with its line and what may have been meant.
fn check_keys(file: &Path, text: &str) -> Result<(), Vec<Problem>> {
    let document = DeTable::parse(text).map_err(|error| vec![typed_problem(file, text, &error)])?;
    let mut problems = Vec::new();
    let mut refuse = |span: std::ops::Range<usize>, what: String| {
        problems.push((span.start, Problem { place: Some(place(file, text, span.start)), what }));
    };
    for (section, value) in document.get_ref() {
        let name: &str = section.get_ref();
        if name == "extends" {
            continue;
        }
        let Some((_, keys)) = SECTIONS.iter().find(|(known, _)| *known == name) else {
            refuse(section.span(), unknown("section", name, name, SECTIONS.iter().map(|(known, _)| *known)));
            continue;
        };
        let Some(table) = value.get_ref().as_table() else {
            refuse(section.span(), format!("{name} is a section; write [{name}] and its keys below"));
            continue;
        };
        for key in table.keys() {
            let word: &str = key.get_ref();
            if !keys.contains(&word) {
                refuse(key.span(), unknown("key", &format!("{name}.{word}"), word, keys.iter().copied()));
            }
        }
        for &(_, list, keys) in LISTS.iter().filter(|(section, ..)| *section == name) {
            let items = table.iter().filter(|(key, _)| key.get_ref() == list);
            let items =
                items.filter_map(|(_, value)| value.get_ref().as_array()).flat_map(|list| list.iter());
            for key in items.filter_map(|item| item.get_ref().as_table()).flat_map(|item| item.keys()) {
                let word: &str = key.get_ref();
                if !keys.contains(&word) {
                    let shown = format!("{word} of [[{name}.{list}]]");
                    refuse(key.span(), unknown("key", &shown, word, keys.iter().copied()));
                }
            }
        }
    }
    problems.sort_by_key(|(start, _)| *start);
    if problems.is_empty() { Ok(()) } else { Err(problems.into_iter().map(|(_, problem)| problem).collect()) }
}

pub(crate) fn unknown<'a>(
    kind: &str,
    shown: &str,
    word: &str,
    known: impl Iterator<Item = &'a str> + Clone,
) -> String {
    let near = known
        .clone()
        .map(|candidate| (strsim::jaro_winkler(word, candidate), candidate))
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .filter(|(similarity, _)| *similarity > 0.8);
    match near {
        Some((_, candidate)) => format!("unknown {kind} {shown}; did you mean {candidate}?"),
        None => format!("unknown {kind} {shown}; there are {}", known.collect::<Vec<_>>().join(", ")),
    }
}

pub(crate) fn typed_problem(file: &Path, text: &str, error: &toml::de::Error) -> Problem {
    let place = match error.span() {
        Some(span) => place(file, text, span.start),
        None => file.display().to_string(),
    };
    let document = DeTable::parse(text).ok();
    let key = document.zip(error.span()).and_then(|(table, span)| key_at(table.get_ref(), span.start));
    let what = error.message();
    Problem { place: Some(place), what: key.map_or(what.to_string(), |key| format!("{key}: {what}")) }
}

/// The key whose value stands at that byte of the text, after the names of the tables that it is in.
fn key_at(table: &DeTable<'_>, byte: usize) -> Option<String> {
    table.iter().find_map(|(name, value)| {
        let within = match value.get_ref() {
            DeValue::Table(inner) => key_at(inner, byte),
            DeValue::Array(items) => items
                .iter()
                .filter_map(|item| item.get_ref().as_table())
                .find_map(|inner| key_at(inner, byte)),
            _ => None,
        };
        match within {
            Some(key) => Some(format!("{}.{key}", name.get_ref())),
            None => value.span().contains(&byte).then(|| name.get_ref().to_string()),
        }
    })
}

pub(crate) fn place(file: &Path, text: &str, byte: usize) -> String {
    let line = text.as_bytes()[..byte].iter().filter(|&&b| b == b'\n').count() + 1;
    format!("{}:{line}", file.display())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Budget, Pattern};

    const GOOD: &str = r#"
[model]
n_layer = 2
n_head = 2
n_embd = 16
seq_len = 8
attention = ["dense", "banded:4"]
[data]
train = "data/train"
[batch]
global_batch_tokens = 64
micro_batch = 2
[optim]
lr = 1e-3
[schedule]
max_steps = 10
"#;

    fn load_text(text: &str, sets: &[&str]) -> Result<RunConfig, ConfigError> {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("tiny.toml");
        std::fs::write(&file, text).unwrap();
        let sets: Vec<String> = sets.iter().map(ToString::to_string).collect();
        load(&file, &sets, &|_| Ok(257))
    }

    fn problems(text: &str, sets: &[&str]) -> String {
        load_text(text, sets).unwrap_err().to_string()
    }

    #[test]
    fn a_plain_file_gets_its_defaults() {
        let config = load_text(GOOD, &[]).unwrap();
        assert_eq!(config.run.name, "tiny");
        assert_eq!(config.run.dir, Path::new("runs/tiny"));
        assert_eq!(config.run.seed, 1337);
        assert_eq!(config.model.vocab_size, 257);
        assert_eq!(config.model.attention, [Pattern::Dense, Pattern::Banded(4)]);
        assert_eq!(config.schedule.decay_tokens, 640);
        assert_eq!(config.max_steps(), 10);
    }

    #[test]
    fn every_unknown_key_is_named_with_its_line_and_a_suggestion() {
        let text = GOOD
            .replace("n_head = 2", "n_heads = 2")
            .replace("[optim]", "[optim]\nlearning = 1\n[optimizer]");
        let told = problems(&text, &[]);
        assert!(told.contains("tiny.toml:4: unknown key model.n_heads; did you mean n_head?"), "{told}");
        assert!(told.contains("unknown key optim.learning; there are lr, betas"), "{told}");
        assert!(told.contains("unknown section optimizer; did you mean optim?"), "{told}");
    }

    #[test]
    fn a_value_of_the_wrong_type_is_told_with_its_line_and_key() {
        let told = problems(&GOOD.replace("n_layer = 2", "n_layer = \"two\""), &[]);
        assert!(told.contains("tiny.toml:3: model.n_layer: ") && told.contains("two"), "{told}");
        let told = problems(&GOOD.replace("banded:4", "banded:0"), &[]);
        assert!(told.contains("tiny.toml:7: model.attention: ") && told.contains("banded:0"), "{told}");
    }

    #[test]
    fn a_pattern_that_sees_what_it_predicts_is_refused() {
        let told = problems(GOOD, &["model.attention=[\"dense\", \"bidirectional\"]"]);
        assert!(told.contains("model.attention: \"bidirectional\" sees the tokens that it is"), "{told}");
    }

    #[test]
    fn all_missing_and_impossible_values_are_told_at_once() {
        let text = GOOD
            .replace("n_layer = 2\n", "")
            .replace("n_embd = 16", "n_embd = 15")
            .replace("lr = 1e-3", "lr = -1.0");
        let told = problems(&text, &[]);
        assert!(told.contains("model.n_layer: is missing"), "{told}");
        assert!(told.contains("14 and 16 work"), "{told}");
        assert!(told.contains("optim.lr: must be a positive number"), "{told}");
    }

    #[test]
    fn a_batch_that_does_not_divide_names_the_two_that_do() {
        let config = load_text(GOOD, &["batch.micro_batch=8"]).unwrap();
        assert!(config.batch_plan(1).is_ok());
        let told = config.batch_plan(3).unwrap_err().to_string();
        assert!(told.contains("the smallest that works is 192"), "{told}");
    }

    #[test]
    fn a_reproducible_run_needs_a_power_of_two_of_micro_batches() {
        let told = problems(GOOD, &["batch.global_batch_tokens=96"]);
        assert!(told.contains("6 micro-batches") && told.contains("batch.micro_batch = 6 makes 2"), "{told}");
        let sets = ["batch.global_batch_tokens=96", "parallel.reproducible=false"];
        assert!(load_text(GOOD, &sets).is_ok());
    }

    #[test]
    fn sets_override_the_file_and_are_checked_like_it() {
        let config = load_text(GOOD, &["schedule.max_tokens=6400", "run.name=other", "optim.lr=3"]).unwrap();
        assert_eq!(config.schedule.budget, Budget::MaxTokens(6400));
        assert_eq!((config.run.name.as_str(), config.optim.lr), ("other", 3.0));
        let told = problems(GOOD, &["optim.lrr=3", "modle.n_layer=3", "optim", "model.n_layer=x"]);
        assert!(told.contains("did you mean lr?") && told.contains("did you mean model?"), "{told}");
        assert!(
            told.contains("expected section.key=value") && told.contains("--set model.n_layer=x"),
            "{told}"
        );
    }

    #[test]
    fn a_file_extends_another_and_a_circle_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("base.toml"), GOOD).unwrap();
        let child = folder.path().join("child.toml");
        std::fs::write(&child, "extends = \"base.toml\"\n[schedule]\nmax_tokens = 128\n").unwrap();
        let config = load(&child, &[], &|_| Ok(257)).unwrap();
        assert_eq!((config.max_steps(), config.run.name.as_str()), (2, "child"));
        std::fs::write(&child, "extends = \"child.toml\"\n").unwrap();
        assert!(load(&child, &[], &|_| Ok(257)).unwrap_err().to_string().contains("extends itself"));
    }

    #[test]
    fn missing_data_is_told_under_its_key() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("tiny.toml");
        std::fs::write(&file, GOOD).unwrap();
        let error =
            load(&file, &[], &|folder| Err(format!("{} is not there", folder.display()))).unwrap_err();
        assert!(error.to_string().contains("data.train: data/train is not there"), "{error}");
    }

    const MIXTURE: &str =
        "[[data.source]]\npath = \"a\"\nweight = 0.6\n[[data.source]]\npath = \"b\"\nweight = 2\n";

    #[test]
    fn a_mixture_has_weights_of_any_sum_and_takes_the_place_of_one_folder() {
        let text = GOOD.replace("[data]\ntrain = \"data/train\"\n", MIXTURE);
        let config = load_text(&text, &["data.val=v"]).unwrap();
        let weights: Vec<f64> = config.data.sources().iter().map(|source| source.weight).collect();
        assert_eq!((config.data.train_key(), weights), ("data.source", vec![0.6, 2.0]));
        assert_eq!(parse(&config.to_toml()).unwrap(), config);
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("base.toml"), GOOD).unwrap();
        let child = folder.path().join("child.toml");
        std::fs::write(&child, format!("extends = \"base.toml\"\n{MIXTURE}")).unwrap();
        assert_eq!(load(&child, &[], &|_| Ok(257)).unwrap().data.source, config.data.source);
    }

    #[test]
    fn a_mixture_that_cannot_be_is_refused_source_by_source() {
        let told = problems(&GOOD.replace("[batch]", &format!("{MIXTURE}[batch]")), &[]);
        assert!(told.contains("stands beside [[data.source]]; keep one"), "{told}");
        let text = GOOD.replace("[data]\ntrain = \"data/train\"\n", MIXTURE);
        let told = problems(&text.replace("weight = 2", "weight = -2"), &[]);
        assert!(told.contains("data.source: \"b\" has weight -2, expected a positive number"), "{told}");
        let told = problems(&text.replace("path = \"b\"\nweight = 2", ""), &[]);
        assert!(told.contains("has no path") && told.contains("\"\" has no weight"), "{told}");
        let told = problems(&text.replace("weight = 2", "wieght = 2"), &[]);
        assert!(
            told.contains("tiny.toml:13: unknown key wieght of [[data.source]]; did you mean weight?"),
            "{told}"
        );
    }

    #[test]
    fn the_resolved_config_reads_back_as_itself() {
        let sets = [
            "data.val=data/val",
            "eval.max_tokens=100",
            "eval.suite=suite.toml",
            "eval.suite_every_steps=5",
            "batch.ramp_start_tokens=32",
            "batch.ramp_tokens=640",
            "guard.spike_factor=1.5",
            "parallel.shard=gradients",
            "parallel.reproducible=false",
            "model.norm=post",
            "model.dropout=0.1",
        ];
        for sets in [&sets[..], &[]] {
            let config = load_text(GOOD, sets).unwrap();
            assert_eq!(parse(&config.to_toml()).unwrap(), config);
            assert_eq!(load_text(&config.to_toml(), &[]).unwrap(), config);
        }
    }

    #[test]
    fn a_run_saved_before_a_key_existed_reads_with_the_keys_default() {
        let config = load_text(GOOD, &[]).unwrap();
        let later = ["norm", "dropout", "shard", "recompute", "dtype"].map(|key| format!("{key} = "));
        let is_later = |line: &&str| later.iter().any(|key| line.starts_with(key.as_str()));
        let text = config.to_toml().replace("[guard]\nreplica_check_steps = 0\n", "");
        let old: Vec<&str> = text.lines().filter(|line| !is_later(line)).collect();
        assert_eq!(old.len() + later.len(), text.lines().count());
        assert_eq!(parse(&old.join("\n")).unwrap(), config);
    }

    #[test]
    fn half_a_ramp_and_values_out_of_range_are_refused() {
        let told = problems(GOOD, &["batch.ramp_tokens=640", "model.dropout=1.0", "guard.spike_factor=0.5"]);
        assert!(told.contains("batch.ramp_start_tokens: is missing"), "{told}");
        assert!(told.contains("model.dropout: 1 does not lie in [0, 1)"), "{told}");
        assert!(told.contains("guard.spike_factor: 0.5 is not above 1"), "{told}");
    }

    #[test]
    fn reproducible_goes_by_the_device_unless_it_is_said() {
        let run = |sets: &[&str]| load_text(GOOD, sets).unwrap();
        assert_eq!([true, false].map(|on_cpu| run(&[]).reproducible(on_cpu)), [true, false]);
        assert!(run(&["parallel.reproducible=true"]).reproducible(false));
        assert!(!run(&["parallel.reproducible=false"]).reproducible(true));
        // What may turn out to be reproducible needs whole trees; what cannot does not.
        assert!(load_text(GOOD, &["batch.global_batch_tokens=96", "parallel.device=cuda"]).is_ok());
        assert!(load_text(GOOD, &["batch.global_batch_tokens=96", "parallel.device=auto"]).is_err());
    }

    #[test]
    fn a_run_without_an_end_in_sight_can_be_saved_and_keeps_its_rate() {
        for kind in ["cosine", "wsd"] {
            let text =
                GOOD.replace("max_steps = 10", &format!("max_steps = {}\nkind = \"{kind}\"", i64::MAX));
            let config = load_text(&text, &[]).unwrap();
            assert_eq!(parse(&config.to_toml()).unwrap(), config);
            assert_eq!(config.lr(1000), 1e-3);
        }
    }

    #[test]
    fn what_is_fixed_on_resume_is_told_and_what_is_free_is_not() {
        let earlier = load_text(GOOD, &[]).unwrap();
        let free = [
            "schedule.max_steps=99",
            "eval.every_steps=5",
            "checkpoint.every_steps=7",
            "parallel.threads=2",
            "parallel.shard=parameters",
            "parallel.recompute=full",
            "parallel.reproducible=true",
            "guard.spike_factor=2.0",
        ];
        assert!(load_text(GOOD, &free).unwrap().fixed_differences(&earlier).is_empty());
        let fixed = load_text(GOOD, &["model.n_layer=4", "run.seed=1", "batch.micro_batch=1"]).unwrap();
        let told = fixed.fixed_differences(&earlier).join("\n");
        let ramp = ["batch.ramp_start_tokens=32", "batch.ramp_tokens=640"];
        let told_of_ramp = earlier.fixed_differences(&load_text(GOOD, &ramp).unwrap()).join("\n");
        assert!(told_of_ramp.contains("batch.ramp_tokens is nothing, the checkpoint was made with 640"));
        for line in
            ["model.n_layer is 4, the checkpoint was made with 2", "run.seed is 1", "batch.micro_batch is 1"]
        {
            assert!(told.contains(line), "{told}");
        }
    }
}
