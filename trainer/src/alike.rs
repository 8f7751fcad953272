//! Whether all ranks run the same: the same binary on the same libtorch, with the same variables in the
//! environment of its libraries. Compared before anything is computed, so that a machine with an old copy is
//! named and does not spoil a run.

use crate::error::TrainError;
use ops::collectives::Communicator;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use tracing::warn;

/// Variables that libraries read; ranks that differ in them may compute differently.
const PREFIXES: [&str; 7] = ["OMP_", "MKL_", "KMP_", "GOMP_", "ATEN_", "ONEDNN_", "DNNL_"];

/// What is compared.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Identity {
    host: String,
    version: String,
    /// BLAKE3 of the binary; of the first rank of each machine, the others run the same file.
    binary: Option<String>,
    /// Bytes of libtorch_cpu.so.
    libtorch_bytes: u64,
    variables: BTreeMap<String, String>,
    /// What the processor can do beyond the usual.
    processor: Vec<String>,
}

/// Compares all ranks with rank 0. Collective.
///
/// # Errors
/// `Unlike` on every rank, naming the first that differs; what the system or the communicator says.
pub(crate) fn check(comm: &dyn Communicator, reproducible: bool) -> Result<(), TrainError> {
    let mine = Identity::of_this_rank(comm)?;
    let bytes = serde_json::to_vec(&mine).map_err(io::Error::from).map_err(TrainError::io("identity"))?;
    let rows = comm.all_gather_bytes(&bytes)?;
    let all: Result<Vec<Identity>, _> = rows.iter().map(|row| serde_json::from_slice(row)).collect();
    let Ok(all) = all else {
        // Another version writes something else: its rank cannot be told from here, only that there is one.
        let row = rows.iter().position(|row| serde_json::from_slice::<Identity>(row).is_err()).unwrap_or(0);
        return Err(TrainError::Unlike {
            rank: row,
            host: "its host".into(),
            what: "another version".into(),
        });
    };
    for (rank, identity) in all.iter().enumerate() {
        if let Some(what) = identity.difference(&all[0]) {
            return Err(TrainError::Unlike { rank, host: identity.host.clone(), what });
        }
    }
    if comm.rank() == 0
        && reproducible
        && let Some(other) = all.iter().find(|identity| identity.processor != all[0].processor)
    {
        warn!(
            "{} and {} have processors of different kinds ({} and {}): results are reproducible only on the same \
             ranks of the same machines",
            all[0].host,
            other.host,
            all[0].processor.join(" "),
            other.processor.join(" "),
        );
    }
    Ok(())
}

impl Identity {
    fn of_this_rank(comm: &dyn Communicator) -> Result<Identity, TrainError> {
        let binary = match comm.local_rank() {
            0 => Some(digest(Path::new("/proc/self/exe")).map_err(TrainError::io("/proc/self/exe"))?),
            _ => None,
        };
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
        let variables = std::env::vars_os().filter_map(|(name, value)| {
            let name = name.into_string().ok()?;
            let matters = PREFIXES.iter().any(|prefix| name.starts_with(prefix));
            matters.then(|| (name, value.to_string_lossy().into_owned()))
        });
        Ok(Identity {
            host: comm.place().host.clone(),
            version: env!("CARGO_PKG_VERSION").to_string(),
            binary,
            libtorch_bytes: mapped_bytes(&maps, "libtorch_cpu.so"),
            variables: variables.collect(),
            processor: processor(),
        })
    }

    /// What is not as it is on the reference.
    fn difference(&self, reference: &Identity) -> Option<String> {
        if self.version != reference.version {
            return Some(format!("phalanx-rank {} instead of {}", self.version, reference.version));
        }
        if let (Some(mine), Some(theirs)) = (&self.binary, &reference.binary)
            && mine != theirs
        {
            return Some(format!(
                "another phalanx-rank (digest {} instead of {})",
                &mine[..16],
                &theirs[..16]
            ));
        }
        if self.libtorch_bytes != reference.libtorch_bytes {
            let (mine, theirs) = (self.libtorch_bytes, reference.libtorch_bytes);
            return Some(format!("another libtorch_cpu.so ({mine} bytes instead of {theirs})"));
        }
        let names = self.variables.keys().chain(reference.variables.keys());
        let shown = |value: Option<&String>| value.map_or("unset".to_string(), |value| format!("{value:?}"));
        names.into_iter().find_map(|name| {
            let (mine, theirs) = (self.variables.get(name), reference.variables.get(name));
            (mine != theirs).then(|| format!("{name} is {} instead of {}", shown(mine), shown(theirs)))
        })
    }
}

fn digest(path: &Path) -> io::Result<String> {
    let mut hash = blake3::Hasher::new();
    hash.update_reader(std::fs::File::open(path)?)?;
    Ok(hash.finalize().to_hex().to_string())
}

/// The size of a library that this process has mapped, given the text of /proc/self/maps; 0 if it has not.
fn mapped_bytes(maps: &str, library: &str) -> u64 {
    let path =
        maps.lines().filter_map(|line| line.get(line.find('/')?..)).find(|path| path.ends_with(library));
    path.and_then(|path| std::fs::metadata(path).ok()).map_or(0, |meta| meta.len())
}

/// Those of the processor's flags that choose between kernels.
fn processor() -> Vec<String> {
    const CHOOSE: [&str; 6] = ["avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile"];
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = info.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    CHOOSE
        .iter()
        .filter(|flag| flags.split(' ').any(|one| one == **flag))
        .map(|flag| flag.to_string())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use ops::collectives::Solo;

    fn identity() -> Identity {
        Identity::of_this_rank(&Solo::new()).unwrap()
    }

    #[test]
    fn a_rank_is_like_itself_and_tells_what_it_runs() {
        let identity = identity();
        assert_eq!(identity.difference(&identity), None);
        assert!(identity.libtorch_bytes > 0 && identity.binary.is_some(), "{identity:?}");
        check(&Solo::new(), true).unwrap();
    }

    #[test]
    fn whatever_differs_is_told() {
        let reference = identity();
        let other = |change: fn(&mut Identity)| {
            let mut other = reference.clone();
            change(&mut other);
            other.difference(&reference).expect("it differs")
        };
        let binary = other(|it| it.binary = Some("0".repeat(64)));
        assert!(binary.starts_with("another phalanx-rank (digest 0000000000000000 instead of "), "{binary}");
        assert!(other(|it| it.libtorch_bytes = 1).contains("another libtorch_cpu.so (1 bytes"));
        let variable = other(|it| drop(it.variables.insert("OMP_TEST".into(), "3".into())));
        assert_eq!(variable, "OMP_TEST is \"3\" instead of unset");
        assert!(other(|it| it.version = "9.9.9".into()).starts_with("phalanx-rank 9.9.9 instead of "));
    }
}
