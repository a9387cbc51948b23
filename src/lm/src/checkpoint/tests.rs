//! Folders and GGUF files as callers see them. Logits of whole models against transformers are the decoder's tests.

use std::path::PathBuf;

use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};
use tch::{Device, Kind};

use super::*;

const CPU: Compute = Compute { device: Device::Cpu, kind: Kind::Float };

fn config() -> Value {
    json!({
        "model_type": "llama", "hidden_act": "silu", "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 11, "rms_norm_eps": 1e-5, "rope_theta": 5e5,
        "max_position_embeddings": 64, "tie_word_embeddings": true, "eos_token_id": 2, "bos_token_id": 1,
    })
}

/// A folder with this configuration and one tensor `x` of each kind.
fn folder(config: &Value) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    let floats: Vec<u8> = [1.5f32, -2.0, 0.25, 8.0].iter().flat_map(|value| value.to_le_bytes()).collect();
    let halves: Vec<u8> = [1.5f32, -2.0].iter().flat_map(|value| half::f16::from_f32(*value).to_le_bytes()).collect();
    let brain: Vec<u8> = [1.5f32, -2.0].iter().flat_map(|value| half::bf16::from_f32(*value).to_le_bytes()).collect();
    let views = [
        ("f32", TensorView::new(Dtype::F32, vec![2, 2], &floats).unwrap()),
        ("f16", TensorView::new(Dtype::F16, vec![2], &halves).unwrap()),
        ("bf16", TensorView::new(Dtype::BF16, vec![2], &brain).unwrap()),
        ("i16", TensorView::new(Dtype::I16, vec![2], &halves).unwrap()),
    ];
    std::fs::write(folder.path().join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
    folder
}

fn error(result: Result<impl Sized, LmError>) -> String {
    match result {
        Ok(_) => panic!("expected an error"),
        Err(error) => error.to_string(),
    }
}

fn config_of(value: &Value) -> Result<DecoderConfig, LmError> {
    Checkpoint::open(folder(value).path()).unwrap().decoder_config()
}

fn with(field: &str, value: Value) -> Value {
    let mut config = config();
    config[field] = value;
    config
}

#[test]
fn tensors_come_in_the_kind_asked_for() {
    let folder = folder(&config());
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let values = |name: &str, shape: &[i64], kind| {
        let tensor = checkpoint.tensor(name, shape, Compute { kind, ..CPU }).unwrap();
        assert_eq!(tensor.kind(), kind);
        Vec::<f32>::try_from(tensor.to_kind(Kind::Float).reshape([-1])).unwrap()
    };
    for kind in [Kind::Float, Kind::BFloat16] {
        assert_eq!(values("f32", &[2, 2], kind), [1.5, -2.0, 0.25, 8.0]);
        assert_eq!(values("f16", &[2], kind), [1.5, -2.0]);
        assert_eq!(values("bf16", &[2], kind), [1.5, -2.0]);
    }
    assert!(checkpoint.has("f32") && !checkpoint.has("f64"));
}

#[test]
fn a_tensor_outlives_its_file() {
    let folder = folder(&config());
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let tensor = checkpoint.tensor("f32", &[2, 2], CPU).unwrap();
    drop((checkpoint, folder));
    assert_eq!(f64::try_from(tensor.sum(Kind::Float)).unwrap(), 7.75);
}

#[test]
fn a_wrong_tensor_is_named_with_what_was_expected() {
    let folder = folder(&config());
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let message = error(checkpoint.tensor("f32", &[4], CPU));
    assert!(message.contains("model.safetensors: tensor f32 has shape [2, 2], expected [4]"), "{message}");
    assert!(error(checkpoint.tensor("model.norm.weight", &[8], CPU)).contains("no tensor model.norm.weight"));
    assert!(error(checkpoint.tensor("i16", &[2], CPU)).contains("expected F32, F16 or BF16"));
}

#[test]
fn a_file_cut_short_is_an_error_wherever_it_ends() {
    let folder = folder(&config());
    let path = folder.path().join("model.safetensors");
    let whole = std::fs::read(&path).unwrap();
    for length in [0, 7, 20, whole.len() - 1] {
        std::fs::write(&path, &whole[..length]).unwrap();
        let message = error(Checkpoint::open(folder.path()));
        assert!(message.contains("model.safetensors") && message.contains("cut short"), "{length}: {message}");
    }
}

