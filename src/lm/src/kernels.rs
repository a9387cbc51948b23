//! Elementwise parts of a layer in one pass each, for CPU.
//!
//! libtorch runs them as chains of operations, each of which reads and writes everything; on a CPU that is a quarter of a
//! training step. All arithmetic is in float32, whatever the elements are. One thread: whoever calls has split the work
//! already (see [`crate::workers`]).

mod cross_entropy;
mod lanes;

use std::ops::Range;

use half::bf16;

pub(crate) use cross_entropy::{cross_entropy, drawn_cross_entropy};
use lanes::{LANES, larger};

/// What a tensor of the compute kind holds.
pub(crate) trait Element: Copy + Send + Sync + 'static {
    /// libtorch's name for it.
    const KIND: tch::Kind;
    fn wide(self) -> f32;
    fn narrow(value: f32) -> Self;
}

impl Element for f32 {
    const KIND: tch::Kind = tch::Kind::Float;
    #[inline(always)]
    fn wide(self) -> f32 {
        self
    }
    #[inline(always)]
    fn narrow(value: f32) -> Self {
        value
    }
}

impl Element for bf16 {
    const KIND: tch::Kind = tch::Kind::BFloat16;
    #[inline(always)]
    fn wide(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
    #[inline(always)]
    fn narrow(value: f32) -> Self {
        // Round to nearest, ties to even. `half` handles NaN by a branch, which would stop the compiler from using
        // vectors; here a NaN whose payload is all in the low bits may become an infinity, and both are caught as not
        // finite.
        let bits = value.to_bits();
        Self::from_bits((bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16) as u16)
    }
}

/// Declares functions that are compiled for AVX-512 and for AVX2 too, and chosen by what the CPU has.
macro_rules! kernels {
    ($($(#[$doc:meta])* fn $name:ident / $body:ident $(<$E:ident: $bound:ident>)? (
        $($argument:ident: $type:ty),* $(,)?
    );)*) => {$(
        $(#[$doc])*
        pub(crate) fn $name $(<$E: $bound>)? ($($argument: $type),*) {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
                fn sixteen $(<$E: $bound>)? ($($argument: $type),*) {
                    $body $(::<$E>)? ($($argument),*)
                }
                #[target_feature(enable = "avx2,fma")]
                fn eight $(<$E: $bound>)? ($($argument: $type),*) {
                    $body $(::<$E>)? ($($argument),*)
                }
                // SAFETY: the CPU has the instructions that the function was compiled for.
                unsafe {
                    if $crate::kernels::has_avx512() {
                        return sixteen $(::<$E>)? ($($argument),*);
                    }
                    if $crate::kernels::has_avx2() {
                        return eight $(::<$E>)? ($($argument),*);
                    }
                }
            }
            $body $(::<$E>)? ($($argument),*)
        }
    )*};
}

pub(crate) use kernels;

#[cfg(target_arch = "x86_64")]
pub(crate) fn has_avx2() -> bool {
    std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("fma")
}

#[cfg(target_arch = "x86_64")]
pub(crate) fn has_avx512() -> bool {
    std::is_x86_feature_detected!("avx512f")
        && std::is_x86_feature_detected!("avx512bw")
        && std::is_x86_feature_detected!("avx512dq")
        && std::is_x86_feature_detected!("avx512vl")
        && has_avx2()
}

kernels! {
    /// RMSNorm of rows as wide as `weight`; rounded before the weight is applied, as transformers does.
    fn rms_norm / rms_norm_body<E: Element>(x: &[E], weight: &[E], epsilon: f32, out: &mut [E]);
    /// `plus` + the gradient of [`rms_norm`] with respect to `x`.
    fn rms_norm_backward / rms_norm_backward_body<E: Element>(
        gradient: &[E], x: &[E], weight: &[E], epsilon: f32, plus: Option<&[E]>, out: &mut [E],
    );
    /// LayerNorm of rows as wide as `weight` and `bias`.
    fn layer_norm / layer_norm_body<E: Element>(x: &[E], weight: &[E], bias: &[E], epsilon: f32, out: &mut [E]);
    /// silu(gate) · up of rows `[gate, up]`, each `inner` wide.
    fn swiglu / swiglu_body<E: Element>(gate_up: &[E], inner: usize, out: &mut [E]);
    /// Gradient of [`swiglu`] with respect to `gate_up`.
    fn swiglu_backward / swiglu_backward_body<E: Element>(
        gradient: &[E], gate_up: &[E], inner: usize, out: &mut [E],
    );
    /// GELU, by the error function, of some columns of rows `width` wide, in place.
    fn gelu / gelu_body<E: Element>(rows: &mut [E], width: usize, columns: Range<usize>);
    /// Σ x² of each of as many rows as there are sums, squares in float32 and their sum in float64.
    fn squares / squares_body(rows: &[f32], sums: &mut [f64]);
    /// Softmax of rows of `scale` · scores, each `width` wide, which is whole vectors. Of each row as many are seen as
    /// `visible` says; the others weigh 0. The scores are used up.
    fn softmax / softmax_body<E: Element>(
        scores: &mut [f32], weights: &mut [E], width: usize, scale: f32, visible: &[usize],
    );
    /// Gradient with respect to the scores, in place of what [`softmax`] gave, of that with respect to it. That is used up.
    fn softmax_backward / softmax_backward_body<E: Element>(
        gradient: &mut [f32], weights: &mut [E], width: usize, scale: f32, visible: &[usize],
    );
    /// The highest of `scores` · `inverse`, and of each [`PART`] of them the sum of exp(score · `inverse` − that).
    fn mass / mass_body<E: Element>(scores: &[E], inverse: f32, best: &mut f32, parts: &mut [f32]);
    /// The sum of exp(score · `inverse` − `best`) over the scores for which score · `inverse` is above `floor`.
    fn mass_above / mass_above_body<E: Element>(scores: &[E], inverse: f32, floor: f32, best: f32, out: &mut f32);
    /// Turns the first `turned` heads of each row in place; rows are positions 0, 1, … `length` - 1, again and again.
    fn rotate / rotate_body<E: Element>(rows: &mut [E], heads: Heads, cos: &[E], sin: &[E]);
    /// Rounds rows of sums, each `stride` wide, into rows as wide as `width`, at `columns`.
    fn round / round_body<E: Element>(
        sums: &[f32], stride: usize, columns: Range<usize>, width: usize, out: &mut [E],
    );
}

/// How a row of joined heads is laid out.
#[derive(Clone, Copy)]
pub(crate) struct Heads {
    /// Heads in a row.
    pub(crate) all: usize,
    /// Of those, how many are rotated.
    pub(crate) turned: usize,
    /// Width of a head.
    pub(crate) width: usize,
}

/// Sum of f over the columns of equally long `rows`, in a fixed order, with `LANES` partial sums.
#[inline(always)]
pub(crate) fn sum<T: Copy, const N: usize>(rows: [&[T]; N], f: impl Fn([T; N]) -> f32) -> f32 {
    let mut partial = [0f32; LANES];
    let parts = rows.map(|row| row.as_chunks::<LANES>());
    for block in 0..rows[0].len() / LANES {
        let blocks = parts.map(|(blocks, _)| &blocks[block]);
        // All terms before any addition: with both in one loop the compiler computes half of the terms one by one.
        let mut terms = [0f32; LANES];
        for (lane, term) in terms.iter_mut().enumerate() {
            *term = f(blocks.map(|block| block[lane]));
        }
        for (partial, term) in partial.iter_mut().zip(terms) {
            *partial += term;
        }
    }
    let tail: f32 = (0..rows[0].len() % LANES).map(|at| f(parts.map(|(_, rest)| rest[at]))).sum();
    lanes::sum(&partial) + tail
}

#[inline(always)]
fn squares_body(rows: &[f32], sums: &mut [f64]) {
    let width = rows.len() / sums.len().max(1);
    for (row, sum) in rows.chunks_exact(width.max(1)).zip(sums) {
        let (blocks, rest) = row.as_chunks::<LANES>();
        let mut partial = [0f64; LANES];
        for block in blocks {
            for (partial, x) in partial.iter_mut().zip(block) {
                *partial += f64::from(x * x);
            }
        }
        *sum = partial.iter().sum::<f64>() + rest.iter().map(|x| f64::from(x * x)).sum::<f64>();
    }
}

#[inline(always)]
fn rms_norm_body<E: Element>(x: &[E], weight: &[E], epsilon: f32, out: &mut [E]) {
    let width = weight.len();
    for (x, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
        let squares = sum([x], |[x]| x.wide() * x.wide());
        let inverse = 1.0 / (squares / width as f32 + epsilon).sqrt();
        for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
            *out = E::narrow(E::narrow(x.wide() * inverse).wide() * weight.wide());
        }
    }
}

