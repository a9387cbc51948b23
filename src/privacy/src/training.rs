//! DP training as one value: the event that is accounted, the sampler that draws units and the noise that is added are
//! all made from a [`TrainingMechanism`], so code cannot account for one sampler and run another.
//!
//! The mechanism (Yu et al. 2024, Algorithm 1): in each step every unit joins by an independent keyed coin, its summed
//! gradient is clipped to `clip_norm`, the clipped gradients are summed, Gaussian noise is added once to the sum, and
//! the result is divided by `expected_batch_size`, a public constant.

use rayon::prelude::*;
use serde::Serialize;

use crate::AccountingError;
use crate::event::Event;
use crate::gaussian::{Lattice, add_noise};
use crate::keyed::{Context, KeyedHasher, NoiseKey};

/// Public parameters of DP training (Yu et al. 2024, Algorithm 1).
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TrainingMechanism {
    sampling_probability: f64,
    noise_multiplier: f64,
    steps: u64,
    clip_norm: f64,
    expected_batch_size: f64,
}

/// A sum of clipped unit gradients over a logical batch, in whole multiples of a lattice's spacing.
///
/// Guarantee: adding or removing one unit moves the sum by at most [`ClippedSum::sensitivity`] in L2, without exception,
/// where `train` clips by the rule of [`ClippedSum::add_rounded`]: a unit is clipped, rounded to the lattice and added as
/// integers, so neither the order of units, nor the micro-batches they came in, nor the other units' values can change what
/// one gradient adds (float sums do not have that property; Casacuberta et al. 2022).
#[derive(Clone, PartialEq)]
pub struct ClippedSum {
    clip_norm: f64,
    lattice: Lattice,
    tensors: Vec<Vec<i64>>,
}

impl ClippedSum {
    /// Adds what was summed where the gradients are, such as on a GPU: every unit's gradient (all tensors together, summed
    /// over its records) times its clip factor, divided by [`ClippedSum::granularity`], rounded to whole numbers, and these
    /// added exactly. A gradient that is not finite must add nothing. Errors when the shapes differ from those that the sum
    /// was made for.
    ///
    /// float32 is precise enough for all but the addition. Squares, factor and product then err by at most 1.25 · 2⁻²³
    /// of the norm together, and rounding by half the lattice's slack; the other half is at least 2⁻²² of it.
    pub fn add_rounded(&mut self, tensors: &[Vec<i64>]) -> Result<(), AccountingError> {
        let lengths = |tensors: &[Vec<i64>]| -> Vec<usize> { tensors.iter().map(Vec::len).collect() };
        let (expected, found) = (lengths(&self.tensors), lengths(tensors));
        if expected != found {
            return Err(AccountingError(format!(
                "gradient: expected tensors of lengths {expected:?}, found {found:?}"
            )));
        }
        for (sum, &index) in self.tensors.iter_mut().flatten().zip(tensors.iter().flatten()) {
            *sum = sum.saturating_add(index);
        }
        Ok(())
    }

    /// Spacing of the lattice: a power of two.
    pub fn granularity(&self) -> f64 {
        self.lattice.granularity()
    }

    /// L2 distance by which one unit can move the sum: `clip_norm` and at most 2⁻²⁰ of it for the lattice.
    pub fn sensitivity(&self) -> f64 {
        self.lattice.sensitivity()
    }

    /// The sum divided by `expected_batch_size`, as it is. PRIVACY: without noise, so for baselines alone, which stay in
    /// the private zone.
    pub fn without_noise(&self, expected_batch_size: f64) -> Vec<Vec<f32>> {
        let mean = |&index: &i64| (self.lattice.value(index) / expected_batch_size) as f32;
        self.tensors.iter().map(|tensor| tensor.iter().map(mean).collect()).collect()
    }
}

/// Output of a mechanism; only this crate can make one.
#[derive(Clone, Debug, PartialEq)]
pub struct Noised<T>(pub(crate) T);

impl<T> Noised<T> {
    /// The released value.
    pub fn value(&self) -> &T {
        &self.0
    }
}

impl TrainingMechanism {
    /// Checks the parameters: probability in (0, 1], steps ≥ 1, finite positive clip_norm, noise_multiplier > 0.
    pub fn new(
        sampling_probability: f64,
        noise_multiplier: f64,
        steps: u64,
        clip_norm: f64,
        expected_batch_size: f64,
    ) -> Result<Self, AccountingError> {
        for (name, value) in [("clip_norm", clip_norm), ("expected_batch_size", expected_batch_size)] {
            // The bounds keep every later product and quotient finite, and squares of float32 that matter from vanishing.
            if !(1e-10..=1e20).contains(&value) {
                return Err(AccountingError(format!("{name}: expected a number from 1e-10 to 1e20, found {value}")));
            }
        }
        let mechanism = Self { sampling_probability, noise_multiplier, steps, clip_norm, expected_batch_size };
        mechanism.event().validate()?;
        Ok(mechanism)
    }

