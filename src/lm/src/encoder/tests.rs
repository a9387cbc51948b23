//! Vectors against sentence-transformers 6.2.0; the golden files are made by tests/golden/encoder.py.

use std::path::PathBuf;

use super::*;

const CPU: Compute = Compute { device: Device::Cpu, kind: Kind::Float };

fn golden_folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("src/encoder/golden")
}

fn minilm() -> PathBuf {
    let set = std::env::var_os("DOPPEL_CACHE").map(PathBuf::from);
    let cache = set.unwrap_or_else(|| PathBuf::from(std::env::var_os("HOME").unwrap()).join(".cache/doppel"));
    cache.join("models/all-minilm-l6-v2")
}

/// The golden texts and vectors of `name`.
fn golden(name: &str) -> (Vec<String>, Vec<Vec<f32>>) {
    let text = std::fs::read_to_string(golden_folder().join(name)).unwrap();
    let value: Value = serde_json::from_str(&text).unwrap();
    let texts = serde_json::from_value(value["texts"].clone()).unwrap();
    (texts, serde_json::from_value(value["vectors"].clone()).unwrap())
}

fn difference(found: &[Vec<f32>], expected: &[Vec<f32>]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let differences = found.iter().zip(expected).flat_map(|(found, expected)| {
        assert_eq!(found.len(), expected.len());
        found.iter().zip(expected).map(|(found, expected)| (found - expected).abs())
    });
    differences.fold(0.0, |largest, difference| if difference > largest { difference } else { largest })
}

fn check(folder: &Path, vectors: &str) {
    let (texts, expected) = golden(vectors);
    assert_eq!(texts.len(), 20);
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    let encoder = Encoder::load(folder, CPU).unwrap();
    for batch_tokens in [1, 300, 100_000] {
        let found = encoder.embed(&texts, batch_tokens).unwrap();
        assert!(difference(&found, &expected) < 1e-5, "{vectors}, {batch_tokens}: {}", difference(&found, &expected));
    }
}

#[test]
fn minilm_has_the_vectors_of_sentence_transformers() {
    check(&minilm(), "minilm.json");
}

#[test]
fn t5_has_the_vectors_of_sentence_transformers() {
    check(&golden_folder().join("t5-relu"), "t5-relu.json");
    check(&golden_folder().join("t5-gated"), "t5-gated.json");
}

#[test]
fn bf16_stays_close_to_f32() {
    let (texts, expected) = golden("minilm.json");
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    let encoder = Encoder::load(&minilm(), Compute { kind: Kind::BFloat16, ..CPU }).unwrap();
    let found = encoder.embed(&texts, 2048).unwrap();
    for (found, expected) in found.iter().zip(&expected) {
        let cosine: f32 = found.iter().zip(expected).map(|(found, expected)| found * expected).sum();
        assert!(cosine > 0.995, "{cosine}");
    }
}

/// One more record in a private table moves the places of others, and the batches that they are in; if it moved their
/// vectors, too, it could move their votes.
#[test]
fn a_vector_does_not_depend_on_its_company() {
    let texts: Vec<String> = (0..60)
        .map(|text: usize| "some words, and more of them ".repeat(1 + text * 37 % 19)[text % 7..].into())
        .collect();
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    for (folder, kind) in [
        (minilm(), Kind::Float),
        (minilm(), Kind::BFloat16),
        (golden_folder().join("t5-relu"), Kind::Float),
        (golden_folder().join("t5-gated"), Kind::BFloat16),
    ] {
        let encoder = Encoder::load(&folder, Compute { kind, ..CPU }).unwrap();
        let bits = |texts: &[&str], batch_tokens: usize| -> Vec<Vec<u32>> {
            let vectors = encoder.embed(texts, batch_tokens).unwrap();
            vectors.iter().map(|vector| vector.iter().map(|value| value.to_bits()).collect()).collect()
        };
        let together = bits(&texts, 4096);
        assert!(together[1..] == bits(&texts[1..], 4096), "{folder:?}, {kind:?}: without the first");
        assert!(together == bits(&texts, 300), "{folder:?}, {kind:?}: in smaller batches");
        for text in [0, 7, 59] {
            assert!(together[text..=text] == bits(&texts[text..=text], 4096), "{folder:?}, {kind:?}: {text} alone");
        }
    }
}

#[test]
fn nothing_gives_nothing() {
    let encoder = Encoder::load(&golden_folder().join("t5-relu"), CPU).unwrap();
    assert_eq!(encoder.dimension(), 24);
    assert_eq!(encoder.embed(&[], 100).unwrap(), Vec::<Vec<f32>>::new());
}