/// With r = 1/√(mean x² + ε) and g = ∂y·w: ∂x = r·(g − x·r²·mean(g·x)).
#[inline(always)]
fn rms_norm_backward_body<E: Element>(
    gradient: &[E],
    x: &[E],
    weight: &[E],
    epsilon: f32,
    plus: Option<&[E]>,
    out: &mut [E],
) {
    let width = weight.len();
    for (row, (x, out)) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)).enumerate() {
        let here = row * width..(row + 1) * width;
        let gradient = &gradient[here.clone()];
        let squares = sum([x], |[x]| x.wide() * x.wide());
        let dot = sum([gradient, weight, x], |[gradient, weight, x]| gradient.wide() * weight.wide() * x.wide());
        let inverse = 1.0 / (squares / width as f32 + epsilon).sqrt();
        let shift = inverse * inverse * dot / width as f32;
        let value = |at: usize| (gradient[at].wide() * weight[at].wide() - x[at].wide() * shift) * inverse;
        match plus {
            None => {
                for (at, out) in out.iter_mut().enumerate() {
                    *out = E::narrow(value(at));
                }
            }
            Some(plus) => {
                for (at, (out, plus)) in out.iter_mut().zip(&plus[here]).enumerate() {
                    *out = E::narrow(value(at) + plus.wide());
                }
            }
        }
    }
}

