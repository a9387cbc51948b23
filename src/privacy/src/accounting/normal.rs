//! The normal distribution, and the Gaussian mechanism in closed form.

use super::math::{exp, log, sqrt};
use libm::erfc;
use std::f64::consts::{FRAC_1_SQRT_2, PI};

/// Value of the normal distribution function at a point, kept from the side where it is small, so that differences of
/// two neighbours lose no digits in either tail.
#[derive(Clone, Copy, Debug)]
pub struct Cdf {
    below: f64,
    above: f64,
    right: bool,
    /// Bound on the relative rounding error of either side.
    error: f64,
}

impl Cdf {
    /// At `z` standard deviations from the mean.
    pub fn at(z: f64) -> Self {
        let tail = 0.5 * erfc(z.abs() * FRAC_1_SQRT_2);
        let (below, above) = if z < 0.0 { (tail, 1.0 - tail) } else { (1.0 - tail, tail) };
        // One ulp of `erfc`, and the argument's two, which count z² + 1 times: −d log erfc(w) / d log w ≤ 2w² + 1. One
        // more pays for the arithmetic that follows. Beyond 40 deviations the tail is 0.
        let error = f64::EPSILON * (2.0 * (z * z).min(1600.0) + 5.0);
        Self { below, above, right: z >= 0.0, error }
    }

    /// Probability between `self` and the higher point `to`.
    pub fn mass(&self, to: &Self) -> f64 {
        let mass = if self.right { self.above - to.above } else { to.below - self.below };
        mass.max(0.0)
    }

    /// Bound on the rounding error of [`Cdf::mass`]: that of the two sides whose difference it is. In a narrow cell it is
    /// much more than a share of the mass.
    pub fn mass_error(&self, to: &Self) -> f64 {
        if self.right {
            self.above * self.error + to.above * to.error
        } else {
            self.below * self.error + to.below * to.error
        }
    }

    /// Probability below the point.
    pub fn below(&self) -> f64 {
        self.below
    }

    /// Probability above the point.
    pub fn above(&self) -> f64 {
        self.above
    }
}

/// Density at `z` standard deviations from the mean, per standard deviation.
pub fn density(z: f64) -> f64 {
    exp(-0.5 * z * z) / sqrt(2.0 * PI)
}

/// Number of standard deviations beyond which less than `tail` of the probability lies.
pub fn reach(tail: f64) -> f64 {
    sqrt(-2.0 * log(tail))
}

/// `log Φ(z)`, accurate far into the lower tail.
fn log_below(z: f64) -> f64 {
    if z > -30.0 {
        return log(0.5 * erfc(-z * FRAC_1_SQRT_2));
    }
    // Mills' ratio as an asymptotic series; at z = −30 the first term left out is 1e-10 of the sum.
    let w = 1.0 / (z * z);
    let series = 1.0 - w * (1.0 - 3.0 * w * (1.0 - 5.0 * w * (1.0 - 7.0 * w)));
    -0.5 * z * z - log(-z) - 0.5 * log(2.0 * PI) + log(series)
}

/// `log δ(ε)` of the Gaussian mechanism with sensitivity ÷ deviation = `mu` (Balle & Wang 2018, Theorem 8), rounded up.
pub fn gaussian_log_delta(mu: f64, epsilon: f64) -> f64 {
    let first = log_below(0.5 * mu - epsilon / mu);
    let second = epsilon + log_below(-0.5 * mu - epsilon / mu);
    // δ = e^first − e^second, and second < first.
    let ratio = second - first;
    // The difference of two nearly equal logarithms loses digits where μ is tiny; δ is raised by what may be lost.
    let lost = 4.0 * f64::EPSILON * (first.abs() + second.abs() + epsilon + 1.0);
    (first + log((-ratio.exp_m1()).max(0.0) + lost)).min(0.0)
}

/// Smallest ε ≥ 0 with δ(ε) ≤ `delta` for the Gaussian mechanism, rounded up.
pub fn gaussian_epsilon(mu: f64, delta: f64) -> f64 {
    let target = log(delta);
    if gaussian_log_delta(mu, 0.0) <= target {
        return 0.0;
    }
    // The tail bound of the privacy loss, a normal of mean μ²/2 and deviation μ.
    let (mut low, mut high) = (0.0, 0.5 * mu * mu + mu * (reach(delta) + 1.0));
    for _ in 0..200 {
        let middle = 0.5 * (low + high);
        if middle <= low || middle >= high {
            break;
        }
        if gaussian_log_delta(mu, middle) <= target { high = middle } else { low = middle }
    }
    high * (1.0 + 1e-12)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaussian_alone() {
        // dp_accounting 0.6, GaussianDpEvent(10) at 5e-7: 0.4125 (design.md).
        assert!((gaussian_epsilon(0.1, 5e-7) - 0.4125).abs() < 5e-5);
        // δ(0) is the total variation 2Φ(μ/2) − 1.
        assert!((exp(gaussian_log_delta(1.0, 0.0)) - 0.382_924_922_548_026).abs() < 1e-12);
    }

    #[test]
    fn epsilon_and_delta_are_inverse() {
        for mu in [1e-6, 1e-3, 0.1, 1.0, 30.0, 1e4] {
            for delta in [1e-300, 1e-30, 1e-12, 1e-3] {
                let epsilon = gaussian_epsilon(mu, delta);
                assert!(epsilon.is_finite());
                if epsilon > 0.0 {
                    let error = gaussian_log_delta(mu, epsilon) - log(delta);
                    assert!(error < 1e-6 && error > -1e-4, "{mu} {delta} {epsilon} {error}");
                }
            }
        }
    }

    #[test]
    fn tails_keep_their_digits() {
        let mass = Cdf::at(10.0).mass(&Cdf::at(10.1));
        // mpmath: ncdf(-10) - ncdf(-10.1)
        assert!((mass / 4.837_5e-24 - 1.0).abs() < 0.05, "{mass:e}");
        assert_eq!(Cdf::at(-10.1).mass(&Cdf::at(-10.0)), mass);
        assert!((log_below(-30.0 + 1e-9) - log_below(-30.0 - 1e-9)).abs() < 1e-7);
        assert!(log_below(-1e6).is_finite());
    }

    #[test]
    fn tails_are_within_their_stated_errors() {
        // mpmath 1.4.1, 40 digits: ncdf(-z) at the double z.
        for (z, tail) in [
            (0.1, 0.460172162722971),
            (0.7, 0.24196365222307303),
            (1.5, 0.06680720126885807),
            (3.0, 0.0013498980316300946),
            (6.25, 2.0522634252189388e-10),
            (12.3, 4.5287069561587846e-35),
            (21.7, 1.0258139526968736e-104),
            (30.1, 2.4226672179857586e-199),
            (37.0, 5.725571222524577e-300),
        ] {
            for (z, found) in [(z, Cdf::at(z).above()), (-z, Cdf::at(-z).below())] {
                let error = (found / tail - 1.0).abs();
                assert!(error <= Cdf::at(z).error, "{z}: {error:e} > {:e}", Cdf::at(z).error);
            }
        }
    }
}
