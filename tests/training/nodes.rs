//! Several machines, made of network namespaces: over a plain agent and over an ssh daemon on each, runs train,
//! save and go on, and what they say crosses the link. Without root, or without sshd, a test says so and
//! passes.

use crate::Bench;
use crate::left::assert_same;
use crate::support::{Command, Nodes, Running, phalanx};
use std::time::Duration;

/// The rate of the whole run also while only half of it is asked for: 40 steps of 512 tokens.
const SAVING: &str =
    "--set checkpoint.every_steps=10 --set eval.every_steps=0 --set schedule.decay_tokens=20480";

/// `phalanx train` on the first of `count` nodes with two slots each.
fn train(bench: &Bench, nodes: &Nodes, count: usize, run: &str, agent: &str, arguments: &str) -> Command {
    let hosts: Vec<String> = (0..count).map(|node| format!("{}:2", nodes.name(node))).collect();
    nodes
        .run(0, &phalanx())
        .args(["train", "tiny.toml", "--hosts", &hosts.join(","), "--set", &format!("run.name={run}")])
        .args(["--mca", agent, "--mca", "oob_tcp_if_include=eth0", "--mca", "btl_tcp_if_include=eth0"])
        .args(["--mca", "plm_rsh_no_tree_spawn=1"])
        .args(SAVING.split_whitespace().chain(arguments.split_whitespace()))
        .current_dir(bench.scratch.path())
}

/// Bytes that a node's network interface has sent.
fn sent_bytes(nodes: &Nodes, node: usize) -> u64 {
    let file = "/sys/class/net/eth0/statistics/tx_bytes";
    let said = nodes.run(node, "cat".as_ref()).args([file]).run().expect_code(0).stdout;
    said.trim().parse().unwrap()
}

/// Trains half, stops, goes on, and compares with one rank alone.
fn trains_saves_and_goes_on(bench: &Bench, nodes: &Nodes, count: usize, run: &str, agent: &str) {
    let half = train(bench, nodes, count, run, agent, "--set schedule.max_steps=20");
    half.run().expect_code(0).expect_stderr(&["listening for heartbeats on 10."]);
    let before = sent_bytes(nodes, 1);
    let told = ["going on from ", " at step 20"];
    let done = train(bench, nodes, count, run, agent, "").run().expect_code(0).expect_stderr(&told);
    assert_eq!(done.survivors, Vec::<String>::new());
    // Every step's gradient crosses at least once: 20 steps of more than 33,000 parameters of 4 bytes.
    let crossed = sent_bytes(nodes, 1) - before;
    assert!(crossed > 20 * 33_000 * 4 / 2, "{crossed} bytes have left the second node");
}

#[test]
fn on_two_nodes_over_a_plain_agent_a_run_goes_on_and_has_the_bits_of_one_rank() {
    let Some(nodes) = Nodes::up(2, None) else { return };
    let bench = Bench::new("two-nodes", 40);
    trains_saves_and_goes_on(&bench, &nodes, 2, "run", &nodes.agent());
    let alone = bench.trained("alone", 1, SAVING);
    assert_same(&alone, &bench.left("run"), 40);
}

#[test]
fn doctor_looks_at_each_node_and_at_the_link_between_them() {
    let Some(nodes) = Nodes::up(2, None) else { return };
    let bench = Bench::new("doctor", 1);
    let hosts = format!("{}:2,{}:2", nodes.name(0), nodes.name(1));
    let doctor = || {
        nodes
            .run(0, &phalanx())
            .args(["doctor", "--hosts", &hosts, "--mca", &nodes.agent()])
            .args(["--mca", "oob_tcp_if_include=eth0", "--mca", "btl_tcp_if_include=eth0"])
            .current_dir(bench.scratch.path())
    };
    let well = doctor().run().expect_code(0);
    let other = nodes.name(1);
    for told in [
        "Open MPI",
        "transports of Open MPI: ",
        "4 slots (as stated by --hosts)",
        &format!("{other} answers"),
        &format!("{other}: its clock agrees"),
        &format!("{other}: this folder is shared"),
        &format!("{other}: the same phalanx-rank"),
        &format!("{other}: the same Open MPI"),
        &format!("{other}: libtorch computes"),
        &format!("{} - {other}: a barrier takes ", nodes.name(0)),
    ] {
        assert!(well.stdout.contains(told), "no {told:?} in\n{}", well.stdout);
    }
    assert!(!well.stdout.contains("PROBLEM"), "{}", well.stdout);
    nodes.link(1, false);
    let ill = doctor().run().expect_code(2);
    assert!(ill.stdout.contains(&format!("PROBLEM  {other} does not answer: ")), "{}", ill.stdout);
}

/// An ssh daemon on each node, with keys of their own. Ended when dropped.
struct Ssh {
    agent: String,
    _daemons: Vec<Running>,
}

impl Ssh {
    fn up(bench: &Bench, nodes: &Nodes, count: usize) -> Option<Ssh> {
        let sshd = std::path::Path::new("/usr/sbin/sshd");
        if !sshd.is_file() {
            use std::io::Write;
            let _ = writeln!(std::io::stderr(), "skipped: no sshd here");
            return None;
        }
        let folder = bench.scratch.join("ssh");
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::create_dir_all("/run/sshd").unwrap();
        let at = |name: &str| folder.join(name).display().to_string();
        for key in ["host", "user"] {
            let arguments = ["-q", "-t", "ed25519", "-N", "", "-f", &at(key)];
            Command::new("ssh-keygen").args(arguments).run().expect_code(0);
        }
        let config = format!(
            "HostKey {}\nAuthorizedKeysFile {}\nStrictModes no\nUsePAM no\nPidFile none\nPermitRootLogin yes\n\
             PasswordAuthentication no\nAcceptEnv *\n",
            at("host"),
            at("user.pub"),
        );
        std::fs::write(folder.join("sshd_config"), config).unwrap();
        let daemon = |node| {
            let daemon = nodes.run(node, sshd).args(["-D", "-e", "-f", &at("sshd_config")]);
            daemon.deadline(Duration::from_secs(110)).start()
        };
        let daemons = (0..count).map(daemon).collect();
        let agent = format!(
            "plm_rsh_agent=ssh -i {} -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR",
            at("user"),
        );
        std::thread::sleep(Duration::from_secs(1));
        Some(Ssh { agent, _daemons: daemons })
    }
}

mod whole_table {
    use super::*;

    #[test]
    fn on_three_nodes_over_ssh_a_run_goes_on_and_a_node_that_is_taken_away_is_left_out() {
        let Some(nodes) = Nodes::up(3, None) else { return };
        let bench = Bench::new("ssh", 40);
        let Some(ssh) = Ssh::up(&bench, &nodes, 3) else { return };
        trains_saves_and_goes_on(&bench, &nodes, 3, "run", &ssh.agent);
        let alone = bench.trained("alone", 1, SAVING);
        assert_same(&alone, &bench.left("run"), 40);

        let longer = "--set schedule.max_steps=400";
        let mut job =
            train(&bench, &nodes, 3, "run", &ssh.agent, longer).deadline(Duration::from_secs(100)).start();
        job.wait_for("step 50/", 1);
        nodes.link(1, false);
        job.wait_for(&format!("without {}: 4 ranks", nodes.name(1)), 1);
        job.wait_for("going on from", 2);
        let done = job.finish().expect_code(0);
        assert_eq!(done.survivors, Vec::<String>::new());
    }
}
