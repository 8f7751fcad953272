//! Where heartbeats arrive: a socket of one start of a run, open beyond this machine only if ranks are
//! elsewhere, and deaf to everything that does not carry the start's secret.

use crate::LaunchError;
use configs::{Heartbeat, LAUNCHER_VARIABLE, MOST_MESSAGE_BYTES, SECRET_VARIABLE, START_VARIABLE, Secret};
use std::io::Read;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, ToSocketAddrs, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// How often the thread looks whether it is still wanted.
const LOOK: Duration = Duration::from_millis(200);

/// A socket for heartbeats. Closed when dropped, after which ranks that are left end themselves.
#[derive(Debug)]
pub struct Listener {
    socket: UdpSocket,
    address: SocketAddr,
    secret: Secret,
    start: String,
    closed: Arc<AtomicBool>,
}

impl Listener {
    /// Opens a socket on the loopback, or, with the name of another machine, on the address from which
    /// that one is reached. `run` becomes a part of the name that this start's processes carry.
    ///
    /// # Errors
    /// The system has no socket or no random bytes.
    pub fn open(remote: Option<&str>, run: &str) -> Result<Listener, LaunchError> {
        let system = |what: &str| {
            let what = what.to_string();
            move |source| LaunchError::System { what, source }
        };
        let ip = remote.and_then(address_towards).unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST));
        let socket = UdpSocket::bind((ip, 0)).map_err(system("no socket for heartbeats"))?;
        socket.set_read_timeout(Some(LOOK)).map_err(system("no socket for heartbeats"))?;
        let address = socket.local_addr().map_err(system("no socket for heartbeats"))?;
        let secret = Secret::new(random().map_err(system("no random bytes for a secret"))?);
        let [a, b, c, d, ..] = random().map_err(system("no random bytes for a name"))?;
        let start = format!("{run}.{:08x}", u32::from_le_bytes([a, b, c, d]));
        Ok(Listener { socket, address, secret, start, closed: Arc::default() })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What the ranks must find in their environment. The secret is nowhere else.
    pub fn variables(&self) -> [(&'static str, String); 3] {
        [
            (LAUNCHER_VARIABLE, self.address.to_string()),
            (SECRET_VARIABLE, self.secret.to_hex()),
            (START_VARIABLE, self.start.clone()),
        ]
    }

    /// Answers heartbeats and hands them on, from a thread.
    ///
    /// # Errors
    /// The system refuses a second handle.
    pub fn listen(&self, hand_on: impl Fn(Heartbeat) -> bool + Send + 'static) -> std::io::Result<()> {
        let (socket, secret) = (self.socket.try_clone()?, self.secret.clone());
        let closed = Arc::clone(&self.closed);
        std::thread::spawn(move || {
            let mut buffer = [0; MOST_MESSAGE_BYTES + 1];
            while !closed.load(Ordering::Relaxed) {
                // A time-out, or a rank that is gone and cannot be answered.
                let Ok((length, from)) = socket.recv_from(&mut buffer) else { continue };
                let Some(beat) = secret.open_heartbeat(&buffer[..length]) else { continue };
                let _ = socket.send_to(secret.seal_answer(beat.rank, beat.sequence).as_bytes(), from);
                if !hand_on(beat) {
                    return;
                }
            }
        });
        Ok(())
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.closed.store(true, Ordering::Relaxed);
    }
}

/// The address of this machine from which another is reached; asks the routes, sends nothing.
fn address_towards(host: &str) -> Option<IpAddr> {
    let to = (host, 9).to_socket_addrs().ok()?.find(SocketAddr::is_ipv4)?;
    let socket = UdpSocket::bind("0.0.0.0:0").ok()?;
    socket.connect(to).ok()?;
    Some(socket.local_addr().ok()?.ip())
}

/// Bytes that nobody can guess.
pub(crate) fn random() -> std::io::Result<[u8; 32]> {
    let mut bytes = [0; 32];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    #[test]
    fn it_listens_on_the_loopback_unless_ranks_are_elsewhere() {
        let listener = Listener::open(None, "run").unwrap();
        assert!(listener.address().ip().is_loopback());
        let [_, (_, secret), (_, start)] = listener.variables();
        assert_eq!(secret.len(), 64);
        assert!(start.starts_with("run."), "{start}");
        assert_ne!(
            Listener::open(None, "run").unwrap().variables()[1].1,
            secret,
            "one secret for each start"
        );
    }

    #[test]
    fn heartbeats_with_the_secret_are_heard_and_answered_and_no_others() {
        let listener = Listener::open(None, "run").unwrap();
        let (sender, heard) = channel();
        listener.listen(move |beat| sender.send(beat).is_ok()).unwrap();
        let rank = UdpSocket::bind("127.0.0.1:0").unwrap();
        rank.connect(listener.address()).unwrap();
        rank.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let beat = Heartbeat { rank: 2, sequence: 9, ..Heartbeat::default() };
        let forged = Secret::new([0; 32]).seal_heartbeat(&beat);
        for noise in [b"hello".as_slice(), &[0xff; 4000], forged.as_bytes(), b""] {
            rank.send(noise).unwrap();
        }
        rank.send(listener.secret.seal_heartbeat(&beat).as_bytes()).unwrap();
        let mut buffer = [0; MOST_MESSAGE_BYTES];
        let length = rank.recv(&mut buffer).unwrap();
        assert_eq!(listener.secret.open_answer(2, &buffer[..length]), Some(9));
        assert_eq!(heard.recv().unwrap(), beat);
        assert!(heard.try_recv().is_err(), "nothing else was heard");
    }
}
