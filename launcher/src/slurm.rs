//! The batch script for Slurm, as text. Submits nothing.

/// What the script is for.
#[derive(Debug)]
pub struct Batch<'a> {
    /// The job's name.
    pub name: &'a str,
    /// Ranks.
    pub ranks: usize,
    /// Machines, if they were stated.
    pub nodes: Option<usize>,
    /// Cores of each rank.
    pub threads: usize,
    /// `phalanx` and its arguments, quoted for a shell.
    pub command: &'a str,
}

/// The script. Slurm signals two minutes before the time limit, to the launcher itself, which takes the shell's
/// place; the job is put back into the queue when a machine fails, and goes on from its last checkpoint.
pub fn script(batch: &Batch<'_>) -> String {
    let nodes = batch.nodes.map_or(String::new(), |nodes| format!("#SBATCH --nodes={nodes}\n"));
    format!(
        "#!/bin/sh\n\
         #SBATCH --job-name={}\n\
         {nodes}\
         #SBATCH --ntasks={}\n\
         #SBATCH --cpus-per-task={}\n\
         #SBATCH --time=24:00:00\n\
         #SBATCH --signal=B:USR1@120\n\
         #SBATCH --requeue\n\
         #SBATCH --open-mode=append\n\
         #SBATCH --output={}-%j.log\n\
         # Two minutes before the time limit, or after scancel --batch --signal=USR1, the ranks write a checkpoint\n\
         # and the job ends with code 3; submitted again, it goes on.\n\
         exec {}\n",
        batch.name, batch.ranks, batch.threads, batch.name, batch.command,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_script_signals_the_launcher_in_time_and_runs_in_the_shells_place() {
        let command = "phalanx train 'my run.toml'";
        let told = script(&Batch { name: "tiny", ranks: 16, nodes: Some(2), threads: 1, command });
        assert!(told.starts_with("#!/bin/sh\n#SBATCH --job-name=tiny\n#SBATCH --nodes=2\n"), "{told}");
        for line in ["#SBATCH --ntasks=16", "#SBATCH --signal=B:USR1@120", "exec phalanx train 'my run.toml'"]
        {
            assert!(told.lines().any(|told| told == line), "no {line} in\n{told}");
        }
        assert!(
            !script(&Batch { name: "t", ranks: 1, nodes: None, threads: 1, command }).contains("--nodes")
        );
    }
}
