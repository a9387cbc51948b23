//! `doppel plan`: which settings of training fit a privacy budget and a declared number of records.
//!
//! Arithmetic on declared numbers, by `privacy::plan`: no root is opened.

use clap::Args;
use privacy::plan::{Goal, Noise, Setting, plan as work_out};
use serde_json::{Value, json};
use stage::{Failure, Format, Summary, Verbosity};

use crate::budget::up;
use crate::table::{duration, table};
use crate::values::{delta, positive};

/// Tell which settings fit a privacy budget and a number of records.
///
/// Nothing private is read: N is what you declare. Each row is a Poisson-sampled training followed by one vote.
#[derive(Args, Clone, Debug)]
pub struct PlanArgs {
    /// Number of privacy units in the train split, as you declare it publicly.
    #[arg(
        long,
        value_name = "N",
        allow_negative_numbers = true,
        value_parser = clap::value_parser!(u64).range(1..=1_000_000_000_000)
    )]
    pub records: u64,
    /// ε for training and votes together.
    #[arg(long, value_name = "E", allow_negative_numbers = true, value_parser = positive)]
    pub target_epsilon: f64,
    /// The δ at which ε is taken.
    #[arg(long, allow_negative_numbers = true, value_parser = delta)]
    pub delta: f64,
    /// σ of the votes' noise; 0 for no votes.
    #[arg(long, value_name = "S", allow_negative_numbers = true, default_value_t = 10.0)]
    pub vote_sigma: f64,
    /// Expected batch sizes to consider; by default a range that suits N.
    #[arg(long, value_delimiter = ',', value_name = "B,…", allow_negative_numbers = true, value_parser = count)]
    pub expected_batch_size: Vec<u64>,
    /// Numbers of steps to consider; by default a range.
    #[arg(long, value_delimiter = ',', value_name = "N,…", allow_negative_numbers = true, value_parser = count)]
    pub steps: Vec<u64>,
    /// Number of trained parameters, for the noise against the signal (rank 8 on q, k, v, o of a 7B model: 8.4 million).
    #[arg(long, value_name = "P", allow_negative_numbers = true, value_parser = count, default_value_t = 8_388_608)]
    pub parameters: u64,
    /// Examples per second of training, for the wall time: 8.5 is what SmolLM2-135M reaches to 128 tokens on two CPU cores
    /// (`make bench`).
    #[arg(long, value_name = "R", allow_negative_numbers = true, value_parser = positive, default_value_t = 8.5)]
    pub examples_per_second: f64,
    /// GPU hours at most, at the GPU's --examples-per-second; settings that need more are marked.
    #[arg(long, value_name = "H", allow_negative_numbers = true, value_parser = positive)]
    pub gpu_hours: Option<f64>,
    /// What standard output carries.
    #[arg(long, value_enum, default_value_t = Format::Text)]
    pub format: Format,
    /// Which flags shape the log.
    #[command(flatten)]
    pub verbosity: Verbosity,
}

/// A number of things that are there.
fn count(text: &str) -> Result<u64, String> {
    let value = text.parse().ok().filter(|value| *value > 0);
    value.ok_or_else(|| "expected a whole number above 0".to_owned())
}

