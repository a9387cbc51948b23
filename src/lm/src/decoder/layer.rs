//! One layer: its weights, its adapters and its forward pass in plain differentiable operations.

use tch::{Kind, Tensor};

use crate::adapter::{Lora, Target};
use crate::checkpoint::{Checkpoint, DecoderConfig};
use crate::ops::Frozen;
use crate::ops::plain::{join_heads, rms_norm, split_heads, swiglu};
use crate::rope::{Angles, rotate};
use crate::{LmError, device::Compute};

/// Frozen weights of one layer. Projections are `[out, in]`.
pub(crate) struct Layer {
    pub(crate) input_norm: Tensor,
    /// Rows of q, then k, then v.
    pub(crate) qkv: Frozen,
    pub(crate) qkv_bias: Option<Tensor>,
    pub(crate) o: Frozen,
    pub(crate) post_norm: Tensor,
    /// Rows of gate, then up.
    pub(crate) gate_up: Frozen,
    pub(crate) down: Frozen,
}

/// LoRA factors of one layer, in the compute kind, joined as the weights are: the three that share an input are one
/// product, with B block by block, so that `qkv += (x·Aᵀ)·Bᵀ`.
#[derive(Default)]
pub(crate) struct Adapters {
    pub(crate) qkv: Option<Factors>,
    pub(crate) o: Option<Factors>,
}

/// Joined factors: A `[ranks, in]`, B `[out, ranks]` with LoRA's scale in it.
pub(crate) struct Factors {
    pub(crate) a: Tensor,
    pub(crate) b: Tensor,
}

impl Factors {
    /// Number of ranks.
    pub(crate) fn ranks(&self) -> i64 {
        self.a.size().first().copied().unwrap_or_default()
    }
}

impl Layer {
    pub(crate) fn load(
        checkpoint: &Checkpoint,
        config: &DecoderConfig,
        layer: i64,
        compute: Compute,
    ) -> Result<Self, LmError> {
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let (queries, keys) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
        let tensor =
            |name: &str, shape: &[i64]| checkpoint.tensor(&format!("model.layers.{layer}.{name}"), shape, compute);
        // Each part is dropped when it has been copied into the joint tensor: at most one layer is held twice.
        let joined = |parts: &[(&str, i64)]| -> Result<Tensor, LmError> {
            let rows: i64 = parts.iter().map(|(_, rows)| rows).sum();
            let whole = Tensor::f_empty([rows, hidden], (compute.kind, compute.device))?;
            let mut first = 0;
            for (name, rows) in parts {
                whole.f_narrow(0, first, *rows)?.f_copy_(&tensor(name, &[*rows, hidden])?)?;
                first += rows;
            }
            Ok(whole)
        };
        let qkv_bias = match config.qkv_bias {
            false => None,
            true => Some(Tensor::f_cat(
                &[
                    tensor("self_attn.q_proj.bias", &[queries])?,
                    tensor("self_attn.k_proj.bias", &[keys])?,
                    tensor("self_attn.v_proj.bias", &[keys])?,
                ],
                0,
            )?),
        };
        Ok(Self {
            input_norm: tensor("input_layernorm.weight", &[hidden])?,
            qkv: joined(&[
                ("self_attn.q_proj.weight", queries),
                ("self_attn.k_proj.weight", keys),
                ("self_attn.v_proj.weight", keys),
            ])?
            .into(),
            qkv_bias,
            o: tensor("self_attn.o_proj.weight", &[hidden, queries])?.into(),
            post_norm: tensor("post_attention_layernorm.weight", &[hidden])?,
            gate_up: joined(&[("mlp.gate_proj.weight", inner), ("mlp.up_proj.weight", inner)])?.into(),
            down: tensor("mlp.down_proj.weight", &[hidden, inner])?.into(),
        })
    }

    /// The weight of one projection: a view into the joint one.
    pub(crate) fn weight_of(&self, target: Target, config: &DecoderConfig) -> Result<Tensor, LmError> {
        match target {
            Target::O => Ok(self.o.shallow_clone()),
            _ => {
                let (first, rows) = rows_of(target, config);
                Ok(self.qkv.f_narrow(0, first, rows)?)
            }
        }
    }

