//! What people ask of a run's checkpoints: which there are, whether they are whole, what is in one,
//! room on the disk, and whether two are the same. Owns the answers as text; the files are for the
//! rest of `checkpoint`, and nothing here needs the run to stand still.

use super::publish::remove_published;
use super::read::{Checkpoints, Loaded};
use super::slice::StateKind;
use super::{CheckpointError, Manifest, one_of, unfinished_step};
use crate::run_folder::{RunFolder, folder_names, unix_seconds};
use configs::{CheckpointConfig, Exit};
use std::fmt::{Display, Write};
use std::path::Path;

/// Values compared at a time.
const COMPARED_NUMEL: usize = 1 << 20;

/// What was found, for the terminal, and the exit code that it deserves.
pub type Answer = Result<(String, Exit), CheckpointError>;

/// All checkpoints of a run and what is unfinished, oldest first. Reads manifests and lengths, not values.
///
/// # Errors
/// There is no such run, or its folder cannot be listed.
pub fn list(run: &Path) -> Answer {
    let checkpoints = of_run(run)?;
    let mut table = Table::new(["step", "tokens", "ranks", "start", "MB", "age", "state"]);
    for step in checkpoints.steps()? {
        table.row(match checkpoints.read(step) {
            Ok(loaded) => {
                let Manifest { world_size, generation, created_unix_s, .. } = *loaded.manifest();
                let age = since(unix_seconds().saturating_sub(created_unix_s));
                let numbers = [step, loaded.state().tokens, world_size as u64, generation];
                let [step, tokens, ranks, start] = numbers.map(|number| number.to_string());
                [step, tokens, ranks, start, megabytes(&loaded), age, "complete".into()]
            }
            Err(CheckpointError::Damaged(damaged)) => {
                let [tokens, ranks, start, size, age] = [(); 5].map(|()| "-".to_string());
                [step.to_string(), tokens, ranks, start, size, age, format!("damaged: {}", damaged.damage)]
            }
            Err(error) => return Err(error),
        });
    }
    let mut text = table.text();
    let parent = RunFolder::at(run).checkpoints_dir();
    for name in folder_names(&parent)?.iter().filter(|name| unfinished_step(name).is_some()) {
        line(&mut text, format_args!("{name}: being written, or left behind; the next start clears it"));
    }
    Ok((text, Exit::Done))
}

/// Reads every byte of a step's checkpoint, or of all, and says what it finds. Damage is exit code 2.
///
/// # Errors
/// There is no such run or step, or its folder cannot be listed.
pub fn verify(run: &Path, step: Option<u64>) -> Answer {
    let checkpoints = of_run(run)?;
    let (mut text, mut exit) = (String::new(), Exit::Done);
    for step in chosen(&checkpoints, run, step)? {
        match checkpoints.verify(step) {
            Ok(loaded) => {
                let files = loaded.manifest().files.len();
                let megabytes = megabytes(&loaded);
                line(
                    &mut text,
                    format_args!("step {step}: whole, {megabytes} MB in {files} files read and proved"),
                );
            }
            Err(damaged) => {
                exit = Exit::UserError;
                line(&mut text, format_args!("step {step}: damaged: {}", damaged.damage));
            }
        }
    }
    if exit != Exit::Done {
        text.push_str("hint: a run passes over damaged checkpoints by itself; they can be removed\n");
    }
    Ok((text, exit))
}

