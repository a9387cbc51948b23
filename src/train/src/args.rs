//! Flags, and the configuration they mean.

use std::ops::RangeInclusive;

use clap::{ArgGroup, Parser, ValueEnum};
use lm::adapter::{LoraConfig, Target};
use lm::device::{DeviceChoice, DtypeChoice};
use lm::template::Template;
use privacy::AccountingError;
use privacy::accounting::DELTAS;
use privacy::event::Event;
use privacy::training::{TrainingMechanism, calibrated_noise, steps_of};
use serde::Serialize;
use stage::Failure;

/// Largest rank that an adapter may have.
const MAX_RANK: i64 = 4096;
/// Learning rates. AdamW moves each parameter by about the rate, whatever its gradient: less is lost in float32.
const LEARNING_RATES: RangeInclusive<f64> = 1e-10..=10.0;
/// Values of alpha with which float32 bears the adapter's product and its gradient.
const ALPHAS: RangeInclusive<f64> = 1e-6..=1e6;

/// Fine-tune a language model on the private corpus with DP-Adam and LoRA.
///
/// Reads the train split of a corpus and a base model; writes a PEFT adapter to the release zone, checkpoints and
/// validation losses to the private zone. The privacy cost is reserved in the corpus's ledger before anything is
/// computed from a record, but for the digest that the reservation is bound to and for whether there are as many units
/// as a batch expects. Killed anywhere, it goes on where it was when run again, and spends nothing twice.
///
/// Exit codes: 0 done or already done; 1 a bug; 2 wrong usage; 3 an input is missing or malformed; 4 refused by the
/// privacy budget; 5 storage or network, safe to retry.
#[derive(Parser, Clone, Debug)]
#[command(
    name = "doppel-train",
    version,
    allow_negative_numbers = true,
    group(ArgGroup::new("sampling").required(true).args(["records", "sampling_probability"])),
    group(ArgGroup::new("length").required(true).args(["steps", "epochs"])),
    group(ArgGroup::new("noise").required(true).args(["noise_multiplier", "target_epsilon", "no_dp"]))
)]
pub struct Args {
    /// Flags that every stage shares.
    #[command(flatten)]
    pub common: stage::Common,
    /// Name of the corpus that partition wrote.
    #[arg(long)]
    pub corpus: String,
    /// Base model: URL or path of a Hugging Face folder or a GGUF file.
    #[arg(long, value_hint = stage::PLACE)]
    pub model: String,
    /// LoRA rank r, at most 4096.
    #[arg(long, default_value_t = 8)]
    pub rank: i64,
    /// LoRA alpha, from 1e-6 to 1e6; the adapter's product is scaled by alpha / rank.
    #[arg(long, default_value_t = 16.0)]
    pub alpha: f64,
    /// Projections to adapt, of q, k, v, o.
    #[arg(long, value_delimiter = ',', default_value = "q,k,v,o")]
    pub targets: Vec<Target>,
    /// Dropout on the adapter's input while training.
    #[arg(long, default_value_t = 0.0)]
    pub dropout: f64,
    /// Peak learning rate of AdamW, from 1e-10 to 10.
    #[arg(long, default_value_t = 1e-3)]
    pub learning_rate: f64,
    /// AdamW's decoupled weight decay; the learning rate times it is less than 1.
    #[arg(long, default_value_t = 0.0)]
    pub weight_decay: f64,
    /// Learning-rate schedule after warm-up.
    #[arg(long, value_enum, default_value_t = Schedule::Constant)]
    pub schedule: Schedule,
    /// Steps over which the learning rate rises linearly from 0.
    #[arg(long, default_value_t = 0)]
    pub warmup_steps: u64,
    /// L2 bound on one unit's summed gradient.
    #[arg(long, default_value_t = 0.5)]
    pub clip_norm: f64,
    /// Public constant that divides the noised sum; with --records it also sets the sampling probability.
    #[arg(long)]
    pub expected_batch_size: f64,
    /// Number of privacy units in the train split, as you declare it publicly; nothing private is counted for it.
    /// The sampling probability is the expected batch size divided by this.
    #[arg(long)]
    pub records: Option<u64>,
    /// Chance that a unit joins a step, instead of --records.
    #[arg(long)]
    pub sampling_probability: Option<f64>,
    /// Number of steps.
    #[arg(long)]
    pub steps: Option<u64>,
    /// Expected passes over the units, instead of --steps: steps = epochs / sampling probability, rounded up.
    #[arg(long)]
    pub epochs: Option<f64>,
    /// Noise standard deviation divided by the clip norm.
    #[arg(long)]
    pub noise_multiplier: Option<f64>,
    /// Calibrate the noise to this ε (never exceeded) at --delta, instead of --noise-multiplier.
    #[arg(long, requires = "delta")]
    pub target_epsilon: Option<f64>,
    /// The δ of --target-epsilon, and of the ε in the manifest; the ledger's budget has its own.
    #[arg(long)]
    pub delta: Option<f64>,
    /// Leave room in --target-epsilon for a later vote with this σ.
    #[arg(long, requires = "target_epsilon")]
    pub vote_sigma: Option<f64>,
    /// Longest example in tokens, prompt and end token included; longer ones are cut. At most the model's positions.
    #[arg(long, default_value_t = 1024)]
    pub block_length: usize,
    /// What stands before an instruction: nothing (as in the paper), the chat template's user turn, or all of it.
    #[arg(long, value_enum, default_value_t = Template::None)]
    pub template: Template,
    /// Precision of weights and activations; the adapter and its gradients are always float32.
    ///
    /// A run goes on in the precision and on the kind of device it began with: name both where machines differ.
    #[arg(long, value_enum, default_value_t = DtypeChoice::Auto)]
    pub dtype: DtypeChoice,
    /// Where to compute.
    #[arg(long, value_enum, default_value_t = DeviceChoice::Auto)]
    pub device: DeviceChoice,
    /// Padded tokens per micro-batch: bounds memory and does not change the result, to rounding. By default 2048 on CPU, and
    /// on a GPU 8192, or fewer where a large model leaves less room.
    #[arg(long)]
    pub micro_batch_tokens: Option<usize>,
    /// Steps between checkpoints.
    #[arg(long, default_value_t = 1)]
    pub checkpoint_every: u64,
    /// Public seed of the adapter's initial value and of dropout.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Train without noise and clipping, for a baseline: everything stays in the private zone.
    #[arg(long)]
    pub no_dp: bool,
}

