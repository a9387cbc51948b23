//! Exact discrete Gaussian sampling (Canonne, Kamath, Steinke 2020, "The Discrete Gaussian for Differential Privacy",
//! Algorithms 1 to 3).
//!
//! The output distribution is exactly `P(x) ∝ exp(−x² / 2σ²)` over the integers, given uniform random bits: σ is read
//! as the rational number that the f64 is, every probability is a ratio of integers, and every coin is a comparison of
//! integers. There is no float on the way, so there is no float for an attack to look at.
//!
//! How long a draw takes depends on its value; whoever times the process to microseconds is outside the attack model.

use num_bigint::BigUint;
use rand_core::RngCore;

use crate::AccountingError;

/// Largest σ: noise then stays far inside i64.
const MAX_SIGMA: f64 = (1u64 << 40) as f64;
/// Smallest σ: its square has a denominator of some 2,000 bits at 1e-300; nobody needs that.
const MIN_SIGMA: f64 = 1e-9;

/// The discrete Gaussian distribution with parameter σ.
#[derive(Clone, Debug, PartialEq)]
pub struct DiscreteGaussian {
    /// σ² = `numerator / denominator`, exactly.
    numerator: BigUint,
    denominator: BigUint,
    /// Scale of the discrete Laplace proposal: ⌊σ⌋ + 1.
    scale: u64,
}

impl DiscreteGaussian {
    /// `sigma` from 1e-9 to 2⁴⁰, taken as the exact rational number that the float is.
    pub fn new(sigma: f64) -> Result<Self, AccountingError> {
        if !(MIN_SIGMA..=MAX_SIGMA).contains(&sigma) {
            return Err(AccountingError(format!(
                "discrete Gaussian noise: expected sigma from {MIN_SIGMA:e} to {MAX_SIGMA:e}, found {sigma}"
            )));
        }
        let (mantissa, exponent) = decompose(sigma);
        let square = BigUint::from(mantissa) * BigUint::from(mantissa);
        let one = BigUint::from(1u8);
        let (numerator, denominator) = if exponent >= 0 {
            (square << (2 * exponent) as u64, one)
        } else {
            (square, one << (-2 * exponent) as u64)
        };
        Ok(Self { numerator, denominator, scale: sigma as u64 + 1 })
    }

    /// One draw.
    pub fn sample(&self, rng: &mut impl RngCore) -> i64 {
        // γ = (|Y| − σ²/t)² / 2σ² with σ² = n/d is (|Y|·t·d − n)² / (2·n·d·t²).
        let t_d = &self.denominator * self.scale;
        let bottom = ((&self.numerator * &t_d) * self.scale) << 1u8;
        loop {
            let proposal = discrete_laplace(self.scale, rng);
            let scaled = &t_d * proposal.unsigned_abs();
            let difference = if scaled > self.numerator { scaled - &self.numerator } else { &self.numerator - scaled };
            if bernoulli_exp(&(&difference * &difference), &bottom, rng) {
                return proposal;
            }
        }
    }
}

/// `value = mantissa · 2^exponent` exactly, with an odd mantissa, for a positive normal float.
fn decompose(value: f64) -> (u64, i32) {
    let bits = value.to_bits();
    let mantissa = (bits & ((1 << 52) - 1)) | (1 << 52);
    let exponent = ((bits >> 52) & 0x7ff) as i32 - 1075;
    let zeros = mantissa.trailing_zeros();
    (mantissa >> zeros, exponent + zeros as i32)
}

/// `P(x) ∝ exp(−|x| / scale)` over the integers (Algorithm 2 with s = 1).
fn discrete_laplace(scale: u64, rng: &mut impl RngCore) -> i64 {
    loop {
        let remainder = uniform(scale, rng);
        if !bernoulli_exp_small(remainder, scale, rng) {
            continue;
        }
        let mut quotient = 0u64;
        while bernoulli_exp_small(1, 1, rng) {
            quotient += 1;
        }
        // The quotient passes 2²³ with probability e^(−2²³): saturating is unobservable.
        let magnitude = scale.saturating_mul(quotient).saturating_add(remainder).min(i64::MAX as u64) as i64;
        let negative = rng.next_u32() & 1 == 1;
        if negative && magnitude == 0 {
            continue;
        }
        return if negative { -magnitude } else { magnitude };
    }
}

