//! Slurm for real: its controller and daemon on this machine run a job by the printed script, and its signals
//! end it with a checkpoint. Where Slurm is not installed, or nobody is root, a test says so and passes.

use crate::Bench;
use crate::support::{Command, Running, phalanx};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// A cluster of one machine. Its daemons end when it is dropped.
struct Cluster {
    folder: PathBuf,
    _daemons: Vec<Running>,
}

impl Cluster {
    fn up(bench: &Bench) -> Option<Cluster> {
        use std::os::unix::fs::MetadataExt;
        let installed = ["slurmctld", "slurmd", "munged"].iter().all(|name| {
            let found = std::env::var_os("PATH").map(|path| std::env::split_paths(&path).collect::<Vec<_>>());
            found.into_iter().flatten().any(|folder| folder.join(name).is_file())
        });
        if !installed || std::fs::metadata(bench.scratch.path()).unwrap().uid() != 0 {
            use std::io::Write;
            let _ = writeln!(std::io::stderr(), "skipped: no slurmctld, slurmd and munged here, or no root");
            return None;
        }
        let folder = bench.scratch.join("slurm");
        for name in ["state", "spool", "munge"] {
            std::fs::create_dir_all(folder.join(name)).unwrap();
        }
        let private = |path: &str, mode: &str| {
            Command::new("chmod").args([mode, path]).current_dir(&folder).run().expect_code(0);
        };
        private("munge", "700");
        std::fs::write(folder.join("munge/key"), [7; 128]).unwrap();
        private("munge/key", "400");
        std::fs::write(folder.join("slurm.conf"), configuration(&folder)).unwrap();
        let mut cluster = Cluster { folder, _daemons: Vec::new() };
        let at = |name: &str| cluster.folder.join("munge").join(name).display().to_string();
        let munge = [
            "--foreground".to_string(),
            "--force".to_string(),
            format!("--socket={}", at("socket")),
            format!("--key-file={}", at("key")),
            format!("--log-file={}", at("log")),
            format!("--pid-file={}", at("pid")),
            format!("--seed-file={}", at("seed")),
        ];
        let daemons = [
            cluster.command("munged").args(munge),
            cluster.command("slurmctld").args(["-D"]),
            cluster.command("slurmd").args(["-D"]),
        ];
        for daemon in daemons {
            cluster._daemons.push(daemon.deadline(Duration::from_secs(400)).start());
            std::thread::sleep(Duration::from_secs(1));
        }
        let deadline = Instant::now() + Duration::from_secs(30);
        while !cluster.command("sinfo").args(["-h", "-o", "%t"]).run().stdout.contains("idle") {
            assert!(Instant::now() < deadline, "the cluster does not come up");
            std::thread::sleep(Duration::from_millis(200));
        }
        Some(cluster)
    }

    fn command(&self, name: &str) -> Command {
        Command::new(name).env("SLURM_CONF", self.folder.join("slurm.conf"))
    }

    /// Submits a script and returns the job's number.
    fn submit(&self, bench: &Bench, script: &str) -> String {
        let file = bench.scratch.write("job.sh", script);
        let done = self.command("sbatch").args(["--parsable".as_ref(), file.as_os_str()]);
        done.current_dir(bench.scratch.path()).run().expect_code(0).stdout.trim().to_string()
    }

    /// Waits until a job has ended, and returns what Slurm says of it.
    fn ended(&self, job: &str) -> String {
        let deadline = Instant::now() + Duration::from_secs(200);
        loop {
            let said = self.command("scontrol").args(["show", "job", job]).run().stdout;
            if !["PENDING", "RUNNING", "COMPLETING"]
                .iter()
                .any(|state| said.contains(&format!("JobState={state}")))
            {
                return said;
            }
            assert!(Instant::now() < deadline, "job {job} does not end\n{said}");
            std::thread::sleep(Duration::from_millis(200));
        }
    }
}

fn configuration(folder: &std::path::Path) -> String {
    let host = Command::new("hostname").args(["-s"]).run().expect_code(0).stdout.trim().to_string();
    let (at, port) = (folder.display(), 20_000 + std::process::id() % 10_000);
    let next = port + 10_000;
    format!(
        "ClusterName=test\nSlurmctldHost={host}(127.0.0.1)\nSlurmUser=root\nSlurmdUser=root\n\
         AuthType=auth/munge\nAuthInfo=socket={at}/munge/socket\nCredType=cred/munge\n\
         StateSaveLocation={at}/state\nSlurmdSpoolDir={at}/spool\n\
         SlurmctldPidFile={at}/slurmctld.pid\nSlurmdPidFile={at}/slurmd.pid\n\
         SlurmctldLogFile={at}/slurmctld.log\nSlurmdLogFile={at}/slurmd.log\n\
         SlurmctldPort={port}\nSlurmdPort={next}\n\
         ProctrackType=proctrack/linuxproc\nTaskPlugin=task/none\nSwitchType=switch/none\n\
         SelectType=select/cons_tres\nSelectTypeParameters=CR_CPU\nMpiDefault=none\nReturnToService=2\n\
         NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN\n\
         PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP\n"
    )
}

mod whole_table {
    use super::*;

    #[test]
    fn a_job_by_the_printed_script_ends_with_a_checkpoint_when_slurm_signals() {
        let bench = Bench::new("slurm", 1_000_000);
        let Some(cluster) = Cluster::up(&bench) else { return };
        let printed = Command::new(phalanx())
            .args(["train", "tiny.toml", "-n", "2", "--oversubscribe", "--slurm"])
            .current_dir(bench.scratch.path())
            .run()
            .expect_code(0)
            .stdout;
        let log = |job: &str| {
            std::fs::read_to_string(bench.scratch.join(format!("tiny-{job}.log"))).unwrap_or_default()
        };
        let wait_for = |job: &str, text: &str| {
            let deadline = Instant::now() + Duration::from_secs(60);
            while !log(job).contains(text) {
                assert!(Instant::now() < deadline, "no {text:?} in the job's log:\n{}", log(job));
                std::thread::sleep(Duration::from_millis(100));
            }
        };

        let asked = cluster.submit(&bench, &printed);
        wait_for(&asked, "step 20/");
        cluster.command("scancel").args(["--batch", "--signal=USR1", &asked]).run().expect_code(0);
        let said = cluster.ended(&asked);
        assert!(said.contains("ExitCode=3:0"), "{said}\n{}", log(&asked));
        assert!(log(&asked).contains("stopped with a checkpoint"), "{}", log(&asked));

        // The shortest limit that leaves the script's two minutes.
        let timed = cluster.submit(&bench, &printed.replace("--time=24:00:00", "--time=00:03:00"));
        wait_for(&timed, "going on from");
        let said = cluster.ended(&timed);
        assert!(said.contains("ExitCode=3:0"), "{said}\n{}", log(&timed));
        assert!(log(&timed).contains("stopped with a checkpoint"), "{}", log(&timed));
    }
}