/// Learning-rate schedule.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// The peak throughout.
    Constant,
    /// Down to 0 in a line.
    Linear,
    /// Down to 0 in half a cosine.
    Cosine,
}

/// What was asked for, checked: everything here changes the result and binds the run id.
#[derive(Clone, Debug, Serialize)]
pub struct Config {
    /// Corpus name.
    pub corpus: String,
    /// LoRA rank.
    pub rank: i64,
    /// LoRA alpha.
    pub alpha: f64,
    /// Adapted projections.
    pub targets: Vec<Target>,
    /// LoRA dropout.
    pub dropout: f64,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Weight decay.
    pub weight_decay: f64,
    /// Schedule.
    pub schedule: Schedule,
    /// Warm-up steps.
    pub warmup_steps: u64,
    /// The mechanism: event, sampler and noise in one value.
    pub mechanism: Mechanism,
    /// Longest example, tokens.
    pub block_length: usize,
    /// Prompt template.
    pub template: Template,
    /// Precision as asked for.
    pub dtype: DtypeChoice,
    /// Public seed.
    pub seed: u64,
}

/// Private training, or a baseline that never leaves the private zone.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Mechanism {
    /// DP training.
    Private(TrainingMechanism),
    /// No clipping, no noise.
    Baseline {
        /// Chance that a unit joins a step.
        sampling_probability: f64,
        /// Number of steps.
        steps: u64,
        /// Divides the sum.
        expected_batch_size: f64,
    },
}

impl Mechanism {
    /// Name of the stage in claims, ledger, folders and noise contexts: a baseline shares none with private training.
    pub fn stage(&self) -> &'static str {
        match self {
            Mechanism::Private(_) => "train",
            Mechanism::Baseline { .. } => "train-baseline",
        }
    }

    /// Number of steps.
    pub fn steps(&self) -> u64 {
        match self {
            Mechanism::Private(mechanism) => mechanism.steps(),
            Mechanism::Baseline { steps, .. } => *steps,
        }
    }

    /// What draws and clips. A baseline draws its batches as the private run does; it has no use for the rest.
    pub fn rules(&self) -> Result<TrainingMechanism, AccountingError> {
        match self {
            Mechanism::Private(mechanism) => Ok(mechanism.clone()),
            Mechanism::Baseline { sampling_probability, steps, expected_batch_size } => {
                TrainingMechanism::new(*sampling_probability, 1.0, *steps, 1.0, *expected_batch_size)
            }
        }
    }
}

