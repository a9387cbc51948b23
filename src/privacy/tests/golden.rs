//! Our ε against two peers on a grid of configurations, from `tests/golden/account.jsonl` (its generating script,
//! `account.py`, lies beside it).

use privacy::accounting::bounds;
use privacy::epsilon;
use privacy::event::Event;
use serde::Deserialize;

#[derive(Deserialize)]
struct Golden {
    events: Vec<Event>,
    delta: f64,
    dp_pld: Option<f64>,
    dp_rdp: Option<f64>,
    prv_lower: Option<f64>,
    prv_upper: Option<f64>,
}

fn golden() -> Vec<Golden> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/account.jsonl");
    let text = std::fs::read_to_string(path).unwrap();
    // The first line names the peers' versions.
    text.lines().skip(1).map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn epsilon_is_sound_and_as_tight_as_the_tightest_peer() {
    let golden = golden();
    let (mut compared, mut faults) = (0, Vec::new());
    for Golden { events, delta, dp_pld, prv_lower, prv_upper, .. } in &golden {
        let found = bounds(events, *delta).unwrap();
        let peers = [*dp_pld, *prv_upper].into_iter().flatten();
        let tightest = peers.fold(f64::INFINITY, f64::min);
        if tightest.is_finite() {
            compared += 1;
            if found.upper > (tightest * 1.005).max(tightest + 0.002) {
                faults.push(format!("loose: {found:?}, tightest peer {tightest}: {events:?} {delta:e}"));
            }
            // At δ below 1e-10 the rounding errors of dp_accounting's transform exceed δ's share of them, and its bound
            // can lie below the truth; `laplace_inversion_agrees` has three such lines.
            let slack = if *delta < 1e-10 { 1e-3 } else { 1e-6 };
            if found.lower > tightest * (1.0 + slack) + 1e-6 {
                faults
                    .push(format!("our lower bound {found:?} exceeds a peer's upper {tightest}: {events:?} {delta:e}"));
            }
        }
        if prv_lower.is_some_and(|lower| found.upper < lower - 1e-9) {
            faults.push(format!("unsound: {found:?} < {prv_lower:?}: {events:?} {delta:e}"));
        }
    }
    assert!(compared >= 200, "{compared}");
    assert!(faults.is_empty(), "{} of {}:\n{}", faults.len(), golden.len(), faults.join("\n"));
}

#[test]
fn rdp_is_never_looser_than_the_peer_nor_below_the_truth() {
    for Golden { events, delta, dp_rdp, .. } in &golden() {
        let found = epsilon(events, *delta).unwrap();
        if let Some(peer) = dp_rdp {
            assert!(found.rdp <= peer * (1.0 + 1e-6) + 1e-9, "{events:?} {delta:e}: {found:?}, peer {peer}");
        }
        let lower = bounds(events, *delta).unwrap().lower;
        assert!(found.rdp >= lower * (1.0 - 1e-6), "{events:?} {delta:e}: {found:?}, lower bound {lower}");
    }
}

/// Values from a third method, `tests/golden/exact.py`, to 1e-5. In the last three dp_accounting's upper bounds (8.90414,
/// 9.29452, 12.59832) lie below them.
#[test]
fn laplace_inversion_agrees() {
    let sampled = |sampling_probability, noise_multiplier, steps| Event::PoissonSampledGaussian {
        sampling_probability,
        noise_multiplier,
        steps,
    };
    let gaussian = |noise_multiplier| Event::Gaussian { noise_multiplier };
    let cases = [
        (vec![sampled(4096.0 / 180_000.0, 1.122, 439)], 5e-7, 2.859581),
        (vec![sampled(0.1005, 15.04, 38_880)], 9.939e-11, 8.904661),
        (vec![sampled(0.01163, 0.7893, 1794), sampled(2.272e-5, 1.437, 505), gaussian(4.175)], 7.013e-12, 9.295254),
        (vec![gaussian(27.17), sampled(0.001623, 0.6161, 1161), sampled(0.02044, 0.5932, 64)], 5.534e-12, 12.600293),
    ];
    for (events, delta, exact) in cases {
        let found = bounds(&events, delta).unwrap();
        assert!(found.lower <= exact + 1e-5 && found.upper >= exact - 1e-5, "{found:?}, exact {exact}");
    }
}

/// Values from plain convolution, `tests/golden/exact.py`, to its grids' 0.1 %. The transform's rounding errors are some
/// 1e-13, and here δ is not much above: finer grids make ours looser.
#[test]
fn rare_draws_are_not_drowned_by_rounding() {
    let cases = [
        (1e-4, 1.0, 1, 1e-12, 0.03165),
        (1e-6, 0.5, 10, 1e-10, 0.02173),
        (1e-6, 0.45, 100, 1e-11, 0.5519),
        (1e-6, 0.5, 10_000, 1e-10, 0.2959),
        (1e-5, 0.7, 10_000, 1e-10, 0.0945),
    ];
    for (sampling_probability, noise_multiplier, steps, delta, exact) in cases {
        let event = Event::PoissonSampledGaussian { sampling_probability, noise_multiplier, steps };
        let found = bounds(std::slice::from_ref(&event), delta).unwrap();
        assert!(found.upper >= exact * 0.999 && found.upper < exact * 1.08, "{event:?}: {found:?}, exact {exact}");
        assert!(found.lower <= exact * 1.001, "{event:?}: {found:?}, exact {exact}");
    }
}
