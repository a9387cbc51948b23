//! `doppel plan`: which settings of training fit a privacy budget and a declared number of records.
//!
//! Pure arithmetic on declared numbers: no root is opened.

use privacy::event::Event;
use serde_json::json;
use stage::{Failure, Summary};

use crate::budget::up;
use crate::cli::PlanArgs;
use crate::table::{duration, table};

/// Noise against signal above which a step teaches next to nothing. The signal is at most `clip_norm`, reached only if
/// all gradients agree; on the demo's data 2.1 barely moved the loss and 0.5 lowered it clearly.
const DROWNED: f64 = 2.0;

/// Chance that some batch of the training is larger than the size that is told.
const BATCH_TAIL: f64 = 1e-6;

/// One setting, worked out.
#[derive(Clone, Debug)]
struct Setting {
    batch: u64,
    steps: u64,
    sampling_probability: f64,
    noise_multiplier: Result<f64, String>,
    /// ε of the training alone.
    training: f64,
}

/// Makes the table.
pub fn plan(args: &PlanArgs) -> Result<Summary, Failure> {
    check(args)?;
    let vote = (args.vote_sigma > 0.0).then_some(Event::DiscreteGaussian { noise_multiplier: args.vote_sigma });
    let votes = match &vote {
        Some(vote) => {
            privacy::epsilon(std::slice::from_ref(vote), args.delta)
                .map_err(|error| Failure::Usage(error.to_string()))?
                .pld
        }
        None => 0.0,
    };
    let settings = work_out(args, &vote);
    let rows: Vec<Vec<String>> = settings.iter().map(|setting| row(args, setting)).collect();
    let json = settings.iter().map(|setting| as_json(args, setting)).collect::<Vec<_>>();
    let headings =
        ["batch", "steps", "q", "epochs", "seen", "largest batch", "noise", "ε train", "noise/signal", "wall time", ""];
    let text = format!(
        "{} records, ε ≤ {} at δ = {:e}; the votes (σ = {}) take ε = {} alone\n\n{}\n\n{}",
        args.records,
        args.target_epsilon,
        args.delta,
        args.vote_sigma,
        up(votes),
        table(&headings, &rows, &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        LEGEND
    );
    Ok(Summary {
        text,
        json: json!({
            "records": args.records,
            "target_epsilon": args.target_epsilon,
            "delta": args.delta,
            "votes": { "sigma": args.vote_sigma, "epsilon": votes },
            "settings": json,
        }),
    })
}

const LEGEND: &str = "\
batch: expected batch size (Poisson: each unit joins a step with probability q, independently)
seen: share of units that any step is expected to see; largest batch: exceeded in one training of a million
noise: noise multiplier, for training and votes together to keep to the target; ε train: of the training alone
noise/signal: L2 norm of a step's noise over that of its mean gradient if all clipped gradients agreed; above 2 the
noise drowns the signal: raise the batch, or train fewer parameters";

fn check(args: &PlanArgs) -> Result<(), Failure> {
    let mut findings = Vec::new();
    if !(args.delta > 0.0 && args.delta < 1.0) {
        findings.push(format!("--delta {}: expected a number between 0 and 1", args.delta));
    } else if args.delta * args.records as f64 > 1.0 {
        findings.push(format!(
            "--delta {}: with {} records a δ this large lets a mechanism publish one record outright; choose below {:.1e}",
            args.delta,
            args.records,
            1.0 / args.records as f64
        ));
    }
    if !(args.target_epsilon.is_finite() && args.target_epsilon > 0.0) {
        findings.push(format!("--target-epsilon {}: expected a number above 0", args.target_epsilon));
    }
    if !(args.vote_sigma.is_finite() && args.vote_sigma >= 0.0) {
        findings.push(format!("--vote-sigma {}: expected 0 or more", args.vote_sigma));
    }
    if let Some(batch) = args.expected_batch_size.iter().find(|batch| **batch == 0 || **batch > args.records) {
        findings.push(format!("--expected-batch-size {batch}: expected 1 to the number of records"));
    }
    if args.steps.contains(&0) {
        findings.push("--steps 0: expected at least 1".to_owned());
    }
    if args.examples_per_second.is_nan() || args.examples_per_second <= 0.0 {
        findings.push(format!("--examples-per-second {}: expected a number above 0", args.examples_per_second));
    }
    if findings.is_empty() { Ok(()) } else { Err(Failure::Usage(findings.join("\n"))) }
}

/// Batches and steps to look at.
fn candidates(args: &PlanArgs) -> Vec<(u64, u64)> {
    let mut batches = args.expected_batch_size.clone();
    if batches.is_empty() {
        // Powers of two near these shares of the records; the paper's is 1/44.
        let near = |share: u64| (args.records / share).max(1).next_power_of_two().min(args.records);
        batches = [128, 44, 16, 8].map(near).to_vec();
    }
    batches.sort_unstable();
    batches.dedup();
    let mut pairs = Vec::new();
    for batch in batches {
        let mut steps = args.steps.clone();
        if steps.is_empty() {
            // One, three and ten passes over the records.
            steps = [1, 3, 10].map(|epochs: u64| (epochs * args.records).div_ceil(batch)).to_vec();
        }
        pairs.extend(steps.into_iter().map(|steps| (batch, steps)));
    }
    pairs
}

/// Calibrates every candidate, on all cores.
fn work_out(args: &PlanArgs, vote: &Option<Event>) -> Vec<Setting> {
    let pairs = candidates(args);
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let chunk = pairs.len().div_ceil(cores).max(1);
    std::thread::scope(|scope| {
        let one = |&(batch, steps): &(u64, u64)| setting(args, vote, batch, steps);
        let start = |pairs| scope.spawn(move || <[(u64, u64)]>::iter(pairs).map(one).collect::<Vec<_>>());
        let threads: Vec<_> = pairs.chunks(chunk).map(start).collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap_or_default()).collect()
    })
}