#[test]
fn batches_are_by_length_and_bounded() {
    // Padded, these are 8, 12, 16, 8 and 8.
    assert_eq!(batches(&[3, 9, 13, 5, 1], Padding::Fours, 20), [vec![2], vec![1, 3], vec![0, 4]]);
    assert_eq!(batches(&[50], Padding::Fours, 10), [vec![0]]);
    assert!(batches(&[], Padding::Fours, 10).is_empty());
}

/// A copy of the small T5 folder that a test may spoil.
fn copy() -> tempfile::TempDir {
    let to = tempfile::tempdir().unwrap();
    let from = golden_folder().join("t5-relu");
    for name in ["modules.json", "config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"] {
        std::fs::copy(from.join(name), to.path().join(name)).unwrap();
    }
    for folder in ["1_Pooling", "2_Dense", "3_Normalize"] {
        std::fs::create_dir(to.path().join(folder)).unwrap();
        for entry in std::fs::read_dir(from.join(folder)).unwrap() {
            let entry = entry.unwrap();
            std::fs::copy(entry.path(), to.path().join(folder).join(entry.file_name())).unwrap();
        }
    }
    to
}

fn error(folder: &Path) -> String {
    Encoder::load(folder, CPU).err().unwrap().to_string()
}

#[test]
fn the_digest_follows_the_content() {
    let folder = copy();
    let digest = |folder: &Path| Encoder::load(folder, CPU).unwrap().digest().to_string();
    let first = digest(folder.path());
    assert_eq!(first, digest(copy().path()));
    let path = folder.path().join("tokenizer.json");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text + "\n").unwrap();
    assert_ne!(first, digest(folder.path()));
}

#[test]
fn the_digest_covers_weights_in_shards() {
    let folder = copy();
    let at = |name: &str| folder.path().join(name);
    let body = std::fs::read(at("model.safetensors")).unwrap();
    let names = safetensors::SafeTensors::deserialize(&body).unwrap();
    let map: serde_json::Map<String, Value> =
        names.names().into_iter().map(|n| (n.to_string(), "part-1.safetensors".into())).collect();
    std::fs::write(at("model.safetensors.index.json"), serde_json::json!({ "weight_map": map }).to_string()).unwrap();
    std::fs::rename(at("model.safetensors"), at("part-1.safetensors")).unwrap();
    let digest = || Encoder::load(folder.path(), CPU).unwrap().digest().to_string();
    let first = digest();
    let mut other = body.clone();
    *other.last_mut().unwrap() ^= 1;
    std::fs::write(at("part-1.safetensors"), other).unwrap();
    assert_ne!(first, digest());
}

#[test]
fn what_is_wrong_is_named() {
    let folder = copy();
    let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
    let read = |name: &str| std::fs::read_to_string(folder.path().join(name)).unwrap();
    let (config, pooling, modules) = (read("config.json"), read("1_Pooling/config.json"), read("modules.json"));

    write("config.json", &config.replace("\"t5\"", "\"gpt2\""));
    assert!(error(folder.path()).contains("known are bert, t5"));
    write("config.json", &config.replace("\"d_ff\": 48", "\"d_ff\": 40"));
    let message = error(folder.path());
    assert!(message.contains("wi.weight has shape [48, 32], expected [40, 32]"), "{message}");
    write("config.json", &config);

    write("1_Pooling/config.json", &pooling.replace("mean", "cls"));
    assert!(error(folder.path()).contains("expected mean pooling"));
    write("1_Pooling/config.json", &pooling);

    write("modules.json", &modules.replace("Normalize", "LSTM"));
    assert!(error(folder.path()).contains("unknown module LSTM"));
    std::fs::remove_file(folder.path().join("modules.json")).unwrap();
    assert!(error(folder.path()).contains("no modules.json"));
    write("modules.json", &modules);

    let weights = std::fs::read(folder.path().join("model.safetensors")).unwrap();
    std::fs::write(folder.path().join("model.safetensors"), &weights[..weights.len() - 5]).unwrap();
    assert!(error(folder.path()).contains("cut short"));
}

#[test]
fn a_prompt_before_every_text_is_refused() {
    let folder = copy();
    let write = |prompt: &str| {
        let text = serde_json::json!({ "prompts": { "query": prompt }, "default_prompt_name": "query" }).to_string();
        std::fs::write(folder.path().join("config_sentence_transformers.json"), text).unwrap();
    };
    write("");
    Encoder::load(folder.path(), CPU).map(drop).unwrap();
    write("query: ");
    let told = error(folder.path());
    assert!(told.contains("default_prompt_name: found \"query\", expected none"), "{told}");
}

