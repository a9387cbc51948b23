//! Matrix products on CPU, in AVX-512, with weights packed as the instructions want them.
//!
//! A tile is six rows by 64 outputs, kept in registers while the inputs pass by. Every row of a tile is summed alone and in
//! order of the inputs, so that it does not matter how rows are dealt into tiles: a row of a product is bit for bit the
//! same whatever rows are beside it.
//!
//! [`product`] packs a weight as it goes, which costs no memory, and nearly no time where there are hundreds of rows, as in
//! training and embedding. [`Matrix`] is packed once, for sampling. One thread: whoever calls has split the work already
//! (see [`crate::workers`]).

use std::cell::RefCell;
use std::ops::Range;

use tch::{Device, Tensor};

use crate::LmError;
use crate::kernels::{self, Element, Interleave, Plus};

/// Outputs that one tile computes: four vectors of sixteen.
pub(crate) const COLUMNS: usize = 64;
/// Rows that one tile computes: with its columns, 24 of the 32 vector registers. Where half of the columns are wanted, a
/// tile has twice the rows.
const ROWS: usize = 6;
/// Rows that are multiplied by the packed panels together, so that they stay in the second cache.
const BLOCK: usize = 16 * ROWS;
/// Inputs that are multiplied at once: their part of a panel is a quarter of a megabyte, or half in float32.
const DEPTH: usize = 2048;
/// Bytes of panels that are packed at once, unless one takes more: many, so that weights are read in long runs, and yet
/// few enough to stay in the third cache. A panel goes to the second one for each block of rows.
const PACKED: usize = 4 << 20;

thread_local! {
    /// Room for packed panels, in words.
    static ROOM: RefCell<Vec<u32>> = const { RefCell::new(Vec::new()) };
}

/// An element that products can be computed in.
pub(crate) trait Factor: Element {
    /// Neighbouring inputs that one instruction multiplies and adds: 32 bits of them.
    const GROUP: usize;
    /// Whether this CPU has the instructions.
    fn is_supported() -> bool;
    /// `sums[row][column] += Σ x[row][i] · panel[i][column]` for `R` rows and the first `C` · 16 columns; where `fresh`, the
    /// sums begin at zero.
    ///
    /// # Safety
    /// [`Self::is_supported`]; `x` has `R` rows of `groups · GROUP` elements; `panel` holds `groups · GROUP · COLUMNS`;
    /// `sums` has `R` rows of `COLUMNS`.
    unsafe fn tile<const R: usize, const C: usize>(
        x: Rows<*const Self>,
        panel: *const Self,
        groups: usize,
        sums: Rows<*mut f32>,
        fresh: bool,
    );
}

/// Where the first of some rows is, and how many elements on the next one begins.
#[derive(Clone, Copy)]
pub(crate) struct Rows<P> {
    first: P,
    stride: usize,
}

#[cfg(target_arch = "x86_64")]
mod instructions {
    use std::arch::x86_64::*;

    use half::bf16;

    use super::{COLUMNS, Factor, Rows};

    impl Factor for bf16 {
        const GROUP: usize = 2;

        fn is_supported() -> bool {
            std::is_x86_feature_detected!("avx512bf16") && f32::is_supported()
        }

        unsafe fn tile<const R: usize, const C: usize>(
            x: Rows<*const Self>,
            panel: *const Self,
            groups: usize,
            sums: Rows<*mut f32>,
            fresh: bool,
        ) {
            #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
            unsafe fn tile<const R: usize, const C: usize>(
                x: Rows<*const bf16>,
                panel: *const bf16,
                groups: usize,
                out: Rows<*mut f32>,
                fresh: bool,
            ) {
                // SAFETY: the pointers are good for these offsets by the contract of `Factor::tile`; a vector of 32 bf16
                // and one of 16 words are the same bits.
                unsafe {
                    let mut sums = start::<R, C>(out, fresh);
                    for group in 0..groups {
                        let weights = panel.add(group * 2 * COLUMNS).cast::<i32>();
                        let weights: [__m512bh; C] = std::array::from_fn(|part| {
                            std::mem::transmute(_mm512_loadu_si512(weights.add(16 * part).cast()))
                        });
                        for (row, sums) in sums.iter_mut().enumerate() {
                            let pair = x.first.add(row * x.stride + group * 2).cast::<i32>().read_unaligned();
                            let pair: __m512bh = std::mem::transmute(_mm512_set1_epi32(pair));
                            for (sum, weights) in sums.iter_mut().zip(weights) {
                                *sum = _mm512_dpbf16_ps(*sum, pair, weights);
                            }
                        }
                    }
                    finish(&sums, out);
                }
            }
            // SAFETY: the caller keeps the contract, of which the CPU's instructions are part.
            unsafe { tile::<R, C>(x, panel, groups, sums, fresh) }
        }
    }