    /// The event to reserve.
    pub fn event(&self) -> Event {
        Event::PoissonSampledGaussian {
            sampling_probability: self.sampling_probability,
            noise_multiplier: self.noise_multiplier,
            steps: self.steps,
        }
    }

    /// Chance that a unit joins a step.
    pub fn sampling_probability(&self) -> f64 {
        self.sampling_probability
    }

    /// Noise standard deviation ÷ `clip_norm`.
    pub fn noise_multiplier(&self) -> f64 {
        self.noise_multiplier
    }

    /// Number of steps.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// L2 bound on one unit's summed gradient.
    pub fn clip_norm(&self) -> f64 {
        self.clip_norm
    }

    /// Public constant that divides the noised sum.
    pub fn expected_batch_size(&self) -> f64 {
        self.expected_batch_size
    }

    /// The coins of one step: a keyed one for each unit, independent of all other units and steps.
    pub fn sampler(&self, key: &NoiseKey, context: &Context, step: u64) -> StepSampler {
        let context = context.clone().field("purpose", b"sample").field("step", &step.to_le_bytes());
        // Scaling by a power of two is exact; what `as` cuts off makes the coin rarer by < 2⁻⁶⁴, never likelier.
        let threshold = (self.sampling_probability * 2f64.powi(64)) as u128;
        StepSampler { hasher: key.hasher(&context), threshold }
    }

    /// Factor that clips a gradient of L2 norm `norm` to `clip_norm`; a non-finite norm gives 0 (the caller must then
    /// also zero the gradient, since 0 × ∞ is not 0).
    pub fn clip_factor(&self, norm: f64) -> f64 {
        if !norm.is_finite() {
            0.0
        } else if norm <= self.clip_norm {
            1.0
        } else {
            self.clip_norm / norm
        }
    }

    /// An empty sum over tensors of these lengths, which adds clipped units exactly.
    pub fn empty_sum(&self, lengths: &[usize]) -> ClippedSum {
        ClippedSum {
            clip_norm: self.clip_norm,
            lattice: Lattice::new(self.clip_norm, lengths.iter().sum()),
            tensors: lengths.iter().map(|&length| vec![0; length]).collect(),
        }
    }

    /// Adds Gaussian noise of standard deviation noise_multiplier × the sum's sensitivity once to the whole sum and divides
    /// by the expected batch size: the noised mean gradient of `step`.
    ///
    /// Errors when `sum` was made by a mechanism with another `clip_norm`.
    pub fn release(
        &self,
        key: &NoiseKey,
        context: &Context,
        step: u64,
        sum: ClippedSum,
    ) -> Result<Noised<Vec<Vec<f32>>>, AccountingError> {
        if sum.clip_norm != self.clip_norm {
            return Err(AccountingError(format!(
                "clip_norm of the sum: expected {}, found {}",
                self.clip_norm, sum.clip_norm
            )));
        }
        let deviation = self.noise_multiplier * sum.sensitivity();
        // Each tensor has a stream of its own, so that it does not matter who adds its noise.
        let noised = sum.tensors.into_par_iter().enumerate().map(|(tensor, mut indices)| {
            let context = context
                .clone()
                .field("purpose", b"noise")
                .field("step", &step.to_le_bytes())
                .field("tensor", &(tensor as u64).to_le_bytes());
            add_noise(key, &context, &sum.lattice, deviation, &mut indices);
            // From here on it is post-processing: rounding to f32 costs no privacy.
            indices.into_iter().map(|i| (sum.lattice.value(i) / self.expected_batch_size) as f32).collect()
        });
        Ok(Noised(noised.collect()))
    }
}

/// The coins of one step; made by [`TrainingMechanism::sampler`].
#[derive(Debug)]
pub struct StepSampler {
    hasher: KeyedHasher,
    threshold: u128,
}

impl StepSampler {
    /// Whether `unit` joins the step.
    pub fn includes(&self, unit: &str) -> bool {
        u128::from(self.hasher.hash(unit.as_bytes())) < self.threshold
    }
}

/// As many steps as it takes until every unit is expected to have joined `epochs` of them, at least one.
pub fn steps_of(epochs: f64, sampling_probability: f64) -> u64 {
    // What is whole but for rounding shall not become one more.
    (epochs / sampling_probability - 1e-9).ceil().max(1.0) as u64
}

/// The least noise with which training, and a vote of `vote_sigma` after it if there is one, spend `target_epsilon` at most.
///
/// Errors as [`crate::calibrate`] does.
pub fn calibrated_noise(
    sampling_probability: f64,
    steps: u64,
    vote_sigma: Option<f64>,
    target_epsilon: f64,
    delta: f64,
) -> Result<f64, AccountingError> {
    let vote = vote_sigma.map(|noise_multiplier| Event::DiscreteGaussian { noise_multiplier });
    let events = |noise_multiplier| {
        let training = Event::PoissonSampledGaussian { sampling_probability, noise_multiplier, steps };
        std::iter::once(training).chain(vote.clone()).collect()
    };
    crate::calibrate(events, target_epsilon, delta)
}

#[cfg(test)]
mod tests;
