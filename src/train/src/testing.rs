//! A tiny random decoder for the unit tests of this crate.

use std::path::Path;

use lm::adapter::{Lora, LoraConfig, Target};
use lm::checkpoint::Checkpoint;
use lm::decoder::Decoder;
use lm::device::{Compute, DeviceChoice, DtypeChoice};
use lm::gradients::Example;
use safetensors::tensor::{Dtype, TensorView};

use crate::step::Unit;

const HIDDEN: usize = 32;
const INNER: usize = 64;
const KV: usize = 16;
const VOCAB: usize = 64;

/// A two-layer SmolLM2-shaped decoder with random weights, and an adapter whose factors are all non-zero.
pub fn tiny(folder: &Path) -> (Decoder, Lora) {
    let config = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": VOCAB, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "max_position_embeddings": 64, "tie_word_embeddings": true, "eos_token_id": 0, "bos_token_id": 0,
    });
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let mut shapes = vec![("model.embed_tokens.weight".to_string(), vec![VOCAB, HIDDEN])];
    for layer in 0..2 {
        for (name, rows, columns) in [
            ("self_attn.q_proj", HIDDEN, HIDDEN),
            ("self_attn.k_proj", KV, HIDDEN),
            ("self_attn.v_proj", KV, HIDDEN),
            ("self_attn.o_proj", HIDDEN, HIDDEN),
            ("mlp.gate_proj", INNER, HIDDEN),
            ("mlp.up_proj", INNER, HIDDEN),
            ("mlp.down_proj", HIDDEN, INNER),
        ] {
            shapes.push((format!("model.layers.{layer}.{name}.weight"), vec![rows, columns]));
        }
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            shapes.push((format!("model.layers.{layer}.{norm}.weight"), vec![HIDDEN]));
        }
    }
    shapes.push(("model.norm.weight".to_string(), vec![HIDDEN]));
    let bodies: Vec<(String, Vec<usize>, Vec<u8>)> = shapes
        .into_iter()
        .enumerate()
        .map(|(index, (name, shape))| (name, shape.clone(), values(index, &shape)))
        .collect();
    let views = bodies
        .iter()
        .map(|(name, shape, body)| (name.clone(), TensorView::new(Dtype::F32, shape.clone(), body).unwrap()));
    std::fs::write(folder.join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();

    let compute = Compute::resolve(DeviceChoice::Cpu, DtypeChoice::F32).unwrap();
    let decoder = Decoder::load(&Checkpoint::open(folder).unwrap(), compute).unwrap();
    let config = LoraConfig { rank: 2, alpha: 4.0, targets: vec![Target::Q, Target::V], dropout: 0.0 };
    let mut lora = Lora::new(config, &decoder.config, decoder.compute.device, 7).unwrap();
    for (index, (_, tensor)) in lora.tensors.iter_mut().enumerate() {
        *tensor = noise(100 + index, tensor.numel()).view_as(tensor) * 0.3;
    }
    (decoder, lora)
}

/// Units with one example each, of lengths from 4 to 20.
pub fn units(count: usize) -> Vec<Unit> {
    (0..count).map(|index| Unit { id: format!("unit-{index}"), examples: vec![example(index)] }).collect()
}

/// A deterministic example.
pub fn example(index: usize) -> Example {
    let length = 4 + (index * 7) % 17;
    let tokens = (0..length).map(|place| ((index * 31 + place * place * 13 + place) % VOCAB) as i64).collect();
    Example { tokens, prefix: 1, dropout_seed: index as u64 }
}

/// Pseudo-random values in [-1, 1], the same in every run.
fn noise(seed: usize, count: usize) -> tch::Tensor {
    let value = |index: usize| {
        let mixed = blake3::hash(format!("{seed}/{index}").as_bytes());
        let bytes: [u8; 4] = std::array::from_fn(|byte| mixed.as_bytes()[byte]);
        (f64::from(u32::from_le_bytes(bytes)) / f64::from(u32::MAX) * 2.0 - 1.0) as f32
    };
    tch::Tensor::from_slice(&(0..count).map(value).collect::<Vec<f32>>())
}

fn values(seed: usize, shape: &[usize]) -> Vec<u8> {
    let scale = if shape.len() == 1 { 0.1 } else { 0.3 };
    let offset = if shape.len() == 1 { 1.0 } else { 0.0 };
    let tensor = noise(seed, shape.iter().product()) * scale + offset;
    Vec::<f32>::try_from(tensor).unwrap().iter().flat_map(|value| value.to_le_bytes()).collect()
}
