//! From guesses to a lower bound on ε: exact binomial tails, no normal approximation.

/// How many of a number of independent trials passed a test.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hits {
    /// Trials that passed.
    pub passed: u64,
    /// All trials.
    pub trials: u64,
}

impl Hits {
    /// Share of trials that passed.
    pub fn rate(&self) -> f64 {
        self.passed as f64 / self.trials.max(1) as f64
    }

    /// Clopper and Pearson's (1934) lower limit of the chance to pass: at most this with probability 1 − `error`.
    fn lower(&self, error: f64) -> f64 {
        if self.passed == 0 {
            return 0.0;
        }
        bisect(0.0, 1.0, |p| Binomial::with_chance(self.trials, p).at_least(self.passed) < error)
    }

    /// The upper limit.
    fn upper(&self, error: f64) -> f64 {
        let failed = Hits { passed: self.trials - self.passed, trials: self.trials };
        1.0 - failed.lower(error)
    }
}

/// Lower bound on the ε of a mechanism from how often its output passes a test, on data with and without one unit.
///
/// (ε, δ)-DP says P\[often\] ≤ e^ε · P\[seldom\] + δ in either order (Kairouz, Oh, Viswanath 2015), so
/// ε ≥ ln((P\[often\] − δ) / P\[seldom\]). Both chances are replaced by their Clopper–Pearson limits, each at half of the
/// error: where the claim is true, the bound exceeds it with probability at most 1 − `confidence`.
pub fn one_step(often: Hits, seldom: Hits, delta: f64, confidence: f64) -> f64 {
    let error = (1.0 - confidence) / 2.0;
    let (often, seldom) = (often.lower(error) - delta, seldom.upper(error));
    if often > seldom { (often / seldom).ln() } else { 0.0 }
}

/// Lower bound on the ε of a training run, of whose `canaries`, each in the data by a fair coin, `guesses` were guessed
/// in or out and `right` of them rightly.
///
/// Steinke, Nasr, Jagielski 2023 (arXiv 2305.08846), Theorem 5.2: under (ε, δ)-DP the number of right guesses is at
/// least v with probability at most f(v) + 2mδ · max over i of (f(v − i) − f(v)) / i, where f(v) is the chance that a
/// binomial variable of `guesses` trials with success e^ε / (e^ε + 1) is at least v. The bound is the largest ε at which
/// that probability is below 1 − `confidence`. The number of guesses must not depend on what was seen.
pub fn one_run(canaries: u64, guesses: u64, right: u64, delta: f64, confidence: f64) -> f64 {
    let refuted = |epsilon: f64| chance_of_right(canaries, guesses, right, delta, epsilon) < 1.0 - confidence;
    if !refuted(0.0) {
        return 0.0;
    }
    let mut high = 1.0;
    while refuted(high) {
        high *= 2.0;
    }
    bisect(0.0, high, refuted)
}

/// Theorem 5.2's bound on the chance of at least `right` right guesses under (ε, δ)-DP.
fn chance_of_right(canaries: u64, guesses: u64, right: u64, delta: f64, epsilon: f64) -> f64 {
    let binomial = Binomial::with_log_odds(guesses, epsilon);
    // `between` is f(v − i) − f(v).
    let (mut between, mut worst) = (0.0, 0.0f64);
    for i in 1..=right {
        between += binomial.probability(right - i);
        worst = worst.max(between / i as f64);
    }
    (binomial.at_least(right) + 2.0 * canaries as f64 * delta * worst).min(1.0)
}

/// The largest x of [low, high] at which `holds`, to rounding, rounded down; it holds below and not above.
fn bisect(mut low: f64, mut high: f64, holds: impl Fn(f64) -> bool) -> f64 {
    for _ in 0..64 {
        let middle = low + (high - low) / 2.0;
        if middle <= low || middle >= high {
            break;
        }
        if holds(middle) { low = middle } else { high = middle }
    }
    low
}

/// A binomial variable; chances are kept as logarithms, so that one within rounding of 0 or 1 stays exact.
struct Binomial {
    trials: u64,
    log_success: f64,
    log_failure: f64,
}

impl Binomial {
    /// Success with probability p, 0 < p < 1.
    fn with_chance(trials: u64, p: f64) -> Self {
        Self { trials, log_success: p.ln(), log_failure: (-p).ln_1p() }
    }

    /// Success with probability e^x / (e^x + 1), x ≥ 0.
    fn with_log_odds(trials: u64, x: f64) -> Self {
        let log_success = -(-x).exp().ln_1p();
        Self { trials, log_success, log_failure: log_success - x }
    }