#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

#[inline(always)]
fn swiglu_body<E: Element>(gate_up: &[E], inner: usize, out: &mut [E]) {
    for (row, out) in gate_up.chunks_exact(2 * inner).zip(out.chunks_exact_mut(inner)) {
        let (gate, up) = row.split_at(inner);
        for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
            let gate = gate.wide();
            *out = E::narrow(gate * sigmoid(gate) * up.wide());
        }
    }
}

#[inline(always)]
fn swiglu_backward_body<E: Element>(gradient: &[E], gate_up: &[E], inner: usize, out: &mut [E]) {
    let rows = gate_up.chunks_exact(2 * inner).zip(out.chunks_exact_mut(2 * inner));
    for ((row, out), gradient) in rows.zip(gradient.chunks_exact(inner)) {
        let (gate, up) = row.split_at(inner);
        let (of_gate, of_up) = out.split_at_mut(inner);
        for at in 0..inner {
            let (gate, up, gradient) = (gate[at].wide(), up[at].wide(), gradient[at].wide());
            let open = sigmoid(gate);
            of_gate[at] = E::narrow(gradient * up * open * (1.0 + gate * (1.0 - open)));
            of_up[at] = E::narrow(gradient * gate * open);
        }
    }
}

#[inline(always)]
fn layer_norm_body<E: Element>(x: &[E], weight: &[E], bias: &[E], epsilon: f32, out: &mut [E]) {
    let width = weight.len();
    for (x, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
        let mean = sum([x], |[x]| x.wide()) / width as f32;
        let squares = sum([x], |[x]| (x.wide() - mean) * (x.wide() - mean));
        let inverse = 1.0 / (squares / width as f32 + epsilon).sqrt();
        for (((out, x), weight), bias) in out.iter_mut().zip(x).zip(weight).zip(bias) {
            *out = E::narrow(((x.wide() - mean) * inverse).mul_add(weight.wide(), bias.wide()));
        }
    }
}