    impl Factor for f32 {
        const GROUP: usize = 1;

        fn is_supported() -> bool {
            std::is_x86_feature_detected!("avx512f")
                && std::is_x86_feature_detected!("avx512bw")
                && std::is_x86_feature_detected!("avx512dq")
                && std::is_x86_feature_detected!("avx512vl")
                && std::is_x86_feature_detected!("fma")
        }

        unsafe fn tile<const R: usize, const C: usize>(
            x: Rows<*const Self>,
            panel: *const Self,
            groups: usize,
            sums: Rows<*mut f32>,
            fresh: bool,
        ) {
            #[target_feature(enable = "avx512f")]
            unsafe fn tile<const R: usize, const C: usize>(
                x: Rows<*const f32>,
                panel: *const f32,
                groups: usize,
                out: Rows<*mut f32>,
                fresh: bool,
            ) {
                // SAFETY: the pointers are good for these offsets by the contract of `Factor::tile`.
                unsafe {
                    let mut sums = start::<R, C>(out, fresh);
                    for group in 0..groups {
                        let weights = panel.add(group * COLUMNS);
                        let weights: [__m512; C] = std::array::from_fn(|part| _mm512_loadu_ps(weights.add(16 * part)));
                        for (row, sums) in sums.iter_mut().enumerate() {
                            let value = _mm512_set1_ps(*x.first.add(row * x.stride + group));
                            for (sum, weights) in sums.iter_mut().zip(weights) {
                                *sum = _mm512_fmadd_ps(value, weights, *sum);
                            }
                        }
                    }
                    finish(&sums, out);
                }
            }
            // SAFETY: the caller keeps the contract, of which the CPU's instructions are part.
            unsafe { tile::<R, C>(x, panel, groups, sums, fresh) }
        }
    }

    /// The sums of a tile so far.
    ///
    /// # Safety
    /// `sums` has `R` rows of `COLUMNS`.
    #[target_feature(enable = "avx512f")]
    unsafe fn start<const R: usize, const C: usize>(sums: Rows<*mut f32>, fresh: bool) -> [[__m512; C]; R] {
        match fresh {
            true => [[_mm512_setzero_ps(); C]; R],
            // SAFETY: the caller keeps the contract.
            false => std::array::from_fn(|row| {
                std::array::from_fn(|part| unsafe { _mm512_loadu_ps(sums.first.add(row * sums.stride + 16 * part)) })
            }),
        }
    }

    /// The reverse.
    ///
    /// # Safety
    /// As there.
    #[target_feature(enable = "avx512f")]
    unsafe fn finish<const R: usize, const C: usize>(values: &[[__m512; C]; R], sums: Rows<*mut f32>) {
        for (row, values) in values.iter().enumerate() {
            for (part, value) in values.iter().enumerate() {
                // SAFETY: the caller keeps the contract.
                unsafe { _mm512_storeu_ps(sums.first.add(row * sums.stride + 16 * part), *value) };
            }
        }
    }

    /// `packed[word][row] = rows[row][word]` for at most [`COLUMNS`] rows of `words`; of `packed`, whose rows are
    /// [`COLUMNS`] wide, what no row fills stays as it is.
    ///
    /// # Safety
    /// The CPU has the instructions; there are `count` rows of `words`, and `packed` has `words · COLUMNS`.
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn transpose(rows: Rows<*const i32>, count: usize, words: usize, packed: *mut i32) {
        // One round puts the first half of the rows between those of the second, word by word, and the words' first half
        // into every other row: after four rounds, words and rows have changed places.
        let first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        let second = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        let mask = |left: usize| ((1u32 << left.min(16)) - 1) as __mmask16;
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
                        _mm512_mask_storeu_epi32(packed.add((left + word) * COLUMNS + top), height, *values);
                    }
                }
            }
        }
    }
}

#[cfg(not(target_arch = "x86_64"))]
mod instructions {
    use half::bf16;

    use super::*;

