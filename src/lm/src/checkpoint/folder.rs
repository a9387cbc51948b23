//! `config.json` and its neighbours in a Hugging Face folder.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::{DecoderConfig, Llama3Scaling, weights::weight_files};
use crate::LmError;

/// Architectures that [`crate::decoder`] computes, as `config.json` calls them (`model_type`).
const KNOWN: [&str; 2] = ["llama", "qwen2"];

/// Reads a JSON file; the error names the file and the place, never its content.
pub(crate) fn read_json(path: &Path) -> Result<Value, LmError> {
    let text = std::fs::read(path)
        .map_err(|error| LmError::Malformed(format!("{}: {error}\nhelp: download the model again", path.display())))?;
    serde_json::from_slice(&text).map_err(|error| {
        LmError::Malformed(format!(
            "{}: not JSON: line {}, column {}\nhelp: download the model again",
            path.display(),
            error.line(),
            error.column()
        ))
    })
}

/// The decoder that `config.json` describes, with the end tokens of `generation_config.json`.
pub(super) fn decoder_config(folder: &Path, config: &Value) -> Result<DecoderConfig, LmError> {
    let fields = Fields { path: folder.join("config.json"), object: config };
    let model_type = fields.text("model_type")?;
    if !KNOWN.contains(&model_type) {
        return Err(LmError::Malformed(format!(
            "{}: model_type {model_type:?} is not a known architecture\nhelp: known are {}",
            fields.path.display(),
            KNOWN.join(", ")
        )));
    }
    let qwen2 = model_type == "qwen2";
    fields.refuse("hidden_act", |value| value != "silu", "silu")?;
    fields.refuse("attention_bias", |value| value == true, "false")?;
    fields.refuse("mlp_bias", |value| value == true, "false")?;
    fields.refuse("use_sliding_window", |value| value == true, "false")?;
    fields.refuse("quantization_config", |value| !value.is_null(), "no quantisation; use the original, or GGUF")?;
    let hidden_size = fields.size("hidden_size")?;
    let heads = fields.size("num_attention_heads")?;
    let rope = fields.rope()?;
    Ok(DecoderConfig {
        hidden_size,
        intermediate_size: fields.size("intermediate_size")?,
        layers: fields.size("num_hidden_layers")?,
        heads,
        kv_heads: fields.optional_size("num_key_value_heads")?.unwrap_or(heads),
        head_dim: fields.optional_size("head_dim")?.unwrap_or(hidden_size / heads),
        vocab_size: fields.size("vocab_size")?,
        rms_norm_eps: fields.number("rms_norm_eps")?.unwrap_or(1e-6),
        rope_theta: rope.theta,
        rope_scaling: rope.scaling,
        max_positions: fields.size("max_position_embeddings")?,
        tied_embeddings: config.get("tie_word_embeddings").and_then(Value::as_bool).unwrap_or(false),
        qkv_bias: qwen2,
        eos: end_tokens(folder, config)?,
    })
}

/// Ids that end a text: those of `generation_config.json`, then those of `config.json`.
fn end_tokens(folder: &Path, config: &Value) -> Result<Vec<i64>, LmError> {
    let path = folder.join("generation_config.json");
    let generation = if path.is_file() { read_json(&path)? } else { Value::Null };
    let mut ids = Vec::new();
    for value in [generation.get("eos_token_id"), config.get("eos_token_id")].into_iter().flatten() {
        let listed = value.as_array().map(Vec::as_slice).unwrap_or(std::slice::from_ref(value));
        for id in listed.iter().filter_map(Value::as_i64) {
            if !ids.contains(&id) {
                ids.push(id);
            }
        }
    }
    Ok(ids)
}

struct Rope {
    theta: f64,
    scaling: Option<Llama3Scaling>,
}

/// Fields of one JSON object, with errors that name the file and the field.
struct Fields<'a> {
    path: PathBuf,
    object: &'a Value,
}

