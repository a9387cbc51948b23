//! One step of Algorithm 1: sample units, clip each unit's gradient, sum. Noise follows in `privacy`.
//!
//! There is no callback between unit gradients and their sum: nothing outside this file can touch a single gradient.

use lm::LmError;
use lm::adapter::Lora;
use lm::decoder::Decoder;
use lm::gradients::{Example, example_gradients};
use privacy::keyed::{Context, NoiseKey};
use privacy::training::{ClippedSum, TrainingMechanism};
use tch::{Kind, Tensor};

use crate::args::Mechanism;

/// A privacy unit's training examples, tokenised.
pub struct Unit {
    /// Value of the privacy unit column.
    pub id: String,
    /// At least one example.
    pub examples: Vec<Example>,
}

/// Bounds of one micro-batch: they move memory, not the result.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Divides every example's summed token loss (the paper's block length).
    pub block_length: usize,
    /// Padded tokens per micro-batch.
    pub micro_batch_tokens: usize,
}

/// Draws the units of `step`: each joins by its own keyed coin, whoever else there is.
pub fn sample<'a>(
    mechanism: &Mechanism,
    key: &NoiseKey,
    context: &Context,
    step: u64,
    units: &'a [Unit],
) -> Result<Vec<&'a Unit>, privacy::AccountingError> {
    let sampler = match mechanism {
        Mechanism::Private(mechanism) => mechanism.clone(),
        // The baseline draws its batches as the private run does; its noise is never used.
        Mechanism::Baseline { sampling_probability, steps, expected_batch_size } => {
            TrainingMechanism::new(*sampling_probability, 1.0, *steps, 1.0, *expected_batch_size)?
        }
    };
    Ok(units.iter().filter(|unit| sampler.includes(key, context, step, &unit.id)).collect())
}

/// Sum over `units` of their gradients, each clipped to the mechanism's norm over all trainable parameters.
///
/// A baseline's gradients are summed as they are. A unit whose gradient is not finite counts as zero.
/// Guarantee (private): adding or removing one unit moves the sum by at most `clip_norm` in L2.
/// Source: Yu et al. 2024, Algorithm 1.
pub fn sum_gradients(
    decoder: &Decoder,
    lora: &Lora,
    mechanism: &Mechanism,
    units: &[&Unit],
    step: u64,
    limits: Limits,
) -> Result<ClippedSum, LmError> {
    let mut sum: Vec<Tensor> = lora
        .tensors
        .iter()
        .map(|(_, tensor)| Tensor::zeros([tensor.numel() as i64], (Kind::Float, tensor.device())))
        .collect();
    for batch in pack(units, limits.micro_batch_tokens) {
        let gradients = unit_gradients(decoder, lora, &batch, step, limits.block_length)?;
        let factors = clip_factors(mechanism, &gradients);
        for (total, gradient) in sum.iter_mut().zip(&gradients) {
            // Rows are zeroed rather than multiplied by a zero factor: 0 × ∞ is not 0.
            let rows = gradient.where_self(&factors.gt(0.0).unsqueeze(1), &gradient.zeros_like());
            *total += factors.to_kind(Kind::Float).matmul(&rows);
        }
    }
    let tensors = sum.iter().map(to_vec).collect::<Result<_, _>>()?;
    Ok(ClippedSum { tensors })
}

/// `[units, parameters]` f32 for each adapter tensor: every unit's gradient summed over its examples.
fn unit_gradients(
    decoder: &Decoder,
    lora: &Lora,
    units: &[&Unit],
    step: u64,
    block_length: usize,
) -> Result<Vec<Tensor>, LmError> {
    let mut examples: Vec<Example> = units.iter().flat_map(|unit| unit.examples.iter().cloned()).collect();
    for example in &mut examples {
        // A fresh mask for each step, from public values and the example alone.
        example.dropout_seed = example.dropout_seed.wrapping_add(step.wrapping_mul(0x9E37_79B9_7F4A_7C15));
    }
    let gradients = example_gradients(decoder, lora, &examples, block_length)?.gradients;
    let rows = |gradient: Tensor| gradient.flatten(1, -1);
    if units.iter().all(|unit| unit.examples.len() == 1) {
        return Ok(gradients.into_iter().map(rows).collect());
    }
    let owners: Vec<i64> =
        units.iter().enumerate().flat_map(|(index, unit)| unit.examples.iter().map(move |_| index as i64)).collect();
    let owners = Tensor::from_slice(&owners).to_device(decoder.compute.device);
    let per_unit = |gradient: Tensor| {
        let gradient = rows(gradient);
        let zeros = Tensor::zeros([units.len() as i64, gradient.size()[1]], (Kind::Float, gradient.device()));
        zeros.index_add(0, &owners, &gradient)
    };
    Ok(gradients.into_iter().map(per_unit).collect())
}

/// `[units]` f64: what each unit's gradient is multiplied by; 0 for a gradient that is not finite.
fn clip_factors(mechanism: &Mechanism, gradients: &[Tensor]) -> Tensor {
    let squares = gradients.iter().map(|gradient| gradient.square().sum_dim_intlist(1, false, Kind::Double));
    let norms: Tensor = squares.sum::<Tensor>().sqrt();
    let factor = |norm: f64| match mechanism {
        Mechanism::Private(mechanism) => mechanism.clip_factor(norm),
        Mechanism::Baseline { .. } => f64::from(u8::from(norm.is_finite())),
    };
    let norms: Vec<f64> = (0..norms.size()[0]).map(|unit| norms.double_value(&[unit])).collect();
    let factors: Vec<f64> = norms.into_iter().map(factor).collect();
    Tensor::from_slice(&factors).to_device(gradients[0].device())
}

