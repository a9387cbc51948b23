//! What is typed, and the mechanism that it means.

use clap::Parser;
use privacy::training::TrainingMechanism;
use stage::{Failure, Format, Verbosity};

/// Attack the training mechanism with canaries, and state the ε that the attack proves.
///
/// Two audits run on the product's own sampler, clipping and noise with made-up gradients: each step by itself, and all
/// steps as one training run (Steinke, Nasr, Jagielski 2023). With --model, a third trains that model.
/// A lower bound above the claimed ε would prove a fault; one below it does not prove the guarantee. Reads no records,
/// needs no root, spends nothing. The defaults take seconds; an audit sees most where the claimed ε is small.
///
/// Exit codes: 0 no bound exceeds its claim; 1 one does, or another bug; 2 wrong usage; 3 the model is missing or
/// malformed; 5 storage or network, safe to retry.
#[derive(Parser, Clone, Debug)]
#[command(name = "doppel-audit", version)]
pub struct Args {
    /// Chance that a unit joins a step.
    #[arg(long, default_value_t = 0.1)]
    pub sampling_probability: f64,
    /// Noise standard deviation divided by the clip norm.
    #[arg(long, default_value_t = 2.0)]
    pub noise_multiplier: f64,
    /// Number of steps.
    #[arg(long, default_value_t = 40, value_parser = clap::value_parser!(u64).range(1..=100_000))]
    pub steps: u64,
    /// The δ of claim and bound.
    #[arg(long, default_value_t = 1e-5)]
    pub delta: f64,
    /// Probability that a bound is right; each bound by itself.
    #[arg(long, default_value_t = 0.95)]
    pub confidence: f64,
    /// Number of canary gradients, each in the data by a fair coin.
    #[arg(long, default_value_t = 4000, value_parser = count)]
    pub canaries: usize,
    /// Also audit the training of this model, with canary gradients beside those of texts: URL or path of a Hugging Face folder or a GGUF file.
    #[arg(long, value_name = "URL")]
    pub model: Option<String>,
    /// Seed of everything that is drawn: the same seed gives the same answer.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// What standard output carries.
    #[arg(long, value_enum, default_value_t = Format::Text)]
    pub format: Format,
    /// Which flags shape the log.
    #[command(flatten)]
    pub verbosity: Verbosity,
}

/// Fewer canaries than 64 prove nothing at any ε.
fn count(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(count) if (64..=1_000_000).contains(&count) => Ok(count),
        _ => Err("expected a number from 64 to 1000000".into()),
    }
}

/// Scores that are held at a time, one of each canary in each step: some gigabytes.
const MAX_SCORES: u64 = 200_000_000;

impl Args {
    /// The mechanism to audit. The scale of its gradients does not matter, so the clip norm is 1.
    pub fn mechanism(&self) -> Result<TrainingMechanism, Failure> {
        if !(self.delta > 0.0 && self.delta < 1.0) {
            return Err(Failure::Usage(format!("--delta {}: expected a number between 0 and 1", self.delta)));
        }
        if !(0.5..1.0).contains(&self.confidence) {
            return Err(Failure::Usage(format!(
                "--confidence {}: expected a number from 0.5 to below 1, such as 0.95",
                self.confidence
            )));
        }
        let scores = self.canaries as u64 * self.steps;
        if scores > MAX_SCORES {
            return Err(Failure::Usage(format!(
                "--canaries {} in each of --steps {}: {scores} scores, expected at most {MAX_SCORES}\n\
                 help: lower either",
                self.canaries, self.steps
            )));
        }
        let batch = (self.sampling_probability * self.canaries as f64 / 2.0).max(1.0);
        TrainingMechanism::new(self.sampling_probability, self.noise_multiplier, self.steps, 1.0, batch)
            .map_err(|error| Failure::Usage(error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        use clap::CommandFactory;
        Args::command().debug_assert();
    }

    #[test]
    fn what_cannot_be_audited_is_refused() {
        for wrong in [
            ["--delta", "0"],
            ["--delta", "nan"],
            ["--confidence", "1"],
            ["--sampling-probability", "1.1"],
            ["--noise-multiplier", "0"],
        ] {
            let args = Args::parse_from(["doppel-audit", wrong[0], wrong[1]]);
            assert!(matches!(args.mechanism(), Err(Failure::Usage(_))), "{wrong:?}");
        }
        let many = Args::parse_from(["doppel-audit", "--canaries", "1000000", "--steps", "100000"]);
        let told = many.mechanism().unwrap_err().to_string();
        assert!(told.contains("--canaries 1000000 in each of --steps 100000"), "{told}");
        assert!(Args::try_parse_from(["doppel-audit", "--canaries", "3"]).is_err());
    }
}
