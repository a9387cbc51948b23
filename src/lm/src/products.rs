//! Matrix products on CPU, in AVX-512, with weights packed as the instructions want them.
//!
//! A tile is six rows by 64 outputs, kept in registers while the inputs pass by. Every row of a tile is summed alone and in
//! order of the inputs, so that it does not matter how rows are dealt into tiles: a row of a product is bit for bit the
//! same whatever rows are beside it.
//!
//! [`product`] takes a weight that was packed before, or packs it as it goes, which costs no memory and a twentieth of the
//! time where there are hundreds of rows, as in training and embedding. [`Matrix`] is packed once, for sampling. One thread: whoever calls has split the work already
//! (see [`crate::workers`]).

use std::cell::RefCell;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use tch::{Device, Kind, Tensor};

use crate::LmError;
use crate::device::physical_memory;
use crate::kernels::Element;

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
const PACKED: usize = 5 << 19;

thread_local! {
    /// Room for packed panels, in words.
    static ROOM: RefCell<Vec<u32>> = const { RefCell::new(Vec::new()) };
}

/// What is added to sums before they are rounded.
#[derive(Clone, Copy)]
pub(crate) struct Plus<'a, E> {
    /// To every row.
    pub(crate) bias: Option<&'a [E]>,
    /// To each row its own.
    pub(crate) rows: Option<&'a [E]>,
}

impl<E> Plus<'_, E> {
    pub(crate) const NOTHING: Self = Self { bias: None, rows: None };
}

