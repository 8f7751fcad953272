//! Chaos: a run to which everything happens, in an order that a seed chooses, ends with the weights of one
//! that was left alone, bit for bit; each fault is named, no process and no file is left over.
//!
//! `PHALANX_CHAOS_SEED` and `PHALANX_CHAOS_FAULTS` choose another order and another number of faults. Three
//! nodes with two slots each are network namespaces, which need root; without it a test says so and passes.

use crate::Bench;
use crate::damage::{cut_in_half, flip_a_bit};
use crate::left::{Left, assert_same};
use crate::support::{Command, Nodes, Running, phalanx};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// A checkpoint every 5 steps, so that little is done again, and 6 s until ranks hang.
const OFTEN: &str = "--set checkpoint.every_steps=5 --set guard.hang_timeout_s=6 --set eval.every_steps=0";

/// A tenth of a second a step, so that there is time for something to happen.
const SLOWLY: &str = "--allow-faults --inject slow@ms=80,rank=0";

/// Steps from one fault to the next.
const GAP: u64 = 12;

/// How long each fault may take to be named.
const KILLED: Duration = Duration::from_secs(10);
const STOPPED: Duration = Duration::from_secs(6 + 5);
const CUT: Duration = Duration::from_secs(15);

/// What happens to a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    RankKilled,
    RankStopped,
    RankPanics,
    LauncherKilled,
    MpirunKilled,
    KilledWhileSaving,
    CheckpointTruncated,
    BitFlipped,
    DiskFull,
    DaemonKilled,
    LinkDownForAMoment,
    NodeGone,
    TwoNodesGone,
}

const ON_ONE_HOST: &[Fault] = &[
    Fault::RankKilled,
    Fault::RankStopped,
    Fault::LauncherKilled,
    Fault::MpirunKilled,
    Fault::KilledWhileSaving,
    Fault::CheckpointTruncated,
    Fault::BitFlipped,
];

const ON_NODES: &[Fault] = &[
    Fault::RankKilled,
    Fault::RankStopped,
    Fault::RankPanics,
    Fault::LauncherKilled,
    Fault::MpirunKilled,
    Fault::KilledWhileSaving,
    Fault::CheckpointTruncated,
    Fault::BitFlipped,
    Fault::DiskFull,
    Fault::DaemonKilled,
    Fault::LinkDownForAMoment,
    Fault::NodeGone,
    Fault::TwoNodesGone,
];

/// Numbers in an order that a seed decides: xorshift (Marsaglia 2003).
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % end as u64) as usize
    }
}

/// So many faults: every kind in turn, each turn in an order of its own.
fn order(kinds: &[Fault], count: usize, random: &mut Random) -> Vec<Fault> {
    let mut faults = Vec::new();
    while faults.len() < count {
        let mut turn = kinds.to_vec();
        while !turn.is_empty() {
            faults.push(turn.swap_remove(random.below(turn.len())));
        }
    }
    faults.truncate(count);
    faults
}

/// A small disk in the place of a folder, while it lives.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(folder: PathBuf) -> SmallDisk {
        fs::create_dir_all(&folder).unwrap();
        let mount = ["-t", "tmpfs", "-o", "size=192m", "tmpfs"];
        Command::new("mount").args(mount).args([&folder]).run().expect_code(0);
        SmallDisk(folder)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        Command::new("umount").args([&self.0]).run();
    }
}

/// A run that is being disturbed.
struct Chaos {
    bench: Bench,
    nodes: Option<Nodes>,
    ranks: usize,
    max_steps: u64,
    job: Running,
    random: Random,
    timings: Vec<String>,
}

impl Chaos {
    fn start(bench: Bench, nodes: Option<Nodes>, max_steps: u64, random: Random) -> Chaos {
        let ranks = if nodes.is_some() { 4 } else { 2 };
        let job = launch(&bench, nodes.as_ref(), ranks, max_steps, "");
        Chaos { bench, nodes, ranks, max_steps, job, random, timings: Vec::new() }
    }

    fn left(&self) -> Left {
        self.bench.left("disturbed")
    }

    fn checkpoints(&self) -> PathBuf {
        self.left().folder().join("checkpoints")
    }

