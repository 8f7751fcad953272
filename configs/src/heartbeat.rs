//! What ranks and launcher tell each other while a run goes on: heartbeats one way, acknowledgements the
//! other, each sealed with a secret of that start of the run. Owns how a message is written, and that
//! nothing of it is looked at before its seal; refuses to know sockets and what to make of it.
//!
//! A message is one line: 64 hexadecimal digits, the keyed BLAKE3 of the rest, a space, the rest. It fits a
//! datagram. A secret is only used for one start, and heartbeats are numbered, so one that is sent again
//! says nothing.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::SocketAddr;

/// Environment variable with the launcher's address, `10.0.0.1:40000`; without it nobody listens.
pub const LAUNCHER_VARIABLE: &str = "PHALANX_LAUNCHER";
/// Environment variable with the secret, 64 hexadecimal digits.
pub const SECRET_VARIABLE: &str = "PHALANX_SECRET";
/// Environment variable by which the processes of a start are told from others.
pub const START_VARIABLE: &str = "PHALANX_START";

/// Longest message, bytes.
pub const MOST_MESSAGE_BYTES: usize = 1024;

/// Hexadecimal digits of a seal.
const SEAL_DIGITS: usize = 64;

/// What a rank is doing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[repr(u8)]
pub enum Doing {
    /// Joining the others, opening files, filling weights.
    #[default]
    Starting,
    /// Waiting for tokens.
    Data,
    /// Forward, without the loss.
    Forward,
    /// The loss and backward.
    Backward,
    /// Waiting for gradients of other ranks.
    Reduce,
    /// The step's small reduction.
    Agree,
    /// Norm and update.
    Optimizer,
    /// Validation.
    Evaluation,
    /// A checkpoint: the copy, or waiting until it is written.
    Saving,
    /// Comparing the ranks' weights.
    Comparing,
    /// What comes after the last step.
    Ending,
}

impl Doing {
    /// All of them, in the order of their numbers.
    const ALL: [Doing; 11] = [
        Doing::Starting,
        Doing::Data,
        Doing::Forward,
        Doing::Backward,
        Doing::Reduce,
        Doing::Agree,
        Doing::Optimizer,
        Doing::Evaluation,
        Doing::Saving,
        Doing::Comparing,
        Doing::Ending,
    ];

    /// The one with this number, as `as u8` gives it.
    pub fn from_number(number: u8) -> Doing {
        Doing::ALL.get(usize::from(number)).copied().unwrap_or_default()
    }

    /// Whether a rank that is at it waits for others by its nature.
    pub fn waits(self) -> bool {
        matches!(self, Doing::Reduce | Doing::Agree)
    }
}

impl fmt::Display for Doing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Doing::Starting => "starting",
            Doing::Data => "data",
            Doing::Forward => "forward",
            Doing::Backward => "backward",
            Doing::Reduce => "reduce",
            Doing::Agree => "agree",
            Doing::Optimizer => "optimizer",
            Doing::Evaluation => "evaluation",
            Doing::Saving => "saving",
            Doing::Comparing => "comparing",
            Doing::Ending => "ending",
        })
    }
}

/// What a rank says of itself twice a second.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Heartbeat {
    /// Who.
    pub rank: usize,
    /// On which machine, by the name it gives itself.
    pub host: String,
    /// Process id there.
    pub pid: u32,
    /// Number of this heartbeat, from 1.
    pub sequence: u64,
    /// The start of the run that it belongs to; 0 before that is claimed.
    pub generation: u64,
    /// Updates done.
    pub step: u64,
    /// Updates done by this start.
    pub own_steps: u64,
    /// What it is doing.
    pub doing: Doing,
    /// In which segment, if that makes sense.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub segment: Option<String>,
    /// Which collective it has begun and not ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub collective: Option<String>,
    /// Collectives begun: where all stand still, the one behind is the one that is waited for.
    pub begun: u64,
    /// Grows with every segment, micro-step, collective and file.
    pub progress: u64,
    /// Grows while the thread that trains computes, or bytes are being written: within a single operation,
    /// the only sign of life.
    pub alive: u64,
    /// Milliseconds that the last step took on this rank, without waiting for others.
    pub own_ms: u64,
    /// Where it serves its metrics, once it does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metrics: Option<SocketAddr>,
}

impl Heartbeat {
    /// Where in its step the rank is, for people: `step 12, backward of h.3, in all_reduce`.
    pub fn place(&self) -> String {
        let mut place = match self.doing {
            Doing::Starting => "starting".to_string(),
            doing => format!("step {}, {doing}", self.step + 1),
        };
        if let Some(segment) = &self.segment {
            place.push_str(&format!(" of {segment}"));
        }
        if let Some(collective) = &self.collective {
            place.push_str(&format!(", in {collective}"));
        }
        place
    }
}

/// The secret of one start of a run.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret([u8; 32]);

impl Secret {
    /// From bytes that nobody can guess.
    pub fn new(bytes: [u8; 32]) -> Secret {
        Secret(bytes)
    }

    /// As it stands in the environment.
    pub fn from_hex(text: &str) -> Option<Secret> {
        blake3::Hash::from_hex(text).ok().map(|hash| Secret(*hash.as_bytes()))
    }

