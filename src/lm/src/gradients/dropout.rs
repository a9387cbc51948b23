//! Dropout masks of the adapters' inputs.
//!
//! A mask depends on the example, the layer and the position alone, never on the place in the batch. The projections that
//! share an input share its mask (PEFT draws one per projection): the expected gradient is the same.

use tch::{Device, Kind, Tensor};

use super::{Batch, Example};
use crate::LmError;
use crate::decoder::Decoder;

/// Which input of a layer a mask is for.
#[derive(Clone, Copy)]
pub(super) enum Site {
    /// Input of q, k and v.
    Attention = 0,
    /// Input of o.
    Output = 1,
}

/// Makes the masks of a batch.
pub(super) struct Masks {
    rate: f64,
    /// Seed and padded length of each example.
    examples: Vec<(u64, i64)>,
    kind: Kind,
    device: Device,
}

impl Masks {
    /// Masks of dropout at `rate` for the `examples` of `batch`.
    pub(super) fn new(rate: f64, decoder: &Decoder, examples: &[Example], batch: &Batch) -> Self {
        let lengths = batch.groups.iter().flat_map(|group| (0..group.examples).map(|_| group.length));
        let examples = examples.iter().map(|example| example.dropout_seed).zip(lengths).collect();
        Self { rate, examples, kind: decoder.compute.kind, device: decoder.compute.device }
    }

    /// `input` `[1, tokens, width]` after dropout: itself where the rate is 0.
    pub(super) fn apply(&self, input: &Tensor, layer: usize, site: Site) -> Result<Tensor, LmError> {
        match self.mask(input.size3()?.2, layer, site)? {
            None => Ok(input.shallow_clone()),
            Some(mask) => Ok(input.f_mul(&mask)?),
        }
    }

    /// 0 or 1 / (1 - rate), `[1, tokens, width]`; `None` where the rate is 0.
    fn mask(&self, width: i64, layer: usize, site: Site) -> Result<Option<Tensor>, LmError> {
        if self.rate == 0.0 {
            return Ok(None);
        }
        let threshold = (self.rate * 65536.0) as u16;
        let kept = (1.0 / (1.0 - f64::from(threshold) / 65536.0)) as f32;
        let tokens: i64 = self.examples.iter().map(|(_, length)| length).sum();
        let mut values = Vec::with_capacity((tokens * width) as usize);
        for (seed, length) in &self.examples {
            let stream = mix(seed ^ mix((2 * layer + site as usize) as u64 + 1));
            for cell in 0..(length * width) as usize {
                // Four 16-bit draws from each word of a counter-based generator.
                let word = mix(stream.wrapping_add((cell / 4) as u64));
                let draw = (word >> (16 * (cell % 4))) as u16;
                values.push(if draw < threshold { 0.0 } else { kept });
            }
        }
        let mask = Tensor::f_from_slice(&values)?.f_reshape([1, tokens, width])?;
        Ok(Some(mask.f_to_kind(self.kind)?.f_to_device(self.device)?))
    }
}

/// SplitMix64's finaliser (Steele, Lea and Flood 2014): a bijection that scatters counters.
fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    value ^ (value >> 31)
}