#[inline(always)]
fn gelu_body<E: Element>(rows: &mut [E], width: usize, columns: Range<usize>) {
    for row in rows.chunks_exact_mut(width) {
        for value in &mut row[columns.clone()] {
            let x = value.wide();
            *value = E::narrow(x * normal(x));
        }
    }
}

/// How likely a value of the standard normal distribution is below x, to 2.5e-7: half, and an odd function that is a
/// quotient of polynomials up to where it is half as well.
#[inline(always)]
fn normal(x: f32) -> f32 {
    let x = between(-NORMAL_END, x, NORMAL_END);
    let square = x * x;
    let [above, below] = [polynomial(&NORMAL_ABOVE, square), polynomial(&NORMAL_BELOW, square)];
    // Near the ends the quotient may be off by more than what is left.
    between(0.0, x * above / below + 0.5, 1.0)
}

/// What is nearest to `x` between the two, and NaN for NaN: what diverged must not look finite.
#[inline(always)]
fn between(least: f32, x: f32, most: f32) -> f32 {
    let x = if x < least { least } else { x };
    if x > most { most } else { x }
}

/// Σ factor · xⁱ.
#[inline(always)]
fn polynomial<const N: usize>(factors: &[f32; N], x: f32) -> f32 {
    let mut sum = factors[N - 1];
    for place in (0..N - 1).rev() {
        sum = sum.mul_add(x, factors[place]);
    }
    sum
}

#[inline(always)]
fn softmax_body<E: Element>(scores: &mut [f32], weights: &mut [E], width: usize, scale: f32, visible: &[usize]) {
    let rows = scores.chunks_exact_mut(width).zip(weights.chunks_exact_mut(width));
    for ((scores, weights), &seen) in rows.zip(visible) {
        let (near, far) = weights.split_at_mut(seen.next_multiple_of(LANES));
        let scores = &mut scores.as_chunks_mut::<LANES>().0[..near.len() / LANES];
        // Only the last vector has lanes that are not seen: without their bits, the others are compared by one instruction.
        let (whole, last) = scores.split_at_mut(seen / LANES);
        let bits = shown(seen % LANES);
        let mut best = [f32::NEG_INFINITY; LANES];
        for scores in &*whole {
            for (best, score) in best.iter_mut().zip(scores) {
                *best = larger(*best, *score);
            }
        }
        for scores in &*last {
            for ((best, score), bits) in best.iter_mut().zip(scores).zip(bits) {
                let score = score.to_bits() & bits | f32::NEG_INFINITY.to_bits() & !bits;
                *best = larger(*best, f32::from_bits(score));
            }
        }
        let best = -lanes::largest(&best) * scale;
        let mut total = [0f32; LANES];
        for scores in whole {
            weigh(scores, &[u32::MAX; LANES], scale, best, &mut total);
        }
        for scores in last {
            weigh(scores, bits, scale, best, &mut total);
        }
        let inverse = 1.0 / lanes::sum(&total);
        for (weight, score) in near.iter_mut().zip(scores.as_flattened()) {
            *weight = E::narrow(score * inverse);
        }
        far.fill(E::narrow(0.0));
    }
}

/// Makes weights of scores, exp(`scale` · score + `best`) where `bits` are set and 0 elsewhere, and adds them to `total`.
#[inline(always)]
fn weigh(scores: &mut [f32; LANES], bits: &[u32; LANES], scale: f32, best: f32, total: &mut [f32; LANES]) {
    let mut weights = [0f32; LANES];
    for ((weight, score), bits) in weights.iter_mut().zip(&*scores).zip(bits) {
        *weight = f32::from_bits(exp(score.mul_add(scale, best)).to_bits() & bits);
    }
    for (total, weight) in total.iter_mut().zip(weights) {
        *total += weight;
    }
    *scores = weights;
}

