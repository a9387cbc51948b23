mod gguf;

use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
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

/// SmolLM2-135M-Instruct in the cache of `make setup`, `DOPPEL_CACHE` or the default.
pub(crate) fn real_model() -> PathBuf {
    let set = std::env::var_os("DOPPEL_CACHE").map(PathBuf::from);
    let cache = set.unwrap_or_else(|| PathBuf::from(std::env::var_os("HOME").unwrap()).join(".cache/doppel"));
    let folder = cache.join("models/smollm2-135m-instruct");
    assert!(folder.is_dir(), "{}: not there\nhelp: run `make setup`", folder.display());
    folder
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

/// The adapter of `tests/golden/llama3-adapter` is [`adapter`]'s, as [`Lora::to_peft`] writes it; its logits are those of
/// peft, by tests/golden/peft.py, which prints the versions.
#[test]
fn logits_with_an_adapter_are_those_of_peft() {
    let mut decoder = tiny("llama3");
    let lora = Lora::load(&golden("llama3-adapter"), &decoder.config, Device::Cpu).unwrap();
    let written = adapter(&decoder, 0.0);
    assert_eq!(lora.config, written.config);
    for ((name, tensor), (_, expected)) in lora.tensors.iter().zip(&written.tensors) {
        assert!(largest_difference(tensor, expected) < 1e-6, "{name}");
    }
    let (ids, expected) = golden_values("llama3-adapter");
    let before = decoder.logits(&ids).unwrap();
    decoder.merge(&lora).unwrap();
    let found = decoder.logits(&ids).unwrap();
    assert!(largest_difference(&found, &before) > 0.1, "the adapter does something");
    assert!(largest_difference(&found, &expected) < 1e-4, "{}", largest_difference(&found, &expected));
}

#[test]
fn weights_in_two_files_are_those_in_one() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(golden("llama2").join("config.json"), folder.path().join("config.json")).unwrap();
    let bytes = std::fs::read(golden("llama2").join("model.safetensors")).unwrap();
    let mut tensors = SafeTensors::deserialize(&bytes).unwrap().tensors();
    tensors.sort_by(|(a, _), (b, _)| a.cmp(b));
    let mut places = serde_json::Map::new();
    for (number, part) in tensors.chunks(tensors.len().div_ceil(2)).enumerate() {
        let file = format!("model-0000{}-of-00002.safetensors", number + 1);
        places.extend(part.iter().map(|(name, _)| (name.clone(), file.clone().into())));
        let body = safetensors::serialize(part.iter().map(|(name, view)| (name, view)), None).unwrap();
        std::fs::write(folder.path().join(file), body).unwrap();
    }
    let index = serde_json::json!({ "weight_map": places });
    std::fs::write(folder.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
    let load = || Decoder::load(&Checkpoint::open(folder.path())?, cpu(DtypeChoice::F32));
    let (ids, expected) = golden_values("llama2");
    let found = load().unwrap().logits(&ids).unwrap();
    assert!(largest_difference(&found, &expected) < 1e-4);
    std::fs::remove_file(folder.path().join("model-00002-of-00002.safetensors")).unwrap();
    let message = load().err().unwrap().to_string();
    assert!(message.contains("model-00002-of-00002.safetensors"), "{message}");
}

#[test]
fn an_output_of_its_own_is_kept_where_the_configuration_ties_it() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(golden("smollm2").join("config.json"), folder.path().join("config.json")).unwrap();
    let load = |output: Tensor| {
        let mut tensors = Tensor::read_safetensors(golden("smollm2").join("model.safetensors")).unwrap();
        tensors.push(("lm_head.weight".to_owned(), output));
        Tensor::write_safetensors(&tensors, folder.path().join("model.safetensors")).unwrap();
        Decoder::load(&Checkpoint::open(folder.path()).unwrap(), cpu(DtypeChoice::F32)).unwrap()
    };
    let embedding = tiny("smollm2").embedding;
    let (ids, expected) = golden_values("smollm2");
    let other = load(&embedding * 2.0);
    assert!(largest_difference(&other.logits(&ids).unwrap(), &(expected * 2.0)) < 2e-4);
    let same = load(embedding);
    assert_eq!(same.output.data_ptr(), same.embedding.data_ptr(), "one copy in memory");
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
