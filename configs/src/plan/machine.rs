//! What ranks compute on and what connects them, as data sheets or as measured.
//! Knows no model and no run.

use super::PlanError;
use super::measured::{Measured, Rates};
use crate::data_sheet_bf16;
use serde::Serialize;

/// The share of a data sheet's rates that a run reaches, one constant for products, memory and links of every
/// machine. Chosen so that published runs are met as a whole; docs/PLANNING.md has the table.
pub const REACHED: f64 = 0.62;

/// A way from rank to rank: the larger of what bytes and messages take.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Link {
    /// As it is asked for.
    pub name: String,
    /// One way: of a rank within a node, of a node between nodes.
    pub bytes_per_s: f64,
    /// Of a message, until it is there.
    pub latency_s: f64,
}

/// What one rank computes on.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Machine {
    /// As it is asked for.
    pub name: String,
    /// Whether it is a CPU: ranks then compute in fp32 unless bf16 is asked for, sum in the tree unless told
    /// otherwise, and what moves within a node takes the cores' time.
    pub cpu: bool,
    /// Whether it is a CPU with a matrix unit for bf16, whose products add gradients to their fp32 sums.
    pub matrix_unit: bool,
    /// Matrix products in bf16, dense, FLOP/s.
    pub bf16_flops_per_s: f64,
    /// The same in fp32.
    pub fp32_flops_per_s: f64,
    /// Bytes of its memory.
    pub memory_bytes: u64,
    /// Bytes of it that no run has: the device's context, libraries and their buffers.
    pub reserved_bytes: u64,
    /// To and from that memory.
    pub memory_bytes_per_s: f64,
    /// To host memory, where a checkpoint's snapshot goes.
    pub host_bytes_per_s: f64,
    /// Between ranks of a node.
    pub within: Link,
    /// Between nodes, if nothing else is asked for.
    pub between: Link,
    /// Ranks of a node, if nothing else is asked for.
    pub per_node: usize,
    /// The share of these rates that a run reaches.
    pub reached: f64,
    /// What was measured, where that stands in for data sheets.
    #[serde(skip)]
    pub measured: Option<Measured>,
    /// Of these, what a rank of so many threads as the run has computes.
    #[serde(skip)]
    pub rates: Option<Rates>,
}

/// The names that [`Machine::named`] knows.
pub const MACHINES: [&str; 4] = ["h200", "h100", "a100-80", "cpu"];

const GB: f64 = 1e9;

/// Data sheet rates of a GPU with eight in a node.
struct Gpu {
    name: &'static str,
    bf16: f64,
    fp32: f64,
    memory_gb: f64,
    memory_tb_per_s: f64,
    nvlink_gb_per_s: f64,
    port: &'static str,
    host_gb_per_s: f64,
}

impl Machine {
    /// A machine by its data sheet.
    ///
    /// Sources: NVIDIA H200, H100 (SXM) and A100 (80 GB, SXM) data sheets: dense products, fp32 without
    /// TF32, NVLink one way, the ports of a DGX of that generation (a port for each GPU), PCIe one way. `cpu`
    /// is a core of an AMD EPYC 7763: 2.45 GHz x 32 fp32 operations, its share of eight channels of DDR4-3200
    /// and of 512 GB.
    ///
    /// # Errors
    /// A name that nobody knows.
    pub fn named(name: &str, threads: usize) -> Result<Machine, PlanError> {
        let hopper = |(name, device), memory_gb, memory_tb_per_s| Gpu {
            name,
            bf16: data_sheet(device),
            fp32: 66.9e12,
            memory_gb,
            memory_tb_per_s,
            nvlink_gb_per_s: 450.0,
            port: "ib400x8",
            host_gb_per_s: 64.0,
        };
        let gpu = match name {
            "h200" => hopper(("h200", "NVIDIA H200"), 141.0, 4.8),
            "h100" => hopper(("h100", "NVIDIA H100"), 80.0, 3.35),
            "a100-80" => Gpu {
                name: "a100-80",
                bf16: data_sheet("NVIDIA A100"),
                fp32: 19.5e12,
                memory_gb: 80.0,
                memory_tb_per_s: 2.039,
                nvlink_gb_per_s: 300.0,
                port: "ib200x8",
                host_gb_per_s: 32.0,
            },
            "cpu" => return Machine::cores(threads),
            _ => {
                return Err(PlanError::Unknown {
                    what: "--gpu",
                    got: name.into(),
                    known: format!("{} or measured", MACHINES.join(", ")),
                });
            }
        };
        gpu.machine()
    }

    /// `threads` cores of a server.
    fn cores(threads: usize) -> Result<Machine, PlanError> {
        let cores = threads.max(1) as f64;
        let rate = cores * 2.45e9 * 32.0;
        let memory = cores * 204.8 * GB / 64.0;
        Ok(Machine {
            name: "cpu".into(),
            cpu: true,
            matrix_unit: false,
            bf16_flops_per_s: rate,
            fp32_flops_per_s: rate,
            memory_bytes: (cores * 8.0 * GB) as u64,
            reserved_bytes: 300_000_000,
            memory_bytes_per_s: memory,
            host_bytes_per_s: memory / 2.0,
            // A byte is written once and read once.
            within: Link { name: "memory".into(), bytes_per_s: memory / 2.0, latency_s: 2e-6 },
            between: Link::named("eth10")?,
            per_node: (64 / threads.max(1)).max(1),
            reached: REACHED,
            measured: None,
            rates: None,
        })
    }