/// With p the weights and g their gradient: ∂s = scale · p · (g − Σ g·p).
#[inline(always)]
fn softmax_backward_body<E: Element>(
    gradient: &mut [f32],
    weights: &mut [E],
    width: usize,
    scale: f32,
    visible: &[usize],
) {
    let rows = gradient.chunks_exact_mut(width).zip(weights.chunks_exact_mut(width));
    for ((gradient, weights), &seen) in rows.zip(visible) {
        let blocks = gradient.as_chunks_mut::<LANES>().0.iter_mut().zip(weights.as_chunks_mut::<LANES>().0);
        let mut mean = [0f32; LANES];
        for (block, (gradient, weights)) in blocks.take(seen.div_ceil(LANES)).enumerate() {
            // Whatever was computed for what is not seen.
            for (gradient, bits) in gradient.iter_mut().zip(shown(seen - block * LANES)) {
                *gradient = f32::from_bits(gradient.to_bits() & bits);
            }
            for ((mean, gradient), weight) in mean.iter_mut().zip(&*gradient).zip(&*weights) {
                *mean += gradient * weight.wide();
            }
        }
        let mean = lanes::sum(&mean);
        let whole = seen.next_multiple_of(LANES);
        for (weight, gradient) in weights[..whole].iter_mut().zip(&*gradient) {
            *weight = E::narrow(weight.wide() * (gradient - mean) * scale);
        }
    }
}

/// All bits of the first `count` lanes, none of the others. To clear what is not seen by these in registers is several times
/// as fast as to write there: a vector that was written in parts cannot be read until it has reached the cache.
#[inline(always)]
fn shown(count: usize) -> &'static [u32; LANES] {
    const BITS: [u32; 2 * LANES] = {
        let mut bits = [0; 2 * LANES];
        let mut lane = 0;
        while lane < LANES {
            bits[lane] = u32::MAX;
            lane += 1;
        }
        bits
    };
    BITS[LANES - count.min(LANES)..].first_chunk().unwrap_or(&[0; LANES])
}

/// Scores of which [`mass`] gives one sum.
pub(crate) const PART: usize = 256;

#[inline(always)]
fn mass_body<E: Element>(scores: &[E], inverse: f32, best: &mut f32, parts: &mut [f32]) {
    let highest = largest(scores) * inverse;
    for (scores, part) in scores.chunks(PART).zip(parts) {
        *part = sum([scores], |[score]| exp(score.wide() * inverse - highest));
    }
    *best = highest;
}

#[inline(always)]
fn mass_above_body<E: Element>(scores: &[E], inverse: f32, floor: f32, best: f32, out: &mut f32) {
    let weight = |score: &E| {
        let score = score.wide() * inverse;
        if score > floor { exp(score - best) } else { 0.0 }
    };
    let (blocks, rest) = scores.as_chunks::<LANES>();
    let mut total = [0f32; LANES];
    for block in blocks {
        // Most blocks have none; the comparison of a whole block, not stopping at the first, is a few instructions.
        if block.iter().fold(false, |any, score| any | (score.wide() * inverse > floor)) {
            let mut weights = [0f32; LANES];
            for (at, score) in weights.iter_mut().zip(block) {
                *at = weight(score);
            }
            for (total, weight) in total.iter_mut().zip(weights) {
                *total += weight;
            }
        }
    }
    *out = lanes::sum(&total) + rest.iter().map(weight).sum::<f32>();
}

/// The largest of a row.
#[inline(always)]
pub(crate) fn largest<E: Element>(row: &[E]) -> f32 {
    let mut best = [f32::NEG_INFINITY; LANES];
    let (blocks, rest) = row.as_chunks::<LANES>();
    for block in blocks {
        for (best, value) in best.iter_mut().zip(block) {
            *best = larger(*best, value.wide());
        }
    }
    rest.iter().map(|value| value.wide()).fold(lanes::largest(&best), larger)
}

