//! ε and δ of composed events: PLD first, RDP as a second opinion.
//!
//! Adjacency is add-or-remove-one-unit: every answer is the worse of the two sides. Answers are upper bounds by
//! construction: losses are rounded up on a grid ([`loss`]), summed by FFT with every error bounded and added
//! ([`compose`]). The grid is refined until the answer no longer changes, or until the bounds of rounding errors, which
//! grow with the grid, outweigh what it gains: with sampling probabilities below some 1e-5 and δ below some 1e-9 that may
//! cost a part of a small ε. [`bounds`] also gives a lower bound, from the same machinery with every rounding the other
//! way, so the distance of the two is the error of both.
//!
//! - Gaussian events, and sampled ones with probability 1, are merged into a single Gaussian: precisions 1/σ² add up.
//!   Alone it is accounted in closed form (Balle & Wang 2018).
//! - The discrete Gaussian is accounted exactly: a unit moves one count by one, so its loss at integer x is
//!   (1 − 2x)/2σ² with the discrete Gaussian's own probabilities; it is not taken for a continuous one. For RDP, the
//!   continuous bound holds (Canonne, Kamath, Steinke 2020, Proposition 5).
//!
//! Start reading at [`epsilon`].

mod compose;
mod loss;
mod math;
mod normal;
mod rdp;

use compose::{Side, Sum};
use loss::Step;

use crate::event::{Event, MAX_NOISE_MULTIPLIER};

/// Change of ε, relative, at which the grid counts as fine enough.
const TOLERANCE: f64 = 1e-4;
/// Share of δ that tails cut off from single steps may take.
const TAIL_SHARE: f64 = 1e-7;
/// Finest grid: losses below it add up to nothing.
const FINEST_INTERVAL: f64 = 1e-30;
/// Grids that are tried, each at most half as coarse as the one before.
const MAX_REFINEMENTS: usize = 40;
/// Calibrated noise multipliers are multiples of 1 / this.
const CALIBRATION_STEPS: f64 = 10_000.0;

/// Invalid parameters or an ε that cannot be represented.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{0}")]
pub struct AccountingError(pub String);

/// The smallest ε at a δ, rounded up, by two accountants.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Epsilon {
    /// By privacy loss distribution.
    pub pld: f64,
    /// By Rényi DP.
    pub rdp: f64,
}

/// An ε from both sides, by privacy loss distribution.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bounds {
    /// The true ε is at most this: the same value as [`Epsilon::pld`].
    pub upper: f64,
    /// The true ε is at least this, but for rounding errors of some 1e-12, which are bounded only for the other side.
    pub lower: f64,
    /// Discretisation of the losses; 0 where the answer is a closed form.
    pub interval: f64,
}

/// ε of `events` composed, at `delta`.
pub fn epsilon(events: &[Event], delta: f64) -> Result<Epsilon, AccountingError> {
    let composition = Composition::new(events)?;
    check_delta(delta)?;
    Ok(Epsilon { pld: composition.epsilon(delta)?.0, rdp: rdp::epsilon(events, delta)? })
}

/// ε of `events` composed, at `delta`, from both sides: how far truncation, discretisation and rounding can be off.
pub fn bounds(events: &[Event], delta: f64) -> Result<Bounds, AccountingError> {
    let composition = Composition::new(events)?;
    check_delta(delta)?;
    let (upper, interval) = composition.epsilon(delta)?;
    let lower = if interval == 0.0 {
        upper * (1.0 - 1e-6)
    } else {
        composition.epsilon_on_grid(delta, interval, Side::Lower, &mut [1.0; 2]).unwrap_or(0.0)
    };
    Ok(Bounds { upper, lower: lower.min(upper), interval })
}

/// ε by PLD on a grid of the given interval, without refinement: for comparisons at equal discretisation.
pub fn epsilon_at_interval(events: &[Event], delta: f64, interval: f64) -> Result<f64, AccountingError> {
    let composition = Composition::new(events)?;
    check_delta(delta)?;
    composition
        .epsilon_on_grid(delta, interval, Side::Upper, &mut [1.0; 2])
        .ok_or_else(|| AccountingError(format!("an interval of {interval:e} is too fine for these events")))
}

/// δ of `events` composed, at `epsilon`, by PLD.
pub fn delta(events: &[Event], epsilon: f64) -> Result<f64, AccountingError> {
    let composition = Composition::new(events)?;
    if !(0.0..=1e15).contains(&epsilon) {
        return Err(AccountingError(format!("epsilon: expected a number from 0 to 1e15, found {epsilon}")));
    }
    composition.delta(events, epsilon)
}

