//! Rényi differential privacy: a second opinion that shares no code with the privacy loss distribution.
//!
//! The RDP of the sampled Gaussian at order α is `log A(α) / (α − 1)`, `A(α) = E_{x ~ N(0,σ²)} [(1−q + q e^t)^α]`,
//! `t = (2x−1)/2σ²` (Mironov, Talwar, Zhang 2019, Theorem 4 and Section 3.3; the removal side is the worse one). For
//! integer α this is a finite sum; for others it is integrated by the trapezoid rule, which converges exponentially
//! for analytic integrands and, unlike the alternating series of that paper, loses no digits to cancellation.

use super::math::{ceil, exp, exp2, expm1, floor, log, log1p, sqrt};
use libm::lgamma;

use super::AccountingError;
use crate::event::Event;

/// Sum of events' RDP at many orders, converted to the best (ε, δ).
pub fn epsilon(events: &[Event], delta: f64) -> Result<f64, AccountingError> {
    let at = |order: f64| convert(total(events, order), order, delta);
    let best = best_order(at);
    let epsilon = at(best).max(0.0);
    if epsilon.is_finite() {
        return Ok(epsilon);
    }
    Err(AccountingError(format!(
        "RDP: ε at δ = {delta:e} is too large to be represented\nhelp: raise the noise multiplier"
    )))
}

/// A bound on `log δ` at `epsilon`.
pub fn log_delta(events: &[Event], epsilon: f64) -> f64 {
    let at = |order: f64| {
        let bound = (order - 1.0) * (total(events, order) - epsilon + log1p(-1.0 / order)) - log(order);
        if bound.is_nan() { f64::INFINITY } else { bound }
    };
    at(best_order(at)).min(0.0)
}

/// Order that minimises `at`: the best of a wide grid, and for small orders refined between its neighbours.
fn best_order(at: impl Fn(f64) -> f64) -> f64 {
    let orders = orders();
    let values: Vec<f64> = orders.iter().map(|&order| at(order)).collect();
    let best = (0..orders.len()).fold(0, |best, i| if values[i] < values[best] { i } else { best });
    let (mut low, mut high) = (orders[best.saturating_sub(1)], orders[(best + 1).min(orders.len() - 1)]);
    if high > FRACTIONAL_ORDERS {
        return orders[best];
    }
    // The curve is unimodal in α between grid points; a ternary search narrows it to 1e-3.
    while high - low > 1e-3 {
        let third = (high - low) / 3.0;
        if at(low + third) < at(high - third) { high -= third } else { low += third }
    }
    let refined = 0.5 * (low + high);
    if at(refined) < values[best] { refined } else { orders[best] }
}

/// Orders above this are integers.
const FRACTIONAL_ORDERS: f64 = 12.0;

fn orders() -> Vec<f64> {
    let close = [1.01, 1.02, 1.05].into_iter();
    let tenths = (11..120).map(|tenths| f64::from(tenths) / 10.0);
    let integers = (12..64).map(f64::from);
    let wide = (0..100).map(|i| floor(64.0 * exp2(f64::from(i) / 8.0)));
    close.chain(tenths).chain(integers).chain(wide.take_while(|&order| order <= 20_000.0)).collect()
}

fn total(events: &[Event], order: f64) -> f64 {
    events
        .iter()
        .map(|event| match *event {
            // The discrete Gaussian's Rényi divergence is at most the continuous one's (CKS20, Proposition 5).
            Event::Gaussian { noise_multiplier } | Event::DiscreteGaussian { noise_multiplier } => {
                order / (2.0 * noise_multiplier * noise_multiplier)
            }
            Event::PoissonSampledGaussian { sampling_probability, noise_multiplier, steps } => {
                steps as f64 * sampled_gaussian(sampling_probability, noise_multiplier, order)
            }
        })
        .sum()
}

/// (order, `rdp`)-RDP as ε at `delta` (Canonne, Kamath, Steinke 2020, Proposition 12; Balle et al. 2020, Theorem 21).
///
/// Where δ² ≥ 1 − e^−rdp the total variation is already below δ, and ε is 0 (Bretagnolle & Huber 1979).
fn convert(rdp: f64, order: f64, delta: f64) -> f64 {
    if delta * delta + expm1(-rdp) >= 0.0 {
        return 0.0;
    }
    let epsilon = rdp + log1p(-1.0 / order) - log(delta * order) / (order - 1.0);
    if epsilon.is_nan() { f64::INFINITY } else { epsilon }
}

/// RDP of one step of the sampled Gaussian mechanism.
fn sampled_gaussian(q: f64, sigma: f64, order: f64) -> f64 {
    if q == 1.0 {
        return order / (2.0 * sigma * sigma);
    }
    if order.fract() == 0.0 {
        return log_a_sum(q, sigma, order) / (order - 1.0);
    }
    match log_a_integral(q, sigma, order) {
        // The quadrature's rounding errors are some 1e-15: so near to 0, the next integer order bounds this one.
        log_a if log_a < 1e-11 => sampled_gaussian(q, sigma, ceil(order)),
        log_a => log_a / (order - 1.0),
    }
}