    /// `[batch, length, hidden]` → the same shape.
    pub(crate) fn forward(
        &self,
        hidden: &Tensor,
        config: &DecoderConfig,
        angles: &Angles,
        adapters: &Adapters,
    ) -> Result<Tensor, LmError> {
        let normed = rms_norm(hidden, &self.input_norm, config.rms_norm_eps)?;
        let qkv = project(&normed, &self.qkv, self.qkv_bias.as_ref(), adapters.qkv.as_ref())?;
        let (q, k, v) = split_heads(&turned(&qkv, config, angles)?, config)?;
        // Attention of query heads in groups: key-value heads are repeated, which keeps the gradient plain.
        let repeats = config.heads / config.kv_heads;
        let repeat = |heads: &Tensor| heads.f_repeat_interleave_self_int(repeats, 1, None::<i64>);
        let attended = Tensor::f_scaled_dot_product_attention(
            &q,
            &repeat(&k)?,
            &repeat(&v)?,
            None::<&Tensor>,
            0.0,
            true,
            None,
            false,
        )?;
        let joined = join_heads(&attended)?;
        let middle = hidden.f_add(&project(&joined, &self.o, None, adapters.o.as_ref())?)?;
        let normed = rms_norm(&middle, &self.post_norm, config.rms_norm_eps)?;
        let gate_up = normed.f_linear(&self.gate_up, None::<&Tensor>)?;
        let inner = swiglu(&gate_up)?;
        Ok(middle.f_add(&inner.f_linear(&self.down, None::<&Tensor>)?)?)
    }
}

impl Adapters {
    /// Factors of `layer` for computing in `kind`.
    pub(crate) fn new(lora: &Lora, layer: usize, config: &DecoderConfig, kind: Kind) -> Result<Self, LmError> {
        let scale = lora.config.scale();
        let (mut down, mut up) = (Vec::new(), Vec::new());
        let width = config.heads * config.head_dim + 2 * config.kv_heads * config.head_dim;
        for target in [Target::Q, Target::K, Target::V] {
            let Some((a, b)) = lora.factors(layer, target) else { continue };
            let (first, rows) = rows_of(target, config);
            down.push(a.shallow_clone());
            up.push(b.f_constant_pad_nd([0, 0, first, width - first - rows])?);
        }
        let qkv = match down.is_empty() {
            true => None,
            false => Some(Factors {
                a: Tensor::f_cat(&down, 0)?.f_to_kind(kind)?,
                b: Tensor::f_cat(&up, 1)?.f_mul_scalar(scale)?.f_to_kind(kind)?,
            }),
        };
        let o = match lora.factors(layer, Target::O) {
            None => None,
            Some((a, b)) => Some(Factors { a: a.f_to_kind(kind)?, b: b.f_mul_scalar(scale)?.f_to_kind(kind)? }),
        };
        Ok(Self { qkv, o })
    }
}

/// `(first row, rows)` of a projection in the joint q, k, v weight.
pub(crate) fn rows_of(target: Target, config: &DecoderConfig) -> (i64, i64) {
    let (queries, keys) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
    match target {
        Target::Q | Target::O => (0, queries),
        Target::K => (queries, keys),
        Target::V => (queries + keys, keys),
    }
}

fn project(
    input: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    factors: Option<&Factors>,
) -> Result<Tensor, LmError> {
    let output = input.f_linear(weight, bias)?;
    match factors {
        None => Ok(output),
        Some(factors) => {
            let low = input.f_linear(&factors.a, None::<&Tensor>)?;
            Ok(output.f_add(&low.f_linear(&factors.b, None::<&Tensor>)?)?)
        }
    }
}

/// `[batch, length, q + k + v]` with the query and key heads turned. They are neighbours: one rotation for both.
fn turned(qkv: &Tensor, config: &DecoderConfig, angles: &Angles) -> Result<Tensor, LmError> {
    let (batch, length, all) = qkv.size3()?;
    let (front, back) = (config.heads + config.kv_heads, config.kv_heads);
    let heads = qkv.f_reshape([batch, length, front + back, config.head_dim])?;
    let turned = rotate(&heads.f_narrow(2, 0, front)?, angles)?;
    Ok(Tensor::f_cat(&[turned, heads.f_narrow(2, front, back)?], 2)?.f_reshape([batch, length, all])?)
}
