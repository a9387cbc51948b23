//! What lies between the products, in float32.

use crate::kernels::{Element, exp, kernels, sum};

kernels! {
    /// RMSNorm of rows as wide as `weight`, into rows `stride` apart; what lies between is zero.
    fn norm / norm_body<E: Element>(hidden: &[f32], weight: &[f32], epsilon: f32, stride: usize, out: &mut [E]);
    /// Rounds.
    fn narrow / narrow_body<E: Element>(from: &[f32], to: &mut [E]);
    /// `hidden` += `more`, whose rows are `stride` apart.
    fn add / add_body(hidden: &mut [f32], more: &[f32], rows: usize, width: usize, stride: usize);
    /// silu(gate) · up; what is left of `out` becomes zero.
    fn gated / gated_body<E: Element>(gate: &[f32], up: &[f32], out: &mut [E]);
}

#[inline(always)]
fn norm_body<E: Element>(hidden: &[f32], weight: &[f32], epsilon: f32, stride: usize, out: &mut [E]) {
    let width = weight.len();
    for (x, out) in hidden.chunks_exact(width).zip(out.chunks_exact_mut(stride)) {
        let inverse = 1.0 / (sum([x], |[x]| x * x) / width as f32 + epsilon).sqrt();
        for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
            *out = E::narrow(x * inverse * weight);
        }
        out[width..].fill(E::narrow(0.0));
    }
}

#[inline(always)]
fn narrow_body<E: Element>(from: &[f32], to: &mut [E]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = E::narrow(*from);
    }
}

#[inline(always)]
fn add_body(hidden: &mut [f32], more: &[f32], rows: usize, width: usize, stride: usize) {
    for (hidden, more) in hidden.chunks_exact_mut(width).zip(more.chunks_exact(stride)).take(rows) {
        for (hidden, more) in hidden.iter_mut().zip(more) {
            *hidden += more;
        }
    }
}

#[inline(always)]
fn gated_body<E: Element>(gate: &[f32], up: &[f32], out: &mut [E]) {
    for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
        *out = E::narrow(gate / (1.0 + exp(-gate)) * up);
    }
    out[gate.len()..].fill(E::narrow(0.0));
}

/// Cosine and sine of each pair at a position.
pub(super) fn angles(position: usize, frequencies: &[f32]) -> Vec<(f32, f32)> {
    frequencies.iter().map(|frequency| (position as f32 * frequency).sin_cos()).map(|(sin, cos)| (cos, sin)).collect()
}

/// Rotates one head.
pub(super) fn turn(head: &mut [f32], angles: &[(f32, f32)]) {
    let (first, second) = head.split_at_mut(head.len() / 2);
    for ((first, second), (cos, sin)) in first.iter_mut().zip(second).zip(angles) {
        let (a, b) = (*first, *second);
        *first = a * cos - b * sin;
        *second = b * cos + a * sin;
    }
}
