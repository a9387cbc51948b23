//! The same without instructions of one kind of CPU: loops over arrays that the compiler turns into vectors. On x86-64 they
//! are compiled for AVX2 and FMA, which must be there.

use half::bf16;

use super::{End, Operands, ROWS, Rows, Tile};
use crate::kernels::Element;

/// Outputs of a tile: with [`ROWS`], twelve of AVX2's sixteen vector registers.
pub(super) const WIDTH: usize = 16;

/// An element of which `G` make 32 bits.
pub(super) trait Split<const G: usize>: Element {
    fn split(word: u32) -> [f32; G];
}

impl Split<1> for f32 {
    #[inline(always)]
    fn split(word: u32) -> [f32; 1] {
        [f32::from_bits(word)]
    }
}

impl Split<2> for bf16 {
    #[inline(always)]
    fn split(word: u32) -> [f32; 2] {
        // Of little-endian bytes the first element is the lower half.
        [f32::from_bits(word << 16), f32::from_bits(word & 0xffff_0000)]
    }
}

/// [`super::Factor::tile`].
pub(super) unsafe fn tile<E: Split<G>, const G: usize>(rows: usize, of: &Operands<E>) -> usize {
    let (count, tile): (usize, Tile<E>) = match rows {
        1 => (1, sums::<E, 1, G>),
        2 => (2, sums::<E, 2, G>),
        3 => (3, sums::<E, 3, G>),
        4 => (4, sums::<E, 4, G>),
        5 => (5, sums::<E, 5, G>),
        _ => (ROWS, sums::<E, ROWS, G>),
    };
    // SAFETY: the caller keeps the contract.
    unsafe { tile(of) };
    count
}

/// A [`Tile`] of `R` rows.
///
/// # Safety
/// As there; the CPU has the instructions.
#[cfg_attr(target_arch = "x86_64", target_feature(enable = "avx2,fma"))]
unsafe fn sums<E: Split<G>, const R: usize, const G: usize>(of: &Operands<E>) {
    let Operands { x, strip, groups, start, end, next } = *of;
    // SAFETY: the pointers are good for these offsets by the caller's contract.
    unsafe {
        let mut sums = match start {
            None => [[0f32; WIDTH]; R],
            Some(rows) => {
                std::array::from_fn(|row| rows.first.add(row * rows.stride).cast::<[f32; WIDTH]>().read_unaligned())
            }
        };
        for group in 0..groups {
            Operands::<E>::fetch(next, R, groups, group);
            let weights = strip.add(G * WIDTH * group).cast::<[u32; WIDTH]>().read_unaligned();
            for (row, sums) in sums.iter_mut().enumerate() {
                let inputs = E::split(x.first.add(row * x.stride + G * group).cast::<u32>().read_unaligned());
                for (input, factor) in inputs.into_iter().enumerate() {
                    for (sum, weight) in sums.iter_mut().zip(weights) {
                        *sum = factor.mul_add(E::split(weight)[input], *sum);
                    }
                }
            }
        }
        for (row, sums) in sums.into_iter().enumerate() {
            put(sums, row, end);
        }
    }
}

/// Puts a row's sums where they go.
///
/// # Safety
/// The row is one of the tile whose end this is.
#[inline(always)]
unsafe fn put<E: Element>(mut sums: [f32; WIDTH], row: usize, end: End<E>) {
    // SAFETY: by the caller's contract; columns that are not wanted are not touched.
    unsafe {
        match end {
            End::Kept(rows) => rows.first.add(row * rows.stride).cast::<[f32; WIDTH]>().write_unaligned(sums),
            End::Rounded { out, columns, bias, plus } => {
                let first = row * out.stride;
                let plus = plus.map(|plus| plus.add(first));
                for added in [bias, plus].into_iter().flatten() {
                    let added = load(added, columns);
                    sums.iter_mut().zip(added).for_each(|(sum, added)| *sum += added.wide());
                }
                store(sums.map(E::narrow), out.first.add(first), columns);
            }
        }
    }
}

/// The first `count` of a row's elements.
#[inline(always)]
unsafe fn load<E: Element>(from: *const E, count: usize) -> [E; WIDTH] {
    // SAFETY: the caller's memory.
    match count {
        // Of a known number of elements the compiler makes vectors.
        WIDTH.. => unsafe { from.cast::<[E; WIDTH]>().read_unaligned() },
        _ => std::array::from_fn(|place| if place < count { unsafe { *from.add(place) } } else { E::narrow(0.0) }),
    }
}

/// Writes the first `count` of a row's elements, or groups of them.
#[inline(always)]
unsafe fn store<T: Copy>(values: [T; WIDTH], to: *mut T, count: usize) {
    // SAFETY: the caller's memory.
    match count {
        WIDTH.. => unsafe { to.cast::<[T; WIDTH]>().write_unaligned(values) },
        _ => values.iter().take(count).enumerate().for_each(|(place, value)| unsafe { to.add(place).write(*value) }),
    }
}

/// [`super::Factor::interleave`].
///
/// # Safety
/// As there; the CPU has the instructions.
#[cfg_attr(target_arch = "x86_64", target_feature(enable = "avx2,fma"))]
pub(super) unsafe fn interleave<E: Element, const G: usize>(rows: Rows<*const E>, columns: usize, out: *mut E) {
    // SAFETY: by the caller's contract.
    unsafe {
        if G == 1 {
            // The compiler does not see by itself that this is a copy.
            return store(load(rows.first, columns), out, columns);
        }
        let rows: [_; G] = std::array::from_fn(|row| load(rows.first.add(row * rows.stride), columns));
        let groups: [[E; G]; WIDTH] = std::array::from_fn(|column| rows.map(|row| row[column]));
        store(groups, out.cast(), columns);
    }
}

/// Rows and words that change places together.
const SQUARE: usize = 4;

/// [`super::transpose`].
///
/// # Safety
/// As there.
pub(super) unsafe fn transpose(rows: Rows<*const i32>, count: usize, words: usize, out: *mut i32, width: usize) {
    for top in (0..count).step_by(SQUARE) {
        for left in (0..words).step_by(SQUARE) {
            // SAFETY: by the caller's contract; a word of two bf16 may begin at any of them.
            let turn = |row: usize, word: usize| unsafe {
                out.add(word * width + row).write_unaligned(rows.first.add(row * rows.stride + word).read_unaligned());
            };
            match top + SQUARE <= count && left + SQUARE <= words {
                true => (0..SQUARE * SQUARE).for_each(|at| turn(top + at % SQUARE, left + at / SQUARE)),
                false => {
                    let rows = top..count.min(top + SQUARE);
                    rows.for_each(|row| (left..words.min(left + SQUARE)).for_each(|word| turn(row, word)));
                }
            }
        }
    }
}
