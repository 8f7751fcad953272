//! What a model writes after the prompts of a task. Owns how prompts are shared by the ranks and where a text is
//! over; tokens are chosen by `generate`.

use super::{Measure, Part};
use crate::engine::Engine;
use crate::error::TrainError;
use crate::generate::{Generation, Sampling, generate};
use configs::{Shard, SuiteTask};
use ops::collectives::Communicator;

/// Texts that are written side by side.
const AT_ONCE: usize = 8;

/// What follows each prompt, up to the first of the texts that end it, in the order of the items, on every rank.
/// Collective.
///
/// # Errors
/// A failed collective.
pub(super) fn texts(
    measure: &Measure,
    part: &Part,
    engine: &mut Engine<'_>,
    comm: &dyn Communicator,
) -> Result<Vec<String>, TrainError> {
    let sampling = Sampling { temperature: part.task.temperature, seed: measure.seed, ..Sampling::GREEDY };
    let prompts: Vec<Vec<i64>> = part
        .set
        .items()
        .iter()
        .map(|item| part.set.tokens(&item.spans[0]).iter().map(|&token| i64::from(token)).collect())
        .collect();
    let pulse = engine.pulse().clone();
    let (model, parameters) = engine.parts_mut();
    // Where weights are shared out, every rank has to write everything with the others.
    let alone = parameters.shard() == Shard::Parameters;
    let (rank, ranks) = if alone { (0, 1) } else { (comm.rank(), comm.world_size()) };
    let mut own: Vec<(usize, String)> = Vec::new();
    for (number, some) in prompts.chunks(AT_ONCE).enumerate().skip(rank).step_by(ranks) {
        let first = number * AT_ONCE;
        let how = Generation {
            sampling,
            max_tokens: part.task.max_tokens,
            end: Some(i64::from(measure.tokenizer.end_of_text())),
            first_text: first as u32,
        };
        let mut ids: Vec<Vec<u32>> = vec![Vec::new(); some.len()];
        let text_of = |ids: &[u32]| String::from_utf8_lossy(&measure.tokenizer.decode(ids)).into_owned();
        let mut each = |text: usize, token: i64| {
            pulse.touch(); // a long text is no hang
            ids[text].push(token as u32);
            cut(&text_of(&ids[text]), &part.task).is_none()
        };
        generate(model, parameters, some, &how, &mut each)?;
        for (place, ids) in ids.iter().enumerate() {
            let text = text_of(ids);
            let text = cut(&text, &part.task).unwrap_or(&text).to_string();
            own.push((first + place, text));
        }
    }
    let bytes = serde_json::to_vec(&own).expect("numbers and texts have a JSON form");
    let mut texts = vec![String::new(); prompts.len()];
    for bytes in comm.all_gather_bytes(&bytes)? {
        let those: Vec<(usize, String)> = serde_json::from_slice(&bytes).expect("a rank sends what it made");
        for (number, text) in those {
            texts[number] = text;
        }
    }
    Ok(texts)
}

/// A text before the first of those that end it; none where there is none of them.
fn cut<'a>(text: &'a str, task: &SuiteTask) -> Option<&'a str> {
    task.stop.iter().filter_map(|stop| text.find(stop.as_str())).min().map(|end| &text[..end])
}
