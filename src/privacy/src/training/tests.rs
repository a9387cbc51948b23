//! The pitfalls of DP training (jax_privacy's list among them), each as a test with its name, and the guarantee of the
//! clipped sum as a property.

use proptest::prelude::*;

use super::*;

fn key() -> NoiseKey {
    NoiseKey::new([9; 32])
}

fn mechanism(noise_multiplier: f64) -> TrainingMechanism {
    TrainingMechanism::new(0.25, noise_multiplier, 10, 0.5, 32.0).unwrap()
}

fn context() -> Context {
    Context::new("train").field("run", b"r")
}

/// A sum of units with these gradients, in one tensor.
fn sum_of(mechanism: &TrainingMechanism, units: &[Vec<f32>]) -> ClippedSum {
    let mut sum = mechanism.empty_sum(&[units.first().map_or(0, Vec::len)]);
    units.iter().for_each(|unit| sum.add(&[unit]).unwrap());
    sum
}

#[test]
fn divides_by_the_expected_batch_size_not_the_realised() {
    // Whoever was sampled, the divisor is the public 32: twice the units are twice the release.
    let mechanism = mechanism(1e-9);
    let released = |units: usize| {
        let sum = sum_of(&mechanism, &vec![vec![0.1, 0.2, 0.3]; units]);
        mechanism.release(&key(), &context(), 0, sum).unwrap().value()[0].clone()
    };
    for (place, value) in [0.1, 0.2, 0.3].into_iter().enumerate() {
        assert!((released(1)[place] - value / 32.0).abs() < 1e-6 && (released(2)[place] - value / 16.0).abs() < 1e-6);
    }
}

#[test]
fn an_empty_batch_is_a_step_like_any_other() {
    let mechanism = mechanism(2.0);
    let noised = mechanism.release(&key(), &context(), 4, mechanism.empty_sum(&[20_000, 3])).unwrap();
    let values = &noised.value()[0];
    // Deviation 2 · 0.5 / 32; that of an estimated variance is √(2/n) = 1 %, 5 of them allowed.
    let variance = values.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / values.len() as f64;
    assert!((variance / (2.0f64 * 0.5 / 32.0).powi(2) - 1.0).abs() < 0.05);
    assert!(values.iter().all(|x| *x != 0.0));
}

#[test]
fn a_non_finite_gradient_counts_as_zero() {
    let mechanism = mechanism(1.0);
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        assert_eq!(mechanism.clip_factor(f64::from(bad)), 0.0);
        let mut sum = mechanism.empty_sum(&[2]);
        sum.add(&[&[0.1, 0.2]]).unwrap();
        let before = sum.clone();
        sum.add(&[&[0.3, bad]]).unwrap();
        assert!(sum == before);
    }
    // Finite in f32, but its square is not.
    let mut sum = mechanism.empty_sum(&[2]);
    sum.add(&[&[f32::MAX, f32::MAX]]).unwrap();
    let released = mechanism.release(&key(), &context(), 0, sum).unwrap();
    assert!(released.value()[0].iter().all(|x| x.is_finite()));
}

#[test]
fn clip_factor_clips_to_the_norm_and_is_idempotent() {
    let mechanism = mechanism(1.0);
    for norm in [0.0, 1e-300, 0.49, 0.5, 0.51, 1.0, 1e300] {
        let clipped = norm * mechanism.clip_factor(norm);
        assert!(clipped <= 0.5 * (1.0 + 1e-15) && clipped <= norm);
        assert!((clipped * mechanism.clip_factor(clipped) - clipped).abs() <= 1e-15);
    }
}

#[test]
fn noise_is_added_once_with_the_stated_scale() {
    let mechanism = mechanism(3.0);
    let sum = mechanism.empty_sum(&[100_000, 50_000]);
    let released = mechanism.release(&key(), &context(), 0, sum).unwrap().value().clone();
    for tensor in &released {
        let n = tensor.len() as f64;
        let variance = tensor.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / n;
        let ratio = variance / (3.0f64 * 0.5 / 32.0).powi(2);
        // 5 deviations √(2/n) of the estimate; the slack of the lattice is below 2⁻¹⁹ of it.
        assert!((ratio - 1.0).abs() < 5.0 * (2.0 / n).sqrt(), "{ratio}");
    }
}

