//! `phalanx doctor`: what a run needs of machines, tried out one thing after the other, each with a verdict
//! and, where it is not well, what to do about it.
//! Knows commands and thresholds; what only ranks can see they tell as JSON.

use crate::agent::{Agent, is_this_machine};
use crate::mpirun::{self, Job};
use crate::{Host, Hosts, allocation, listen};
use anyhow::Result;
use clap::Args;
use configs::Exit;
use std::io::Write;
use std::process::Command;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// `phalanx doctor`
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// Hosts and their slots, like a:4,b:4 [default: this machine and its cores].
    #[arg(long, value_name = "LIST", conflicts_with = "hostfile")]
    pub hosts: Option<String>,
    /// File of hosts in Open MPI's form: one `host slots=4` per line.
    #[arg(long, value_name = "FILE")]
    pub hostfile: Option<String>,
    /// Parameter of Open MPI, like btl_tcp_if_include=eth0.
    #[arg(long, value_name = "KEY=VALUE")]
    pub mca: Vec<String>,
}

/// Clocks further apart than this make logs hard to read.
const MOST_SKEW_S: f64 = 1.0;
/// Memory below this holds no model worth training.
const LEAST_MEMORY_BYTES: u64 = 2 << 30;
/// What a link of 1 Gbit/s carries.
const SLOW_GIGABYTES_PER_SECOND: f64 = 0.12;
/// A barrier that takes longer than this between two machines costs a step noticeably.
const LONG_BARRIER_US: f64 = 2000.0;
/// Pairs of machines that are measured; more would take long.
const MOST_PAIRS: usize = 28;

/// How something is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Verdict {
    Good,
    Note,
    Bad,
}

/// One thing that was tried.
#[derive(Debug)]
struct Finding {
    verdict: Verdict,
    what: String,
    hint: Option<&'static str>,
}

fn good(what: impl Into<String>) -> Finding {
    Finding { verdict: Verdict::Good, what: what.into(), hint: None }
}

fn note(what: impl Into<String>, hint: &'static str) -> Finding {
    Finding { verdict: Verdict::Note, what: what.into(), hint: Some(hint) }
}

fn bad(what: impl Into<String>, hint: &'static str) -> Finding {
    Finding { verdict: Verdict::Bad, what: what.into(), hint: Some(hint) }
}

/// Looks at everything and prints it as it is found. 0 if a run can start, 2 if something is in its way.
///
/// # Errors
/// Hosts that do not parse.
pub fn run(args: &DoctorArgs) -> Result<Exit> {
    let hosts = match (&args.hosts, &args.hostfile) {
        (Some(list), _) => Hosts::parse_list(list)?,
        (None, Some(file)) => Hosts::read_file(file)?,
        (None, None) => {
            let env = |name: &str| std::env::var(name).ok();
            allocation::from_environment(env, is_this_machine)?.unwrap_or_else(Hosts::this_machine)
        }
    };
    let mut report = Report { worst: Verdict::Good };
    let has_mpi = report.tell(mpi());
    report.tell(transports());
    report.tell(slots(&hosts));
    report.tell(memory("this machine", &std::fs::read_to_string("/proc/meminfo").unwrap_or_default()));
    let agent = Agent::of_mpirun(&args.mca, |name| std::env::var(name).ok());
    let remote: Vec<&str> = hosts.list().iter().map(|host| host.name.as_str()).collect();
    let remote: Vec<&str> = remote.into_iter().filter(|name| !is_this_machine(name)).collect();
    let answering = look_at_machines(&agent, &remote, &mut report)?;
    let rank = mpirun::rank_binary()?;
    if has_mpi {
        let unreachable: Vec<String> =
            remote.iter().filter(|host| !answering.contains(host)).map(|host| host.to_string()).collect();
        look_at_ranks(&hosts.without(&unreachable), &rank, &args.mca, &mut report);
    }
    Ok(if report.worst == Verdict::Bad { Exit::UserError } else { Exit::Done })
}

struct Report {
    worst: Verdict,
}

