//! Composition: the distribution of a sum of many independent privacy losses, by FFT, where it matters.
//!
//! A plain FFT has an error of some 1e-16 everywhere, which drowns a δ of 1e-12 after many compositions. Here the
//! losses are *tilted* first: mass at loss s is weighted with e^{λs} and divided by the sum of the weights, e^{K(λ)}.
//! Tilting commutes with convolution, and with λ at the saddle point the tilted sum is centred on the very ε that is
//! asked for. The window that the FFT needs is then a few standard deviations wide, and errors are relative to δ
//! instead of to 1. δ(ε) = Σ_{s > ε} e^{K − λs} · tilted(s) · (1 − e^{ε−s}).
//!
//! What is left out is bounded and added to δ: infinite losses, tilted mass outside the window (by Chernoff's bound at
//! several exponents), and rounding errors. Those of the transforms are bounded value by value ([`transform_error`]), and
//! so is what becomes of them in a power and a product ([`Power`]).

use std::sync::{Arc, LazyLock, Mutex};

use realfft::num_complex::Complex;
use realfft::{ComplexToReal, RealFftPlanner, RealToComplex};

use super::loss::Pmf;
use super::math::{ceil, exp, expm1, floor, log, log1p, sqrt};

/// Tilted probability that may lie outside the window.
///
/// It need not be small: what is lost above counts by e^−λs, far above ε, and what wraps around lands far below it.
fn outside(side: Side) -> f64 {
    match side {
        Side::Upper => 1e-7,
        // What may have wrapped around is taken from δ wherever it lies, and so must be less.
        Side::Lower => 1e-13,
    }
}

/// Longest transform.
const MAX_WINDOW: f64 = (1u64 << 22) as f64;

