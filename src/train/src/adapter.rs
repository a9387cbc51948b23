//! The adapter in training, and AdamW (Loshchilov and Hutter 2019) on its averaged gradients.
//!
//! PRIVACY: [`PrivateAdapter`] changes by noised gradients alone, which makes it releasable; a [`BaselineAdapter`] is
//! another type, without a way to the release zone.

use lm::LmError;
use lm::adapter::Lora;
use privacy::training::{ClippedSum, Noised};
use tch::Tensor;

const BETAS: (f64, f64) = (0.9, 0.999);
const EPSILON: f64 = 1e-8;

/// One optimizer step's settings.
#[derive(Clone, Copy, Debug)]
pub struct Update {
    /// Learning rate of this step.
    pub learning_rate: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
}

/// Adapter and optimizer state; the tensors stand in [`Lora`]'s order.
pub struct Training {
    /// The adapter.
    pub lora: Lora,
    /// First moments.
    pub first: Vec<Tensor>,
    /// Second moments.
    pub second: Vec<Tensor>,
    /// Steps taken.
    pub steps: u64,
}

impl Training {
    /// State before the first step.
    pub fn new(lora: Lora) -> Self {
        let zeros = || lora.tensors.iter().map(|(_, tensor)| tensor.zeros_like()).collect();
        let (first, second) = (zeros(), zeros());
        Self { lora, first, second, steps: 0 }
    }

    fn apply(&mut self, gradient: &[Vec<f32>], update: Update) -> Result<(), LmError> {
        self.steps += 1;
        let bias = |beta: f64| 1.0 - beta.powi(i32::try_from(self.steps).unwrap_or(i32::MAX));
        let (bias_first, bias_second) = (bias(BETAS.0), bias(BETAS.1));
        tch::no_grad(|| {
            for (index, (_, tensor)) in self.lora.tensors.iter_mut().enumerate() {
                let gradient = Tensor::from_slice(&gradient[index]).to_device(tensor.device()).f_view_as(tensor)?;
                let first = &mut self.first[index];
                let second = &mut self.second[index];
                *first = &*first * BETAS.0 + &gradient * (1.0 - BETAS.0);
                *second = &*second * BETAS.1 + gradient.square() * (1.0 - BETAS.1);
                let direction = (&*first / bias_first) / ((&*second / bias_second).sqrt() + EPSILON);
                let decayed = &*tensor * (1.0 - update.learning_rate * update.weight_decay);
                *tensor = decayed - direction * update.learning_rate;
            }
            Ok(())
        })
    }
}

/// An adapter that noised gradients alone have changed: post-processing of a mechanism, so it may be released.
pub struct PrivateAdapter(Training);

impl PrivateAdapter {
    /// Starts from public values, or from a checkpoint of the same plan.
    pub fn new(training: Training) -> Self {
        Self(training)
    }

    /// Takes one step along a noised mean gradient.
    pub fn apply(&mut self, gradient: &Noised<Vec<Vec<f32>>>, update: Update) -> Result<(), LmError> {
        self.0.apply(gradient.value(), update)
    }

    /// The state, to read.
    pub fn training(&self) -> &Training {
        &self.0
    }
}

/// An adapter trained without a mechanism: private.
pub struct BaselineAdapter(Training);

impl BaselineAdapter {
    /// Starts from public values, or from a checkpoint of the same plan.
    pub fn new(training: Training) -> Self {
        Self(training)
    }

    /// Takes one step along the plain mean gradient.
    pub fn apply(&mut self, mut sum: ClippedSum, expected_batch_size: f64, update: Update) -> Result<(), LmError> {
        for value in sum.tensors.iter_mut().flatten() {
            *value = (f64::from(*value) / expected_batch_size) as f32;
        }
        self.0.apply(&sum.tensors, update)
    }

    /// The state, to read.
    pub fn training(&self) -> &Training {
        &self.0
    }
}

/// Refuses an adapter that did not learn: every value finite, every tensor away from where it started. A silent
/// failure to train would otherwise be published as a success.
pub fn check_learned(initial: &Lora, trained: &Lora) -> Result<(), String> {
    for ((name, before), (_, after)) in initial.tensors.iter().zip(&trained.tensors) {
        if !bool::try_from(after.isfinite().all()).unwrap_or(false) {
            return Err(format!("adapter tensor {name} has values that are not finite\nhelp: lower --learning-rate"));
        }
        if before.equal(after) {
            return Err(format!(
                "adapter tensor {name} still has its initial value: training changed nothing, so nothing is released"
            ));
        }
    }
    Ok(())
}
