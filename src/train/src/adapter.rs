//! The adapter in training, and AdamW (Loshchilov and Hutter 2019) on its averaged gradients.
//!
//! PRIVACY: [`PrivateAdapter`] changes by noised gradients alone, which makes it releasable; a [`BaselineAdapter`] is
//! another type, which [`crate::publish`] takes for the private zone alone.

use lm::LmError;
use lm::adapter::Lora;
use privacy::training::{ClippedSum, Noised};
use tch::Tensor;

use crate::args::Mechanism;

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
    /// First moments; none before the first step.
    pub first: Vec<Tensor>,
    /// Second moments; none before the first step.
    pub second: Vec<Tensor>,
    /// Steps taken.
    pub steps: u64,
}

impl Training {
    /// State before the first step.
    pub fn new(lora: Lora) -> Self {
        Self { lora, first: Vec::new(), second: Vec::new(), steps: 0 }
    }

    fn apply(&mut self, gradient: &[Vec<f32>], update: Update) -> Result<(), LmError> {
        if self.steps == 0 {
            self.first = zeros(&self.lora)?;
            self.second = zeros(&self.lora)?;
        }
        self.steps += 1;
        let bias = |beta: f64| 1.0 - beta.powi(i32::try_from(self.steps).unwrap_or(i32::MAX));
        let (bias_first, bias_second) = (bias(BETAS.0), bias(BETAS.1));
        tch::no_grad(|| {
            for (index, (_, tensor)) in self.lora.tensors.iter_mut().enumerate() {
                let gradient = Tensor::f_from_slice(&gradient[index])?.f_to_device(tensor.device())?;
                let gradient = gradient.f_view_as(tensor)?;
                let first = decay(&self.first[index], BETAS.0, &gradient)?;
                let second = decay(&self.second[index], BETAS.1, &gradient.f_square()?)?;
                let spread = second.f_div_scalar(bias_second)?.f_sqrt()?.f_add_scalar(EPSILON)?;
                let step = first.f_div_scalar(bias_first)?.f_div(&spread)?.f_mul_scalar(update.learning_rate)?;
                let decayed = tensor.f_mul_scalar(1.0 - update.learning_rate * update.weight_decay)?;
                *tensor = decayed.f_sub(&step)?;
                self.first[index] = first;
                self.second[index] = second;
            }
            Ok(())
        })
    }
}

fn zeros(lora: &Lora) -> Result<Vec<Tensor>, LmError> {
    lora.tensors.iter().map(|(_, tensor)| Ok(tensor.f_zeros_like()?)).collect()
}

/// `beta · moment + (1 − beta) · value`.
fn decay(moment: &Tensor, beta: f64, value: &Tensor) -> Result<Tensor, LmError> {
    Ok(moment.f_mul_scalar(beta)?.f_add(&value.f_mul_scalar(1.0 - beta)?)?)
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
    pub fn apply(&mut self, sum: &ClippedSum, expected_batch_size: f64, update: Update) -> Result<(), LmError> {
        self.0.apply(&sum.without_noise(expected_batch_size), update)
    }

    /// The state, to read.
    pub fn training(&self) -> &Training {
        &self.0
    }
}

/// Refuses an adapter that did not learn: every value finite, every tensor away from where it started. A silent
/// failure to train would otherwise be published as a success.
///
/// Of a baseline's tensors one has to be: in its first step B is zero, and with it the gradient of A, to which no noise
/// is added.
pub fn check_learned(initial: &Lora, trained: &Lora, mechanism: &Mechanism) -> Result<(), LmError> {
    let mut still = Vec::new();
    for ((name, before), (_, after)) in initial.tensors.iter().zip(&trained.tensors) {
        if !is_finite(after)? {
            return Err(LmError::Malformed(format!(
                "adapter tensor {name} has values that are not finite, so nothing is released\n\
                 help: lower --learning-rate or --weight-decay"
            )));
        }
        if before.f_equal(after)? {
            still.push(name);
        }
    }
    let allowed = match mechanism {
        Mechanism::Private(_) => 0,
        Mechanism::Baseline { .. } => trained.tensors.len().saturating_sub(1),
    };
    match still.first() {
        Some(name) if still.len() > allowed => Err(LmError::Malformed(format!(
            "adapter tensor {name} still has its initial value: training changed nothing, so nothing is released\n\
             help: raise --learning-rate"
        ))),
        _ => Ok(()),
    }
}

/// Whether all values of `tensor` are finite.
pub fn is_finite(tensor: &Tensor) -> Result<bool, LmError> {
    Ok(tensor.f_isfinite()?.f_all()?.f_int64_value(&[])? != 0)
}

#[cfg(test)]
mod tests {
    use lm::adapter::{LoraConfig, Target};
    use privacy::training::TrainingMechanism;
    use tch::nn::{AdamW, OptimizerConfig, VarStore};
    use tch::{Device, Kind};

    use super::*;