/// Most losses that are summed.
const MAX_COMPOSITIONS: f64 = 1e9;
/// A power below e^this is taken for 0.
const FAINT: f64 = -50.0;
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

    /// One copy's tilted masses modulo `size`, and a bound on the error that any value of their computed transform has.
    fn tilted(&self, lambda: f64, interval: f64, size: usize) -> (Vec<f64>, f64) {
        let k = cumulants_of(self.points(interval), lambda, 1.0).k;
        let mut mass = vec![0.0; size];
        let mut error = transform_error(size);
        for (j, log_mass) in self.log_mass.iter().enumerate() {
            let shift = lambda * self.loss(j, interval);
            let exponent = log_mass + shift - k;
            // What is left out is below e^−100 each.
            if exponent > -100.0 {
                let value = exp(exponent);
                mass[(self.pmf.start + j as i64).rem_euclid(size as i64) as usize] += value;
                error += f64::EPSILON * (2.0 * (log_mass.abs() + shift.abs() + k.abs()) + 4.0) * value;
            }
        }
        // Masses that wrap around are added up.
        let wraps = (self.log_mass.len() / size) as f64;
        (mass, error + wraps * f64::EPSILON + self.log_mass.len() as f64 * 4e-44)
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
            let tilted = self.tilted(tilt, side)?;
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
        let tilted = self.tilted(*lambda, side)?;
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

    fn tilted(&self, lambda: f64, side: Side) -> Option<Tilted> {
        let centre = self.cumulants(lambda);
        let (low, high) = self.window(lambda, &centre, outside(side));
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

    /// Interval outside of which the tilted sum has probability at most `outside` on either side.
    fn window(&self, lambda: f64, centre: &Cumulants, outside: f64) -> (f64, f64) {
        let depth = -log(outside);
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

    /// The tilted sum modulo the window, and a bound on the rounding error of every entry.
    fn convolve(&self, lambda: f64, start: i64, size: usize) -> (Vec<f64>, f64) {
        let (forward, backward) = plans(size);
        let mut product = vec![Complex::new(1.0, 0.0); size / 2 + 1];
        // Bounds on the modulus of the true product, and on that of the computed one plus the distance of the two.
        let mut ceiling = vec![1.0; size / 2 + 1];
        let mut spectrum = forward.make_output_vec();
        for part in &self.parts {
            let (mut mass, error) = part.tilted(lambda, self.interval, size);
            // The lengths are the planner's own, so the transform cannot refuse them.
            let transformed = forward.process(&mut mass, &mut spectrum);
            debug_assert!(transformed.is_ok());
            let power = Power::new(part.count, error);
            for ((product, ceiling), z) in product.iter_mut().zip(&mut ceiling).zip(&spectrum) {
                let (value, bound) = power.of(*z);
                *product *= value;
                *ceiling *= bound;
            }
        }
        // The values at frequency 0 and at the highest of an even transform are real; rounding must not say otherwise.
        product[0].im = 0.0;
        product[size / 2].im = 0.0;
        let length = size as f64;
        // Frequencies but the two count twice. |Π w − Π z| ≤ Π (|w| + |w − z|) − Π |w|; the multiplications' own rounding
        // is in the bounds.
        let (mut total, mut apart) = (0.0, 0.0);
        for (z, ceiling) in product.iter().zip(&ceiling) {
            let modulus = sqrt(z.norm_sqr());
            total += 2.0 * modulus;
            apart += 2.0 * (ceiling - modulus);
        }
        let mut sum = vec![0.0; size];
        let transformed = backward.process(&mut product, &mut sum);
        debug_assert!(transformed.is_ok());
        // Entry j of the transform is the mass at indices ≡ j; turn it so that entry 0 is the window's first index.
        sum.rotate_left(start.rem_euclid(size as i64) as usize);
        sum.iter_mut().for_each(|x| *x /= length);
        // A sum of positive terms is off by an epsilon for each at most.
        (sum, (apart + transform_error(size) * total) / length * (1.0 + length * f64::EPSILON))
    }

    /// The largest ε in the window with δ(ε) > e^−`target`, exactly interpolated between grid points.
    fn crossing(&self, tilted: &Tilted, target: f64, side: Side) -> Option<f64> {
        let upper = self.descend(tilted, target, side, |tail, _, _| tail > 1.0)?;
        if side == Side::Upper {
            return Some(upper.crossing(self.interval, 1.0) * (1.0 + 4.0 * f64::EPSILON));
        }
        // Mass that wrapped around may have raised δ by this much, anywhere above the cell's lower end.
        let loss = upper.loss - self.interval;
        let level = 1.0 + 4.0 * outside(side) * exp((tilted.k - tilted.lambda * loss + target).min(700.0));
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
            (delta - 2.0 * outside(side) * exp(scale - tilted.lambda * epsilon + tilted.k)).max(0.0)
        } else {
            delta
        };
        (log(delta) - scale).min(0.0)
    }

    /// Walks from the highest loss down until `stop(δ(next lower loss), loss, interval)`; all δ times e^`scale`.
    fn descend(&self, tilted: &Tilted, scale: f64, side: Side, stop: impl Fn(f64, f64, f64) -> bool) -> Option<Point> {
        let Self { interval, .. } = *self;
        let (decay, step) = (exp(-interval), -expm1(-interval));
        // Rounding errors of the walk, whose terms are all positive, and of the exponents.
        let walked = 4.0 * tilted.mass.len() as f64 + 2.0 * (tilted.k.abs() + scale.abs());
        let sign = if side == Side::Upper { f64::EPSILON } else { -f64::EPSILON };
        let loss = |j: usize| (tilted.start + j as i64) as f64 * interval;
        let untilt = |loss: f64| {
            let shift = tilted.lambda * loss;
            exp((tilted.k - shift + scale + sign * (walked + 2.0 * shift.abs())).min(700.0))
        };
        let top = loss(tilted.mass.len());
        let mut tail = match side {
            Side::Upper => self.infinity * exp(scale.min(700.0)) + outside(side) * untilt(top),
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

/// Bound on the error of any value of a transform of this size, relative to the sum of its inputs' moduli.
///
/// Every output is a sum of all inputs, each of which came through log₂ n additions and a multiplication with a twiddle
/// factor for each level of the transform, and each of these errs relative to what it is made of: with u half an epsilon,
/// an addition by u, a product by √5·u, a factor by at most 22 u, its angle being up to 2π after three roundings. A level
/// has radix 4 at least, but for one of them and for the step between a real and a complex transform: so at most
/// (22 + √5 + 2)·u, to first order, for every two of log₂ n, and for these two once more.
fn transform_error(size: usize) -> f64 {
    8.0 * f64::EPSILON * ((size as f64).log2() + 4.0)
}

/// `z^count` of values that are known to within `error`.
struct Power {
    count: f64,
    error: f64,
    /// Relative rounding error of a computed power and of its multiplication with others.
    rounding: f64,
    /// Bound on the power's error where |z| ≤ `count` · `error`, so that nothing is known of it but that it is small.
    unknown: f64,
}

impl Power {
    fn new(count: f64, error: f64) -> Self {
        // count · error · (|z| + error)^(count − 1), as below.
        let unknown = count * error * ((count + 1.0) * error).powf(count - 1.0);
        // The logarithm's error counts `count` times, the angle's (at most π) likewise; exponents go down to FAINT.
        Self { count, error, rounding: f64::EPSILON * (5.0 * count + 100.0), unknown: unknown * 1.001 }
    }

    /// The power, by logarithm, so that the cost does not grow with the count, and a bound on its modulus plus its distance
    /// from the true one. By the mean value theorem that distance is at most count · error · (|z| + error)^(count − 1).
    fn of(&self, z: Complex<f64>) -> (Complex<f64>, f64) {
        let square = z.norm_sqr();
        let modulus = sqrt(square);
        if self.count == 1.0 {
            return (z, (modulus + self.error) * (1.0 + self.rounding));
        }
        let exponent = 0.5 * self.count * log(square);
        let (value, size) = if exponent >= FAINT {
            let (sin, cos) = (self.count * z.im.atan2(z.re)).sin_cos();
            let size = exp(exponent);
            (Complex::new(cos, sin) * size, size)
        } else {
            (Complex::new(0.0, 0.0), exp(FAINT))
        };
        // With g = count · error / |z| ≤ 1 the distance is at most |z|^count · g·e^g, and e^g ≤ 1 + 2g.
        let growth = self.count * self.error / modulus;
        let bound = if growth <= 1.0 { size * (1.0 + growth * (1.0 + 2.0 * growth)) } else { size + self.unknown };
        (value, bound * (1.0 + self.rounding))
    }
}

/// Smallest even 2^a · 3^b · 5^c (b, c ≤ 1) that is at least `size`.
fn fast_size(size: usize) -> usize {
    let size = size.max(16);
    [1usize, 3, 5, 15].into_iter().map(|odd| odd * size.div_ceil(odd).next_power_of_two().max(2)).min().unwrap_or(size)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::accounting::math::exp2;

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

    #[test]
    fn every_entry_is_within_its_stated_error() {
        // A fair coin: the probabilities of its sums are binomials over a power of two, exact in f64 up to 2⁵³.
        let coin = Pmf { start: 0, mass: vec![0.5, 0.5], infinity: 0.0 };
        for count in [1u64, 2, 3, 20, 50] {
            for size in [64, 240, 4096] {
                let sum = Sum::new(1.0, vec![(coin.clone(), count)]);
                let (mass, error) = sum.convolve(0.0, 0, size);
                let mut binomial = 1.0;
                for (k, &mass) in mass.iter().enumerate() {
                    let expected = binomial * exp2(-(count as f64));
                    assert!(
                        (mass - expected).abs() <= error,
                        "{count} of {size} at {k}: {mass:e}, {expected:e}, {error:e}"
                    );
                    binomial = binomial * (count as f64 - k as f64).max(0.0) / (k as f64 + 1.0);
                }
                assert!(error < 1e-11 * count as f64, "{count} of {size}: {error:e}");
            }
        }
    }

    #[test]
    fn a_power_is_within_its_stated_error_of_every_value_that_it_may_be_of() {
        for count in [1.0, 2.0, 3.0, 40.0, 1e5] {
            for modulus in [1.0, 0.9, 1e-3, 1e-12, 0.0] {
                for error in [1e-15, 1e-9, 1e-4] {
                    let power = Power::new(count, error);
                    let (value, bound) = power.of(Complex::from_polar(modulus, 0.7));
                    for angle in [0.0, 1.6, 3.1] {
                        let truth = Complex::from_polar(modulus, 0.7) + Complex::from_polar(error, angle);
                        let (log_modulus, angle) = (log(truth.norm()), truth.arg());
                        let truth = Complex::from_polar(exp(count * log_modulus), count * angle);
                        let distance = (value - truth).norm();
                        assert!(value.norm() + distance <= bound * (1.0 + 1e-9), "{count} {modulus} {error} {bound:e}");
                    }
                }
            }
        }
    }
}
