//! What a token costs by its position, with a dense model, an alternating and a banded one. Knows generation as
//! something to time.

use super::{Case, median};
use crate::error::TrainError;
use crate::generate::token_seconds;
use crate::model::Gpt;
use crate::weights::Parameters;
use configs::{ModelConfig, Shard};
use ops::collectives::Communicator;
use tch::{Device, Kind};

/// Where tokens are timed.
const POSITIONS: [usize; 4] = [256, 1024, 4096, 16_383];

/// GPT-2's smallest shape with a context of 16,384 and untrained weights, in fp32 on the CPU: seconds for a
/// token at growing positions beside those of the dense model there.
///
/// # Errors
/// No memory.
pub fn decode(comm: &dyn Communicator, threads: usize, turns: usize) -> Result<Vec<Case>, TrainError> {
    ops::device::configure_process(threads);
    let dense = ModelConfig { seq_len: 16_384, vocab_size: 257, ..ModelConfig::default() };
    let mut parameters =
        Parameters::zeros(configs::segments(&dense), Shard::None, Kind::Float, Device::Cpu, comm)?;
    parameters.init(1);
    let mut cases = Vec::new();
    for position in POSITIONS {
        // The three take turns, so that what else the machine does meets all of them.
        let models: Result<Vec<_>, TrainError> = ["dense", "dense, banded:256", "banded:256"]
            .into_iter()
            .map(|patterns| {
                let attention = patterns.split(", ").map(str::parse).collect::<Result<_, _>>();
                let attention = attention.map_err(|error: configs::PatternError| TrainError::Refused {
                    what: error.to_string(),
                    hint: "this is a mistake of the program".into(),
                })?;
                Ok((patterns, Gpt::new(&ModelConfig { attention, ..dense.clone() }), Vec::new()))
            })
            .collect();
        let mut models = models?;
        for _ in 0..turns {
            for (_, model, seconds) in &mut models {
                seconds.push(token_seconds(model, &mut parameters, position)?);
            }
        }
        let mut reference = None;
        for (patterns, _, seconds) in models {
            let ms = 1e3 * median(seconds);
            let reference = *reference.get_or_insert(ms);
            cases.push(Case::less_is_better(format!("{patterns} at {position}"), "ms/token", ms, reference));
        }
    }
    Ok(cases)
}
