//! One step of Algorithm 1: sample units, clip each unit's gradient, sum. Noise follows in `privacy`.
//!
//! There is no callback between unit gradients and their sum: nothing outside this file can touch a single gradient.
//! Gradients stay on the model's device; only the sum, in whole numbers, goes to `privacy`.

use std::collections::HashMap;

use lm::LmError;
use lm::adapter::Lora;
use lm::decoder::Decoder;
use lm::gradients::{self, Example, example_gradients, micro_batches, summed_gradients};
use privacy::AccountingError;
use privacy::keyed::{Context, NoiseKey};
use privacy::training::ClippedSum;
use tch::{Device, Kind, Tensor};

use crate::args::Mechanism;

/// Bytes of unit gradients that are held at a time on CPU, beside one unit's at the least.
const GRADIENT_BYTES: usize = 256 << 20;
/// Their share of a device of its own, of what the weights leave there: the units of a micro-batch should be limited by
/// their tokens.
const GRADIENT_SHARE: usize = 8;

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
) -> Result<Vec<&'a Unit>, AccountingError> {
    let sampler = mechanism.rules()?.sampler(key, context, step);
    Ok(units.iter().filter(|unit| sampler.includes(&unit.id)).collect())
}

/// Sum over `units` of their gradients, each clipped to the mechanism's norm over all trainable parameters.
///
/// A unit whose gradient is not finite counts as zero. A baseline's gradients are summed as they are, without being told
/// apart; there it is a micro-batch that counts as zero.
/// Guarantee (private): adding or removing one unit moves the sum by at most [`ClippedSum::sensitivity`] in L2, given
/// every unit's gradient.
/// Source: Yu et al. 2024, Algorithm 1.
pub fn sum_gradients(
    decoder: &Decoder,
    lora: &Lora,
    mechanism: &Mechanism,
    units: &[&Unit],
    step: u64,
    limits: Limits,
) -> Result<ClippedSum, LmError> {
    let lengths: Vec<usize> = lora.tensors.iter().map(|(_, tensor)| tensor.numel()).collect();
    let mut sum = mechanism.rules().map_err(accounting)?.empty_sum(&lengths);
    let (granularity, device, workers) = (sum.granularity(), decoder.compute.device, gradients::workers(decoder));
    let limits = Limits { micro_batch_tokens: (limits.micro_batch_tokens / workers).max(1), ..limits };
    let bytes = decoder.spare_memory().map_or(GRADIENT_BYTES, |bytes| bytes / GRADIENT_SHARE);
    let rows = bytes / workers / (4 * lengths.iter().sum::<usize>()).max(1);
    let zeros = |&length: &usize| Ok(Tensor::f_zeros([length as i64], (Kind::Int64, device))?);
    let totals = gradients::fold(
        decoder,
        lora,
        pack(units, limits.micro_batch_tokens, rows, workers),
        || lengths.iter().map(zeros).collect::<Result<Vec<Tensor>, LmError>>(),
        |decoder, lora, totals, batch| {
            let gradients = match mechanism {
                Mechanism::Private(_) => unit_gradients(decoder, lora, &batch, step, limits, rows)?,
                Mechanism::Baseline { .. } => batch_gradient(decoder, lora, &batch, step, limits)?,
            };
            add_clipped(mechanism, &gradients, granularity, totals)
        },
    )?;
    // Whole numbers: whoever added what, the sum is the same.
    for totals in totals {
        let totals = totals.iter().map(|total| Ok(Vec::<i64>::try_from(total.f_to_device(Device::Cpu)?)?));
        sum.add_rounded(&totals.collect::<Result<Vec<_>, LmError>>()?).map_err(accounting)?;
    }
    Ok(sum)
}

/// What [`sum_gradients`] adds for one unit whose gradient is `gradient`, in whole multiples of `granularity`: for the
/// audit, whose canaries have gradients and no records.
pub fn clip_alone(mechanism: &Mechanism, gradient: &[f32], granularity: f64) -> Result<Vec<i64>, LmError> {
    let row = Tensor::f_from_slice(gradient)?.f_unsqueeze(0)?;
    let mut total = [Tensor::f_zeros([gradient.len() as i64], (Kind::Int64, Device::Cpu))?];
    add_clipped(mechanism, &[row], granularity, &mut total)?;
    let [total] = total;
    Ok(Vec::try_from(total)?)
}