    /// The machine on which `measured` was taken, for ranks of so many threads: its rates are reached, being
    /// measured.
    pub fn measured(measured: Measured, threads: usize) -> Machine {
        let rates = measured.rates(threads).clone();
        let memory = rates.copy_bytes_per_s;
        Machine {
            name: format!("measured on {}", measured.host),
            cpu: true,
            matrix_unit: measured.matrix_unit,
            bf16_flops_per_s: rates.bf16.as_ref().unwrap_or(&rates.fp32).peak(),
            fp32_flops_per_s: rates.fp32.peak(),
            memory_bytes: measured.memory_bytes / measured.per_node().max(1) as u64,
            reserved_bytes: rates.process_bytes,
            memory_bytes_per_s: memory,
            host_bytes_per_s: memory / 2.0,
            within: Link {
                name: "measured".into(),
                bytes_per_s: memory / 2.0,
                latency_s: measured.barrier_s,
            },
            between: Link::named("eth10").expect("ten gigabits of Ethernet"),
            per_node: measured.per_node(),
            reached: 1.0,
            measured: Some(measured),
            rates: Some(rates),
        }
    }

    /// Matrix products per second by the data sheet: what MFU is a share of.
    pub fn peak(&self, bf16: bool) -> f64 {
        if bf16 { self.bf16_flops_per_s } else { self.fp32_flops_per_s }
    }
}

/// Of a GPU that the one table of data sheets has.
fn data_sheet(device: &str) -> f64 {
    data_sheet_bf16(device).expect("the machines named here are among the data sheets")
}

impl Gpu {
    fn machine(&self) -> Result<Machine, PlanError> {
        Ok(Machine {
            name: self.name.into(),
            cpu: false,
            matrix_unit: false,
            bf16_flops_per_s: self.bf16,
            fp32_flops_per_s: self.fp32,
            memory_bytes: (self.memory_gb * GB) as u64,
            reserved_bytes: 1_500_000_000,
            memory_bytes_per_s: self.memory_tb_per_s * 1e12,
            host_bytes_per_s: self.host_gb_per_s * GB,
            within: Link { name: "nvlink".into(), bytes_per_s: self.nvlink_gb_per_s * GB, latency_s: 2e-6 },
            between: Link::named(self.port)?,
            per_node: 8,
            reached: REACHED,
            measured: None,
            rates: None,
        })
    }
}

impl Link {
    /// `ib400`, `eth100` and the like: InfiniBand or Ethernet of so many Gbit/s; `ib400x8` is eight ports of
    /// a node. Messages take 5 us over InfiniBand and 30 us over TCP, software included.
    ///
    /// # Errors
    /// What is neither.
    pub fn named(name: &str) -> Result<Link, PlanError> {
        let unknown = || PlanError::Unknown {
            what: "--link",
            got: name.into(),
            known:
                "ib200, ib400, eth10, eth100 and so on: ib or eth, Gbit/s of a port, and x8 for eight ports \
                    of a node"
                    .into(),
        };
        let (latency_s, rest) = match (name.strip_prefix("ib"), name.strip_prefix("eth")) {
            (Some(rest), _) => (5e-6, rest),
            (None, Some(rest)) => (30e-6, rest),
            (None, None) => return Err(unknown()),
        };
        let (rate, ports) = rest.split_once('x').unwrap_or((rest, "1"));
        let number = |text: &str| text.parse::<f64>().ok().filter(|n| n.is_finite() && *n > 0.0);
        let (rate, ports) = number(rate).zip(number(ports)).ok_or_else(unknown)?;
        Ok(Link { name: name.into(), bytes_per_s: rate * 1e9 / 8.0 * ports, latency_s })
    }
}

/// Ranks on machines.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Cluster {
    /// What each rank computes on.
    pub machine: Machine,
    /// What connects nodes.
    pub between: Link,
    /// Ranks of a node.
    pub per_node: usize,
    /// Bytes per second that a node writes to where checkpoints go.
    pub disk_bytes_per_s: f64,
}

impl Cluster {
    /// Nodes that hold so many ranks.
    pub fn nodes(&self, ranks: usize) -> usize {
        ranks.div_ceil(self.per_node)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_is_its_rate_times_its_ports() {
        assert_eq!(Link::named("ib400x8").unwrap().bytes_per_s, 400e9);
        assert_eq!(Link::named("eth1").unwrap().bytes_per_s, 125e6);
        for wrong in ["nvlink", "ib", "eth0", "ib400x", "eth-1"] {
            let told = Link::named(wrong).unwrap_err().to_string();
            assert!(told.contains(wrong) && told.contains("hint: "), "{told}");
        }
    }

    #[test]
    fn every_machine_that_is_named_is_known_and_another_is_refused_with_their_names() {
        for name in MACHINES {
            assert_eq!(Machine::named(name, 1).unwrap().name, name);
        }
        let told = Machine::named("b200", 1).unwrap_err().to_string();
        assert!(told.contains("--gpu") && told.contains("h200, h100, a100-80, cpu"), "{told}");
    }
}
