//! The Llama family (Touvron et al. 2023; Llama 3; Qwen2): RMSNorm, RoPE, grouped-query attention, SwiGLU.
//!
//! Reference: `transformers/models/llama/modeling_llama.py`. The three projections that share attention's input are one
//! product, and so are the two that share the feed-forward's; where our arithmetic differs from the reference it is only
//! in that. [`Decoder::logits`] is the readable whole; [`crate::gradients`] and [`crate::generate`] use the same layers.

pub(crate) mod layer;
pub(crate) mod packed;

use std::sync::OnceLock;

use tch::{Kind, Tensor};

use crate::LmError;
use crate::adapter::{Lora, Target};
use crate::checkpoint::{Checkpoint, DecoderConfig};
use crate::device::{self, Compute};
use crate::ops::Frozen;
use crate::ops::plain::rms_norm;
use crate::rope::Rope;

pub(crate) use layer::{Adapters, Layer};
pub(crate) use packed::Packed;

/// A frozen decoder.
pub struct Decoder {
    /// Its architecture.
    pub config: DecoderConfig,
    /// Where it computes.
    pub compute: Compute,
    pub(crate) embedding: Tensor,
    pub(crate) layers: Vec<Layer>,
    pub(crate) norm: Tensor,
    /// `[vocab, hidden]`; the embedding itself where they are tied.
    pub(crate) output: Frozen,
    pub(crate) rope: Rope,
    /// Bytes that were free on the device when the weights were there; `None` on CPU.
    spare: Option<usize>,
    /// The weights once more, as sampling on CPU wants them; made at first use.
    packed: OnceLock<Option<Packed>>,
}

impl Decoder {
    /// Loads the weights.
    pub fn load(checkpoint: &Checkpoint, compute: Compute) -> Result<Self, LmError> {
        tch::no_grad(|| {
            let config = checkpoint.decoder_config()?;
            check(&config)?;
            let wide = [config.vocab_size, config.hidden_size];
            let embedding = checkpoint.tensor("model.embed_tokens.weight", &wide, compute)?;
            let layers = (0..config.layers)
                .map(|layer| Layer::load(checkpoint, &config, layer, compute))
                .collect::<Result<_, _>>()?;
            let norm = checkpoint.tensor("model.norm.weight", &[config.hidden_size], compute)?;
            let output = output(checkpoint, &config, &embedding, compute)?.into();
            let rope = Rope::new(&config, compute)?;
            let spare = compute.device.is_cuda().then(device::free_cuda_memory).flatten();
            if let Some(bytes) = spare {
                tracing::info!(free_bytes = bytes as u64, "the model is on the GPU");
            }
            Ok(Self { config, compute, embedding, layers, norm, output, rope, spare, packed: OnceLock::new() })
        })
    }

    /// Bytes that were free on the device when the weights had been loaded; `None` on CPU, where they are shared with others.
    pub fn spare_memory(&self) -> Option<usize> {
        self.spare
    }

    /// Merges an adapter into the weights (for sampling).
    ///
    /// The sum is formed in float32 and rounded once.
    pub fn merge(&mut self, lora: &Lora) -> Result<(), LmError> {
        lora.check(&self.config)?;
        self.packed = OnceLock::new();
        tch::no_grad(|| {
            for (index, layer) in self.layers.iter_mut().enumerate() {
                for target in Target::ALL {
                    let Some((a, b)) = lora.factors(index, target) else { continue };
                    let mut weight = layer.weight_of(target, &self.config)?;
                    let delta = b.f_matmul(a)?.f_mul_scalar(lora.config.scale())?.f_to_device(weight.device())?;
                    let merged = weight.f_to_kind(Kind::Float)?.f_add(&delta)?;
                    weight.f_copy_(&merged)?;
                }
                // What was packed is not of these weights any more.
                layer.qkv = layer.qkv.shallow_clone().into();
                layer.o = layer.o.shallow_clone().into();
            }
            Ok(())
        })
    }

    /// Logits `[batch, length, vocab]` f32 of `tokens` `[batch, length]` i64, without cache; for tests and small uses.
    pub fn logits(&self, tokens: &Tensor) -> Result<Tensor, LmError> {
        tch::no_grad(|| {
            let hidden = self.hidden(tokens, None)?;
            Ok(hidden.f_linear(&self.output, None::<&Tensor>)?.f_to_kind(Kind::Float)?)
        })
    }