    macro_rules! plain {
        ($element:ty) => {
            impl Factor for $element {
                const GROUP: usize = 1;

                fn is_supported() -> bool {
                    false
                }

                unsafe fn tile<const R: usize, const C: usize>(
                    _: Rows<*const Self>,
                    _: *const Self,
                    _: usize,
                    _: Rows<*mut f32>,
                    _: bool,
                ) {
                }
            }
        };
    }

    plain!(bf16);
    plain!(f32);

    pub(super) unsafe fn transpose(_: Rows<*const i32>, _: usize, _: usize, _: *mut i32) {}
}

/// Rows of equally many elements in memory.
#[derive(Clone, Copy)]
pub(crate) struct View<'a, E> {
    values: &'a [E],
    /// Elements from one row to the next.
    stride: usize,
    rows: usize,
    width: usize,
}

impl<'a, E> View<'a, E> {
    /// Some rows and columns of `values`, whose rows are `stride` wide.
    pub(crate) fn new(values: &'a [E], stride: usize, rows: Range<usize>, columns: Range<usize>) -> Self {
        let (first, width) = (rows.start * stride + columns.start, columns.len());
        let view = Self { values: &values[first..], stride, rows: rows.len(), width };
        assert!(columns.end <= stride && (view.rows == 0 || (view.rows - 1) * stride + width <= view.values.len()));
        view
    }

    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    pub(crate) fn width(&self) -> usize {
        self.width
    }

    fn part(self, rows: Range<usize>, columns: Range<usize>) -> Self {
        assert!(rows.end <= self.rows && columns.end <= self.width);
        Self::new(self.values, self.stride, rows, columns)
    }
}

/// A weight as it lies in memory.
#[derive(Clone, Copy)]
pub(crate) enum Weight<'a, E> {
    /// `[outputs, inputs]`, of a product `x · Wᵀ`.
    Outputs(View<'a, E>),
    /// `[inputs, outputs]`, of a product `x · W`.
    Inputs(View<'a, E>),
}

impl<E> Weight<'_, E> {
    fn inputs(&self) -> usize {
        match self {
            Self::Outputs(view) => view.width,
            Self::Inputs(view) => view.rows,
        }
    }

    pub(crate) fn outputs(&self) -> usize {
        match self {
            Self::Outputs(view) => view.rows,
            Self::Inputs(view) => view.width,
        }
    }

    fn part(self, inputs: Range<usize>, outputs: Range<usize>) -> Self {
        match self {
            Self::Outputs(view) => Self::Outputs(view.part(outputs, inputs)),
            Self::Inputs(view) => Self::Inputs(view.part(inputs, outputs)),
        }
    }
}

/// `out[row] = Σ x[row][input] · weight[input] + plus`, each sum rounded once: rows of `x` are as wide as the weight has
/// inputs, those of `out` and what is added to them as it has outputs. The inputs must be whole groups ([`Factor::GROUP`]).
pub(crate) fn product<E: Factor>(x: &[E], weight: Weight<'_, E>, plus: Plus<'_, E>, out: &mut [E]) {
    let (inputs, outputs) = (weight.inputs(), weight.outputs());
    if out.is_empty() {
        return;
    }
    let rows = out.len() / outputs;
    assert!(x.len() == rows * inputs && out.len() == rows * outputs);
    assert!(plus.bias.is_none_or(|bias| bias.len() == outputs) && plus.rows.is_none_or(|rows| rows.len() == out.len()));
    let x = View::new(x, inputs, 0..rows, 0..inputs);
    let panels = outputs.div_ceil(COLUMNS);
    let size = inputs.min(DEPTH) * COLUMNS;
    let together = (PACKED / size_of::<E>() / size).clamp(1, panels);
    let mut room = ROOM.take();
    room.resize(room.len().max(together * size / E::GROUP), 0);
    // SAFETY: a word is a group of elements, whatever its bits are.
    let (_, packed, _) = unsafe { room.align_to_mut::<E>() };
    // Sums wait for the rest of the inputs, if there is one.
    let blocks = rows.div_ceil(BLOCK);
    let waiting = if inputs > DEPTH { panels * blocks } else { 1 };
    let mut sums = vec![0f32; waiting * BLOCK * COLUMNS];
    for inner in parts(inputs, DEPTH) {
        for columns in parts(outputs, together * COLUMNS) {
            pack(weight.part(inner.clone(), columns.clone()), packed);
            for (block, here) in parts(rows, BLOCK).enumerate() {
                let x = x.part(here.clone(), inner.clone());
                for (first, panel) in columns.clone().step_by(COLUMNS).zip(packed.chunks_exact(inner.len() * COLUMNS)) {
                    let at = (first / COLUMNS * blocks + block) % waiting * BLOCK * COLUMNS;
                    let sums = &mut sums[at..at + here.len() * COLUMNS];
                    let columns = first..columns.end.min(first + COLUMNS);
                    multiply(x, (panel, columns.len()), sums, COLUMNS, inner.start == 0);
                    if inner.end == inputs {
                        let rows = here.start * outputs..here.end * outputs;
                        let plus = Plus { rows: plus.rows.map(|all| &all[rows.clone()]), ..plus };
                        kernels::round(sums, COLUMNS, columns, outputs, plus, &mut out[rows]);
                    }
                }
            }
        }
    }
    ROOM.set(room);
}

