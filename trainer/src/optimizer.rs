//! AdamW over all that this rank holds of a model, with its state. Knows the clipping rule; knows no
//! schedule.

use crate::engine::Engine;
use crate::error::TrainError;
use crate::weights::Parameters;
use configs::OptimConfig;
use ops::{AdamWSlice, AdamWStep, Moments};

/// The optimizer of a model: one pair of moments per segment, for the elements whose master is here.
#[derive(Debug)]
pub struct Optimizer {
    config: OptimConfig,
    moments: Vec<Moments>,
}

impl Optimizer {
    /// Moments of zero.
    ///
    /// # Errors
    /// What libtorch says, such as out of memory.
    pub fn new(config: &OptimConfig, parameters: &Parameters<'_>) -> Result<Optimizer, TrainError> {
        let moments = (0..parameters.len())
            .map(|index| Moments::zeros(parameters.held(index).len(), parameters.device()));
        Ok(Optimizer { config: config.clone(), moments: moments.collect::<Result<_, _>>()? })
    }

    /// The moments of the held elements, in the order of the model's segments.
    pub fn moments(&self) -> &[Moments] {
        &self.moments
    }

    /// The update number `step + 1`, from gradients of global norm `grad_norm`. They are scaled down
    /// to `grad_clip` when they are longer (Pascanu et al. 2013). Each segment's weights follow while the
    /// next is updated. Collective.
    ///
    /// # Errors
    /// What libtorch says, a failed collective.
    pub fn update(
        &mut self,
        engine: &mut Engine<'_>,
        step: u64,
        lr: f64,
        grad_norm: f64,
    ) -> Result<(), TrainError> {
        let clip = self.config.grad_clip;
        let grad_scale = if clip > 0.0 && grad_norm > clip { clip / grad_norm } else { 1.0 };
        engine.parameters_mut().settle()?;
        for (index, moments) in self.moments.iter_mut().enumerate() {
            let parameters = engine.parameters();
            let weights = parameters.rounded(index);
            let mut slice = AdamWSlice {
                spec: parameters.spec(index),
                range: parameters.held(index),
                param: parameters.master(index),
                grad: &engine.gradients().of_held(index),
                moments,
                weights: weights.as_ref(),
            };
            ops::adamw(&mut slice, &self.config, AdamWStep { lr, t: step + 1, grad_scale })?;
            engine.parameters_mut().send(index)?;
        }
        Ok(())
    }
}
