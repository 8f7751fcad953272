//! The `mpirun` command of a job, as a pure function, and where its two programs are.
//! Knows Open MPI's flags and nothing about what the ranks do.

use crate::{Hosts, LaunchError};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

/// What mpirun is asked to start.
#[derive(Debug, Clone)]
pub struct Job<'a> {
    /// Number of ranks.
    pub ranks: usize,
    /// Where they may run.
    pub hosts: &'a Hosts,
    /// Whether ranks are on other machines too.
    pub several: bool,
    /// Whether each line of output is to say whose it is.
    pub tagged: bool,
    /// Whether ranks may outnumber slots.
    pub oversubscribe: bool,
    /// Whether root starts it, which Open MPI wants to be told.
    pub as_root: bool,
    /// `key=value` pairs for Open MPI's own parameters.
    pub mca: &'a [String],
    /// The program of every rank and its arguments.
    pub program: &'a [String],
}

/// The command, program first. Ranks are not bound to cores by mpirun, because each chooses its own
/// threads.
///
/// # Errors
/// An `--mca` that is no `key=value`.
pub fn mpirun_command(job: &Job<'_>) -> Result<Vec<String>, LaunchError> {
    let mut command = vec!["mpirun".to_string(), "-n".into(), job.ranks.to_string()];
    match job.hosts {
        Hosts::ThisMachine { .. } => {}
        Hosts::Listed(hosts) | Hosts::Allocated { hosts, .. } => {
            let list: Vec<String> =
                hosts.iter().map(|host| format!("{}:{}", host.name, host.slots.unwrap_or(1))).collect();
            command.extend(["--host".into(), list.join(",")]);
        }
        Hosts::File { path, .. } => command.extend(["--hostfile".into(), path.clone()]),
    }
    command.extend(["--bind-to".into(), "none".into()]);
    if job.oversubscribe {
        command.push("--oversubscribe".into());
    }
    if job.as_root {
        command.push("--allow-run-as-root".into());
    }
    command.extend(job.tagged.then(|| "--tag-output".into()));
    if job.several {
        // mpirun notices a machine or a link that is gone by the connection to its daemon there, within six
        // seconds instead of minutes; a link that comes back within three breaks nothing.
        for (key, value) in [("time", "3"), ("intvl", "1"), ("probes", "3")] {
            command.extend(["-mca".into(), format!("oob_tcp_keepalive_{key}"), value.into()]);
        }
    }
    for pair in job.mca {
        let (key, value) = pair
            .split_once('=')
            .filter(|(key, _)| !key.is_empty())
            .ok_or_else(|| LaunchError::Mca(pair.clone()))?;
        command.extend(["-mca".into(), key.to_string(), value.to_string()]);
    }
    command.extend(job.program.iter().cloned());
    Ok(command)
}

/// The command as a shell takes it.
pub fn shell_quoted(command: &[String]) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,+@%".contains(c);
    let quoted: Vec<String> = command
        .iter()
        .map(|word| match !word.is_empty() && word.chars().all(plain) {
            true => word.clone(),
            false => format!("'{}'", word.replace('\'', r"'\''")),
        })
        .collect();
    quoted.join(" ")
}

/// `phalanx-rank`, which lies beside the running program.
///
/// # Errors
/// It does not, or its path is no UTF-8.
pub fn rank_binary() -> Result<String, LaunchError> {
    let own = std::env::current_exe().map_err(|source| LaunchError::System {
        what: "the path of the running program could not be found".into(),
        source,
    })?;
    let path = own.with_file_name("phalanx-rank");
    if !path.is_file() {
        return Err(LaunchError::NoRankBinary(path));
    }
    path.into_os_string().into_string().map_err(|path| LaunchError::OddPath(path.into()))
}

/// Looks for `mpirun` on `path`, the value of PATH.
///
/// # Errors
/// It is on none of its folders.
pub fn find_mpirun(path: Option<&OsStr>) -> Result<PathBuf, LaunchError> {
    let folders = path.map(std::env::split_paths).into_iter().flatten();
    folders.map(|folder| folder.join("mpirun")).find(|file| is_program(file)).ok_or(LaunchError::NoMpirun)
}

fn is_program(file: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    file.metadata().is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two ranks of this machine.
    fn plain<'a>() -> Job<'a> {
        let hosts = &Hosts::ThisMachine { cores: 2 };
        Job {
            ranks: 2,
            hosts,
            several: false,
            tagged: true,
            oversubscribe: false,
            as_root: false,
            mca: &[],
            program: &[],
        }
    }

    fn told(job: Job<'_>) -> String {
        let program = ["/opt/phalanx-rank", "train", "a.toml"].map(String::from);
        shell_quoted(&mpirun_command(&Job { program: &program, ..job }).unwrap())
    }

    #[test]
    fn the_plainest_job_is_the_plainest_command() {
        assert_eq!(told(plain()), "mpirun -n 2 --bind-to none --tag-output /opt/phalanx-rank train a.toml");
    }

    #[test]
    fn hosts_are_stated_as_they_were() {
        let hosts = &Hosts::parse_list("a:4,b").unwrap();
        let told_list = told(Job { ranks: 5, hosts, ..plain() });
        assert!(told_list.starts_with("mpirun -n 5 --host a:4,b:1 --bind-to none --tag"), "{told_list}");
        let hosts = &Hosts::File { path: "my hosts".into(), hosts: Vec::new() };
        let told_file = told(Job { hosts, ..plain() });
        assert!(told_file.starts_with("mpirun -n 2 --hostfile 'my hosts' --bind-to none"), "{told_file}");
    }

    #[test]
    fn what_mpirun_must_be_told_comes_before_the_program() {
        let mca = ["btl=self,tcp".to_string(), "x=a=b".to_string()];
        let told = told(Job { oversubscribe: true, as_root: true, mca: &mca, ..plain() });
        let expected = "mpirun -n 2 --bind-to none --oversubscribe --allow-run-as-root --tag-output \
                        -mca btl self,tcp -mca x a=b /opt/phalanx-rank train a.toml";
        assert_eq!(told, expected);
    }

    #[test]
    fn a_machine_that_is_gone_is_noticed_by_its_connection() {
        let told = told(Job { several: true, ..plain() });
        assert!(told.contains("-mca oob_tcp_keepalive_time 3 -mca oob_tcp_keepalive_intvl 1"), "{told}");
    }

    #[test]
    fn an_mca_parameter_without_a_value_is_refused() {
        for wrong in ["btl", "=tcp"] {
            let error = mpirun_command(&Job { mca: &[wrong.to_string()], ..plain() }).unwrap_err();
            assert!(error.to_string().contains(&format!("--mca {wrong}: expected key=value")), "{error}");
        }
    }

    #[test]
    fn what_a_shell_would_split_or_expand_is_quoted() {
        let words = ["a b", "it's", "", "$HOME", "x=[\"dense\"]", "a/b.c:1,2"].map(String::from);
        assert_eq!(shell_quoted(&words), r#"'a b' 'it'\''s' '' '$HOME' 'x=["dense"]' a/b.c:1,2"#);
    }

    #[test]
    fn an_empty_path_has_no_mpirun() {
        assert!(find_mpirun(None).unwrap_err().to_string().contains("apt-get install openmpi-bin"));
        assert!(find_mpirun(Some(OsStr::new("/no/such/folder"))).is_err());
    }
}
