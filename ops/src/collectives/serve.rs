//! How ranks sum buffers that are on a device: over NCCL, or through host memory.
//!
//! Owns the choice, which all ranks make together; knows nothing of how either works.

use super::nccl::{Found, Nccl};
use super::{CommError, Communicator, Solo, Staged};
use crate::cuda;
use tch::Device;

/// How sums of buffers on a device are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceSums {
    /// The fastest way there is: NCCL, else through host memory.
    Fast,
    /// Through host memory, in the tree: the same bits as on the CPU, and ranks may share a GPU.
    Tree,
}

/// How a group sums buffers on its device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// The device is the CPU.
    Cpu,
    /// Over NCCL.
    Nccl,
    /// Through host memory.
    HostMemory,
}

/// NCCL's version, or why there is none, in a line. After CUDA was opened: libtorch brings NCCL with it.
pub fn nccl_version() -> String {
    let version = Found::look().and_then(|found| found.version().map_err(|error| error.to_string()));
    match version {
        Ok(version) => format!("{}.{}.{}", version / 10_000, version / 100 % 100, version % 100),
        Err(why) => why.lines().next().unwrap_or_default().to_string(),
    }
}

/// Makes a group serve buffers on this rank's device as well, and says how. Collective; on the CPU it changes nothing.
///
/// # Errors
/// [`CommError::Devices`] if some ranks have a GPU and others none, [`CommError::SharedGpu`] if two have
/// the same one and sums are to be fast, and what NCCL says.
pub fn serve(comm: &mut Box<dyn Communicator>, device: Device, sums: DeviceSums) -> Result<Way, CommError> {
    let found = match (device, sums) {
        (Device::Cuda(_), DeviceSums::Fast) => Found::look().and_then(|found| {
            let version = found.version().map_err(|error| error.to_string())?;
            Ok((found, version))
        }),
        _ => Err("it was not looked for".into()),
    };
    let version = found.as_ref().map_or(0, |(_, version)| *version);
    let mine = Row { device: identity(device), host: comm.place().host.clone(), nccl: version };
    let rows = comm.all_gather_bytes(mine.to_text().as_bytes())?;
    let rows: Vec<Row> = rows.iter().map(|row| Row::from_text(&String::from_utf8_lossy(row))).collect();
    let way = agree(&rows, sums)?;

    let Device::Cuda(gpu) = device else { return Ok(way) };
    // What can fail is done on the group as it is; then it is taken into its new shape.
    let group = match (way, found) {
        (Way::Nccl, Ok((found, _))) => Some(found.join(&**comm, gpu)?),
        (_, found) => {
            if let (DeviceSums::Fast, Err(why)) = (sums, found) {
                tracing::warn!(
                    "no NCCL: {why}; sums go through host memory, which is slower\nhint: scripts/setup \
                     installs it where nvidia-smi answers"
                );
            }
            None
        }
    };
    let inner = std::mem::replace(comm, Box::new(Solo::new()));
    *comm = match group {
        Some(group) => Box::new(Nccl::new(inner, group)),
        None => Box::new(Staged::new(inner, device)),
    };
    Ok(way)
}

/// What tells a device from every other of its machine; `cpu` for the CPU.
fn identity(device: Device) -> String {
    match device {
        Device::Cuda(gpu) => cuda::uuid(gpu).unwrap_or_else(|| format!("gpu {gpu}")),
        _ => "cpu".into(),
    }
}

/// What a rank tells the others.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Row {
    device: String,
    host: String,
    /// Version; 0 for none.
    nccl: i32,
}

impl Row {
    fn to_text(&self) -> String {
        format!("{}\n{}\n{}", self.device, self.host, self.nccl)
    }

    fn from_text(text: &str) -> Row {
        let mut lines = text.lines();
        let mut next = || lines.next().unwrap_or_default().to_owned();
        Row { device: next(), host: next(), nccl: next().parse().unwrap_or(0) }
    }
}

/// From what all ranks told, on every rank the same.
fn agree(rows: &[Row], sums: DeviceSums) -> Result<Way, CommError> {
    let on_cpu = |row: &Row| row.device == "cpu";
    if let Some(rank) = rows.iter().position(|row| on_cpu(row) != on_cpu(&rows[0])) {
        let what = |row: &Row| if on_cpu(row) { "the CPU" } else { "a GPU" };
        return Err(CommError::Devices {
            rank,
            host: rows[rank].host.clone(),
            got: what(&rows[rank]),
            expected: what(&rows[0]),
        });
    }
    if on_cpu(&rows[0]) {
        return Ok(Way::Cpu);
    }
    if sums == DeviceSums::Tree || rows.iter().any(|row| row.nccl != rows[0].nccl || row.nccl == 0) {
        return Ok(Way::HostMemory);
    }
    let same = |a: &Row, b: &Row| a.device == b.device && a.host == b.host;
    for (second, row) in rows.iter().enumerate() {
        if let Some(first) = rows[..second].iter().position(|other| same(other, row)) {
            return Err(CommError::SharedGpu { first, second, host: row.host.clone() });
        }
    }
    Ok(Way::Nccl)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(device: &str, host: &str, nccl: i32) -> Row {
        Row { device: device.into(), host: host.into(), nccl }
    }

    #[test]
    fn a_gpu_for_each_rank_means_nccl() {
        let rows = [row("GPU-1", "a", 22809), row("GPU-2", "a", 22809), row("GPU-1", "b", 22809)];
        assert_eq!(agree(&rows, DeviceSums::Fast).unwrap(), Way::Nccl);
        assert_eq!(agree(&rows, DeviceSums::Tree).unwrap(), Way::HostMemory);
    }

    #[test]
    fn two_ranks_on_one_gpu_are_refused_unless_sums_go_through_host_memory() {
        let rows = [row("GPU-1", "a", 22809), row("GPU-2", "a", 22809), row("GPU-2", "a", 22809)];
        let error = agree(&rows, DeviceSums::Fast).unwrap_err().to_string();
        for part in ["ranks 1 and 2", "of a", "hint: ", "parallel.reproducible"] {
            assert!(error.contains(part), "no {part:?} in {error}");
        }
        assert_eq!(agree(&rows, DeviceSums::Tree).unwrap(), Way::HostMemory);
    }

    #[test]
    fn where_one_rank_has_no_nccl_or_another_one_none_uses_it() {
        for other in [0, 22705] {
            let rows = [row("GPU-1", "a", 22809), row("GPU-2", "a", other)];
            assert_eq!(agree(&rows, DeviceSums::Fast).unwrap(), Way::HostMemory);
        }
    }

    #[test]
    fn a_rank_without_a_gpu_among_others_is_named_with_its_host() {
        let rows = [row("GPU-1", "a", 22809), row("cpu", "b", 0)];
        let error = agree(&rows, DeviceSums::Fast).unwrap_err().to_string();
        assert!(error.contains("rank 1 on b") && error.contains("the CPU"), "{error}");
        assert_eq!(Row::from_text(&rows[0].to_text()), rows[0]);
    }

    #[test]
    fn on_the_cpu_a_group_stays_as_it_is() {
        let mut comm: Box<dyn Communicator> = Box::new(Solo::new());
        assert_eq!(serve(&mut comm, Device::Cpu, DeviceSums::Fast).unwrap(), Way::Cpu);
        assert_eq!(comm.device(), Device::Cpu);
    }
}
