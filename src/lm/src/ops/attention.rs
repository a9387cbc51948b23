//! Attention and its gradient, by our kernel where it can be ([`crate::attention`]), else by libtorch.

use half::bf16;
use tch::{Device, Kind, Tensor};

use super::linear::multiplies;
use super::plain::{join_heads, split_heads};
use super::{values, values_mut};
use crate::LmError;
use crate::attention::{Heads, Sequence, Work};
use crate::checkpoint::DecoderConfig;
use crate::products::Factor;

/// Causal attention by libtorch, of sequences of one length, and what its gradient needs.
pub(crate) struct Attention {
    /// `[batch, length, heads · head_dim]`.
    pub(crate) output: Tensor,
    way: Way,
}

/// How libtorch computes attention.
enum Way {
    /// libtorch's kernel for CPU: its q, k, v and output, `[batch, heads, length, head_dim]`, and the row-wise log of the sum
    /// of exponentials that it gave.
    Flash([Tensor; 4], Tensor),
    /// Whatever libtorch has for the device, with its gradient: q, k, v and the output.
    Autograd([Tensor; 4]),
}

impl Attention {
    /// Attention of a group's joined heads `[batch, length, (heads + 2 · key-value heads) · head_dim]`.
    pub(crate) fn forward(joint: &Tensor, config: &DecoderConfig) -> Result<Self, LmError> {
        let (q, k, v) = split_heads(joint, config)?;
        match joint.device() {
            Device::Cpu => Self::by_flash(q, k, v),
            _ => Self::by_autograd(q, k, v),
        }
    }

    fn by_flash(q: Tensor, k: Tensor, v: Tensor) -> Result<Self, LmError> {
        let (wide_k, wide_v) = (repeated(&k, &q)?, repeated(&v, &q)?);
        let (output, normaliser) = Tensor::f_internal_scaled_dot_product_flash_attention_for_cpu(
            &q,
            &wide_k,
            &wide_v,
            0.0,
            true,
            None::<&Tensor>,
            None,
        )?;
        let way = Way::Flash([q, k, v, output.shallow_clone()], normaliser);
        Ok(Self { output: join_heads(&output)?, way })
    }

    /// Autograd over this one operation: its kernels differ by device, kind and head width.
    fn by_autograd(q: Tensor, k: Tensor, v: Tensor) -> Result<Self, LmError> {
        let leaf = |tensor: Tensor| tensor.f_detach()?.f_set_requires_grad(true);
        let (q, k, v) = (leaf(q)?, leaf(k)?, leaf(v)?);
        let output = tch::with_grad(|| -> Result<Tensor, LmError> {
            let (wide_k, wide_v) = (repeated(&k, &q)?, repeated(&v, &q)?);
            let none = None::<&Tensor>;
            Ok(Tensor::f_scaled_dot_product_attention(&q, &wide_k, &wide_v, none, 0.0, true, None, false)?)
        })?;
        Ok(Self { output: join_heads(&output.detach())?, way: Way::Autograd([q, k, v, output]) })
    }