/// Where the sums of a panel go.
pub(crate) enum Sums<'a, E> {
    /// Into rows `stride` apart; added to what is there unless `fresh`.
    Kept { rows: &'a mut [f32], stride: usize, fresh: bool },
    /// Rounded once, with what is to be added, into rows of `out` that are `width` wide, from column `first` on. The sums
    /// begin with those `so_far`, in rows of [`COLUMNS`], if there are any.
    Rounded { so_far: Option<&'a [f32]>, plus: Plus<'a, E>, out: &'a mut [E], width: usize, first: usize },
}

/// An element that products can be computed in.
pub(crate) trait Factor: Element {
    /// Neighbouring inputs that one instruction multiplies and adds: 32 bits of them.
    const GROUP: usize;
    /// Whether this CPU has the instructions.
    fn is_supported() -> bool;
    /// `Σ x[row][i] · panel[i][column]` for `R` rows and the first `C` · 16 columns, added to where the sums `start` if that
    /// is somewhere, to their `end`.
    ///
    /// # Safety
    /// [`Self::is_supported`]; `x` has `R` rows of `groups · GROUP` elements; `panel` holds `groups · GROUP · COLUMNS`;
    /// `start` and `end` have `R` rows, of `COLUMNS` or of as many as are wanted.
    unsafe fn tile<const R: usize, const C: usize>(
        x: Rows<*const Self>,
        panel: *const Self,
        groups: usize,
        start: Option<Rows<*const f32>>,
        end: End<Self>,
    );
    /// Puts `GROUP` rows of at most [`COLUMNS`] elements between each other: the first of each, then the second of each.
    ///
    /// # Safety
    /// [`Self::is_supported`]; there are `GROUP` rows of `columns` elements, and `out` has room for them.
    unsafe fn interleave(rows: Rows<*const Self>, columns: usize, out: *mut Self);
}

/// Where the first of some rows is, and how many elements on the next one begins.
#[derive(Clone, Copy)]
pub(crate) struct Rows<P> {
    first: P,
    stride: usize,
}

/// Where the sums of a tile go: as they are, or the first `columns` of each row rounded, with the bias and the row of `plus`
/// added, whose rows are as far apart as those of `out`.
#[derive(Clone, Copy)]
pub(crate) enum End<E> {
    Kept(Rows<*mut f32>),
    Rounded { out: Rows<*mut E>, columns: usize, bias: Option<*const E>, plus: Option<*const E> },
}

#[cfg(target_arch = "x86_64")]
mod instructions {
    use std::arch::x86_64::*;

    use half::bf16;

    use super::{COLUMNS, End, Factor, Rows};

    /// Implements [`Factor`] by a module of the element's own instructions, which need the CPU's `features`.
    macro_rules! factor {
        ($element:ty, $group:literal, $lanes:ident, $features:literal, $supported:expr) => {
            impl Factor for $element {
                const GROUP: usize = $group;

                fn is_supported() -> bool {
                    $supported
                }

                unsafe fn tile<const R: usize, const C: usize>(
                    x: Rows<*const Self>,
                    panel: *const Self,
                    groups: usize,
                    start: Option<Rows<*const f32>>,
                    end: End<Self>,
                ) {
                    #[target_feature(enable = $features)]
                    unsafe fn tile<const R: usize, const C: usize>(
                        x: Rows<*const $element>,
                        panel: *const $element,
                        groups: usize,
                        start: Option<Rows<*const f32>>,
                        end: End<$element>,
                    ) {
                        // SAFETY: the pointers are good for these offsets by the contract of `Factor::tile`.
                        unsafe {
                            let mut sums = match start {
                                None => [[_mm512_setzero_ps(); C]; R],
                                Some(rows) => std::array::from_fn(|row| {
                                    let first = rows.first.add(row * rows.stride);
                                    std::array::from_fn(|part| _mm512_loadu_ps(first.add(16 * part)))
                                }),
                            };
                            for group in 0..groups {
                                let weights = panel.add(group * $group * COLUMNS);
                                let weights: [_; C] =
                                    std::array::from_fn(|part| $lanes::load(weights.add(16 * $group * part)));
                                for (row, sums) in sums.iter_mut().enumerate() {
                                    let inputs = $lanes::repeat(x.first.add(row * x.stride + group * $group));
                                    for (sum, weights) in sums.iter_mut().zip(weights) {
                                        *sum = $lanes::multiply_add(inputs, weights, *sum);
                                    }
                                }
                            }
                            for (row, sums) in sums.into_iter().enumerate() {
                                for (part, sum) in sums.into_iter().enumerate() {
                                    let at = 16 * part;
                                    match end {
                                        End::Kept(rows) => {
                                            _mm512_storeu_ps(rows.first.add(row * rows.stride + at), sum);
                                        }
                                        End::Rounded { out, columns, bias, plus } if at < columns => {
                                            let (first, left) = (row * out.stride + at, columns - at);
                                            let sum = match bias {
                                                Some(bias) => _mm512_add_ps(sum, $lanes::widen(bias.add(at), left)),
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
                    unsafe { tile::<R, C>(x, panel, groups, start, end) }
                }

                unsafe fn interleave(rows: Rows<*const Self>, columns: usize, out: *mut Self) {
                    // SAFETY: the caller keeps the contract.
                    unsafe { $lanes::interleave(rows, columns, out) }
                }
            }
        };
    }

    factor!(
        bf16,
        2,
        pairs,
        "avx512f,avx512bw,avx512vl,avx512bf16",
        std::is_x86_feature_detected!("avx512bf16") && f32::is_supported()
    );
    factor!(
        f32,
        1,
        singles,
        "avx512f",
        std::is_x86_feature_detected!("avx512f")
            && std::is_x86_feature_detected!("avx512bw")
            && std::is_x86_feature_detected!("avx512dq")
            && std::is_x86_feature_detected!("avx512vl")
            && std::is_x86_feature_detected!("fma")
    );

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
                    _: Option<Rows<*const f32>>,
                    _: End<Self>,
                ) {
                }

                unsafe fn interleave(_: Rows<*const Self>, _: usize, _: *mut Self) {}
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

/// What rows are multiplied by: a weight that is packed on the way, or one that was before.
#[derive(Clone, Copy)]
pub(crate) enum Multiplier<'a, E> {
    Plain(Weight<'a, E>),
    Packed(&'a Packed),
}

impl<E: Factor> Multiplier<'_, E> {
    fn inputs(&self) -> usize {
        match self {
            Self::Plain(weight) => weight.inputs(),
            Self::Packed(packed) => packed.inputs,
        }
    }

    pub(crate) fn outputs(&self) -> usize {
        match self {
            Self::Plain(weight) => weight.outputs(),
            Self::Packed(packed) => packed.outputs,
        }
    }
}

/// Bytes that all of a process's [`Packed`] take.
static PACKED_BYTES: AtomicUsize = AtomicUsize::new(0);

/// A weight that was packed once, for [`product`]: by parts of [`DEPTH`] inputs, as [`pack`] leaves each.
pub(crate) struct Packed {
    /// Groups of elements.
    words: Vec<u32>,
    kind: Kind,
    inputs: usize,
    outputs: usize,
}

impl Packed {
    /// Packs a weight; `None` where all that is packed would take more than an eighth of the machine's memory.
    pub(crate) fn new<E: Factor>(weight: Weight<'_, E>) -> Option<Self> {
        let (inputs, outputs) = (weight.inputs(), weight.outputs());
        let count = outputs.div_ceil(COLUMNS) * COLUMNS * inputs / E::GROUP;
        let bytes = count * size_of::<u32>();
        let most = physical_memory()? / 8;
        let fits = |used: usize| used.checked_add(bytes).filter(|&sum| sum <= most);
        PACKED_BYTES.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits).ok()?;
        let mut packed = Self { words: vec![0; count], kind: E::KIND, inputs, outputs };
        // SAFETY: a word is a group of elements, whatever its bits are.
        let (_, panels, _) = unsafe { packed.words.align_to_mut::<E>() };
        let mut rest = panels;
        for inner in parts(inputs, DEPTH) {
            let (part, behind) = rest.split_at_mut(outputs.div_ceil(COLUMNS) * COLUMNS * inner.len());
            pack(weight.part(inner, 0..outputs), part);
            rest = behind;
        }
        Some(packed)
    }

    /// The panels of one of the parts of inputs, and of outputs from a panel's first on.
    fn panels<E: Factor>(&self, inputs: Range<usize>, outputs: Range<usize>) -> &[E] {
        assert!(self.kind == E::KIND && inputs.start.is_multiple_of(DEPTH) && outputs.start.is_multiple_of(COLUMNS));
        // SAFETY: a word is a group of elements, whatever its bits are.
        let (_, panels, _) = unsafe { self.words.align_to::<E>() };
        let first = inputs.start * self.outputs.next_multiple_of(COLUMNS) + outputs.start * inputs.len();
        &panels[first..first + outputs.len().next_multiple_of(COLUMNS) * inputs.len()]
    }
}

impl Drop for Packed {
    fn drop(&mut self) {
        PACKED_BYTES.fetch_sub(self.words.len() * size_of::<u32>(), Ordering::Relaxed);
    }
}

/// `out[row] = Σ x[row][input] · weight[input] + plus`, each sum rounded once: rows of `x` are as wide as the weight has
/// inputs, those of `out` and what is added to them as it has outputs. The inputs must be whole groups ([`Factor::GROUP`]).
pub(crate) fn product<E: Factor>(x: &[E], weight: Multiplier<'_, E>, plus: Plus<'_, E>, out: &mut [E]) {
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
    let most = (PACKED / size_of::<E>() / size).max(1);
    let together = panels.div_ceil(panels.div_ceil(most));
    let mut room = ROOM.take();
    if let Multiplier::Plain(_) = weight {
        room.resize(room.len().max(together * size / E::GROUP), 0);
    }
    // SAFETY: a word is a group of elements, whatever its bits are.
    let (_, packed, _) = unsafe { room.align_to_mut::<E>() };
    // Sums wait for the rest of the inputs, if there is one.
    let blocks = rows.div_ceil(BLOCK);
    let waiting = if inputs > DEPTH { panels * blocks } else { 0 };
    let mut sums = vec![0f32; waiting * BLOCK * COLUMNS];
    for inner in parts(inputs, DEPTH) {
        for columns in parts(outputs, together * COLUMNS) {
            let panels = match weight {
                Multiplier::Packed(packed) => packed.panels(inner.clone(), columns.clone()),
                Multiplier::Plain(weight) => {
                    pack(weight.part(inner.clone(), columns.clone()), packed);
                    &*packed
                }
            };
            for (block, here) in parts(rows, BLOCK).enumerate() {
                let x = x.part(here.clone(), inner.clone());
                for (first, panel) in columns.clone().step_by(COLUMNS).zip(panels.chunks_exact(inner.len() * COLUMNS)) {
                    let at = (first / COLUMNS * blocks + block) * BLOCK * COLUMNS;
                    let (fresh, columns) = (inner.start == 0, COLUMNS.min(columns.end - first));
                    let rows = here.start * outputs..here.end * outputs;
                    let sums = match inner.end == inputs {
                        true => {
                            let plus = Plus { rows: plus.rows.map(|all| &all[rows.clone()]), ..plus };
                            let so_far = (!fresh).then(|| &sums[at..]);
                            Sums::Rounded { so_far, plus, out: &mut out[rows], width: outputs, first }
                        }
                        false => Sums::Kept { rows: &mut sums[at..], stride: COLUMNS, fresh },
                    };
                    multiply(x, (panel, columns), sums);
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

/// The products of rows with a panel of as many inputs, of which the first `columns` are wanted.
pub(crate) fn multiply<E: Factor>(x: View<'_, E>, (panel, columns): (&[E], usize), mut sums: Sums<'_, E>) {
    if x.rows == 0 {
        return;
    }
    assert!(E::is_supported() && x.width.is_multiple_of(E::GROUP) && panel.len() >= x.width * COLUMNS);
    assert!(columns <= COLUMNS && sums.holds(x.rows, columns));
    let pick = if columns <= COLUMNS / 2 { tile::<E, 2> } else { tile::<E, 4> };
    let mut row = 0;
    while row < x.rows {
        let values = Rows { first: x.values[row * x.stride..].as_ptr(), stride: x.stride };
        let (start, end) = sums.of_tile(row, columns);
        let (rows, tile) = pick(x.rows - row);
        // SAFETY: instructions and lengths were checked above and by the view; a tile's rows end before its last.
        unsafe { tile(values, panel.as_ptr(), x.width / E::GROUP, start, end) };
        row += rows;
    }
}

impl<E: Factor> Sums<'_, E> {
    /// Whether there is room for some rows, of which so many columns are wanted.
    fn holds(&self, rows: usize, columns: usize) -> bool {
        match self {
            Self::Kept { rows: sums, stride, .. } => sums.len() >= (rows - 1) * stride + COLUMNS,
            Self::Rounded { so_far, plus, out, width, first } => {
                let fits = |values: &[E]| values.len() >= rows * width;
                first + columns <= *width
                    && fits(out)
                    && plus.rows.is_none_or(fits)
                    && plus.bias.is_none_or(|bias| bias.len() >= *width)
                    && so_far.is_none_or(|sums| sums.len() >= rows * COLUMNS)
            }
        }
    }

    /// Where the tile that begins with `row` starts and ends.
    fn of_tile(&mut self, row: usize, columns: usize) -> (Option<Rows<*const f32>>, End<E>) {
        match self {
            Self::Kept { rows, stride, fresh } => {
                let sums = Rows { first: rows[row * *stride..].as_mut_ptr(), stride: *stride };
                let start = Rows { first: sums.first.cast_const(), stride: *stride };
                ((!*fresh).then_some(start), End::Kept(sums))
            }
            Self::Rounded { so_far, plus, out, width, first } => {
                let at = row * *width + *first;
                let start = so_far.map(|sums| Rows { first: sums[row * COLUMNS..].as_ptr(), stride: COLUMNS });
                let out = Rows { first: out[at..].as_mut_ptr(), stride: *width };
                let bias = plus.bias.map(|bias| bias[*first..].as_ptr());
                (start, End::Rounded { out, columns, bias, plus: plus.rows.map(|rows| rows[at..].as_ptr()) })
            }
        }
    }
}

/// [`Factor::tile`].
type Tile<E> = unsafe fn(Rows<*const E>, *const E, usize, Option<Rows<*const f32>>, End<E>);

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
        Weight::Inputs(view) => {
            for (number, first) in (0..inputs).step_by(E::GROUP).enumerate() {
                for (panel, columns) in parts(view.width, COLUMNS).enumerate() {
                    let at = first * view.stride + columns.start;
                    let rows = Rows { first: view.values[at..].as_ptr(), stride: view.stride };
                    let out = &mut packed[(panel * inputs + number * E::GROUP) * COLUMNS..];
                    // SAFETY: instructions and room were checked above, and the rows by the view.
                    unsafe { E::interleave(rows, columns.len(), out.as_mut_ptr()) };
                }
            }
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
            let rows = &mut out[panel * COLUMNS..];
            multiply(x, (weights, COLUMNS), Sums::Kept { rows, stride: self.outputs, fresh: true });
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