/// Smallest noise multiplier (to 1e-4, rounded up) for which `events(noise_multiplier)` has ε ≤ `target_epsilon`.
///
/// The ε is the PLD's. What is returned was itself accounted, so the ε that follows from it never exceeds the target.
pub fn calibrate(events: impl Fn(f64) -> Vec<Event>, target_epsilon: f64, delta: f64) -> Result<f64, AccountingError> {
    if !(target_epsilon > 0.0 && target_epsilon.is_finite()) {
        return Err(AccountingError(format!("target epsilon: expected a positive number, found {target_epsilon}")));
    }
    check_delta(delta)?;
    Composition::new(&events(1.0))?;
    let noise_multiplier = |n: u64| n as f64 / CALIBRATION_STEPS;
    // An ε that cannot be represented is larger than the target.
    let holds = |n: u64| {
        Composition::new(&events(noise_multiplier(n)))
            .and_then(|composition| composition.epsilon(delta))
            .is_ok_and(|(epsilon, _)| epsilon <= target_epsilon)
    };
    let most = (MAX_NOISE_MULTIPLIER * CALIBRATION_STEPS) as u64;
    let (mut fails, mut works) = (0, CALIBRATION_STEPS as u64);
    while !holds(works) {
        fails = works;
        works *= 2;
        if works > most {
            return Err(AccountingError(format!(
                "no noise multiplier up to {MAX_NOISE_MULTIPLIER:e} brings ε down to {target_epsilon} at δ = {delta:e}\n\
                 help: lower the steps or the sampling probability, or raise the target; what other mechanisms \
                 spend counts too"
            )));
        }
    }
    while works - fails > 1 {
        // Noise multipliers matter by their ratio while the bracket is wide.
        let middle = if fails == 0 { works / 4 } else { ((fails as f64) * (works as f64)).sqrt() as u64 };
        let middle = middle.clamp(fails + 1, works - 1);
        if holds(middle) { works = middle } else { fails = middle }
    }
    Ok(noise_multiplier(works))
}

/// Values of δ that there are answers for.
pub const DELTAS: std::ops::Range<f64> = 1e-300..1.0;

fn check_delta(delta: f64) -> Result<(), AccountingError> {
    if DELTAS.contains(&delta) {
        return Ok(());
    }
    Err(AccountingError(format!("delta: expected a number from 1e-300 to below 1, found {delta}")))
}

/// Events sorted into what can be merged.
struct Composition {
    /// √ of the summed precisions of the Gaussian mechanisms: sensitivity ÷ deviation of their merger.
    mu: f64,
    /// Everything that needs a grid; does not contain the merged Gaussian.
    others: Vec<(Step, u64)>,
}

impl Composition {
    fn new(events: &[Event]) -> Result<Self, AccountingError> {
        let mut precision = 0.0;
        let mut others: Vec<(Step, u64)> = Vec::new();
        for event in events {
            event.validate()?;
            let (step, count) = match *event {
                Event::Gaussian { noise_multiplier } => (Step::Gaussian { q: 1.0, sigma: noise_multiplier }, 1),
                Event::PoissonSampledGaussian { sampling_probability, noise_multiplier, steps } => {
                    (Step::Gaussian { q: sampling_probability, sigma: noise_multiplier }, steps)
                }
                Event::DiscreteGaussian { noise_multiplier } => (Step::Discrete { sigma: noise_multiplier }, 1),
            };
            if let Step::Gaussian { q: 1.0, sigma } = step {
                precision += count as f64 / sigma / sigma;
            } else if let Some((_, total)) = others.iter_mut().find(|(other, _)| *other == step) {
                *total = total.saturating_add(count);
            } else {
                others.push((step, count));
            }
        }
        let mu = precision.sqrt();
        // Losses go up to μ²/2 and more: beyond this they lose all meaning in float64.
        if mu > 1e7 {
            return Err(AccountingError("ε of this composition exceeds 1e13\nhelp: raise the noise multiplier".into()));
        }
        Ok(Self { mu, others })
    }

    fn steps(&self) -> Vec<(Step, u64)> {
        let merged = (self.mu > 0.0).then(|| (Step::Gaussian { q: 1.0, sigma: 1.0 / self.mu }, 1));
        self.others.iter().copied().chain(merged).collect()
    }

    /// ε and the interval that gave it (0: closed form).
    fn epsilon(&self, delta: f64) -> Result<(f64, f64), AccountingError> {
        if self.others.is_empty() {
            let epsilon = if self.mu == 0.0 { 0.0 } else { normal::gaussian_epsilon(self.mu, delta) };
            return Ok((epsilon, 0.0));
        }
        if self.ever_sampled() <= delta {
            // With probability 1 − δ the unit was never drawn, and nothing can show (total variation ≤ δ).
            return Ok((0.0, 0.0));
        }
        let mut lambdas = [1.0; 2];
        self.refine(delta, |interval| self.epsilon_on_grid(delta, interval, Side::Upper, &mut lambdas))
    }

    /// A bound on the probability that a unit is drawn at all.
    fn ever_sampled(&self) -> f64 {
        let sampled = |(step, count): &(Step, u64)| match *step {
            Step::Gaussian { q, .. } => q * *count as f64,
            Step::Discrete { .. } => 1.0,
        };
        if self.mu > 0.0 { 1.0 } else { self.others.iter().map(sampled).sum() }
    }