#[test]
fn release_is_reproducible_and_fresh_for_every_step_tensor_and_context() {
    let mechanism = mechanism(1.0);
    let release = |context: &Context, step| {
        mechanism.release(&key(), context, step, mechanism.empty_sum(&[1000, 1000])).unwrap().value().clone()
    };
    assert_eq!(release(&context(), 1), release(&context(), 1));
    let fresh = context().field("digest", b"other corpus");
    let all = [release(&context(), 1), release(&context(), 2), release(&fresh, 1)].concat();
    for (i, one) in all.iter().enumerate() {
        for two in &all[i + 1..] {
            assert!(one.iter().zip(two).filter(|(a, b)| a == b).count() < 5);
        }
    }
}

#[test]
fn sampling_is_poisson_over_steps_and_restarts() {
    let mechanism = mechanism(1.0);
    let units: Vec<String> = (0..200).map(|i| format!("unit-{i}")).collect();
    let steps = 500;
    // A restart builds everything again from key and context.
    let draw = |step| -> Vec<bool> {
        let sampler = mechanism.sampler(&key(), &context(), step);
        units.iter().map(|unit| sampler.includes(unit)).collect()
    };
    let inclusions: Vec<Vec<bool>> = (0..steps).map(draw).collect();
    assert_eq!(inclusions[7], draw(7));

    let q = 0.25;
    let n = (steps as usize * units.len()) as f64;
    let variance = q * (1.0 - q);
    let centred = |step: usize, unit: usize| f64::from(u8::from(inclusions[step][unit])) - q;
    // Each statistic below is a sum of n terms of known variance; 5.5 deviations: false alarm 4e-8 each.
    let check = |what: &str, sum: f64, variance: f64| {
        assert!(sum.abs() < 5.5 * (n * variance).sqrt(), "{what}: {}", sum / (n * variance).sqrt());
    };
    let sum = |f: &dyn Fn(usize, usize) -> f64| -> f64 {
        (0..steps as usize).flat_map(|s| (0..units.len()).map(move |u| (s, u))).map(|(s, u)| f(s, u)).sum()
    };
    check("rate", sum(&centred), variance);
    let later = |s: usize, lag: usize| (s + lag) % steps as usize;
    check("steps", sum(&|s, u| centred(s, u) * centred(later(s, 1), u)), variance * variance);
    check("units", sum(&|s, u| centred(s, u) * centred(s, (u + 1) % units.len())), variance * variance);
    check("both", sum(&|s, u| centred(s, u) * centred(later(s, 3), (u + 7) % units.len())), variance * variance);
    // The size of a batch must vary as a binomial's: fixed batches, the usual mistake, have variance 0.
    let sizes: Vec<f64> = inclusions.iter().map(|row| row.iter().filter(|&&x| x).count() as f64).collect();
    let spread = sizes.iter().map(|size| (size - 50.0).powi(2)).sum::<f64>() / f64::from(steps as u32);
    let expected = 200.0 * variance;
    assert!((spread / expected - 1.0).abs() < 5.5 * (2.0f64 / 500.0).sqrt(), "{spread}");
}

#[test]
fn probability_one_includes_everybody() {
    let sampler = |mechanism: &TrainingMechanism| mechanism.sampler(&key(), &context(), 0);
    let everybody = TrainingMechanism::new(1.0, 1.0, 1, 1.0, 1.0).unwrap();
    let everybody = sampler(&everybody);
    assert!((0..1000).all(|i| everybody.includes(&i.to_string())));
    let nobody = TrainingMechanism::new(1e-300, 1.0, 1, 1.0, 1.0).unwrap();
    let nobody = sampler(&nobody);
    assert!(!(0..1000).any(|i| nobody.includes(&i.to_string())));
}