/// True with probability exp(−numerator / denominator) (Algorithm 1).
fn bernoulli_exp(numerator: &BigUint, denominator: &BigUint, rng: &mut impl RngCore) -> bool {
    let whole = numerator / denominator;
    let rest = numerator - &whole * denominator;
    let mut left = whole;
    let one = BigUint::from(1u8);
    while left >= one {
        if !bernoulli_exp_small(1, 1, rng) {
            return false;
        }
        left -= &one;
    }
    if let (Ok(rest), Ok(denominator)) = (u64::try_from(&rest), u64::try_from(denominator)) {
        return bernoulli_exp_small(rest, denominator, rng);
    }
    let mut k = 1u64;
    // Bernoulli(γ / k) as uniform(denominator · k) < numerator.
    while uniform_big(&(denominator * k), rng) < rest {
        k += 1;
    }
    k % 2 == 1
}

/// True with probability exp(−numerator / denominator), for a ratio of at most 1.
fn bernoulli_exp_small(numerator: u64, denominator: u64, rng: &mut impl RngCore) -> bool {
    let mut k = 1u64;
    // Two coins in place of uniform(denominator · k), which could overflow: both must come up.
    while uniform(denominator, rng) < numerator && uniform(k, rng) == 0 {
        k += 1;
    }
    k % 2 == 1
}

/// Uniform over `0..bound`, without modulo bias; `bound` ≥ 1.
fn uniform(bound: u64, rng: &mut impl RngCore) -> u64 {
    if bound.is_power_of_two() {
        return if bound == 1 { 0 } else { rng.next_u64() & (bound - 1) };
    }
    let mask = u64::MAX >> bound.leading_zeros();
    loop {
        let value = rng.next_u64() & mask;
        if value < bound {
            return value;
        }
    }
}

/// Uniform over `0..bound`, without modulo bias; `bound` ≥ 1.
fn uniform_big(bound: &BigUint, rng: &mut impl RngCore) -> BigUint {
    let bits = bound.bits();
    let mut digits = vec![0u32; bits.div_ceil(32) as usize];
    let top = bits % 32;
    loop {
        digits.iter_mut().for_each(|digit| *digit = rng.next_u32());
        if let (Some(last), true) = (digits.last_mut(), top > 0) {
            *last &= (1 << top) - 1;
        }
        let value = BigUint::from_slice(&digits);
        if &value < bound {
            return value;
        }
    }
}

#[cfg(test)]
mod tests {
    use rand_chacha::ChaCha20Rng;
    use rand_core::SeedableRng;

    use super::*;

    /// χ² of draws against exact probabilities, over the values whose expected count is at least 10, the rest pooled.
    ///
    /// False alarm 1e-6: the χ² quantile by Wilson and Hilferty, z = 4.753. Seeds are fixed, so this cannot flake.
    fn check(draw: impl Fn(&mut ChaCha20Rng) -> i64, weight: impl Fn(f64) -> f64, reach: i64, count: usize) {
        let mut rng = ChaCha20Rng::seed_from_u64(20);
        let total: f64 = (-reach..=reach).map(|x| weight(x as f64)).sum();
        let mut seen = vec![0usize; (2 * reach + 1) as usize];
        for _ in 0..count {
            seen[(draw(&mut rng) + reach) as usize] += 1;
        }
        let (mut chi2, mut cells, mut rest_seen, mut rest_expected) = (0.0, 0, 0.0, 0.0);
        for (i, &seen) in seen.iter().enumerate() {
            let expected = count as f64 * weight((i as i64 - reach) as f64) / total;
            if expected >= 10.0 {
                chi2 += (seen as f64 - expected).powi(2) / expected;
                cells += 1;
            } else {
                rest_seen += seen as f64;
                rest_expected += expected;
            }
        }
        if rest_expected >= 1.0 {
            chi2 += (rest_seen - rest_expected).powi(2) / rest_expected;
            cells += 1;
        } else {
            assert!(rest_seen <= 8.0, "{rest_seen} draws where {rest_expected} were expected");
        }
        let freedom = f64::from(cells - 1).max(1.0);
        let spread = 2.0 / (9.0 * freedom);
        let quantile = freedom * (1.0 - spread + 4.753 * spread.sqrt()).powi(3);
        assert!(chi2 < quantile, "χ² = {chi2}, quantile {quantile}, {cells} cells");
    }