/// `log Σ_k binom(α,k) (1−q)^(α−k) q^k exp((k²−k)/2σ²)`, for integer α.
fn log_a_sum(q: f64, sigma: f64, order: f64) -> f64 {
    let (log_q, log_rest, log_factorial) = (log(q), log1p(-q), lgamma(order + 1.0));
    // A − 1, from terms whose exponential exceeds 1: accurate where A is barely above 1. Σ of the plain binomial is 1.
    let mut sum = LogSum::default();
    for k in 2..=order as u64 {
        let k = k as f64;
        let binomial = log_factorial - lgamma(k + 1.0) - lgamma(order - k + 1.0);
        let growth = (k * k - k) / (2.0 * sigma * sigma);
        let log_growth = if growth > 30.0 { growth } else { log(expm1(growth)) };
        sum.add(binomial + k * log_q + (order - k) * log_rest + log_growth);
    }
    let excess = sum.value();
    if excess > 30.0 { excess } else { log1p(exp(excess)) }
}

/// The same for any α > 1, by quadrature.
fn log_a_integral(q: f64, sigma: f64, order: f64) -> f64 {
    // The integrand's singularities nearest to the real axis are πσ² away; it peaks at 0 and near α.
    let spacing = (sigma / 8.0).min(sigma * sigma / 2.0);
    let (low, high) = (-14.0 * sigma, order + 14.0 * sigma);
    let points = ceil((high - low) / spacing);
    // With so little noise, integer orders serve as well.
    if points > 2e4 {
        return f64::INFINITY;
    }
    let mut sum = LogSum::default();
    for i in 0..=points as u64 {
        let x = low + i as f64 * spacing;
        let t = (2.0 * x - 1.0) / (2.0 * sigma * sigma);
        let ratio = if t < 30.0 { log1p(q * expm1(t)) } else { t + log(q) + log1p((1.0 - q) / q * exp(-t)) };
        sum.add(order * ratio - x * x / (2.0 * sigma * sigma));
    }
    sum.value() + log(spacing / (sigma * sqrt(2.0 * std::f64::consts::PI)))
}

/// `log Σ exp(x)` of terms that come one by one.
struct LogSum {
    largest: f64,
    scaled: f64,
}

impl Default for LogSum {
    fn default() -> Self {
        Self { largest: f64::NEG_INFINITY, scaled: 0.0 }
    }
}

impl LogSum {
    fn add(&mut self, x: f64) {
        if x > self.largest {
            self.scaled = self.scaled * exp(self.largest - x) + 1.0;
            self.largest = x;
        } else if x > f64::NEG_INFINITY {
            self.scaled += exp(x - self.largest);
        }
    }

    fn value(&self) -> f64 {
        self.largest + log(self.scaled)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sum_and_integral_agree_at_integer_orders() {
        for (q, sigma) in [(0.02, 1.1), (0.5, 0.3), (1e-4, 0.6), (0.9, 10.0), (1e-3, 4.0)] {
            for order in [2.0, 3.0, 7.0, 11.0] {
                let (sum, integral) = (log_a_sum(q, sigma, order), log_a_integral(q, sigma, order));
                assert!((sum - integral).abs() < 1e-9 * sum + 1e-12, "{q} {sigma} {order}: {sum} {integral}");
            }
        }
    }

    #[test]
    fn order_two_by_hand() {
        // A(2) = 1 + q² (e^(1/σ²) − 1).
        let expected = log1p(0.01f64.powi(2) * expm1(1.0 / 1.44));
        assert!((sampled_gaussian(0.01, 1.2, 2.0) - expected).abs() < 1e-15);
    }

    #[test]
    fn rdp_grows_with_order_and_falls_with_noise() {
        let mut last = 0.0;
        for order in orders() {
            let rdp = sampled_gaussian(0.02, 1.1, order);
            assert!(rdp >= last - 1e-12 && rdp >= sampled_gaussian(0.02, 1.2, order), "{order}");
            last = rdp;
        }
    }

    #[test]
    fn rdp_is_never_rounded_to_nothing() {
        // To first order A − 1 = ½ α (α − 1) q² (e^(1/σ²) − 1).
        for (q, sigma) in [(1e-6, 7.0), (1e-7, 1.0), (1e-7, 2.0), (1e-9, 0.9)] {
            for order in [1.05, 1.5, 2.0, 2.3, 3.7] {
                let expected = 0.5 * order * q * q * expm1(1.0 / (sigma * sigma));
                let found = sampled_gaussian(q, sigma, order);
                assert!(found >= expected * 0.999 && found < expected * 3.0, "{q} {sigma} {order}: {found:e}");
            }
        }
    }

    #[test]
    fn published_example() {
        // design.md: 3.161 and 6.686 by dp_accounting 0.6, whose orders are a subset of ours.
        let run = |noise_multiplier| {
            let event = Event::PoissonSampledGaussian {
                sampling_probability: 4096.0 / 180_000.0,
                noise_multiplier,
                steps: 439,
            };
            epsilon(&[event], 5e-7).unwrap()
        };
        assert!((run(1.1220) - 3.161).abs() < 1.5e-3, "{}", run(1.1220));
        assert!((run(0.8072) - 6.686).abs() < 1.5e-3, "{}", run(0.8072));
    }
}
