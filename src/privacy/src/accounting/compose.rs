//! Composition: the distribution of a sum of many independent privacy losses, by FFT, where it matters.
//!
//! A plain FFT has an error of some 1e-16 everywhere, which drowns a δ of 1e-12 after many compositions. Here the
//! losses are *tilted* first: mass at loss s is weighted with e^{λs} and divided by the sum of the weights, e^{K(λ)}.
//! Tilting commutes with convolution, and with λ at the saddle point the tilted sum is centred on the very ε that is
//! asked for. The window that the FFT needs is then a few standard deviations wide, and errors are relative to δ
//! instead of to 1. δ(ε) = Σ_{s > ε} e^{K − λs} · tilted(s) · (1 − e^{ε−s}).
//!
//! What is left out is bounded and added to δ: infinite losses, tilted mass outside the window (by Chernoff's bound at
//! several exponents), and rounding errors of the FFT (per entry, from the spectrum's own size).

use std::sync::{Arc, LazyLock, Mutex};

use realfft::num_complex::Complex;
use realfft::{ComplexToReal, RealFftPlanner, RealToComplex};

use super::loss::Pmf;
use super::math::{ceil, exp, expm1, floor, log, log1p, sqrt};

/// Tilted probability that may lie outside the window.
///
/// It need not be small: what is lost above counts by e^−λs, far above ε, and what wraps around lands far below it.
const OUTSIDE: f64 = 1e-7;
/// Longest transform.
const MAX_WINDOW: f64 = (1u64 << 22) as f64;

/// Most losses that are summed.
const MAX_COMPOSITIONS: f64 = 1e9;
/// Longest transform whose plan is kept; there are four sizes to an octave.
const KEPT_PLANS: usize = 1 << 18;

/// Whether errors are to be added to δ or taken from it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Side {
    /// δ is at least the truth.
    Upper,
    /// δ is at most the truth.
    Lower,
}

/// A sum of independent losses on one grid, not yet evaluated.
pub struct Sum {
    interval: f64,
    parts: Vec<Part>,
    infinity: f64,
}

struct Part {
    pmf: Pmf,
    count: f64,
    log_mass: Vec<f64>,
    /// (loss, log mass) of runs of neighbours put together: good enough to choose a tilt by.
    coarse: Vec<(f64, f64)>,
}

/// Logarithm of the moment generating function and its first two derivatives, summed over all losses.
#[derive(Clone, Copy, Default)]
struct Cumulants {
    k: f64,
    mean: f64,
    variance: f64,
}

/// Distribution of the tilted sum on a window.
struct Tilted {
    lambda: f64,
    k: f64,
    /// Grid index of the first entry.
    start: i64,
    mass: Vec<f64>,
    /// Bound on the rounding error of one entry.
    error: f64,
}

/// Runs that a distribution is put into for the choice of a tilt.
const COARSE: usize = 512;

impl Part {
    fn new(pmf: Pmf, count: u64, interval: f64) -> Self {
        let log_mass = pmf.mass.iter().map(|&mass| log(mass)).collect();
        let run = pmf.mass.len().div_ceil(COARSE);
        let together = |(i, run_of): (usize, &[f64])| {
            let total: f64 = run_of.iter().sum();
            let weighted: f64 = run_of.iter().enumerate().map(|(j, mass)| j as f64 * mass).sum();
            let offset = if total > 0.0 { weighted / total } else { 0.0 };
            (((pmf.start + (i * run) as i64) as f64 + offset) * interval, log(total))
        };
        let coarse = pmf.mass.chunks(run).enumerate().map(together).collect();
        Self { pmf, count: count as f64, log_mass, coarse }
    }

    fn loss(&self, j: usize, interval: f64) -> f64 {
        (self.pmf.start + j as i64) as f64 * interval
    }

    fn points(&self, interval: f64) -> impl Iterator<Item = (f64, f64)> + Clone + '_ {
        self.log_mass.iter().enumerate().map(move |(j, &log_mass)| (self.loss(j, interval), log_mass))
    }
}

