//! Attention of a batch's examples, each by itself: all in one call where there is a kernel for that, else group by group.

use tch::Tensor;

use super::Batch;
use crate::checkpoint::DecoderConfig;
use crate::{LmError, cuda, ops};

/// What attention's gradient needs.
pub(super) enum Attention {
    /// The joined heads, for our kernel.
    Own(Tensor),
    Cuda(cuda::Attention),
    Groups(Vec<ops::Attention>),
}

impl Attention {
    /// Of joined heads `[1, T, (H + 2 · K) · d]`, with the output `[1, T, H · d]`.
    pub(super) fn forward(joint: Tensor, config: &DecoderConfig, batch: &Batch) -> Result<(Self, Tensor), LmError> {
        if let Some(sequences) = &batch.sequences {
            let whole = cuda::Attention::forward(joint, config, sequences)?;
            let output = whole.output()?;
            return Ok((Self::Cuda(whole), output));
        }
        if let Some(output) = ops::attend_causal(&joint, config, &batch.lengths())? {
            return Ok((Self::Own(joint), output));
        }
        let groups = batch.groups.iter().map(|group| ops::Attention::forward(&group.of(&joint)?, config));
        let groups = groups.collect::<Result<Vec<_>, LmError>>()?;
        let output = joined(groups.iter().map(|group| Ok(group.output.shallow_clone())))?;
        Ok((Self::Groups(groups), output))
    }

    /// Gradient of the joined heads, of which the output's is `gradient`.
    pub(super) fn backward(self, gradient: &Tensor, config: &DecoderConfig, batch: &Batch) -> Result<Tensor, LmError> {
        match (self, &batch.sequences) {
            (Self::Own(joint), _) => ops::attend_causal_backward(gradient, &joint, config, &batch.lengths()),
            (Self::Cuda(whole), Some(sequences)) => whole.backward(gradient, sequences),
            (Self::Cuda(_), None) => Err(LmError::Malformed("attention of another batch".into())),
            (Self::Groups(attention), _) => {
                let groups = batch.groups.iter().zip(attention);
                joined(groups.map(|(group, attention)| attention.backward(&group.of(gradient)?)))
            }
        }
    }
}

/// Joins parts `[B, L, width]` of groups to `[1, T, width]`.
fn joined(parts: impl Iterator<Item = Result<Tensor, LmError>>) -> Result<Tensor, LmError> {
    let flat = |part: Tensor| -> Result<Tensor, LmError> {
        let width = part.size3()?.2;
        Ok(part.f_reshape([1, -1, width])?)
    };
    let parts = parts.map(|part| flat(part?)).collect::<Result<Vec<_>, _>>()?;
    Ok(Tensor::f_cat(&parts, 1)?)
}
