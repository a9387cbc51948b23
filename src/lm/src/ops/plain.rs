//! Parts of a layer in libtorch's differentiable operations, on any device.

use tch::{Kind, Tensor};

use crate::LmError;
use crate::checkpoint::DecoderConfig;

/// RMSNorm (Zhang and Sennrich 2019): statistics in float32, the weight applied after rounding back, as transformers does.
pub(crate) fn rms_norm(x: &Tensor, weight: &Tensor, epsilon: f64) -> Result<Tensor, LmError> {
    let wide = x.f_to_kind(Kind::Float)?;
    let mean = wide.f_square()?.f_mean_dim(-1i64, true, Kind::Float)?;
    let scaled = wide.f_mul(&mean.f_add_scalar(epsilon)?.f_rsqrt()?)?;
    Ok(scaled.f_to_kind(x.kind())?.f_mul(weight)?)
}

/// silu(gate) · up, of `[…, 2 · inner]`.
pub(crate) fn swiglu(gate_up: &Tensor) -> Result<Tensor, LmError> {
    let inner = gate_up.size().last().copied().unwrap_or_default() / 2;
    Ok(gate_up.f_narrow(-1, 0, inner)?.f_silu()?.f_mul(&gate_up.f_narrow(-1, inner, inner)?)?)
}

/// `[batch, length, q + k + v]` → q, k, v, each `[batch, heads, length, head_dim]`.
pub(crate) fn split_heads(qkv: &Tensor, config: &DecoderConfig) -> Result<(Tensor, Tensor, Tensor), LmError> {
    let (batch, length, _) = qkv.size3()?;
    let (heads, kv_heads) = (config.heads, config.kv_heads);
    let all = qkv.f_reshape([batch, length, heads + 2 * kv_heads, config.head_dim])?.f_transpose(1, 2)?;
    let part = |first: i64, count: i64| all.f_narrow(1, first, count);
    Ok((part(0, heads)?, part(heads, kv_heads)?, part(heads + kv_heads, kv_heads)?))
}

/// `[batch, heads, length, head_dim]` → `[batch, length, heads · head_dim]`.
pub(crate) fn join_heads(heads: &Tensor) -> Result<Tensor, LmError> {
    let (batch, count, length, width) = heads.size4()?;
    Ok(heads.f_transpose(1, 2)?.f_reshape([batch, length, count * width])?)
}