impl Args {
    /// Checks the flags and works out what follows from them; all findings are reported together.
    pub fn config(&self) -> Result<Config, Failure> {
        let findings = self.findings();
        if !findings.is_empty() {
            return Err(Failure::Usage(findings.join("\n")));
        }
        let sampling_probability = self.sampling_probability();
        let steps = self.steps.unwrap_or_else(|| steps_of(self.epochs.unwrap_or_default(), sampling_probability));
        let mut targets = self.targets.clone();
        targets.sort();
        targets.dedup();
        Ok(Config {
            corpus: self.corpus.clone(),
            rank: self.rank,
            alpha: self.alpha,
            targets,
            dropout: self.dropout,
            learning_rate: self.learning_rate,
            weight_decay: self.weight_decay,
            schedule: self.schedule,
            warmup_steps: self.warmup_steps,
            mechanism: self.mechanism(sampling_probability, steps)?,
            block_length: self.block_length,
            template: self.template,
            dtype: self.dtype,
            seed: self.seed,
        })
    }

    fn sampling_probability(&self) -> f64 {
        match (self.sampling_probability, self.records) {
            (Some(probability), _) => probability,
            (None, Some(records)) => self.expected_batch_size / records as f64,
            (None, None) => f64::NAN,
        }
    }

    fn mechanism(&self, sampling_probability: f64, steps: u64) -> Result<Mechanism, Failure> {
        if self.no_dp {
            let expected_batch_size = self.expected_batch_size;
            let baseline = Mechanism::Baseline { sampling_probability, steps, expected_batch_size };
            return baseline.rules().map(|_| baseline).map_err(|error| Failure::Usage(error.to_string()));
        }
        let noise_multiplier = match (self.noise_multiplier, self.target_epsilon, self.delta) {
            (Some(noise_multiplier), ..) => noise_multiplier,
            (None, Some(target), Some(delta)) => self.calibrate(sampling_probability, steps, target, delta)?,
            _ => return Err(Failure::Usage("give --noise-multiplier, or --target-epsilon with --delta".into())),
        };
        TrainingMechanism::new(sampling_probability, noise_multiplier, steps, self.clip_norm, self.expected_batch_size)
            .map(Mechanism::Private)
            .map_err(|error| Failure::Usage(error.to_string()))
    }

    fn calibrate(&self, sampling_probability: f64, steps: u64, target: f64, delta: f64) -> Result<f64, Failure> {
        let usage = |error: privacy::AccountingError| Failure::Usage(error.to_string());
        if let Some(noise_multiplier) = self.vote_sigma {
            let alone = privacy::epsilon(&[Event::DiscreteGaussian { noise_multiplier }], delta).map_err(usage)?.pld;
            if alone >= target {
                return Err(Failure::Usage(format!(
                    "--target-epsilon {target}: the vote of --vote-sigma alone spends ε = {alone:.4} at δ = {delta:e}\n\
                     help: raise --vote-sigma or --target-epsilon"
                )));
            }
        }
        calibrated_noise(sampling_probability, steps, self.vote_sigma, target, delta).map_err(usage)
    }

    fn findings(&self) -> Vec<String> {
        let mut findings = Vec::new();
        let mut check = |holds: bool, message: String| {
            if !holds {
                findings.push(message);
            }
        };
        let probability = self.sampling_probability();
        check((1..=MAX_RANK).contains(&self.rank), format!("--rank {}: expected 1 to {MAX_RANK}", self.rank));
        check(
            ALPHAS.contains(&self.alpha),
            format!("--alpha {:?}: expected a number from {:e} to {:e}", self.alpha, ALPHAS.start(), ALPHAS.end()),
        );
        check(
            self.expected_batch_size.is_finite() && self.expected_batch_size > 0.0,
            format!("--expected-batch-size {}: expected a positive number", self.expected_batch_size),
        );
        match self.sampling_probability {
            Some(given) => check(
                given > 0.0 && given <= 1.0,
                format!("--sampling-probability {given}: expected a number in (0, 1]"),
            ),
            None if self.records == Some(0) => check(false, "--records 0: expected at least 1".into()),
            None => check(
                probability.is_nan() || probability <= 1.0,
                format!(
                    "sampling probability {probability}: expected at most 1\n\
                     help: --expected-batch-size may not exceed --records"
                ),
            ),
        }
        check((0.0..1.0).contains(&self.dropout), format!("--dropout {}: expected [0, 1)", self.dropout));
        check(self.steps != Some(0), "--steps 0: expected at least 1".into());
        check(
            self.epochs.is_none_or(|epochs| epochs.is_finite() && epochs > 0.0),
            "--epochs: expected a positive number".into(),
        );
        check(
            LEARNING_RATES.contains(&self.learning_rate),
            format!(
                "--learning-rate {:?}: expected a number from {:e} to {}",
                self.learning_rate,
                LEARNING_RATES.start(),
                LEARNING_RATES.end()
            ),
        );
        check(
            self.weight_decay.is_finite() && self.weight_decay >= 0.0,
            format!("--weight-decay {}: expected a number of at least 0", self.weight_decay),
        );
        let decay = self.learning_rate * self.weight_decay;
        check(
            decay.is_nan() || decay < 1.0,
            format!(
                "--weight-decay {:?}: times --learning-rate {:?} it is {decay:?}, expected less than 1\n\
                 help: lower either; this share of the adapter is taken away in each step",
                self.weight_decay, self.learning_rate
            ),
        );
        if let Some(delta) = self.delta {
            check(DELTAS.contains(&delta), format!("--delta {delta}: expected a number between 0 and 1, such as 1e-6"));
        }
        check(self.block_length >= 8, format!("--block-length {}: expected at least 8 tokens", self.block_length));
        check(self.checkpoint_every >= 1, "--checkpoint-every 0: expected at least 1".into());
        check(self.micro_batch_tokens != Some(0), "--micro-batch-tokens 0: expected at least 1".into());
        findings
    }
}