    /// Normed hidden states `[batch, length, hidden]` of `tokens`.
    ///
    /// Rows may be padded on the right: attention is causal, so no real token sees padding and no mask is needed.
    pub(crate) fn hidden(&self, tokens: &Tensor, lora: Option<&Lora>) -> Result<Tensor, LmError> {
        let length = tokens.size2()?.1;
        let angles = self.rope.first(length)?;
        let mut hidden = self.embed(tokens)?;
        for (index, layer) in self.layers.iter().enumerate() {
            let adapters = match lora {
                Some(lora) => Adapters::new(lora, index, &self.config, self.compute.kind)?,
                None => Adapters::default(),
            };
            hidden = layer.forward(&hidden, &self.config, &angles, &adapters)?;
        }
        rms_norm(&hidden, &self.norm, self.config.rms_norm_eps)
    }

    /// Bytes of one copy of the weights, with an output of its own: packed, it is not the embedding.
    pub(crate) fn bytes(&self) -> usize {
        let layer = |layer: &Layer| [&layer.qkv, &layer.o, &layer.gate_up, &layer.down].map(|part| part.numel());
        let layers: usize = self.layers.iter().flat_map(layer).sum();
        (layers + self.embedding.numel() + self.output.numel()) * self.compute.kind.elt_size_in_bytes()
    }

    /// The weights packed for sampling on CPU; `None` where libtorch has to compute.
    pub(crate) fn packed(&self) -> Result<Option<Packed>, LmError> {
        if let Some(packed) = self.packed.get() {
            return Ok(packed.clone());
        }
        let packed = Packed::new(self)?;
        Ok(self.packed.get_or_init(|| packed).clone())
    }

    /// Rows of the embedding: `[…, hidden]` for ids of any shape.
    pub(crate) fn embed(&self, tokens: &Tensor) -> Result<Tensor, LmError> {
        let mut shape = tokens.size();
        shape.push(self.config.hidden_size);
        Ok(self.embedding.f_index_select(0, &tokens.f_reshape([-1i64])?)?.f_reshape(shape)?)
    }

    /// An error where an id is not of this vocabulary: libtorch would read out of bounds on some devices.
    pub fn check_tokens<'a>(&self, tokens: impl IntoIterator<Item = &'a i64>) -> Result<(), LmError> {
        match tokens.into_iter().all(|id| (0..self.config.vocab_size).contains(id)) {
            true => Ok(()),
            false => Err(LmError::Malformed(format!(
                "a token id is outside the model's vocabulary of {}\n\
                 help: the tokenizer does not belong to this model",
                self.config.vocab_size
            ))),
        }
    }
}

/// The output's weight. As in transformers, one that stands beside an embedding it should be tied to and differs is kept.
fn output(
    checkpoint: &Checkpoint,
    config: &DecoderConfig,
    embedding: &Tensor,
    compute: Compute,
) -> Result<Tensor, LmError> {
    if config.tied_embeddings && !checkpoint.has("lm_head.weight") {
        return Ok(embedding.shallow_clone());
    }
    let own = checkpoint.tensor("lm_head.weight", &[config.vocab_size, config.hidden_size], compute)?;
    match config.tied_embeddings && own.f_equal(embedding)? {
        true => Ok(embedding.shallow_clone()),
        false => Ok(own),
    }
}

/// What the layers rely on; a configuration is an input.
fn check(config: &DecoderConfig) -> Result<(), LmError> {
    let sizes = [config.hidden_size, config.intermediate_size, config.layers, config.heads, config.vocab_size];
    let fits = sizes.iter().all(|&size| size > 0)
        && config.kv_heads > 0
        && config.heads % config.kv_heads == 0
        && config.head_dim > 0
        && config.head_dim % 2 == 0;
    if fits {
        return Ok(());
    }
    Err(LmError::Malformed(format!(
        "configuration: {} heads, {} key-value heads of width {}, hidden size {}: the heads must be a multiple of the \
         key-value heads, and the width even\nhelp: the model's config.json or GGUF metadata is damaged",
        config.heads, config.kv_heads, config.head_dim, config.hidden_size
    )))
}

#[cfg(test)]
pub(crate) mod tests;
