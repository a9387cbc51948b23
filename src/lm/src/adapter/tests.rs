//! Adapters as PEFT folders: what round-trips, and which folders are refused.

use std::path::PathBuf;

use super::*;
use crate::decoder::tests::{adapter, largest_difference, tiny};

fn folder(name: &str, files: &[(String, Vec<u8>)]) -> PathBuf {
    let folder = std::env::temp_dir().join(format!("doppel-lm-adapter-{name}-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    for (name, body) in files {
        std::fs::write(folder.join(name), body).unwrap();
    }
    folder
}

fn load(name: &str, files: &[(String, Vec<u8>)], decoder: &DecoderConfig) -> Result<Lora, String> {
    let folder = folder(name, files);
    let found = Lora::load(&folder, decoder, Device::Cpu).map_err(|error| error.to_string());
    std::fs::remove_dir_all(folder).unwrap();
    found
}

fn config(targets: &[Target]) -> LoraConfig {
    LoraConfig { rank: 4, alpha: 8.0, targets: targets.to_vec(), dropout: 0.0 }
}

#[test]
fn a_folder_round_trips() {
    let decoder = tiny("llama3");
    let lora = adapter(&decoder, 0.1);
    let files = lora.to_peft("base").unwrap();
    let found = load("round", &files, &decoder.config).unwrap();
    assert_eq!(found.config, lora.config);
    for ((name, tensor), (other, loaded)) in lora.tensors.iter().zip(&found.tensors) {
        assert_eq!(name, other);
        assert_eq!(largest_difference(tensor, loaded), 0.0);
    }
}

#[test]
fn names_and_shapes_are_pefts() {
    let decoder = tiny("llama3").config;
    let lora = Lora::new(config(&[Target::V, Target::Q]), &decoder, Device::Cpu, 1).unwrap();
    let first: Vec<(&str, Vec<i64>)> =
        lora.tensors.iter().take(4).map(|(name, tensor)| (name.as_str(), tensor.size())).collect();
    let prefix = "base_model.model.model.layers.0.self_attn";
    let expected = [
        (format!("{prefix}.q_proj.lora_A.weight"), vec![4, 32]),
        (format!("{prefix}.q_proj.lora_B.weight"), vec![32, 4]),
        (format!("{prefix}.v_proj.lora_A.weight"), vec![4, 32]),
        (format!("{prefix}.v_proj.lora_B.weight"), vec![16, 4]),
    ];
    assert_eq!(first, expected.iter().map(|(name, shape)| (name.as_str(), shape.clone())).collect::<Vec<_>>());
    assert_eq!(lora.tensors.len(), 2 * 2 * 2);
}

#[test]
fn the_start_is_a_function_of_the_seed() {
    let decoder = tiny("llama3").config;
    let make = |seed| Lora::new(config(&[Target::Q]), &decoder, Device::Cpu, seed).unwrap();
    let (one, same, other) = (make(1), make(1), make(2));
    let a = |lora: &Lora| Vec::<f32>::try_from(lora.tensors[0].1.flatten(0, -1)).unwrap();
    assert_eq!(a(&one), a(&same));
    assert_ne!(a(&one), a(&other));
    // A value that must not move with a new version: runs name the seed alone.
    let bound = 1.0 / 32f32.sqrt();
    assert!(a(&one).iter().all(|value| value.abs() <= bound));
    let mean: f32 = a(&one).iter().map(|value| value.abs()).sum::<f32>() / a(&one).len() as f32;
    assert!((mean / bound - 0.5).abs() < 0.1, "{mean}");
    assert_eq!(one.tensors[1].1.abs().max().double_value(&[]), 0.0, "B begins at zero");
}

#[test]
fn an_adapter_for_another_model_is_refused() {
    let (decoder, other) = (tiny("llama3"), tiny("smollm2"));
    let files = adapter(&decoder, 0.0).to_peft("base").unwrap();
    let message = load("other", &files, &other.config).err().unwrap();
    for part in ["q_proj.lora_A", "[3, 32]", "[3, 48]", "help:"] {
        assert!(message.contains(part), "{part} in {message}");
    }
    let mut shallow = decoder.config.clone();
    shallow.layers = 1;
    let message = load("shallow", &files, &shallow).err().unwrap();
    assert!(message.contains("layers.1.") && message.contains("1 layers"), "{message}");
    let mut deep = decoder.config.clone();
    deep.layers = 3;
    let message = load("deep", &files, &deep).err().unwrap();
    assert!(message.contains("no tensor") && message.contains("layers.2."), "{message}");
}

#[test]
fn what_would_change_the_meaning_is_refused() {
    let decoder = tiny("llama3");
    let files = adapter(&decoder, 0.0).to_peft("base").unwrap();
    for (key, value) in [
        ("use_dora", json!(true)),
        ("use_rslora", json!(true)),
        ("bias", json!("all")),
        ("target_modules", json!(["gate_proj"])),
        ("target_modules", json!([])),
        ("rank_pattern", json!({"q_proj": 2})),
        ("alora_invocation_tokens", json!([5, 6])),
        ("r", json!(0)),
        ("r", json!("four")),
        ("peft_type", json!("IA3")),
    ] {
        let mut config: Value = serde_json::from_slice(&files[0].1).unwrap();
        config[key] = value;
        let changed = [(CONFIG.to_string(), config.to_string().into_bytes()), files[1].clone()];
        let message = load(&format!("meaning-{key}"), &changed, &decoder.config).err().unwrap();
        assert!(message.contains(CONFIG) && message.contains("help:"), "{key}: {message}");
    }
}

#[test]
fn a_file_cut_short_is_refused() {
    let decoder = tiny("llama3");
    let mut files = adapter(&decoder, 0.0).to_peft("base").unwrap();
    let half = files[1].1.len() / 2;
    files[1].1.truncate(half);
    let message = load("cut", &files, &decoder.config).err().unwrap();
    assert!(message.contains(WEIGHTS) && message.contains("cut short"), "{message}");
}

#[test]
fn odd_settings_are_usage_errors() {
    let decoder = tiny("llama3").config;
    let base = config(&[Target::Q]);
    for odd in [
        LoraConfig { rank: 0, ..base.clone() },
        LoraConfig { alpha: f64::NAN, ..base.clone() },
        LoraConfig { alpha: 0.0, ..base.clone() },
        LoraConfig { targets: vec![], ..base.clone() },
        LoraConfig { dropout: 1.0, ..base.clone() },
    ] {
        let error = Lora::new(odd, &decoder, Device::Cpu, 0).err().unwrap();
        assert!(matches!(error, LmError::Usage(_)), "{error}");
    }
}
