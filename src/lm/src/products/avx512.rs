//! The instructions of AVX-512: sums of sixteen outputs in one register, and bf16 multiplied in pairs.

use std::arch::x86_64::*;

use half::bf16;

use super::{BLOCK, COLUMNS, End, Operands, ROWS, Rows, Tile};
use crate::kernels::Element;

/// An element whose products these instructions compute.
pub(super) trait Avx512: Element {
    /// Whether this CPU has the instructions.
    fn is_supported() -> bool;
    /// A [`Tile`] of `R` rows and the first `C` · 16 columns of a strip that is `S` wide.
    ///
    /// # Safety
    /// As there, and [`Self::is_supported`].
    unsafe fn tile<const R: usize, const C: usize, const S: usize>(of: &Operands<Self>);
    /// [`super::Factor::interleave`].
    ///
    /// # Safety
    /// As there, and [`Self::is_supported`].
    unsafe fn interleave(rows: Rows<*const Self>, columns: usize, out: *mut Self);
}

/// Implements [`Avx512`] by a module of the element's own instructions, which need the CPU's `features`.
macro_rules! avx512 {
    ($element:ty, $group:literal, $lanes:ident, $features:literal, $supported:expr) => {
        impl Avx512 for $element {
            fn is_supported() -> bool {
                $supported
            }

            unsafe fn tile<const R: usize, const C: usize, const S: usize>(of: &Operands<Self>) {
                #[target_feature(enable = $features)]
                unsafe fn tile<const R: usize, const C: usize, const S: usize>(of: &Operands<$element>) {
                    let Operands { x, strip, groups, start, end, next } = *of;
                    // What the sums meet at the end is fetched while they are computed: rows far apart, which the processor
                    // would not guess.
                    if let End::Rounded { out, plus, .. } = end {
                        const LINE: usize = 64 / size_of::<$element>();
                        for row in 0..R {
                            for column in (0..16 * C).step_by(LINE) {
                                let at = row * out.stride + column;
                                _mm_prefetch::<_MM_HINT_T0>(out.first.wrapping_add(at).cast());
                                if let Some(plus) = plus {
                                    _mm_prefetch::<_MM_HINT_T0>(plus.wrapping_add(at).cast());
                                }
                            }
                        }
                    }
                    // SAFETY: the pointers are good for these offsets by the contract of `Avx512::tile`.
                    unsafe {
                        let mut sums = match start {
                            None => [[_mm512_setzero_ps(); C]; R],
                            Some(rows) => std::array::from_fn(|row| {
                                let first = rows.first.add(row * rows.stride);
                                std::array::from_fn(|part| _mm512_loadu_ps(first.add(16 * part)))
                            }),
                        };
                        for group in 0..groups {
                            Operands::<$element>::fetch(next, R, groups, group);
                            let weights = strip.add(group * $group * S);
                            let weights: [_; C] =
                                std::array::from_fn(|part| $lanes::load(weights.add(16 * $group * part)));
                            for (row, sums) in sums.iter_mut().enumerate() {
                                let inputs = $lanes::repeat(x.first.add(row * x.stride + group * $group));
                                for (sum, weights) in sums.iter_mut().zip(weights) {
                                    *sum = $lanes::multiply_add(inputs, weights, *sum);
                                }
                            }
                        }
                        let biases: Option<[_; C]> = match end {
                            End::Rounded { columns, bias: Some(bias), .. } => {
                                Some(std::array::from_fn(|part| match columns.saturating_sub(16 * part) {
                                    0 => _mm512_setzero_ps(),
                                    left => $lanes::widen(bias.add(16 * part), left),
                                }))
                            }
                            _ => None,
                        };
                        for (row, sums) in sums.into_iter().enumerate() {
                            for (part, sum) in sums.into_iter().enumerate() {
                                let at = 16 * part;
                                match end {
                                    End::Kept(rows) => {
                                        _mm512_storeu_ps(rows.first.add(row * rows.stride + at), sum);
                                    }
                                    End::Rounded { out, columns, plus, .. } if at < columns => {
                                        let (first, left) = (row * out.stride + at, columns - at);
                                        let sum = match &biases {
                                            Some(biases) => _mm512_add_ps(sum, biases[part]),
                                            None => sum,
                                        };
                                        let sum = match plus {
                                            Some(plus) => _mm512_add_ps(sum, $lanes::widen(plus.add(first), left)),
                                            None => sum,
                                        };
                                        $lanes::round(sum, out.first.add(first), left);
                                    }
                                    End::Rounded { .. } => {}
                                }
                            }
                        }
                    }
                }
                // SAFETY: the caller keeps the contract, of which the CPU's instructions are part.
                unsafe { tile::<R, C, S>(of) }
            }

            unsafe fn interleave(rows: Rows<*const Self>, columns: usize, out: *mut Self) {
                // SAFETY: the caller keeps the contract.
                unsafe { $lanes::interleave(rows, columns, out) }
            }
        }
    };
}