/// What a step's checkpoint holds, or the newest that is whole by its lengths.
///
/// # Errors
/// There is no such run or step, or it is damaged.
pub fn show(run: &Path, step: Option<u64>) -> Answer {
    let loaded = one(run, step)?;
    let (manifest, state) = (loaded.manifest(), loaded.state());
    let mut text = String::new();
    let age = since(unix_seconds().saturating_sub(manifest.created_unix_s));
    let (ranks, start) = (manifest.world_size, manifest.generation);
    let skips: Vec<String> =
        state.skips.iter().map(|skip| format!("{}..{}", skip.first_sample, skip.end_sample)).collect();
    let loss = state.recent_losses.last().map_or("-".into(), |loss| format!("{loss:.4}"));
    let facts: [(&str, &dyn Display); 11] = [
        ("folder", &loaded.folder().display()),
        ("step", &state.step),
        ("samples", &state.samples),
        ("tokens", &state.tokens),
        ("last loss", &loss),
        ("written", &format!("{age} ago by {ranks} ranks, in start {start} of the run")),
        ("size", &format!("{} MB in {} files", megabytes(&loaded), manifest.files.len())),
        ("tokenizer", &state.tokenizer),
        ("training data", &state.train_digest),
        ("validation", &state.val_digest.as_deref().unwrap_or("-")),
        ("left out", &if skips.is_empty() { "-".into() } else { format!("samples {}", skips.join(", ")) }),
    ];
    facts.iter().for_each(|(name, value)| line(&mut text, format_args!("{name:<14} {value}")));
    text.push('\n');
    let mut table = Table::new(["segment", "tensors", "parameters"]);
    for segment in &state.segments {
        let parameters: i64 = segment.tensors.iter().map(|tensor| tensor.shape.iter().product::<i64>()).sum();
        table.row([segment.name.clone(), segment.tensors.len().to_string(), parameters.to_string()]);
    }
    text += &table.text();
    line(&mut text, format_args!("\n{}", state.config.trim_end()));
    Ok((text, Exit::Done))
}

/// Removes the checkpoints that `keep` does not ask for, but never the newest whole one; with
/// `only_say` says which it would be.
///
/// # Errors
/// There is no such run, none of its checkpoints is whole, or one cannot be removed.
pub fn prune(run: &Path, keep: &CheckpointConfig, only_say: bool) -> Answer {
    let checkpoints = of_run(run)?;
    let newest_good = checkpoints.newest_good()?.map(|loaded| loaded.state().step);
    let steps = checkpoints.steps()?;
    let mut surplus = keep.surplus(&steps);
    surplus.retain(|&step| Some(step) != newest_good);
    let mut text = String::new();
    for &step in &surplus {
        if !only_say {
            remove_published(&checkpoints.folder(step))?;
        }
        let done = if only_say { "would remove" } else { "removed" };
        line(&mut text, format_args!("{done} {}", checkpoints.folder(step).display()));
    }
    let stay: Vec<String> = steps.iter().filter(|step| !surplus.contains(step)).map(u64::to_string).collect();
    line(&mut text, format_args!("steps that stay: {}", stay.join(", ")));
    Ok((text, Exit::Done))
}

/// Whether two checkpoints are of the same state, bit for bit: step, samples, tokens, what is left out,
/// losses, weights and moments. How many ranks wrote them does not count. If not, exit code 1.
///
/// # Errors
/// There is no such run or step, or it is damaged.
pub fn compare(first: (&Path, Option<u64>), second: (&Path, Option<u64>)) -> Answer {
    let (a, b) = (one(first.0, first.1)?, one(second.0, second.1)?);
    b.check_layout(&a.state().segments)?;
    let (x, y) = (a.state(), b.state());
    let bits = |losses: &[f64]| losses.iter().map(|loss| loss.to_bits()).collect::<Vec<u64>>();
    let mut differences = Vec::new();
    let mut told = |what: &str, differs: bool| differs.then(|| differences.push(what.to_string()));
    told("steps", x.step != y.step);
    told("samples", x.samples != y.samples);
    told("tokens", x.tokens != y.tokens);
    told("training data", x.train_digest != y.train_digest);
    told("batches left out", x.skips != y.skips);
    told("recent losses", bits(&x.recent_losses) != bits(&y.recent_losses));
    let mut values = 0;
    for segment in &x.segments {
        for kind in StateKind::ALL {
            values += segment.numel;
            differences.extend(first_difference(&a, &b, &segment.name, kind, segment.numel)?);
        }
    }
    let (a, b) = (a.folder().display(), b.folder().display());
    if differences.is_empty() {
        return Ok((format!("{a} and {b}: the same, {values} values bit for bit\n"), Exit::Done));
    }
    let mut text = format!("{a} and {b} differ:\n");
    differences.iter().for_each(|difference| line(&mut text, format_args!("  {difference}")));
    Ok((text, Exit::Failed))
}