impl Report {
    /// Prints a finding. Returns whether it is not bad.
    fn tell(&mut self, finding: Finding) -> bool {
        let word = match finding.verdict {
            Verdict::Good => "ok     ",
            Verdict::Note => "note   ",
            Verdict::Bad => "PROBLEM",
        };
        let mut out = std::io::stdout().lock();
        let _ = writeln!(out, "{word}  {}", finding.what);
        if let Some(hint) = finding.hint {
            let _ = writeln!(out, "         hint: {hint}");
        }
        self.worst = self.worst.max(finding.verdict);
        finding.verdict != Verdict::Bad
    }
}

/// The first line that a command prints, if it ends well.
fn first_line(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    output.status.success().then(|| text.lines().next().unwrap_or_default().to_string())
}

fn mpi() -> Finding {
    match first_line("mpirun", &["--version"]) {
        Some(version) if version.contains("Open MPI") => good(version),
        Some(version) => bad(
            format!("mpirun is {version:?}, not Open MPI"),
            "put Open MPI's mpirun first on PATH; others name ranks and forward signals in their own ways",
        ),
        None => bad(
            "mpirun was not found or does not run",
            "install Open MPI (Debian and Ubuntu: apt-get install openmpi-bin)",
        ),
    }
}

fn transports() -> Finding {
    let output = Command::new("ompi_info").args(["--parsable", "--level", "1"]).output();
    let Ok(output) = output else {
        return note("ompi_info is not there, transports are not known", "it comes with Open MPI's tools");
    };
    let text = String::from_utf8_lossy(&output.stdout);
    let mut names: Vec<&str> = text
        .lines()
        .filter_map(|line| line.strip_prefix("mca:btl:").or_else(|| line.strip_prefix("mca:mtl:")))
        .filter_map(|rest| rest.split(':').next())
        .collect();
    names.sort_unstable();
    names.dedup();
    good(format!("transports of Open MPI: {}", names.join(", ")))
}

fn slots(hosts: &Hosts) -> Finding {
    match hosts.slots(1) {
        Some(slots) => good(format!("{slots} slots ({})", hosts.describe(1))),
        None => note("not every host has its slots stated", "write slots=N behind every host"),
    }
}

/// What /proc/meminfo says is available.
fn memory(whose: &str, meminfo: &str) -> Finding {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
    match kib.map(|kib| kib * 1024) {
        Some(bytes) if bytes < LEAST_MEMORY_BYTES => {
            note(format!("{whose}: {} of memory are free", gib(bytes)), "end what else runs there")
        }
        Some(bytes) => good(format!("{whose}: {} of memory are free", gib(bytes))),
        None => note(format!("{whose}: free memory is not known"), "/proc/meminfo tells it on Linux"),
    }
}

fn gib(bytes: u64) -> String {
    format!("{:.1} GiB", bytes as f64 / (1u64 << 30) as f64)
}

/// Reachability, clock, memory, the shared folder and the binary of each machine. Returns those that answer.
fn look_at_machines<'a>(agent: &Agent, remote: &[&'a str], report: &mut Report) -> Result<Vec<&'a str>> {
    if remote.is_empty() {
        return Ok(Vec::new());
    }
    let folder = std::env::current_dir()?;
    let mark = listen::random()?[..8].iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let file = folder.join(format!(".phalanx-doctor-{mark}"));
    std::fs::write(&file, &mark)?;
    let rank = mpirun::rank_binary()?;
    let quoted = |text: &str| mpirun::shell_quoted(&[text.to_string()]);
    let command = format!(
        "echo clock $(date +%s.%N); echo shared $(cat {} 2>/dev/null); \
         echo binary $(cksum < {} 2>/dev/null); mpirun --version 2>/dev/null | head -n 1; cat /proc/meminfo",
        quoted(&file.display().to_string()),
        quoted(&rank),
    );
    let own_binary = first_line("sh", &["-c", &format!("cksum < {}", quoted(&rank))]).unwrap_or_default();
    let own_mpi = first_line("mpirun", &["--version"]).unwrap_or_default();
    let mut answering = Vec::new();
    for &host in remote {
        let (began, before) = (Instant::now(), now_s());
        match agent.run(host, &command) {
            Err(why) => drop(report.tell(bad(
                format!("{host} does not answer: {why}"),
                "ssh to it must work without a password (ssh-copy-id), or name another agent with \
                 --mca plm_rsh_agent=…",
            ))),
            Ok(said) => {
                answering.push(host);
                let took = began.elapsed().as_secs_f64();
                report.tell(good(format!("{host} answers ({:.0} ms)", took * 1e3)));
                let seen = Machine { host, said: &said };
                report.tell(seen.clock(before, took));
                report.tell(seen.shared(&mark));
                report.tell(seen.binary(&own_binary));
                report.tell(seen.mpi(&own_mpi));
                report.tell(memory(host, &said));
            }
        }
    }
    std::fs::remove_file(&file)?;
    Ok(answering)
}