    #[test]
    fn follows_the_exact_probabilities() {
        for (sigma, count) in [(0.3, 60_000), (0.8, 60_000), (1.0, 60_000), (3.1, 60_000), (10.0, 200_000)] {
            let noise = DiscreteGaussian::new(sigma).unwrap();
            let reach = (40.0 * sigma) as i64 + 10;
            check(|rng| noise.sample(rng), |x| (-x * x / (2.0 * sigma * sigma)).exp(), reach, count);
        }
    }

    #[test]
    fn laplace_follows_the_exact_probabilities() {
        for scale in [1u64, 2, 7] {
            check(|rng| discrete_laplace(scale, rng), |x| (-x.abs() / scale as f64).exp(), 60 * scale as i64, 60_000);
        }
    }

    #[test]
    fn coins_have_their_probabilities() {
        // 5 standard deviations: false alarm 6e-7 per ratio.
        let mut rng = ChaCha20Rng::seed_from_u64(5);
        for (numerator, denominator) in [(0u64, 3u64), (1, 10), (1, 1), (2, 3), (5, 2), (37, 10)] {
            let n = 40_000;
            let expected = (-(numerator as f64) / denominator as f64).exp();
            // Multiplied by 2⁷⁰ the same ratio takes the path of big integers.
            for shift in [0u8, 70] {
                let (a, b) = (BigUint::from(numerator) << shift, BigUint::from(denominator) << shift);
                let seen = (0..n).filter(|_| bernoulli_exp(&a, &b, &mut rng)).count() as f64;
                let deviation = (f64::from(n) * expected * (1.0 - expected)).sqrt();
                assert!((seen - f64::from(n) * expected).abs() <= 5.0 * deviation + 1e-9, "{numerator}/{denominator}");
            }
        }
    }

    #[test]
    fn sigma_is_taken_exactly() {
        assert_eq!(decompose(10.0), (5, 1));
        assert_eq!(decompose(0.75), (3, -2));
        let tenth = DiscreteGaussian::new(0.1).unwrap();
        // 0.1 is 3602879701896397 / 2^55 as a double.
        assert_eq!(tenth.numerator, BigUint::from(3_602_879_701_896_397u64).pow(2));
        assert_eq!(tenth.denominator, BigUint::from(1u8) << 110u8);
        let ten = DiscreteGaussian::new(10.0).unwrap();
        assert_eq!((ten.numerator, ten.denominator, ten.scale), (100u8.into(), 1u8.into(), 11));
    }

    #[test]
    fn extremes_are_refused_or_work() {
        for sigma in [0.0, -1.0, 1e-300, 1e300, f64::NAN, f64::INFINITY, f64::MIN_POSITIVE] {
            assert!(DiscreteGaussian::new(sigma).is_err(), "{sigma}");
        }
        let mut rng = ChaCha20Rng::seed_from_u64(1);
        let tiny = DiscreteGaussian::new(MIN_SIGMA).unwrap();
        assert!((0..100).all(|_| tiny.sample(&mut rng) == 0));
        let huge = DiscreteGaussian::new(MAX_SIGMA).unwrap();
        let draws: Vec<i64> = (0..100).map(|_| huge.sample(&mut rng)).collect();
        assert!(draws.iter().all(|x| (x.unsigned_abs() as f64) < 20.0 * MAX_SIGMA));
        assert!(draws.iter().any(|x| (x.unsigned_abs() as f64) > 0.1 * MAX_SIGMA));
    }
}
