//! A run from its first start to its end, whatever comes between: which machines answer, how many ranks they
//! hold, when a failed start is followed by another, and when not.
//! Knows exit codes and names of checkpoints; one start is `supervise`'s.

use crate::agent::{Agent, is_this_machine};
use crate::gauges::Gauges;
use crate::listen::Listener;
use crate::mpirun::{self, Job};
use crate::progress::Console;
use crate::run_lock::{RunLock, remote_cleanup};
use crate::signals::StopSignals;
use crate::supervise::{Outcome, Supervised, supervise};
use crate::watch::Finding;
use crate::{Hosts, LaunchError};
use configs::{Exit, Fault, Listen};
use serde::Serialize;
use std::io::{BufRead, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The wait before the first restart; each further one without a new checkpoint doubles it.
const FIRST_WAIT: Duration = Duration::from_secs(1);
const LONGEST_WAIT: Duration = Duration::from_secs(60);

/// What the starts of a run have in common.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The run's name.
    pub name: String,
    /// The run's folder.
    pub folder: PathBuf,
    /// Where metrics are served.
    pub listen: Listen,
    /// All machines that it may use.
    pub hosts: Hosts,
    /// Ranks while all of them are there.
    pub ranks: usize,
    /// Micro-batches of the first, smallest step, which ranks share out.
    pub micro_batches: u64,
    /// Cores that a rank takes where nobody stated slots.
    pub threads: usize,
    /// Fewer machines than this are waited for.
    pub min_hosts: usize,
    /// Restarts without a new checkpoint in between.
    pub max_restarts: u32,
    /// Without a sign of life for so long, ranks hang.
    pub hang_timeout: Duration,
    /// The program of each rank and its arguments, faults left out.
    pub program: Vec<String>,
    /// What is made to go wrong.
    pub faults: Vec<Fault>,
    /// Whether ranks may outnumber slots.
    pub oversubscribe: bool,
    /// `key=value` pairs for Open MPI.
    pub mca: Vec<String>,
}

/// One start of a run.
#[derive(Debug)]
struct Start {
    /// From 0.
    number: u32,
    world: World,
}

/// Where a start runs.
#[derive(Debug, Clone, PartialEq, Eq)]
struct World {
    ranks: usize,
    hosts: Hosts,
    /// Machines that do not answer.
    left_out: Vec<String>,
}

impl Plan {
    /// The mpirun command on these machines, for the first start or a later one.
    ///
    /// # Errors
    /// An `--mca` that is no `key=value`.
    pub fn command(&self, ranks: usize, hosts: &Hosts, first: bool) -> Result<Vec<String>, LaunchError> {
        let mut program = self.program.clone();
        let faults: Vec<&Fault> = self.faults.iter().filter(|fault| first || !fault.is_over()).collect();
        if !faults.is_empty() {
            program.push("--allow-faults".into());
        }
        for fault in faults {
            program.extend(["--inject".into(), fault.to_string()]);
        }
        mpirun::mpirun_command(&Job {
            ranks,
            hosts,
            several: !self.remote().is_empty(),
            tagged: true,
            oversubscribe: self.oversubscribe,
            as_root: rustix::process::geteuid().is_root(),
            mca: &self.mca,
            program: &program,
        })
    }

    /// Machines that are not this one.
    fn remote(&self) -> Vec<&str> {
        let names = self.hosts.list().iter().map(|host| host.name.as_str());
        names.filter(|name| !is_this_machine(name)).collect()
    }

    /// Ranks for what is left of the machines: all that were asked for if there is room, else the largest
    /// power of two that fits and divides the step.
    fn world(&self, left_out: Vec<String>) -> World {
        let hosts = self.hosts.without(&left_out);
        let fits = hosts.slots(self.threads).is_none_or(|slots| slots >= self.ranks);
        let ranks = match hosts.slots(self.threads) {
            Some(slots) if !left_out.is_empty() && !fits => {
                largest_world(slots, self.micro_batches).min(self.ranks)
            }
            _ => self.ranks,
        };
        World { ranks, hosts, left_out }
    }
}

/// The largest power of two that is at most `slots` and divides the step's micro-batches, so that
/// every rank does the same number of micro-steps.
pub fn largest_world(slots: usize, micro_batches: u64) -> usize {
    let mut ranks = 1;
    while ranks * 2 <= slots && micro_batches.is_multiple_of(ranks as u64 * 2) {
        ranks *= 2;
    }
    ranks
}

