//! BERT (Devlin et al. 2019), as `modeling_bert.py` of transformers computes it: absolute positions, post-norm.

use std::path::Path;

use serde_json::Value;
use tch::Tensor;

use super::{Batch, size};
use crate::LmError;
use crate::checkpoint::Weights;
use crate::device::Compute;
use crate::ops::{self, Frozen};

/// What `config.json` says.
pub(super) struct BertConfig {
    pub(super) hidden_size: i64,
    pub(super) max_positions: i64,
    intermediate_size: i64,
    layers: i64,
    heads: i64,
    vocab_size: i64,
    token_types: i64,
    epsilon: f64,
}

impl BertConfig {
    pub(super) fn read(path: &Path, config: &Value) -> Result<Self, LmError> {
        let number = |key: &str| size(path, config, key);
        for (key, expected) in [("hidden_act", "gelu"), ("position_embedding_type", "absolute")] {
            if let Some(found) = config.get(key).filter(|found| *found != expected) {
                return Err(LmError::Malformed(format!(
                    "{}: {key}: found {found}, expected {expected}\nhelp: use another encoder",
                    path.display()
                )));
            }
        }
        let (hidden_size, heads) = (number("hidden_size")?, number("num_attention_heads")?);
        if hidden_size % heads != 0 {
            return Err(LmError::Malformed(format!(
                "{}: num_attention_heads: found {heads}, expected a divisor of hidden_size {hidden_size}\n\
                 help: download the encoder again",
                path.display()
            )));
        }
        Ok(Self {
            hidden_size,
            max_positions: number("max_position_embeddings")?,
            intermediate_size: number("intermediate_size")?,
            layers: number("num_hidden_layers")?,
            heads,
            vocab_size: number("vocab_size")?,
            token_types: number("type_vocab_size")?,
            epsilon: config.get("layer_norm_eps").and_then(Value::as_f64).unwrap_or(1e-12),
        })
    }
}

/// A BERT without its pooler.
pub(super) struct Bert {
    words: Tensor,
    /// Positions with the first token type added: sentence embeddings use no other.
    positions: Tensor,
    norm: LayerNorm,
    layers: Vec<Layer>,
    heads: i64,
}

struct Layer {
    /// Query, key and value in one product.
    attention: Linear,
    output: Linear,
    attention_norm: LayerNorm,
    up: Linear,
    down: Linear,
    norm: LayerNorm,
}

struct Linear {
    weight: Frozen,
    bias: Tensor,
}

impl Linear {
    /// The product and the bias, and with them `rows` of its shape.
    fn forward(&self, input: &Tensor, rows: Option<&Tensor>) -> Result<Tensor, LmError> {
        ops::linear(input, &self.weight, Some(&self.bias), rows)
    }
}

struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    epsilon: f64,
}

impl LayerNorm {
    fn forward(&self, input: &Tensor) -> Result<Tensor, LmError> {
        ops::layer_norm(input, &self.weight, &self.bias, self.epsilon)
    }
}

/// Reads modules by name.
struct Loader<'a> {
    weights: &'a Weights,
    prefix: &'static str,
    compute: Compute,
    epsilon: f64,
}

impl Loader<'_> {
    fn tensor(&self, name: &str, shape: &[i64]) -> Result<Tensor, LmError> {
        self.weights.tensor(&format!("{}{name}", self.prefix), shape, self.compute)
    }

    fn linear(&self, names: &[String], outputs: i64, inputs: i64) -> Result<Linear, LmError> {
        let mut weights = Vec::new();
        let mut biases = Vec::new();
        for name in names {
            weights.push(self.tensor(&format!("{name}.weight"), &[outputs, inputs])?);
            biases.push(self.tensor(&format!("{name}.bias"), &[outputs])?);
        }
        Ok(Linear { weight: Tensor::f_cat(&weights, 0)?.into(), bias: Tensor::f_cat(&biases, 0)? })
    }

    fn norm(&self, name: &str, width: i64) -> Result<LayerNorm, LmError> {
        let weight = self.tensor(&format!("{name}.weight"), &[width])?;
        Ok(LayerNorm { weight, bias: self.tensor(&format!("{name}.bias"), &[width])?, epsilon: self.epsilon })
    }
}

impl Bert {
    pub(super) fn load(weights: &Weights, config: &BertConfig, compute: Compute) -> Result<Self, LmError> {
        let prefix = if weights.has("bert.embeddings.word_embeddings.weight") { "bert." } else { "" };
        let loader = Loader { weights, prefix, compute, epsilon: config.epsilon };
        let (width, inner) = (config.hidden_size, config.intermediate_size);
        let words = loader.tensor("embeddings.word_embeddings.weight", &[config.vocab_size, width])?;
        let positions = loader.tensor("embeddings.position_embeddings.weight", &[config.max_positions, width])?;
        let types = loader.tensor("embeddings.token_type_embeddings.weight", &[config.token_types, width])?;
        let mut layers = Vec::new();
        for index in 0..config.layers {
            let name = |module: &str| format!("encoder.layer.{index}.{module}");
            let attention = ["query", "key", "value"].map(|part| name(&format!("attention.self.{part}")));
            layers.push(Layer {
                attention: loader.linear(&attention, width, width)?,
                output: loader.linear(&[name("attention.output.dense")], width, width)?,
                attention_norm: loader.norm(&name("attention.output.LayerNorm"), width)?,
                up: loader.linear(&[name("intermediate.dense")], inner, width)?,
                down: loader.linear(&[name("output.dense")], width, inner)?,
                norm: loader.norm(&name("output.LayerNorm"), width)?,
            });
        }
        Ok(Self {
            words,
            positions: positions.f_add(&types.f_narrow(0, 0, 1)?)?,
            norm: loader.norm("embeddings.LayerNorm", width)?,
            layers,
            heads: config.heads,
        })
    }

    /// The embedding of words, `[vocabulary, width]`.
    pub(super) fn words(&self) -> &Tensor {
        &self.words
    }

    /// How many inputs its products have.
    pub(super) fn inputs(&self) -> Vec<i64> {
        let weights = self.layers.iter().flat_map(|layer| [&layer.attention, &layer.output, &layer.up, &layer.down]);
        let inputs = weights.filter_map(|linear| linear.weight.size().last().copied());
        let width = self.norm.weight.size().first().copied().unwrap_or_default();
        inputs.chain([width / self.heads]).collect()
    }

    /// Last hidden state, `[tokens, width]`.
    pub(super) fn forward(&self, batch: &Batch) -> Result<Tensor, LmError> {
        let words = Tensor::f_embedding(&self.words, &batch.ids, -1, false, false)?;
        let positions = Tensor::f_embedding(&self.positions, &batch.positions, -1, false, false)?;
        let mut hidden = self.norm.forward(&words.f_add(&positions)?)?;
        for layer in &self.layers {
            hidden = layer.forward(&hidden, self.heads, batch)?;
        }
        Ok(hidden)
    }
}

impl Layer {
    fn forward(&self, hidden: &Tensor, heads: i64, batch: &Batch) -> Result<Tensor, LmError> {
        let joint = self.attention.forward(hidden, None)?;
        let attended = match ops::attend(&joint, heads, &batch.texts())? {
            Some(attended) => attended,
            None => batch.attend(&joint, |_, group, joint| ops::attend_padded(joint, heads, &group.blocked))?,
        };
        let hidden = self.attention_norm.forward(&self.output.forward(&attended, Some(hidden))?)?;
        let inner = ops::linear_gelu(&hidden, &self.up.weight, &self.up.bias)?;
        self.norm.forward(&self.down.forward(&inner, Some(&hidden))?)
    }
}
