//! The three parts of a step that the guarantee rests on, and the mechanism that was accounted for.
//!
//! In the product all are one value, and [`Parts::of`] is the only way to make them. They stand apart so that this
//! crate's tests can break one and keep the claim.

use doppel_train::args::Mechanism;
use privacy::AccountingError;
use privacy::event::Event;
use privacy::training::TrainingMechanism;

/// A training mechanism taken apart.
#[derive(Clone, Debug)]
pub(crate) struct Parts {
    /// What ε is claimed for.
    pub accounted: TrainingMechanism,
    /// What draws the units of a step.
    pub sampler: TrainingMechanism,
    /// What bounds a unit's gradient.
    pub clipping: Mechanism,
    /// What adds noise.
    pub noise: TrainingMechanism,
}

impl Parts {
    /// The product: one value in every part.
    pub fn of(mechanism: &TrainingMechanism) -> Self {
        Self {
            accounted: mechanism.clone(),
            sampler: mechanism.clone(),
            clipping: Mechanism::Private(mechanism.clone()),
            noise: mechanism.clone(),
        }
    }

    /// ε of the whole run as the ledger accounts for it.
    pub fn claimed(&self, delta: f64) -> Result<f64, AccountingError> {
        Ok(privacy::epsilon(&[self.accounted.event()], delta)?.pld)
    }

    /// ε of one step.
    pub fn claimed_per_step(&self, delta: f64) -> Result<f64, AccountingError> {
        let step = Event::PoissonSampledGaussian {
            sampling_probability: self.accounted.sampling_probability(),
            noise_multiplier: self.accounted.noise_multiplier(),
            steps: 1,
        };
        Ok(privacy::epsilon(&[step], delta)?.pld)
    }
}