impl Config {
    /// The adapter's shape.
    pub fn lora(&self) -> LoraConfig {
        LoraConfig { rank: self.rank, alpha: self.alpha, targets: self.targets.clone(), dropout: self.dropout }
    }

    /// Learning rate of `step`, from 0.
    pub fn learning_rate(&self, step: u64) -> f64 {
        if step < self.warmup_steps {
            return self.learning_rate * (step + 1) as f64 / self.warmup_steps as f64;
        }
        let span = self.mechanism.steps().saturating_sub(self.warmup_steps).max(1) as f64;
        let done = (step - self.warmup_steps) as f64 / span;
        self.learning_rate
            * match self.schedule {
                Schedule::Constant => 1.0,
                Schedule::Linear => 1.0 - done,
                Schedule::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * done).cos()),
            }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Flags of a run with forty units, ten of them expected in a batch; `more` comes last.
    fn args(more: &str) -> Args {
        let flags = "doppel-train --run one --corpus chats --model llama --records 40 --expected-batch-size 10";
        Args::try_parse_from(flags.split_whitespace().chain(more.split_whitespace())).unwrap()
    }

    fn config(more: &str) -> Config {
        args(more).config().unwrap()
    }

    #[track_caller]
    fn rates(more: &str, expected: &[f64]) {
        let config = config(&format!("--steps {} --noise-multiplier 1 --learning-rate 2 {more}", expected.len()));
        for (step, expected) in (0..).zip(expected) {
            let found = config.learning_rate(step);
            assert!((found - expected).abs() < 1e-12, "step {step}: found {found}, expected {expected}");
        }
    }

    #[test]
    fn schedules_fall_from_the_peak() {
        rates("--schedule constant", &[2.0, 2.0, 2.0, 2.0]);
        rates("--schedule linear", &[2.0, 1.5, 1.0, 0.5]);
        let cosine = std::f64::consts::FRAC_1_SQRT_2;
        rates("--schedule cosine", &[2.0, 1.0 + cosine, 1.0, 1.0 - cosine]);
    }

    #[test]
    fn the_rate_warms_up_to_the_peak_and_falls_over_the_other_steps() {
        rates("--warmup-steps 2 --schedule constant", &[1.0, 2.0, 2.0, 2.0]);
        rates("--warmup-steps 2 --schedule linear", &[1.0, 2.0, 2.0, 1.5, 1.0, 0.5]);
        rates("--warmup-steps 8 --schedule cosine", &[0.25, 0.5, 0.75, 1.0]);
    }

    #[test]
    fn epochs_become_steps_rounded_up() {
        // One step draws a quarter of the units.
        for (epochs, steps) in [("1", 4), ("2.5", 10), ("2.51", 11), ("0.01", 1)] {
            assert_eq!(config(&format!("--epochs {epochs} --noise-multiplier 1")).mechanism.steps(), steps, "{epochs}");
        }
    }

    #[test]
    fn a_target_leaves_room_for_the_vote() {
        let spent = |more: &str| {
            let config = config(&format!("--steps 6 --target-epsilon 3 --delta 1e-5 {more}"));
            let Mechanism::Private(mechanism) = config.mechanism else { panic!("a baseline") };
            let vote = Event::DiscreteGaussian { noise_multiplier: 2.0 };
            let alone = privacy::epsilon(&[mechanism.event()], 1e-5).unwrap().pld;
            (alone, privacy::epsilon(&[mechanism.event(), vote], 1e-5).unwrap().pld)
        };
        let (alone, with_vote) = spent("--vote-sigma 2");
        assert!(alone < with_vote && with_vote <= 3.0 && with_vote > 2.99, "{with_vote}");
        let (alone, with_vote) = spent("");
        assert!(alone <= 3.0 && alone > 2.99 && with_vote > 3.0, "{alone}, {with_vote}");
    }

    #[test]
    fn a_vote_that_alone_spends_the_target_is_named() {
        let flags = "--steps 6 --target-epsilon 0.1 --delta 1e-5 --vote-sigma 2";
        let told = args(flags).config().unwrap_err().to_string();
        assert!(told.contains("--target-epsilon 0.1: the vote of --vote-sigma alone spends"), "{told}");
    }

    #[test]
    fn a_sampling_probability_is_told_by_the_flags_that_were_given() {
        let told = |sampling_probability, records| {
            let args = Args { sampling_probability, records, ..args("--steps 1 --noise-multiplier 1") };
            args.config().unwrap_err().to_string()
        };
        let given = told(Some(2.0), None);
        assert!(given.contains("--sampling-probability 2: expected") && !given.contains("--records"), "{given}");
        let none = told(None, Some(0));
        assert!(none.contains("--records 0: expected at least 1") && !none.contains("inf"), "{none}");
        let few = told(None, Some(5));
        assert!(few.contains("sampling probability 2") && few.contains("may not exceed --records"), "{few}");
    }

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Args::command().debug_assert();
    }

    #[test]
    fn values_that_cannot_work_are_found_before_anything_is_read() {
        for (more, expected) in [
            ("--alpha 0", "--alpha 0.0: expected a number from 1e-6 to 1e6"),
            ("--alpha 1e300", "--alpha 1e300: expected"),
            ("--alpha 1e-300", "--alpha 1e-300: expected"),
            ("--alpha nan", "--alpha NaN"),
            ("--alpha inf", "--alpha inf"),
            ("--rank 0", "--rank 0: expected 1 to 4096"),
            ("--rank 4097", "--rank 4097"),
            ("--weight-decay -0.1", "--weight-decay -0.1"),
            ("--weight-decay nan", "--weight-decay NaN"),
            ("--delta 0", "--delta 0: expected a number between 0 and 1"),
            ("--delta 1", "--delta 1"),
            ("--delta 1e-301", "expected a number between 0 and 1"),
            ("--delta nan", "--delta NaN"),
            ("--dropout 1", "--dropout 1"),
            ("--learning-rate inf", "--learning-rate inf"),
            ("--learning-rate 11", "--learning-rate 11.0: expected a number from 1e-10 to 10"),
            ("--learning-rate -1", "--learning-rate -1"),
            ("--learning-rate 1e-30", "--learning-rate 1e-30: expected"),
            (
                "--weight-decay 1e4",
                "--weight-decay 10000.0: times --learning-rate 0.001 it is 10.0, expected less than 1",
            ),
            ("--weight-decay 1000", "expected less than 1"),
        ] {
            let failure = args(&format!("--steps 1 --noise-multiplier 1 {more}")).config().unwrap_err();
            assert!(matches!(&failure, Failure::Usage(told) if told.contains(expected)), "{more}: {failure}");
        }
    }

    #[test]
    fn a_baseline_is_refused_what_private_training_is() {
        for how in ["--no-dp", "--noise-multiplier 1"] {
            let told = |more: &str, expected_batch_size| {
                let args = Args { expected_batch_size, ..args(&format!("{how} {more}")) };
                args.config().unwrap_err().to_string()
            };
            let long = told("--epochs 1e13", 10.0);
            assert!(long.contains("steps: expected 1 to"), "{how}: {long}");
            let small = told("--steps 3", 1e-11);
            assert!(small.contains("expected_batch_size: expected a number from 1e-10"), "{how}: {small}");
        }
    }

    #[test]
    fn a_baseline_shares_no_name_with_private_training() {
        assert_eq!(config("--steps 1 --noise-multiplier 1").mechanism.stage(), "train");
        assert_eq!(config("--steps 1 --no-dp").mechanism.stage(), "train-baseline");
    }
}