/// Starts the run, and starts it again from its last checkpoint when it fails, until it ends well, somebody
/// asks it to stop, something has to be changed first, or it does not get any further.
///
/// # Errors
/// What the system refuses the launcher itself.
pub fn keep_going<O: Write, E: Write>(
    plan: &Plan,
    lock: &RunLock,
    console: &mut Console<O, E>,
) -> Result<Outcome, LaunchError> {
    let watched = StopSignals::watch();
    let mut signals = watched
        .map_err(|source| LaunchError::System { what: "signals could not be watched".into(), source })?;
    let agent = Agent::of_mpirun(&plan.mca, |name| std::env::var(name).ok());
    let (gauges, told) = Gauges::serve(&plan.folder, &plan.name, plan.listen);
    told.iter().for_each(|warning| console.err(warning));
    let gauges = gauges.as_ref();
    let mut budget = Budget { newest: newest_checkpoint(&plan.folder), restarts: 0 };
    let mut after: Option<Finding> = None;
    for number in 0u32.. {
        let start = Start { number, world: plan.world(unanswered(plan, lock, &agent, console)) };
        if let Some(finding) = &after {
            let event = RestartEvent::new(finding, number, budget.newest, &start.world);
            if let Err(error) = append(&plan.folder.join("metrics.jsonl"), &event) {
                console.err(&format!("warning: metrics.jsonl does not hear of the restart: {error}"));
            }
        }
        let end = Ending::watch(plan, gauges, &start);
        let outcome = start_on(plan, &start, lock, gauges, console, &mut signals)?;
        if outcome.exit != Exit::Failed || outcome.asked {
            end.last(&outcome, &mut signals);
            return Ok(outcome);
        }
        let Some(wait) = budget.after_failure(newest_checkpoint(&plan.folder), plan.max_restarts) else {
            end.last(&outcome, &mut signals);
            return Ok(budget.given_up(outcome, plan.max_restarts));
        };
        end.not_the_last(&outcome);
        console.err(&outcome.told);
        console.err(&format!(
            "restart {} of at most {} without a new checkpoint, from {}, in {} s",
            budget.restarts,
            plan.max_restarts,
            budget
                .newest
                .map_or("the beginning".to_string(), |step| format!("the checkpoint of step {step}")),
            wait.as_secs(),
        ));
        if signals.wait(wait).is_some() {
            let told = "asked to stop between two starts; the same command goes on from the last checkpoint";
            return Ok(Outcome { told: told.into(), asked: true, ..outcome });
        }
        after = outcome.finding;
    }
    unreachable!("a run is not started four thousand million times")
}

/// One start.
fn start_on<O: Write, E: Write>(
    plan: &Plan,
    start: &Start,
    lock: &RunLock,
    gauges: Option<&Gauges>,
    console: &mut Console<O, E>,
    signals: &mut StopSignals,
) -> Result<Outcome, LaunchError> {
    let world = &start.world;
    let present = plan.hosts.list().len() - world.left_out.len();
    if !plan.hosts.list().is_empty() && present < plan.min_hosts.max(1) {
        let what = format!(
            "{present} of {} hosts answer, at least {} are needed (without {})",
            plan.hosts.list().len(),
            plan.min_hosts.max(1),
            world.left_out.join(", "),
        );
        let told = format!("failed: {what}; the same command goes on from the last checkpoint");
        let host = world.left_out.first().cloned();
        let finding = Finding { fault: "host", rank: None, host, step: None, place: None, what };
        return Ok(Outcome { exit: Exit::Failed, told, finding: Some(finding), asked: false });
    }
    if !world.left_out.is_empty() {
        console.err(&format!("without {}: {} ranks", world.left_out.join(", "), world.ranks));
    }
    let command = plan.command(world.ranks, &world.hosts, start.number == 0)?;
    console.err(&mpirun::shell_quoted(&command));
    let listener = Listener::open(plan.remote().first().copied(), lock.id())?;
    if !listener.address().ip().is_loopback() {
        console.err(&format!("listening for heartbeats on {}", listener.address()));
    }
    let (ranks, hang_timeout) = (world.ranks, plan.hang_timeout);
    let job = Supervised { command: &command, ranks, listener, hang_timeout, gauges };
    supervise(job, console, signals)
}

/// Machines that do not answer. Those that do end what earlier starts have left there. Machines of a
/// scheduler are its own to look after.
fn unanswered<O: Write, E: Write>(
    plan: &Plan,
    lock: &RunLock,
    agent: &Agent,
    console: &mut Console<O, E>,
) -> Vec<String> {
    if matches!(plan.hosts, Hosts::Allocated { .. }) {
        return Vec::new();
    }
    let mut left_out = Vec::new();
    for (host, answer) in agent.run_on_each(&plan.remote(), &remote_cleanup(lock.id())) {
        if let Err(why) = answer {
            console.err(&format!("host {host} does not answer: {why}"));
            left_out.push(host.to_string());
        }
    }
    left_out
}

