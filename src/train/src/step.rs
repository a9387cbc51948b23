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
fn clip_factors(mechanism: &Mechanism, tensors: &[Tensor]) -> Result<Vec<f64>, LmError> {
    let mut squares = Tensor::f_zeros([], (Kind::Double, device(tensors)))?;
    for gradient in tensors {
        squares = squares.f_add(&gradients::squared_norms(gradient)?)?;
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
    use proptest::collection::SizeRange;
    use proptest::prelude::*;

    use super::*;
    use crate::testing;

    const CLIP_NORM: f64 = 0.05;
    /// Parameters in each tensor of the properties' gradients.
    const LENGTHS: [i64; 2] = [24, 9];

    fn mechanism() -> Mechanism {
        clipping_to(CLIP_NORM)
    }

    fn clipping_to(clip_norm: f64) -> Mechanism {
        Mechanism::Private(TrainingMechanism::new(0.5, 1.0, 3, clip_norm, 8.0).unwrap())
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

    /// What [`add_clipped`] adds for units with these gradients at once.
    fn added(mechanism: &Mechanism, gradients: &[Tensor], granularity: f64) -> Vec<Vec<i64>> {
        let zeros = |gradient: &Tensor| Tensor::zeros([gradient.size()[1]], (Kind::Int64, Device::Cpu));
        let mut totals: Vec<Tensor> = gradients.iter().map(zeros).collect();
        add_clipped(mechanism, gradients, granularity, &mut totals).unwrap();
        totals.iter().map(|total| Vec::try_from(total).unwrap()).collect()
    }

    /// [`added`] for units with `rows` as their gradients, cut into tensors of [`LENGTHS`].
    fn added_rows(mechanism: &Mechanism, rows: &[Vec<f32>], granularity: f64) -> Vec<i64> {
        let rows = Tensor::from_slice2::<f32, _>(rows);
        let gradients: Vec<Tensor> = rows.split_with_sizes(LENGTHS, 1).iter().map(Tensor::contiguous).collect();
        added(mechanism, &gradients, granularity).concat()
    }

    /// L2 norm of what is added to `sum`.
    fn moved(sum: &ClippedSum, whole: &[i64]) -> f64 {
        sum.granularity() * whole.iter().map(|&index| (index as f64).powi(2)).sum::<f64>().sqrt()
    }

    fn scaled(values: &[f64], factor: f64) -> Vec<f32> {
        values.iter().map(|value| (value * factor) as f32).collect()
    }

    /// Gradients from denormal to huge, of exactly `clip_norm`, and some that are not finite.
    fn gradient(clip_norm: f64, size: impl Into<SizeRange>) -> impl Strategy<Value = Vec<f32>> {
        let values = prop::collection::vec(-1f64..1.0, size);
        let bad = prop::sample::select(vec![f32::NAN, f32::INFINITY, f32::NEG_INFINITY]);
        prop_oneof![
            (values.clone(), -46i32..39).prop_map(|(values, digits)| scaled(&values, 10f64.powi(digits))),
            values.clone().prop_map(move |values| {
                let norm = values.iter().map(|value| value * value).sum::<f64>().sqrt();
                scaled(&values, clip_norm / norm)
            }),
            (values, any::<prop::sample::Index>(), bad).prop_map(|(values, place, bad)| {
                let mut gradient = scaled(&values, 1.0);
                let place = place.index(gradient.len());
                gradient[place] = bad;
                gradient
            }),
        ]
    }

    proptest! {
        #[test]
        fn a_unit_adds_its_clipped_gradient_and_never_more_than_the_sensitivity(
            (clip_norm, gradient) in prop::sample::select(vec![1e-10, CLIP_NORM, 1.0, 1e20])
                .prop_flat_map(|clip_norm| (Just(clip_norm), gradient(clip_norm, 1..400))),
        ) {
            let mechanism = clipping_to(clip_norm);
            let sum = mechanism.rules().unwrap().empty_sum(&[gradient.len()]);
            let moved = moved(&sum, &clip_alone(&mechanism, &gradient, sum.granularity()).unwrap());
            prop_assert!(moved <= sum.sensitivity(), "{moved}");
            let size = norm(&gradient);
            // Up to here squares are finite in float32.
            if size < 1e19 {
                let off = (moved - size.min(clip_norm)).abs();
                prop_assert!(off <= sum.sensitivity() - clip_norm, "{off:e}");
            } else if !size.is_finite() {
                prop_assert_eq!(moved, 0.0);
            }
        }

        #[test]
        fn units_add_what_each_adds_alone(units in prop::collection::vec(gradient(CLIP_NORM, 24 + 9), 1..8)) {
            let mechanism = mechanism();
            let sum = mechanism.rules().unwrap().empty_sum(&LENGTHS.map(|length| length as usize));
            let mut expected = vec![0; 24 + 9];
            for unit in &units {
                let alone = added_rows(&mechanism, std::slice::from_ref(unit), sum.granularity());
                prop_assert!(moved(&sum, &alone) <= sum.sensitivity());
                expected.iter_mut().zip(alone).for_each(|(total, index)| *total += index);
            }
            prop_assert_eq!(added_rows(&mechanism, &units, sum.granularity()), expected);
        }
    }

    #[test]
    fn units_of_a_model_add_what_each_adds_alone_however_they_are_batched() {
        let folder = tempfile::tempdir().unwrap();
        let (decoder, lora) = testing::tiny(folder.path());
        let mut units = testing::units(9);
        // A unit with several records is clipped as one.
        units.push(Unit { id: "several".into(), examples: (20..24).map(testing::example).collect() });
        let units: Vec<&Unit> = units.iter().collect();
        let limits = |micro_batch_tokens| Limits { block_length: 32, micro_batch_tokens };
        let lengths: Vec<usize> = lora.tensors.iter().map(|(_, tensor)| tensor.numel()).collect();
        let mut expected = mechanism().rules().unwrap().empty_sum(&lengths);
        for unit in &units {
            let gradients = unit_gradients(&decoder, &lora, &[unit], 0, limits(1), usize::MAX).unwrap();
            let alone = added(&mechanism(), &gradients, expected.granularity());
            let moved = moved(&expected, &alone.concat());
            assert!(0.0 < moved && moved <= expected.sensitivity(), "unit {} moves the sum by {moved}", unit.id);
            expected.add_rounded(&alone).unwrap();
        }
        for tokens in [1, 3 * 20, 13 * 20] {
            let found = sum_gradients(&decoder, &lora, &mechanism(), &units, 0, limits(tokens)).unwrap();
            assert!(found == expected, "{tokens} tokens");
        }
    }

    #[test]
    fn a_gradient_whose_squares_are_not_finite_counts_as_zero() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX] {
            assert_eq!(clip_alone(&mechanism(), &[bad, 1.0], 1.0).unwrap(), [0, 0]);
        }
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
