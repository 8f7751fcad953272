//! The machines of a job and their slots: `a:4,b:4`, Open MPI's hostfiles, or this machine.
//! What a scheduler has allocated is read in `allocation`.
//! Only parses and counts; whether a host answers is not known here.

use crate::LaunchError;
use std::path::Path;

/// One machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Host {
    /// Name or IPv4 address, as mpirun gets it.
    pub name: String,
    /// Ranks that it may hold; unknown where a hostfile leaves it to the machine.
    pub slots: Option<usize>,
}

/// Where ranks may run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Hosts {
    /// Nothing was stated: this machine with so many cores.
    ThisMachine {
        /// Physical cores that this process may use.
        cores: usize,
    },
    /// `--hosts`.
    Listed(Vec<Host>),
    /// What a scheduler has allocated.
    Allocated {
        /// Its name.
        by: &'static str,
        /// Its machines.
        hosts: Vec<Host>,
    },
    /// `--hostfile`.
    File {
        /// The path, as typed.
        path: String,
        /// What it lists.
        hosts: Vec<Host>,
    },
}

const LIST_HINT: &str = "write --hosts a:4,b:4, or a alone for one slot";
const FILE_HINT: &str = "each line is a host and its slots, like: node1 slots=4";
const IPV6_HINT: &str = "Open MPI takes names and IPv4 addresses only; give the machine a name in /etc/hosts";

impl Hosts {
    /// This machine. Counts cores as mpirun does: hardware threads of one core once.
    pub fn this_machine() -> Hosts {
        let usable = std::thread::available_parallelism().map_or(1, usize::from);
        Hosts::ThisMachine {
            cores: physical_cores(Path::new("/sys/devices/system/cpu"))
                .map_or(usable, |cores| cores.min(usable)),
        }
    }

    /// Reads `a:4,b:4`. A host without a number has one slot, as mpirun has it.
    ///
    /// # Errors
    /// Empty entries, slots that are no positive number, IPv6 addresses.
    pub fn parse_list(list: &str) -> Result<Hosts, LaunchError> {
        let refuse = |what: String, hint| LaunchError::Hosts { place: format!("--hosts {list}"), what, hint };
        let mut hosts = Vec::new();
        for entry in list.split(',').map(str::trim) {
            if entry.starts_with('[') || entry.matches(':').count() > 1 {
                return Err(refuse(format!("{entry} is an IPv6 address"), IPV6_HINT));
            }
            let (name, slots) = entry.split_once(':').unwrap_or((entry, "1"));
            if name.is_empty() {
                return Err(refuse("a host without a name".into(), LIST_HINT));
            }
            let slots = positive(slots)
                .ok_or_else(|| refuse(format!("{slots:?} is no number of slots for {name}"), LIST_HINT))?;
            hosts.push(Host { name: name.to_string(), slots: Some(slots) });
        }
        Ok(Hosts::Listed(hosts))
    }

    /// Reads a hostfile in Open MPI's form: `host slots=4 max_slots=8`, comments behind `#`.
    ///
    /// # Errors
    /// A file that cannot be read or lists nobody, words that mean nothing, slots that are no positive
    /// number, IPv6 addresses; each with its line.
    pub fn read_file(path: &str) -> Result<Hosts, LaunchError> {
        let text = std::fs::read_to_string(path).map_err(|error| LaunchError::Hosts {
            place: format!("--hostfile {path}"),
            what: format!("cannot be read: {error}"),
            hint: FILE_HINT,
        })?;
        let mut hosts = Vec::new();
        for (number, line) in text.lines().enumerate() {
            let refuse =
                |what, hint| LaunchError::Hosts { place: format!("{path}:{}", number + 1), what, hint };
            let line = line.split('#').next().unwrap_or_default();
            let mut words = line.split_whitespace();
            let Some(name) = words.next() else { continue };
            if name.contains(':') {
                return Err(refuse(
                    format!("{name} is no host name"),
                    if name.starts_with('[') || name.matches(':').count() > 1 {
                        IPV6_HINT
                    } else {
                        FILE_HINT
                    },
                ));
            }
            let mut slots = None;
            for word in words {
                match word.split_once('=') {
                    Some(("slots", value)) => {
                        let value = positive(value)
                            .ok_or_else(|| refuse(format!("{word:?} is no number of slots"), FILE_HINT))?;
                        slots = Some(value);
                    }
                    Some(("max_slots" | "max-slots", value)) if positive(value).is_some() => {}
                    _ => return Err(refuse(format!("{word:?} means nothing here"), FILE_HINT)),
                }
            }
            hosts.push(Host { name: name.to_string(), slots });
        }
        if hosts.is_empty() {
            return Err(LaunchError::Hosts {
                place: format!("--hostfile {path}"),
                what: "lists no host".into(),
                hint: FILE_HINT,
            });
        }
        Ok(Hosts::File { path: path.to_string(), hosts })
    }

    /// Ranks that fit, when each takes `threads` cores of a machine whose slots nobody stated.
    /// None where a hostfile leaves it to the machines.
    pub fn slots(&self, threads: usize) -> Option<usize> {
        match self {
            Hosts::ThisMachine { cores } => Some((cores / threads.max(1)).max(1)),
            Hosts::Listed(_) | Hosts::Allocated { .. } | Hosts::File { .. } => {
                self.list().iter().map(|host| host.slots).sum()
            }
        }
    }

