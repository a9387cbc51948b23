//! The second half of a decoder's layer, and its gradient: two products with SwiGLU between them.
//!
//! On CPU, a block of rows goes through all of it while it is in the second cache: what stands between the products is four
//! times as wide as what comes in, and would be written to memory and read back.

use half::bf16;
use tch::{Device, Kind, Tensor};

use super::{Frozen, linear, matmul, swiglu, swiglu_backward, values, values_mut};
use crate::LmError;
use crate::kernels;
use crate::products::{self, Activation, Factor, Multiplier, Packed, Plus};

/// The weights of a feed-forward, for rows `width` wide and `inner` neurons.
pub(crate) struct FeedForward<'a> {
    /// Gate, then up, `[2 · inner, width]`.
    pub(crate) gate_up: &'a Frozen,
    /// `[width, inner]`.
    pub(crate) down: &'a Frozen,
}

impl FeedForward<'_> {
    /// `([…, 2 · inner], […, width])` of x and rows `[…, width]`: gate and up of x, and with it the rows + down · (silu(gate) · up).
    pub(crate) fn forward(&self, x: &Tensor, rows: &Tensor) -> Result<(Tensor, Tensor), LmError> {
        on_cpu!(x, E => {
            if let (Some(gate_up), Some(down)) = (self.gate_up.own::<E>(true)?, self.down.own::<E>(true)?) {
                return forward::<E>(x, rows, gate_up, down);
            }
        }, {});
        let gate_up = linear(x, self.gate_up, None, None)?;
        let out = linear(&swiglu(&gate_up)?, self.down, None, Some(rows))?;
        Ok((gate_up, out))
    }

    /// Gradient with respect to x, of which the output's is `gradient` and `gate_up` is what [`Self::forward`] gave.
    pub(crate) fn backward(&self, gradient: &Tensor, gate_up: Tensor) -> Result<Tensor, LmError> {
        on_cpu!(gradient, E => {
            if let (Some(by_gate_up), Some(by_down)) = (self.gate_up.own::<E>(false)?, self.down.own::<E>(false)?) {
                return backward::<E>(gradient, &gate_up, by_gate_up, by_down);
            }
        }, {});
        let inner = matmul(gradient, self.down, None)?;
        let joint = swiglu_backward(&inner, &gate_up)?;
        drop((inner, gate_up));
        matmul(&joint, self.gate_up, None)
    }
}

fn forward<E: Factor>(
    x: &Tensor,
    rows: &Tensor,
    by_gate_up: &Packed,
    by_down: &Packed,
) -> Result<(Tensor, Tensor), LmError> {
    let (x, rows) = (x.f_contiguous()?, rows.f_contiguous()?);
    let (width, inner) = (by_down.outputs(), by_down.inputs());
    let mut shape = x.size();
    shape.pop();
    shape.push(2 * inner as i64);
    let (mut gate_up, mut out) = (Tensor::f_empty(shape, (E::KIND, Device::Cpu))?, rows.f_empty_like()?);
    let block = E::block(width);
    let mut room = vec![E::narrow(0.0); block * inner];
    let ins = values::<E>(&x)?.chunks(block * width).zip(values(&rows)?.chunks(block * width));
    let outs =
        values_mut(&mut gate_up)?.chunks_mut(block * 2 * inner).zip(values_mut(&mut out)?.chunks_mut(block * width));
    for ((x, rows), (gate_up, out)) in ins.zip(outs) {
        let between = &mut room[..gate_up.len() / 2];
        products::product(x, Multiplier::Packed(by_gate_up), Plus::NOTHING, Activation::Identity, gate_up);
        kernels::swiglu(gate_up, inner, between);
        let plus = Plus { bias: None, rows: Some(rows) };
        products::product(between, Multiplier::Packed(by_down), plus, Activation::Identity, out);
    }
    Ok((gate_up, out))
}

fn backward<E: Factor>(
    gradient: &Tensor,
    gate_up: &Tensor,
    by_gate_up: &Packed,
    by_down: &Packed,
) -> Result<Tensor, LmError> {
    let (gradient, gate_up) = (gradient.f_contiguous()?, gate_up.f_contiguous()?);
    let (width, inner) = (by_down.inputs(), by_down.outputs());
    let mut out = gradient.f_empty_like()?;
    let block = E::block(width);
    let (mut room, mut wide_room) = (vec![E::narrow(0.0); block * inner], vec![E::narrow(0.0); block * 2 * inner]);
    let ins = values::<E>(&gradient)?.chunks(block * width).zip(values(&gate_up)?.chunks(block * 2 * inner));
    for ((gradient, gate_up), out) in ins.zip(values_mut(&mut out)?.chunks_mut(block * width)) {
        let (between, joint) = (&mut room[..gate_up.len() / 2], &mut wide_room[..gate_up.len()]);
        products::product(gradient, Multiplier::Packed(by_down), Plus::NOTHING, Activation::Identity, between);
        kernels::swiglu_backward(between, gate_up, inner, joint);
        products::product(joint, Multiplier::Packed(by_gate_up), Plus::NOTHING, Activation::Identity, out);
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decoder::tests::wave;

    #[test]
    fn blocks_of_rows_give_what_all_rows_do() {
        for kind in [Kind::Float, Kind::BFloat16] {
            let value = |seed, shape: &[i64]| wave(seed, shape).to_kind(kind);
            let gate_up: Frozen = value(1, &[2 * 70, 34]).into();
            let down: Frozen = value(2, &[34, 70]).into();
            let weights = FeedForward { gate_up: &gate_up, down: &down };
            let (x, rows, gradient) = (value(3, &[1, 230, 34]), value(4, &[1, 230, 34]), value(5, &[1, 230, 34]));
            let (between, out) = weights.forward(&x, &rows).unwrap();
            let expected = linear(&x, &gate_up, None, None).unwrap();
            assert_eq!(between, expected);
            assert_eq!(out, linear(&swiglu(&expected).unwrap(), &down, None, Some(&rows)).unwrap());
            let inner = matmul(&gradient, &down, None).unwrap();
            let joint = swiglu_backward(&inner, &expected).unwrap();
            assert_eq!(weights.backward(&gradient, expected).unwrap(), matmul(&joint, &gate_up, None).unwrap());
        }
    }
}
