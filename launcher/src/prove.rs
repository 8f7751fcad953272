//! `phalanx checkpoint prove-resume`: trains a configuration twice, once straight and once with its
//! processes killed in between, and compares what came of it bit for bit: every step's first sample,
//! loss and norm, and the weights and moments at the end. Knows a run by its folder and nothing of what
//! is in a checkpoint.

use crate::LaunchError;
use crate::hand_on;
use crate::orphans::descendants;
use anyhow::{Context, Result, bail};
use clap::Args;
use configs::Exit;
use rustix::process::{Pid, Signal, kill_process};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::{Write, stderr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// `phalanx checkpoint prove-resume`
#[derive(Debug, Args)]
pub struct ProveArgs {
    /// Configuration of the run (TOML).
    pub config: PathBuf,
    /// Steps before the checkpoint from which the second run goes on.
    #[arg(long, value_name = "N", default_value_t = 10)]
    pub steps: u64,
    /// Steps after it.
    #[arg(long, value_name = "M", default_value_t = 10)]
    pub more: u64,
    /// Ranks [default: as `phalanx train`].
    #[arg(short = 'n', value_name = "RANKS")]
    pub ranks: Option<usize>,
    /// Ranks after the kill [default: the same].
    #[arg(long, value_name = "RANKS")]
    pub then_ranks: Option<usize>,
    /// Override a key of the configuration.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub sets: Vec<String>,
    /// Allow more ranks than slots.
    #[arg(long)]
    pub oversubscribe: bool,
    /// Leave both runs in place, for a look.
    #[arg(long)]
    pub keep: bool,
}

/// Makes the proof; exit code 1 if the runs differ.
///
/// # Errors
/// A run that does not get through, files that cannot be read or removed.
pub fn run(args: &ProveArgs) -> Result<Exit> {
    if args.steps == 0 || args.more == 0 {
        let what = "--steps and --more must be at least 1: there has to be something to lose and to repeat";
        return Err(LaunchError::Proof(what.into()).into());
    }
    let config = configs::load(&args.config, &args.sets, &dataloader::vocab_size)?;
    let beside = |what: &str| {
        let mut name = config.run.dir.clone().into_os_string();
        name.push(format!(".prove-{what}-{}", std::process::id()));
        PathBuf::from(name)
    };
    let (straight, resumed) = (beside("straight"), beside("resumed"));
    let outcome = prove(args, &straight, &resumed);
    if !args.keep {
        for run in [&straight, &resumed].into_iter().filter(|run| run.exists()) {
            std::fs::remove_dir_all(run)
                .with_context(|| format!("{} could not be removed", run.display()))?;
        }
    }
    outcome
}

fn prove(args: &ProveArgs, straight: &Path, resumed: &Path) -> Result<Exit> {
    let (n, end) = (args.steps, args.steps + args.more);
    tell(&format!("1/3 training {end} steps straight"));
    through(train(args, straight, args.ranks)?, "the straight run")?;

    tell(&format!("2/3 training again, to be killed after the checkpoint of step {n}"));
    let killed = kill_after(train(args, resumed, args.ranks)?, resumed, n)?;
    tell(&format!("    killed {killed} processes; going on from step {n}"));
    through(train(args, resumed, args.then_ranks.or(args.ranks))?, "the resumed run")?;

    tell("3/3 comparing");
    let differences = differences(&steps(straight)?, &steps(resumed)?, end);
    for difference in differences.iter().take(10) {
        tell(&format!("    {difference}"));
    }
    let mut compare: Vec<OsString> =
        ["checkpoint", "compare", "--step", &end.to_string()].map(OsString::from).into();
    compare.extend([straight, resumed].map(|folder| folder.into()));
    let state = hand_on::run(compare)?;
    if differences.is_empty() && state == Exit::Done {
        tell(&format!(
            "proved: {n} steps, a kill and {} steps more give what {end} steps give: samples, losses, norms, weights \
             and moments, bit for bit",
            args.more
        ));
        return Ok(Exit::Done);
    }
    tell(
        "the runs differ\nhint: with parallel.reproducible = true they must not; --keep leaves both to look at",
    );
    Ok(Exit::Failed)
}

/// Starts `phalanx train` into `folder`, with checkpoints where the proof needs them.
fn train(args: &ProveArgs, folder: &Path, ranks: Option<usize>) -> Result<Child> {
    let own = std::env::current_exe().context("the path of the running program could not be found")?;
    let mut command = Command::new(own);
    command.arg("train").arg(&args.config);
    let folder = folder.display();
    let keys = [
        format!("run.dir={folder}"),
        format!("schedule.max_steps={}", args.steps + args.more),
        format!("checkpoint.every_steps={}", args.steps),
        "checkpoint.keep_last=1000000".into(),
        "metrics.every_steps=1".into(),
    ];
    for set in args.sets.iter().chain(&keys) {
        command.args(["--set", set]);
    }
    if let Some(ranks) = ranks {
        command.args(["-n", &ranks.to_string()]);
    }
    if args.oversubscribe {
        command.arg("--oversubscribe");
    }
    let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn();
    Ok(child.map_err(|source| LaunchError::System { what: "phalanx could not be started".into(), source })?)
}

/// Waits for a run that has to end well, and shows what it said if it does not.
fn through(child: Child, which: &str) -> Result<()> {
    let output = child.wait_with_output().context("phalanx could not be waited for")?;
    if output.status.success() {
        return Ok(());
    }
    bail!("{which} failed:\n{}", String::from_utf8_lossy(&output.stderr).trim_end());
}

/// Kills a run with all its processes once the checkpoint of a step is complete and steps after it were
/// made; returns how many processes there were.
fn kill_after(mut child: Child, folder: &Path, step: u64) -> Result<usize> {
    // What it says is not read: a full pipe would stop it.
    let stderr = child.stderr.take();
    let drain =
        std::thread::spawn(move || stderr.map(|mut pipe| std::io::copy(&mut pipe, &mut std::io::sink())));
    let checkpoint = folder.join(format!("checkpoints/step-{step:08}"));
    let went_on =
        || checkpoint.is_dir() && steps(folder).is_ok_and(|steps| steps.keys().any(|&made| made > step));
    while !went_on() {
        if let Some(status) = child.try_wait().context("phalanx could not be waited for")? {
            bail!(
                "the run that was to be killed ended before step {}: {status}\nhint: a larger --more leaves more time",
                step + 1
            );
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    // The launcher first, so that it starts nothing again.
    let processes = [vec![Pid::from_child(&child)], descendants(child.id())].concat();
    for &process in &processes {
        let _ = kill_process(process, Signal::KILL); // one that is gone is what was wanted
    }
    child.wait().context("phalanx could not be waited for")?;
    let _ = drain.join();
    Ok(processes.len())
}

/// What the last line of each step in `metrics.jsonl` says of its numbers: sample, loss, norm, rate.
fn steps(folder: &Path) -> Result<BTreeMap<u64, [String; 4]>> {
    let path = folder.join("metrics.jsonl");
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let mut steps = BTreeMap::new();
    for line in text.lines() {
        let Ok(event) = serde_json::from_str::<serde_json::Value>(line) else { continue }; // cut off by a kill
        if event["kind"] == "step"
            && let Some(step) = event["step"].as_u64()
        {
            steps.insert(step, ["first_sample", "loss", "grad_norm", "lr"].map(|key| event[key].to_string()));
        }
    }
    Ok(steps)
}

/// In words, the steps up to `end` whose numbers are not the same. Floats are printed so that they read
/// back bit for bit, so equal texts are equal bits.
fn differences(a: &BTreeMap<u64, [String; 4]>, b: &BTreeMap<u64, [String; 4]>, end: u64) -> Vec<String> {
    let told = |step: u64| match (a.get(&step), b.get(&step)) {
        (Some(a), Some(b)) if a == b => None,
        (Some(a), Some(b)) => {
            let names = ["first sample", "loss", "gradient norm", "learning rate"];
            let differ = names.iter().zip(a.iter().zip(b)).find(|(_, (a, b))| a != b);
            differ.map(|(name, (a, b))| format!("step {step}: {name} {a} straight, {b} resumed"))
        }
        _ => Some(format!("step {step} is missing from one of the runs")),
    };
    (1..=end).filter_map(told).collect()
}

fn tell(what: &str) {
    let _ = writeln!(stderr(), "{what}");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(losses: &[&str]) -> BTreeMap<u64, [String; 4]> {
        let step = |(i, loss): (usize, &&str)| (i as u64 + 1, ["0", *loss, "1.0", "0.1"].map(String::from));
        losses.iter().enumerate().map(step).collect()
    }

    #[test]
    fn runs_that_say_the_same_do_not_differ() {
        assert_eq!(differences(&run(&["2.5", "2.25"]), &run(&["2.5", "2.25"]), 2), [""; 0]);
    }

    #[test]
    fn the_first_number_that_differs_is_named_and_so_is_a_missing_step() {
        let told = differences(&run(&["2.5", "2.25"]), &run(&["2.5", "2.2500000000000004"]), 3);
        let expected = [
            "step 2: loss 2.25 straight, 2.2500000000000004 resumed",
            "step 3 is missing from one of the runs",
        ];
        assert_eq!(told, expected);
    }
}