/// Cumulants of `count` copies of the distribution with these (loss, log mass).
fn cumulants_of(points: impl Iterator<Item = (f64, f64)> + Clone, lambda: f64, count: f64) -> Cumulants {
    let (mut largest, mut origin) = (f64::NEG_INFINITY, 0.0);
    for (loss, log_mass) in points.clone() {
        let x = log_mass + lambda * loss;
        if x > largest {
            (largest, origin) = (x, loss);
        }
    }
    let (mut sum, mut first, mut second) = (0.0, 0.0, 0.0);
    for (loss, log_mass) in points {
        let x = log_mass + lambda * loss - largest;
        if x > -50.0 {
            let weight = exp(x);
            let offset = loss - origin;
            sum += weight;
            first += weight * offset;
            second += weight * offset * offset;
        }
    }
    let offset = first / sum;
    Cumulants {
        k: count * (largest + log(sum)),
        mean: count * (origin + offset),
        variance: count * (second / sum - offset * offset).max(0.0),
    }
}

impl Sum {
    /// Sum of `count` copies of each loss.
    pub fn new(interval: f64, losses: Vec<(Pmf, u64)>) -> Self {
        let infinity = losses.iter().map(|(pmf, count)| pmf.infinity * *count as f64).sum::<f64>().min(1.0);
        let parts = losses.into_iter().map(|(pmf, count)| Part::new(pmf, count, interval)).collect();
        Self { interval, parts, infinity }
    }

    /// Smallest ε ≥ 0 with δ(ε) ≤ `delta`; `None` if the window would be too long. `lambda` is the first guess of the
    /// tilt, and comes back as the one that was used.
    pub fn epsilon(&self, delta: f64, side: Side, lambda: &mut f64) -> Option<f64> {
        let target = -log(delta);
        *lambda = self.solve(*lambda, |lambda, c| lambda * c.mean - c.k - target);
        let mut tilt = *lambda;
        for attempt in 0..8 {
            let tilted = self.tilted(tilt)?;
            if let Some(epsilon) = self.crossing(&tilted, target, side) {
                return Some(epsilon.max(0.0));
            }
            if tilted.start <= 0 {
                return Some(0.0);
            }
            // δ is so large that its ε lies below the window: tilt less, in the end not at all.
            tilt = if attempt == 6 { 0.0 } else { tilt / 4.0 };
        }
        None
    }

    /// `log δ(ε)`; `None` if the window would be too long.
    pub fn log_delta(&self, epsilon: f64, side: Side, lambda: &mut f64) -> Option<f64> {
        let at_rest = self.coarse_cumulants(0.0);
        *lambda = if at_rest.mean >= epsilon { 0.0 } else { self.solve(*lambda, |_, c| c.mean - epsilon) };
        let tilted = self.tilted(*lambda)?;
        Some(self.log_delta_at(&tilted, epsilon, side))
    }

    fn cumulants(&self, lambda: f64) -> Cumulants {
        self.total(|part| cumulants_of(part.points(self.interval), lambda, part.count))
    }

    fn coarse_cumulants(&self, lambda: f64) -> Cumulants {
        self.total(|part| cumulants_of(part.coarse.iter().copied(), lambda, part.count))
    }

    fn total(&self, of: impl Fn(&Part) -> Cumulants) -> Cumulants {
        self.parts.iter().map(of).fold(Cumulants::default(), |sum, part| Cumulants {
            k: sum.k + part.k,
            mean: sum.mean + part.mean,
            variance: sum.variance + part.variance,
        })
    }

    /// Root of a function that grows with λ, to a per cent: any λ is right, a good one is only cheaper.
    fn solve(&self, guess: f64, f: impl Fn(f64, Cumulants) -> f64) -> f64 {
        let value = |lambda: f64| f(lambda, self.coarse_cumulants(lambda));
        // With a larger tilt than this the highest loss is all that is left; with a smaller one nothing is tilted.
        let (least, most) = (1e-15 / self.interval, 60.0 / self.interval);
        let mut low = guess.clamp(least, most);
        let mut high = low;
        if value(low) < 0.0 {
            while high < most {
                low = high;
                high *= 2.0;
                if value(high) >= 0.0 {
                    break;
                }
            }
        } else {
            while low > least {
                high = low;
                low /= 2.0;
                if value(low) < 0.0 {
                    break;
                }
            }
        }
        while high > 1.02 * low {
            let middle = sqrt(low * high);
            if value(middle) < 0.0 { low = middle } else { high = middle }
        }
        sqrt(low * high)
    }

