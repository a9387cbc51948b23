//! Rates of the three heavy jobs on the real model and real texts: `cargo bench -p lm -- train bf16`.
//!
//! Arguments: `train|sample|embed`, `bf16|f32`, then optionally a count (examples, sequences, texts), and tokens per
//! micro-batch, sequences per batch or tokens per batch. `DOPPEL_CACHE` is where `make setup` put SmolLM2 and ShareGPT. Prints one JSON line, with the
//! processor time used: on a shared machine it says more than the wall clock.
#![allow(clippy::print_stdout)]

use std::error::Error;
use std::path::PathBuf;
use std::time::Instant;

use lm::adapter::{Lora, LoraConfig, Target};
use lm::checkpoint::Checkpoint;
use lm::decoder::Decoder;
use lm::device::{Compute, DeviceChoice, DtypeChoice};
use lm::encoder::Encoder;
use lm::generate::{Request, Sampling, generate};
use lm::gradients::{Example, example_gradients, micro_batches};
use serde_json::Value;

/// Texts are cut here, as in the table of peers.
const LENGTH: usize = 128;

fn main() -> Result<(), Box<dyn Error>> {
    lm::tune_memory();
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with("--")).collect();
    let argument = |index: usize| arguments.get(index).map(String::as_str);
    let dtype = if argument(1) == Some("f32") { DtypeChoice::F32 } else { DtypeChoice::Bf16 };
    let number = |index: usize, default: usize| argument(index).map_or(Ok(default), str::parse);
    let compute = Compute::resolve(DeviceChoice::Auto, dtype)?;
    if argument(0) == Some("embed") {
        return embed(compute, number(2, 1024)?, number(3, 4096)?);
    }
    let checkpoint = Checkpoint::open(&cache()?.join("models/smollm2-135m-instruct"))?;
    let decoder = Decoder::load(&checkpoint, compute)?;
    match argument(0) {
        Some("train") => train(&checkpoint, &decoder, number(2, 256)?, number(3, 1024)?),
        Some("sample") => sample(&checkpoint, &decoder, number(2, 256)?, number(3, 64)?),
        // `cargo test --benches` runs this without arguments: that it starts is all that it checks.
        _ => Ok(()),
    }
}

fn train(checkpoint: &Checkpoint, decoder: &Decoder, count: usize, tokens: usize) -> Result<(), Box<dyn Error>> {
    let tokenizer = checkpoint.tokenizer()?;
    let texts = first_turns(count)?;
    let mut examples = Vec::new();
    for text in &texts {
        let mut ids = tokenizer.encode(text, true)?;
        ids.truncate(LENGTH);
        examples.push(Example { tokens: ids, prefix: 1, dropout_seed: 0 });
    }
    let config = LoraConfig { rank: 8, alpha: 16.0, targets: Target::ALL.to_vec(), dropout: 0.0 };
    let lora = Lora::new(config, &decoder.config, decoder.compute.device, 1)?;
    let lengths: Vec<usize> = examples.iter().map(|example| example.tokens.len()).collect();
    let batches: Vec<Vec<Example>> = micro_batches(&lengths, tokens)
        .into_iter()
        .map(|batch| batch.into_iter().map(|index| examples[index].clone()).collect())
        .collect();
    if let Some(batch) = batches.last() {
        example_gradients(decoder, &lora, batch, LENGTH)?;
    }
    let clock = Clock::start();
    for batch in &batches {
        let found = example_gradients(decoder, &lora, batch, LENGTH)?;
        // What a step does with them at the least.
        let norms: tch::Tensor = found
            .gradients
            .iter()
            .map(|g| g.flatten(1, -1).square().sum_dim_intlist(1, false, tch::Kind::Double))
            .sum();
        let _ = norms.sum(tch::Kind::Double).double_value(&[]);
    }
    clock.report("train", count as f64, "examples/s");
    println!("{{\"tokens\": {}, \"micro_batches\": {}}}", lengths.iter().sum::<usize>(), batches.len());
    Ok(())
}

fn sample(checkpoint: &Checkpoint, decoder: &Decoder, count: usize, batch: usize) -> Result<(), Box<dyn Error>> {
    let tokenizer = checkpoint.tokenizer()?;
    let prompt = tokenizer.encode("<|im_start|>user\n", true)?;
    let sampling = Sampling {
        temperature: 1.0,
        top_p: 0.95,
        top_k: 0,
        repetition_penalty: 1.0,
        max_new_tokens: 96,
        stop: decoder.config.eos.clone(),
    };
    let requests = (0..count as u64).map(|index| Request { index, prompt: prompt.clone(), seed: index });
    let mut tokens = 0;
    let clock = Clock::start();
    generate(decoder, &sampling, requests, batch, |completion| {
        tokens += completion.tokens.len();
        Ok(())
    })?;
    clock.report("sample", tokens as f64, "tokens/s");
    Ok(())
}

fn embed(compute: Compute, count: usize, tokens: usize) -> Result<(), Box<dyn Error>> {
    let encoder = Encoder::load(&cache()?.join("models/all-minilm-l6-v2"), compute)?;
    let texts = first_turns(count)?;
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    encoder.embed(&texts[..texts.len().min(32)], tokens)?;
    let clock = Clock::start();
    encoder.embed(&texts, tokens)?;
    clock.report("embed", texts.len() as f64, "texts/s");
    Ok(())
}

struct Clock {
    wall: Instant,
    processor: f64,
}

impl Clock {
    fn start() -> Self {
        Self { wall: Instant::now(), processor: processor_seconds() }
    }

    fn report(&self, name: &str, amount: f64, unit: &str) {
        let (wall, processor) = (self.wall.elapsed().as_secs_f64(), processor_seconds() - self.processor);
        println!(
            "{{\"name\": \"{name}\", \"rate\": {:.2}, \"unit\": \"{unit}\", \"amount\": {amount}, \
             \"seconds\": {wall:.2}, \"processor_seconds\": {processor:.2}}}",
            amount / wall
        );
    }
}

fn processor_seconds() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a live value of the type that the call fills.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) };
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

fn cache() -> Result<PathBuf, Box<dyn Error>> {
    match std::env::var_os("DOPPEL_CACHE") {
        Some(cache) => Ok(PathBuf::from(cache)),
        None => Ok(PathBuf::from(std::env::var_os("HOME").ok_or("no HOME")?).join(".cache/doppel")),
    }
}

/// The first `count` human first turns of ShareGPT, whose JSON array is cut off at the end.
fn first_turns(count: usize) -> Result<Vec<String>, Box<dyn Error>> {
    let bytes = std::fs::read(cache()?.join("data/sharegpt.json"))?;
    let next_object = |from: usize| bytes[from..].iter().position(|&byte| byte == b'{').map(|offset| from + offset);
    let mut at = next_object(0);
    let mut turns = Vec::new();
    while let Some(start) = at.filter(|_| turns.len() < count) {
        let mut stream = serde_json::Deserializer::from_slice(&bytes[start..]).into_iter::<Value>();
        let Some(Ok(record)) = stream.next() else { break };
        at = next_object(start + stream.byte_offset());
        let first = &record["conversations"][0];
        if let (Some("human"), Some(text)) = (first["from"].as_str(), first["value"].as_str())
            && !text.trim().is_empty()
        {
            turns.push(text.to_string());
        }
    }
    Ok(turns)
}
