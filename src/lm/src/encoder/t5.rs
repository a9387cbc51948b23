//! The encoder of T5 (Raffel et al. 2020), as `modeling_t5.py` of transformers computes it: relative position biases
//! instead of positions, RMS normalisation before each part, no biases, attention scores that are not scaled.

use std::path::Path;

use serde_json::Value;
use tch::{Kind, Tensor};

use super::{Batch, Group, size};
use crate::LmError;
use crate::checkpoint::Weights;
use crate::device::Compute;
use crate::ops::plain::join_heads;
use crate::ops::{self, Frozen};

/// What `config.json` says.
pub(super) struct T5Config {
    pub(super) hidden_size: i64,
    inner_size: i64,
    layers: i64,
    heads: i64,
    head_dim: i64,
    vocab_size: i64,
    buckets: i64,
    max_distance: i64,
    epsilon: f64,
    activation: Activation,
    gated: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Activation {
    Relu,
    /// The tanh approximation, which transformers calls `gelu_new`.
    Gelu,
}

impl T5Config {
    pub(super) fn read(path: &Path, config: &Value) -> Result<Self, LmError> {
        let number = |key: &str| size(path, config, key);
        let optional = |key: &str, default: i64| if config.get(key).is_some() { number(key) } else { Ok(default) };
        let feed_forward = config.get("feed_forward_proj").and_then(Value::as_str).unwrap_or("relu");
        let (activation, gated) = match feed_forward {
            "relu" => (Activation::Relu, false),
            "gated-gelu" => (Activation::Gelu, true),
            other => {
                return Err(LmError::Malformed(format!(
                    "{}: feed_forward_proj: found {other:?}, expected relu or gated-gelu\nhelp: use another encoder",
                    path.display()
                )));
            }
        };
        Ok(Self {
            hidden_size: number("d_model")?,
            inner_size: number("d_ff")?,
            layers: number("num_layers")?,
            heads: number("num_heads")?,
            head_dim: number("d_kv")?,
            vocab_size: number("vocab_size")?,
            buckets: number("relative_attention_num_buckets")?,
            max_distance: optional("relative_attention_max_distance", 128)?,
            epsilon: config.get("layer_norm_epsilon").and_then(Value::as_f64).unwrap_or(1e-6),
            activation,
            gated,
        })
    }
}

/// A T5 encoder.
pub(super) struct T5 {
    words: Tensor,
    /// `[buckets, heads]`: the first layer's, which all layers share.
    position_biases: Tensor,
    layers: Vec<Layer>,
    norm: RmsNorm,
    heads: i64,
    buckets: i64,
    max_distance: i64,
}

struct Layer {
    attention_norm: RmsNorm,
    /// Query, key and value in one product.
    attention: Frozen,
    output: Frozen,
    norm: RmsNorm,
    /// One matrix, or the activated one and the linear one where gated.
    up: Vec<Frozen>,
    down: Frozen,
    activation: Activation,
}

struct RmsNorm {
    weight: Tensor,
    epsilon: f64,
}

impl RmsNorm {
    /// The mean square is taken in float32 whatever the kind, as the reference does.
    fn forward(&self, input: &Tensor) -> Result<Tensor, LmError> {
        let wide = input.f_to_kind(Kind::Float)?;
        let scale = wide.f_square()?.f_mean_dim(-1i64, true, Kind::Float)?.f_add_scalar(self.epsilon)?.f_rsqrt()?;
        Ok(wide.f_mul(&scale)?.f_to_kind(self.weight.kind())?.f_mul(&self.weight)?)
    }
}

impl T5 {
    pub(super) fn load(weights: &Weights, config: &T5Config, compute: Compute) -> Result<Self, LmError> {
        let width = config.hidden_size;
        let heads_width = config.heads * config.head_dim;
        let tensor = |name: &str, shape: &[i64]| weights.tensor(name, shape, compute);
        let norm = |name: &str| Ok::<_, LmError>(RmsNorm { weight: tensor(name, &[width])?, epsilon: config.epsilon });
        let words = if weights.has("shared.weight") { "shared.weight" } else { "encoder.embed_tokens.weight" };
        let biases = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight";
        let mut layers = Vec::new();
        for index in 0..config.layers {
            let attention = |part: &str| format!("encoder.block.{index}.layer.0.SelfAttention.{part}.weight");
            let feed_forward = |part: &str| format!("encoder.block.{index}.layer.1.DenseReluDense.{part}.weight");
            let mut projections = Vec::new();
            for part in ["q", "k", "v"] {
                projections.push(tensor(&attention(part), &[heads_width, width])?);
            }
            let up: &[&str] = if config.gated { &["wi_0", "wi_1"] } else { &["wi"] };
            let up = up.iter().map(|part| Ok(tensor(&feed_forward(part), &[config.inner_size, width])?.into()));
            layers.push(Layer {
                attention_norm: norm(&format!("encoder.block.{index}.layer.0.layer_norm.weight"))?,
                attention: Tensor::f_cat(&projections, 0)?.into(),
                output: tensor(&attention("o"), &[width, heads_width])?.into(),
                norm: norm(&format!("encoder.block.{index}.layer.1.layer_norm.weight"))?,
                up: up.collect::<Result<_, LmError>>()?,
                down: tensor(&feed_forward("wo"), &[width, config.inner_size])?.into(),
                activation: config.activation,
            });
        }
        Ok(Self {
            words: tensor(words, &[config.vocab_size, width])?,
            position_biases: tensor(biases, &[config.buckets, config.heads])?,
            layers,
            norm: norm("encoder.final_layer_norm.weight")?,
            heads: config.heads,
            buckets: config.buckets,
            max_distance: config.max_distance,
        })
    }

