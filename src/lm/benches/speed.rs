//! Rates of sampling and embedding on a real model and real texts; `tests/bench/compare.py` calls it beside the peers.
//!
//!     cargo bench -p lm -- sample MODEL --dtype=bf16 --count=256 --batch=64
//!     cargo bench -p lm -- embed ENCODER TEXTS --count=1024 --tokens=1024
//!     cargo bench -p lm -- load MODEL
//!
//! MODEL and ENCODER are folders as the stages take them, TEXTS a file with a JSON array of strings. `--tokens` is what a
//! batch holds. Prints one JSON line: the rate, the processor time used (on a shared machine it says more than the wall
//! clock), and `flops`, the floating-point operations of matrix products that one unit of work cannot do without: 2 for
//! each parameter and token.
#![allow(clippy::print_stdout)]

use std::error::Error;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Parser;
use lm::checkpoint::{Checkpoint, DecoderConfig};
use lm::decoder::Decoder;
use lm::device::{Compute, DeviceChoice, DtypeChoice};
use lm::encoder::Encoder;
use lm::generate::{Request, Sampling, generate};

type Outcome = Result<(), Box<dyn Error>>;

/// Tokens that a sequence may have at most when sampling.
const NEW_TOKENS: usize = 96;

#[derive(Parser)]
struct Args {
    /// `cargo test --benches` runs this without arguments: that it starts is all that it checks.
    work: Option<String>,
    model: Option<PathBuf>,
    texts: Option<PathBuf>,
    #[arg(long, default_value = "bf16")]
    dtype: String,
    #[arg(long, default_value_t = 256)]
    count: usize,
    /// As `doppel-embed` does where it is not given.
    #[arg(long)]
    tokens: Option<usize>,
    #[arg(long, default_value_t = 64)]
    batch: usize,
    /// Cargo adds it.
    #[arg(long)]
    bench: bool,
}

fn main() -> Outcome {
    lm::tune_memory();
    let args = Args::parse();
    let Some(work) = &args.work else { return Ok(()) };
    let dtype = if args.dtype == "f32" { DtypeChoice::F32 } else { DtypeChoice::Bf16 };
    let compute = Compute::resolve(DeviceChoice::Auto, dtype)?;
    let model = args.model.as_deref().ok_or("which model?")?;
    if work == "embed" {
        return embed(&args, &Encoder::load(model, compute)?, model);
    }
    let clock = Clock::start();
    let checkpoint = Checkpoint::open(model)?;
    let decoder = Decoder::load(&checkpoint, compute)?;
    match work.as_str() {
        "sample" => sample(&args, &checkpoint, &decoder),
        "load" => clock.report(1.0, "models/s", 0.0),
        other => Err(format!("{other}: expected sample, embed or load").into()),
    }
}

fn sample(args: &Args, checkpoint: &Checkpoint, decoder: &Decoder) -> Outcome {
    let tokenizer = checkpoint.tokenizer()?;
    let prompt = tokenizer.encode("<|im_start|>user\n", true)?;
    let sampling = Sampling {
        temperature: 1.0,
        top_p: 0.95,
        top_k: 0,
        repetition_penalty: 1.0,
        max_new_tokens: NEW_TOKENS,
        stop: decoder.config.eos.clone(),
    };
    let requests = |count: usize| (0..count as u64).map(|index| Request { index, prompt: prompt.clone(), seed: index });
    // Libraries set themselves up, and memory is taken once.
    let short = Sampling { max_new_tokens: 4, ..sampling.clone() };
    generate(decoder, &short, requests(args.batch), args.batch, |_| Ok(()))?;
    let mut tokens = 0;
    let clock = Clock::start();
    generate(decoder, &sampling, requests(args.count), args.batch, |completion| {
        tokens += completion.tokens.len();
        Ok(())
    })?;
    clock.report(tokens as f64, "tokens/s", 2.0 * parameters(&decoder.config))
}

fn embed(args: &Args, encoder: &Encoder, folder: &Path) -> Outcome {
    let texts = args.texts()?;
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    let tokens = args.tokens.unwrap_or_else(|| encoder.usual_tokens());
    let flops = 2.0 * encoder_parameters(folder)? * mean_tokens(folder, &texts)?;
    encoder.embed(&texts[..texts.len().min(32)], tokens)?;
    let clock = Clock::start();
    encoder.embed(&texts, tokens)?;
    clock.report(texts.len() as f64, "texts/s", flops)
}

/// Parameters that multiply each token: all but the norms, which are few, and an embedding that is not the output's.
fn parameters(config: &DecoderConfig) -> f64 {
    let attention = 2 * config.hidden_size * config.head_dim * (config.heads + config.kv_heads);
    let layer = attention + 3 * config.hidden_size * config.intermediate_size;
    (config.layers * layer + config.vocab_size * config.hidden_size) as f64
}

/// The same for a BERT.
fn encoder_parameters(folder: &Path) -> Result<f64, Box<dyn Error>> {
    let config: serde_json::Value = serde_json::from_slice(&std::fs::read(folder.join("config.json"))?)?;
    let size = |name: &str| config[name].as_f64().ok_or(format!("no {name} in config.json"));
    let width = size("hidden_size")?;
    Ok(size("num_hidden_layers")? * (4.0 * width * width + 2.0 * width * size("intermediate_size")?))
}

/// Tokens that the encoder reads of a text.
fn mean_tokens(folder: &Path, texts: &[&str]) -> Result<f64, Box<dyn Error>> {
    let config: serde_json::Value = serde_json::from_slice(&std::fs::read(folder.join("sentence_bert_config.json"))?)?;
    let longest = config["max_seq_length"].as_u64().ok_or("no max_seq_length")? as usize;
    let tokenizer = lm::tokenizer::Tokenizer::from_folder(folder)?;
    let encoded = tokenizer.encode_batch(texts, true)?;
    Ok(encoded.iter().map(|ids| ids.len().min(longest)).sum::<usize>() as f64 / texts.len() as f64)
}

impl Args {
    fn texts(&self) -> Result<Vec<String>, Box<dyn Error>> {
        let file = self.texts.as_deref().ok_or("which texts?")?;
        let mut texts: Vec<String> = serde_json::from_slice(&std::fs::read(file)?)?;
        texts.truncate(self.count);
        Ok(texts)
    }
}

struct Clock {
    wall: Instant,
    processor: f64,
}

impl Clock {
    fn start() -> Self {
        Self { wall: Instant::now(), processor: processor_seconds() }
    }

    fn report(&self, amount: f64, unit: &str, flops: f64) -> Outcome {
        let (wall, processor) = (self.wall.elapsed().as_secs_f64(), processor_seconds() - self.processor);
        let rate = amount / wall;
        println!(
            "{}",
            serde_json::json!({ "rate": rate, "unit": unit, "flops": flops, "amount": amount, "seconds": wall,
                "processor_seconds": processor })
        );
        Ok(())
    }
}

fn processor_seconds() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a live value of the type that the call fills.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) };
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}