fn now_s() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

/// What another machine said.
struct Machine<'a> {
    host: &'a str,
    said: &'a str,
}

impl Machine<'_> {
    fn word(&self, name: &str) -> &str {
        let line = self.said.lines().find_map(|line| line.strip_prefix(name));
        line.map_or("", str::trim)
    }

    /// `before` is when it was asked, `took` how long the answer took: its clock was read within that.
    fn clock(&self, before: f64, took: f64) -> Finding {
        let Ok(theirs) = self.word("clock ").parse::<f64>() else {
            return note(format!("{}: its clock is not known", self.host), "date +%s.%N tells it");
        };
        let skew = (theirs - before - took / 2.0).abs() - took / 2.0;
        match skew {
            skew if skew > MOST_SKEW_S => note(
                format!("{}: its clock is {skew:.1} s off", self.host),
                "let both follow a time server (chrony); training does not depend on it, reading logs does",
            ),
            _ => good(format!("{}: its clock agrees within {:.1} s", self.host, took.max(0.1))),
        }
    }

    fn shared(&self, mark: &str) -> Finding {
        let host = self.host;
        if self.word("shared ") == mark {
            return good(format!("{host}: this folder is shared"));
        }
        bad(
            format!("{host}: this folder is not the same there"),
            "start from a folder that all hosts have under the same path: data, configuration and run folder \
             are read and written there",
        )
    }

    fn binary(&self, own: &str) -> Finding {
        let host = self.host;
        match self.word("binary ") {
            "" => bad(
                format!("{host}: phalanx-rank is not there"),
                "it belongs under the same path on every host; make dist packs what a host needs",
            ),
            theirs if theirs == own => good(format!("{host}: the same phalanx-rank")),
            _ => bad(format!("{host}: another phalanx-rank"), "copy the same build to every host"),
        }
    }

    fn mpi(&self, own: &str) -> Finding {
        let host = self.host;
        match self.said.lines().find(|line| line.contains("Open MPI")) {
            Some(theirs) if theirs == own => good(format!("{host}: the same Open MPI")),
            Some(theirs) => bad(format!("{host}: {theirs}"), "have the same Open MPI on every host"),
            None => bad(
                format!("{host}: no mpirun is found by a command that comes over the agent"),
                "put Open MPI on the PATH of shells that are not interactive (~/.bashrc above its early return)",
            ),
        }
    }
}

/// What ranks find: on each machine, and between each two of them.
fn look_at_ranks(hosts: &Hosts, rank: &str, mca: &[String], report: &mut Report) {
    let all: Vec<Host> = hosts.list().iter().map(|host| Host { slots: Some(1), ..host.clone() }).collect();
    let pairs: Vec<(usize, usize)> =
        (0..all.len()).flat_map(|a| (a + 1..all.len()).map(move |b| (a, b))).collect();
    if pairs.is_empty() {
        let alone = if all.is_empty() { Hosts::this_machine() } else { Hosts::Listed(all) };
        let ranks = if hosts.slots(1).unwrap_or(1) > 1 { 2 } else { 1 };
        return tell_of_ranks("ranks", ranks, &alone, rank, mca, report);
    }
    for &(a, b) in pairs.iter().take(MOST_PAIRS) {
        let two = Hosts::Listed(vec![all[a].clone(), all[b].clone()]);
        let between = format!("{} - {}", all[a].name, all[b].name);
        tell_of_ranks(&between, 2, &two, rank, mca, report);
    }
    if pairs.len() > MOST_PAIRS {
        let left = pairs.len() - MOST_PAIRS;
        report.tell(note(format!("{left} more pairs were not measured"), "name fewer hosts to see them"));
    }
}