/// `0..count` in parts of `size`, the last with what is left.
fn parts(count: usize, size: usize) -> impl Iterator<Item = Range<usize>> {
    (0..count).step_by(size).map(move |first| first..count.min(first + size))
}

/// The products of rows with a panel of as many inputs, of which the first `columns` are wanted, in rows of `sums` that are
/// `stride` apart; added to what is there unless `fresh`.
pub(crate) fn multiply<E: Factor>(
    x: View<'_, E>,
    (panel, columns): (&[E], usize),
    sums: &mut [f32],
    stride: usize,
    fresh: bool,
) {
    if x.rows == 0 {
        return;
    }
    assert!(E::is_supported() && x.width.is_multiple_of(E::GROUP) && panel.len() >= x.width * COLUMNS);
    assert!(sums.len() >= (x.rows - 1) * stride + COLUMNS);
    let pick = if columns <= COLUMNS / 2 { tile::<E, 2> } else { tile::<E, 4> };
    let mut row = 0;
    while row < x.rows {
        let values = Rows { first: x.values[row * x.stride..].as_ptr(), stride: x.stride };
        let sums = Rows { first: sums[row * stride..].as_mut_ptr(), stride };
        let (rows, tile) = pick(x.rows - row);
        // SAFETY: instructions and lengths were checked above and by the view; a tile's rows end before its last.
        unsafe { tile(values, panel.as_ptr(), x.width / E::GROUP, sums, fresh) };
        row += rows;
    }
}

/// [`Factor::tile`].
type Tile<E> = unsafe fn(Rows<*const E>, *const E, usize, Rows<*mut f32>, bool);

/// The largest tile of `C` vectors for at most so many rows, and its rows.
fn tile<E: Factor, const C: usize>(rows: usize) -> (usize, Tile<E>) {
    match rows {
        1 => (1, E::tile::<1, C>),
        2 => (2, E::tile::<2, C>),
        3 => (3, E::tile::<3, C>),
        4 => (4, E::tile::<4, C>),
        5 => (5, E::tile::<5, C>),
        12.. if C == 2 => (12, E::tile::<12, C>),
        _ => (ROWS, E::tile::<ROWS, C>),
    }
}

/// Packs a weight: panel, group of inputs, output, input within the group. Where the last panel has fewer than [`COLUMNS`]
/// outputs, the rest stays as it is.
pub(crate) fn pack<E: Factor>(weight: Weight<'_, E>, packed: &mut [E]) {
    let inputs = weight.inputs();
    assert!(E::is_supported() && inputs.is_multiple_of(E::GROUP));
    assert!(packed.len() >= weight.outputs().div_ceil(COLUMNS) * COLUMNS * inputs);
    match weight {
        Weight::Inputs(View { values, stride, rows, width }) => {
            let shape = Interleave { rows, stride, width, group: E::GROUP, panel: COLUMNS };
            kernels::interleave(values, shape, packed);
        }
        Weight::Outputs(view) => {
            assert!(view.stride.is_multiple_of(E::GROUP));
            let panels = packed.chunks_exact_mut(inputs * COLUMNS);
            for (rows, packed) in parts(view.rows, COLUMNS).zip(panels) {
                let first = view.values[rows.start * view.stride..].as_ptr().cast();
                let words = Rows { first, stride: view.stride / E::GROUP };
                // SAFETY: instructions and room were checked above, and the rows by the view; a group is one word.
                unsafe {
                    instructions::transpose(words, rows.len(), inputs / E::GROUP, packed.as_mut_ptr().cast());
                }
            }
        }
    }
}

