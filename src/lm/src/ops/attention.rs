//! Attention by whole products, for CPU.
//!
//! The query heads that share a key-value head stand beside each other, so that one product takes them all and no key is
//! repeated. G below is batch · key-value heads, S the query heads that share one, L the length.

use super::*;

/// Query positions that are multiplied at once where attention is causal: the keys behind a block's last position are
/// not looked at. Large enough for a product to run at full speed.
pub(super) const BLOCK: i64 = 256;

/// q, k and v, `[batch, heads, length, head_dim]`, laid out for products: `[G, S, L, head_dim]`, `[G, L, head_dim]` twice.
pub(super) fn joined(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor, Tensor), LmError> {
    let (batch, heads, length, width) = k.size4()?;
    let keys = [batch * heads, length, width];
    Ok((q.f_reshape([batch * heads, q.size()[1] / heads, length, width])?, k.f_reshape(keys)?, v.f_reshape(keys)?))
}

/// What causal attention gives: `[G, S, L, head_dim]`.
pub(super) fn causal(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor, LmError> {
    let outputs = blocks(k.size()[1]).map(|block| {
        let (q, k, v) = (block.queries(q)?, block.keys(k)?, block.keys(v)?);
        block.apart(&probabilities(&q, &k, &[block.visible()])?.f_bmm(&v)?)
    });
    cat(&outputs.collect::<Result<Vec<_>, _>>()?)
}

/// What attention gives where each text sees its own first `lengths` positions: `[G, S, L, head_dim]`.
pub(super) fn of_lengths(q: &Tensor, k: &Tensor, v: &Tensor, lengths: &[usize]) -> Result<Tensor, LmError> {
    let visible: Vec<Vec<usize>> = lengths.iter().map(|&length| vec![length]).collect();
    Ok(probabilities(&q.f_flatten(1, 2)?, k, &visible)?.f_bmm(v)?.f_view_as(q)?)
}

/// Gradients of q, k and v in their own shapes, of which that of causal attention's output is `gradient`
/// `[batch, heads, length, head_dim]`.
pub(super) fn backward(
    gradient: &Tensor,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
) -> Result<(Tensor, Tensor, Tensor), LmError> {
    let shape = gradient.size();
    let gradient = gradient.f_reshape(q.size())?;
    let (of_k, of_v) = (k.f_zeros_like()?, v.f_zeros_like()?);
    let of_q = blocks(k.size()[1]).map(|block| {
        let (q, k, v, gradient) = (block.queries(q)?, block.keys(k)?, block.keys(v)?, block.queries(&gradient)?);
        let visible = block.visible();
        let probabilities = probabilities(&q, &k, std::slice::from_ref(&visible))?;
        let _ = block.keys(&of_v)?.f_add_(&probabilities.f_transpose(1, 2)?.f_bmm(&gradient)?)?;
        let mut of_scores = gradient.f_bmm(&v.f_transpose(1, 2)?)?;
        let (_, seen, width) = k.size3()?;
        on_cpu!(of_scores, E => {
            let (of_scores, probabilities) = (values_mut::<E>(&mut of_scores)?, values(&probabilities)?);
            kernels::softmax_backward(of_scores, probabilities, seen as usize, scale(width), &visible);
            Ok(())
        }, Err(elsewhere()))?;
        let _ = block.keys(&of_k)?.f_add_(&of_scores.f_transpose(1, 2)?.f_bmm(&q)?)?;
        block.apart(&of_scores.f_bmm(&k)?)
    });
    let of_q = cat(&of_q.collect::<Result<Vec<_>, _>>()?)?;
    let keys = [shape[0], -1, shape[2], shape[3]];
    Ok((of_q.f_reshape(&shape)?, of_k.f_reshape(keys)?, of_v.f_reshape(keys)?))
}

/// How much each of the rows `[G, rows, head_dim]` attends to each key `[G, seen, head_dim]`: `[G, rows, seen]`. `visible`
/// says for each of an example's rows, or for all alike, how many keys it sees; there is one entry for each example, or
/// one for all.
fn probabilities(rows: &Tensor, keys: &Tensor, visible: &[Vec<usize>]) -> Result<Tensor, LmError> {
    let (_, seen, width) = keys.size3()?;
    let mut scores = rows.f_bmm(&keys.f_transpose(1, 2)?)?;
    on_cpu!(scores, E => {
        let scores = values_mut::<E>(&mut scores)?;
        for (scores, visible) in scores.chunks_mut((scores.len() / visible.len()).max(1)).zip(visible) {
            kernels::softmax::<E>(scores, seen as usize, scale(width), visible);
        }
        Ok(())
    }, Err(elsewhere()))?;
    Ok(scores)
}

/// Neighbouring query positions, and the keys that they see.
#[derive(Clone, Copy)]
struct Block {
    first: i64,
    count: i64,
}

fn blocks(length: i64) -> impl Iterator<Item = Block> {
    (0..length).step_by(BLOCK as usize).map(move |first| Block { first, count: BLOCK.min(length - first) })
}

impl Block {
    /// The block's positions of `[G, S, L, head_dim]`, as rows `[G, S · positions, head_dim]`.
    fn queries(self, all: &Tensor) -> Result<Tensor, LmError> {
        Ok(all.f_narrow(2, self.first, self.count)?.f_flatten(1, 2)?)
    }

    /// The reverse: `[G, S, positions, head_dim]`.
    fn apart(self, rows: &Tensor) -> Result<Tensor, LmError> {
        let (groups, _, width) = rows.size3()?;
        Ok(rows.f_reshape([groups, -1, self.count, width])?)
    }

    /// What the block sees of `[G, L, head_dim]`.
    fn keys(self, all: &Tensor) -> Result<Tensor, LmError> {
        Ok(all.f_narrow(1, 0, self.first + self.count)?)
    }

    /// How many keys each position sees: itself and those before it.
    fn visible(self) -> Vec<usize> {
        (self.first as usize + 1..=(self.first + self.count) as usize).collect()
    }
}

fn cat(blocks: &[Tensor]) -> Result<Tensor, LmError> {
    match blocks {
        [one] => Ok(one.shallow_clone()),
        _ => Ok(Tensor::f_cat(blocks, 2)?),
    }
}

fn scale(width: i64) -> f32 {
    1.0 / (width as f32).sqrt()
}

fn elsewhere() -> LmError {
    LmError::Malformed("attention by products on another device than the CPU".into())
}
