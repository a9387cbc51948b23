//! Checkpoints: Hugging Face folders (safetensors, single or sharded) and GGUF files, as named tensors.
//!
//! Both look the same from outside: tensors have Hugging Face's names and row order, and the architecture is a
//! [`DecoderConfig`]. Files are memory-mapped; a tensor's bytes are copied once, to where it will be used.

pub(crate) mod folder;
mod llama_gguf;
mod weights;

use std::path::{Path, PathBuf};

use crate::gguf::Gguf;
use crate::{LmError, device::Compute, tokenizer::Tokenizer};

pub(crate) use folder::{digest_of, read_json};
pub(crate) use weights::{Weights, weight_files};

/// Llama-family architecture as `config.json` (or GGUF metadata) describes it.
#[derive(Clone, Debug, PartialEq)]
pub struct DecoderConfig {
    /// Width.
    pub hidden_size: i64,
    /// SwiGLU width.
    pub intermediate_size: i64,
    /// Number of layers.
    pub layers: i64,
    /// Query heads.
    pub heads: i64,
    /// Key-value heads.
    pub kv_heads: i64,
    /// Width of a head.
    pub head_dim: i64,
    /// Vocabulary.
    pub vocab_size: i64,
    /// RMSNorm epsilon.
    pub rms_norm_eps: f64,
    /// RoPE base.
    pub rope_theta: f64,
    /// Llama 3 scaling, if any.
    pub rope_scaling: Option<Llama3Scaling>,
    /// Longest context.
    pub max_positions: i64,
    /// Whether the output product reuses the embedding, unless the weights have another output.
    pub tied_embeddings: bool,
    /// Whether q, k, v have a bias (Qwen2).
    pub qkv_bias: bool,
    /// Token ids that end a text, the generation configuration's first.
    pub eos: Vec<i64>,
}

/// Llama 3's RoPE frequency scaling.
#[derive(Clone, Debug, PartialEq)]
pub struct Llama3Scaling {
    /// factor
    pub factor: f64,
    /// low_freq_factor
    pub low_freq_factor: f64,
    /// high_freq_factor
    pub high_freq_factor: f64,
    /// original_max_position_embeddings
    pub original_max_positions: f64,
}

/// A checkpoint opened for reading: names are Hugging Face's (`model.layers.0.self_attn.q_proj.weight`), for GGUF too.
pub struct Checkpoint {
    location: PathBuf,
    source: Source,
}

enum Source {
    Folder { config: serde_json::Value, weights: Weights },
    Gguf(Gguf),
}

impl Checkpoint {
    /// Opens `path`: a folder with `config.json` and safetensors, a folder with one `.gguf`, or a `.gguf` file.
    pub fn open(path: &Path) -> Result<Self, LmError> {
        let source = match gguf_file(path)? {
            Some(file) => Source::Gguf(Gguf::open(&file)?),
            None => Source::Folder { config: read_json(&path.join("config.json"))?, weights: Weights::open(path)? },
        };
        Ok(Self { location: path.to_path_buf(), source })
    }

    /// The decoder's configuration; an unknown architecture is an error that lists the known ones.
    pub fn decoder_config(&self) -> Result<DecoderConfig, LmError> {
        match &self.source {
            Source::Folder { config, .. } => folder::decoder_config(&self.location, config),
            Source::Gguf(gguf) => llama_gguf::decoder_config(gguf),
        }
    }

    /// Loads one tensor in `compute`'s kind and device (dequantised; GGUF q/k row permutation undone); checks `shape`.
    pub fn tensor(&self, name: &str, shape: &[i64], compute: Compute) -> Result<tch::Tensor, LmError> {
        match &self.source {
            Source::Folder { weights, .. } => weights.tensor(name, shape, compute),
            Source::Gguf(gguf) => llama_gguf::tensor(gguf, name, shape, compute),
        }
    }

    /// Whether a tensor of that name exists.
    pub fn has(&self, name: &str) -> bool {
        match &self.source {
            Source::Folder { weights, .. } => weights.has(name),
            Source::Gguf(gguf) => llama_gguf::gguf_name(name).is_some_and(|name| gguf.has(&name)),
        }
    }

    /// The tokenizer from `tokenizer.json` or GGUF metadata; none is an error that says where it was looked for.
    pub fn tokenizer(&self) -> Result<Tokenizer, LmError> {
        match &self.source {
            Source::Folder { .. } => Tokenizer::from_folder(&self.location),
            Source::Gguf(gguf) => Tokenizer::from_gguf(gguf),
        }
    }

    /// BLAKE3 of the files, hex: the model's identity in manifests. It covers what a result depends on (weights,
    /// configuration, tokenizer) and neither the folder's name nor a README.
    pub fn digest(&self) -> Result<String, LmError> {
        match &self.source {
            Source::Folder { .. } => folder::digest(&self.location),
            Source::Gguf(gguf) => Ok(blake3::hash(gguf.bytes()).to_hex().to_string()),
        }
    }
}

/// The GGUF file that `path` is or holds; `None` for a Hugging Face folder.
fn gguf_file(path: &Path) -> Result<Option<PathBuf>, LmError> {
    let is_gguf = |path: &Path| path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"));
    if path.is_file() {
        if is_gguf(path) {
            return Ok(Some(path.to_path_buf()));
        }
        return Err(LmError::Malformed(format!(
            "{}: expected a folder with config.json and safetensors, or a .gguf file\n\
             help: give --model the folder that holds the file",
            path.display()
        )));
    }
    let entries = std::fs::read_dir(path).map_err(|error| {
        LmError::Malformed(format!("{}: {error}\nhelp: check the path of the model", path.display()))
    })?;
    let mut found: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).filter(|path| is_gguf(path)).collect();
    found.sort();
    if path.join("config.json").is_file() {
        return Ok(None);
    }
    match found.as_slice() {
        [file] => Ok(Some(file.clone())),
        [] => Err(LmError::Malformed(format!(
            "{}: neither config.json nor a .gguf file is there\n\
             help: a model is a Hugging Face folder (config.json, tokenizer.json, *.safetensors) or a GGUF file",
            path.display()
        ))),
        many => Err(LmError::Malformed(format!(
            "{}: {} .gguf files, expected one\nhelp: give --model the path of the file to use",
            path.display(),
            many.len()
        ))),
    }
}

#[cfg(test)]
mod tests;