    fn tilted(&self, lambda: f64) -> Option<Tilted> {
        let centre = self.cumulants(lambda);
        let (low, high) = self.window(lambda, &centre);
        let start = floor(low / self.interval);
        let span = ceil(high / self.interval) - start + 2.0;
        if !(span.is_finite() && span < MAX_WINDOW && start.abs() < 9e15) {
            return None;
        }
        let start = start as i64;
        let size = fast_size(span as usize);
        // The phase of each frequency is multiplied by the count: beyond this its rounding error would show in δ.
        if self.parts.iter().map(|part| part.count).sum::<f64>() > MAX_COMPOSITIONS {
            return None;
        }
        let (mass, error) = self.convolve(lambda, start, size);
        Some(Tilted { lambda, k: centre.k, start, mass, error })
    }

    /// Interval outside of which the tilted sum has probability at most [`OUTSIDE`] on either side.
    fn window(&self, lambda: f64, centre: &Cumulants) -> (f64, f64) {
        let depth = -log(OUTSIDE);
        let scale = sqrt(2.0 * depth / centre.variance.max(self.interval * self.interval));
        // Chernoff: P(S > b) ≤ exp(K(λ+θ) − K(λ) − θb) for any θ > 0, and from below for any θ < 0. The best θ is chosen
        // on coarse distributions; the bound that it gives is then exact.
        let coarse = self.coarse_cumulants(lambda).k;
        let best = |sign: f64| {
            let bound = |theta: f64| (self.coarse_cumulants(lambda + theta).k - coarse + depth) / theta.abs();
            let thetas = [0.15, 0.25, 0.4, 0.55, 0.75, 1.0, 1.4].map(|factor| sign * factor * scale);
            thetas.into_iter().min_by(|a, b| bound(*a).total_cmp(&bound(*b))).unwrap_or(sign * scale)
        };
        let bound = |theta: f64| (self.cumulants(lambda + theta).k - centre.k + depth) / theta;
        (bound(best(-1.0)), bound(best(1.0)))
    }

    /// The tilted sum modulo the window, and a bound on the rounding error of one entry.
    fn convolve(&self, lambda: f64, start: i64, size: usize) -> (Vec<f64>, f64) {
        let (forward, backward) = plans(size);
        let mut product = vec![Complex::new(1.0, 0.0); size / 2 + 1];
        let mut spectrum = forward.make_output_vec();
        let mut compositions = 0.0;
        for part in &self.parts {
            let k = cumulants_of(part.points(self.interval), lambda, 1.0).k;
            let mut mass = vec![0.0; size];
            for (j, log_mass) in part.log_mass.iter().enumerate() {
                let exponent = log_mass + lambda * part.loss(j, self.interval) - k;
                if exponent > -100.0 {
                    mass[(part.pmf.start + j as i64).rem_euclid(size as i64) as usize] += exp(exponent);
                }
            }
            // The lengths are the planner's own, so the transform cannot refuse them.
            let transformed = forward.process(&mut mass, &mut spectrum);
            debug_assert!(transformed.is_ok());
            product.iter_mut().zip(&spectrum).for_each(|(product, z)| *product *= power(*z, part.count));
            compositions += part.count;
        }
        // The values at frequency 0 and at the highest of an even transform are real; rounding must not say otherwise.
        product[0].im = 0.0;
        product[size / 2].im = 0.0;
        let average = 2.0 * product.iter().map(|z| z.norm()).sum::<f64>() / size as f64;
        let mut sum = vec![0.0; size];
        let transformed = backward.process(&mut product, &mut sum);
        debug_assert!(transformed.is_ok());
        // Entry j of the transform is the mass at indices ≡ j; turn it so that entry 0 is the window's first index.
        sum.rotate_left(start.rem_euclid(size as i64) as usize);
        sum.iter_mut().for_each(|x| *x /= size as f64);
        let rounding = 4.0 * f64::EPSILON * log(size as f64 + 2.0) * (compositions + 1.0);
        (sum, rounding * average)
    }