fn setting(args: &PlanArgs, vote: &Option<Event>, batch: u64, steps: u64) -> Setting {
    let sampling_probability = batch as f64 / args.records as f64;
    let training = |noise_multiplier| Event::PoissonSampledGaussian { sampling_probability, noise_multiplier, steps };
    let events = |noise| std::iter::once(training(noise)).chain(vote.clone()).collect();
    let noise_multiplier =
        privacy::calibrate(events, args.target_epsilon, args.delta).map_err(|error| error.to_string());
    let alone = noise_multiplier.as_ref().ok().and_then(|noise| privacy::epsilon(&[training(*noise)], args.delta).ok());
    Setting { batch, steps, sampling_probability, noise_multiplier, training: alone.map_or(f64::NAN, |e| e.pld) }
}

impl Setting {
    fn epochs(&self) -> f64 {
        self.sampling_probability * self.steps as f64
    }

    /// Share of the units that at least one step is expected to see.
    fn seen(&self) -> f64 {
        -(self.steps as f64 * (-self.sampling_probability).ln_1p()).exp_m1()
    }

    /// A size that no batch of the training exceeds, but with [`BATCH_TAIL`]: Bernstein's bound and a union over steps.
    fn largest_batch(&self, records: u64) -> u64 {
        let mean = self.batch as f64;
        let variance = mean * (1.0 - self.sampling_probability);
        let log = (self.steps as f64 / BATCH_TAIL).ln();
        let margin = log / 3.0 + (log * log / 9.0 + 2.0 * variance * log).sqrt();
        ((mean + margin).ceil() as u64).min(records)
    }

    /// Norm of the noise over the largest norm of the mean gradient: σ C √P ÷ B over C.
    fn noise_to_signal(&self, parameters: u64) -> Option<f64> {
        let noise = self.noise_multiplier.as_ref().ok()?;
        Some(noise * (parameters as f64).sqrt() / self.batch as f64)
    }

    fn seconds(&self, rate: f64) -> f64 {
        self.batch as f64 * self.steps as f64 / rate
    }

    /// Why the setting is of no use, if so.
    fn verdict(&self, args: &PlanArgs) -> Option<String> {
        if let Err(error) = &self.noise_multiplier {
            return Some(format!("infeasible: {error}"));
        }
        if self.noise_to_signal(args.parameters).is_some_and(|ratio| ratio > DROWNED) {
            return Some("infeasible: the noise drowns the signal".to_owned());
        }
        let hours = self.seconds(args.examples_per_second) / 3600.0;
        args.gpu_hours.filter(|most| hours > *most).map(|most| format!("infeasible: more than {most} GPU hours"))
    }
}

fn row(args: &PlanArgs, setting: &Setting) -> Vec<String> {
    let number = |value: Option<f64>, digits: usize| value.map(|value| format!("{value:.digits$}")).unwrap_or_default();
    let seconds = setting.seconds(args.examples_per_second).min(1e9);
    vec![
        setting.batch.to_string(),
        setting.steps.to_string(),
        format!("{:.6}", setting.sampling_probability),
        format!("{:.1}", setting.epochs()),
        format!("{:.1} %", 100.0 * setting.seen()),
        setting.largest_batch(args.records).to_string(),
        number(setting.noise_multiplier.as_ref().ok().copied(), 4),
        if setting.training.is_finite() { up(setting.training) } else { String::new() },
        number(setting.noise_to_signal(args.parameters), 2),
        duration(std::time::Duration::from_secs_f64(seconds)),
        setting.verdict(args).unwrap_or_else(|| "feasible".to_owned()),
    ]
}

fn as_json(args: &PlanArgs, setting: &Setting) -> serde_json::Value {
    let verdict = setting.verdict(args);
    json!({
        "expected_batch_size": setting.batch,
        "steps": setting.steps,
        "sampling_probability": setting.sampling_probability,
        "share_seen": setting.seen(),
        "largest_batch": setting.largest_batch(args.records),
        "noise_multiplier": setting.noise_multiplier.as_ref().ok(),
        "epsilon_training": setting.training.is_finite().then_some(setting.training),
        "noise_per_coordinate": setting.noise_multiplier.as_ref().ok().map(|noise| noise / setting.batch as f64),
        "noise_to_signal": setting.noise_to_signal(args.parameters),
        "seconds": setting.seconds(args.examples_per_second),
        "feasible": verdict.is_none(),
        "why_not": verdict,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampled(batch: u64, records: u64, steps: u64) -> Setting {
        let sampling_probability = batch as f64 / records as f64;
        Setting { batch, steps, sampling_probability, noise_multiplier: Ok(1.0), training: 1.0 }
    }

    #[test]
    fn poisson_terms() {
        let paper = sampled(4096, 180_000, 439);
        assert!((paper.epochs() - 9.99).abs() < 0.01);
        assert!((paper.seen() - 0.99996).abs() < 1e-4);
        let largest = paper.largest_batch(180_000);
        assert!((4096 + 300..4096 + 450).contains(&largest), "{largest}");
        // Everyone in every step: no batch can be larger.
        assert_eq!(sampled(100, 100, 5).largest_batch(100), 100);
        assert_eq!(sampled(100, 100, 5).seen(), 1.0);
    }

    #[test]
    fn noise_grows_with_parameters_and_falls_with_the_batch() {
        let ratio = |batch| sampled(batch, 10_000, 8).noise_to_signal(230_400).unwrap();
        assert!((ratio(512) - 480.0 / 512.0).abs() < 1e-12);
        assert!(ratio(1024) < ratio(512));
    }
}
