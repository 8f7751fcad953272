//! Other machines, reached in the way in which mpirun reaches them: through its agent, which is ssh unless
//! Open MPI's parameter `plm_rsh_agent` names another.
//! Knows whether a machine answers; what it is for is not known here.

use std::net::{SocketAddr, ToSocketAddrs, UdpSocket};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// How long a machine may take to answer.
const PATIENCE: Duration = Duration::from_secs(8);

/// The program that starts a command on another machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Agent {
    words: Vec<String>,
}

impl Agent {
    /// The one that mpirun will use, given its parameters as `key=value` and the environment.
    pub fn of_mpirun(mca: &[String], env: impl Fn(&str) -> Option<String>) -> Agent {
        let keys = ["plm_rsh_agent", "pls_rsh_agent", "orte_rsh_agent"];
        let typed = mca.iter().filter_map(|pair| pair.split_once('='));
        let typed =
            typed.filter(|(key, _)| keys.contains(key)).map(|(_, value)| value.to_string()).next_back();
        let set = || keys.iter().find_map(|key| env(&format!("OMPI_MCA_{key}")));
        let agent = typed.or_else(set).unwrap_or_else(|| "ssh".into());
        // Alternatives stand between colons; the first is what most have.
        let first = agent.split(" : ").next().unwrap_or_default();
        let mut words: Vec<String> = first.split_whitespace().map(str::to_string).collect();
        if words.first().is_some_and(|program| program == "ssh" || program.ends_with("/ssh")) {
            // Nobody is there to type a password, and a machine that is off must not take minutes.
            words.extend(["-x", "-o", "BatchMode=yes", "-o", "ConnectTimeout=5"].map(str::to_string));
        }
        Agent { words }
    }

    /// Runs a shell command there and returns what it printed.
    ///
    /// # Errors
    /// Why there is no answer, in a line: of the agent, or that there was none in time.
    pub fn run(&self, host: &str, command: &str) -> Result<String, String> {
        let (program, options) = self.words.split_first().ok_or("no agent is named")?;
        let mut child = Command::new(program)
            .args(options)
            .args([host, command])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| format!("{program}: {error}"))?;
        let deadline = Instant::now() + PATIENCE;
        while child.try_wait().map_err(|error| error.to_string())?.is_none() {
            if Instant::now() > deadline {
                let _ = child.kill();
                let _ = child.wait();
                return Err(format!("no answer in {} s", PATIENCE.as_secs()));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let output = child.wait_with_output().map_err(|error| error.to_string())?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        let said = String::from_utf8_lossy(&output.stderr);
        let last = said.lines().rfind(|line| !line.trim().is_empty());
        Err(last.map_or_else(|| format!("{program} ended with {}", output.status), str::to_string))
    }

    /// Runs a shell command on each of the machines at once.
    pub fn run_on_each<'a>(
        &self,
        hosts: &[&'a str],
        command: &str,
    ) -> Vec<(&'a str, Result<String, String>)> {
        std::thread::scope(|scope| {
            let started: Vec<_> =
                hosts.iter().map(|&host| (host, scope.spawn(move || self.run(host, command)))).collect();
            let join = |(host, thread): (&'a str, std::thread::ScopedJoinHandle<'_, _>)| {
                (host, thread.join().unwrap_or_else(|_| Err("the probe failed".into())))
            };
            started.into_iter().map(join).collect()
        })
    }
}

/// Whether a name means this machine: its own name, or an address of it.
pub fn is_this_machine(name: &str) -> bool {
    let own = rustix::system::uname().nodename().to_string_lossy().into_owned();
    if name == "localhost" || name == own || own.split('.').next() == Some(name) {
        return true;
    }
    let mut addresses = (name, 0).to_socket_addrs().into_iter().flatten();
    // Only its own addresses can be bound to.
    addresses.any(|address: SocketAddr| UdpSocket::bind(address).is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn agent(words: &[&str]) -> Agent {
        Agent { words: words.iter().map(|word| word.to_string()).collect() }
    }

    #[test]
    fn it_is_mpiruns_own_agent_as_typed_or_set_or_ssh() {
        let none = |_: &str| None;
        assert_eq!(Agent::of_mpirun(&[], none).words[..2], ["ssh", "-x"]);
        let typed = ["btl=tcp,self".to_string(), "plm_rsh_agent=/opt/agent -q".to_string()];
        assert_eq!(Agent::of_mpirun(&typed, none), agent(&["/opt/agent", "-q"]));
        let set = |name: &str| (name == "OMPI_MCA_plm_rsh_agent").then(|| "rsh".to_string());
        assert_eq!(Agent::of_mpirun(&[], set), agent(&["rsh"]));
    }

    #[test]
    fn an_answer_and_a_reason_come_back() {
        // `sh -c` takes the host for a name and the command for nothing, so the script is the option.
        let echo = agent(&["sh", "-c", "echo $0 does $1"]);
        assert_eq!(echo.run("a", "this").unwrap(), "a does this\n");
        let fails = agent(&["sh", "-c", "echo no route >&2; exit 255"]);
        assert_eq!(fails.run("a", "this").unwrap_err(), "no route");
        assert!(agent(&["no-such-program"]).run("a", "this").unwrap_err().starts_with("no-such-program: "));
        let each = echo.run_on_each(&["a", "b"], "it");
        assert_eq!(each[1], ("b", Ok("b does it\n".to_string())));
    }

    #[test]
    fn this_machine_is_known_by_name_and_address() {
        let own = rustix::system::uname().nodename().to_string_lossy().into_owned();
        for name in ["localhost", "127.0.0.1", &own] {
            assert!(is_this_machine(name), "{name}");
        }
        assert!(!is_this_machine("203.0.113.7"), "an address for documentation");
    }
}
