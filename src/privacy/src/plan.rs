//! Settings for training that meet a privacy target: the mathematics of `doppel plan`.
//!
//! Everything here is computed from what the operator declares; nothing private is read. Terms are those of Poisson
//! sampling: a step draws every unit with probability B/N, so batches vary in size and some units are never drawn.

use rayon::prelude::*;

use crate::event::Event;
use crate::{AccountingError, calibrate, epsilon};

/// Noise against signal above which a step teaches next to nothing. The signal is at most the clip norm, reached only if
/// all gradients agree; on real conversations 2.1 barely moved the loss and 0.5 lowered it clearly.
const DROWNED: f64 = 2.0;

/// Chance that some batch of the training is larger than the size that is told.
const BATCH_TAIL: f64 = 1e-6;

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
    pub vote_sigma: Option<f64>,
    /// Number of trained parameters, for the noise against the signal.
    pub parameters: u64,
}

/// What meets a goal, and what does not.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// ε of the votes alone.
    pub votes_epsilon: f64,
    /// One setting for every pair that was asked for, in that order.
    pub settings: Vec<Setting>,
}

/// One way to spend the target.
#[derive(Clone, Debug, PartialEq)]
pub struct Setting {
    /// Expected batch size B.
    pub expected_batch_size: u64,
    /// Number of steps T.
    pub steps: u64,
    /// q = B / N.
    pub sampling_probability: f64,
    /// Expected share of the units that any step draws.
    pub share_seen: f64,
    /// Batch size that no step exceeds, but for one training of a million.
    pub largest_batch: u64,
    /// The noise that meets the target; none where no noise does.
    pub noise: Option<Noise>,
    /// Why the setting is of no use, if so.
    pub infeasible: Option<String>,
}

/// The least noise that meets the target, and what it does.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Noise {
    /// Noise standard deviation ÷ clip norm.
    pub noise_multiplier: f64,
    /// ε of the training alone.
    pub training_epsilon: f64,
    /// ε of training and votes together; at most the target.
    pub total_epsilon: f64,
    /// Deviation of one coordinate of the mean gradient ÷ clip norm.
    pub per_coordinate: f64,
    /// L2 norm of a step's noise ÷ the largest L2 norm that its mean gradient can have. The same for one coordinate of a
    /// gradient that is spread evenly.
    pub to_signal: f64,
}

/// Works out a setting for every pair of expected batch size and number of steps.
///
/// Errors where a number has no meaning; a target that cannot be met is an infeasible setting, not an error.
pub fn plan(goal: &Goal, pairs: &[(u64, u64)]) -> Result<Plan, AccountingError> {
    if let Some((batch, _)) = pairs.iter().find(|(batch, _)| !(1..=goal.records).contains(batch)) {
        return Err(AccountingError(format!(
            "expected batch size: expected 1 to the {} records, found {batch}",
            goal.records
        )));
    }
    let votes: Vec<Event> =
        goal.vote_sigma.map(|noise_multiplier| Event::DiscreteGaussian { noise_multiplier }).into_iter().collect();
    let votes_epsilon = epsilon(&votes, goal.delta)?.pld;
    let settings = pairs.par_iter().map(|&(batch, steps)| setting(goal, &votes, votes_epsilon, batch, steps));
    Ok(Plan { votes_epsilon, settings: settings.collect::<Result<_, _>>()? })
}

fn setting(
    goal: &Goal,
    votes: &[Event],
    votes_epsilon: f64,
    batch: u64,
    steps: u64,
) -> Result<Setting, AccountingError> {
    let q = batch as f64 / goal.records as f64;
    let event = Event::PoissonSampledGaussian { sampling_probability: q, noise_multiplier: 1.0, steps };
    event.validate()?;
    let noise = if votes_epsilon < goal.target_epsilon { noise(goal, votes, batch, steps) } else { None };
    let infeasible = match noise {
        _ if votes_epsilon >= goal.target_epsilon => {
            Some(format!("the votes alone spend ε = {votes_epsilon:.3} of {}", goal.target_epsilon))
        }
        None => Some(format!("no noise brings ε down to {}", goal.target_epsilon)),
        Some(noise) if noise.to_signal > DROWNED => {
            Some(format!("the noise drowns the signal: it is {:.1} times as large", noise.to_signal))
        }
        Some(_) => None,
    };
    Ok(Setting {
        expected_batch_size: batch,
        steps,
        sampling_probability: q,
        share_seen: share_seen(q, steps),
        largest_batch: largest_batch(goal.records, q, steps),
        noise,
        infeasible,
    })
}

