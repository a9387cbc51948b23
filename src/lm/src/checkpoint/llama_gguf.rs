//! What a GGUF file of the Llama family means in Hugging Face's terms: configuration, tensor names, row order.
//!
//! llama.cpp rotates pairs of neighbouring rows where Hugging Face rotates halves, so its converter permutes the rows
//! of q and k for architecture `llama` (not for `qwen2`); loading undoes it. The converter is
//! `convert_hf_to_gguf.py`, `LlamaModel.permute`; the inverse is `LlamaTensorProcessor` in transformers'
//! `modeling_gguf_pytorch_utils.py`.

use tch::{Device, Kind, Tensor};

use super::{DecoderConfig, Llama3Scaling};
use crate::gguf::Gguf;
use crate::{LmError, device::Compute};

/// Architectures that [`crate::decoder`] computes, as GGUF calls them (`general.architecture`).
const KNOWN: [&str; 2] = ["llama", "qwen2"];

/// Modules of a layer, as Hugging Face and as GGUF call them.
const MODULES: [(&str, &str); 9] = [
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
];

/// Tensors of a file that belong to no layer.
const OUTSIDE_LAYERS: [&str; 4] = ["token_embd.weight", "output_norm.weight", "output.weight", "rope_freqs.weight"];

/// The decoder that the metadata describes.
pub(super) fn decoder_config(gguf: &Gguf) -> Result<DecoderConfig, LmError> {
    let architecture = architecture(gguf)?;
    let key = |name: &str| format!("{architecture}.{name}");
    refuse_other_rope(gguf, &key("rope"))?;
    let heads = gguf.size(&key("attention.head_count"))?;
    let hidden_size = gguf.size(&key("embedding_length"))?;
    let head_dim = gguf.optional_size(&key("attention.key_length"))?.unwrap_or(hidden_size / heads);
    let rope_theta = gguf.number(&key("rope.freq_base"))?.unwrap_or(10_000.0);
    let layers = gguf.size(&key("block_count"))?;
    refuse_other_tensors(gguf, layers)?;
    Ok(DecoderConfig {
        hidden_size,
        intermediate_size: gguf.size(&key("feed_forward_length"))?,
        layers,
        heads,
        kv_heads: gguf.optional_size(&key("attention.head_count_kv"))?.unwrap_or(heads),
        head_dim,
        // The embedding's own rows are the vocabulary: llama.cpp writes `vocab_size` only for some architectures.
        vocab_size: gguf.shape("token_embd.weight")?.first().copied().unwrap_or_default(),
        rms_norm_eps: gguf.required_number(&key("attention.layer_norm_rms_epsilon"))?,
        rope_theta,
        rope_scaling: rope_scaling(gguf, rope_theta, head_dim)?,
        max_positions: gguf.size(&key("context_length"))?,
        tied_embeddings: !gguf.has("output.weight"),
        qkv_bias: gguf.has("blk.0.attn_q.bias"),
        eos: end_tokens(gguf),
    })
}

fn architecture(gguf: &Gguf) -> Result<&str, LmError> {
    let architecture = gguf.text("general.architecture")?;
    if KNOWN.contains(&architecture) {
        return Ok(architecture);
    }
    Err(gguf.malformed(&format!(
        "general.architecture {architecture:?} is not a known architecture\nhelp: known are {}",
        KNOWN.join(", ")
    )))
}

fn end_tokens(gguf: &Gguf) -> Vec<i64> {
    let mut ids = Vec::new();
    for key in ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"] {
        if let Some(id) = gguf.integer(key).filter(|id| !ids.contains(id)) {
            ids.push(id);
        }
    }
    ids
}

/// Refuses a scaling by name, and a factor without one: that stands for a linear scaling, in older files under another key.
fn refuse_other_rope(gguf: &Gguf, rope: &str) -> Result<(), LmError> {
    let refused = |key: &str, found: &dyn std::fmt::Debug| {
        let help = "of the RoPE scalings, only Llama 3's is supported";
        Err(gguf.malformed(&format!("{rope}.{key}: found {found:?}, expected none\nhelp: {help}")))
    };
    match gguf.text(&format!("{rope}.scaling.type")) {
        Ok("none") => return Ok(()),
        Ok(other) => return refused("scaling.type", &other),
        Err(_) => {}
    }
    for key in ["scaling.factor", "scale_linear"] {
        let factor = gguf.number(&format!("{rope}.{key}"))?;
        if let Some(factor) = factor.filter(|&factor| factor != 0.0 && factor != 1.0) {
            return refused(key, &factor);
        }
    }
    Ok(())
}