#[test]
fn what_is_accounted_is_what_runs() {
    let event = mechanism(1.5).event();
    let expected = Event::PoissonSampledGaussian { sampling_probability: 0.25, noise_multiplier: 1.5, steps: 10 };
    assert_eq!(event, expected);
}

#[test]
fn sums_of_other_shapes_or_mechanisms_are_refused() {
    let mechanism = mechanism(1.0);
    let mut sum = mechanism.empty_sum(&[2, 3]);
    assert!(sum.add(&[&[0.0; 2]]).is_err());
    assert!(sum.add(&[&[0.0; 3], &[0.0; 2]]).is_err());
    assert!(sum.add_rounded(&[vec![0; 5]]).is_err());
    let other = TrainingMechanism::new(0.25, 1.0, 10, 0.6, 32.0).unwrap();
    assert!(other.release(&key(), &context(), 0, sum).is_err());
}

fn norm_of(difference: impl Iterator<Item = f64>) -> f64 {
    difference.map(|x| x * x).sum::<f64>().sqrt()
}

proptest! {
    #[test]
    fn one_unit_moves_the_clipped_sum_by_at_most_clip_norm(
        units in prop::collection::vec(prop::collection::vec(-1e3f32..1e3, 24), 1..12),
        magnitudes in prop::collection::vec(-8i32..30, 12),
        removed in any::<prop::sample::Index>(),
    ) {
        let mechanism = mechanism(1.0);
        let removed = removed.index(units.len());
        let (mut with, mut without) = (mechanism.empty_sum(&[16, 8]), mechanism.empty_sum(&[16, 8]));
        for (i, unit) in units.iter().enumerate() {
            let unit: Vec<f32> = unit.iter().map(|x| x * 10f32.powi(magnitudes[i])).collect();
            let tensors: [&[f32]; 2] = [&unit[..16], &unit[16..]];
            with.add(&tensors).unwrap();
            if i != removed {
                without.add(&tensors).unwrap();
            }
        }
        let pairs = with.tensors.iter().flatten().zip(without.tensors.iter().flatten());
        let moved = norm_of(pairs.map(|(a, b)| with.lattice.value(a - b)));
        prop_assert!(moved <= with.sensitivity());
        prop_assert!(with.sensitivity() <= 0.5 * (1.0 + 2f64.powi(-20)));
    }

    #[test]
    fn neither_order_nor_micro_batches_change_the_sum(
        units in prop::collection::vec(prop::collection::vec(-2f32..2.0, 5), 1..20),
        size in 1usize..9,
    ) {
        let mechanism = mechanism(1.0);
        let mut joined = mechanism.empty_sum(&[5]);
        units.chunks(size).for_each(|chunk| joined.add_rounded(&sum_of(&mechanism, chunk).tensors).unwrap());
        let reversed: Vec<_> = units.iter().rev().cloned().collect();
        prop_assert!(joined == sum_of(&mechanism, &units) && joined == sum_of(&mechanism, &reversed));
    }

    #[test]
    fn rounding_in_float32_stays_within_the_sensitivity(
        unit in prop::collection::vec(-1e3f32..1e3, 1..400),
        magnitude in -12i32..8,
    ) {
        let mechanism = mechanism(1.0);
        let unit: Vec<f32> = unit.iter().map(|x| x * 10f32.powi(magnitude)).collect();
        let sum = mechanism.empty_sum(&[unit.len()]);
        // The rule of `add_rounded`, all in float32 but the sum of squares.
        let norm = unit.iter().map(|x| f64::from(x * x)).sum::<f64>().sqrt();
        let scale = (mechanism.clip_factor(norm) / sum.granularity()) as f32;
        let moved = norm_of(unit.iter().map(|x| f64::from((x * scale).round_ties_even()) * sum.granularity()));
        prop_assert!(moved <= sum.sensitivity(), "{moved}");
    }
}
