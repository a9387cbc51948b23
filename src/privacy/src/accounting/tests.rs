//! Checked values, golden values of the peers, properties, and extremes.

use proptest::prelude::*;

use super::*;

fn training(noise_multiplier: f64) -> Event {
    sampled(4096.0 / 180_000.0, noise_multiplier, 439)
}

fn sampled(sampling_probability: f64, noise_multiplier: f64, steps: u64) -> Event {
    Event::PoissonSampledGaussian { sampling_probability, noise_multiplier, steps }
}

fn gaussian(noise_multiplier: f64) -> Event {
    Event::Gaussian { noise_multiplier }
}

fn votes(noise_multiplier: f64) -> Event {
    Event::DiscreteGaussian { noise_multiplier }
}

fn check(events: &[Event], delta: f64, expected: f64) {
    let found = bounds(events, delta).unwrap();
    assert!((found.upper - expected).abs() < 1e-3, "{events:?}: {found:?}, expected {expected}");
    assert!(found.upper - found.lower < 5e-3 * expected, "{events:?}: {found:?}");
}

#[test]
fn published_configurations() {
    // dp_accounting 0.6, PLDAccountant, add-or-remove-one; regenerate with tests/golden/account.py
    check(&[training(1.1220)], 5e-7, 2.860);
    check(&[training(0.8072)], 5e-7, 5.940);
    check(&[training(1.1220), gaussian(10.0)], 5e-7, 2.897);
    check(&[training(0.8072), gaussian(10.0)], 5e-7, 5.959);
    check(&[gaussian(10.0)], 5e-7, 0.4125);
    // The discrete Gaussian at σ = 10 differs from the continuous one by less than any of these digits.
    check(&[training(1.1220), votes(10.0)], 5e-7, 2.897);
    check(&[votes(10.0)], 5e-7, 0.4125);
}

#[test]
fn discrete_gaussian_matches_a_direct_sum() {
    for sigma in [0.3, 0.5, 1.0, 3.0, 10.0] {
        let total: f64 = (-1000..=1000).map(|x| libm::exp(-f64::from(x * x) / (2.0 * sigma * sigma))).sum();
        for epsilon in [0.0, 0.1, 0.5, 2.0, 7.0] {
            let excess = |x: i32| {
                let weight = |x: i32| libm::exp(-f64::from(x * x) / (2.0 * sigma * sigma)) / total;
                (weight(x) - libm::exp(epsilon) * weight(x - 1)).max(0.0)
            };
            let expected: f64 = (-1000..=1000).map(excess).sum();
            let found = delta(&[votes(sigma)], epsilon).unwrap();
            assert!(found >= expected * (1.0 - 1e-9), "{sigma} {epsilon}: {found} < {expected}");
            assert!(found <= expected * 1.01 + 1e-30, "{sigma} {epsilon}: {found} > {expected}");
        }
    }
}

#[test]
fn merged_gaussians_equal_gaussians_on_the_grid() {
    // A discrete Gaussian with much noise adds nothing, but takes the closed form away.
    for (sigma, delta) in [(1.0, 1e-6), (10.0, 1e-12), (0.3, 1e-3), (50.0, 1e-5)] {
        let exact = epsilon(&[gaussian(sigma)], delta).unwrap().pld;
        let found = epsilon(&[gaussian(sigma), votes(1e4)], delta).unwrap().pld;
        assert!(found >= exact && found < exact * 1.003 + 1e-4, "{sigma} {delta}: {found} {exact}");
    }
    let four = vec![gaussian(2.0); 4];
    assert_eq!(epsilon(&four, 1e-6).unwrap(), epsilon(&[gaussian(1.0)], 1e-6).unwrap());
    assert_eq!(epsilon(&[sampled(1.0, 2.0, 4)], 1e-6).unwrap(), epsilon(&four, 1e-6).unwrap());
}

#[test]
fn calibrated_noise_never_exceeds_the_target() {
    let events = |noise_multiplier| vec![training(noise_multiplier), votes(10.0)];
    for target in [0.5, 2.897, 5.94, 40.0] {
        let noise_multiplier = calibrate(events, target, 5e-7).unwrap();
        let found = epsilon(&events(noise_multiplier), 5e-7).unwrap().pld;
        assert!(found <= target, "{found} > {target}");
        let less = epsilon(&events(noise_multiplier - 2e-4), 5e-7).unwrap().pld;
        assert!(less > target * (1.0 - 2e-4), "{target}: {noise_multiplier} is too much noise");
        assert_eq!((noise_multiplier * 1e4).round() / 1e4, noise_multiplier);
    }
    // The votes alone spend 0.41: no training noise can help.
    assert!(calibrate(events, 0.4, 5e-7).is_err());
    for target in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        assert!(calibrate(events, target, 5e-7).is_err());
    }
}

#[test]
fn rounding_errors_are_not_calibrated_away_by_noise() {
    // Once, answers that could not be computed counted as too large, and more noise than needed came out.
    let events = |noise_multiplier| vec![sampled(1e-6, noise_multiplier, 100)];
    let noise_multiplier = calibrate(events, 2.0, 1e-11).unwrap();
    assert!(noise_multiplier < 0.41, "{noise_multiplier}");
}

