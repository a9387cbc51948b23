//! Settings for training that meet a privacy target: what `doppel plan` prints.
//!
//! Everything here is computed from what the operator declares; nothing private is read. Terms are those of Poisson
//! sampling: a step draws every unit with probability B/N, so batches vary in size and some units are never drawn.

use crate::event::Event;
use crate::{AccountingError, calibrate, epsilon};

/// What the operator declares.
#[derive(Clone, Debug, PartialEq)]
pub struct Goal {
    /// Declared public number of units, N.
    pub records: u64,
    /// Target ε for training and votes together.
    pub target_epsilon: f64,
    /// δ.
    pub delta: f64,
    /// Noise parameter σ of the votes; `None` where there are none.
    pub votes_sigma: Option<f64>,
    /// Number of trained parameters, for the noise against the signal.
    pub parameters: u64,
}

/// One feasible or infeasible way to spend the target.
#[derive(Clone, Debug, PartialEq)]
pub struct Setting {
    /// Expected batch size B.
    pub expected_batch_size: u64,
    /// Number of steps T.
    pub steps: u64,
    /// q = B / N.
    pub sampling_probability: f64,
    /// Smallest noise multiplier that meets the target.
    pub noise_multiplier: f64,
    /// ε of training alone.
    pub training_epsilon: f64,
    /// ε of training and votes together; at most the target.
    pub total_epsilon: f64,
    /// Expected share of units that any step draws: 1 − (1 − q)^T.
    pub share_seen: f64,
    /// Batch size that no step exceeds, except with probability 1e-3 over all steps.
    pub largest_batch: u64,
    /// Noise per coordinate of the mean gradient, in units of the clip norm: noise_multiplier / B.
    pub noise_per_coordinate: f64,
    /// L2 norm of the noise ÷ the largest L2 norm that the signal can have: noise_multiplier · √parameters / B.
    pub noise_to_signal: f64,
    /// Why this setting is not worth running, if it is not.
    pub infeasible: Option<String>,
}

/// Noise this many times as long as the longest possible signal drowns it: a sum of T steps gains only √T.
const DROWNED: f64 = 1.0;

/// Settings for `goal`, one for each pair of expected batch size and number of steps.
///
/// Errors when the votes alone exceed the target, or a number makes no sense.
pub fn plan(goal: &Goal, batches: &[u64], steps: &[u64]) -> Result<Vec<Setting>, AccountingError> {
    if goal.records == 0 {
        return Err(AccountingError("records: expected at least 1, found 0".into()));
    }
    let votes: Vec<Event> =
        goal.votes_sigma.map(|noise_multiplier| Event::DiscreteGaussian { noise_multiplier }).into_iter().collect();
    let spent = epsilon(&votes, goal.delta)?.pld;
    if spent >= goal.target_epsilon {
        return Err(AccountingError(format!(
            "infeasible: the votes alone spend ε = {spent:.3} of {:.3}\nhelp: raise --sigma or the target",
            goal.target_epsilon
        )));
    }
    let pairs = batches.iter().flat_map(|&batch| steps.iter().map(move |&steps| (batch, steps)));
    pairs.filter(|(batch, _)| (1..=goal.records).contains(batch)).map(|(b, t)| setting(goal, &votes, b, t)).collect()
}

fn setting(goal: &Goal, votes: &[Event], batch: u64, steps: u64) -> Result<Setting, AccountingError> {
    let q = batch as f64 / goal.records as f64;
    let training =
        |noise_multiplier| Event::PoissonSampledGaussian { sampling_probability: q, noise_multiplier, steps };
    let events = |noise_multiplier| [&[training(noise_multiplier)], votes].concat();
    let noise_multiplier = calibrate(events, goal.target_epsilon, goal.delta)?;
    let noise_per_coordinate = noise_multiplier / batch as f64;
    let noise_to_signal = noise_per_coordinate * (goal.parameters as f64).sqrt() / (steps as f64).sqrt();
    Ok(Setting {
        expected_batch_size: batch,
        steps,
        sampling_probability: q,
        noise_multiplier,
        training_epsilon: epsilon(&[training(noise_multiplier)], goal.delta)?.pld,
        total_epsilon: epsilon(&events(noise_multiplier), goal.delta)?.pld,
        share_seen: -(steps as f64 * (-q).ln_1p()).exp_m1(),
        largest_batch: largest_batch(goal.records, q, steps),
        noise_per_coordinate,
        noise_to_signal,
        infeasible: (noise_to_signal > DROWNED).then(|| {
            format!(
                "after {steps} steps the noise is {noise_to_signal:.1} times as long as the longest possible signal: \
                 train fewer parameters, or raise the batch, the steps or the target"
            )
        }),
    })
}

/// Bernstein's bound on a binomial, over all steps at once.
fn largest_batch(records: u64, q: f64, steps: u64) -> u64 {
    let mean = records as f64 * q;
    let depth = (steps as f64 / 1e-3).ln();
    let excess = depth / 3.0 + (depth * depth / 9.0 + 2.0 * mean * (1.0 - q) * depth).sqrt();
    ((mean + excess).ceil() as u64).min(records)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn goal() -> Goal {
        Goal { records: 180_000, target_epsilon: 2.897, delta: 5e-7, votes_sigma: Some(10.0), parameters: 1_000_000 }
    }

    #[test]
    fn the_papers_setting_comes_out() {
        let settings = plan(&goal(), &[4096], &[439]).unwrap();
        let setting = &settings[0];
        assert!((setting.noise_multiplier - 1.1220).abs() < 1e-3, "{setting:?}");
        assert!(setting.total_epsilon <= 2.897 && setting.training_epsilon < setting.total_epsilon);
        assert!((setting.share_seen - 0.99996).abs() < 1e-4);
        assert!(setting.largest_batch > 4300 && setting.largest_batch < 4700, "{setting:?}");
    }

    #[test]
    fn drowned_signals_and_spent_targets_are_said_to_be_infeasible() {
        let drowned = plan(&Goal { parameters: 10_000_000_000, ..goal() }, &[64], &[10]).unwrap();
        assert!(drowned[0].infeasible.is_some());
        let error = plan(&Goal { target_epsilon: 0.4, ..goal() }, &[64], &[10]).unwrap_err();
        assert!(error.0.contains("votes alone"));
        // A batch larger than the corpus is left out.
        assert!(plan(&Goal { records: 10, ..goal() }, &[64], &[10]).unwrap().is_empty());
    }
}