/// Refuses a tensor that nothing here multiplies or adds, such as a bias: the model would be another one in silence.
fn refuse_other_tensors(gguf: &Gguf, layers: i64) -> Result<(), LmError> {
    let is_known = |name: &str| {
        let Some((number, module)) = name.strip_prefix("blk.").and_then(|rest| rest.split_once('.')) else {
            return OUTSIDE_LAYERS.contains(&name);
        };
        let (module, kind) = module.rsplit_once('.').unwrap_or((module, ""));
        let biased = ["attn_q", "attn_k", "attn_v"].contains(&module);
        let is_layer = number.parse::<i64>().is_ok_and(|number| number < layers);
        is_layer && MODULES.iter().any(|(_, known)| *known == module) && (kind == "weight" || kind == "bias" && biased)
    };
    match gguf.tensors().find(|name| !is_known(name)) {
        None => Ok(()),
        Some(name) => Err(gguf.malformed(&format!(
            "tensor {name}: the models that are computed have none of that name\n\
             help: use a model of the Llama family without further biases or layers"
        ))),
    }
}

/// Llama 3's scaling from `rope_freqs.weight`, which holds the divisor of each frequency instead of its parameters.
fn rope_scaling(gguf: &Gguf, theta: f64, head_dim: i64) -> Result<Option<Llama3Scaling>, LmError> {
    if !gguf.has("rope_freqs.weight") {
        return Ok(None);
    }
    let cpu = Compute { device: Device::Cpu, kind: Kind::Float };
    let divisors = gguf.tensor("rope_freqs.weight", &[head_dim / 2], cpu)?;
    let divisors: Vec<f32> = Vec::try_from(divisors)?;
    let factor = divisors.iter().copied().fold(1.0f32, f32::max);
    // All published Llama 3 models have these; whatever differs is refused rather than computed wrongly.
    let scaling = Llama3Scaling {
        factor: f64::from(factor),
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_positions: 8192.0,
    };
    let fits = |(index, &found): (usize, &f32)| {
        let expected = scaling.divisor(theta.powf(-2.0 * index as f64 / head_dim as f64));
        (f64::from(found) - expected).abs() <= 1e-3 * expected
    };
    match divisors.iter().enumerate().all(fits) {
        true => Ok(Some(scaling)),
        false => Err(gguf.malformed(
            "tensor rope_freqs.weight is not Llama 3's scaling with low_freq_factor 1, high_freq_factor 4 and \
             8192 original positions\nhelp: use the Hugging Face folder, which states the parameters",
        )),
    }
}

impl Llama3Scaling {
    /// By what a RoPE frequency (radians per position) is divided.
    /// Source: transformers, `modeling_rope_utils.py`, `_compute_llama3_parameters`.
    pub fn divisor(&self, frequency: f64) -> f64 {
        let wavelength = 2.0 * std::f64::consts::PI / frequency;
        if wavelength < self.original_max_positions / self.high_freq_factor {
            return 1.0;
        }
        if wavelength > self.original_max_positions / self.low_freq_factor {
            return self.factor;
        }
        let smooth = (self.original_max_positions / wavelength - self.low_freq_factor)
            / (self.high_freq_factor - self.low_freq_factor);
        1.0 / ((1.0 - smooth) / self.factor + smooth)
    }
}

/// Loads the tensor that Hugging Face calls `name`.
pub(super) fn tensor(gguf: &Gguf, name: &str, shape: &[i64], compute: Compute) -> Result<Tensor, LmError> {
    let stored = gguf_name(name).ok_or_else(|| gguf.malformed(&format!("no tensor is known as {name}")))?;
    let tensor = gguf.tensor(&stored, shape, compute)?;
    let heads = match stored.split('.').nth(2) {
        Some("attn_q") => "attention.head_count",
        Some("attn_k") => "attention.head_count_kv",
        _ => return Ok(tensor),
    };
    let architecture = architecture(gguf)?;
    if architecture != "llama" {
        return Ok(tensor);
    }
    let all = gguf.size(&format!("{architecture}.attention.head_count"))?;
    let heads = gguf.optional_size(&format!("{architecture}.{heads}"))?.unwrap_or(all);
    let pairs = shape[0] / heads / 2;
    let mut paired = vec![heads, pairs, 2];
    paired.extend(&shape[1..]);
    Ok(tensor.f_reshape(&paired)?.f_transpose(1, 2)?.f_reshape(shape)?)
}

/// GGUF's name of the tensor that Hugging Face calls `name`.
pub(super) fn gguf_name(name: &str) -> Option<String> {
    let layer = |rest: &str| {
        let (number, rest) = rest.split_once('.')?;
        let (module, kind) = rest.rsplit_once('.')?;
        let (_, module) = MODULES.iter().find(|(known, _)| *known == module)?;
        Some(format!("blk.{number}.{module}.{kind}"))
    };
    match name {
        "model.embed_tokens.weight" => Some("token_embd.weight".into()),
        "model.norm.weight" => Some("output_norm.weight".into()),
        "lm_head.weight" => Some("output.weight".into()),
        _ => name.strip_prefix("model.layers.").and_then(layer),
    }
}