/// Groups whole units by length, so that padding is rare, into micro-batches of at most `tokens` padded tokens.
fn pack<'a>(units: &[&'a Unit], tokens: usize) -> Vec<Vec<&'a Unit>> {
    let longest = |unit: &Unit| unit.examples.iter().map(|example| example.tokens.len()).max().unwrap_or(0);
    let mut sorted: Vec<&Unit> = units.to_vec();
    sorted.sort_by(|a, b| longest(b).cmp(&longest(a)).then_with(|| a.id.cmp(&b.id)));
    let mut batches: Vec<Vec<&Unit>> = Vec::new();
    let (mut width, mut rows) = (0, 0);
    for unit in sorted {
        rows += unit.examples.len();
        match batches.last_mut() {
            Some(batch) if rows * width <= tokens => batch.push(unit),
            _ => {
                (width, rows) = (longest(unit), unit.examples.len());
                batches.push(vec![unit]);
            }
        }
    }
    batches
}

fn to_vec(tensor: &Tensor) -> Result<Vec<f32>, LmError> {
    Ok(Vec::<f32>::try_from(tensor.to_device(tch::Device::Cpu))?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    const CLIP_NORM: f64 = 0.05;

    fn mechanism() -> Mechanism {
        Mechanism::Private(TrainingMechanism::new(0.5, 1.0, 3, CLIP_NORM, 8.0).unwrap())
    }

    fn sum(decoder: &Decoder, lora: &Lora, units: &[&Unit], micro_batch_tokens: usize) -> Vec<f32> {
        let limits = Limits { block_length: 32, micro_batch_tokens };
        sum_gradients(decoder, lora, &mechanism(), units, 0, limits).unwrap().tensors.concat()
    }

    fn distance(a: &[f32], b: &[f32]) -> f64 {
        a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>().sqrt()
    }

    #[test]
    fn micro_batches_do_not_change_the_update() {
        let folder = tempfile::tempdir().unwrap();
        let (decoder, lora) = testing::tiny(folder.path());
        let units = testing::units(8);
        let units: Vec<&Unit> = units.iter().collect();
        let one = sum(&decoder, &lora, &units, 1);
        assert!(distance(&one, &vec![0.0; one.len()]) > CLIP_NORM, "the gradients are there");
        for tokens in [3 * 20, 8 * 20] {
            assert!(distance(&one, &sum(&decoder, &lora, &units, tokens)) < 1e-5);
        }
    }

    #[test]
    fn adding_a_unit_moves_the_sum_by_at_most_the_clip_norm() {
        let folder = tempfile::tempdir().unwrap();
        let (decoder, lora) = testing::tiny(folder.path());
        let mut units = testing::units(9);
        // A unit with several records is clipped as one.
        let more = (20..24).map(testing::example).collect();
        units.push(Unit { id: "several".into(), examples: more });
        let all: Vec<&Unit> = units.iter().collect();
        let with = sum(&decoder, &lora, &all, 64);
        for left_out in 0..all.len() {
            let mut others = all.clone();
            others.remove(left_out);
            let moved = distance(&with, &sum(&decoder, &lora, &others, 64));
            assert!(moved <= CLIP_NORM * (1.0 + 1e-4), "unit {left_out} moved the sum by {moved}");
            assert!(moved > 0.0);
        }
    }

    #[test]
    fn an_empty_batch_is_a_step_like_any_other() {
        let folder = tempfile::tempdir().unwrap();
        let (decoder, lora) = testing::tiny(folder.path());
        let total = sum(&decoder, &lora, &[], 64);
        assert!(total.iter().all(|&value| value == 0.0));
        assert_eq!(total.len(), lora.tensors.iter().map(|(_, tensor)| tensor.numel()).sum::<usize>());
    }

    #[test]
    fn a_gradient_that_is_not_finite_counts_as_zero() {
        let folder = tempfile::tempdir().unwrap();
        let (decoder, mut lora) = testing::tiny(folder.path());
        lora.tensors[0].1 = lora.tensors[0].1.full_like(f64::INFINITY);
        let units = testing::units(3);
        let total = sum(&decoder, &lora, &units.iter().collect::<Vec<_>>(), 64);
        assert!(total.iter().all(|&value| value == 0.0));
    }

    #[test]
    fn inclusion_does_not_depend_on_the_other_units() {
        let key = NoiseKey::new([3; 32]);
        let context = Context::new("test");
        let units = testing::units(200);
        let drawn = |units: &[Unit], step| -> Vec<String> {
            sample(&mechanism(), &key, &context, step, units).unwrap().iter().map(|unit| unit.id.clone()).collect()
        };
        for step in 0..3 {
            let all = drawn(&units, step);
            let half = drawn(&units[..100], step);
            let expected: Vec<String> =
                all.into_iter().filter(|id| units[..100].iter().any(|unit| unit.id == *id)).collect();
            assert_eq!(half, expected);
        }
    }
}