    /// The largest ε in the window with δ(ε) > e^−`target`, exactly interpolated between grid points.
    fn crossing(&self, tilted: &Tilted, target: f64, side: Side) -> Option<f64> {
        let upper = self.descend(tilted, target, side, |tail, _, _| tail > 1.0)?;
        if side == Side::Upper {
            return Some(upper.crossing(self.interval, 1.0));
        }
        // Mass that wrapped around may have raised δ by this much, anywhere above the cell's lower end.
        let loss = upper.loss - self.interval;
        let level = 1.0 + 4.0 * OUTSIDE * exp((tilted.k - tilted.lambda * loss + target).min(700.0));
        let lower = self.descend(tilted, target, side, |tail, _, _| tail > level)?;
        Some(lower.crossing(self.interval, level))
    }

    fn log_delta_at(&self, tilted: &Tilted, epsilon: f64, side: Side) -> f64 {
        // Any scale is right; beyond e^600 it would overflow, and below e^−600 δ is 0 to everyone.
        let scale = (tilted.lambda * epsilon - tilted.k).min(600.0);
        let point = self.descend(tilted, scale, side, |_, loss, interval| loss - interval <= epsilon);
        let delta = match point {
            Some(point) => {
                let x = (point.loss - epsilon).max(0.0);
                point.tail - expm1(-x) * point.weight
            }
            // ε lies outside the window, which happens only where δ is 1 or 0 to all digits.
            None => return if epsilon < tilted.start as f64 * self.interval { 0.0 } else { log(self.infinity) },
        };
        let delta = if side == Side::Lower {
            (delta - 2.0 * OUTSIDE * exp(scale - tilted.lambda * epsilon + tilted.k)).max(0.0)
        } else {
            delta
        };
        (log(delta) - scale).min(0.0)
    }

    /// Walks from the highest loss down until `stop(δ(next lower loss), loss, interval)`; all δ times e^`scale`.
    fn descend(&self, tilted: &Tilted, scale: f64, side: Side, stop: impl Fn(f64, f64, f64) -> bool) -> Option<Point> {
        let Self { interval, .. } = *self;
        let (decay, step) = (exp(-interval), -expm1(-interval));
        let loss = |j: usize| (tilted.start + j as i64) as f64 * interval;
        let untilt = |loss: f64| exp((tilted.k - tilted.lambda * loss + scale).min(700.0));
        let top = loss(tilted.mass.len());
        let mut tail = match side {
            Side::Upper => self.infinity * exp(scale.min(700.0)) + OUTSIDE * untilt(top),
            Side::Lower => 0.0,
        };
        let mut weight = 0.0;
        for j in (0..tilted.mass.len()).rev() {
            let loss = loss(j);
            let mass = match side {
                Side::Upper => tilted.mass[j].max(0.0) + tilted.error,
                Side::Lower => (tilted.mass[j] - tilted.error).max(0.0),
            };
            weight = weight * decay + mass * untilt(loss);
            let next = tail + step * weight;
            if stop(next, loss, interval) {
                return Some(Point { loss, tail, weight });
            }
            tail = next;
        }
        None
    }
}

/// δ at a grid point, scaled, and what it grows with below: δ(loss − x) = tail + (1 − e^−x) · weight.
struct Point {
    loss: f64,
    tail: f64,
    weight: f64,
}

impl Point {
    fn crossing(&self, interval: f64, level: f64) -> f64 {
        let share = (level - self.tail) / self.weight;
        self.loss + if share < 1.0 { log1p(-share).clamp(-interval, 0.0) } else { -interval }
    }
}

type Plans = (Arc<dyn RealToComplex<f64>>, Arc<dyn ComplexToReal<f64>>);