    /// For the environment.
    pub fn to_hex(&self) -> String {
        blake3::Hash::from_bytes(self.0).to_hex().to_string()
    }

    fn seal(&self, body: &str) -> String {
        format!("{} {body}", blake3::keyed_hash(&self.0, body.as_bytes()).to_hex())
    }

    /// What is sealed, if it is sealed with this secret. Nothing of it is looked at before.
    fn unseal<'a>(&self, message: &'a [u8]) -> Option<&'a str> {
        if message.len() > MOST_MESSAGE_BYTES {
            return None;
        }
        let (seal, rest) = message.split_at_checked(SEAL_DIGITS)?;
        let body = rest.strip_prefix(b" ")?;
        let seal = blake3::Hash::from_hex(seal).ok()?;
        // Hashes are compared in constant time.
        (seal == blake3::keyed_hash(&self.0, body)).then(|| std::str::from_utf8(body).ok())?
    }

    /// A heartbeat as it is sent.
    pub fn seal_heartbeat(&self, heartbeat: &Heartbeat) -> String {
        let json = serde_json::to_string(heartbeat).expect("numbers and strings have a JSON form");
        self.seal(&format!("beat {json}"))
    }

    /// A heartbeat, if the message is one and has our seal.
    pub fn open_heartbeat(&self, message: &[u8]) -> Option<Heartbeat> {
        serde_json::from_str(self.unseal(message)?.strip_prefix("beat ")?).ok()
    }

    /// The launcher's answer to the heartbeat with this number.
    pub fn seal_answer(&self, rank: usize, sequence: u64) -> String {
        self.seal(&format!("heard {rank} {sequence}"))
    }

    /// The number of the heartbeat of `rank` that this answers, if it is an answer and has our seal.
    pub fn open_answer(&self, rank: usize, message: &[u8]) -> Option<u64> {
        let (whom, sequence) = self.unseal(message)?.strip_prefix("heard ")?.split_once(' ')?;
        (whom.parse() == Ok(rank)).then(|| sequence.parse().ok())?
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn secret() -> Secret {
        Secret::new([7; 32])
    }

    fn heartbeat() -> Heartbeat {
        Heartbeat {
            rank: 3,
            host: "node1".into(),
            pid: 4711,
            sequence: 12,
            step: 11,
            doing: Doing::Backward,
            segment: Some("h.3".into()),
            collective: Some("all_reduce".into()),
            ..Heartbeat::default()
        }
    }

    #[test]
    fn a_heartbeat_reads_as_it_was_sealed_and_says_where_the_rank_is() {
        let message = secret().seal_heartbeat(&heartbeat());
        assert!(message.len() < MOST_MESSAGE_BYTES / 2, "{}", message.len());
        let read = secret().open_heartbeat(message.as_bytes()).unwrap();
        assert_eq!(read, heartbeat());
        assert_eq!(read.place(), "step 12, backward of h.3, in all_reduce");
        assert_eq!(Heartbeat::default().place(), "starting");
    }

    #[test]
    fn what_has_another_seal_says_nothing() {
        let message = secret().seal_heartbeat(&heartbeat());
        assert_eq!(Secret::new([8; 32]).open_heartbeat(message.as_bytes()), None);
        for place in [0, 63, 64, 65, message.len() - 1] {
            let mut forged = message.clone().into_bytes();
            forged[place] ^= 1;
            assert_eq!(secret().open_heartbeat(&forged), None, "byte {place}");
        }
        assert_eq!(secret().open_heartbeat(&message.as_bytes()[..100]), None);
        let padded = message + &" ".repeat(MOST_MESSAGE_BYTES);
        assert_eq!(secret().open_heartbeat(padded.as_bytes()), None);
    }

    #[test]
    fn answers_are_for_one_rank_and_no_heartbeats() {
        let answer = secret().seal_answer(3, 12);
        assert_eq!(secret().open_answer(3, answer.as_bytes()), Some(12));
        assert_eq!(secret().open_answer(4, answer.as_bytes()), None);
        assert_eq!(secret().open_heartbeat(answer.as_bytes()), None);
        let beat = secret().seal_heartbeat(&heartbeat());
        assert_eq!(secret().open_answer(3, beat.as_bytes()), None);
    }

    #[test]
    fn a_secret_is_not_printed_and_reads_from_its_digits() {
        assert_eq!(format!("{:?}", secret()), "Secret(…)");
        assert_eq!(Secret::from_hex(&secret().to_hex()), Some(secret()));
        assert_eq!(Secret::from_hex("7"), None);
    }

    #[test]
    fn everything_a_rank_does_keeps_its_number() {
        for (number, doing) in Doing::ALL.into_iter().enumerate() {
            assert_eq!((doing as usize, Doing::from_number(number as u8)), (number, doing));
        }
        assert_eq!(Doing::from_number(200), Doing::Starting);
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic_or_pass(bytes in proptest::collection::vec(any::<u8>(), 0..2000)) {
            prop_assert_eq!(secret().open_heartbeat(&bytes), None);
            prop_assert_eq!(secret().open_answer(0, &bytes), None);
        }
    }
}
