//! AdamW over all segments of a model, with its state. Knows the clipping rule; knows no schedule.

use crate::error::TrainError;
use crate::model::Gpt;
use configs::OptimConfig;
use ops::{AdamWStep, Moments};

/// The optimizer of a model: one pair of moments per segment.
#[derive(Debug)]
pub struct Optimizer {
    config: OptimConfig,
    moments: Vec<Moments>,
}

impl Optimizer {
    /// Moments of zero.
    pub fn new(config: &OptimConfig, model: &Gpt) -> Optimizer {
        Optimizer { config: config.clone(), moments: model.segments().iter().map(Moments::zeros).collect() }
    }

    /// The moments, in the order of the model's segments.
    pub fn moments(&self) -> &[Moments] {
        &self.moments
    }

    /// The moments, to be filled from a checkpoint.
    pub fn moments_mut(&mut self) -> &mut [Moments] {
        &mut self.moments
    }

    /// The update number `step + 1`, from gradients of global norm `grad_norm`. They are scaled down
    /// to `grad_clip` when they are longer (Pascanu et al. 2013).
    ///
    /// # Errors
    /// What libtorch says.
    pub fn update(&mut self, model: &Gpt, step: u64, lr: f64, grad_norm: f64) -> Result<(), TrainError> {
        let clip = self.config.grad_clip;
        let grad_scale = if clip > 0.0 && grad_norm > clip { clip / grad_norm } else { 1.0 };
        for (segment, moments) in model.segments().iter().zip(&mut self.moments) {
            ops::adamw(segment, moments, &self.config, AdamWStep { lr, t: step + 1, grad_scale })?;
        }
        Ok(())
    }
}