    /// How many starts have told of themselves, and the newest step of the last.
    fn starts_and_step(&self) -> (usize, u64) {
        let text = fs::read_to_string(self.left().folder().join("metrics.jsonl")).unwrap_or_default();
        let events = text.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
        events.fold((0, 0), |(starts, step), event| match event["kind"].as_str() {
            Some("start") => (starts + 1, 0),
            Some("step") => (starts, event["step"].as_u64().unwrap_or(0)),
            _ => (starts, step),
        })
    }

    /// Waits until the run has come to a step.
    fn come_to(&mut self, step: u64) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while self.starts_and_step().1 < step {
            assert!(Instant::now() < deadline, "no step {step} in a minute\n{}", self.job.output());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Brings a fault about and waits until it is named.
    fn befall(&mut self, fault: Fault) {
        let ranks = self.job.ranks();
        let rank = ranks[self.random.below(ranks.len())];
        let said = self.job.said().len();
        let (starts, _) = self.starts_and_step();
        let began = Instant::now();
        let (told, limit): (Vec<String>, Duration) = match fault {
            Fault::RankKilled => {
                self.job.signal_rank(rank, "KILL");
                (vec![format!("rank {rank} on "), "signal 9".into()], KILLED)
            }
            Fault::RankStopped => {
                self.job.signal_rank(rank, "STOP");
                (vec![format!("rank {rank} on "), "has not been heard of".into()], STOPPED)
            }
            Fault::MpirunKilled => {
                self.job.signal_member("mpirun", "KILL");
                (vec!["mpirun was ended by signal 9".into()], KILLED)
            }
            Fault::RankPanics => {
                // A panic has to be asked for at the start, so the launcher goes first.
                let (starts, step) = self.starts_and_step();
                self.kill_launcher(&format!("--inject panic@step={},rank={rank}", step + 2));
                let told = [format!("failed: rank {rank} ended the job with code 1")];
                self.named(fault, 0, &told, Instant::now(), KILLED);
                return self.started_again(starts + 1);
            }
            Fault::LauncherKilled => return self.kill_launcher(""),
            Fault::KilledWhileSaving => {
                self.wait_while_saving();
                self.job.signal_rank(rank, "KILL");
                (vec![format!("rank {rank} on "), "signal 9".into()], KILLED)
            }
            Fault::CheckpointTruncated => (self.damage(rank, cut_in_half), KILLED),
            Fault::BitFlipped => (self.damage(rank, flip_a_bit), KILLED),
            Fault::DiskFull => return self.fill_disk(),
            Fault::DaemonKilled => {
                self.job.signal_member("orted", "KILL");
                (vec!["failed: ".into()], KILLED)
            }
            Fault::LinkDownForAMoment => return self.cut_for_a_moment(),
            Fault::NodeGone => return self.lose_nodes(fault, &[1]),
            Fault::TwoNodesGone => return self.lose_nodes(fault, &[1, 2]),
        };
        self.named(fault, said, &told, began, limit);
        self.started_again(starts);
    }

    /// Waits for a start beyond so many: what befalls a run next is to find one that goes on.
    fn started_again(&mut self, starts: usize) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while self.starts_and_step().0 <= starts {
            assert!(Instant::now() < deadline, "it does not start again\n{}", self.job.output());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Waits until the launcher has said all of `told` since it had said `said` bytes.
    fn named(&mut self, fault: Fault, said: usize, told: &[String], began: Instant, limit: Duration) {
        let missing = |job: &Running| {
            let text = job.said();
            told.iter().find(|told| !text[said..].contains(told.as_str())).cloned()
        };
        let first = |job: &Running| job.said()[said..].contains(told[0].as_str());
        let mut seen = None;
        let patience = Duration::from_secs(45);
        while let Some(missing) = missing(&self.job) {
            if seen.is_none() && first(&self.job) {
                seen = Some(began.elapsed());
            }
            assert!(began.elapsed() < patience, "{fault:?}: no {missing:?}\n{}", self.job.output());
            std::thread::sleep(Duration::from_millis(20));
        }
        let seen = seen.unwrap_or_else(|| began.elapsed());
        self.timings.push(format!("{fault:?} {:.1} s", seen.as_secs_f64()));
        assert!(seen < limit, "{fault:?} was named after {seen:?}, expected within {limit:?}");
    }

    /// Cuts nodes off, whose ranks others take: spare slots, or fewer ranks. Then they come back, and the next
    /// restart takes them in again.
    fn lose_nodes(&mut self, fault: Fault, nodes: &[usize]) {
        let (said, (starts, _), began) = (self.job.said().len(), self.starts_and_step(), Instant::now());
        nodes.iter().for_each(|&node| self.nodes().link(node, false));
        let names: Vec<String> = nodes.iter().map(|&node| self.nodes().name(node)).collect();
        let ranks = if nodes.len() == 1 { 4 } else { 2 };
        let told = ["failed: host ".into(), format!("without {}: {ranks} ranks", names.join(", "))];
        self.named(fault, said, &told, began, CUT);
        self.started_again(starts);
        nodes.iter().for_each(|&node| self.nodes().link(node, true));

        let (said, (starts, _), began) = (self.job.said().len(), self.starts_and_step(), Instant::now());
        self.job.signal_rank(0, "KILL");
        let told = ["signal 9".into(), format!("mpirun -n 4 --host {} ", hosts(self.nodes()))];
        self.named(Fault::RankKilled, said, &told, began, KILLED);
        self.started_again(starts);
    }

    /// Kills the launcher and gives the same command again, with `faults` ahead.
    fn kill_launcher(&mut self, faults: &str) {
        self.job.signal("KILL");
        let next = launch(&self.bench, self.nodes.as_ref(), self.ranks, self.max_steps, faults);
        let before = std::mem::replace(&mut self.job, next);
        self.job.wait_for("going on from", 1);
        assert!(before.alone(), "a killed launcher's processes were left");
    }

    fn wait_while_saving(&self) {
        let deadline = Instant::now() + Duration::from_secs(30);
        let saving = || {
            let names = fs::read_dir(self.checkpoints()).into_iter().flatten().flatten();
            names.map(|entry| entry.file_name()).any(|name| name.to_string_lossy().ends_with(".tmp"))
        };
        while !saving() {
            assert!(Instant::now() < deadline, "no checkpoint was begun\n{}", self.job.output());
        }
    }

    /// Kills a rank, and damages a file of the newest checkpoint before the next start reads it.
    fn damage(&mut self, rank: usize, damage: fn(&Path)) -> Vec<String> {
        self.job.signal_rank(rank, "KILL");
        self.job.signal_member("mpirun", "KILL");
        std::thread::sleep(Duration::from_millis(200));
        let newest = newest(&self.checkpoints());
        damage(&newest.join("rank-00000.safetensors"));
        let name = newest.file_name().unwrap().to_string_lossy().into_owned();
        vec!["failed: ".into(), format!("{name} is damaged")]
    }

    /// Fills the disk of the checkpoints until a save has failed.
    fn fill_disk(&mut self) {
        let (began, said) = (Instant::now(), self.job.said().len());
        let filler = self.checkpoints().join("filler");
        let _ = Command::new("sh")
            .args(["-c", &format!("head -c 1G /dev/zero > {} 2>/dev/null; true", filler.display())])
            .run();
        self.named(Fault::DiskFull, said, &["no checkpoint of step".into()], began, KILLED);
        fs::remove_file(filler).unwrap();
    }

    fn cut_for_a_moment(&mut self) {
        self.nodes().link(1, false);
        std::thread::sleep(Duration::from_secs(3));
        self.nodes().link(1, true);
        let (_, step) = self.starts_and_step();
        // Whether it goes on or is started again: it gets further.
        self.come_to(step + 2);
    }

    fn nodes(&self) -> &Nodes {
        self.nodes.as_ref().expect("only nodes have links")
    }

    /// Waits for the end, and expects that nothing is left.
    fn end(self) -> (Bench, Vec<String>) {
        let Chaos { bench, nodes, job, timings, .. } = self;
        let done = job.finish().expect_code(0);
        assert_eq!(done.survivors, Vec::<String>::new());
        let run = bench.left("disturbed");
        let left_over: Vec<PathBuf> = files(run.folder())
            .into_iter()
            .filter(|path| path.to_string_lossy().contains(".tmp") || path.ends_with("filler"))
            .collect();
        assert_eq!(left_over, Vec::<PathBuf>::new());
        drop(nodes);
        (bench, timings)
    }
}

/// `phalanx train`, on the first node if there are nodes.
fn launch(bench: &Bench, nodes: Option<&Nodes>, ranks: usize, max_steps: u64, faults: &str) -> Running {
    let arguments =
        format!("{OFTEN} {SLOWLY} {faults} --set schedule.max_steps={max_steps} --max-restarts 20");
    let command = match nodes {
        None => bench.train_on("disturbed", ranks, &arguments),
        Some(nodes) => nodes
            .run(0, &phalanx())
            .args(["train", "tiny.toml", "-n", &ranks.to_string(), "--hosts", &hosts(nodes)])
            .args(["--set", "run.name=disturbed", "--mca", &nodes.agent()])
            .args(["--mca", "oob_tcp_if_include=eth0", "--mca", "btl_tcp_if_include=eth0"])
            .args(["--mca", "plm_rsh_no_tree_spawn=1"])
            .args(arguments.split_whitespace())
            .current_dir(bench.scratch.path()),
    };
    command.deadline(Duration::from_secs(900)).start()
}

/// The three nodes with two slots each.
fn hosts(nodes: &Nodes) -> String {
    let hosts: Vec<String> = (0..3).map(|node| format!("{}:2", nodes.name(node))).collect();
    hosts.join(",")
}

fn newest(checkpoints: &Path) -> PathBuf {
    let names = fs::read_dir(checkpoints).unwrap().flatten().map(|entry| entry.path());
    let complete = |path: &PathBuf| {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        name.starts_with("step-") && !name.ends_with(".tmp")
    };
    names.filter(complete).max().expect("there is a checkpoint")
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap().flatten() {
        found.push(entry.path());
        if entry.path().is_dir() {
            found.extend(files(&entry.path()));
        }
    }
    found
}

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).ok().and_then(|value| value.parse().ok()).unwrap_or(default)
}

