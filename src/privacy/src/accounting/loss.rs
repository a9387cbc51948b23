//! The privacy loss of one mechanism, put on a grid: from above ([`upper`]) and from below ([`lower`]).
//!
//! For a pair of output distributions (P, Q), one with the unit and one without, the privacy loss at an output is
//! `log(P/Q)`, drawn under P. Both roundings keep the total of P and of Q, which is why they are so tight:
//!
//! - *above*: the outputs whose loss lies between two grid points are split onto these two points such that both
//!   masses are kept ("connect the dots", Doroshenko, Ghazi, Kamath, Kumar, Manurangsi 2022). The privacy profile δ(ε)
//!   is then exact at grid points and never below the truth between them.
//! - *below*: outputs are merged into groups whose joint P/Q is exactly a grid point. Merging is post-processing, so
//!   the profile is never above the truth.
//!
//! Either error is of second order in the interval, so a coarse grid goes a long way.
//!
//! *Rounding errors*. Above, how a cell's mass is split follows from a difference of tail probabilities, whose error does
//! not shrink with the cell: it is bounded for every cell, and as much as it can amount to goes to the upper point in
//! addition. That also pays for errors of the masses themselves, which are errors of a cell's edges: what one cell has
//! too little the next one has too much, one interval away. Below, rounding is not bounded; it moves ε by some 1e-12.

use super::math::{exp, expm1, floor, log, log1p};

use super::normal::{Cdf, density, reach};

/// Longest distribution of one step; a finer grid than that is not tried.
pub const MAX_ATOMS: f64 = 3e6;
/// Distribution of a privacy loss on the grid `interval · ℤ`.
#[derive(Clone, Debug)]
pub struct Pmf {
    /// Grid index of the first mass.
    pub start: i64,
    /// Probabilities of consecutive grid points.
    pub mass: Vec<f64>,
    /// Probability of an infinite loss: tails that were cut off.
    pub infinity: f64,
}

/// Losses of both neighbours: the unit removed (P has it) and added (Q has it).
#[derive(Clone, Debug)]
pub struct Pair {
    /// P has the unit.
    pub remove: Pmf,
    /// Q has the unit.
    pub add: Pmf,
}

/// One step of a mechanism; a unit moves the real value under the noise by 1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Step {
    /// Gaussian noise over a Poisson sample (`q` = 1: over everybody).
    Gaussian {
        /// Sampling probability.
        q: f64,
        /// Noise deviation ÷ sensitivity.
        sigma: f64,
    },
    /// Discrete Gaussian noise over integers.
    Discrete {
        /// Noise parameter.
        sigma: f64,
    },
}

impl Step {
    /// Distance between the smallest and the largest loss once tails of probability `tail` are cut off.
    pub fn range(&self, tail: f64) -> f64 {
        match *self {
            Step::Gaussian { q, sigma } => {
                let z = reach(tail);
                loss(q, sigma, 1.0 + z * sigma) - loss(q, sigma, -z * sigma)
            }
            Step::Discrete { sigma } => 2.0 * (reach(tail) * sigma + 2.0) / (sigma * sigma),
        }
    }

    /// The losses rounded so that every δ(ε) can only grow; `None` if the grid would be too long.
    pub fn upper(&self, interval: f64, tail: f64) -> Option<Pair> {
        self.fits(interval, tail).then(|| match *self {
            Step::Gaussian { q, sigma } => Cells::new(q, sigma, interval, tail).upper(),
            Step::Discrete { sigma } => symmetric(discrete(sigma, interval, tail, true)),
        })
    }

    /// The losses rounded so that every δ(ε) can only fall; `None` if the grid would be too long.
    pub fn lower(&self, interval: f64, tail: f64) -> Option<Pair> {
        self.fits(interval, tail).then(|| match *self {
            Step::Gaussian { q, sigma } => Cells::new(q, sigma, interval, tail).lower(),
            Step::Discrete { sigma } => symmetric(discrete(sigma, interval, tail, false)),
        })
    }

    fn fits(&self, interval: f64, tail: f64) -> bool {
        // A range that overflowed is not below the limit either.
        self.range(tail) / interval < MAX_ATOMS
    }
}

fn symmetric(pmf: Pmf) -> Pair {
    Pair { remove: pmf.clone(), add: pmf }
}

/// Loss log(P/Q) at output `x`, for P = (1−q)·N(0,σ²) + q·N(1,σ²) and Q = N(0,σ²).
fn loss(q: f64, sigma: f64, x: f64) -> f64 {
    let t = (2.0 * x - 1.0) / (2.0 * sigma * sigma);
    if q == 1.0 {
        t
    } else if t < 30.0 {
        log1p(q * expm1(t))
    } else {
        t + log(q) + log1p((1.0 - q) / q * exp(-t))
    }
}