/// The first value of a buffer that two checkpoints have differently, in words.
fn first_difference(
    a: &Loaded,
    b: &Loaded,
    segment: &str,
    kind: StateKind,
    numel: usize,
) -> Result<Option<String>, CheckpointError> {
    for start in (0..numel).step_by(COMPARED_NUMEL) {
        let len = COMPARED_NUMEL.min(numel - start);
        let (mut x, mut y) = (vec![0f32; len], vec![0f32; len]);
        a.fill_from(segment, kind, start, &mut x)?;
        b.fill_from(segment, kind, start, &mut y)?;
        if let Some(at) = x.iter().zip(&y).position(|(x, y)| x.to_bits() != y.to_bits()) {
            let (place, x, y) = (start + at, x[at], y[at]);
            return Ok(Some(format!("{kind} of {segment}, first at element {place}: {x:e} and {y:e}")));
        }
    }
    Ok(None)
}

fn of_run(run: &Path) -> Result<Checkpoints, CheckpointError> {
    if !RunFolder::at(run).checkpoints_dir().is_dir() {
        return Err(CheckpointError::NoSuch { what: format!("{} is no run", run.display()) });
    }
    Ok(Checkpoints::open(run))
}

/// The step asked for, which must be there, or all.
fn chosen(checkpoints: &Checkpoints, run: &Path, step: Option<u64>) -> Result<Vec<u64>, CheckpointError> {
    let steps = checkpoints.steps()?;
    let none = |what: &str| {
        let list: Vec<String> = steps.iter().map(u64::to_string).collect();
        let there = if list.is_empty() { "none".into() } else { list.join(", ") };
        CheckpointError::NoSuch {
            what: format!("{} has no checkpoint{what}; there are: {there}", run.display()),
        }
    };
    match step {
        None if steps.is_empty() => Err(none("")),
        None => Ok(steps),
        Some(step) if steps.contains(&step) => Ok(vec![step]),
        Some(step) => Err(none(&format!(" of step {step}"))),
    }
}

/// A step's checkpoint, or the newest whose manifest and lengths are right. `run` may be the folder of
/// a checkpoint, too.
fn one(run: &Path, step: Option<u64>) -> Result<Loaded, CheckpointError> {
    if let (None, (parent, Some(step))) = (step, one_of(run, step)) {
        return of_run(&parent)?.read(step);
    }
    let checkpoints = of_run(run)?;
    let mut steps = chosen(&checkpoints, run, step)?;
    let newest = steps.pop().expect("at least one was chosen");
    let first = checkpoints.read(newest);
    match steps.into_iter().rev().find_map(|step| first.is_err().then(|| checkpoints.read(step).ok())?) {
        Some(older) => Ok(older),
        None => first,
    }
}

fn megabytes(loaded: &Loaded) -> String {
    let bytes: u64 = loaded.manifest().files.iter().map(|file| file.size_bytes).sum();
    format!("{:.1}", bytes as f64 / 1e6)
}

/// A duration in the largest unit that it has at least one of.
fn since(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min", seconds / 60),
        3600..86400 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86400),
    }
}

fn line(text: &mut String, what: std::fmt::Arguments<'_>) {
    let _ = writeln!(text, "{what}"); // a string takes everything
}

/// Right-aligned columns, the last one as it is.
struct Table<const N: usize> {
    rows: Vec<[String; N]>,
}

impl<const N: usize> Table<N> {
    fn new(heads: [&str; N]) -> Table<N> {
        Table { rows: vec![heads.map(str::to_string)] }
    }

    fn row(&mut self, row: [String; N]) {
        self.rows.push(row);
    }

    fn text(&self) -> String {
        let width = |column: usize| self.rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
        let mut text = String::new();
        for row in &self.rows {
            for (column, cell) in row[..N - 1].iter().enumerate() {
                let _ = write!(text, "{cell:>width$}  ", width = width(column));
            }
            line(&mut text, format_args!("{}", row[N - 1]));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_without_checkpoints_is_no_run() {
        let scratch = tempfile::tempdir().unwrap();
        for answer in [list(scratch.path()), verify(scratch.path(), None), show(scratch.path(), None)] {
            assert!(answer.unwrap_err().to_string().contains("is no run"));
        }
        RunFolder::open(scratch.path()).unwrap();
        assert!(list(scratch.path()).is_ok());
        let error = verify(scratch.path(), Some(3)).unwrap_err().to_string();
        assert!(error.contains("no checkpoint of step 3; there are: none"), "{error}");
    }

    #[test]
    fn ages_are_in_one_unit() {
        let ages = [5, 61, 7200, 200_000].map(since);
        assert_eq!(ages, ["5 s", "1 min", "2 h", "2 d"]);
    }
}
