//! Logits of a model with an adapter, for infra/check_models.py to compare with those of peft.
//!
//! `logits MODEL ADAPTER` reads rows of token ids from standard input as JSON, and writes the logits of each row in turn,
//! `[length, vocabulary]`, to standard output as little-endian float32. Computes in float32 on the CPU.

use std::error::Error;
use std::io::{Read, Write};
use std::path::PathBuf;

use lm::adapter::Lora;
use lm::checkpoint::Checkpoint;
use lm::decoder::Decoder;
use lm::device::{Compute, DeviceChoice, DtypeChoice};
use tch::Tensor;

fn main() -> Result<(), Box<dyn Error>> {
    let folders: Vec<PathBuf> = std::env::args().skip(1).map(PathBuf::from).collect();
    let [model, adapter] = folders.as_slice() else { return Err("usage: logits MODEL ADAPTER < IDS".into()) };
    let mut input = String::new();
    std::io::stdin().read_to_string(&mut input)?;
    let rows: Vec<Vec<i64>> = serde_json::from_str(&input)?;
    let compute = Compute::resolve(DeviceChoice::Cpu, DtypeChoice::F32)?;
    let mut decoder = Decoder::load(&Checkpoint::open(model)?, compute)?;
    let lora = Lora::load(adapter, &decoder.config, compute.device)?;
    decoder.merge(&lora)?;
    let mut output = std::io::stdout().lock();
    for row in rows {
        let logits: Vec<f32> = decoder.logits(&Tensor::from_slice(&row).unsqueeze(0))?.flatten(0, -1).try_into()?;
        let bytes: Vec<u8> = logits.into_iter().flat_map(f32::to_le_bytes).collect();
        output.write_all(&bytes)?;
    }
    Ok(output.flush()?)
}