/// Tells the gauges how a start ended.
struct Ending<'a> {
    gauges: Option<&'a Gauges>,
    metrics: PathBuf,
    /// Bytes of `metrics.jsonl` that are from before.
    before: u64,
}

impl<'a> Ending<'a> {
    fn watch(plan: &Plan, gauges: Option<&'a Gauges>, start: &Start) -> Ending<'a> {
        if let Some(gauges) = gauges {
            gauges.started(start.world.ranks, start.number > 0);
        }
        let metrics = plan.folder.join("metrics.jsonl");
        let before = std::fs::metadata(&metrics).map_or(0, |file| file.len());
        Ending { gauges, metrics, before }
    }

    fn not_the_last(&self, outcome: &Outcome) {
        if let Some(gauges) = self.gauges {
            gauges.ended(self.fault(outcome).as_deref(), false);
        }
    }

    fn last(&self, outcome: &Outcome, signals: &mut StopSignals) {
        let Some(gauges) = self.gauges else { return };
        let fault = self.fault(outcome);
        gauges.ended(fault.as_deref(), true);
        if fault.is_some() {
            gauges.linger(signals);
        }
    }

    /// In one word: what the ranks found and wrote down, or what was seen from here.
    fn fault(&self, outcome: &Outcome) -> Option<String> {
        if outcome.asked || matches!(outcome.exit, Exit::Done | Exit::Stopped) {
            return None;
        }
        let seen = outcome.finding.as_ref().map_or("error", |finding| finding.fault);
        Some(self.written_down().unwrap_or_else(|| seen.to_string()))
    }

    fn written_down(&self) -> Option<String> {
        let mut file = std::fs::File::open(&self.metrics).ok()?;
        file.seek(SeekFrom::Start(self.before)).ok()?;
        let lines = std::io::BufReader::new(file).lines().map_while(Result::ok);
        let event = serde_json::from_str::<serde_json::Value>(&lines.last()?).ok()?;
        (event["kind"] == "failure").then(|| event["fault"].as_str().map(str::to_string))?
    }
}

/// How often a run may still be started again.
#[derive(Debug)]
struct Budget {
    newest: Option<u64>,
    restarts: u32,
}

impl Budget {
    /// How long to wait for the next start; none if there is none.
    fn after_failure(&mut self, newest: Option<u64>, most: u32) -> Option<Duration> {
        if newest > self.newest {
            self.restarts = 0;
        }
        self.newest = newest;
        self.restarts += 1;
        let doubled = FIRST_WAIT * 2u32.saturating_pow((self.restarts - 1).min(16));
        (self.restarts <= most).then(|| doubled.min(LONGEST_WAIT))
    }

    fn given_up(&self, outcome: Outcome, most: u32) -> Outcome {
        if most == 0 {
            return outcome;
        }
        let told = format!("{}\ngiven up: {most} restarts brought no new checkpoint", outcome.told);
        Outcome { told, ..outcome }
    }
}

/// The step of the newest checkpoint that is complete.
fn newest_checkpoint(folder: &Path) -> Option<u64> {
    let entries = std::fs::read_dir(folder.join("checkpoints")).ok()?;
    let step = |name: String| name.strip_prefix("step-")?.parse().ok();
    entries.filter_map(|entry| step(entry.ok()?.file_name().into_string().ok()?)).max()
}

/// A line of `metrics.jsonl`.
#[derive(Debug, Serialize)]
struct RestartEvent<'a> {
    kind: &'static str,
    unix_s: u64,
    /// Restarts of this launcher.
    restart: u32,
    /// The checkpoint to go on from.
    from_step: u64,
    world_size: usize,
    left_out: &'a [String],
    #[serde(flatten)]
    finding: &'a Finding,
}

impl<'a> RestartEvent<'a> {
    fn new(finding: &'a Finding, restart: u32, newest: Option<u64>, world: &'a World) -> RestartEvent<'a> {
        let unix_s = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let (from_step, left_out) = (newest.unwrap_or(0), world.left_out.as_slice());
        RestartEvent {
            kind: "restart",
            unix_s,
            restart,
            from_step,
            world_size: world.ranks,
            left_out,
            finding,
        }
    }
}