fn noise(goal: &Goal, votes: &[Event], batch: u64, steps: u64) -> Option<Noise> {
    let sampling_probability = batch as f64 / goal.records as f64;
    let training = |noise_multiplier| Event::PoissonSampledGaussian { sampling_probability, noise_multiplier, steps };
    let together = |noise_multiplier| [&[training(noise_multiplier)], votes].concat();
    let noise_multiplier = calibrate(together, goal.target_epsilon, goal.delta).ok()?;
    let per_coordinate = noise_multiplier / batch as f64;
    Some(Noise {
        noise_multiplier,
        training_epsilon: epsilon(&[training(noise_multiplier)], goal.delta).ok()?.pld,
        total_epsilon: epsilon(&together(noise_multiplier), goal.delta).ok()?.pld,
        per_coordinate,
        to_signal: per_coordinate * (goal.parameters as f64).sqrt(),
    })
}

/// 1 − (1 − q)^T.
fn share_seen(q: f64, steps: u64) -> f64 {
    -(steps as f64 * (-q).ln_1p()).exp_m1()
}

/// Bernstein's bound on a binomial, over all steps at once.
fn largest_batch(records: u64, q: f64, steps: u64) -> u64 {
    let mean = records as f64 * q;
    let depth = (steps as f64 / BATCH_TAIL).ln();
    let excess = depth / 3.0 + (depth * depth / 9.0 + 2.0 * mean * (1.0 - q) * depth).sqrt();
    ((mean + excess).ceil() as u64).min(records)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn goal() -> Goal {
        Goal { records: 180_000, target_epsilon: 2.897, delta: 5e-7, vote_sigma: Some(10.0), parameters: 1_000_000 }
    }

    fn one(goal: &Goal, batch: u64, steps: u64) -> Setting {
        plan(goal, &[(batch, steps)]).unwrap().settings.remove(0)
    }

    #[test]
    fn the_papers_setting_comes_out() {
        let plan = plan(&goal(), &[(4096, 439)]).unwrap();
        assert!((plan.votes_epsilon - 0.4125).abs() < 1e-3);
        let setting = &plan.settings[0];
        let noise = setting.noise.unwrap();
        assert!((noise.noise_multiplier - 1.1220).abs() < 1e-3, "{setting:?}");
        assert!((noise.training_epsilon - 2.860).abs() < 3e-3, "{setting:?}");
        assert!(noise.total_epsilon <= 2.897 && noise.training_epsilon < noise.total_epsilon);
        assert!((noise.to_signal - noise.noise_multiplier * 1000.0 / 4096.0).abs() < 1e-12);
        assert!((setting.share_seen - 0.99996).abs() < 1e-4);
        assert!((4096 + 300..4096 + 450).contains(&setting.largest_batch), "{setting:?}");
        assert_eq!(setting.infeasible, None);
    }

    #[test]
    fn everyone_in_every_step_leaves_nothing_to_chance() {
        let setting = one(&Goal { records: 100, target_epsilon: 50.0, ..goal() }, 100, 5);
        assert_eq!((setting.share_seen, setting.largest_batch), (1.0, 100));
    }

    #[test]
    fn what_is_infeasible_says_why() {
        let drowned = one(&Goal { parameters: 10_000_000_000, ..goal() }, 64, 10);
        assert!(drowned.infeasible.unwrap().starts_with("the noise drowns the signal"));
        let spent = one(&Goal { target_epsilon: 0.4, ..goal() }, 64, 10);
        assert_eq!(spent.infeasible.unwrap(), "the votes alone spend ε = 0.413 of 0.4");
        let hopeless = one(&Goal { target_epsilon: 1e-6, vote_sigma: None, ..goal() }, 180_000, 1 << 40);
        assert_eq!(hopeless.noise, None);
        assert!(hopeless.infeasible.unwrap().starts_with("no noise brings"));
    }

    #[test]
    fn numbers_without_meaning_are_refused() {
        for pair in [(0, 10), (180_001, 10), (64, 0)] {
            assert!(plan(&goal(), &[pair]).is_err(), "{pair:?}");
        }
        assert!(plan(&Goal { vote_sigma: Some(-1.0), ..goal() }, &[(64, 10)]).is_err());
    }
}