    fn delta(&self, events: &[Event], epsilon: f64) -> Result<f64, AccountingError> {
        if self.others.is_empty() {
            let log_delta =
                if self.mu == 0.0 { f64::NEG_INFINITY } else { normal::gaussian_log_delta(self.mu, epsilon) };
            return Ok((log_delta.exp() * (1.0 + 1e-12)).min(1.0));
        }
        // Tails must be far below δ; RDP says where that is, to a few orders of magnitude.
        let guess = (rdp::log_delta(events, epsilon) - 25.0).exp().max(1e-280);
        let mut lambdas = [1.0; 2];
        let log_delta = |interval: f64| {
            let [remove, add] = self.sums(guess, interval, Side::Upper)?;
            let [first, second] = &mut lambdas;
            let remove = remove.log_delta(epsilon, Side::Upper, first)?;
            let add = add.log_delta(epsilon, Side::Upper, second)?;
            Some(remove.max(add))
        };
        // log δ moves like an ε, so the same stopping rule serves.
        Ok(self.refine(guess, log_delta)?.0.exp().min(1.0))
    }

    /// Halves the interval, or more, until the answer stands still. Every answer is an upper bound: the least is the best.
    fn refine(&self, delta: f64, mut answer: impl FnMut(f64) -> Option<f64>) -> Result<(f64, f64), AccountingError> {
        let mut interval = self.first_interval(delta);
        let mut best: Option<(f64, f64)> = None;
        let mut error = f64::INFINITY;
        let mut finest_factor = 1.0 / 16.0;
        for _ in 0..MAX_REFINEMENTS {
            let Some(found) = answer(interval).filter(|found| found.is_finite()) else { break };
            if found == 0.0 {
                return Ok((found, interval));
            }
            let tolerance = TOLERANCE * found.abs() + 1e-7;
            let mut factor: f64 = 0.25;
            if let Some((least, coarser)) = best {
                let ratio = coarser / interval;
                // The error is of second order in the interval once that is small; taken as 1.5 to be careful.
                error = (least - found).abs() / (ratio.powf(1.5) - 1.0);
                if error <= tolerance {
                    return Ok((found, interval));
                }
                if found > least {
                    // Rounding errors have the upper hand; grids that were passed over may still be better.
                    if ratio <= 2.0 {
                        return Ok((least, coarser));
                    }
                    finest_factor = 0.5;
                    interval = 0.5 * coarser;
                    continue;
                }
                factor = (tolerance / error).sqrt().clamp(finest_factor, 0.5);
            }
            best = Some((found, interval));
            // An answer below the tolerance's absolute part is small enough to be anything below it.
            if found.abs() <= 1e-7 {
                error = 0.0;
                break;
            }
            interval *= factor;
        }
        // A finer grid would not fit; what there is holds, if more loosely.
        best.filter(|(found, _)| error <= 0.01 * found.abs() + 1e-3).ok_or_else(|| {
            AccountingError(
                "ε of this composition cannot be computed to within a per cent: its losses span too many \
                 magnitudes, or there are too many steps\nhelp: raise the noise multiplier"
                    .into(),
            )
        })
    }

    /// A coarse grid to begin with: 64 cells over the losses of the step that spreads most.
    fn first_interval(&self, delta: f64) -> f64 {
        let tail = self.tail(delta);
        let steps = self.steps();
        let longest = steps.iter().map(|(step, _)| step.range(tail)).fold(0.0, f64::max);
        (longest / 64.0).max(FINEST_INTERVAL)
    }

    fn tail(&self, delta: f64) -> f64 {
        let count: f64 = self.steps().iter().map(|(_, count)| *count as f64).sum();
        (delta * TAIL_SHARE / count).max(1e-300)
    }

    fn sums(&self, delta: f64, interval: f64, side: Side) -> Option<[Sum; 2]> {
        if !(FINEST_INTERVAL..=1e30).contains(&interval) {
            return None;
        }
        let tail = self.tail(delta);
        let (mut remove, mut add) = (Vec::new(), Vec::new());
        for (step, count) in self.steps() {
            let pair = match side {
                Side::Upper => step.upper(interval, tail)?,
                Side::Lower => step.lower(interval, tail)?,
            };
            remove.push((pair.remove, count));
            add.push((pair.add, count));
        }
        Some([Sum::new(interval, remove), Sum::new(interval, add)])
    }

    fn epsilon_on_grid(&self, delta: f64, interval: f64, side: Side, lambdas: &mut [f64; 2]) -> Option<f64> {
        let [remove, add] = self.sums(delta, interval, side)?;
        let [first, second] = lambdas;
        let (remove, add) = rayon::join(|| remove.epsilon(delta, side, first), || add.epsilon(delta, side, second));
        Some(remove?.max(add?))
    }
}

#[cfg(test)]
mod tests;