    /// The output alone, where no gradient is wanted.
    pub(crate) fn inference(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor, LmError> {
        let (wide_k, wide_v) = (repeated(k, q)?, repeated(v, q)?);
        Ok(Tensor::f_scaled_dot_product_attention(q, &wide_k, &wide_v, None::<&Tensor>, 0.0, true, None, false)?)
    }

    /// Gradient of the joined heads, of which the output's gradient is `gradient` `[batch, length, heads · head_dim]`.
    pub(crate) fn backward(self, gradient: &Tensor) -> Result<Tensor, LmError> {
        let (batch, length, _) = gradient.size3()?;
        let apart = |q: &Tensor| -> Result<Tensor, LmError> {
            Ok(gradient.f_reshape([batch, length, -1, q.size4()?.3])?.f_transpose(1, 2)?)
        };
        let (q, k, v) = match self.way {
            Way::Flash([q, k, v, output], normaliser) => {
                let (wide_k, wide_v) = (repeated(&k, &q)?, repeated(&v, &q)?);
                let (of_q, of_k, of_v) = Tensor::f_internal_scaled_dot_product_flash_attention_for_cpu_backward(
                    &apart(&q)?,
                    &q,
                    &wide_k,
                    &wide_v,
                    &output,
                    &normaliser,
                    0.0,
                    true,
                    None::<&Tensor>,
                    None,
                )?;
                (of_q, summed(&of_k, &k)?, summed(&of_v, &v)?)
            }
            Way::Autograd([q, k, v, output]) => {
                let gradient = apart(&q)?;
                let objective = tch::with_grad(|| output.f_mul(&gradient)?.f_sum(Kind::Float))?;
                let found = Tensor::f_run_backward(&[objective], &[&q, &k, &v], false, false)?;
                match <[Tensor; 3]>::try_from(found) {
                    Ok([q, k, v]) => (q, k, v),
                    Err(_) => return Err(LmError::Malformed("attention: libtorch gave no gradient".into())),
                }
            }
        };
        let joint = Tensor::f_cat(&[q.f_transpose(1, 2)?, k.f_transpose(1, 2)?, v.f_transpose(1, 2)?], 2)?;
        Ok(joint.f_reshape([batch, length, -1])?)
    }
}

/// Causal attention of sequences one behind the other by our kernel, where that can compute it: joined heads `[1, tokens,
/// (heads + 2 · key-value heads) · head_dim]` to `[1, tokens, heads · head_dim]`. The lengths must make up all tokens.
pub(crate) fn attend_causal(
    joint: &Tensor,
    config: &DecoderConfig,
    lengths: &[usize],
) -> Result<Option<Tensor>, LmError> {
    on_cpu!(joint, E => {
        own_forward::<E>(joint, heads_of(config), lengths.iter().map(|&length| (1..=length).collect()))
    }, Ok(None))
}

/// Gradient of the joined heads, of which that of what [`attend_causal`] gave is `gradient`.
pub(crate) fn attend_causal_backward(
    gradient: &Tensor,
    joint: &Tensor,
    config: &DecoderConfig,
    lengths: &[usize],
) -> Result<Tensor, LmError> {
    on_cpu!(joint, E => {
        let (heads, gradient, joint) = (heads_of(config), gradient.f_contiguous()?, joint.f_contiguous()?);
        let mut out = joint.f_empty_like()?;
        let (mut rows, mut gradients) = (values::<E>(&joint)?, values::<E>(&gradient)?);
        let (mut outs, mut work) = (values_mut::<E>(&mut out)?, Work::new());
        for &length in lengths {
            let (own_rows, own_gradients, own_outs);
            (own_rows, rows) = rows.split_at(length * heads.row());
            (own_gradients, gradients) = gradients.split_at(length * heads.out());
            (own_outs, outs) = outs.split_at_mut(length * heads.row());
            let visible: Vec<usize> = (1..=length).collect();
            Sequence { rows: own_rows, heads, visible: &visible }.backward(own_gradients, &mut work, own_outs);
        }
        Ok(out)
    }, Err(LmError::Malformed("attention by our kernel on another device than the CPU".into())))
}

fn heads_of(config: &DecoderConfig) -> Heads {
    Heads { queries: config.heads as usize, keys: config.kv_heads as usize, width: config.head_dim as usize }
}

/// A text among others, one behind the other.
#[derive(Clone, Copy)]
pub(crate) struct Text {
    /// Its tokens, padding included.
    pub(crate) length: usize,
    /// The first ones, which are no padding.
    pub(crate) own: usize,
}

/// Attention of each text to its own tokens, by our kernel where that can compute it: joined heads `[tokens, 3 · heads ·
/// head_dim]` to `[tokens, heads · head_dim]`. The texts must make up all tokens.
pub(crate) fn attend(joint: &Tensor, heads: i64, texts: &[Text]) -> Result<Option<Tensor>, LmError> {
    let (_, width) = joint.size2()?;
    let count = heads as usize;
    let heads = Heads { queries: count, keys: count, width: width as usize / 3 / count };
    assert!(heads.row() == width as usize);
    on_cpu!(joint, E => {
        own_forward::<E>(joint, heads, texts.iter().map(|text| vec![text.own; text.length]))
    }, Ok(None))
}

/// The same by libtorch, of texts of one length: joined heads `[texts, length, 3 · heads · head_dim]`, to whose scores
/// `blocked` is added.
pub(crate) fn attend_padded(joint: &Tensor, heads: i64, blocked: &Tensor) -> Result<Tensor, LmError> {
    let [q, k, v] = thirds(joint, heads)?;
    join_heads(&Tensor::f_scaled_dot_product_attention(&q, &k, &v, Some(blocked), 0.0, false, None, false)?)
}

/// Queries, keys and values, `[texts, heads, length, head_dim]` each, of joined heads `[texts, length, 3 · heads · head_dim]`.
pub(crate) fn thirds(joint: &Tensor, heads: i64) -> Result<[Tensor; 3], LmError> {
    let split = joint.f_unflatten(-1, [3, heads, -1])?;
    let part = |index: i64| split.f_select(2, index)?.f_transpose(1, 2);
    Ok([part(0)?, part(1)?, part(2)?])
}

/// What our kernel gives for sequences one behind the other, whose positions see as many keys as each says, if it can compute
/// all of them: joined heads `[…, tokens, row of heads]` to `[…, tokens, heads · head_dim]`.
fn own_forward<E: Factor>(
    joint: &Tensor,
    heads: Heads,
    sequences: impl Iterator<Item = Vec<usize>> + Clone,
) -> Result<Option<Tensor>, LmError> {
    let mut lengths = sequences.clone().map(|visible| visible.len() as i64);
    if !multiplies::<E>(heads.width as i64) || !lengths.all(multiplies::<E>) {
        return Ok(None);
    }
    let joint = joint.f_contiguous()?;
    let mut shape = joint.size();
    shape.pop();
    shape.push(heads.out() as i64);
    let mut out = Tensor::f_empty(shape, (E::KIND, Device::Cpu))?;
    let (mut rows, mut outs, mut work) = (values::<E>(&joint)?, values_mut(&mut out)?, Work::new());
    for visible in sequences {
        let (own_rows, own_outs);
        (own_rows, rows) = rows.split_at(visible.len() * heads.row());
        (own_outs, outs) = outs.split_at_mut(visible.len() * heads.out());
        Sequence { rows: own_rows, heads, visible: &visible }.forward(&mut work, own_outs);
    }
    assert!(rows.is_empty());
    Ok(Some(out))
}

/// Key-value heads, one for each query head.
fn repeated(heads: &Tensor, q: &Tensor) -> Result<Tensor, LmError> {
    let repeats = q.size()[1] / heads.size()[1];
    match repeats {
        1 => Ok(heads.shallow_clone()),
        _ => Ok(heads.f_repeat_interleave_self_int(repeats, 1, None::<i64>)?),
    }
}

/// The reverse: gradients of the copies, summed by head.
fn summed(gradient: &Tensor, heads: &Tensor) -> Result<Tensor, LmError> {
    let [batch, wide, length, width] = <[i64; 4]>::from(gradient.size4()?);
    let count = heads.size()[1];
    match wide / count {
        1 => Ok(gradient.shallow_clone()),
        repeats => {
            let groups = gradient.f_reshape([batch, count, repeats, length, width])?;
            Ok(groups.f_sum_dim_intlist(2i64, false, gradient.kind())?)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decoder::tests::{largest_difference, tiny, wave};
    use crate::products;

    #[test]
    fn attention_is_the_same_by_autograd() {
        // Lengths that fill no panel, some panels, and several blocks; with query heads that share a key and without.
        for (kind, tolerance) in [(Kind::Float, 1e-5), (Kind::BFloat16, 0.05)] {
            for (name, length) in [("smollm2", 12), ("llama2", 64), ("smollm2", 2 * 96 + 20), ("smollm2", 13)] {
                let config = tiny(name).config;
                let width = (config.heads + 2 * config.kv_heads) * config.head_dim;
                let joint = wave(1, &[2, length, width]).to_kind(kind);
                let gradient = wave(9, &[2, length, config.heads * config.head_dim]).to_kind(kind);
                tch::no_grad(|| {
                    let one = Attention::forward(&joint, &config).unwrap();
                    let (q, k, v) = split_heads(&joint.to_kind(Kind::Double), &config).unwrap();
                    let other = Attention::by_autograd(q, k, v).unwrap();
                    let close = |one: &Tensor, other: &Tensor| {
                        let difference = largest_difference(&one.to_kind(Kind::Double), other);
                        assert!(difference < tolerance, "{kind:?} {name} {length}: {difference}");
                    };
                    close(&one.output, &other.output);
                    let expected = other.output.copy();
                    let gradients = other.backward(&gradient.to_kind(Kind::Double)).unwrap();
                    close(&one.backward(&gradient).unwrap(), &gradients);
                    // Ours, of one sequence behind the other.
                    let flat = |whole: &Tensor| whole.flatten(0, 1).unsqueeze(0);
                    let (joint, lengths) = (flat(&joint), [length as usize; 2]);
                    let Some(found) = attend_causal(&joint, &config, &lengths).unwrap() else {
                        assert!(!products::is_supported() || kind == Kind::BFloat16 && length % 2 == 1);
                        return;
                    };
                    close(&found, &flat(&expected));
                    let found = attend_causal_backward(&flat(&gradient), &joint, &config, &lengths).unwrap();
                    close(&found, &flat(&gradients));
                });
            }
        }
    }

    #[test]
    fn texts_attend_to_their_own_tokens() {
        let heads = 4;
        let texts = [(72, 70), (8, 3), (200, 200), (8, 7)].map(|(length, own)| Text { length, own });
        let all = texts.iter().map(|text| text.length as i64).sum();
        let joint = wave(5, &[all, 3 * heads * 32]);
        for (kind, tolerance) in [(Kind::Float, 1e-5), (Kind::BFloat16, 0.02)] {
            let found = attend(&joint.to_kind(kind), heads, &texts).unwrap();
            assert_eq!(found.is_some(), products::is_supported());
            let mut first = 0;
            for Text { length, own } in texts {
                let (length, own) = (length as i64, own as i64);
                let part = joint.narrow(0, first, length).unsqueeze(0);
                let is_padding = Tensor::arange(length, (Kind::Int64, Device::Cpu)).ge(own).reshape([1, 1, 1, -1]);
                let by_libtorch = |kind| {
                    let blocked = Tensor::zeros([1, 1, 1, length], (kind, Device::Cpu));
                    let blocked = blocked.masked_fill(&is_padding, f64::NEG_INFINITY);
                    attend_padded(&part.to_kind(kind), heads, &blocked).unwrap().get(0)
                };
                let found = found.as_ref().map_or_else(|| by_libtorch(kind), |all| all.narrow(0, first, length));
                let [found, expected] = [found.to_kind(Kind::Double), by_libtorch(Kind::Double)];
                let difference = largest_difference(&found.narrow(0, 0, own), &expected.narrow(0, 0, own));
                assert!(difference < tolerance, "{kind:?} {own} of {length}: {difference}");
                first += length;
            }
        }
    }
}