/// `[units, parameters]` f32 for each adapter tensor: every unit's gradient summed over its examples, of which `rows`
/// have gradients of their own at a time.
fn unit_gradients(
    decoder: &Decoder,
    lora: &Lora,
    units: &[&Unit],
    step: u64,
    limits: Limits,
    rows: usize,
) -> Result<Vec<Tensor>, LmError> {
    let examples = examples(units, step);
    let gradients = |examples: &[Example]| -> Result<Vec<Tensor>, LmError> {
        let found = example_gradients(decoder, lora, examples, limits.block_length)?.gradients;
        found.iter().map(|gradient| Ok(gradient.f_flatten(1, -1)?)).collect()
    };
    if units.iter().all(|unit| unit.examples.len() == 1) {
        return gradients(&examples);
    }
    let owners: Vec<i64> =
        units.iter().enumerate().flat_map(|(index, unit)| unit.examples.iter().map(move |_| index as i64)).collect();
    let place = |values: Vec<i64>| Tensor::f_from_slice(&values)?.f_to_device(decoder.compute.device);
    let zeros = |(_, tensor): &(String, Tensor)| {
        Tensor::f_zeros([units.len() as i64, tensor.numel() as i64], (Kind::Float, decoder.compute.device))
    };
    let mut sums: Vec<Tensor> = lora.tensors.iter().map(zeros).collect::<Result<_, _>>()?;
    for (indices, part) in parts(&examples, limits.micro_batch_tokens, rows) {
        let found = gradients(&part)?;
        for round in rounds(indices.iter().map(|&index| owners[index])) {
            let (chosen, owners): (Vec<i64>, Vec<i64>) = round.into_iter().unzip();
            let (chosen, owners) = (place(chosen)?, place(owners)?);
            for (sum, gradient) in sums.iter_mut().zip(&found) {
                let _ = sum.f_index_add_(0, &owners, &gradient.f_index_select(0, &chosen)?)?;
            }
        }
    }
    Ok(sums)
}

/// `(row, owner)` of all rows, in rounds of which none has an owner twice; an owner's rows keep their order.
///
/// CUDA adds rows of one owner in any order where one call adds several, so that their sum would differ in its last
/// bits from run to run.
fn rounds(owners: impl Iterator<Item = i64>) -> Vec<Vec<(i64, i64)>> {
    let mut rounds: Vec<Vec<(i64, i64)>> = Vec::new();
    let mut taken: HashMap<i64, usize> = HashMap::new();
    for (row, owner) in (0..).zip(owners) {
        let round = taken.entry(owner).or_default();
        match rounds.get_mut(*round) {
            Some(rows) => rows.push((row, owner)),
            None => rounds.push(vec![(row, owner)]),
        }
        *round += 1;
    }
    rounds
}

/// `[1, parameters]` f32 for each adapter tensor: the gradient summed over all examples of `units`.
fn batch_gradient(
    decoder: &Decoder,
    lora: &Lora,
    units: &[&Unit],
    step: u64,
    limits: Limits,
) -> Result<Vec<Tensor>, LmError> {
    let zeros = |(_, tensor): &(String, Tensor)| Tensor::f_zeros_like(tensor);
    let mut sums: Vec<Tensor> = lora.tensors.iter().map(zeros).collect::<Result<_, _>>()?;
    for (_, part) in parts(&examples(units, step), limits.micro_batch_tokens, usize::MAX) {
        for (sum, gradient) in sums.iter_mut().zip(summed_gradients(decoder, lora, &part, limits.block_length)?) {
            let _ = sum.f_add_(&gradient)?;
        }
    }
    sums.iter().map(|sum| Ok(sum.f_reshape([1, -1])?)).collect()
}