impl Fields<'_> {
    fn malformed(&self, field: &str, found: Option<&Value>, expected: &str) -> LmError {
        let found = found.map_or("nothing".to_string(), Value::to_string);
        LmError::Malformed(format!(
            "{}: {field}: found {found}, expected {expected}\n\
             help: check that this is the configuration of a supported model",
            self.path.display()
        ))
    }

    fn text(&self, field: &str) -> Result<&str, LmError> {
        let value = self.object.get(field);
        value.and_then(Value::as_str).ok_or_else(|| self.malformed(field, value, "a string"))
    }

    fn size(&self, field: &str) -> Result<i64, LmError> {
        self.optional_size(field)?.ok_or_else(|| self.malformed(field, None, "a positive integer"))
    }

    fn optional_size(&self, field: &str) -> Result<Option<i64>, LmError> {
        match self.object.get(field) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match value.as_i64().filter(|&size| size > 0 && size <= i64::from(i32::MAX)) {
                Some(size) => Ok(Some(size)),
                None => Err(self.malformed(field, Some(value), "a positive integer")),
            },
        }
    }

    fn number(&self, field: &str) -> Result<Option<f64>, LmError> {
        match self.object.get(field) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match value.as_f64().filter(|number| number.is_finite() && *number > 0.0) {
                Some(number) => Ok(Some(number)),
                None => Err(self.malformed(field, Some(value), "a positive number")),
            },
        }
    }

    fn required_number(&self, field: &str) -> Result<f64, LmError> {
        self.number(field)?.ok_or_else(|| self.malformed(field, None, "a positive number"))
    }

    fn refuse(&self, field: &str, refused: impl Fn(&Value) -> bool, expected: &str) -> Result<(), LmError> {
        match self.object.get(field) {
            Some(value) if refused(value) => Err(self.malformed(field, Some(value), expected)),
            _ => Ok(()),
        }
    }

    /// `rope_parameters` of transformers 5, or `rope_theta` and `rope_scaling` of older versions.
    fn rope(&self) -> Result<Rope, LmError> {
        let parameters = self.object.get("rope_parameters").filter(|value| !value.is_null());
        let scaling = parameters.or_else(|| self.object.get("rope_scaling")).filter(|value| !value.is_null());
        let theta = match parameters {
            Some(object) => Fields { path: self.path.clone(), object }.number("rope_theta")?,
            None => None,
        };
        let theta = theta.or(self.number("rope_theta")?).unwrap_or(10_000.0);
        let Some(object) = scaling else { return Ok(Rope { theta, scaling: None }) };
        let fields = Fields { path: self.path.clone(), object };
        let kind = object.get("rope_type").or_else(|| object.get("type"));
        let scaling = match kind.and_then(Value::as_str) {
            None | Some("default") => None,
            Some("llama3") => Some(Llama3Scaling {
                factor: fields.required_number("factor")?,
                low_freq_factor: fields.required_number("low_freq_factor")?,
                high_freq_factor: fields.required_number("high_freq_factor")?,
                original_max_positions: fields.required_number("original_max_position_embeddings")?,
            }),
            Some(_) => return Err(self.malformed("rope_scaling.rope_type", kind, "default or llama3")),
        };
        Ok(Rope { theta, scaling })
    }
}

/// BLAKE3 over the names and contents of the files that a result depends on.
pub(super) fn digest(folder: &Path) -> Result<String, LmError> {
    let mut names = weight_files(folder)?;
    let settings = [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
    ];
    names.extend(settings.iter().filter(|name| folder.join(name).is_file()).map(|name| name.to_string()));
    digest_of(folder, &names)
}

/// BLAKE3 over `names` and the contents of those files of `folder`, hex.
pub(crate) fn digest_of(folder: &Path, names: &[String]) -> Result<String, LmError> {
    let mut hasher = blake3::Hasher::new();
    for name in names {
        let path = folder.join(name);
        let mut file =
            std::fs::File::open(&path).map_err(|error| LmError::Malformed(format!("{}: {error}", path.display())))?;
        let mut content = blake3::Hasher::new();
        content.update_reader(&mut file).map_err(|error| LmError::Malformed(format!("{}: {error}", path.display())))?;
        // A digest per file keeps one file's end from passing for the next one's beginning.
        hasher.update(&(name.len() as u64).to_le_bytes()).update(name.as_bytes());
        hasher.update(content.finalize().as_bytes());
    }
    Ok(hasher.finalize().to_hex().to_string())
}