fn tell_of_ranks(
    between: &str,
    ranks: usize,
    hosts: &Hosts,
    rank: &str,
    mca: &[String],
    report: &mut Report,
) {
    let program = [rank.to_string(), "doctor".to_string()];
    let command = mpirun::mpirun_command(&Job {
        ranks,
        hosts,
        several: hosts.list().len() > 1,
        tagged: true,
        oversubscribe: true,
        as_root: rustix::process::geteuid().is_root(),
        mca,
        program: &program,
    });
    let output =
        command.ok().and_then(|command| Command::new("timeout").arg("60").args(&command).output().ok());
    let Some(output) = output.filter(|output| output.status.success()) else {
        report.tell(bad(
            format!("{between}: ranks do not start or do not end there"),
            "phalanx train --dry-run prints the mpirun command to try by hand; between machines, firewalls must \
             let TCP through, and --mca btl_tcp_if_include=eth0 chooses the network",
        ));
        return;
    };
    let text = String::from_utf8_lossy(&output.stdout);
    let json = text.lines().filter_map(|line| line.get(line.find('{')?..));
    let told: Vec<serde_json::Value> = json.filter_map(|line| serde_json::from_str(line).ok()).collect();
    for one in &told {
        of_one_rank(one, report);
    }
    if let Some(first) = told.first().filter(|first| first["world_size"].as_u64() > Some(1)) {
        let (us, rate) = (
            first["barrier_us"].as_f64().unwrap_or(0.0),
            first["gigabytes_per_second"].as_f64().unwrap_or(0.0),
        );
        let what = format!("{between}: a barrier takes {us:.0} us, {rate:.2} GB/s from one to the other");
        let finding = match (us > LONG_BARRIER_US, rate < SLOW_GIGABYTES_PER_SECOND) {
            (false, false) => good(what),
            (_, true) => {
                note(what, "slower than 1 Gbit/s: look at the network it takes (btl_tcp_if_include)")
            }
            (true, false) => note(what, "long: more ranks than cores, or a busy network"),
        };
        report.tell(finding);
    }
}

fn of_one_rank(one: &serde_json::Value, report: &mut Report) {
    let text = |key: &str| one[key].as_str().unwrap_or("?").to_string();
    let host = text("host");
    if one["libtorch"] == true {
        report.tell(good(format!(
            "{host}: libtorch computes; CUDA: {}; NCCL: {}",
            text("cuda"),
            text("nccl")
        )));
    } else {
        report.tell(bad(format!("{host}: libtorch computes nonsense"), "install it again: scripts/setup"));
    }
    for failed in one["failed"].as_array().into_iter().flatten() {
        let what = format!("{host}: a collective does not do what it should: {failed}");
        report.tell(bad(what, "try another transport: --mca btl=tcp,self,vader"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAID: &str = "clock 1000.5\nshared abc\nbinary 123 456\nmpirun (Open MPI) 4.1.4\n\
                        MemTotal: 8 kB\nMemAvailable: 4194304 kB\n";

    #[test]
    fn a_machine_that_is_like_this_one_is_well() {
        let machine = Machine { host: "b", said: SAID };
        for finding in [
            machine.clock(1000.4, 0.2),
            machine.shared("abc"),
            machine.binary("123 456"),
            machine.mpi("mpirun (Open MPI) 4.1.4"),
            memory("b", SAID),
        ] {
            assert_eq!(finding.verdict, Verdict::Good, "{finding:?}");
        }
        assert_eq!(memory("b", SAID).what, "b: 4.0 GiB of memory are free");
    }

    #[test]
    fn what_is_not_well_comes_with_a_hint() {
        let machine = Machine { host: "b", said: SAID };
        let silent = Machine { host: "b", said: "clock \nshared \nbinary \n" };
        let findings = [
            (machine.clock(900.0, 0.2), Verdict::Note),
            (machine.shared("other"), Verdict::Bad),
            (machine.binary("9 9"), Verdict::Bad),
            (machine.mpi("mpirun (Open MPI) 5.0.1"), Verdict::Bad),
            (silent.clock(0.0, 0.1), Verdict::Note),
            (silent.binary("9 9"), Verdict::Bad),
            (silent.mpi("x"), Verdict::Bad),
            (memory("b", "MemAvailable: 1024 kB"), Verdict::Note),
        ];
        for (finding, verdict) in findings {
            assert_eq!(finding.verdict, verdict, "{finding:?}");
            assert!(finding.hint.is_some(), "{finding:?}");
        }
    }
}