#[test]
fn the_lower_bound_holds_on_grids_coarser_than_a_sampling_probability() {
    for (event, delta) in
        [(sampled(0.01, 0.5, 1), 1e-8), (sampled(0.01, 1.0, 1), 1e-12), (sampled(0.01, 0.5, 10), 1e-8)]
    {
        let found = bounds(std::slice::from_ref(&event), delta).unwrap();
        assert!(found.lower > 0.99 * found.upper, "{event:?}: {found:?}");
    }
}

#[test]
fn nothing_spent_costs_nothing() {
    assert_eq!(epsilon(&[], 1e-6).unwrap(), Epsilon { pld: 0.0, rdp: 0.0 });
    assert_eq!(delta(&[], 0.0).unwrap(), 0.0);
}

#[test]
fn extremes_give_an_answer_or_an_error_but_never_nan() {
    let noise = [1e-12, 0.05, 1.0, 50.0, 1e6];
    let mut answers = 0;
    for sigma in noise {
        for q in [1e-300, 1e-5, 0.5, 1.0 - 1e-12] {
            for steps in [1, 1 << 40] {
                for delta in [1e-300, 1e-12, 0.9] {
                    match epsilon(&[sampled(q, sigma, steps)], delta) {
                        Ok(found) => {
                            answers += 1;
                            assert!(found.pld >= 0.0 && found.pld.is_finite(), "{q} {sigma} {steps} {delta}");
                            assert!(found.rdp >= 0.0 && found.rdp.is_finite());
                        }
                        Err(error) => assert!(!error.0.is_empty()),
                    }
                }
            }
        }
    }
    assert!(answers > 60, "{answers}");
}

#[test]
fn extremes_are_right_where_the_answer_is_known() {
    // With probability 1 − q nothing happens, and q < δ.
    assert_eq!(epsilon(&[sampled(1e-9, 0.01, 1)], 1e-6).unwrap().pld, 0.0);
    // One step, hardly any noise: the unit shows whenever it is sampled, so δ(ε) → q for any moderate ε.
    let shown = delta(&[sampled(0.25, 0.01, 1)], 5.0).unwrap();
    assert!((shown - 0.25).abs() < 1e-3, "{shown}");
    // The same mechanism a million times is one Gaussian with a thousandth of the noise.
    let found = epsilon(&[sampled(1.0, 1000.0, 1_000_000)], 1e-9).unwrap().pld;
    assert!((found / epsilon(&[gaussian(1.0)], 1e-9).unwrap().pld - 1.0).abs() < 1e-9);
    // δ far below what an FFT without tilting could see.
    let tiny = delta(&[training(1.1220)], 20.0).unwrap();
    assert!(tiny > 1e-90 && tiny < 1e-20, "{tiny:e}");
    for delta in [0.0, 1.0, -1.0, f64::NAN] {
        assert!(epsilon(&[gaussian(1.0)], delta).is_err());
    }
}

#[test]
fn epsilon_and_delta_are_inverse() {
    for events in [vec![training(1.1220), votes(10.0)], vec![sampled(0.3, 0.8, 20)], vec![votes(2.0)]] {
        for target in [1e-3, 1e-6, 1e-10, 1e-14] {
            let found = epsilon(&events, target).unwrap().pld;
            let back = delta(&events, found).unwrap();
            assert!((back / target - 1.0).abs() < 0.05, "{events:?} {target}: {back}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn composition_is_free_of_order_and_monotone(
        q in 1e-4f64..0.5, sigma in 0.5f64..5.0, steps in 1u64..500, more in 0.6f64..20.0, digits in 3f64..10.0,
    ) {
        let delta = libm::exp(-digits * std::f64::consts::LN_10);
        let (one, two) = (sampled(q, sigma, steps), votes(more));
        let forward = epsilon(&[one.clone(), two.clone()], delta).unwrap();
        let backward = epsilon(&[two.clone(), one.clone()], delta).unwrap();
        prop_assert!((forward.pld - backward.pld).abs() <= 3e-4 * forward.pld);
        prop_assert!(forward.pld <= forward.rdp * (1.0 + 1e-6));
        let alone = epsilon(&[one], delta).unwrap();
        prop_assert!(alone.pld <= forward.pld * (1.0 + 3e-4) + 1e-6);
        let noisier = epsilon(&[sampled(q, sigma * 1.2, steps), two.clone()], delta).unwrap();
        prop_assert!(noisier.pld <= forward.pld * (1.0 + 3e-4) + 1e-6);
        let longer = epsilon(&[sampled(q, sigma, steps + 50), two], delta).unwrap();
        prop_assert!(longer.pld >= forward.pld * (1.0 - 3e-4) - 1e-6);
    }

    #[test]
    fn bounds_enclose(q in 1e-4f64..0.9, sigma in 0.4f64..5.0, steps in 1u64..300, digits in 3f64..10.0) {
        let found = bounds(&[sampled(q, sigma, steps)], libm::exp(-digits * std::f64::consts::LN_10)).unwrap();
        prop_assert!(found.lower <= found.upper);
        prop_assert!(found.upper - found.lower <= 3e-3 * found.upper + 1e-4, "{:?}", found);
    }
}