/// The examples of `units` as `step` sees them.
fn examples(units: &[&Unit], step: u64) -> Vec<Example> {
    let mut examples: Vec<Example> = units.iter().flat_map(|unit| unit.examples.iter().cloned()).collect();
    for example in &mut examples {
        // A fresh mask for each step, from public values and the example alone.
        example.dropout_seed = example.dropout_seed.wrapping_add(step.wrapping_mul(0x9E37_79B9_7F4A_7C15));
    }
    examples
}

/// `(indices, the examples at them)` of each micro-batch, of `count` examples at most but of one at the least.
fn parts(examples: &[Example], tokens: usize, count: usize) -> Vec<(Vec<usize>, Vec<Example>)> {
    let lengths: Vec<usize> = examples.iter().map(|example| example.tokens.len()).collect();
    let batches = micro_batches(&lengths, tokens);
    let parts = batches.iter().flat_map(|batch| batch.chunks(count.max(1)));
    parts.map(|part| (part.to_vec(), part.iter().map(|&index| examples[index].clone()).collect())).collect()
}

/// Adds the rows of `gradients`, a unit's each, to `totals`: clipped, in whole multiples of `granularity`.
fn add_clipped(
    mechanism: &Mechanism,
    gradients: &[Tensor],
    granularity: f64,
    totals: &mut [Tensor],
) -> Result<(), LmError> {
    let factors = clip_factors(mechanism, gradients)?;
    clear_refused(gradients, &factors)?;
    let factors = Tensor::f_from_slice(&factors)?.f_to_device(device(gradients))?;
    for (total, gradient) in totals.iter_mut().zip(gradients) {
        let _ = total.f_add_(&clipped(gradient, &factors, granularity)?)?;
    }
    Ok(())
}

/// What each unit's gradient is multiplied by; 0 for a gradient that is not finite.
fn clip_factors(mechanism: &Mechanism, gradients: &[Tensor]) -> Result<Vec<f64>, LmError> {
    let mut squares = Tensor::f_zeros([], (Kind::Double, device(gradients)))?;
    for gradient in gradients {
        squares = squares.f_add(&gradient.f_square()?.f_sum_dim_intlist(1, false, Kind::Double)?)?;
    }
    let norms = Vec::<f64>::try_from(squares.f_sqrt()?.f_to_device(Device::Cpu)?)?;
    let factor = |norm: f64| match mechanism {
        Mechanism::Private(mechanism) => mechanism.clip_factor(norm),
        Mechanism::Baseline { .. } => f64::from(u8::from(norm.is_finite())),
    };
    Ok(norms.into_iter().map(factor).collect())
}

/// Zeroes the rows whose factor is 0: 0 × ∞ is not 0.
fn clear_refused(gradients: &[Tensor], factors: &[f64]) -> Result<(), LmError> {
    for (row, _) in factors.iter().enumerate().filter(|(_, factor)| **factor == 0.0) {
        for gradient in gradients {
            let _ = gradient.f_get(row as i64)?.f_zero_()?;
        }
    }
    Ok(())
}

fn device(gradients: &[Tensor]) -> Device {
    gradients.first().map_or(Device::Cpu, Tensor::device)
}

/// `[units, n]` f32 → `[n]` i64: rows times their factors in whole multiples of `granularity`, summed exactly (see
/// [`ClippedSum::add_rounded`]).
fn clipped(gradient: &Tensor, factors: &Tensor, granularity: f64) -> Result<Tensor, LmError> {
    let scale = factors.f_div_scalar(granularity)?.f_to_kind(Kind::Float)?.f_unsqueeze(1)?;
    let mut whole = gradient.f_mul(&scale)?;
    // Whole numbers of at most 2³⁴, of some thousand units: far below the 2⁵³ up to which float64 adds them exactly.
    Ok(whole.f_round_()?.f_sum_dim_intlist(0, false, Kind::Double)?.f_to_kind(Kind::Int64)?)
}

/// Tokens below which products are not worth cutting a micro-batch smaller.
const SMALLEST: usize = 256;

