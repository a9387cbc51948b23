//! Rate of whole training steps on a real model and real texts; `tests/bench/compare.py` calls it beside the peers.
//!
//!     cargo bench -p doppel-train -- --model=MODEL --texts=TEXTS --count=256 --length=128 --tokens=2048
//!
//! A step draws no units: its logical batch is the first `--count` texts. It clips each gradient, adds noise and updates the
//! adapter; with `--no-dp` it neither clips nor adds noise, as `doppel-train --no-dp` does. Prints one JSON line: the rate,
//! the processor time used (on a shared machine it says more than the wall clock), and `flops`, the floating-point
//! operations of the matrix products that an example cannot do without: 2 for each parameter and token forward, and as
//! many backward to the inputs, since frozen weights need no gradient; and attention's, which multiplies the positions
//! that see each other 2 times forward and 4 times backward.
#![allow(clippy::print_stdout)]

use std::error::Error;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Parser;
use doppel_train::adapter::{BaselineAdapter, PrivateAdapter, Training, Update};
use doppel_train::args::Mechanism;
use doppel_train::step::{Limits, Unit, sum_gradients};
use lm::adapter::{Lora, LoraConfig, Target};
use lm::checkpoint::{Checkpoint, DecoderConfig};
use lm::decoder::Decoder;
use lm::device::{Compute, DeviceChoice, DtypeChoice};
use lm::gradients::{Example, usual_tokens, workers};
use privacy::keyed::{Context, NoiseKey};
use privacy::training::TrainingMechanism;

#[derive(Parser)]
struct Args {
    /// `cargo test --benches` runs this without arguments: that it starts is all that it checks.
    #[arg(long, requires = "texts")]
    model: Option<PathBuf>,
    #[arg(long)]
    texts: Option<PathBuf>,
    #[arg(long, default_value = "bf16")]
    dtype: String,
    #[arg(long, default_value_t = 256)]
    count: usize,
    #[arg(long, default_value_t = 128)]
    length: usize,
    /// As `doppel-train` does where it is not given.
    #[arg(long)]
    tokens: Option<usize>,
    #[arg(long)]
    no_dp: bool,
    /// Cargo adds it.
    #[arg(long)]
    bench: bool,
}

fn main() -> Result<(), Box<dyn Error>> {
    lm::tune_memory();
    let args = Args::parse();
    let (Some(model), Some(texts)) = (&args.model, &args.texts) else { return Ok(()) };
    let dtype = if args.dtype == "f32" { DtypeChoice::F32 } else { DtypeChoice::Bf16 };
    let checkpoint = Checkpoint::open(model)?;
    let decoder = Decoder::load(&checkpoint, Compute::resolve(DeviceChoice::Auto, dtype)?)?;
    let config = LoraConfig { rank: 8, alpha: 16.0, targets: Target::ALL.to_vec(), dropout: 0.0 };
    let lora = Lora::new(config, &decoder.config, decoder.compute.device, 1)?;

    let mut texts: Vec<String> = serde_json::from_slice(&std::fs::read(texts)?)?;
    texts.truncate(args.count);
    let tokenizer = checkpoint.tokenizer()?;
    let mut units = Vec::with_capacity(texts.len());
    for (index, text) in texts.iter().enumerate() {
        let mut tokens = tokenizer.encode(text, true)?;
        tokens.truncate(args.length);
        let examples = vec![Example { tokens, prefix: 1, dropout_seed: 0 }];
        units.push(Unit { id: index.to_string(), examples });
    }
    let units: Vec<&Unit> = units.iter().collect();
    // The last token is a label only.
    let inputs = |unit: &&Unit| unit.examples[0].tokens.len().saturating_sub(1) as f64;
    let flops = units.iter().map(|unit| flops(&decoder.config, inputs(unit))).sum::<f64>();

    let tokens = args.tokens.unwrap_or_else(|| usual_tokens(&decoder));
    let limits = Limits { block_length: args.length, micro_batch_tokens: tokens };
    let mut steps = Steps::new(&decoder, Training::new(lora), units.len() as f64, args.no_dp)?;
    // The longest examples: libraries set themselves up, and memory is taken once. So many that the first micro-batches are
    // whole, which become smaller when fewer than two for each worker are left.
    let mut longest = units.clone();
    longest.sort_by_key(|unit| std::cmp::Reverse(unit.examples[0].tokens.len()));
    let count = 2 * workers(&decoder) * tokens.div_ceil(args.length);
    steps.take(&longest[..count.min(longest.len())], limits)?;
    let (wall, processor) = (Instant::now(), processor_time());
    steps.take(&units, limits)?;
    let (wall, processor) = (wall.elapsed(), processor_time() - processor);
    println!(
        "{}",
        serde_json::json!({ "rate": units.len() as f64 / wall.as_secs_f64(), "unit": "examples/s",
            "flops": flops / units.len() as f64, "seconds": wall.as_secs_f64(),
            "processor_seconds": processor.as_secs_f64() })
    );
    Ok(())
}

/// A run with a mechanism or without, as the stage takes its steps.
struct Steps<'a> {
    decoder: &'a Decoder,
    mechanism: Mechanism,
    adapter: Adapter,
    key: NoiseKey,
}

enum Adapter {
    Private(PrivateAdapter),
    Baseline(BaselineAdapter),
}

impl<'a> Steps<'a> {
    fn new(decoder: &'a Decoder, training: Training, batch: f64, no_dp: bool) -> Result<Self, Box<dyn Error>> {
        let (sampling_probability, steps) = (0.01, 100);
        let (mechanism, adapter) = match no_dp {
            true => (
                Mechanism::Baseline { sampling_probability, steps, expected_batch_size: batch },
                Adapter::Baseline(BaselineAdapter::new(training)),
            ),
            false => (
                Mechanism::Private(TrainingMechanism::new(sampling_probability, 0.5, steps, 0.5, batch)?),
                Adapter::Private(PrivateAdapter::new(training)),
            ),
        };
        Ok(Self { decoder, mechanism, adapter, key: NoiseKey::new([7; 32]) })
    }

    fn take(&mut self, units: &[&Unit], limits: Limits) -> Result<(), Box<dyn Error>> {
        let training = match &self.adapter {
            Adapter::Private(adapter) => adapter.training(),
            Adapter::Baseline(adapter) => adapter.training(),
        };
        let step = training.steps;
        let sum = sum_gradients(self.decoder, &training.lora, &self.mechanism, units, step, limits)?;
        let update = Update { learning_rate: 1e-3, weight_decay: 0.0 };
        match (&mut self.adapter, &self.mechanism) {
            (Adapter::Private(adapter), Mechanism::Private(mechanism)) => {
                adapter.apply(&mechanism.release(&self.key, &Context::new("bench"), step, sum)?, update)?;
            }
            (Adapter::Baseline(adapter), _) => adapter.apply(&sum, units.len() as f64, update)?,
            (Adapter::Private(_), Mechanism::Baseline { .. }) => {}
        }
        Ok(())
    }
}

/// Floating-point operations of an example of `length` inputs.
fn flops(config: &DecoderConfig, length: f64) -> f64 {
    let heads = config.head_dim * (config.heads + config.kv_heads);
    let layer = config.hidden_size * (2 * heads + 3 * config.intermediate_size);
    let parameters = config.layers * layer + config.vocab_size * config.hidden_size;
    let attention = 6 * config.layers * config.heads * config.head_dim;
    4.0 * parameters as f64 * length + attention as f64 * length * length
}

fn processor_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a live value of the type that the call fills.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}
