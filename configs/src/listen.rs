//! Where a run listens for those who want to look at it: an address, or nowhere.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::{Ipv4Addr, SocketAddr};
use std::str::FromStr;

/// `metrics.listen`: `"off"`, or an address and a port. The loopback and a free port by default.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Listen {
    /// Nothing is served.
    Off,
    /// The launcher has this port, and the ranks of a machine those that follow; with port 0 each has a free one.
    At(SocketAddr),
}

impl Default for Listen {
    fn default() -> Listen {
        Listen::At((Ipv4Addr::LOCALHOST, 0).into())
    }
}

impl Listen {
    /// Where the launcher listens.
    pub fn launcher(self) -> Option<SocketAddr> {
        match self {
            Listen::Off => None,
            Listen::At(address) => Some(address),
        }
    }

    /// Where a rank does, by its index among those of its machine.
    pub fn rank(self, local_rank: usize) -> Option<SocketAddr> {
        let mut address = self.launcher()?;
        if address.port() > 0 {
            let after = u16::try_from(local_rank)
                .ok()
                .and_then(|local| address.port().checked_add(1)?.checked_add(local));
            address.set_port(after.unwrap_or(0)); // beyond the last port, a free one
        }
        Some(address)
    }
}

impl FromStr for Listen {
    type Err = String;

    fn from_str(text: &str) -> Result<Listen, String> {
        if text == "off" {
            return Ok(Listen::Off);
        }
        let wrong = || {
            format!(
                "\"{text}\" is no address with a port\n\
                 hint: \"127.0.0.1:0\" for this machine only and a free port, \"0.0.0.0:9400\" for everybody, or \"off\""
            )
        };
        text.parse().map(Listen::At).map_err(|_| wrong())
    }
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Listen::Off => f.write_str("off"),
            Listen::At(address) => address.fmt(f),
        }
    }
}

impl TryFrom<String> for Listen {
    type Error = String;

    fn try_from(text: String) -> Result<Listen, String> {
        text.parse()
    }
}

impl From<Listen> for String {
    fn from(listen: Listen) -> String {
        listen.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn launcher_and_ranks_of_a_machine_have_ports_in_a_row() {
        let listen: Listen = "0.0.0.0:9400".parse().unwrap();
        let port = |address: Option<SocketAddr>| address.map(|address| address.port());
        assert_eq!(
            (port(listen.launcher()), port(listen.rank(0)), port(listen.rank(7))),
            (Some(9400), Some(9401), Some(9408))
        );
        assert_eq!(port("0.0.0.0:65535".parse::<Listen>().unwrap().rank(0)), Some(0));
        assert_eq!(port(Listen::default().rank(3)), Some(0));
        assert_eq!("off".parse::<Listen>().unwrap().rank(0), None);
    }

    #[test]
    fn what_is_no_address_is_refused_with_a_hint() {
        for text in ["", "9400", "localhost:9400", "127.0.0.1", "127.0.0.1:70000"] {
            let told = text.parse::<Listen>().unwrap_err();
            assert!(told.contains("hint:") && told.contains(text), "{told}");
        }
        assert_eq!(String::from("[::1]:0".parse::<Listen>().unwrap()), "[::1]:0");
    }
}