/// Makes the table.
pub fn plan(args: &PlanArgs) -> Result<Summary, Failure> {
    check(args)?;
    let goal = Goal {
        records: args.records,
        target_epsilon: args.target_epsilon,
        delta: args.delta,
        vote_sigma: (args.vote_sigma > 0.0).then_some(args.vote_sigma),
        parameters: args.parameters,
    };
    let plan = work_out(&goal, &candidates(args)).map_err(|error| Failure::Usage(error.to_string()))?;
    let votes = plan.votes_epsilon;
    let rows: Vec<Vec<String>> = plan.settings.iter().map(|setting| row(args, setting, votes)).collect();
    let settings: Vec<Value> = plan.settings.iter().map(|setting| as_json(args, setting, votes)).collect();
    let text = format!(
        "{} records, ε ≤ {} at δ = {:e} for training and votes (σ = {}) together\n\n{}\n\n{}",
        args.records,
        args.target_epsilon,
        args.delta,
        args.vote_sigma,
        table(&HEADINGS, &rows, &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
        legend(args),
    );
    Ok(Summary {
        text,
        json: json!({
            "records": args.records,
            "target_epsilon": args.target_epsilon,
            "delta": args.delta,
            "votes": { "sigma": args.vote_sigma, "epsilon": votes },
            "examples_per_second": args.examples_per_second,
            "settings": settings,
        }),
    })
}

const HEADINGS: [&str; 12] = [
    "batch",
    "largest",
    "steps",
    "q",
    "seen",
    "noise",
    "ε train",
    "ε votes",
    "per coordinate",
    "noise/signal",
    "wall time",
    "",
];

fn legend(args: &PlanArgs) -> String {
    format!(
        "batch: expected batch size (Poisson: each unit joins a step with probability q, independently);
  largest: what no batch exceeds, but in one training of a million
seen: share of units that any step is expected to see
noise: noise multiplier, for training and votes together to keep to the target; ε of each is that of it alone
per coordinate: deviation of the noise on one coordinate of the mean gradient, in clip norms
noise/signal: the same over that coordinate's share of a mean gradient whose clipped gradients all agree; above 2 the
  noise drowns the signal: raise the batch, or train fewer parameters
wall time: at {} examples per second (--examples-per-second)",
        args.examples_per_second
    )
}

fn check(args: &PlanArgs) -> Result<(), Failure> {
    let mut findings = Vec::new();
    if args.delta * args.records as f64 > 1.0 {
        findings.push(format!(
            "--delta {}: with {} records a δ this large lets a mechanism publish one record outright; choose below {:.1e}",
            args.delta,
            args.records,
            1.0 / args.records as f64
        ));
    }
    if !(args.vote_sigma.is_finite() && args.vote_sigma >= 0.0) {
        findings.push(format!("--vote-sigma {}: expected 0 or more", args.vote_sigma));
    }
    if let Some(batch) = args.expected_batch_size.iter().find(|batch| **batch > args.records) {
        findings.push(format!("--expected-batch-size {batch}: expected 1 to the number of records"));
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

/// Why the setting is of no use, if so.
fn verdict(args: &PlanArgs, setting: &Setting) -> Option<String> {
    let hours = seconds(args, setting) / 3600.0;
    let too_long = || args.gpu_hours.filter(|most| hours > *most).map(|most| format!("more than {most} GPU hours"));
    setting.infeasible.clone().or_else(too_long).map(|why| format!("infeasible: {why}"))
}

fn seconds(args: &PlanArgs, setting: &Setting) -> f64 {
    setting.expected_batch_size as f64 * setting.steps as f64 / args.examples_per_second
}

fn row(args: &PlanArgs, setting: &Setting, votes: f64) -> Vec<String> {
    let noise = |told: &dyn Fn(&Noise) -> String| setting.noise.as_ref().map(told).unwrap_or_default();
    vec![
        setting.expected_batch_size.to_string(),
        setting.largest_batch.to_string(),
        setting.steps.to_string(),
        format!("{:.6}", setting.sampling_probability),
        format!("{:.1} %", 100.0 * setting.share_seen),
        noise(&|noise| format!("{:.4}", noise.noise_multiplier)),
        noise(&|noise| up(noise.training_epsilon)),
        up(votes),
        noise(&|noise| format!("{:.2e}", noise.per_coordinate)),
        noise(&|noise| format!("{:.2}", noise.to_signal)),
        duration(std::time::Duration::from_secs_f64(seconds(args, setting).min(1e9))),
        verdict(args, setting).unwrap_or_else(|| "feasible".to_owned()),
    ]
}

fn as_json(args: &PlanArgs, setting: &Setting, votes: f64) -> Value {
    let noise = |value: fn(&Noise) -> f64| setting.noise.as_ref().map(value);
    let verdict = verdict(args, setting);
    json!({
        "expected_batch_size": setting.expected_batch_size,
        "steps": setting.steps,
        "sampling_probability": setting.sampling_probability,
        "share_seen": setting.share_seen,
        "largest_batch": setting.largest_batch,
        "noise_multiplier": noise(|noise| noise.noise_multiplier),
        "epsilon_training": noise(|noise| noise.training_epsilon),
        "epsilon_votes": votes,
        "epsilon_together": noise(|noise| noise.total_epsilon),
        "noise_per_coordinate": noise(|noise| noise.per_coordinate),
        "noise_to_signal": noise(|noise| noise.to_signal),
        "seconds": seconds(args, setting),
        "feasible": verdict.is_none(),
        "why_not": verdict,
    })
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::{Cli, Command};

    fn planned(flags: &[&str]) -> Result<Summary, Failure> {
        let words = ["doppel", "plan", "--target-epsilon", "7.5", "--delta", "1e-5"];
        let cli = Cli::try_parse_from(words.iter().chain(flags)).unwrap();
        let Command::Plan(args) = cli.command else { panic!("{flags:?}") };
        plan(&args)
    }

    #[test]
    fn what_no_plan_can_have_is_refused_by_the_name_of_its_flag() {
        for (flag, value, expected) in [
            ("--gpu-hours", "nan", "expected a number above 0"),
            ("--gpu-hours", "-1", "expected a number above 0"),
            ("--examples-per-second", "0", "expected a number above 0"),
            ("--parameters", "0", "expected a whole number above 0"),
            ("--steps", "-1", "expected a whole number above 0"),
            ("--expected-batch-size", "64,0", "expected a whole number above 0"),
        ] {
            let words =
                ["doppel", "plan", "--target-epsilon", "8", "--delta", "1e-5", "--records", "7168", flag, value];
            let told = Cli::try_parse_from(words).unwrap_err().to_string();
            assert!(told.contains(flag) && told.contains(expected), "{told}");
        }
        let told = planned(&["--records", "7168", "--vote-sigma", "-1"]).unwrap_err().to_string();
        assert!(told.contains("--vote-sigma -1: expected 0 or more"), "{told}");
    }

    const DEMO: [&str; 8] =
        ["--records", "7168", "--parameters", "230400", "--steps", "8", "--expected-batch-size", "64,512"];

    #[test]
    fn the_table_shows_what_a_setting_costs_and_why_one_is_infeasible() {
        let summary = planned(&[&DEMO[..], &["--examples-per-second", "4"]].concat()).unwrap();
        let line = |start: &str| summary.text.lines().find(|line| line.trim_start().starts_with(start)).unwrap();
        let headings = line("batch ");
        for heading in HEADINGS {
            assert!(headings.contains(heading), "{headings}");
        }
        assert!(line("64 ").contains("infeasible: the noise drowns the signal"), "{}", summary.text);
        // 8 × 512 examples at 4 a second.
        assert!(line("512 ").contains("17 min 04 s") && line("512 ").ends_with("feasible"), "{}", summary.text);
        assert!(line("wall time").contains("at 4 examples per second"));
        let setting = &summary.json["settings"][1];
        let epsilon = |name: &str| setting[name].as_f64().unwrap();
        assert!(epsilon("epsilon_together") <= 7.5 && epsilon("epsilon_training") < epsilon("epsilon_together"));
        assert!(epsilon("epsilon_votes") > 0.3);
    }

    #[test]
    fn too_many_gpu_hours_and_votes_that_spend_all_are_infeasible() {
        let why = |flags: &[&str], setting: usize| {
            let summary = planned(&[&DEMO[..], flags].concat()).unwrap();
            summary.json["settings"][setting]["why_not"].as_str().unwrap().to_owned()
        };
        assert_eq!(why(&["--gpu-hours", "0.01"], 1), "infeasible: more than 0.01 GPU hours");
        assert!(why(&["--vote-sigma", "0.5"], 1).starts_with("infeasible: the votes alone spend ε = "));
    }
}