/// Transforms of this size. Making one costs as much as running it, so those of common sizes are kept.
fn plans(size: usize) -> Plans {
    static PLANNER: LazyLock<Mutex<RealFftPlanner<f64>>> = LazyLock::new(|| Mutex::new(RealFftPlanner::new()));
    let plan = |planner: &mut RealFftPlanner<f64>| (planner.plan_fft_forward(size), planner.plan_fft_inverse(size));
    match PLANNER.lock() {
        Ok(mut planner) if size <= KEPT_PLANS => plan(&mut planner),
        _ => plan(&mut RealFftPlanner::new()),
    }
}

/// `z^count`, by logarithm: the cost does not grow with the count.
fn power(z: Complex<f64>, count: f64) -> Complex<f64> {
    if count == 1.0 {
        return z;
    }
    let exponent = 0.5 * count * log(z.norm_sqr());
    // Below e^−50 it is less than the rounding error that is reckoned with.
    if exponent.is_nan() || exponent < -50.0 {
        return Complex::new(0.0, 0.0);
    }
    let (sin, cos) = (count * z.im.atan2(z.re)).sin_cos();
    Complex::new(cos, sin) * exp(exponent)
}

/// Smallest even 2^a · 3^b · 5^c (b, c ≤ 1) that is at least `size`.
fn fast_size(size: usize) -> usize {
    let size = size.max(16);
    [1usize, 3, 5, 15].into_iter().map(|odd| odd * size.div_ceil(odd).next_power_of_two().max(2)).min().unwrap_or(size)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn coin() -> Pmf {
        Pmf { start: -1, mass: vec![0.3, 0.0, 0.7], infinity: 0.0 }
    }

    fn exact(count: u64, interval: f64, epsilon: f64) -> f64 {
        (0..=count)
            .map(|k| {
                let (n, k) = (count as f64, k as f64);
                let log_probability = libm::lgamma(n + 1.0) - libm::lgamma(k + 1.0) - libm::lgamma(n - k + 1.0)
                    + k * log(0.7)
                    + (n - k) * log(0.3);
                let loss = (2.0 * k - n) * interval;
                exp(log_probability) * (-expm1(epsilon - loss)).max(0.0)
            })
            .sum()
    }

    #[test]
    fn binomial_sums_are_enclosed_far_into_the_tail() {
        let interval = 0.1;
        for count in [1, 7, 100, 3000] {
            let sum = Sum::new(interval, vec![(coin(), count)]);
            for epsilon in [0.0, 0.05, 0.3, 2.0, 5.0, 20.0, 200.0] {
                let expected = exact(count, interval, epsilon);
                let mut lambda = 1.0;
                let upper = exp(sum.log_delta(epsilon, Side::Upper, &mut lambda).unwrap());
                let lower = exp(sum.log_delta(epsilon, Side::Lower, &mut lambda).unwrap());
                assert!(upper >= expected * (1.0 - 1e-9), "{count} {epsilon}: {upper:e} < {expected:e}");
                assert!(lower <= expected * (1.0 + 1e-9), "{count} {epsilon}: {lower:e} > {expected:e}");
                assert!(upper - lower <= 1e-5 * expected + 1e-25, "{count} {epsilon}: {lower:e} {upper:e}");
            }
        }
    }

    #[test]
    fn epsilon_is_where_delta_crosses() {
        let sum = Sum::new(0.1, vec![(coin(), 40), (coin(), 2)]);
        for delta in [0.9, 0.1, 1e-3, 1e-6, 1e-12] {
            let mut lambda = 1.0;
            let (upper, lower) = (
                sum.epsilon(delta, Side::Upper, &mut lambda).unwrap(),
                sum.epsilon(delta, Side::Lower, &mut lambda).unwrap(),
            );
            // The highest sum has probability 3e-7; for a δ far below it the lower bound gives up digits.
            let apart = if delta < 1e-6 { 0.5 } else { 1e-3 };
            assert!(lower <= upper && upper - lower < apart, "{delta}: {lower} {upper}");
            if upper > 0.0 && upper < 4.1 {
                assert!((exact(42, 0.1, upper) / delta - 1.0).abs() < 1e-4, "{delta} {upper}");
            }
        }
    }
}
