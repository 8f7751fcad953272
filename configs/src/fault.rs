//! Faults that tests put into a run, as they are typed: `nan@step=5,rank=1`. Owns what a fault is and
//! how it is written; refuses to know how it is brought about.

use std::fmt;
use std::str::FromStr;

/// Something that goes wrong on purpose, once, at one place of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The loss and the gradient of a rank's first micro-batch are no number.
    Nan {
        /// The update that would have been made of them, from 1.
        step: u64,
        /// Whose.
        rank: usize,
    },
    /// A bit of a weight flips in a rank's replica.
    Flip {
        /// After this update, from 1.
        step: u64,
        /// Whose.
        rank: usize,
    },
    /// The loss and the gradient are a hundred times what they are, wherever a batch has the first
    /// sample that this step has when nothing is skipped. So skipping the batch skips the fault.
    Spike {
        /// The update, from 1.
        step: u64,
    },
    /// A rank panics before this update. Once: a launcher that starts the run again leaves it away.
    Panic {
        /// The update that is not made, from 1.
        step: u64,
        /// Whose.
        rank: usize,
    },
    /// A rank does nothing any more, from before this update on. Once, as above.
    Hang {
        /// The update that is not made, from 1.
        step: u64,
        /// Whose.
        rank: usize,
    },
    /// A rank computes longer than it need in every step.
    Slow {
        /// Milliseconds.
        ms: u64,
        /// Whose.
        rank: usize,
    },
}

impl Fault {
    /// Whether it is over once it has happened, so that a run that is started again is spared.
    pub fn is_over(&self) -> bool {
        matches!(self, Fault::Panic { .. } | Fault::Hang { .. })
    }

    /// The rank that has it, if it is one rank's.
    pub fn rank(&self) -> Option<usize> {
        match *self {
            Fault::Nan { rank, .. }
            | Fault::Flip { rank, .. }
            | Fault::Panic { rank, .. }
            | Fault::Hang { rank, .. }
            | Fault::Slow { rank, .. } => Some(rank),
            Fault::Spike { .. } => None,
        }
    }
}

/// A fault that is not written as one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "fault {spec:?}: {what}\n\
     hint: there are nan@step=5,rank=1 (a loss that is no number), flip@step=5,rank=1 (a flipped bit of a \
     weight), spike@step=7 (a loss a hundred times too high), panic@step=5,rank=1, hang@step=5,rank=1 and \
     slow@ms=200,rank=1 (longer steps)"
)]
pub struct FaultError {
    /// As typed.
    pub spec: String,
    /// What is wrong with it.
    pub what: String,
}

/// Names and values behind the `@`, each taken once.
struct Places<'a>(Vec<(&'a str, u64)>);

impl<'a> Places<'a> {
    fn parse(text: &'a str) -> Result<Places<'a>, String> {
        let place = |pair: &'a str| {
            let (name, value) = pair.split_once('=').ok_or_else(|| format!("{pair:?} is no name=number"))?;
            let value = value.parse().map_err(|_| format!("{name} is {value:?}, expected a number"))?;
            Ok((name, value))
        };
        text.split(',').map(place).collect::<Result<_, String>>().map(Places)
    }

    fn take(&mut self, name: &str) -> Result<u64, String> {
        let at = self.0.iter().position(|(known, _)| *known == name);
        at.map(|at| self.0.remove(at).1).ok_or_else(|| format!("{name}=… is missing"))
    }

    fn step(&mut self) -> Result<u64, String> {
        match self.take("step")? {
            0 => Err("step is 0, the first update is 1".into()),
            step => Ok(step),
        }
    }

    fn rank(&mut self) -> Result<usize, String> {
        let rank = self.take("rank")?;
        usize::try_from(rank).map_err(|_| format!("no rank has the number {rank}"))
    }
}

fn parse(spec: &str) -> Result<Fault, String> {
    let (kind, places) = spec.split_once('@').ok_or("it has no @")?;
    let mut places = Places::parse(places)?;
    let fault = match kind {
        "nan" => Fault::Nan { step: places.step()?, rank: places.rank()? },
        "flip" => Fault::Flip { step: places.step()?, rank: places.rank()? },
        "spike" => Fault::Spike { step: places.step()? },
        "panic" => Fault::Panic { step: places.step()?, rank: places.rank()? },
        "hang" => Fault::Hang { step: places.step()?, rank: places.rank()? },
        "slow" => Fault::Slow { ms: places.take("ms")?, rank: places.rank()? },
        _ => return Err(format!("{kind:?} is no kind of fault")),
    };
    match places.0.first() {
        None => Ok(fault),
        Some((name, _)) => Err(format!("{name} is given twice, or means nothing to {kind}")),
    }
}

impl FromStr for Fault {
    type Err = FaultError;

    fn from_str(spec: &str) -> Result<Fault, FaultError> {
        parse(spec).map_err(|what| FaultError { spec: spec.to_string(), what })
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::Nan { step, rank } => write!(f, "nan@step={step},rank={rank}"),
            Fault::Flip { step, rank } => write!(f, "flip@step={step},rank={rank}"),
            Fault::Spike { step } => write!(f, "spike@step={step}"),
            Fault::Panic { step, rank } => write!(f, "panic@step={step},rank={rank}"),
            Fault::Hang { step, rank } => write!(f, "hang@step={step},rank={rank}"),
            Fault::Slow { ms, rank } => write!(f, "slow@ms={ms},rank={rank}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_reads_as_it_is_written() {
        for spec in [
            "nan@step=5,rank=1",
            "flip@step=12,rank=0",
            "spike@step=7",
            "panic@step=5,rank=1",
            "hang@step=5,rank=1",
            "slow@ms=200,rank=1",
        ] {
            assert_eq!(spec.parse::<Fault>().unwrap().to_string(), spec);
        }
        assert_eq!("nan@rank=1,step=5".parse(), Ok(Fault::Nan { step: 5, rank: 1 }));
    }

    #[test]
    fn what_is_no_fault_is_refused_with_the_reason_and_those_there_are() {
        for (spec, what) in [
            ("nan", "it has no @"),
            ("crash@step=5", "\"crash\" is no kind of fault"),
            ("nan@step=5", "rank=… is missing"),
            ("nan@rank=1", "step=… is missing"),
            ("nan@step=0,rank=1", "step is 0, the first update is 1"),
            ("nan@step=x,rank=1", "step is \"x\", expected a number"),
            ("nan@step=-1,rank=1", "step is \"-1\", expected a number"),
            ("spike@", "\"\" is no name=number"),
            ("spike@step=7,rank=1", "rank is given twice, or means nothing to spike"),
            ("spike@step=7,step=8", "step is given twice, or means nothing to spike"),
        ] {
            let error = spec.parse::<Fault>().unwrap_err().to_string();
            assert!(error.contains(&format!("fault {spec:?}: {what}\nhint: ")), "{error}");
        }
    }
}