#[inline(always)]
fn rotate_body<E: Element>(rows: &mut [E], heads: Heads, cos: &[E], sin: &[E]) {
    let half = heads.width / 2;
    let length = cos.len() / half;
    for (row, values) in rows.chunks_exact_mut(heads.all * heads.width).enumerate() {
        let at = row % length * half;
        let (cos, sin) = (&cos[at..at + half], &sin[at..at + half]);
        for head in values.chunks_exact_mut(heads.width).take(heads.turned) {
            let (first, second) = head.split_at_mut(half);
            // Whole vectors first: heads are too narrow for the loop that the compiler makes of any length.
            let (firsts, first) = first.as_chunks_mut::<PAIRS>();
            let (seconds, second) = second.as_chunks_mut::<PAIRS>();
            let (all_cos, cos) = cos.as_chunks::<PAIRS>();
            let (all_sin, sin) = sin.as_chunks::<PAIRS>();
            for (((first, second), cos), sin) in firsts.iter_mut().zip(seconds).zip(all_cos).zip(all_sin) {
                turn(first, second, cos, sin);
            }
            turn(first, second, cos, sin);
        }
    }
}

#[inline(always)]
fn round_body<E: Element>(sums: &[f32], stride: usize, columns: Range<usize>, width: usize, out: &mut [E]) {
    for (sums, out) in sums.chunks_exact(stride).zip(out.chunks_exact_mut(width)) {
        for (out, sum) in out[columns.clone()].iter_mut().zip(sums) {
            *out = E::narrow(*sum);
        }
    }
}

/// Pairs that [`rotate`] turns at once.
const PAIRS: usize = 16;

#[inline(always)]
fn turn<E: Element>(first: &mut [E], second: &mut [E], cos: &[E], sin: &[E]) {
    for (((first, second), cos), sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
        let (a, b, cos, sin) = (first.wide(), second.wide(), cos.wide(), sin.wide());
        *first = E::narrow(a * cos - b * sin);
        *second = E::narrow(b * cos + a * sin);
    }
}

/// (exp(x) − 1 − x) / x² as a polynomial, where |x| ≤ ln(2) / 2: by `tests/golden/kernels.py`, as those below.
const EXP: [f32; 4] = [0.499_992_3, 0.166_671_14, 4.189_015_6e-2, 8.312_521e-3];
/// From here on, [`normal`] is 1.
const NORMAL_END: f32 = 5.2;
/// (P(a standard normal value < x) − ½) / x by x²: what is divided, and by what.
const NORMAL_ABOVE: [f32; 5] = [0.398_942_05, 5.176_575e-2, 5.680_145_7e-3, 3.377_150_3e-4, 6.173_907_4e-6];
const NORMAL_BELOW: [f32; 6] = [1.0, 0.296_418_88, 3.865_219e-2, 2.844_489_4e-3, 1.208_486_36e-4, 5.219_228e-7];

