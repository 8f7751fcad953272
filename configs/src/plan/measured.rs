//! What may be measured of a machine, in place of its data sheet: primitives only, never a step. The form of the
//! file that `phalanx plan --gpu measured` reads. Knows nothing of how it is measured.

use crate::Collective;
use serde::{Deserialize, Serialize};

/// Rates of one rank while all ranks of its node do the same.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Measured {
    /// The machine's name.
    pub host: String,
    /// Ranks that measured.
    pub ranks: usize,
    /// Nodes that they were on.
    pub nodes: usize,
    /// Compute threads of each.
    pub threads: usize,
    /// Matrix products in fp32, FLOP/s.
    pub fp32_flops_per_s: f64,
    /// The same in bf16, through whatever the machine has for it.
    pub bf16_flops_per_s: f64,
    /// Bytes read and written, in passes over more than the caches hold.
    pub memory_bytes_per_s: f64,
    /// Bytes of the node's memory.
    pub memory_bytes: u64,
    /// Until all ranks have come.
    pub barrier_s: f64,
    /// Collectives, by size.
    pub collectives: Vec<MeasuredCall>,
    /// To the disk, flushed.
    pub disk_bytes_per_s: f64,
}

/// What one collective took.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MeasuredCall {
    /// Which.
    pub collective: Collective,
    /// Bytes of the buffer.
    pub bytes: u64,
    /// On the slowest rank.
    pub seconds: f64,
}

impl Measured {
    /// Ranks of a node.
    pub fn per_node(&self) -> usize {
        self.ranks.div_ceil(self.nodes.max(1))
    }

    /// Seconds of a collective on a buffer of `bytes`, between the measured sizes in a straight line and
    /// beyond them in proportion; none if it was not measured.
    pub fn seconds(&self, collective: Collective, bytes: f64) -> Option<f64> {
        let mut points: Vec<(f64, f64)> = self
            .collectives
            .iter()
            .filter(|call| call.collective == collective)
            .map(|call| (call.bytes as f64, call.seconds))
            .collect();
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        let (&first, &last) = (points.first()?, points.last()?);
        if bytes <= first.0 {
            return Some(first.1);
        }
        let after = points.partition_point(|point| point.0 < bytes);
        let Some(&above) = points.get(after) else { return Some(last.1 * bytes / last.0) };
        let below = points[after - 1];
        Some(below.1 + (above.1 - below.1) * (bytes - below.0) / (above.0 - below.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_size_between_two_takes_lies_between_what_they_take() {
        let call = |bytes, seconds| MeasuredCall { collective: Collective::AllGather, bytes, seconds };
        let measured = Measured {
            host: "a".into(),
            ranks: 2,
            nodes: 1,
            threads: 1,
            fp32_flops_per_s: 1.0,
            bf16_flops_per_s: 1.0,
            memory_bytes_per_s: 1.0,
            memory_bytes: 1,
            barrier_s: 0.0,
            collectives: vec![call(3000, 5.0), call(1000, 2.0)],
            disk_bytes_per_s: 1.0,
        };
        let of = |bytes| measured.seconds(Collective::AllGather, bytes).unwrap();
        assert_eq!([10.0, 1000.0, 2000.0, 3000.0, 6000.0].map(of), [2.0, 2.0, 3.5, 5.0, 10.0]);
        assert_eq!(measured.seconds(Collective::AllReduce, 10.0), None);
        let file = serde_json::to_string(&measured).unwrap();
        assert_eq!(serde_json::from_str::<Measured>(&file).unwrap(), measured);
    }
}
