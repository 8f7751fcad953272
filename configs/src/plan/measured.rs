//! What may be measured of a machine, in place of its data sheet: primitives only, never a step. The form of the
//! file that `phalanx-rank bench calibrate` writes and `phalanx plan --gpu measured` reads, and what lies between
//! the sizes that were measured. Knows nothing of how it is measured.

use crate::{Call, Collective};
use serde::{Deserialize, Deserializer, Serialize, de};

/// Where it is, if nothing else is asked for.
pub const MACHINE_FILE: &str = "target/bench/machine.toml";

/// What stands on top of the file.
const HEADER: &str = "\
# Rates of a machine, for `phalanx plan --gpu measured`; `phalanx-rank bench calibrate` has written it.
# Primitives, each of one rank while all ranks of its node do the same, and none of them a step.
";

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
    /// Bytes of the node's memory.
    pub memory_bytes: u64,
    /// Whether bf16 is multiplied by a matrix unit, which adds gradients to their fp32 sums where these lie.
    pub matrix_unit: bool,
    /// Until all ranks have come.
    #[serde(deserialize_with = "positive")]
    pub barrier_s: f64,
    /// To the disk, flushed.
    #[serde(deserialize_with = "positive")]
    pub disk_bytes_per_s: f64,
    /// The share of a core that a collective between nodes takes from what computes beside it; 0 on one node.
    #[serde(deserialize_with = "share")]
    pub cores_share: f64,
    /// By compute threads of a rank, ascending; one at least.
    #[serde(deserialize_with = "not_empty")]
    pub rates: Vec<Rates>,
    /// Collectives, by size; none on one rank.
    #[serde(default)]
    pub collectives: Vec<MeasuredCall>,
}

/// What a rank of so many threads computes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rates {
    /// Compute threads.
    pub threads: usize,
    /// Bytes that a rank has beside a model: libraries and their buffers, and what malloc keeps.
    pub process_bytes: u64,
    /// Bytes read and written of a copy of more than the caches hold.
    #[serde(deserialize_with = "positive")]
    pub copy_bytes_per_s: f64,
    /// Bytes of memory that is taken from the system, cleared and written once.
    #[serde(deserialize_with = "positive")]
    pub mapping_bytes_per_s: f64,
    /// Bytes read and written of a pass as AdamW makes it.
    #[serde(deserialize_with = "positive")]
    pub update_bytes_per_s: f64,
    /// In fp32.
    pub fp32: Computing,
    /// In bf16, where the machine multiplies it.
    pub bf16: Option<Computing>,
}

/// What computes in one precision.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Computing {
    /// Bytes that the loss moves beside products, counted as the plan counts them.
    #[serde(deserialize_with = "positive")]
    pub loss_bytes_per_s: f64,
    /// Matrix products, forward and both gradients, by shape.
    #[serde(deserialize_with = "not_empty")]
    pub products: Vec<MeasuredProduct>,
    /// Dense causal attention, forward and backward, by tokens of a sequence, in FLOP/s of the pairs kept.
    #[serde(deserialize_with = "not_empty")]
    pub attention: Vec<RatePoint>,
    /// What stands between products (norms, GELU, sums), forward and backward, by elements of the residual
    /// stream, in bytes per second counted as the plan counts them.
    #[serde(deserialize_with = "not_empty")]
    pub passes: Vec<RatePoint>,
}

/// A rate at a size.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RatePoint {
    /// Of what, the list says.
    #[serde(deserialize_with = "positive")]
    pub size: f64,
    /// Per second.
    #[serde(deserialize_with = "positive")]
    pub rate: f64,
}

/// `[rows, inner]` times `[inner, columns]`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MeasuredProduct {
    /// Rows, inner dimension, columns; each at least 1.
    pub shape: [u32; 3],
    /// FLOP/s.
    #[serde(deserialize_with = "positive")]
    pub rate: f64,
}

/// What one collective took.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MeasuredCall {
    /// Which.
    pub collective: Collective,
    /// Bytes of a number on its way.
    pub width: u64,
    /// Whether the buffer comes and goes, so that the ranks of a node cannot reach into it.
    pub passing: bool,
    /// Bytes of the buffer on its way.
    pub bytes: u64,
    /// On the slowest rank.
    #[serde(deserialize_with = "positive")]
    pub seconds: f64,
}

/// A rate must be one: 0, nan and inf would be divided by.
fn positive<'de, D: Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
    let got = f64::deserialize(from)?;
    match got.is_finite() && got > 0.0 {
        true => Ok(got),
        false => Err(de::Error::custom(format!("{got} is no rate: expected a finite number above 0"))),
    }
}

fn share<'de, D: Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
    let got = f64::deserialize(from)?;
    match (0.0..=1.0).contains(&got) {
        true => Ok(got),
        false => Err(de::Error::custom(format!("{got} is no share: expected 0 to 1"))),
    }
}

