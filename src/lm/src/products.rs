//! Matrix products on CPU, with weights packed as the instructions want them.
//!
//! A tile is six rows by 64 outputs with AVX-512, by 16 elsewhere, 32 by 32 with AMX, kept in registers while the inputs
//! pass by. Every row of a tile is summed alone, in an order that follows from how many inputs there are, so that it does
//! not matter how rows are dealt into tiles: a row of a product is bit for bit the same whatever rows are beside it.
//!
//! [`product`] takes a weight that was packed before, or packs it as it goes, which costs no memory and a twentieth of the
//! time where there are hundreds of rows, as in training and embedding. [`Matrix`] is packed once, for sampling. One
//! thread: whoever calls has split the work already (see [`crate::workers`]).

#[cfg(target_arch = "x86_64")]
pub(crate) mod amx;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

use std::cell::RefCell;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use half::bf16;
use tch::{Device, Kind, Tensor};

use crate::LmError;
use crate::device::physical_memory;
use crate::kernels::{self, Element};
#[cfg(target_arch = "x86_64")]
use avx512::Avx512;

/// Outputs of a panel. With AVX-512 one tile computes them: four vectors of sixteen.
pub(crate) const COLUMNS: usize = 64;
/// Rows that one tile computes: with its columns, 24 of the 32 vector registers of AVX-512, or 12 of the 16 of AVX2. Where
/// half of the columns are wanted, a tile of AVX-512 has twice the rows.
const ROWS: usize = 6;
/// What [`Factor::block`] is, except with AMX.
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

/// What becomes of a product's values once they are rounded.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Activation {
    Identity,
    Gelu,
}

