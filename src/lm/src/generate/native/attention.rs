//! Attention of one position to those before it.
//!
//! The keys of [`BLOCK`] positions stand element by element, so that a vector holds one element of all of them: scores
//! are sums of vectors, and none has to be added up across its lanes. Query heads that share a key-value head go through
//! it together. Every score and every output is summed in an order that depends on the length alone.

use crate::kernels::{Element, exp, kernels, largest, sum};

/// Positions whose keys are interleaved.
pub(super) const BLOCK: usize = 32;

/// Query heads that go together at most: their sums of a block fill half of the vector registers.
const TOGETHER: usize = 4;

/// Columns of a value that are summed at once.
const COLUMNS: usize = 32;

/// Puts the key of `position` into a head's `keys`: block, element, position in the block.
pub(super) fn put_key<E: Element>(key: &[f32], position: usize, keys: &mut [E]) {
    let block = &mut keys[position / BLOCK * BLOCK * key.len()..];
    for (value, places) in key.iter().zip(block.chunks_exact_mut(BLOCK)) {
        places[position % BLOCK] = E::narrow(*value);
    }
}

kernels! {
    /// Attention of `queries` `[heads, width]` of one position to `keys` (whole blocks) and `values` `[length, width]`,
    /// into `out` `[heads, width]`; `scores` is working memory.
    fn attend / attend_body<E: Element>(
        queries: &[f32], keys: &[E], values: &[E], width: usize, scores: &mut Vec<f32>, out: &mut [f32],
    );
}

#[inline(always)]
fn attend_body<E: Element>(
    queries: &[f32],
    keys: &[E],
    values: &[E],
    width: usize,
    scores: &mut Vec<f32>,
    out: &mut [f32],
) {
    let together = TOGETHER * width;
    for (queries, out) in queries.chunks(together).zip(out.chunks_mut(together)) {
        match queries.len() / width {
            1 => heads::<E, 1>(queries, keys, values, width, scores, out),
            2 => heads::<E, 2>(queries, keys, values, width, scores, out),
            3 => heads::<E, 3>(queries, keys, values, width, scores, out),
            _ => heads::<E, TOGETHER>(queries, keys, values, width, scores, out),
        }
    }
}

/// [`attend`] of `Q` heads.
#[inline(always)]
fn heads<E: Element, const Q: usize>(
    queries: &[f32],
    keys: &[E],
    values: &[E],
    width: usize,
    scores: &mut Vec<f32>,
    out: &mut [f32],
) {
    let length = values.len() / width;
    let room = length.next_multiple_of(BLOCK);
    scores.resize(Q * room, 0.0);
    score::<E, Q>(queries, keys, width, room, scores);
    let mut inverses = [0f32; Q];
    for (inverse, scores) in inverses.iter_mut().zip(scores.chunks_exact_mut(room)) {
        let scores = &mut scores[..length];
        let best = largest(scores);
        for score in scores.iter_mut() {
            *score = exp(*score - best);
        }
        *inverse = 1.0 / sum([&*scores], |[score]| score);
    }
    let whole = width / COLUMNS * COLUMNS;
    for first in (0..whole).step_by(COLUMNS) {
        weigh::<E, Q, COLUMNS>(scores, values, width, first, &inverses, out);
    }
    for first in whole..width {
        weigh::<E, Q, 1>(scores, values, width, first, &inverses, out);
    }
}

/// `scores[query][position]`, in rows of `room`; what lies behind the last position means nothing.
#[inline(always)]
fn score<E: Element, const Q: usize>(queries: &[f32], keys: &[E], width: usize, room: usize, scores: &mut [f32]) {
    let scale = 1.0 / (width as f32).sqrt();
    for (block, keys) in keys.chunks_exact(width * BLOCK).take(room / BLOCK).enumerate() {
        let mut sums = [[0f32; BLOCK]; Q];
        for (element, keys) in keys.as_chunks::<BLOCK>().0.iter().enumerate() {
            for (query, sums) in sums.iter_mut().enumerate() {
                let factor = queries[query * width + element];
                for (sum, key) in sums.iter_mut().zip(keys) {
                    *sum += factor * key.wide();
                }
            }
        }
        for (sums, scores) in sums.iter().zip(scores.chunks_exact_mut(room)) {
            for (score, sum) in scores[block * BLOCK..(block + 1) * BLOCK].iter_mut().zip(sums) {
                *score = sum * scale;
            }
        }
    }
}

/// `C` columns from `first` on of the sum of `values`, weighed by `scores`.
#[inline(always)]
fn weigh<E: Element, const Q: usize, const C: usize>(
    scores: &[f32],
    values: &[E],
    width: usize,
    first: usize,
    inverses: &[f32; Q],
    out: &mut [f32],
) {
    let room = scores.len() / Q;
    let mut sums = [[0f32; C]; Q];
    for (position, value) in values.chunks_exact(width).enumerate() {
        let value = &value[first..first + C];
        for (query, sums) in sums.iter_mut().enumerate() {
            let weight = scores[query * room + position];
            for (sum, value) in sums.iter_mut().zip(value) {
                *sum += weight * value.wide();
            }
        }
    }
    for ((sums, inverse), out) in sums.iter().zip(inverses).zip(out.chunks_exact_mut(width)) {
        for (out, sum) in out[first..first + C].iter_mut().zip(sums) {
            *out = sum * inverse;
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;
    use tch::Tensor;

    use super::*;
    use crate::decoder::tests::wave;
    use crate::products::Factor;

    /// Against softmax(q·kᵀ/√d)·v in float64, for groups and widths that do and do not fill what is computed at once.
    fn check<E: Factor>(tolerance: f64) {
        for (heads, width, length) in [(1, 64, 1), (3, 64, 33), (4, 32, 32), (7, 40, 70), (2, 8, 100)] {
            let place = |seed: usize, rows: usize| wave(seed, &[rows as i64, width as i64]);
            let (q, k, v) = (place(1, heads), place(2, length).to_kind(E::KIND), place(3, length).to_kind(E::KIND));
            let floats =
                |tensor: &Tensor| Vec::<f32>::try_from(tensor.to_kind(tch::Kind::Float).flatten(0, -1)).unwrap();
            let mut keys = vec![E::narrow(f32::MAX); length.next_multiple_of(BLOCK) * width];
            for (position, key) in floats(&k).chunks_exact(width).enumerate() {
                put_key(key, position, &mut keys);
            }
            let values: Vec<E> = floats(&v).into_iter().map(E::narrow).collect();
            let (mut scores, mut out) = (Vec::new(), vec![0f32; heads * width]);
            // Working memory that was used for more.
            for _ in 0..2 {
                attend(&floats(&q), &keys, &values, width, &mut scores, &mut out);
                scores.resize(1000, f32::NAN);
            }
            let [q, k, v] = [q, k, v].map(|tensor| tensor.to_kind(tch::Kind::Double));
            let expected = (q.matmul(&k.tr()) / (width as f64).sqrt()).softmax(-1, tch::Kind::Double).matmul(&v);
            let found = Tensor::from_slice(&out).reshape([heads as i64, -1]);
            let difference = (found - expected).abs().max().double_value(&[]);
            assert!(difference < tolerance, "{heads} × {width} × {length}: {difference}");
        }
    }

    #[test]
    fn attention_is_right() {
        check::<f32>(1e-5);
        check::<bf16>(1e-5);
    }
}
