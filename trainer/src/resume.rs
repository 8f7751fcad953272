//! What a start goes on from: the newest checkpoint that all ranks together prove good, whether it is of this
//! run, and its values into the parameters. Nothing here decides when to save or to go back.

use crate::checkpoint::{CheckpointError, Checkpoints, Loaded, StateKind, TrainState};
use crate::error::TrainError;
use crate::run_folder::RunFolder;
use crate::train::Learner;
use crate::weights::narrow;
use configs::RunConfig;
use ops::collectives::Communicator;
use std::ops::Range;
use tch::Tensor;
use tracing::warn;

/// The newest checkpoint all of whose bytes are what was written, or nothing when the run has none. Each rank
/// proves a share of the bytes, so that many ranks start as fast as one; damage that any of them finds is
/// told once. Collective.
///
/// # Errors
/// `NoneGood` when there are checkpoints and all are damaged; a folder that cannot be listed.
pub(crate) fn newest_good(folder: &RunFolder, comm: &dyn Communicator) -> Result<Option<Loaded>, TrainError> {
    let checkpoints = Checkpoints::open(folder.dir());
    let mut skipped = Vec::new();
    for step in steps_of_rank_0(&checkpoints, comm)?.into_iter().rev() {
        let proved = checkpoints.verify_share(step, comm.rank(), comm.world_size());
        let mine = proved.as_ref().map_or_else(ToString::to_string, |_| String::new());
        let damage = comm.all_gather_bytes(mine.as_bytes())?.into_iter().find(|text| !text.is_empty());
        match (proved, damage) {
            (Ok(loaded), None) => {
                if comm.rank() == 0 {
                    skipped.iter().for_each(|damaged| warn!("{damaged}; using an earlier one"));
                }
                return Ok(Some(loaded));
            }
            (_, damage) => {
                skipped.extend(damage.map(|text| String::from_utf8_lossy(&text).into_owned()));
            }
        }
    }
    if skipped.is_empty() { Ok(None) } else { Err(CheckpointError::NoneGood(skipped).into()) }
}

/// The steps that have a checkpoint as rank 0 lists them: a shared folder may show others something else.
fn steps_of_rank_0(checkpoints: &Checkpoints, comm: &dyn Communicator) -> Result<Vec<u64>, TrainError> {
    let mut bytes = Vec::new();
    if comm.rank() == 0 {
        bytes = checkpoints.steps()?.into_iter().flat_map(u64::to_le_bytes).collect();
    }
    comm.broadcast_bytes(&mut bytes, 0)?;
    Ok(bytes.as_chunks().0.iter().map(|step| u64::from_le_bytes(*step)).collect())
}

/// Refuses to go on with something else than what the checkpoint was made with.
pub(crate) fn check_same_run(
    config: &RunConfig,
    now: &TrainState,
    loaded: &Loaded,
) -> Result<(), TrainError> {
    let then = loaded.state();
    let mut differences = match configs::parse(&then.config) {
        Ok(earlier) => config.fixed_differences(&earlier),
        Err(why) => vec![format!("its configuration cannot be read here: {why}")],
    };
    let mut compare = |key: &str, now: &str, then: &str| {
        if now != then {
            differences.push(format!("{key} has the digest {now}, the checkpoint was made with {then}"));
        }
    };
    compare(config.data.train_key(), &now.train_digest, &then.train_digest);
    if let (Some(now), Some(then)) = (&now.val_digest, &then.val_digest) {
        compare("data.val", now, then);
    }
    if !differences.is_empty() {
        return Err(TrainError::Fixed { checkpoint: loaded.folder().to_path_buf(), differences });
    }
    Ok(loaded.check_layout(&now.segments)?)
}

/// Elements read at a time, few enough to stay in the cache on their way.
const LOAD_NUMEL: usize = 1 << 18;

/// Fills parameters and moments from a checkpoint: what of them this rank holds.
///
/// # Errors
/// Values that cannot be read.
pub(crate) fn load(loaded: &Loaded, learner: &Learner<'_>) -> Result<(), CheckpointError> {
    let parameters = learner.engine.parameters();
    for (index, moments) in learner.optimizer.moments().iter().enumerate() {
        let (spec, held) = (parameters.spec(index), parameters.held(index));
        let flats = [
            (StateKind::Param, parameters.master(index)),
            (StateKind::ExpAvg, &moments.exp_avg),
            (StateKind::ExpAvgSq, &moments.exp_avg_sq),
        ];
        for (kind, flat) in flats {
            fill(loaded, (&spec.name, kind), held.clone(), flat)?;
        }
    }
    Ok(())
}

/// Fills `flat` with the elements `range` of a segment's buffer.
pub(crate) fn fill(
    loaded: &Loaded,
    (segment, kind): (&str, StateKind),
    range: Range<usize>,
    flat: &Tensor,
) -> Result<(), CheckpointError> {
    for start in range.clone().step_by(LOAD_NUMEL) {
        let mut values = vec![0f32; LOAD_NUMEL.min(range.end - start)];
        loaded.fill_from(segment, kind, start, &mut values)?;
        let within = start - range.start..start - range.start + values.len();
        narrow(flat, &within).copy_(&Tensor::from_slice(&values));
    }
    Ok(())
}
