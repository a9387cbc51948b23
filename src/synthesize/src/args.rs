//! Flags, and the configuration they mean.

use clap::Parser;
use lm::device::{DeviceChoice, DtypeChoice};
use lm::generate::TEMPERATURES;
use lm::template::Template;
use serde::Serialize;
use stage::{Failure, Shard};

/// Sample synthetic instructions from a trained model.
///
/// Reads a base model and the adapter that train released; appends the samples to `synthetic` in the release zone,
/// without any private root. Sample number n has its own seed, made of the run's public --seed and n, whichever shard
/// draws it and at whichever attempt. On a CPU with AVX2 the sample then is the same bit for bit, on one machine, for
/// every number of shards and batch size; on CUDA and on other CPUs, to rounding. An instruction may come out empty; it
/// is kept, as the model's answer to its own distribution, and counted like any other.
///
/// Exit codes: 0 done or already done; 1 a bug; 2 wrong usage; 3 an input is missing or malformed; 5 storage or
/// network, safe to retry.
#[derive(Parser, Clone, Debug)]
#[command(
    name = "doppel-synthesize",
    version,
    allow_negative_numbers = true,
    after_help = "Examples:\n  doppel-synthesize --run demo --release ./lake/release --model models/smollm2 --count 2000 --template user\n  \
                  doppel-synthesize --run demo --release s3://bucket/release --model s3://models/llama-2-13b --count 1000000 \
                  --shard 3/32\n  doppel-synthesize --run base --release ./lake/release --model models/smollm2 --no-adapter --count 1000"
)]
pub struct Args {
    /// Flags that every stage shares.
    #[command(flatten)]
    pub common: stage::Common,
    /// Base model: URL or path of a Hugging Face folder or a GGUF file.
    #[arg(long, value_name = "URL", value_hint = stage::PLACE)]
    pub model: String,
    /// Run whose adapter to sample from; this run's own unless given.
    #[arg(long, value_name = "RUN", value_parser = stage::common::run_id, conflicts_with = "no_adapter")]
    pub adapter_run: Option<String>,
    /// Sample from the base model as it is, for a baseline.
    #[arg(long)]
    pub no_adapter: bool,
    /// Which of N shards this is, as i/N with i from 0: shards share the samples out and may run side by side.
    #[arg(long, value_name = "I/N")]
    pub shard: Option<Shard>,
    /// Number of samples of the whole run, over all shards.
    #[arg(long)]
    pub count: u64,
    /// Sampling temperature; 0 takes the likeliest token always.
    #[arg(long, default_value_t = 1.0)]
    pub temperature: f64,
    /// Sample among the likeliest tokens that together have this probability; 1 keeps all.
    #[arg(long, default_value_t = 0.95)]
    pub top_p: f64,
    /// Sample among this many likeliest tokens; 0 keeps all.
    #[arg(long, default_value_t = 0)]
    pub top_k: usize,
    /// Divides the logits of tokens that occurred; 1 does nothing.
    #[arg(long, default_value_t = 1.0)]
    pub repetition_penalty: f64,
    /// Longest sample in tokens.
    #[arg(long, default_value_t = 512)]
    pub max_new_tokens: usize,
    /// Text that ends a sample beside the model's own end tokens, and is left out of it: one token of the model's
    /// tokenizer, such as '<|im_start|>'. May be repeated.
    #[arg(long, value_name = "TOKEN")]
    pub stop: Vec<String>,
    /// Public seed of the run.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// What stands before an instruction, as in training: nothing, the chat template's user turn, or all of it.
    #[arg(long, value_enum, default_value_t = Template::None)]
    pub template: Template,
    /// Sequences sampled at a time, fewer where their caches would not fit into memory; by default 32 on CPU and 512 on a
    /// GPU. Does not change the samples on a CPU with AVX2; elsewhere, sums are rounded in other places, and a sample may
    /// take another turn.
    #[arg(long)]
    pub batch_size: Option<usize>,
    /// Precision of weights and activations.
    #[arg(long, value_enum, default_value_t = DtypeChoice::Auto)]
    pub dtype: DtypeChoice,
    /// Where to compute.
    #[arg(long, value_enum, default_value_t = DeviceChoice::Auto)]
    pub device: DeviceChoice,
}

/// What was asked for, checked: everything here changes the result and binds the run id. Model and adapter are inputs,
/// by their digests; batch size and device are not here, since they change nothing but rounding.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Config {
    /// Run whose adapter is used; `None` for the base model.
    pub adapter_run: Option<String>,
    /// Samples of the whole run.
    pub count: u64,
    /// Temperature.
    pub temperature: f64,
    /// Nucleus.
    pub top_p: f64,
    /// Most likely tokens.
    pub top_k: usize,
    /// Repetition penalty.
    pub repetition_penalty: f64,
    /// Longest sample, tokens.
    pub max_new_tokens: usize,
    /// Additional end tokens, sorted. Left out where there are none: runs from before this setting stay what they were.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub stop: Vec<String>,
    /// Prompt template.
    pub template: Template,
    /// Precision as asked for.
    pub dtype: DtypeChoice,
    /// Public seed.
    pub seed: u64,
}

impl Args {
    /// Checks the flags and works out what follows from them; all findings are reported together.
    pub fn config(&self) -> Result<Config, Failure> {
        let findings = self.findings();
        if !findings.is_empty() {
            return Err(Failure::Usage(findings.join("\n")));
        }
        let mut stop = self.stop.clone();
        stop.sort();
        stop.dedup();
        let adapter_run = (!self.no_adapter).then(|| self.adapter_run.clone().unwrap_or(self.common.run.clone()));
        Ok(Config {
            adapter_run,
            count: self.count,
            temperature: self.temperature,
            top_p: self.top_p,
            top_k: self.top_k,
            repetition_penalty: self.repetition_penalty,
            max_new_tokens: self.max_new_tokens,
            stop,
            template: self.template,
            dtype: self.dtype,
            seed: self.seed,
        })
    }

    /// The shard, the whole being the only one.
    pub fn effective_shard(&self) -> Shard {
        self.shard.unwrap_or(Shard::WHOLE)
    }

    fn findings(&self) -> Vec<String> {
        let mut findings = Vec::new();
        let mut check = |holds: bool, message: String| {
            if !holds {
                findings.push(message);
            }
        };
        check((1..=1 << 40).contains(&self.count), format!("--count {}: expected 1 to 2^40", self.count));
        check(
            self.count >= u64::from(self.effective_shard().count),
            format!("--count {}: fewer samples than shards\nhelp: use fewer shards", self.count),
        );
        check(
            self.temperature == 0.0 || TEMPERATURES.contains(&self.temperature),
            format!("--temperature {:e}: expected 0, or a number from 1e-6 to 1e6", self.temperature),
        );
        check(self.top_p > 0.0 && self.top_p <= 1.0, format!("--top-p {}: expected a number in (0, 1]", self.top_p));
        check(
            self.repetition_penalty.is_finite() && self.repetition_penalty > 0.0,
            format!("--repetition-penalty {}: expected a positive number", self.repetition_penalty),
        );
        check(
            (1..=i32::MAX as usize).contains(&self.max_new_tokens),
            format!("--max-new-tokens {}: expected at least 1", self.max_new_tokens),
        );
        check(self.batch_size != Some(0), "--batch-size 0: expected at least 1".into());
        findings
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Args::command().debug_assert();
    }
}
