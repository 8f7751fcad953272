//! How this process was started, read from the environment. Touches neither MPI nor anything else.

use super::CommError;

/// How this process was started.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum How {
    /// By hand, or as the only task: one rank.
    Alone,
    /// By something that gives MPI a world.
    Mpi {
        /// Processes started together, where the environment tells.
        tasks: Option<usize>,
    },
}

/// Reads the variables of Open MPI's mpirun, of PMIx, of PMI (MPICH, srun --mpi=pmi2) and of Slurm.
pub(super) fn how(env: impl Fn(&str) -> Option<String>) -> Result<How, CommError> {
    let number = |name: &'static str| -> Result<Option<usize>, CommError> {
        let Some(got) = env(name) else { return Ok(None) };
        got.parse().map(Some).map_err(|_| CommError::Environment { name, got })
    };
    for size in ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"] {
        if let Some(tasks) = number(size)? {
            return Ok(How::Mpi { tasks: Some(tasks) });
        }
    }
    // A step's own count; the job's stands in where an old Slurm gives none.
    let tasks = match number("SLURM_STEP_NUM_TASKS")? {
        Some(tasks) => Some(tasks),
        None => number("SLURM_NTASKS")?,
    };
    if env("PMIX_RANK").is_some() || env("PMI_RANK").is_some() {
        return Ok(How::Mpi { tasks });
    }
    // Slurm's task without PMI: MPI would make each a world of its own, each rank 0.
    match (env("SLURM_PROCID"), tasks) {
        (Some(procid), Some(tasks)) if tasks > 1 => {
            let evidence = format!("Slurm's task {procid} of {tasks}, without PMI");
            Err(CommError::NoCommonWorld { tasks, evidence })
        }
        _ => Ok(How::Alone),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(pairs: &[(&str, &str)]) -> Result<How, CommError> {
        let pairs: Vec<(String, String)> =
            pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        how(move |name| pairs.iter().find(|(key, _)| key == name).map(|(_, value)| value.clone()))
    }

    #[test]
    fn without_a_launcher_there_is_one_rank() {
        assert_eq!(with(&[]).unwrap(), How::Alone);
        assert_eq!(with(&[("SLURM_NTASKS", "8")]).unwrap(), How::Alone, "the shell of an allocation");
        assert_eq!(with(&[("SLURM_PROCID", "0"), ("SLURM_NTASKS", "1")]).unwrap(), How::Alone);
    }

    #[test]
    fn mpirun_and_pmix_mean_mpi() {
        assert_eq!(with(&[("OMPI_COMM_WORLD_SIZE", "4")]).unwrap(), How::Mpi { tasks: Some(4) });
        assert_eq!(with(&[("PMI_RANK", "1"), ("PMI_SIZE", "2")]).unwrap(), How::Mpi { tasks: Some(2) });
        let srun = [("PMIX_RANK", "1"), ("SLURM_PROCID", "1"), ("SLURM_STEP_NUM_TASKS", "3")];
        assert_eq!(with(&srun).unwrap(), How::Mpi { tasks: Some(3) });
    }

    #[test]
    fn srun_without_pmix_is_refused_with_a_hint() {
        let error = with(&[("SLURM_PROCID", "1"), ("SLURM_NTASKS", "2")]).unwrap_err().to_string();
        assert!(error.contains("task 1 of 2") && error.contains("srun --mpi=pmix"), "{error}");
        assert!(with(&[("SLURM_PROCID", "0"), ("SLURM_STEP_NUM_TASKS", "2")]).is_err());
        let one = [("SLURM_PROCID", "0"), ("SLURM_STEP_NUM_TASKS", "1"), ("SLURM_NTASKS", "8")];
        assert_eq!(with(&one).unwrap(), How::Alone, "srun -n 1 within a larger allocation");
    }
}
