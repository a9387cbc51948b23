use std::path::{Path, PathBuf};

use serde_json::Value;
use tch::{Device, Kind, Tensor};

use super::Decoder;
use crate::adapter::{Lora, LoraConfig, Target};
use crate::checkpoint::Checkpoint;
use crate::device::{Compute, DeviceChoice, DtypeChoice};

/// Shapes with golden values of transformers 5.23.0; regenerate with tests/golden/lm.py.
pub(crate) const SHAPES: [&str; 4] = ["llama2", "llama3", "qwen2", "smollm2"];

pub(crate) fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

pub(crate) fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

pub(crate) fn cpu(dtype: DtypeChoice) -> Compute {
    Compute::resolve(DeviceChoice::Cpu, dtype).unwrap()
}

pub(crate) fn tiny(name: &str) -> Decoder {
    Decoder::load(&Checkpoint::open(&golden(name)).unwrap(), cpu(DtypeChoice::F32)).unwrap()
}

/// An adapter on every projection whose factors are all away from zero.
pub(crate) fn adapter(decoder: &Decoder, dropout: f64) -> Lora {
    let config = LoraConfig { rank: 3, alpha: 6.0, targets: Target::ALL.to_vec(), dropout };
    let mut lora = Lora::new(config, &decoder.config, Device::Cpu, 5).unwrap();
    for (index, (_, tensor)) in lora.tensors.iter_mut().enumerate() {
        *tensor = wave(index, &tensor.size()) * 0.2;
    }
    lora
}

/// Values in ±1 without a pattern that a mistake could follow.
pub(crate) fn wave(seed: usize, shape: &[i64]) -> Tensor {
    let count = shape.iter().product::<i64>();
    let values: Vec<f32> = (0..count)
        .map(|index| ((index as f64 * 12.9898 + seed as f64 * 78.233).sin() * 43758.5453).fract() as f32)
        .collect();
    Tensor::from_slice(&values).reshape(shape)
}

pub(crate) fn largest_difference(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.size(), b.size());
    (a - b).abs().max().double_value(&[])
}

fn values(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|item| item.as_f64().unwrap()).collect()
}

fn golden_values(name: &str) -> (Tensor, Tensor) {
    let golden = json(&golden(name).join("golden.json"));
    let rows: Vec<i64> = golden["ids"].as_array().unwrap().iter().flat_map(values).map(|id| id as i64).collect();
    let ids = Tensor::from_slice(&rows).reshape([2, -1]);
    let logits: Vec<f32> = values(&golden["logits"]).into_iter().map(|value| value as f32).collect();
    let logits = Tensor::from_slice(&logits).reshape([2, ids.size()[1], -1]);
    (ids, logits)
}

#[test]
fn logits_are_those_of_transformers() {
    for name in SHAPES {
        let (ids, expected) = golden_values(name);
        let found = tiny(name).logits(&ids).unwrap();
        let difference = largest_difference(&found, &expected);
        assert!(difference < 1e-4, "{name}: {difference}");
    }
}

#[test]
fn bf16_is_near() {
    for name in SHAPES {
        let (ids, expected) = golden_values(name);
        let checkpoint = Checkpoint::open(&golden(name)).unwrap();
        let found = Decoder::load(&checkpoint, cpu(DtypeChoice::Bf16)).unwrap().logits(&ids).unwrap();
        let scale = expected.abs().max().double_value(&[]);
        let difference = (&found - &expected).abs().mean(Kind::Float).double_value(&[]);
        assert!(difference < 0.02 * scale, "{name}: {difference} of {scale}");
    }
}

#[test]
fn padding_on_the_right_is_not_seen() {
    let decoder = tiny("llama3");
    let (ids, _) = golden_values("llama3");
    let short = decoder.logits(&ids.narrow(1, 0, 9)).unwrap();
    let long = decoder.logits(&ids).unwrap().narrow(1, 0, 9);
    assert!(largest_difference(&short, &long) < 1e-5);
}

#[test]
fn a_merged_adapter_does_what_a_separate_one_does() {
    for name in SHAPES {
        let mut decoder = tiny(name);
        let lora = adapter(&decoder, 0.0);
        let (ids, before) = golden_values(name);
        let hidden = decoder.hidden(&ids, Some(&lora)).unwrap();
        let separate = hidden.linear(&decoder.output, None::<&Tensor>);
        decoder.merge(&lora).unwrap();
        let merged = decoder.logits(&ids).unwrap();
        assert!(largest_difference(&separate, &before) > 0.01, "{name}: the adapter does something");
        assert!(largest_difference(&separate, &merged) < 1e-4, "{name}");
    }
}

#[test]
fn a_missing_tensor_is_named() {
    let folder = std::env::temp_dir().join(format!("doppel-lm-missing-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(golden("qwen2").join(file), folder.join(file)).unwrap();
    }
    let mut config = json(&folder.join("config.json"));
    config["num_hidden_layers"] = 3.into();
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let found = Decoder::load(&Checkpoint::open(&folder).unwrap(), cpu(DtypeChoice::F32));
    std::fs::remove_dir_all(&folder).unwrap();
    let message = found.err().unwrap().to_string();
    assert!(message.contains("model.layers.2."), "{message}");
}