/// Groups whole units by length, so that padding is rare, into micro-batches of at most `tokens` padded tokens and
/// `count` units, but one unit at the least. Towards the end they become smaller, so that `workers` who take them in turn
/// end together.
fn pack<'a>(units: &[&'a Unit], tokens: usize, count: usize, workers: usize) -> Vec<Vec<&'a Unit>> {
    let longest = |unit: &Unit| unit.examples.iter().map(|example| example.tokens.len()).max().unwrap_or(0);
    let tokens_of = |unit: &Unit| unit.examples.iter().map(|example| example.tokens.len()).sum::<usize>();
    let mut sorted: Vec<&Unit> = units.to_vec();
    sorted.sort_by(|a, b| longest(b).cmp(&longest(a)).then_with(|| a.id.cmp(&b.id)));
    let mut left: usize = units.iter().map(|unit| tokens_of(unit)).sum();
    let mut batches: Vec<Vec<&Unit>> = Vec::new();
    let (mut width, mut rows, mut limit) = (0, 0, 0);
    for unit in sorted {
        rows += unit.examples.len();
        match batches.last_mut() {
            Some(batch) if rows * width <= limit && batch.len() < count => batch.push(unit),
            _ => {
                (width, rows) = (longest(unit), unit.examples.len());
                limit = match workers {
                    1 => tokens,
                    _ => tokens.min(SMALLEST.max(left / (2 * workers))),
                };
                batches.push(vec![unit]);
            }
        }
        left -= tokens_of(unit);
    }
    batches
}

fn accounting(error: AccountingError) -> LmError {
    LmError::Usage(error.to_string())
}

#[cfg(test)]
mod tests {
    use privacy::training::TrainingMechanism;

    use super::*;
    use crate::testing;

    const CLIP_NORM: f64 = 0.05;

    fn mechanism() -> Mechanism {
        Mechanism::Private(TrainingMechanism::new(0.5, 1.0, 3, CLIP_NORM, 8.0).unwrap())
    }

    fn sum(decoder: &Decoder, lora: &Lora, units: &[&Unit], micro_batch_tokens: usize) -> Vec<f32> {
        let limits = Limits { block_length: 32, micro_batch_tokens };
        sum_gradients(decoder, lora, &mechanism(), units, 0, limits).unwrap().without_noise(1.0).concat()
    }

    fn norm(values: &[f32]) -> f64 {
        values.iter().map(|&value| f64::from(value).powi(2)).sum::<f64>().sqrt()
    }