/// exp(x) but for 2.2e-7 of it where |x| ≤ 87, the bound's value beyond, and NaN of NaN, in steps that the compiler vectorises
/// (the library's is a call each).
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    const SHIFT: f32 = 12_582_912.0; // 1.5 · 2²³: adding it rounds to a whole number in the low bits.
    let x = between(-87.0, x, 87.0);
    // Fused, which every CPU with AVX2 is quick at.
    let shifted = x.mul_add(std::f32::consts::LOG2_E, SHIFT);
    let whole = shifted - SHIFT;
    // Cody and Waite: ln 2 in two parts.
    let rest = whole.mul_add(2.121_944_4e-4, whole.mul_add(-0.693_359_4, x));
    // Terms by pairs wait for each other less than one by one.
    let square = rest * rest;
    let low = rest.mul_add(EXP[1], EXP[0]);
    let high = rest.mul_add(EXP[3], EXP[2]);
    let series = high.mul_add(square, low).mul_add(square, rest + 1.0);
    let exponent = (shifted.to_bits().wrapping_sub(SHIFT.to_bits()).wrapping_add(127)) << 23;
    series * f32::from_bits(exponent)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_close() {
        for step in -870_000..=870_000 {
            let x = step as f32 / 10_000.0;
            let exact = f64::from(x).exp();
            assert!((f64::from(exp(x)) / exact - 1.0).abs() < 2.2e-7, "{x}");
        }
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(-1e30) < 1e-37 && exp(f32::NEG_INFINITY) < 1e-37);
        assert!(exp(f32::NAN).is_nan() && exp(f32::INFINITY) > 1e37);
    }

    #[test]
    fn gelu_is_close() {
        let points: Vec<f64> = (-9000..=9000).map(|step| f64::from(step) / 1000.0).collect();
        let exact = Vec::<f64>::try_from(tch::Tensor::from_slice(&points).gelu("none")).unwrap();
        let mut found: Vec<f32> = points.iter().map(|&x| x as f32).collect();
        gelu(&mut found, points.len(), 0..points.len());
        for ((x, found), exact) in points.into_iter().zip(found).zip(exact) {
            assert!((f64::from(found) - exact).abs() < 1.3e-6, "{x}: {found}");
            assert!(f64::from(found) * x >= 0.0, "{x}: {found} has another sign");
        }
        assert_eq!([normal(f32::INFINITY), normal(f32::NEG_INFINITY)], [1.0, 0.0]);
        assert!(normal(f32::NAN).is_nan());
    }

    /// Weights, losses and masses of rows that overflowed are NaN, wherever in the row; others stay as they are.
    #[test]
    fn what_is_not_finite_stays_so() {
        let (width, seen) = (2 * LANES, LANES + 5);
        for (at, wrong) in [(0, f32::NAN), (seen - 1, f32::NAN), (3, f32::INFINITY), (seen - 1, f32::INFINITY)] {
            let mut scores = vec![0.5; 2 * width];
            scores[at] = wrong;
            let row = scores[..seen].to_vec();
            let mut weights = vec![0f32; 2 * width];
            softmax(&mut scores, &mut weights, width, 1.0, &[seen, seen]);
            assert!(weights[..seen].iter().all(|weight| weight.is_nan()), "{at}");
            assert!(weights[width..][..seen].iter().all(|weight| (weight * seen as f32 - 1.0).abs() < 1e-6), "{at}");
            let (mut best, mut parts) = (0.0, [0.0]);
            mass(&row, 1.0, &mut best, &mut parts);
            assert!(parts[0].is_nan(), "{at}");
            let (mut losses, mut gradient) = ([0.0], [0.0]);
            cross_entropy(&mut row.clone(), seen, &[1], &mut losses);
            assert!(losses[0].is_nan(), "{at}");
            drawn_cross_entropy(&row, &vec![1.0; seen], &[1], &mut losses, &mut gradient);
            assert!(losses[0].is_nan() && gradient[0].is_nan(), "{at}");
        }
        // What is not seen may be anything.
        let mut scores = [0.5; LANES];
        scores[1] = f32::NAN;
        let mut weights = [0f32; LANES];
        softmax(&mut scores, &mut weights, LANES, 1.0, &[1]);
        assert_eq!(weights[..2], [1.0, 0.0]);
    }

    #[test]
    fn narrowing_rounds_as_half_does() {
        for step in 0..100_000u32 {
            let value = f32::from_bits(0x3f00_0000 + step * 77);
            assert_eq!(<bf16 as Element>::narrow(value), bf16::from_f32(value));
            assert_eq!(<bf16 as Element>::narrow(-value), bf16::from_f32(-value));
        }
        assert!(!<bf16 as Element>::narrow(f32::NAN).wide().is_finite());
        assert!(!<bf16 as Element>::narrow(f32::INFINITY).wide().is_finite());
    }
}