/// Lets `faults` faults happen to a run, and compares it with one to which none did.
fn disturbed_equals_undisturbed(name: &str, nodes: Option<Nodes>, faults: usize) {
    let seed = number("PHALANX_CHAOS_SEED", 1);
    let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let kinds = if nodes.is_some() { ON_NODES } else { ON_ONE_HOST };
    let order = order(kinds, faults, &mut random);
    let max_steps = 10 + GAP * (faults as u64 + 1);
    let bench = Bench::new(name, max_steps);
    let undisturbed = format!("{OFTEN} --set schedule.max_steps={max_steps}");
    let whole = bench.trained("undisturbed", 1, &undisturbed);
    let disk = nodes.as_ref().map(|_| SmallDisk::mount(bench.left("disturbed").folder().join("checkpoints")));

    let mut chaos = Chaos::start(bench, nodes, max_steps, random);
    for (number, fault) in (1..).zip(order) {
        chaos.come_to(GAP * number);
        chaos.befall(fault);
    }
    let (bench, timings) = chaos.end();
    let disturbed = bench.left("disturbed");
    disturbed.assert_repeats_agree();
    assert_same(&whole, &disturbed, max_steps);
    drop(disk);
    use std::io::Write;
    let _ = writeln!(std::io::stderr(), "seed {seed}: {}", timings.join(", "));
}

#[test]
fn a_run_that_is_killed_stopped_and_damaged_equals_one_that_is_left_alone() {
    disturbed_equals_undisturbed("chaos", None, 7);
}

mod whole_table {
    use super::*;

    #[test]
    fn on_three_nodes_whatever_happens_the_weights_are_those_of_an_undisturbed_run() {
        let Some(nodes) = Nodes::up(3, None) else { return };
        disturbed_equals_undisturbed("chaos-nodes", Some(nodes), number("PHALANX_CHAOS_FAULTS", 30) as usize);
    }
}