    /// The machines that were named; none where it is this one.
    pub fn list(&self) -> &[Host] {
        match self {
            Hosts::ThisMachine { .. } => &[],
            Hosts::Listed(hosts) | Hosts::Allocated { hosts, .. } | Hosts::File { hosts, .. } => hosts,
        }
    }

    /// Those of them whose name is not among `left_out`, as a list; as they were stated if that is all.
    pub fn without(&self, left_out: &[String]) -> Hosts {
        if left_out.is_empty() {
            return self.clone();
        }
        let stay = self.list().iter().filter(|host| !left_out.contains(&host.name));
        Hosts::Listed(stay.cloned().collect())
    }

    /// Where the number of slots comes from, for messages.
    pub fn describe(&self, threads: usize) -> String {
        match self {
            Hosts::ThisMachine { cores } => {
                format!("this machine has {cores} cores, parallel.threads = {threads}")
            }
            Hosts::Listed(_) => "as stated by --hosts".into(),
            Hosts::Allocated { by, .. } => format!("as allocated by {by}"),
            Hosts::File { path, .. } => format!("as stated by {path}"),
        }
    }
}

fn positive(text: &str) -> Option<usize> {
    text.parse().ok().filter(|&number| number > 0)
}

/// Cores of which at least one hardware thread is online; None where Linux does not tell.
fn physical_cores(cpus: &Path) -> Option<usize> {
    let siblings: std::collections::BTreeSet<String> = std::fs::read_dir(cpus)
        .ok()?
        .filter_map(|entry| {
            std::fs::read_to_string(entry.ok()?.path().join("topology/thread_siblings_list")).ok()
        })
        .collect();
    (!siblings.is_empty()).then_some(siblings.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(name: &str, slots: usize) -> Host {
        Host { name: name.into(), slots: Some(slots) }
    }

    fn file(text: &str) -> Result<Hosts, LaunchError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("hosts");
        std::fs::write(&path, text).unwrap();
        Hosts::read_file(path.to_str().unwrap())
    }

    #[test]
    fn a_list_gives_names_and_slots() {
        let hosts = Hosts::parse_list("a:4, 10.0.0.2:2,c").unwrap();
        assert_eq!(hosts, Hosts::Listed(vec![host("a", 4), host("10.0.0.2", 2), host("c", 1)]));
        assert_eq!(hosts.slots(8), Some(7), "stated slots are not divided by threads");
    }

    #[test]
    fn a_wrong_list_is_told_with_the_entry() {
        for (list, told) in [
            ("a:x", "\"x\" is no number of slots for a"),
            ("a:0", "\"0\""),
            ("a,,b", "without a name"),
            (":4", "without a name"),
        ] {
            let error = Hosts::parse_list(list).unwrap_err().to_string();
            assert!(error.contains(told) && error.contains("hint: write --hosts a:4,b:4"), "{error}");
        }
    }

    #[test]
    fn an_ipv6_address_is_refused_because_mpirun_would() {
        for list in ["[fe80::1]:4", "fe80::1"] {
            let error = Hosts::parse_list(list).unwrap_err().to_string();
            assert!(error.contains("IPv6") && error.contains("/etc/hosts"), "{error}");
        }
        assert!(file("[::1] slots=2\n").unwrap_err().to_string().contains("/etc/hosts"));
    }

    #[test]
    fn a_hostfile_is_read_as_open_mpi_reads_it() {
        let Hosts::File { hosts, .. } =
            file("# nodes\na slots=4\n\n  b slots=2 max_slots=8 # spare\n").unwrap()
        else {
            panic!("no file")
        };
        assert_eq!(hosts, [host("a", 4), host("b", 2)]);
        assert_eq!(file("a slots=4\nb\n").unwrap().slots(1), None);
    }

    #[test]
    fn a_wrong_hostfile_is_told_with_its_line() {
        let error = file("a slots=4\nb slot=4\n").unwrap_err().to_string();
        assert!(error.contains("hosts:2: \"slot=4\" means nothing here"), "{error}");
        let error = file("a slots=none\n").unwrap_err().to_string();
        assert!(error.contains("hosts:1: \"slots=none\" is no number of slots"), "{error}");
        assert!(file("# nobody\n").unwrap_err().to_string().contains("lists no host"));
        assert!(Hosts::read_file("/no/such/file").unwrap_err().to_string().contains("cannot be read"));
    }

    #[test]
    fn hosts_that_are_left_out_leave_a_list_of_the_others() {
        let hosts = Hosts::parse_list("a:4,b:2,c:2").unwrap();
        assert_eq!(hosts.without(&[]), hosts);
        assert_eq!(hosts.without(&["b".to_string()]), Hosts::parse_list("a:4,c:2").unwrap());
    }

    #[test]
    fn threads_share_the_cores_of_this_machine() {
        let hosts = Hosts::ThisMachine { cores: 8 };
        assert_eq!((hosts.slots(1), hosts.slots(3), hosts.slots(16)), (Some(8), Some(2), Some(1)));
    }

    #[test]
    fn hardware_threads_of_one_core_count_once() {
        let folder = tempfile::tempdir().unwrap();
        for (cpu, siblings) in [(0, "0,2\n"), (1, "1,3\n"), (2, "0,2\n"), (3, "1,3\n")] {
            let topology = folder.path().join(format!("cpu{cpu}/topology"));
            std::fs::create_dir_all(&topology).unwrap();
            std::fs::write(topology.join("thread_siblings_list"), siblings).unwrap();
        }
        assert_eq!(physical_cores(folder.path()), Some(2));
        assert_eq!(physical_cores(Path::new("/no/such/folder")), None);
    }
}
