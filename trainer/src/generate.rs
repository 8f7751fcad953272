//! Text from the model: one token after another, sampled with counted random numbers.

use crate::engine::Engine;
use crate::error::TrainError;
use configs::Philox;
use tch::{Kind, Tensor};

/// How tokens are drawn.
#[derive(Debug, Clone, Copy)]
pub struct Sampling {
    /// Divides the logits.
    pub temperature: f64,
    /// Only the k likeliest tokens are drawn.
    pub top_k: i64,
    /// Tokens drawn.
    pub n_tokens: usize,
    /// Seed of the draws.
    pub seed: u64,
}

/// Continues `prompt` (at least one token) by `n_tokens` tokens, which are returned. The context is the
/// last `seq_len` tokens.
///
/// # Errors
/// What the engine says; collective where weights are gathered.
pub fn generate(engine: &mut Engine<'_>, prompt: &[i64], sampling: Sampling) -> Result<Vec<i64>, TrainError> {
    let random = Philox::new(sampling.seed);
    let mut tokens = prompt.to_vec();
    for drawn in 0..sampling.n_tokens {
        let start = tokens.len().saturating_sub(engine.model().config().seq_len);
        let context =
            Tensor::from_slice(&tokens[start..]).view([1, -1]).to_device(engine.parameters().device());
        let logits = engine.next_logits(&context)?.view([-1]) / sampling.temperature;
        let k = sampling.top_k.min(logits.size()[0]);
        let (values, ids) = logits.topk(k, 0, true, true);
        let probabilities = values.softmax(0, Kind::Double);
        tokens.push(ids.int64_value(&[draw(&probabilities, random.uniform([drawn as u32, 0, 0, 0]))]));
    }
    Ok(tokens.split_off(prompt.len()))
}

/// The index at which the running sum of probabilities first passes `uniform`.
fn draw(probabilities: &Tensor, uniform: f64) -> i64 {
    let passed = probabilities.cumsum(0, Kind::Double).le(uniform).sum(Kind::Int64).int64_value(&[]);
    passed.min(probabilities.size()[0] - 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gradients::Gradients;
    use crate::model::Gpt;
    use crate::weights::Parameters;
    use configs::{ModelConfig, Recompute, Shard};
    use ops::collectives::Solo;
    use tch::Device;

    #[test]
    fn the_same_seed_writes_the_same_text_past_the_context() {
        let config = ModelConfig {
            n_layer: 1,
            n_head: 2,
            n_embd: 16,
            seq_len: 6,
            vocab_size: 11,
            ..ModelConfig::default()
        };
        let (comm, segments) = (Solo::new(), configs::segments(&config));
        let mut parameters =
            Parameters::zeros(segments, Shard::None, Kind::Float, Device::Cpu, &comm).unwrap();
        parameters.init(3);
        let gradients = Gradients::new(&parameters, 1, true, &comm).unwrap();
        let mut engine = Engine::new(Gpt::new(&config), parameters, gradients, Recompute::None);
        let sampling = Sampling { temperature: 1.0, top_k: 5, n_tokens: 20, seed: 9 };
        let mut write = |sampling| generate(&mut engine, &[1, 2], sampling).unwrap();
        let text = write(sampling);
        assert_eq!(text.len(), 20);
        assert!(text.iter().all(|&token| (0..11).contains(&token)));
        assert_eq!(text, write(sampling));
        assert_ne!(text, write(Sampling { seed: 10, ..sampling }));
    }

    #[test]
    fn draws_follow_the_probabilities() {
        let probabilities = Tensor::from_slice(&[0.5, 0.25, 0.25]);
        let drawn = [0.0, 0.49, 0.5, 0.74, 0.76, 0.999_999].map(|u| draw(&probabilities, u));
        assert_eq!(drawn, [0, 0, 1, 1, 2, 2]);
    }
}
