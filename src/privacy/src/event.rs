//! Mechanisms as plain values: what the ledger stores and the accountant reads. Meanings never change.

use serde::{Deserialize, Serialize};

use crate::AccountingError;

/// One use of a mechanism on a corpus, under add-or-remove-one-unit adjacency.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Event {
    /// One release with Gaussian noise of standard deviation `noise_multiplier` × L2 sensitivity.
    Gaussian {
        /// Noise standard deviation ÷ L2 sensitivity.
        noise_multiplier: f64,
    },
    /// `steps` releases, each on a fresh Poisson sample of the units.
    PoissonSampledGaussian {
        /// Chance that a unit joins a step.
        sampling_probability: f64,
        /// Noise standard deviation ÷ L2 sensitivity.
        noise_multiplier: f64,
        /// Number of steps.
        steps: u64,
    },
    /// One histogram with discrete Gaussian noise; a unit's vote vector has L2 norm ≤ 1.
    DiscreteGaussian {
        /// Noise parameter σ ÷ L2 sensitivity.
        noise_multiplier: f64,
    },
}

/// Largest noise multiplier and step count that are taken: beyond these a number is a mistake, not a mechanism. The proof
/// that noise never exceeds its integers ([`crate::gaussian`]) also rests on the first.
pub(crate) const MAX_NOISE_MULTIPLIER: f64 = 1e6;
const MAX_STEPS: u64 = 1 << 40;

impl Event {
    /// Refuses parameters without meaning: a noise multiplier that is not positive and finite, a probability outside
    /// (0, 1], no steps. Whoever reads events from storage calls this; the accountant does so again.
    pub fn validate(&self) -> Result<(), AccountingError> {
        let noise_multiplier = match *self {
            Event::Gaussian { noise_multiplier } | Event::DiscreteGaussian { noise_multiplier } => noise_multiplier,
            Event::PoissonSampledGaussian { sampling_probability, noise_multiplier, steps } => {
                if !(sampling_probability > 0.0 && sampling_probability <= 1.0) {
                    return Err(AccountingError(format!(
                        "sampling_probability: expected a number in (0, 1], found {sampling_probability}"
                    )));
                }
                if !(1..=MAX_STEPS).contains(&steps) {
                    return Err(AccountingError(format!("steps: expected 1 to {MAX_STEPS}, found {steps}")));
                }
                noise_multiplier
            }
        };
        if noise_multiplier > 0.0 && noise_multiplier <= MAX_NOISE_MULTIPLIER {
            return Ok(());
        }
        Err(AccountingError(format!(
            "noise_multiplier: expected a positive number up to {MAX_NOISE_MULTIPLIER:e}, found {noise_multiplier}"
        )))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn meaningless_parameters_are_refused() {
        let sampled = |sampling_probability, noise_multiplier, steps| Event::PoissonSampledGaussian {
            sampling_probability,
            noise_multiplier,
            steps,
        };
        assert!(sampled(1.0, 1.0, 1).validate().is_ok());
        for bad in [
            sampled(0.0, 1.0, 1),
            sampled(1.1, 1.0, 1),
            sampled(f64::NAN, 1.0, 1),
            sampled(0.5, 0.0, 1),
            sampled(0.5, f64::NAN, 1),
            sampled(0.5, f64::INFINITY, 1),
            sampled(0.5, 1.1e6, 1),
            sampled(0.5, 1.0, 0),
            sampled(0.5, 1.0, u64::MAX),
            Event::Gaussian { noise_multiplier: -1.0 },
            Event::DiscreteGaussian { noise_multiplier: 0.0 },
        ] {
            assert!(bad.validate().is_err(), "{bad:?}");
        }
    }

    proptest! {
        /// As the ledger stores it. A resumed run is recognised by equal parameters, so no bit may move.
        #[test]
        fn an_event_survives_being_written_and_read_bit_for_bit(
            q in 1..=1f64.to_bits(),
            noise in 1..=MAX_NOISE_MULTIPLIER.to_bits(),
            steps in 1..=MAX_STEPS,
        ) {
            let (sampling_probability, noise_multiplier) = (f64::from_bits(q), f64::from_bits(noise));
            let event = Event::PoissonSampledGaussian { sampling_probability, noise_multiplier, steps };
            prop_assert!(event.validate().is_ok());
            let written = serde_json::to_string(&event).unwrap();
            // Unequal bits of positive floats are unequal floats.
            prop_assert_eq!(serde_json::from_str::<Event>(&written).unwrap(), event);
        }
    }
}