fn not_empty<'de, D: Deserializer<'de>, T: Deserialize<'de>>(from: D) -> Result<Vec<T>, D::Error> {
    let got = Vec::<T>::deserialize(from)?;
    if got.is_empty() { Err(de::Error::custom("expected one measurement at least")) } else { Ok(got) }
}

impl Measured {
    /// Reads a machine file's text.
    ///
    /// # Errors
    /// What is wrong, with the line where it is known.
    pub fn parse(text: &str) -> Result<Measured, String> {
        let told = |error: toml::de::Error| {
            let line = error.span().map(|span| text[..span.start.min(text.len())].matches('\n').count() + 1);
            match line {
                Some(line) => format!("line {line}: {}", error.message()),
                None => error.message().to_string(),
            }
        };
        toml::from_str(text).map_err(told)
    }

    /// The text of a machine file.
    pub fn to_toml(&self) -> String {
        let body = toml::to_string(self).expect("numbers, names and lists of them are TOML");
        format!("{HEADER}{body}")
    }

    /// The best rates, for a person.
    pub fn describe(&self) -> String {
        let Measured { host, ranks, nodes, .. } = self;
        let mut text = format!("{host}: {ranks} ranks on {nodes} nodes\n");
        for Rates { threads, copy_bytes_per_s, update_bytes_per_s, fp32, bf16, .. } in &self.rates {
            let giga = 1e-9;
            let half =
                bf16.as_ref().map_or(String::new(), |bf16| format!(", bf16 {:.0}", giga * bf16.peak()));
            text.push_str(&format!(
                "  {threads} threads: products fp32 {:.0}{half} GFLOP/s, copy {:.1}, update {:.1} GB/s\n",
                giga * fp32.peak(),
                giga * copy_bytes_per_s,
                giga * update_bytes_per_s,
            ));
        }
        for call in self.collectives.iter().filter(|call| call.width == 4) {
            let (name, seconds) = (format!("{:?}", call.collective), call.seconds);
            text.push_str(&format!(
                "  {name} of {:.3} MB: {:.3} ms, {:.2} GB/s\n",
                call.bytes as f64 / 1e6,
                1e3 * seconds,
                call.bytes as f64 / seconds / 1e9,
            ));
        }
        text + &format!("  disk {:.2} GB/s\n", self.disk_bytes_per_s / 1e9)
    }

    /// Ranks of a node.
    pub fn per_node(&self) -> usize {
        self.ranks.div_ceil(self.nodes.max(1))
    }

    /// What a rank of so many threads computes: as measured with the nearest number of them.
    pub fn rates(&self, threads: usize) -> &Rates {
        let nearest = self.rates.iter().min_by_key(|rates| rates.threads.abs_diff(threads));
        nearest.expect("a machine file has rates")
    }