avx512!(
    bf16,
    2,
    pairs,
    "avx512f,avx512bw,avx512vl,avx512bf16",
    std::is_x86_feature_detected!("avx512bf16")
        && std::is_x86_feature_detected!("avx512bw")
        && std::is_x86_feature_detected!("avx512vl")
        && f32::is_supported()
);
avx512!(f32, 1, singles, "avx512f", std::is_x86_feature_detected!("avx512f"));

/// [`super::Factor::strip`].
pub(super) fn strip() -> usize {
    COLUMNS
}

/// [`super::Factor::block`].
pub(super) fn block(_: usize) -> usize {
    BLOCK
}

/// [`super::Factor::tile`] of all rows at once.
pub(super) unsafe fn tile<E: Avx512>(rows: usize, columns: usize, of: &Operands<E>) -> usize {
    let mut done = 0;
    while done < rows {
        let (count, tile) = largest::<E, COLUMNS>(rows - done, columns);
        // SAFETY: the caller keeps the contract, for every row.
        unsafe { tile(&of.from(done)) };
        done += count;
    }
    rows
}

/// The largest tile for at most so many rows, of which the first `columns` of a strip `S` wide are wanted, and its rows.
pub(super) fn largest<E: Avx512, const S: usize>(rows: usize, columns: usize) -> (usize, Tile<E>) {
    match columns <= COLUMNS / 2 {
        true => of_rows::<E, 2, S>(rows),
        false => of_rows::<E, 4, S>(rows),
    }
}

fn of_rows<E: Avx512, const C: usize, const S: usize>(rows: usize) -> (usize, Tile<E>) {
    match rows {
        1 => (1, E::tile::<1, C, S>),
        2 => (2, E::tile::<2, C, S>),
        3 => (3, E::tile::<3, C, S>),
        4 => (4, E::tile::<4, C, S>),
        5 => (5, E::tile::<5, C, S>),
        12.. if C == 2 => (12, E::tile::<12, C, S>),
        _ => (ROWS, E::tile::<ROWS, C, S>),
    }
}

/// The first lanes, at most `left`.
fn mask(left: usize) -> __mmask16 {
    ((1u32 << left.min(16)) - 1) as __mmask16
}