    /// An adapter of two named tensors.
    fn lora(a: &[f32], b: &[f32]) -> Lora {
        let config = LoraConfig { rank: 1, alpha: 1.0, targets: vec![Target::Q], dropout: 0.0 };
        Lora { config, tensors: vec![("a".into(), Tensor::from_slice(a)), ("b".into(), Tensor::from_slice(b))] }
    }

    fn private() -> Mechanism {
        Mechanism::Private(TrainingMechanism::new(0.5, 1.0, 1, 1.0, 8.0).unwrap())
    }

    fn baseline() -> Mechanism {
        Mechanism::Baseline { sampling_probability: 0.5, steps: 1, expected_batch_size: 8.0 }
    }

    #[track_caller]
    fn close(found: &Tensor, expected: &[f64]) {
        let found = Vec::<f32>::try_from(found).unwrap();
        for (&found, &expected) in found.iter().zip(expected) {
            let error = (f64::from(found) - expected).abs();
            assert!(error <= 1e-6 * expected.abs().max(1e-3), "found {found}, expected {expected}");
        }
    }

    const START: [f32; 4] = [0.5, -0.25, 0.0, 3.0];
    /// `(learning rate, gradient, parameters afterwards)` of four steps with weight decay 0.1.
    ///
    /// PyTorch 2.11's update rule in Python's float64 (its Python package was not at hand); regenerate with
    /// tests/golden/adamw.py.
    #[rustfmt::skip]
    const GOLDEN: [(f64, [f32; 4], [f64; 4]); 4] = [
        (1e-2, [0.1, 1e-7, 0.0, -20.0], [4.895000010e-01, -2.588409091e-01, 0.000000000e+00, 3.007000000e+00]),
        (2e-2, [-0.3, 2e-7, 0.0, -5.0], [4.984047972e-01, -2.764787820e-01, 0.000000000e+00, 3.017597951e+00]),
        (5e-3, [0.2, -1e-7, 0.5, 40.0], [4.980616564e-01, -2.783022737e-01, -3.194067886e-03, 3.014718972e+00]),
        (1e-2, [0.0, 3e-7, -0.25, 1.0], [4.974096973e-01, -2.843743995e-01, -5.270813921e-03, 3.009330875e+00]),
    ];

    #[test]
    fn adamw_steps_as_the_golden_values_and_libtorch_do() {
        let mut training = Training::new(lora(&START, &[1.0]));
        // The peer: libtorch's own AdamW.
        let variables = VarStore::new(Device::Cpu);
        let peer = variables.root().var_copy("a", &Tensor::from_slice(&START));
        let mut optimizer = AdamW { wd: 0.1, ..AdamW::default() }.build(&variables, 1.0).unwrap();
        for (learning_rate, gradient, expected) in GOLDEN {
            training.apply(&[gradient.to_vec(), vec![1.0]], Update { learning_rate, weight_decay: 0.1 }).unwrap();
            close(&training.lora.tensors[0].1, &expected);
            optimizer.set_lr(learning_rate);
            optimizer.backward_step(&(&peer * Tensor::from_slice(&gradient)).sum(Kind::Float));
            close(&peer.detach(), &expected);
        }
        assert_eq!(training.steps, 4);
    }

    #[test]
    fn an_untouched_tensor_is_refused() {
        let initial = lora(&[1.0, 2.0], &[0.0]);
        let refused = check_learned(&initial, &lora(&[1.5, 2.0], &[0.0]), &private()).unwrap_err().to_string();
        assert!(refused.contains("adapter tensor b still has its initial value"), "{refused}");
        check_learned(&initial, &lora(&[1.5, 2.0], &[0.1]), &private()).unwrap();
    }

    #[test]
    fn of_a_baseline_one_tensor_must_move() {
        let initial = lora(&[1.0, 2.0], &[0.0]);
        check_learned(&initial, &lora(&[1.0, 2.0], &[0.1]), &baseline()).unwrap();
        let refused = check_learned(&initial, &initial, &baseline()).unwrap_err().to_string();
        assert!(refused.contains("adapter tensor a still has its initial value"), "{refused}");
    }

    #[test]
    fn a_tensor_that_is_not_finite_is_refused() {
        let initial = lora(&[1.0, 2.0], &[0.0]);
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let refused = check_learned(&initial, &lora(&[1.5, bad], &[0.1]), &baseline()).unwrap_err().to_string();
            assert!(refused.contains("adapter tensor a has values that are not finite"), "{refused}");
        }
    }

    #[test]
    fn too_little_memory_is_an_error_and_no_panic() {
        // The moments of this tensor would need a petabyte; the tensor itself is one number, seen many times.
        let huge = Tensor::from_slice(&[1f32]).expand([1i64 << 48], false);
        let mut training = Training::new(Lora { tensors: vec![("a".into(), huge)], ..lora(&[], &[]) });
        let update = Update { learning_rate: 0.1, weight_decay: 0.0 };
        let refused = training.apply(&[vec![1.0]], update).unwrap_err();
        assert!(matches!(&refused, LmError::Usage(told) if told.contains("--micro-batch-tokens")), "{refused}");
    }
}
