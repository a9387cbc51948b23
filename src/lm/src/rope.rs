//! Rotary position embedding (Su et al. 2021, arXiv 2104.09864), with Llama 3's scaling of frequencies.
//!
//! Frequencies and angles are computed in float32 with the same operations in the same order as transformers, because
//! at position 8,000 one unit in the last place of a frequency is already an angle of 5e-4.

use tch::{Kind, Tensor};

use crate::checkpoint::{DecoderConfig, Llama3Scaling};
use crate::{LmError, device::Compute};

/// The frequencies of a model.
pub(crate) struct Rope {
    /// `[head_dim / 2]` f32.
    frequencies: Tensor,
    compute: Compute,
}

/// Cosines and sines of some positions in the compute kind.
pub(crate) struct Angles {
    /// `[…positions, 1, head_dim / 2]`
    pub(crate) cos: Tensor,
    /// `[…positions, 1, head_dim / 2]`
    pub(crate) sin: Tensor,
    /// `[…positions, 1, head_dim]`: what an element is multiplied by, and what the one that it pairs with.
    factors: [Tensor; 2],
}

impl Rope {
    pub(crate) fn new(config: &DecoderConfig, compute: Compute) -> Result<Self, LmError> {
        let cpu = (Kind::Float, tch::Device::Cpu);
        let exponents =
            Tensor::f_arange_start_step(0, config.head_dim, 2, cpu)?.f_div_scalar(config.head_dim as f64)?;
        let powers = Tensor::f_pow_scalar(config.rope_theta, &exponents)?;
        let mut frequencies = Vec::<f32>::try_from(powers.f_reciprocal()?)?;
        if let Some(scaling) = &config.rope_scaling {
            for frequency in &mut frequencies {
                *frequency = scaled(*frequency, scaling);
            }
        }
        let frequencies = Tensor::f_from_slice(&frequencies)?.f_to_device(compute.device)?;
        Ok(Self { frequencies, compute })
    }

    /// `[head_dim / 2]` f32: the angle per position of each pair.
    pub(crate) fn frequencies(&self) -> &Tensor {
        &self.frequencies
    }

    /// Angles of `positions` (any shape, i64).
    pub(crate) fn at(&self, positions: &Tensor) -> Result<Angles, LmError> {
        let angles = positions.f_to_kind(Kind::Float)?.f_unsqueeze(-1)?.f_mul(&self.frequencies)?.f_unsqueeze(-2)?;
        let kind = self.compute.kind;
        Angles::new(angles.f_cos()?.f_to_kind(kind)?, angles.f_sin()?.f_to_kind(kind)?)
    }

    /// Angles of positions 0 to `length` - 1.
    pub(crate) fn first(&self, length: i64) -> Result<Angles, LmError> {
        self.at(&Tensor::f_arange(length, (Kind::Int64, self.compute.device))?)
    }
}

impl Angles {
    pub(crate) fn new(cos: Tensor, sin: Tensor) -> Result<Self, LmError> {
        let factors = [Tensor::f_cat(&[&cos, &cos], -1)?, Tensor::f_cat(&[&sin.f_neg()?, &sin], -1)?];
        Ok(Self { cos, sin, factors })
    }

    /// Angles of the opposite rotation: the gradient of a rotation is its inverse.
    pub(crate) fn inverse(&self) -> Result<Self, LmError> {
        Self::new(self.cos.shallow_clone(), self.sin.f_neg()?)
    }
}

/// Rotates `x` `[…, heads, head_dim]`: element i pairs with element i + head_dim / 2, as in Hugging Face's weights.
pub(crate) fn rotate(x: &Tensor, angles: &Angles) -> Result<Tensor, LmError> {
    let half = x.size().last().copied().unwrap_or_default() / 2;
    let (a, b) = (x.f_narrow(-1, 0, half)?, x.f_narrow(-1, half, half)?);
    let (cos, sin) = (&angles.cos, &angles.sin);
    let first = a.f_mul(cos)?.f_sub(&b.f_mul(sin)?)?;
    let second = b.f_mul(cos)?.f_addcmul(&a, sin)?;
    Ok(Tensor::f_cat(&[first, second], -1)?)
}

/// The same where `x` is, in three passes over it.
pub(crate) fn rotate_(x: &mut Tensor, angles: &Angles) -> Result<(), LmError> {
    let half = x.size().last().copied().unwrap_or_default() / 2;
    let [own, of_pair] = &angles.factors;
    let paired = x.f_unflatten(-1, [2, half])?.f_flip([-2i64])?.f_flatten(-2, -1)?;
    let _ = x.f_mul_(own)?.f_addcmul_(&paired, of_pair)?;
    Ok(())
}

/// Llama 3: long wavelengths are stretched, short ones kept, those between interpolated.
fn scaled(frequency: f32, scaling: &Llama3Scaling) -> f32 {
    let original = scaling.original_max_positions;
    let (low, high) = (scaling.low_freq_factor, scaling.high_freq_factor);
    let wavelength = (2.0 * std::f64::consts::PI) as f32 / frequency;
    if wavelength > (original / low) as f32 {
        frequency / scaling.factor as f32
    } else if wavelength < (original / high) as f32 {
        frequency
    } else {
        let smooth = (original as f32 / wavelength - low as f32) / (high - low) as f32;
        (1.0 - smooth) * frequency / scaling.factor as f32 + smooth * frequency
    }
}
