//! The pitfalls of DP training (jax_privacy's list among them), each as a test with its name. That clipping keeps the
//! guarantee of the clipped sum is tested where train clips.

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

#[test]
fn divides_by_the_expected_batch_size_not_the_realised() {
    // Whoever was sampled, the divisor is the public 32: twice the units are twice the release.
    let mechanism = mechanism(1e-9);
    let released = |units: usize| {
        let mut sum = mechanism.empty_sum(&[3]);
        let unit = [0.1, 0.2, 0.3].map(|value| (value / sum.granularity()).round() as i64);
        (0..units).for_each(|_| sum.add_rounded(&[unit.to_vec()]).unwrap());
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
fn clip_factor_clips_to_the_norm_and_is_idempotent() {
    let mechanism = mechanism(1.0);
    for norm in [0.0, 1e-300, 0.49, 0.5, 0.51, 1.0, 1e300] {
        let clipped = norm * mechanism.clip_factor(norm);
        assert!(clipped <= 0.5 * (1.0 + 1e-15) && clipped <= norm);
        assert!((clipped * mechanism.clip_factor(clipped) - clipped).abs() <= 1e-15);
    }
    for norm in [f64::NAN, f64::INFINITY] {
        assert_eq!(mechanism.clip_factor(norm), 0.0);
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
    for lengths in [&[2][..], &[5], &[3, 2]] {
        assert!(sum.add_rounded(&lengths.iter().map(|&length| vec![0; length]).collect::<Vec<_>>()).is_err());
    }
    let other = TrainingMechanism::new(0.25, 1.0, 10, 0.6, 32.0).unwrap();
    assert!(other.release(&key(), &context(), 0, sum).is_err());
}

#[test]
fn epochs_become_steps_rounded_up() {
    for (epochs, probability, steps) in
        [(1.0, 0.25, 4), (2.5, 0.25, 10), (2.51, 0.25, 11), (0.01, 0.25, 1), (3.0, 1.0, 3)]
    {
        assert_eq!(steps_of(epochs, probability), steps, "{epochs} at {probability}");
    }
    // In floating point 0.2 / (1 / 35) is a little more than 7.
    assert_eq!(steps_of(0.2, 1.0 / 35.0), 7);
}

#[test]
fn calibrated_noise_spends_the_target_together_with_the_vote() {
    let spent = |vote_sigma: Option<f64>| {
        let noise_multiplier = calibrated_noise(0.2, 6, vote_sigma, 3.0, 1e-5).unwrap();
        let training = Event::PoissonSampledGaussian { sampling_probability: 0.2, noise_multiplier, steps: 6 };
        let vote = vote_sigma.map(|noise_multiplier| Event::DiscreteGaussian { noise_multiplier });
        crate::epsilon(&std::iter::once(training).chain(vote).collect::<Vec<_>>(), 1e-5).unwrap().pld
    };
    for epsilon in [spent(None), spent(Some(2.0))] {
        assert!(epsilon <= 3.0 && epsilon > 2.99, "{epsilon}");
    }
}