/// Adds a line to a file of lines; half a line that a killed rank left at its end is cut off.
fn append(path: &Path, event: &impl Serialize) -> std::io::Result<()> {
    const TAIL: u64 = 1 << 16;
    let mut file = std::fs::File::options().create(true).read(true).append(true).open(path)?;
    let length = file.metadata()?.len();
    let start = length.saturating_sub(TAIL);
    file.seek(SeekFrom::Start(start))?;
    let mut tail = Vec::new();
    file.read_to_end(&mut tail)?;
    match tail.iter().rposition(|&byte| byte == b'\n') {
        Some(end) => file.set_len(start + end as u64 + 1)?,
        None if start == 0 => file.set_len(0)?,
        None => {} // a line that long is nobody's half
    }
    let mut line = serde_json::to_vec(event)?;
    line.push(b'\n');
    file.write_all(&line)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(hosts: &str, ranks: usize) -> Plan {
        Plan {
            name: "tiny".into(),
            folder: "runs/tiny".into(),
            listen: Listen::Off,
            hosts: Hosts::parse_list(hosts).unwrap(),
            ranks,
            micro_batches: 8,
            threads: 1,
            min_hosts: 1,
            max_restarts: 5,
            hang_timeout: Duration::from_secs(60),
            program: vec!["phalanx-rank".into()],
            faults: Vec::new(),
            oversubscribe: false,
            mca: Vec::new(),
        }
    }

    fn left_out(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| name.to_string()).collect()
    }

    #[test]
    fn ranks_by_default_are_a_power_of_two_that_shares_the_batch() {
        for (slots, micro_batches, ranks) in
            [(1, 8, 1), (2, 8, 2), (3, 8, 2), (16, 8, 8), (8, 12, 4), (8, 7, 1)]
        {
            let largest = largest_world(slots, micro_batches);
            assert_eq!(largest, ranks, "{slots} slots, {micro_batches} micro-batches");
        }
    }

    #[test]
    fn a_host_that_is_gone_is_replaced_by_spare_slots_or_makes_the_world_smaller() {
        let plan = plan("a:2,b:2,c:2", 4);
        assert_eq!(plan.world(Vec::new()).hosts, plan.hosts);
        let one = plan.world(left_out(&["b"]));
        assert_eq!((one.ranks, one.hosts), (4, Hosts::parse_list("a:2,c:2").unwrap()));
        let two = plan.world(left_out(&["b", "c"]));
        assert_eq!((two.ranks, two.hosts), (2, Hosts::parse_list("a:2").unwrap()));
    }

    #[test]
    fn restarts_are_counted_from_the_last_new_checkpoint_and_wait_longer_each_time() {
        let mut budget = Budget { newest: None, restarts: 0 };
        let seconds = |wait: Option<Duration>| wait.map(|wait| wait.as_secs());
        for (newest, wait) in
            [(None, Some(1)), (None, Some(2)), (Some(20), Some(1)), (Some(20), Some(2)), (Some(20), Some(4))]
        {
            assert_eq!(seconds(budget.after_failure(newest, 3)), wait);
        }
        assert_eq!(budget.after_failure(Some(20), 3), None);
        assert_eq!(seconds(budget.after_failure(Some(40), 3)), Some(1));
        assert_eq!(Budget { newest: None, restarts: 0 }.after_failure(None, 0), None);
        let mut long = Budget { newest: None, restarts: 40 };
        assert_eq!(seconds(long.after_failure(None, 100)), Some(60));
    }

    #[test]
    fn faults_that_are_over_are_not_brought_about_again() {
        let faults = ["panic@step=5,rank=1", "slow@ms=5,rank=0"].map(|fault| fault.parse().unwrap()).to_vec();
        let plan = Plan { faults, ..plan("localhost:2", 2) };
        let told = |first| mpirun::shell_quoted(&plan.command(2, &plan.hosts, first).unwrap());
        assert!(told(true).contains("panic@step=5,rank=1"));
        assert!(!told(false).contains("panic") && told(false).contains("slow"), "{}", told(false));
    }

    #[test]
    fn the_newest_checkpoint_is_the_highest_complete_one() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(newest_checkpoint(folder.path()), None);
        for name in ["step-00000020", "step-00000100", "step-00000120.tmp", "other"] {
            std::fs::create_dir_all(folder.path().join("checkpoints").join(name)).unwrap();
        }
        assert_eq!(newest_checkpoint(folder.path()), Some(100));
    }

    #[test]
    fn a_restart_is_one_line_behind_whole_lines() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        std::fs::write(&path, "{\"kind\":\"start\"}\n{\"kind\":\"st").unwrap();
        let what = "rank 1 on b was ended by signal 9".to_string();
        let finding = Finding { fault: "dead", rank: Some(1), host: None, step: Some(21), place: None, what };
        let world = plan("a:2,b:2", 4).world(left_out(&["b"]));
        append(&path, &RestartEvent::new(&finding, 2, Some(20), &world)).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        let lines: Vec<serde_json::Value> =
            text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines.len(), 2);
        let restart = &lines[1];
        assert_eq!((&restart["kind"], &restart["fault"]), (&"restart".into(), &"dead".into()));
        assert_eq!((restart["rank"].as_u64(), restart["world_size"].as_u64()), (Some(1), Some(2)));
        assert_eq!((restart["from_step"].as_u64(), &restart["left_out"][0]), (Some(20), &"b".into()));
    }
}