/// Output at which the loss is `loss`; −∞ where every loss is larger.
fn output(q: f64, sigma: f64, loss: f64) -> f64 {
    let t = if q == 1.0 {
        loss
    } else if loss < 1.0 {
        let inner = expm1(loss) / q;
        if inner <= -1.0 {
            return f64::NEG_INFINITY;
        }
        log1p(inner)
    } else {
        loss + log1p(-(1.0 - q) * exp(-loss)) - log(q)
    };
    sigma * sigma * t + 0.5
}

/// The outputs of a sampled Gaussian, cut where the loss crosses grid points.
struct Cells {
    q: f64,
    sigma: f64,
    interval: f64,
    start: i64,
    /// `edges[j]` is where the loss is `(start + j) · interval`.
    edges: Vec<Edge>,
}

#[derive(Clone, Copy)]
struct Edge {
    x: f64,
    /// Under N(0, σ²).
    zero: Cdf,
    /// Under N(1, σ²).
    one: Cdf,
}

impl Edge {
    fn at(x: f64, sigma: f64) -> Self {
        Self { x, zero: Cdf::at(x / sigma), one: Cdf::at((x - 1.0) / sigma) }
    }
}

impl Cells {
    fn new(q: f64, sigma: f64, interval: f64, tail: f64) -> Self {
        let z = reach(tail);
        let start = floor(loss(q, sigma, -z * sigma) / interval) as i64;
        let end = floor(loss(q, sigma, 1.0 + z * sigma) / interval) as i64 + 1;
        let edges = (start..=end).map(|j| Edge::at(output(q, sigma, j as f64 * interval), sigma)).collect();
        Self { q, sigma, interval, start, edges }
    }

    /// Mass under N(0, σ²) between two edges, and how much more the mixture has there.
    fn between(&self, from: &Edge, to: &Edge) -> (f64, f64) {
        let zero = from.zero.mass(&to.zero);
        (zero, self.q * (from.one.mass(&to.one) - zero))
    }

    /// Bound on the rounding error of `weight · more − ratio · zero` between two edges.
    fn excess_error(&self, from: &Edge, to: &Edge, weight: f64, ratio: f64) -> f64 {
        let zero = from.zero.mass_error(&to.zero);
        weight * self.q * (from.one.mass_error(&to.one) + zero) + ratio.abs() * zero
    }

    /// Both neighbours see the same cells, from opposite sides: a loss `l` to one is `−l` to the other.
    fn upper(&self) -> Pair {
        let cells = self.edges.len() - 1;
        let step = -expm1(-self.interval);
        let mut remove = vec![0.0; cells + 1];
        let mut add = vec![0.0; cells + 1];
        for (j, pair) in self.edges.windows(2).enumerate() {
            let (zero, more) = self.between(&pair[0], &pair[1]);
            let mixture = (zero + more).max(0.0);
            let low = (self.start + j as i64) as f64 * self.interval;
            // P − e^low · Q is (1 − e^−interval) times the mass that goes to the upper point.
            let ratio = expm1(low);
            let error = self.excess_error(&pair[0], &pair[1], 1.0, ratio) + f64::EPSILON * low.abs() * exp(low) * zero;
            let up = share_above(more - ratio * zero, error, step, mixture, zero);
            remove[j + 1] += up;
            remove[j] += mixture - up;
            // For the other neighbour the cell runs from −high to −low: P and Q change places.
            let high = low + self.interval;
            let (weight, ratio) = (exp(-high), expm1(-high));
            let error =
                self.excess_error(&pair[0], &pair[1], weight, ratio) + f64::EPSILON * high.abs() * weight * mixture;
            let up = share_above(-ratio * zero - weight * more, error, step, zero, f64::INFINITY);
            add[cells - j] += up;
            add[cells - j - 1] += zero - up;
        }
        let (first, last) = (&self.edges[0], &self.edges[cells]);
        let mixture = |zero: f64, one: f64| (1.0 - self.q) * zero + self.q * one;
        // Below the first edge, losses are smaller than the first grid point; above the last they may be anything.
        remove[0] += mixture(first.zero.below(), first.one.below());
        add[0] += last.zero.above();
        Pair {
            remove: Pmf { start: self.start, mass: remove, infinity: mixture(last.zero.above(), last.one.above()) },
            add: Pmf { start: -(self.start + cells as i64), mass: add, infinity: first.zero.below() },
        }
    }