    fn distance(a: &[f32], b: &[f32]) -> f64 {
        norm(&a.iter().zip(b).map(|(a, b)| a - b).collect::<Vec<_>>())
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
    fn a_baseline_sums_gradients_as_they_are() {
        let folder = tempfile::tempdir().unwrap();
        let (decoder, lora) = testing::tiny(folder.path());
        let mut units = testing::units(8);
        units.push(Unit { id: "several".into(), examples: (20..24).map(testing::example).collect() });
        let units: Vec<&Unit> = units.iter().collect();
        let limits = Limits { block_length: 32, micro_batch_tokens: 3 * 20 };
        let rows = unit_gradients(&decoder, &lora, &units, 0, limits, usize::MAX).unwrap();
        let expected: Vec<f32> =
            rows.iter().flat_map(|g| Vec::<f32>::try_from(g.sum_dim_intlist(0, false, Kind::Float)).unwrap()).collect();
        let baseline = Mechanism::Baseline { sampling_probability: 0.5, steps: 3, expected_batch_size: 8.0 };
        let found = sum_gradients(&decoder, &lora, &baseline, &units, 0, limits).unwrap().without_noise(1.0).concat();
        assert!(norm(&expected) > 2.0 * CLIP_NORM, "a private run would clip these");
        assert!(distance(&found, &expected) < 1e-4 * norm(&expected));
    }

    #[test]
    fn the_sum_is_what_privacy_adds_unit_by_unit() {
        let folder = tempfile::tempdir().unwrap();
        let (decoder, lora) = testing::tiny(folder.path());
        let units = testing::units(8);
        let limits = Limits { block_length: 32, micro_batch_tokens: 1 };
        let Mechanism::Private(rules) = mechanism() else { unreachable!("the tests' mechanism is private") };
        let lengths: Vec<usize> = lora.tensors.iter().map(|(_, tensor)| tensor.numel()).collect();
        let mut expected = rules.empty_sum(&lengths);
        for unit in &units {
            let gradients = unit_gradients(&decoder, &lora, &[unit], 0, limits, usize::MAX).unwrap();
            let rows: Vec<Vec<f32>> = gradients.iter().map(|g| Vec::try_from(g.flatten(0, -1)).unwrap()).collect();
            expected.add(&rows.iter().map(Vec::as_slice).collect::<Vec<_>>()).unwrap();
        }
        let found = sum(&decoder, &lora, &units.iter().collect::<Vec<_>>(), 1);
        let off = distance(&found, &expected.without_noise(1.0).concat());
        // What float32 and the lattice may change in the sums of eight units.
        assert!(off <= 8.0 * (expected.sensitivity() - CLIP_NORM), "{off:e}");
    }

    #[test]
    fn a_unit_that_is_clipped_alone_adds_what_privacy_adds() {
        let gradient = [0.3, -0.4, 0.0, 2.0];
        let rules = mechanism().rules().unwrap();
        let mut expected = rules.empty_sum(&[gradient.len()]);
        expected.add(&[&gradient]).unwrap();
        let mut found = rules.empty_sum(&[gradient.len()]);
        found.add_rounded(&[clip_alone(&mechanism(), &gradient, found.granularity()).unwrap()]).unwrap();
        let found = found.without_noise(1.0).concat();
        assert!((norm(&found) / CLIP_NORM - 1.0).abs() < 1e-6, "{found:?}");
        assert!(distance(&found, &expected.without_noise(1.0).concat()) <= 2.0 * (expected.sensitivity() - CLIP_NORM));
        assert_eq!(clip_alone(&mechanism(), &[f32::NAN, 1.0], 1.0).unwrap(), [0, 0]);
    }

    #[test]
    fn a_unit_of_many_records_is_cut_into_micro_batches() {
        let folder = tempfile::tempdir().unwrap();
        let (decoder, lora) = testing::tiny(folder.path());
        let unit = Unit { id: "many".into(), examples: (0..40).map(testing::example).collect() };
        let whole = sum(&decoder, &lora, &[&unit], 40 * 20);
        assert!((norm(&whole) / CLIP_NORM - 1.0).abs() < 1e-4, "one unit, clipped once");
        assert!(distance(&whole, &sum(&decoder, &lora, &[&unit], 32)) < 1e-6);
    }

    #[test]
    fn how_many_gradients_are_held_at_a_time_does_not_change_them() {
        let folder = tempfile::tempdir().unwrap();
        let (decoder, lora) = testing::tiny(folder.path());
        let mut units = testing::units(3);
        units.push(Unit { id: "many".into(), examples: (0..12).map(testing::example).collect() });
        let units: Vec<&Unit> = units.iter().collect();
        let limits = Limits { block_length: 32, micro_batch_tokens: 6 * 20 };
        let gradients = |rows| -> Vec<f32> {
            let found = unit_gradients(&decoder, &lora, &units, 0, limits, rows).unwrap();
            found.iter().flat_map(|gradient| Vec::<f32>::try_from(gradient.flatten(0, -1)).unwrap()).collect()
        };
        let free = gradients(usize::MAX);
        for rows in [0, 1, 4] {
            assert!(distance(&gradients(rows), &free) < 1e-5 * norm(&free), "{rows} rows");
        }
        let examples = examples(&units, 0);
        assert!(parts(&examples, limits.micro_batch_tokens, 4).iter().all(|(indices, _)| indices.len() <= 4));
        assert!(parts(&examples, limits.micro_batch_tokens, usize::MAX).iter().any(|(indices, _)| indices.len() > 4));
    }

    #[test]
    fn no_owner_stands_twice_in_a_round() {
        let found = rounds([7, 3, 7, 7, 5, 3].into_iter());
        assert_eq!(found, [vec![(0, 7), (1, 3), (4, 5)], vec![(2, 7), (5, 3)], vec![(3, 7)]]);
        assert!(rounds(std::iter::empty()).is_empty());
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
