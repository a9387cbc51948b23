//! Our discrete Gaussian against OpenDP's, from `tests/golden/discrete_gaussian.jsonl` (its generating script,
//! `discrete_gaussian.py`, lies beside it). OpenDP cannot be seeded and pulls in much, so its draws are kept as counts.

use std::collections::BTreeMap;

use privacy::discrete_gaussian::DiscreteGaussian;
use rand_chacha::ChaCha20Rng;
use rand_core::SeedableRng;
use serde::Deserialize;

#[derive(Deserialize)]
struct Golden {
    sigma: f64,
    counts: Vec<(i64, u64)>,
}

fn golden() -> Vec<Golden> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/discrete_gaussian.jsonl");
    let text = std::fs::read_to_string(path).unwrap();
    // The first line names the peer's version.
    text.lines().skip(1).map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Two-sample χ² of equally many draws, Σ (a − b)² / (a + b), over the values that both samples together have at least 20
/// times, the rest pooled; as a ratio to its critical value, so that 1 or more rejects.
///
/// False-positive rate at most 1e-6: the quantile is Wilson and Hilferty's with z = 4.753, which at few degrees of freedom
/// is too large, never too small (30.3 for 27.6 at two).
fn chi_squared(peer: &BTreeMap<i64, u64>, ours: &BTreeMap<i64, u64>) -> f64 {
    let count = |sample: &BTreeMap<i64, u64>, value: &i64| sample.get(value).copied().unwrap_or(0) as f64;
    let (mut statistic, mut cells, mut rest) = (0.0, 0, (0.0, 0.0));
    let mut add = |a: f64, b: f64| {
        statistic += (a - b).powi(2) / (a + b);
        cells += 1;
    };
    let values: std::collections::BTreeSet<&i64> = peer.keys().chain(ours.keys()).collect();
    for value in values {
        let (a, b) = (count(peer, value), count(ours, value));
        if a + b >= 20.0 { add(a, b) } else { rest = (rest.0 + a, rest.1 + b) }
    }
    if rest.0 + rest.1 > 0.0 {
        add(rest.0, rest.1);
    }
    let freedom = f64::from(cells - 1);
    let spread = 2.0 / (9.0 * freedom);
    statistic / (freedom * (1.0 - spread + 4.753 * spread.sqrt()).powi(3))
}

#[test]
fn draws_are_distributed_as_opendps() {
    let golden = golden();
    assert_eq!(golden.iter().map(|line| line.sigma).collect::<Vec<_>>(), [0.3, 1.0, 10.0]);
    for Golden { sigma, counts } in golden {
        let draws: u64 = counts.iter().map(|(_, count)| count).sum();
        assert_eq!(draws, 100_000);
        let peer = counts.into_iter().collect();
        // The seed is fixed, so this cannot flake.
        let against = |sigma: f64| {
            let (noise, mut rng) = (DiscreteGaussian::new(sigma).unwrap(), ChaCha20Rng::seed_from_u64(31));
            let mut ours = BTreeMap::new();
            (0..draws).for_each(|_| *ours.entry(noise.sample(&mut rng)).or_insert(0) += 1);
            chi_squared(&peer, &ours)
        };
        let ratio = against(sigma);
        assert!(ratio < 1.0, "σ = {sigma}: {ratio} of the critical value");
        // The test is able to reject: noise a twentieth wider is found out.
        let wider = against(1.05 * sigma);
        assert!(wider > 1.0, "σ = {sigma}: {wider} of the critical value");
    }
}