    fn probability(&self, successes: u64) -> f64 {
        let log_factorial = |n: u64| libm::lgamma(n as f64 + 1.0);
        let failures = self.trials - successes;
        let ways = log_factorial(self.trials) - log_factorial(successes) - log_factorial(failures);
        (ways + successes as f64 * self.log_success + failures as f64 * self.log_failure).exp()
    }

    /// Chance of at least `successes`. Adds terms away from the mean, where each is smaller than the one before.
    fn at_least(&self, successes: u64) -> f64 {
        if successes == 0 {
            return 1.0;
        }
        if successes > self.trials {
            return 0.0;
        }
        let odds = (self.log_success - self.log_failure).exp();
        if successes as f64 > self.trials as f64 * self.log_success.exp() {
            let ratio = |k: u64| (self.trials - k) as f64 / (k + 1) as f64 * odds;
            sum_while_it_matters(self.probability(successes), (successes..self.trials).map(ratio))
        } else {
            let ratio = |k: u64| k as f64 / (self.trials - k + 1) as f64 / odds;
            1.0 - sum_while_it_matters(self.probability(successes - 1), (1..successes).rev().map(ratio))
        }
    }
}

/// Sum of the terms that begin with `term`, each the one before times the next of `ratios`.
fn sum_while_it_matters(mut term: f64, ratios: impl Iterator<Item = f64>) -> f64 {
    let mut sum = term;
    for ratio in ratios {
        term *= ratio;
        sum += term;
        if term <= sum * 1e-18 {
            break;
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    /// tests/golden/audit.py computes with 60 decimal digits and whole-number binomial coefficients.
    #[test]
    fn bounds_agree_with_an_independent_computation() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/audit.jsonl");
        let lines = std::fs::read_to_string(path).unwrap();
        let mut kinds = (0, 0);
        for line in lines.lines() {
            let case: Value = serde_json::from_str(line).unwrap();
            let whole = |name: &str| case[name].as_u64().unwrap();
            let real = |name: &str| case[name].as_f64().unwrap();
            let found = if case["kind"] == "one_run" {
                kinds.0 += 1;
                one_run(whole("canaries"), whole("guesses"), whole("right"), real("delta"), real("confidence"))
            } else {
                kinds.1 += 1;
                let hits = |name: &str| Hits {
                    passed: case[name][0].as_u64().unwrap(),
                    trials: case[name][1].as_u64().unwrap(),
                };
                one_step(hits("often"), hits("seldom"), real("delta"), real("confidence"))
            };
            assert!((found - real("epsilon")).abs() < 1e-9 * (1.0 + found), "{line}: found {found}");
        }
        assert!(kinds.0 >= 20 && kinds.1 >= 20, "{kinds:?}");
    }

    #[test]
    fn guessing_proves_nothing_and_perfection_is_bounded() {
        assert_eq!(one_run(1000, 100, 50, 1e-5, 0.95), 0.0);
        assert_eq!(one_run(1000, 0, 0, 1e-5, 0.95), 0.0);
        // All of 100 right: (e^ε / (e^ε + 1))^100 = 0.05 has the solution ε = 3.49297.
        let perfect = one_run(100, 100, 100, 0.0, 0.95);
        assert!((perfect - 3.49297).abs() < 1e-5, "{perfect}");
        assert!(one_run(100, 100, 100, 1e-3, 0.95) < perfect);
        let same = Hits { passed: 10, trials: 100 };
        assert_eq!(one_step(same, same, 0.0, 0.95), 0.0);
        let never = Hits { passed: 0, trials: 100 };
        assert_eq!(one_step(never, same, 0.0, 0.95), 0.0);
    }

    /// Randomised response has the ε that the theorem is tight for: the bound may exceed it in 5 % of the trials.
    #[test]
    fn a_bound_is_wrong_no_more_often_than_its_confidence_says() {
        let epsilon = 1.0f64;
        let lies = privacy::keyed::NoiseKey::new([5; 32]);
        let mut wrong = 0;
        for trial in 0..400u64 {
            let hasher = lies.hasher(&privacy::keyed::Context::new("lies").field("trial", &trial.to_le_bytes()));
            let truth = epsilon.exp() / (1.0 + epsilon.exp());
            let tells_truth = |person: &u64| (hasher.hash(&person.to_le_bytes()) as f64) < truth * 2f64.powi(64);
            let right = (0..200u64).filter(tells_truth).count() as u64;
            wrong += u32::from(one_run(200, 200, right, 0.0, 0.95) > epsilon);
        }
        // Expected at most 20 of 400; more than 42 has probability 2e-6. None at all would be a bound too shy.
        assert!((1..=42).contains(&wrong), "{wrong}");
    }
}