    /// Seconds of a collective: between the measured sizes in a
    /// straight line and beyond them in proportion; none if it was not measured.
    pub fn seconds(&self, call: &Call) -> Option<f64> {
        let (Call { collective, passing, .. }, bytes) = (*call, call.bytes() as f64);
        let of = |width: Option<u64>| {
            let mut points: Vec<(f64, f64)> = self
                .collectives
                .iter()
                .filter(|call| call.collective == collective && call.passing == passing)
                .filter(|call| width.is_none_or(|width| call.width == width))
                .map(|call| (call.bytes as f64, call.seconds))
                .collect();
            points.sort_by(|a, b| a.0.total_cmp(&b.0));
            points
        };
        let points =
            Some(of(Some(call.width))).filter(|points| !points.is_empty()).unwrap_or_else(|| of(None));
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

impl Computing {
    /// The best rate of products, FLOP/s: what MFU is a share of.
    pub fn peak(&self) -> f64 {
        self.products.iter().map(|product| product.rate).fold(0.0, f64::max)
    }

    /// The rate of a product, FLOP/s: the mean of those measured, each with the weight of 1 / d^2, where d is
    /// how far its shape is away, in the logarithms of the three sides (Shepard 1968).
    pub fn product(&self, shape: [f64; 3]) -> f64 {
        let (mut sum, mut weights) = (0.0, 0.0);
        for measured in &self.products {
            let apart = |side: usize| (shape[side].max(1.0) / f64::from(measured.shape[side].max(1))).ln();
            let squares: f64 = [0, 1, 2].map(apart).map(|d| d * d).iter().sum();
            // Far below the distance of any two shapes, so that a measured one has its own rate.
            let weight = 1.0 / (squares + 1e-9);
            sum += weight * measured.rate;
            weights += weight;
        }
        sum / weights
    }

    /// The rate of attention over sequences of so many tokens, FLOP/s.
    pub fn attending(&self, seq_len: f64) -> f64 {
        between(&self.attention, seq_len)
    }

    /// The rate of what stands between products, where the residual stream has so many elements.
    pub fn passing(&self, elements: f64) -> f64 {
        between(&self.passes, elements)
    }
}

/// The rate at a size: between two of them by the size's logarithm, beyond them that of the nearest.
fn between(points: &[RatePoint], size: f64) -> f64 {
    let mut points = points.to_vec();
    points.sort_by(|a, b| a.size.total_cmp(&b.size));
    let after = points.partition_point(|point| point.size < size);
    match (after.checked_sub(1).map(|before| points[before]), points.get(after)) {
        (Some(below), Some(above)) => {
            let part = (size / below.size).ln() / (above.size / below.size).ln();
            below.rate + part * (above.rate - below.rate)
        }
        (Some(point), None) => point.rate,
        (None, point) => point.map_or(0.0, |point| point.rate),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::Cargo;

    pub(crate) fn machine() -> Measured {
        let computing = |rate: f64| Computing {
            loss_bytes_per_s: 3e9,
            products: vec![
                MeasuredProduct { shape: [1024, 64, 256], rate },
                MeasuredProduct { shape: [1024, 1024, 4096], rate: 2.0 * rate },
            ],
            attention: vec![RatePoint { size: 100.0, rate: 1e9 }, RatePoint { size: 10_000.0, rate: 3e9 }],
            passes: vec![RatePoint { size: 1e6, rate: 5e9 }],
        };
        let rates = |threads| Rates {
            threads,
            process_bytes: 300_000_000,
            copy_bytes_per_s: 1e10,
            mapping_bytes_per_s: 4e9,
            update_bytes_per_s: 8e9,
            fp32: computing(1e11),
            bf16: Some(computing(5e11)),
        };
        let call = |bytes, seconds| MeasuredCall {
            collective: Collective::AllGather,
            width: 4,
            passing: false,
            bytes,
            seconds,
        };
        Measured {
            host: "a".into(),
            ranks: 2,
            nodes: 1,
            memory_bytes: 16_000_000_000,
            matrix_unit: true,
            barrier_s: 1e-5,
            disk_bytes_per_s: 1e9,
            cores_share: 0.1,
            rates: vec![rates(1), rates(2)],
            collectives: vec![call(3000, 5.0), call(1000, 2.0)],
        }
    }

    #[test]
    fn what_a_size_between_two_takes_lies_between_what_they_take() {
        let measured = machine();
        let call = |collective, width, bytes: u64| Call {
            collective,
            cargo: Cargo::Weights,
            segment: 0,
            numel: (bytes / width) as usize,
            slice_numel: 0,
            width,
            passing: false,
        };
        let of = |bytes| measured.seconds(&call(Collective::AllGather, 4, bytes)).unwrap();
        assert_eq!([8, 1000, 2000, 3000, 6000].map(of), [2.0, 2.0, 3.5, 5.0, 10.0]);
        assert_eq!(measured.seconds(&call(Collective::AllGather, 2, 1000)), Some(2.0));
        assert_eq!(measured.seconds(&call(Collective::AllReduce, 4, 8)), None);
        assert_eq!(measured.seconds(&Call { passing: true, ..call(Collective::AllGather, 4, 8) }), None);
        let computing = &measured.rates(1).fp32;
        assert_eq!([10.0, 1000.0, 1e6].map(|t| computing.attending(t).round()), [1e9, 2e9, 3e9]);
    }

    #[test]
    fn a_product_that_was_measured_has_its_rate_and_another_one_between() {
        let measured = machine();
        let computing = measured.rates(7).bf16.as_ref().unwrap();
        assert!((computing.product([1024.0, 1024.0, 4096.0]) / 1e12 - 1.0).abs() < 1e-6);
        let between = computing.product([1024.0, 256.0, 1024.0]);
        assert!((between / 7.5e11 - 1.0).abs() < 1e-6, "{between}");
        assert_eq!(computing.peak(), 1e12);
    }

    #[test]
    fn a_machine_file_reads_back_and_what_is_wrong_in_it_is_told_with_its_line() {
        let text = machine().to_toml();
        assert_eq!(Measured::parse(&text).unwrap(), machine());
        for (from, to, told) in [
            ("barrier_s = 0.00001", "barrier_s = 0.0", "line 8: 0 is no rate"),
            ("barrier_s", "barier_s", "unknown field `barier_s`"),
            ("ranks = 2", "ranks = \"two\"", "line 4: invalid type: string \"two\""),
        ] {
            assert!(text.contains(from), "{text}");
            let error = Measured::parse(&text.replacen(from, to, 1)).unwrap_err();
            assert!(error.contains(told), "{error}");
        }
    }
}