/// Pairs of bf16. Each function needs the features above, and memory for what it reads or writes: sixteen pairs, one
/// pair, or `left` elements but at most sixteen.
mod pairs {
    use super::*;

    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(super) unsafe fn load(pairs: *const bf16) -> __m512bh {
        // SAFETY: the caller's memory; a vector of bf16 and one of words are the same bits.
        unsafe { std::mem::transmute(_mm512_loadu_si512(pairs.cast())) }
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(super) unsafe fn repeat(pair: *const bf16) -> __m512bh {
        // SAFETY: as above.
        unsafe { std::mem::transmute(_mm512_set1_epi32(pair.cast::<i32>().read_unaligned())) }
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(super) fn multiply_add(inputs: __m512bh, weights: __m512bh, sum: __m512) -> __m512 {
        _mm512_dpbf16_ps(sum, inputs, weights)
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    pub(super) unsafe fn widen(values: *const bf16, left: usize) -> __m512 {
        // SAFETY: the caller's memory: lanes that are masked are not read.
        let values = unsafe { _mm256_maskz_loadu_epi16(mask(left), values.cast()) };
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(values)))
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    pub(super) unsafe fn round(sum: __m512, out: *mut bf16, left: usize) {
        // SAFETY: a vector of bf16 and one of words are the same bits.
        let values: __m256i = unsafe { std::mem::transmute(_mm512_cvtneps_pbh(sum)) };
        // SAFETY: the caller's memory: lanes that are masked are not written.
        match left {
            // Masked stores take several times as long.
            16.. => unsafe { _mm256_storeu_si256(out.cast(), values) },
            _ => unsafe { _mm256_mask_storeu_epi16(out.cast(), mask(left), values) },
        }
    }

    #[target_feature(enable = "avx512f,avx512bw")]
    pub(super) unsafe fn interleave(rows: Rows<*const bf16>, columns: usize, out: *mut bf16) {
        // SAFETY: 32 elements of 16 bits.
        let low: __m512i = unsafe { std::mem::transmute(LOW) };
        let high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
        for first in (0..columns).step_by(32) {
            let left = columns - first;
            let some = (u32::MAX) >> (32 - left.min(32));
            // What comes some pairs later, line by line: rows are taken a few lines at a time, which the processor would
            // not guess.
            for row in [AHEAD, AHEAD + 1] {
                _mm_prefetch::<_MM_HINT_T0>(rows.first.wrapping_add(row * rows.stride + first).cast());
            }
            // SAFETY: the caller's memory: lanes that are masked are not read or written.
            unsafe {
                let (one, two) = (rows.first.add(first).cast(), rows.first.add(rows.stride + first).cast());
                let (one, two) = (_mm512_maskz_loadu_epi16(some, one), _mm512_maskz_loadu_epi16(some, two));
                let out = out.add(2 * first).cast::<i32>();
                _mm512_mask_storeu_epi32(out, mask(left), _mm512_permutex2var_epi16(one, low, two));
                if left > 16 {
                    let out = out.add(16);
                    _mm512_mask_storeu_epi32(out, mask(left - 16), _mm512_permutex2var_epi16(one, high, two));
                }
            }
        }
    }

    /// Rows from those that are interleaved to those that are fetched.
    const AHEAD: usize = 8;

    /// The first sixteen of two vectors, in turn.
    const LOW: [i16; 32] = {
        let mut low = [0; 32];
        let mut at = 0;
        while at < 32 {
            low[at] = (at / 2 + 32 * (at % 2)) as i16;
            at += 1;
        }
        low
    };
}

/// The same of single float32.
mod singles {
    use super::*;

    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn load(values: *const f32) -> __m512 {
        // SAFETY: the caller's memory.
        unsafe { _mm512_loadu_ps(values) }
    }

    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn repeat(value: *const f32) -> __m512 {
        // SAFETY: the caller's memory.
        _mm512_set1_ps(unsafe { *value })
    }

    #[target_feature(enable = "avx512f")]
    pub(super) fn multiply_add(inputs: __m512, weights: __m512, sum: __m512) -> __m512 {
        _mm512_fmadd_ps(inputs, weights, sum)
    }

    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn widen(values: *const f32, left: usize) -> __m512 {
        // SAFETY: the caller's memory: lanes that are masked are not read.
        unsafe { _mm512_maskz_loadu_ps(mask(left), values) }
    }

    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn round(sum: __m512, out: *mut f32, left: usize) {
        // SAFETY: the caller's memory: lanes that are masked are not written.
        unsafe { _mm512_mask_storeu_ps(out, mask(left), sum) }
    }

    pub(super) unsafe fn interleave(rows: Rows<*const f32>, columns: usize, out: *mut f32) {
        // SAFETY: the caller's memory.
        unsafe { std::ptr::copy_nonoverlapping(rows.first, out, columns) }
    }
}

/// [`super::transpose`].
///
/// # Safety
/// As there; the CPU has the instructions.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn transpose(rows: Rows<*const i32>, count: usize, words: usize, out: *mut i32, stride: usize) {
    // One round puts the first half of the rows between those of the second, word by word, and the words' first half
    // into every other row: after four rounds, words and rows have changed places.
    let first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    let second = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    for top in (0..count).step_by(16) {
        for left in (0..words).step_by(16) {
            let (height, width) = (mask(count - top), mask(words - left));
            // The next sixteen rows, line after line: the processor would not guess the way that squares are read.
            for line in 0..16 {
                let ahead = rows.first.wrapping_add((top + 16) * rows.stride + 16 * (left + line));
                _mm_prefetch::<_MM_HINT_T1>(ahead.cast());
            }
            // SAFETY: rows that are not there are not read, and what no row fills is not written.
            unsafe {
                let mut square: [__m512i; 16] = std::array::from_fn(|row| match top + row < count {
                    true => _mm512_maskz_loadu_epi32(width, rows.first.add((top + row) * rows.stride + left)),
                    false => _mm512_setzero_si512(),
                });
                for _ in 0..4 {
                    square = std::array::from_fn(|row| {
                        let half = if row % 2 == 0 { first } else { second };
                        _mm512_permutex2var_epi32(square[row / 2], half, square[row / 2 + 8])
                    });
                }
                for (word, values) in square.iter().enumerate().take(words - left) {
                    _mm512_mask_storeu_epi32(out.add((left + word) * stride + top), height, *values);
                }
            }
        }
    }
}
