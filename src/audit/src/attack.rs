//! The two attacks: guess from each step by itself, or from a whole run.

use privacy::keyed::{Context, NoiseKey};
use stage::Failure;

use crate::bound::{self, Hits};
use crate::canary::Directions;
use crate::parts::Parts;
use crate::report::Finding;
use crate::target::Target;

/// Smallest share of scores behind a threshold that is tried, as a power of ½.
const SMALLEST_TAIL: i32 = 12;

/// How canaries are put in and how sure a bound must be.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Attack {
    /// The δ of claim and bound.
    pub delta: f64,
    /// Probability that a bound is right.
    pub confidence: f64,
    /// Of coins, sampling and noise.
    pub seed: u64,
}

impl Attack {
    /// The key of this audit's randomness. It is as public as the seed: no record is behind this noise.
    pub fn key(&self) -> NoiseKey {
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&self.seed.to_le_bytes());
        NoiseKey::new(bytes)
    }

    /// A fair coin for each canary; `round` sets tosses apart.
    fn coins(&self, canaries: usize, round: u64) -> Vec<bool> {
        let hasher = self.key().hasher(&Context::new("audit/coins").field("round", &round.to_le_bytes()));
        (0..canaries as u64).map(|canary| hasher.hash(&canary.to_le_bytes()) & 1 == 1).collect()
    }

    /// Tosses new coins in every step and bounds the ε of one step (Nasr et al. 2023, section 4): canaries in and canaries
    /// out differ in how often their scores pass a threshold.
    ///
    /// Every score counts as a trial by itself, which is sound for [`Directions`] alone: their noise and their sampling
    /// are independent. The threshold is chosen on the even canaries and the rates are counted on the odd ones.
    pub fn per_step(&self, target: &mut Directions) -> Result<Finding, Failure> {
        let (mut choose, mut count) = (Scores::default(), Scores::default());
        for step in 0..target.parts().accounted.steps() {
            let present = self.coins(target.canaries(), step + 1);
            let scores = target.step(step, &present)?;
            for (canary, (score, present)) in scores.into_iter().zip(present).enumerate() {
                let half = if canary % 2 == 0 { &mut choose } else { &mut count };
                half.push(score, present);
            }
        }
        choose.sort();
        count.sort();
        let threshold = choose.best(self);
        let (present, absent) = count.hits(threshold);
        Ok(Finding {
            audit: "each step",
            claimed_epsilon: target.parts().claimed_per_step(self.delta).map_err(crate::accounting)?,
            lower_bound: self.rates(present, absent),
            canaries: target.canaries() as u64 * target.parts().accounted.steps(),
            guesses: present.passed + absent.passed,
            right: present.passed.max(absent.passed),
        })
    }

    /// Tosses one coin per canary for the whole run, guesses those that look most and least present, and bounds the ε of
    /// the run (Steinke, Nasr, Jagielski 2023, Algorithm 1 and Theorem 5.2). Canaries may influence one another.
    ///
    /// How many are guessed is fixed beforehand, as the theorem demands: 4√m of m, half of them in and half out. That is
    /// few enough to be the clear ones, and enough to prove an ε of several.
    pub fn one_run(&self, audit: &'static str, target: &mut dyn Target) -> Result<Finding, Failure> {
        let canaries = target.canaries();
        let present = self.coins(canaries, 0);
        let mut evidence = vec![0.0; canaries];
        for step in 0..target.parts().accounted.steps() {
            for (sum, score) in evidence.iter_mut().zip(target.step(step, &present)?) {
                *sum += log_likelihood_ratio(target.parts(), score);
            }
        }
        let mut order: Vec<usize> = (0..canaries).collect();
        order.sort_by(|&a, &b| evidence[a].total_cmp(&evidence[b]));
        let side = (2.0 * (canaries as f64).sqrt()) as usize;
        let out = order[..side].iter().filter(|&&canary| !present[canary]).count();
        let inside = order[canaries - side..].iter().filter(|&&canary| present[canary]).count();
        let (guesses, right) = (2 * side as u64, (out + inside) as u64);
        Ok(Finding {
            audit,
            claimed_epsilon: target.parts().claimed(self.delta).map_err(crate::accounting)?,
            lower_bound: bound::one_run(canaries as u64, guesses, right, self.delta, self.confidence),
            canaries: canaries as u64,
            guesses,
            right,
        })
    }

    /// Either side may be the likelier one: high scores speak for presence, low ones against it.
    fn rates(&self, present: Hits, absent: Hits) -> f64 {
        let (often, seldom) = if present.rate() >= absent.rate() { (present, absent) } else { (absent, present) };
        bound::one_step(often, seldom, self.delta, self.confidence)
    }
}

/// ln of how much likelier `score` is in a step whose data had the canary (Neyman and Pearson: no score tells more).
fn log_likelihood_ratio(parts: &Parts, score: f64) -> f64 {
    let (q, sigma) = (parts.accounted.sampling_probability(), parts.accounted.noise_multiplier());
    let (joined, not) = (q.ln() + (2.0 * score - 1.0) / (2.0 * sigma * sigma), (-q).ln_1p());
    joined.max(not) + (-(joined - not).abs()).exp().ln_1p()
}

/// Which scores pass.
#[derive(Clone, Copy, Debug)]
enum Threshold {
    AtLeast(f64),
    Below(f64),
}

/// Scores by the coin that was tossed.
#[derive(Default)]
struct Scores {
    present: Vec<f64>,
    absent: Vec<f64>,
}

impl Scores {
    fn push(&mut self, score: f64, present: bool) {
        if present { self.present.push(score) } else { self.absent.push(score) }
    }

    fn sort(&mut self) {
        self.present.sort_by(f64::total_cmp);
        self.absent.sort_by(f64::total_cmp);
    }

    fn hits(&self, threshold: Threshold) -> (Hits, Hits) {
        let hits = |scores: &[f64]| {
            let trials = scores.len() as u64;
            let below = |limit: f64| scores.partition_point(|&score| score < limit) as u64;
            match threshold {
                Threshold::AtLeast(limit) => Hits { passed: trials - below(limit), trials },
                Threshold::Below(limit) => Hits { passed: below(limit), trials },
            }
        };
        (hits(&self.present), hits(&self.absent))
    }

    /// The threshold that proves most, of those that the most or the least telling share of scores pass.
    fn best(&self, attack: &Attack) -> Threshold {
        let quantile = |scores: &[f64], share: f64| {
            let place = (share * scores.len() as f64) as usize;
            scores.get(place.min(scores.len().saturating_sub(1))).copied().unwrap_or_default()
        };
        let shares = (2..=2 * SMALLEST_TAIL).map(|half| 2f64.powf(-0.5 * f64::from(half)));
        let thresholds = shares.flat_map(|share| {
            [&self.present, &self.absent].map(|scores| {
                [Threshold::AtLeast(quantile(scores, 1.0 - share)), Threshold::Below(quantile(scores, share))]
            })
        });
        let proves = |threshold: &Threshold| {
            let (present, absent) = self.hits(*threshold);
            attack.rates(present, absent)
        };
        let best = thresholds.flatten().max_by(|a, b| proves(a).total_cmp(&proves(b)));
        best.unwrap_or(Threshold::AtLeast(0.5))
    }
}