/// Where the sums of a panel go.
pub(crate) enum Sums<'a, E> {
    /// Into rows `stride` apart; added to what is there unless `fresh`.
    Kept { rows: &'a mut [f32], stride: usize, fresh: bool },
    /// Rounded once, with what is to be added, into rows of `out` that are `width` wide, from column `first` on. The sums
    /// begin with those `so_far`, in rows of [`COLUMNS`], if there are any.
    Rounded { so_far: Option<&'a [f32]>, plus: Plus<'a, E>, out: &'a mut [E], width: usize, first: usize },
}

/// Whether this CPU has the instructions that products need at least.
pub(crate) fn is_supported() -> bool {
    #[cfg(target_arch = "x86_64")]
    return std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("fma");
    // What multiplies and adds in one instruction on every one of these CPUs is a call elsewhere.
    #[cfg(not(target_arch = "x86_64"))]
    cfg!(all(target_arch = "aarch64", target_endian = "little"))
}

/// An element that products can be computed in.
pub(crate) trait Factor: Element {
    /// Neighbouring inputs that one instruction multiplies and adds: 32 bits of them.
    const GROUP: usize;
    /// Outputs whose weights stand together in a panel, which is whole strips of them: as many as a tile has.
    fn strip() -> usize;
    /// Rows of so many inputs that are multiplied by the packed panels together, so that they stay in the second cache.
    fn block(inputs: usize) -> usize;
    /// Computes the first of at most so many rows, of which the first `columns` are wanted, as a [`Tile`] does; how many.
    ///
    /// # Safety
    /// As there; a [`Run`] is alive.
    unsafe fn tile(rows: usize, columns: usize, of: &Operands<Self>) -> usize;
    /// Puts `GROUP` rows of `columns` elements, a strip of them at most, between each other: the first of each, then the
    /// second of each.
    ///
    /// # Safety
    /// [`is_supported`]; there are these rows, and `out` has room for them.
    unsafe fn interleave(rows: Rows<*const Self>, columns: usize, out: *mut Self);
}

/// Computes `Σ x[row][i] · strip[i][column]` of some rows.
///
/// # Safety
/// [`is_supported`]; there are rows of so many groups, and a strip of them; start and end have these rows, as wide as the
/// strip or as what is wanted.
type Tile<E> = unsafe fn(&Operands<E>);

/// What tiles are computed of.
#[derive(Clone, Copy)]
pub(crate) struct Operands<E> {
    x: Rows<*const E>,
    strip: *const E,
    /// Groups of inputs of each row and of the strip.
    groups: usize,
    /// What the sums begin with, unless it is nothing.
    start: Option<Rows<*const f32>>,
    end: End<E>,
    /// What is wanted next, the strip that follows: the part that each of the rows is to fetch.
    next: Rows<*const u8>,
}

impl<E> Operands<E> {
    /// Asks for what a tile of `rows` is to fetch while it is at one of its groups: a line at the most, since more at once
    /// would wait for each other.
    #[inline(always)]
    fn fetch(next: Rows<*const u8>, rows: usize, groups: usize, group: usize) {
        let step = (rows * next.stride / groups).min(64);
        let line = next.first.wrapping_add(group * step);
        #[cfg(target_arch = "x86_64")]
        // SAFETY: every CPU has the instruction, and it may be told to fetch what is nowhere.
        unsafe {
            std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(line.cast());
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = line;
    }
}

#[cfg(target_arch = "x86_64")]
impl<E: Copy> Operands<E> {
    /// Those from one of the rows on.
    ///
    /// # Safety
    /// It is there.
    unsafe fn from(self, row: usize) -> Self {
        // SAFETY: the caller says so.
        unsafe {
            let start = self.start.map(|rows| rows.from(row, 0));
            // Nobody reads there, and it may be nowhere.
            let next = Rows { first: self.next.first.wrapping_add(row * self.next.stride), ..self.next };
            Self { x: self.x.from(row, 0), start, end: self.end.from(row), next, ..self }
        }
    }
}

/// Products of one thread: what they need of the processor is set up once. While it lives, nothing else on this thread
/// may multiply, libtorch neither. One within another changes nothing.
pub(crate) struct Run(
    /// It is of the thread that began it.
    PhantomData<*const ()>,
);

impl Run {
    pub(crate) fn new() -> Self {
        #[cfg(target_arch = "x86_64")]
        amx::enter();
        Self(PhantomData)
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        #[cfg(target_arch = "x86_64")]
        amx::leave();
    }
}

/// Where the first of some rows is, and how many elements on the next one begins.
#[derive(Clone, Copy)]
pub(crate) struct Rows<P> {
    first: P,
    stride: usize,
}

#[cfg(target_arch = "x86_64")]
impl<T> Rows<*const T> {
    /// What begins so many rows and elements on.
    ///
    /// # Safety
    /// It is there.
    unsafe fn from(self, row: usize, element: usize) -> Self {
        // SAFETY: the caller says so.
        Self { first: unsafe { self.first.add(row * self.stride + element) }, ..self }
    }
}

#[cfg(target_arch = "x86_64")]
impl<T> Rows<*mut T> {
    /// As of rows to read.
    unsafe fn from(self, row: usize, element: usize) -> Self {
        // SAFETY: the caller says so.
        Self { first: unsafe { self.first.add(row * self.stride + element) }, ..self }
    }

    /// The same, to read.
    fn read(self) -> Rows<*const T> {
        Rows { first: self.first, stride: self.stride }
    }
}

/// Where the sums of a tile go: as they are, or the first `columns` of each row rounded, with the bias and the row of `plus`
/// added, whose rows are as far apart as those of `out`.
#[derive(Clone, Copy)]
pub(crate) enum End<E> {
    Kept(Rows<*mut f32>),
    Rounded { out: Rows<*mut E>, columns: usize, bias: Option<*const E>, plus: Option<*const E> },
}

#[cfg(target_arch = "x86_64")]
impl<E> End<E> {
    /// Where the rows from one of them on go.
    ///
    /// # Safety
    /// It is there.
    unsafe fn from(self, row: usize) -> Self {
        // SAFETY: the caller says so.
        unsafe {
            match self {
                Self::Kept(rows) => Self::Kept(rows.from(row, 0)),
                Self::Rounded { out, columns, bias, plus } => {
                    let plus = plus.map(|plus| plus.add(row * out.stride));
                    Self::Rounded { out: out.from(row, 0), columns, bias, plus }
                }
            }
        }
    }
}

/// Implements [`Factor`] by the widest instructions that the CPU has.
macro_rules! factor {
    ($element:ty, $group:literal, $widest:ident) => {
        impl Factor for $element {
            const GROUP: usize = $group;

            fn strip() -> usize {
                #[cfg(target_arch = "x86_64")]
                if <Self as Avx512>::is_supported() {
                    return $widest::strip();
                }
                portable::WIDTH
            }

            fn block(inputs: usize) -> usize {
                #[cfg(target_arch = "x86_64")]
                if <Self as Avx512>::is_supported() {
                    return $widest::block(inputs);
                }
                BLOCK
            }

            unsafe fn tile(rows: usize, columns: usize, of: &Operands<Self>) -> usize {
                #[cfg(target_arch = "x86_64")]
                if <Self as Avx512>::is_supported() {
                    // SAFETY: the caller keeps the contract.
                    return unsafe { $widest::tile(rows, columns, of) };
                }
                // SAFETY: as above.
                unsafe { portable::tile::<Self, $group>(rows, of) }
            }

            unsafe fn interleave(rows: Rows<*const Self>, columns: usize, out: *mut Self) {
                #[cfg(target_arch = "x86_64")]
                if <Self as Avx512>::is_supported() {
                    // SAFETY: the caller keeps the contract.
                    return unsafe { <Self as Avx512>::interleave(rows, columns, out) };
                }
                // SAFETY: as above.
                unsafe { portable::interleave::<Self, $group>(rows, columns, out) }
            }
        }
    };
}

factor!(bf16, 2, amx);
factor!(f32, 1, avx512);

/// `out[word][row] = rows[row][word]` of `count` rows of `words`; rows of `out` are `width` apart, and what no row fills stays
/// as it is.
///
/// # Safety
/// [`is_supported`]; there are these rows, and `out` has `words` of at least `count`.
unsafe fn transpose(rows: Rows<*const i32>, count: usize, words: usize, out: *mut i32, width: usize) {
    #[cfg(target_arch = "x86_64")]
    if <f32 as Avx512>::is_supported() {
        // SAFETY: the caller keeps the contract.
        return unsafe { avx512::transpose(rows, count, words, out, width) };
    }
    // SAFETY: as above.
    unsafe { portable::transpose(rows, count, words, out, width) }
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

    pub(crate) fn part(self, rows: Range<usize>, columns: Range<usize>) -> Self {
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
    pub(crate) fn inputs(&self) -> usize {
        self.inputs
    }

    pub(crate) fn outputs(&self) -> usize {
        self.outputs
    }

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
/// The activation is applied while its part of `out` is in the first cache.
pub(crate) fn product<E: Factor>(
    x: &[E],
    weight: Multiplier<'_, E>,
    plus: Plus<'_, E>,
    activation: Activation,
    out: &mut [E],
) {
    let (inputs, outputs) = (weight.inputs(), weight.outputs());
    if out.is_empty() {
        return;
    }
    let rows = out.len() / outputs;
    assert!(x.len() == rows * inputs && out.len() == rows * outputs);
    assert!(plus.bias.is_none_or(|bias| bias.len() == outputs) && plus.rows.is_none_or(|rows| rows.len() == out.len()));
    let _run = Run::new();
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
    let block_rows = E::block(inputs.min(DEPTH));
    let blocks = rows.div_ceil(block_rows);
    let waiting = if inputs > DEPTH { panels * blocks } else { 0 };
    let mut sums = vec![0f32; waiting * block_rows * COLUMNS];
    for inner in parts(inputs, DEPTH) {
        for columns in parts(outputs, together * COLUMNS) {
            let panels = match weight {
                Multiplier::Packed(packed) => packed.panels(inner.clone(), columns.clone()),
                Multiplier::Plain(weight) => {
                    pack(weight.part(inner.clone(), columns.clone()), packed);
                    &*packed
                }
            };
            for (block, here) in parts(rows, block_rows).enumerate() {
                let x = x.part(here.clone(), inner.clone());
                for (first, panel) in columns.clone().step_by(COLUMNS).zip(panels.chunks_exact(inner.len() * COLUMNS)) {
                    let at = (first / COLUMNS * blocks + block) * block_rows * COLUMNS;
                    let (fresh, columns) = (inner.start == 0, COLUMNS.min(columns.end - first));
                    if inner.end < inputs {
                        let sums = Sums::Kept { rows: &mut sums[at..], stride: COLUMNS, fresh };
                        multiply(x, (panel, columns), sums);
                        continue;
                    }
                    let rows = here.start * outputs..here.end * outputs;
                    let plus = Plus { rows: plus.rows.map(|all| &all[rows.clone()]), ..plus };
                    let (so_far, out) = ((!fresh).then(|| &sums[at..]), &mut out[rows]);
                    multiply(x, (panel, columns), Sums::Rounded { so_far, plus, out, width: outputs, first });
                    if activation == Activation::Gelu {
                        kernels::gelu(out, outputs, first..first + columns);
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

/// The products of rows with a whole panel, of as many inputs as they have or more, of which the first `columns` are wanted.
pub(crate) fn multiply<E: Factor>(x: View<'_, E>, (panel, columns): (&[E], usize), mut sums: Sums<'_, E>) {
    if x.rows == 0 {
        return;
    }
    let _run = Run::new();
    let (inputs, strip) = (panel.len() / COLUMNS, E::strip());
    assert!(is_supported() && x.width.is_multiple_of(E::GROUP) && inputs >= x.width);
    assert!(columns <= COLUMNS && sums.holds(x.rows, columns));
    for (first, weights) in (0..columns).step_by(strip).zip(panel.chunks_exact(strip * inputs)) {
        // Few rows are done before the next strip could be there, and the processor guesses better what they read.
        const FEW: usize = 12;
        let stride = if x.rows < FEW { 0 } else { size_of_val(weights) / x.rows };
        let next = Rows { first: weights.as_ptr_range().end.cast::<u8>(), stride };
        let wanted = strip.min(columns - first);
        let mut row = 0;
        while row < x.rows {
            let values = Rows { first: x.values[row * x.stride..].as_ptr(), stride: x.stride };
            let (start, end) = sums.of_tile(row, first, wanted);
            let next = Rows { first: next.first.wrapping_add(row * next.stride), ..next };
            let of = Operands { x: values, strip: weights.as_ptr(), groups: x.width / E::GROUP, start, end, next };
            // SAFETY: instructions and lengths were checked above and by the view; a tile's rows end before its last.
            row += unsafe { E::tile(x.rows - row, wanted, &of) };
        }
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

    /// Where the tile that begins with `row` and, within the panel, with `column` starts and ends.
    fn of_tile(&mut self, row: usize, column: usize, columns: usize) -> (Option<Rows<*const f32>>, End<E>) {
        match self {
            Self::Kept { rows, stride, fresh } => {
                let sums = Rows { first: rows[row * *stride + column..].as_mut_ptr(), stride: *stride };
                let start = Rows { first: sums.first.cast_const(), stride: *stride };
                ((!*fresh).then_some(start), End::Kept(sums))
            }
            Self::Rounded { so_far, plus, out, width, first } => {
                let first = *first + column;
                let at = row * *width + first;
                let start = so_far.map(|sums| Rows { first: sums[row * COLUMNS + column..].as_ptr(), stride: COLUMNS });
                let out = Rows { first: out[at..].as_mut_ptr(), stride: *width };
                let bias = plus.bias.map(|bias| bias[first..].as_ptr());
                (start, End::Rounded { out, columns, bias, plus: plus.rows.map(|rows| rows[at..].as_ptr()) })
            }
        }
    }
}

/// Packs a weight: panel, strip ([`Factor::strip`]), group of inputs, output, input within the group. Where the last panel has
/// fewer than [`COLUMNS`] outputs, the rest stays as it is.
pub(crate) fn pack<E: Factor>(weight: Weight<'_, E>, packed: &mut [E]) {
    let (inputs, strip) = (weight.inputs(), E::strip());
    assert!(is_supported() && inputs.is_multiple_of(E::GROUP));
    assert!(packed.len() >= weight.outputs().div_ceil(COLUMNS) * COLUMNS * inputs);
    match weight {
        Weight::Inputs(view) => {
            for (number, first) in (0..inputs).step_by(E::GROUP).enumerate() {
                for (index, columns) in parts(view.width, strip).enumerate() {
                    let at = first * view.stride + columns.start;
                    let rows = Rows { first: view.values[at..].as_ptr(), stride: view.stride };
                    let out = &mut packed[(index * inputs + number * E::GROUP) * strip..];
                    // SAFETY: instructions and room were checked above, and the rows by the view.
                    unsafe { E::interleave(rows, columns.len(), out.as_mut_ptr()) };
                }
            }
        }
        Weight::Outputs(view) => {
            assert!(view.stride.is_multiple_of(E::GROUP));
            for (rows, packed) in parts(view.rows, strip).zip(packed.chunks_exact_mut(inputs * strip)) {
                let first = view.values[rows.start * view.stride..].as_ptr().cast();
                let words = Rows { first, stride: view.stride / E::GROUP };
                // SAFETY: instructions and room were checked above, and the rows by the view; a group is one word.
                unsafe {
                    transpose(words, rows.len(), inputs / E::GROUP, packed.as_mut_ptr().cast(), strip);
                }
            }
        }
    }
}

/// Turns a panel of `inputs` back: for each of its outputs, which become rows of [`COLUMNS`] groups, its inputs; what they do
/// not fill stays as it is.
pub(crate) fn turn_panel<E: Factor>(panel: &[E], inputs: usize, out: &mut [E]) {
    let strip = E::strip();
    let outs = out.chunks_mut(strip * COLUMNS * E::GROUP);
    for (rows, out) in panel[..inputs * COLUMNS].chunks_exact(inputs * strip).zip(outs) {
        turn(rows, inputs / E::GROUP, strip, out);
    }
}

/// Turns at most [`COLUMNS`] rows of `words` groups of elements: the first of each, then the second of each, in rows of
/// [`COLUMNS`] groups, of which the last may stay as they are.
pub(crate) fn turn<E: Factor>(rows: &[E], count: usize, words: usize, out: &mut [E]) {
    assert!(is_supported() && count <= COLUMNS);
    assert!(rows.len() >= count * words * E::GROUP && out.len() >= words * COLUMNS * E::GROUP);
    let words_of = Rows { first: rows.as_ptr().cast(), stride: words };
    // SAFETY: instructions, rows and room were checked above; a group is one word.
    unsafe { transpose(words_of, count, words, out.as_mut_ptr().cast(), COLUMNS) };
}

/// A weight in panels of [`COLUMNS`] outputs, as [`pack`] leaves them.
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
        assert!(is_supported() && inputs > 0 && inputs.is_multiple_of(E::GROUP));
        let mut values = vec![E::narrow(0.0); outputs * inputs];
        copy(weight, &mut values)?;
        let mut panels = vec![E::narrow(0.0); outputs.div_ceil(COLUMNS) * COLUMNS * inputs];
        pack(Weight::Outputs(View::new(&values, inputs, 0..outputs, 0..inputs)), &mut panels);
        Ok(Self { panels, inputs, outputs: outputs.next_multiple_of(COLUMNS) })
    }

    /// `out[row] = weight · x[row]`; rows of `x` are `inputs` wide, those of `out` `outputs`.
    pub(crate) fn multiply(&self, x: &[E], rows: usize, out: &mut [f32]) {
        let _run = Run::new();
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
    use super::*;
    use crate::decoder::tests::wave;

    /// Against libtorch in float64, for every count of rows up to two tiles and one, and sizes that fill no panel.
    fn check<E: Factor>(tolerance: f64) {
        if !is_supported() {
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

    fn values<E: Factor>(seed: usize, count: usize) -> Vec<E> {
        let values = Vec::<f32>::try_from(wave(seed, &[count as i64])).unwrap();
        values.into_iter().map(E::narrow).collect()
    }

    /// [`Factor::tile`].
    type TileOf<E> = unsafe fn(usize, usize, &Operands<E>) -> usize;

    /// Tiles of the widest instructions and of any CPU's over one strip, with everything to begin from and to be added: what
    /// they keep and what they round.
    fn tiles<E: Factor + portable::Split<G>, const G: usize>(rows: usize, columns: usize) -> [Vec<f32>; 2] {
        // What two instructions of AMX multiply, and some more.
        const GROUPS: usize = 41;
        const WIDTH: usize = 84;
        let x = values::<E>(1, rows * WIDTH);
        let weight = values::<E>(2, GROUPS * G * COLUMNS);
        let start: Vec<f32> = values(3, rows * COLUMNS);
        let (bias, plus) = (values::<E>(4, COLUMNS), values::<E>(5, rows * 70));
        let _run = Run::new();
        let run = |strip: usize, tile: TileOf<E>| {
            let mut panel = vec![E::narrow(0.0); weight.len()];
            for (at, value) in weight.iter().enumerate() {
                let (group, column, part) = (at / G / COLUMNS, at / G % COLUMNS, at % G);
                panel[((column / strip * GROUPS + group) * strip + column % strip) * G + part] = *value;
            }
            let (mut kept, mut rounded) = (vec![0f32; rows * COLUMNS], vec![E::narrow(0.0); rows * 70]);
            for (first, weights) in (0..columns).step_by(strip).zip(panel.chunks_exact(GROUPS * G * strip)) {
                let wanted = strip.min(columns - first);
                let mut row = 0;
                while row < rows {
                    let left = rows - row;
                    let x = Rows { first: x[row * WIDTH..].as_ptr(), stride: WIDTH };
                    let start = Rows { first: start[row * COLUMNS + first..].as_ptr(), stride: COLUMNS };
                    let kept = Rows { first: kept[row * COLUMNS + first..].as_mut_ptr(), stride: COLUMNS };
                    let at = row * 70 + first;
                    let out = Rows { first: rounded[at..].as_mut_ptr(), stride: 70 };
                    let (bias, plus) = (Some(bias[first..].as_ptr()), Some(plus[at..].as_ptr()));
                    let end = End::Rounded { out, columns: wanted, bias, plus };
                    let sums = Operands {
                        x,
                        strip: weights.as_ptr(),
                        groups: GROUPS,
                        start: None,
                        end: End::Kept(kept),
                        next: Rows { first: std::ptr::null(), stride: 0 },
                    };
                    // SAFETY: the instructions are there (the caller asked), and so are the rows of what is given.
                    row += unsafe {
                        tile(left, wanted, &sums);
                        tile(left, wanted, &Operands { start: Some(start), end, ..sums })
                    };
                }
            }
            for row in rounded.chunks(70) {
                assert!(row[columns..].iter().all(|value| value.wide() == 0.0), "beyond what was wanted");
            }
            let kept = kept.chunks(COLUMNS).flat_map(|row| row[..columns].to_vec());
            kept.chain(rounded.into_iter().map(E::wide)).collect()
        };
        // SAFETY: as above.
        let of_any: TileOf<E> = |rows, _, of| unsafe { portable::tile::<E, G>(rows, of) };
        [run(E::strip(), E::tile), run(portable::WIDTH, of_any)]
    }

    #[test]
    fn tiles_are_the_same_on_any_cpu() {
        if !is_supported() {
            return;
        }
        for (rows, columns) in [(1, 64), (4, 53), (17, 64), (29, 21), (12, 32)] {
            let [found, expected] = tiles::<f32, 1>(rows, columns);
            // The order of sums is the same, and so is every bit.
            assert_eq!(found, expected);
            let [found, expected] = tiles::<bf16, 2>(rows, columns);
            let close = |(found, expected): (&f32, &f32)| (found - expected).abs() <= expected.abs() / 128.0 + 1e-5;
            assert!(found.iter().zip(&expected).all(close), "{rows} × {columns}: {found:?}, expected {expected:?}");
        }
    }

    #[test]
    fn rows_and_words_change_places() {
        if !is_supported() {
            return;
        }
        for (count, words) in [(64, 16), (5, 7), (1, 1), (33, 18), (4, 4)] {
            let rows: Vec<i32> = (0..count * 20).collect();
            let (mut found, mut portable) = (vec![-1; words * COLUMNS], vec![-1; words * COLUMNS]);
            let of = Rows { first: rows.as_ptr(), stride: 20 };
            // SAFETY: the instructions are there, and so are the rows and the room.
            unsafe {
                transpose(of, count as usize, words, found.as_mut_ptr(), COLUMNS);
                portable::transpose(of, count as usize, words, portable.as_mut_ptr(), COLUMNS);
            }
            let place = |at: usize| (at / COLUMNS, (at % COLUMNS) as i32);
            let expected = |(word, row): (usize, i32)| if row < count { row * 20 + word as i32 } else { -1 };
            let expected: Vec<i32> = (0..words * COLUMNS).map(|at| expected(place(at))).collect();
            assert_eq!((&found, &portable), (&expected, &expected), "{count} × {words}");
        }
    }
}