    /// Groups from the lowest output up: group j ends where its P/Q has come up to grid point j.
    fn lower(&self) -> Pair {
        let cells = self.edges.len() - 1;
        let mut remove = vec![0.0; cells + 1];
        let mut add = vec![0.0; cells + 1];
        let mut from = Edge::at(f64::NEG_INFINITY, self.sigma);
        for j in 0..cells {
            // A group needs some outputs whose loss is below its grid point.
            if self.edges[j].x <= from.x {
                continue;
            }
            let end = self.group_end(&from, j);
            let to = end.unwrap_or(self.edges[j]);
            let (zero, more) = self.between(&from, &to);
            // Without a group, the losses up to the grid point are rounded down, each neighbour's for itself.
            let down = usize::from(end.is_none());
            remove[j.saturating_sub(down)] += (zero + more).max(0.0);
            add[cells - j] += zero;
            from = to;
        }
        let (zero, more) = self.between(&from, &Edge::at(f64::INFINITY, self.sigma));
        remove[cells - 1] += (zero + more).max(0.0);
        add[0] += zero;
        Pair {
            remove: Pmf { start: self.start, mass: remove, infinity: 0.0 },
            add: Pmf { start: -(self.start + cells as i64), mass: add, infinity: 0.0 },
        }
    }

    /// The output at which the group that begins at `from` has P/Q = e^(grid point j); `None` if there is none.
    fn group_end(&self, from: &Edge, j: usize) -> Option<Edge> {
        let ratio = expm1((self.start + j as i64) as f64 * self.interval);
        // P/Q grows with the output, so from the very lowest up it only reaches 1 over all outputs.
        if from.x == f64::NEG_INFINITY && ratio >= 0.0 {
            return None;
        }
        let excess = |to: &Edge| {
            let (zero, more) = self.between(from, to);
            more - ratio * zero
        };
        // The excess falls up to the grid point's own edge and rises from there.
        let mut low = self.edges[j].x;
        let mut ahead = j + 1;
        while excess(&self.edges[ahead]) < 0.0 {
            low = self.edges[ahead].x;
            ahead += 1;
            if ahead == self.edges.len() {
                return None;
            }
        }
        let mut high = self.edges[ahead].x;
        let mut x = if from.x.is_finite() { 2.0 * self.edges[j].x - from.x } else { high };
        let mut end = self.edges[ahead];
        for _ in 0..60 {
            if !(x > low && x < high) {
                x = 0.5 * (low + high);
            }
            end = Edge::at(x, self.sigma);
            let value = excess(&end);
            if value < 0.0 {
                low = x
            } else {
                high = x
            }
            let (zero, one) = (density(x / self.sigma), density((x - 1.0) / self.sigma));
            let slope = (self.q * (one - zero) - ratio * zero) / self.sigma;
            let change = value / slope;
            if change.abs() <= 1e-13 * self.sigma || high - low <= 1e-13 * self.sigma {
                break;
            }
            x -= change;
        }
        Some(end)
    }
}

/// Mass that goes to the upper of two grid points, of `mass` in all, given P − e^low · Q = `excess` to within `error`.
///
/// `other` is Q's mass: where it has underflowed, `excess` means nothing and everything goes up.
fn share_above(excess: f64, error: f64, step: f64, mass: f64, other: f64) -> f64 {
    let share = (excess + error) / step * (1.0 + 4.0 * f64::EPSILON);
    if other < 1e-290 || !share.is_finite() {
        return mass;
    }
    share.clamp(0.0, mass)
}