/// Turns at most [`COLUMNS`] rows of `words` groups of elements: the first of each, then the second of each, in rows of
/// [`COLUMNS`], of which the last may stay as they are.
pub(crate) fn turn<E: Factor>(rows: &[E], count: usize, words: usize, out: &mut [E]) {
    assert!(E::is_supported() && count <= COLUMNS);
    assert!(rows.len() >= count * words * E::GROUP && out.len() >= words * COLUMNS * E::GROUP);
    let words_of = Rows { first: rows.as_ptr().cast(), stride: words };
    // SAFETY: instructions, rows and room were checked above; a group is one word.
    unsafe { instructions::transpose(words_of, count, words, out.as_mut_ptr().cast()) };
}

/// A weight in panels of [`COLUMNS`] outputs: panel, group of inputs, output, input within the group.
pub(crate) struct Matrix<E> {
    panels: Vec<E>,
    pub(crate) inputs: usize,
    /// Outputs, rounded up to whole panels; the rest are zero.
    pub(crate) outputs: usize,
}

impl<E: Factor> Matrix<E> {
    /// Packs `[outputs, inputs]`. The inputs must be whole groups ([`Factor::GROUP`]).
    pub(crate) fn pack(weight: &Tensor) -> Result<Self, LmError> {
        let (outputs, inputs) = weight.size2()?;
        let (outputs, inputs) = (outputs as usize, inputs as usize);
        assert!(E::is_supported() && inputs > 0 && inputs.is_multiple_of(E::GROUP));
        let mut values = vec![E::narrow(0.0); outputs * inputs];
        copy(weight, &mut values)?;
        let mut panels = vec![E::narrow(0.0); outputs.div_ceil(COLUMNS) * COLUMNS * inputs];
        pack(Weight::Outputs(View::new(&values, inputs, 0..outputs, 0..inputs)), &mut panels);
        Ok(Self { panels, inputs, outputs: outputs.next_multiple_of(COLUMNS) })
    }

    /// `out[row] = weight · x[row]`; rows of `x` are `inputs` wide, those of `out` `outputs`.
    pub(crate) fn multiply(&self, x: &[E], rows: usize, out: &mut [f32]) {
        let x = View::new(x, self.inputs, 0..rows, 0..self.inputs);
        for (panel, weights) in self.panels.chunks_exact(self.inputs * COLUMNS).enumerate() {
            multiply(x, (weights, COLUMNS), &mut out[panel * COLUMNS..], self.outputs, true);
        }
    }
}

/// Copies a tensor's values as they are.
pub(crate) fn copy<E: Element>(tensor: &Tensor, values: &mut [E]) -> Result<(), LmError> {
    let tensor = tensor.f_contiguous()?;
    if tensor.numel() != values.len() || tensor.kind() != E::KIND || tensor.device() != Device::Cpu {
        return Err(LmError::Malformed("a weight is not of the compute kind".into()));
    }
    // SAFETY: contiguous, on this machine, of this type and length (checked), and alive until the copy is done.
    values.copy_from_slice(unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast(), values.len()) });
    Ok(())
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::decoder::tests::wave;

    /// Against libtorch in float64, for every count of rows up to two tiles and one, and sizes that fill no panel.
    fn check<E: Factor>(tolerance: f64) {
        if !E::is_supported() {
            return;
        }
        for (inputs, outputs) in [(6, 5), (64, 64), (34, 130)] {
            let weight = wave(1, &[outputs, inputs]).to_kind(E::KIND);
            let matrix = Matrix::<E>::pack(&weight).unwrap();
            for rows in 1..=13 {
                let x = wave(2, &[rows, inputs]).to_kind(E::KIND);
                let mut values = vec![E::narrow(0.0); rows as usize * matrix.inputs];
                for (row, values) in values.chunks_exact_mut(matrix.inputs).enumerate() {
                    copy(&x.get(row as i64), &mut values[..inputs as usize]).unwrap();
                }
                let mut found = vec![0f32; rows as usize * matrix.outputs];
                matrix.multiply(&values, rows as usize, &mut found);
                let found = Tensor::from_slice(&found).reshape([rows, -1]).narrow(1, 0, outputs);
                let expected = x.to_kind(tch::Kind::Double).matmul(&weight.to_kind(tch::Kind::Double).tr());
                let difference = (found - expected).abs().max().double_value(&[]);
                assert!(difference < tolerance, "{rows} × {inputs} × {outputs}: {difference}");
            }
        }
    }

    #[test]
    fn products_are_right() {
        check::<f32>(1e-5);
        check::<bf16>(1e-5);
    }
}