/// Sets keys of a JSON file that a folder has, or gets.
fn set(folder: &Path, name: &str, settings: Value) {
    let path = folder.join(name);
    let mut value = if path.is_file() { read_json(&path).unwrap() } else { serde_json::json!({}) };
    value.as_object_mut().unwrap().extend(settings.as_object().unwrap().clone());
    std::fs::write(path, value.to_string()).unwrap();
}

#[test]
fn vectors_that_would_be_cut_are_refused() {
    let folder = copy();
    let cut = |to: Value| {
        set(folder.path(), "config_sentence_transformers.json", serde_json::json!({ "truncate_dim": to }));
    };
    cut(Value::Null);
    Encoder::load(folder.path(), CPU).map(drop).unwrap();
    cut(16.into());
    let told = error(folder.path());
    assert!(told.contains("config_sentence_transformers.json: truncate_dim: found 16, expected none"), "{told}");
}

#[test]
fn steps_that_are_not_a_plain_chain_are_refused() {
    for (name, key, value, told) in [
        ("2_Dense", "use_residual", Value::from(true), "found true, expected false"),
        ("2_Dense", "module_input_name", "token_embeddings".into(), "found \"token_embeddings\", expected \"sentence_"),
        ("2_Dense", "module_output_name", "projected".into(), "found \"projected\", expected \"sentence_embedding\""),
        (
            "3_Normalize",
            "module_input_name",
            "projected".into(),
            "found \"projected\", expected \"sentence_embedding\"",
        ),
    ] {
        let folder = copy();
        let file = format!("{name}/config.json");
        set(folder.path(), &file, serde_json::json!({ key: Value::Null }));
        Encoder::load(folder.path(), CPU).map(drop).unwrap();
        set(folder.path(), &file, serde_json::json!({ key: value }));
        let message = error(folder.path());
        assert!(message.contains(&format!("{file}: {key}: {told}")) && message.contains("help: "), "{message}");
    }
}

#[test]
fn a_limit_that_is_null_leaves_the_tokenizers() {
    let folder = copy();
    set(folder.path(), "tokenizer_config.json", serde_json::json!({ "model_max_length": 9 }));
    let tokens = |limit: Value| {
        set(folder.path(), "sentence_bert_config.json", serde_json::json!({ "max_seq_length": limit }));
        let encoder = Encoder::load(folder.path(), CPU).unwrap();
        encoder.tokenizer.encode(&"a word ".repeat(20), true).unwrap().len()
    };
    assert_eq!(tokens(Value::Null), 9);
    assert_eq!(tokens(7.into()), 7);
}

#[test]
fn a_limit_without_room_for_a_word_is_refused() {
    // T5 ends a text with one token.
    let folder = copy();
    for limit in [0, 1] {
        set(folder.path(), "sentence_bert_config.json", serde_json::json!({ "max_seq_length": limit }));
        let told = error(folder.path());
        assert!(told.contains(&format!("found {limit}, expected more than 1, ")), "{told}");
    }
    set(folder.path(), "sentence_bert_config.json", serde_json::json!({ "max_seq_length": 2 }));
    Encoder::load(folder.path(), CPU).map(drop).unwrap();
}

#[test]
fn a_token_that_the_model_was_not_given_is_refused() {
    let folder = copy();
    let path = folder.path().join("tokenizer.json");
    let mut tokenizer = read_json(&path).unwrap();
    let added = serde_json::json!({
        "id": 259, "content": "<extra>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
        "special": false,
    });
    tokenizer["added_tokens"].as_array_mut().unwrap().push(added);
    std::fs::write(&path, tokenizer.to_string()).unwrap();
    let told = error(folder.path());
    assert!(told.contains("\"<extra>\" has id 259, outside the model's vocabulary of 259"), "{told}");
}

#[test]
fn heads_that_do_not_fill_a_row_are_refused() {
    let text = std::fs::read_to_string(minilm().join("config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&text).unwrap();
    assert!(bert::BertConfig::read(Path::new("config.json"), &config).is_ok());
    config["num_attention_heads"] = 7.into();
    let message = bert::BertConfig::read(Path::new("config.json"), &config).map(|_| ()).unwrap_err().to_string();
    assert!(
        message.contains("config.json: num_attention_heads: found 7, expected a divisor of hidden_size 384"),
        "{message}"
    );
}