/// Exact losses of the discrete Gaussian: at integer x, (1 − 2x) / 2σ² with probability ∝ exp(−x² / 2σ²).
///
/// A unit moves one count by one, so this pair is the mechanism itself, not a bound. It is its own mirror image.
fn discrete(sigma: f64, interval: f64, tail: f64, up: bool) -> Pmf {
    let last = floor(reach(tail) * sigma) as i64 + 2;
    let variance = 2.0 * sigma * sigma;
    let weight = |x: i64| exp(-((x * x) as f64) / variance);
    let total: f64 = (-last..=last).map(weight).sum();
    let index = |x: i64| floor((1 - 2 * x) as f64 / variance / interval);
    let (start, end) = (index(last) as i64, index(-last) as i64 + 1);
    let mut mass = vec![0.0; (end - start + 1) as usize];
    let step = -expm1(-interval);
    for x in -last..=last {
        // The exponent's rounding error, and that of the total, whose terms number 2 · last + 1.
        let error = f64::EPSILON * (4.0 * (x * x) as f64 / variance + 2.0 * last as f64 + 8.0);
        let probability = weight(x) / total * if up { 1.0 + error } else { 1.0 - error };
        let loss = (1 - 2 * x) as f64 / variance;
        let low = index(x);
        let above = loss - low * interval;
        let error = 4.0 * f64::EPSILON * (loss.abs() + interval) * probability;
        let share = if up { share_above(-expm1(-above) * probability, error, step, probability, 1.0) } else { 0.0 };
        let i = (low as i64 - start) as usize;
        mass[i + 1] += share;
        mass[i] += probability - share;
    }
    // P(|X| > m) of the discrete Gaussian is at most that of the continuous one (CKS20, Proposition 25), doubled here.
    Pmf { start, mass, infinity: if up { 2.0 * tail } else { 0.0 } }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// δ(ε) of a distribution on a grid.
    fn profile(pmf: &Pmf, interval: f64, epsilon: f64) -> f64 {
        let excess = |(j, mass): (usize, &f64)| {
            let loss = (pmf.start + j as i64) as f64 * interval;
            mass * (-expm1(epsilon - loss)).max(0.0)
        };
        pmf.infinity + pmf.mass.iter().enumerate().map(excess).sum::<f64>()
    }

    /// δ(ε) of both neighbours in closed form: the loss crosses ε at one output.
    fn exact(q: f64, sigma: f64, epsilon: f64) -> (f64, f64) {
        let phi = |x: f64| Cdf::at(x / sigma);
        let remove = {
            let x = output(q, sigma, epsilon);
            q * phi(x - 1.0).above() + (1.0 - q - exp(epsilon)) * phi(x).above()
        };
        let add = {
            let x = output(q, sigma, -epsilon);
            let mixture = q * phi(x - 1.0).below() + (1.0 - q) * phi(x).below();
            phi(x).below() - exp(epsilon) * mixture
        };
        (remove.max(0.0), add.max(0.0))
    }

    #[test]
    fn roundings_enclose_the_exact_profile() {
        for (q, sigma) in [(1.0, 1.0), (0.02, 1.0), (0.5, 0.4), (1e-4, 0.5), (0.9, 5.0), (1e-5, 40.0), (0.3, 0.05)] {
            let step = Step::Gaussian { q, sigma };
            let interval = step.range(1e-15) / 300.0;
            let (upper, lower) = (step.upper(interval, 1e-20).unwrap(), step.lower(interval, 1e-20).unwrap());
            for i in 0..40 {
                let epsilon = f64::from(i) * 3.7 * interval;
                let (remove, add) = exact(q, sigma, epsilon);
                for (what, exact, upper, lower) in
                    [("remove", remove, &upper.remove, &lower.remove), ("add", add, &upper.add, &lower.add)]
                {
                    let (above, below) = (profile(upper, interval, epsilon), profile(lower, interval, epsilon));
                    let noise = 1e-14 + 1e-9 * exact;
                    assert!(above >= exact - noise, "{what} {q} {sigma} {epsilon}: {above} < {exact}");
                    assert!(below <= exact + noise, "{what} {q} {sigma} {epsilon}: {below} > {exact}");
                    // At a grid point the upper one is exact.
                }
            }
        }
    }

    #[test]
    fn masses_sum_to_one() {
        let steps = [
            Step::Gaussian { q: 1.0, sigma: 0.3 },
            Step::Gaussian { q: 1e-5, sigma: 0.3 },
            Step::Gaussian { q: 0.7, sigma: 50.0 },
            Step::Gaussian { q: 0.01, sigma: 0.02 },
            Step::Discrete { sigma: 10.0 },
            Step::Discrete { sigma: 0.3 },
            Step::Discrete { sigma: 0.01 },
        ];
        for step in steps {
            let interval = step.range(1e-15) / 1000.0;
            for pair in [step.upper(interval, 1e-18), step.lower(interval, 1e-18)].into_iter().flatten() {
                for pmf in [pair.remove, pair.add] {
                    let total: f64 = pmf.mass.iter().sum::<f64>() + pmf.infinity;
                    assert!((total - 1.0).abs() < 1e-11, "{step:?}: {total}");
                    assert!(pmf.mass.iter().all(|&m| (0.0..=1.0).contains(&m)));
                }
            }
        }
    }

    #[test]
    fn output_inverts_loss() {
        for q in [1.0, 0.5, 1e-3] {
            for x in [-1.0, 0.0, 0.5, 1.0, 4.0] {
                let back = output(q, 0.8, loss(q, 0.8, x));
                assert!((back - x).abs() < 1e-9, "{q} {x} {back}");
            }
        }
    }
}