#[test]
fn shards_are_found_by_their_index() {
    let folder = folder(&config());
    std::fs::rename(folder.path().join("model.safetensors"), folder.path().join("a.safetensors")).unwrap();
    let index = |file: &str| {
        let index = json!({ "weight_map": { "f32": file, "f16": "a.safetensors" } });
        std::fs::write(folder.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
        Checkpoint::open(folder.path())
    };
    assert!(index("a.safetensors").unwrap().has("f16"));
    assert!(error(index("b.safetensors")).contains("b.safetensors"));
    assert!(error(index("../b.safetensors")).contains("weight_map"));
}

#[test]
fn a_configuration_is_read_in_both_layouts() {
    let old = config_of(&config()).unwrap();
    assert_eq!((old.rope_theta, old.head_dim, old.kv_heads), (5e5, 4, 1));
    assert_eq!((old.eos.as_slice(), old.qkv_bias), (&[2][..], false));
    let scaling = json!({ "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192 });
    let scaled = config_of(&with("rope_scaling", scaling.clone())).unwrap();
    let mut parameters = scaling;
    parameters["rope_theta"] = json!(5e5);
    let new = config_of(&with("rope_parameters", parameters)).unwrap();
    assert_eq!(scaled, new);
    let expected =
        Llama3Scaling { factor: 32.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_max_positions: 8192.0 };
    assert_eq!(new.rope_scaling, Some(expected));
    assert!(config_of(&with("model_type", json!("qwen2"))).unwrap().qkv_bias);
}

#[test]
fn end_tokens_of_both_files_count() {
    let folder = folder(&with("eos_token_id", json!([2, 7])));
    let generation = json!({ "eos_token_id": [5, 2] });
    std::fs::write(folder.path().join("generation_config.json"), generation.to_string()).unwrap();
    assert_eq!(Checkpoint::open(folder.path()).unwrap().decoder_config().unwrap().eos, [5, 2, 7]);
}

#[test]
fn what_the_decoder_cannot_compute_is_refused() {
    let unknown = error(config_of(&with("model_type", json!("mamba"))));
    assert!(unknown.contains("\"mamba\"") && unknown.contains("known are llama, qwen2"), "{unknown}");
    for (field, value) in [
        ("hidden_act", json!("gelu")),
        ("attention_bias", json!(true)),
        ("rope_scaling", json!({ "rope_type": "yarn", "factor": 2.0 })),
        ("quantization_config", json!({ "bits": 4 })),
        ("hidden_size", json!(-1)),
        ("num_hidden_layers", json!(null)),
        ("rms_norm_eps", json!("x")),
    ] {
        let message = error(config_of(&with(field, value)));
        assert!(message.contains(field) && message.contains("help:"), "{message}");
    }
}

#[test]
fn a_folder_that_is_no_model_says_what_one_is() {
    let folder = tempfile::tempdir().unwrap();
    assert!(error(Checkpoint::open(folder.path())).contains("neither config.json nor a .gguf file"));
    assert!(error(Checkpoint::open(&folder.path().join("absent"))).contains("absent"));
    std::fs::write(folder.path().join("config.json"), "{").unwrap();
    assert!(error(Checkpoint::open(folder.path())).contains("config.json: not JSON: line 1, column 1"));
    std::fs::write(folder.path().join("config.json"), "{}").unwrap();
    assert!(error(Checkpoint::open(folder.path())).contains("neither model.safetensors"));
}

#[test]
fn the_digest_follows_the_content_and_not_the_place() {
    let (first, second) = (folder(&config()), folder(&config()));
    let digest = |folder: &tempfile::TempDir| Checkpoint::open(folder.path()).unwrap().digest().unwrap();
    assert_eq!(digest(&first), digest(&second));
    assert_ne!(digest(&first), digest(&folder(&with("rms_norm_eps", json!(1e-6)))));
    std::fs::write(first.path().join("special_tokens_map.json"), "{}").unwrap();
    assert_ne!(digest(&first), digest(&second));
}

fn smollm2() -> Checkpoint {
    let set = std::env::var_os("DOPPEL_CACHE").map(PathBuf::from);
    let cache = set.unwrap_or_else(|| PathBuf::from(std::env::var_os("HOME").unwrap()).join(".cache/doppel"));
    Checkpoint::open(&cache.join("models/smollm2-135m-instruct")).unwrap()
}

#[test]
fn the_configuration_of_a_gguf_file() {
    // The published config.json of HuggingFaceTB/SmolLM2-135M-Instruct.
    let config = smollm2().decoder_config().unwrap();
    assert_eq!((config.hidden_size, config.intermediate_size, config.layers), (576, 1536, 30));
    assert_eq!((config.heads, config.kv_heads, config.head_dim, config.vocab_size), (9, 3, 64, 49152));
    assert_eq!((config.rope_theta, config.max_positions, config.tied_embeddings), (100_000.0, 8192, true));
    assert_eq!((config.eos.as_slice(), config.qkv_bias), (&[2][..], false));
    assert!((config.rms_norm_eps - 1e-5).abs() < 1e-9 && config.rope_scaling.is_none());
}

#[test]
fn gguf_tensors_have_hugging_face_names_and_row_order() {
    let checkpoint = smollm2();
    assert!(checkpoint.has("model.layers.29.mlp.down_proj.weight") && !checkpoint.has("lm_head.weight"));
    // transformers 5.23.0, AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf"), float32:
    // model.layers[3].self_attn.{q,k}_proj.weight[[0, 1, 33, 100], 5]
    let check = |name: &str, rows: i64, expected: [f32; 4]| {
        let tensor = checkpoint.tensor(name, &[rows, 576], CPU).unwrap();
        let found = [0, 1, 33, 100].map(|row| f32::try_from(tensor.get(row).get(5)).unwrap());
        assert_eq!(found, expected, "{name}");
    };
    check("model.layers.3.self_attn.q_proj.weight", 576, [0.190_246_58, 0.040_283_203, 0.038_543_7, 0.233_703_61]);
    check("model.layers.3.self_attn.k_proj.weight", 192, [0.113_739_01, -0.087_829_59, 0.370_727_54, -0.280_761_72]);
}