    /// The embedding of words, `[vocabulary, width]`.
    pub(super) fn words(&self) -> &Tensor {
        &self.words
    }

    /// Last hidden state, `[tokens, width]`.
    pub(super) fn forward(&self, batch: &Batch) -> Result<Tensor, LmError> {
        let bias = |group: &Group| Ok(self.bias(group.length)?.f_add(&group.blocked)?);
        let biases = batch.groups.iter().map(bias).collect::<Result<Vec<_>, LmError>>()?;
        let mut hidden = Tensor::f_embedding(&self.words, &batch.ids, -1, false, false)?;
        for layer in &self.layers {
            hidden = layer.forward(&hidden, self.heads, batch, &biases)?;
        }
        self.norm.forward(&hidden)
    }

    /// What position adds to the attention scores: `[1, heads, length, length]`.
    fn bias(&self, length: i64) -> Result<Tensor, LmError> {
        let bucket = |from: i64| (0..length).map(move |to| bucket(to - from, self.buckets, self.max_distance));
        let buckets: Vec<i64> = (0..length).flat_map(bucket).collect();
        let buckets = Tensor::f_from_slice(&buckets)?.f_to_device(self.position_biases.device())?;
        let biases = Tensor::f_embedding(&self.position_biases, &buckets, -1, false, false)?;
        Ok(biases.f_reshape([1, length, length, self.heads])?.f_permute([0, 3, 1, 2])?.f_contiguous()?)
    }
}

/// Bucket of a distance: exact for small ones, logarithmic up to `max_distance`, half the buckets for each direction.
fn bucket(distance: i64, buckets: i64, max_distance: i64) -> i64 {
    let half = buckets / 2;
    let direction = if distance > 0 { half } else { 0 };
    let distance = distance.abs();
    let exact = half / 2;
    if distance < exact {
        return direction + distance;
    }
    // In float32, as the reference: a distance on the edge of a bucket must fall on the same side.
    let ratio = (distance as f32 / exact as f32).ln();
    let scale = (max_distance as f64 / exact as f64).ln() as f32;
    let logarithmic = exact + (ratio / scale * (half - exact) as f32) as i64;
    direction + logarithmic.min(half - 1)
}

impl Layer {
    /// `biases` are what attention adds to the scores of each group.
    fn forward(&self, hidden: &Tensor, heads: i64, batch: &Batch, biases: &[Tensor]) -> Result<Tensor, LmError> {
        let joint = ops::linear(&self.attention_norm.forward(hidden)?, &self.attention, None, None)?;
        let attended = batch.attend(&joint, |index, _, joint| {
            let ([query, key, value], bias) = (ops::thirds(joint, heads)?, Some(&biases[index]));
            join_heads(&Tensor::f_scaled_dot_product_attention(&query, &key, &value, bias, 0.0, false, 1.0, false)?)
        })?;
        let hidden = ops::linear(&attended, &self.output, None, Some(hidden))?;
        let normed = self.norm.forward(&hidden)?;
        let mut inner = ops::linear(&normed, &self.up[0], None, None)?;
        inner = match self.activation {
            Activation::Relu => inner.f_relu()?,
            Activation::Gelu => inner.f_gelu("tanh")?,
        };
        if let Some(linear) = self.up.get(1) {
            inner = inner.f_mul(&ops::linear(&normed, linear, None, None)?)?;
        }
        ops::linear(&inner, &self.down, None, Some(&hidden))
    }
}
