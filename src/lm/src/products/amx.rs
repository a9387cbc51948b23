//! The tile registers of AMX: sixteen rows of sixteen sums each, to which one instruction adds the products of 32 bf16
//! inputs. A strip is as wide as two of them, so that its weights are read one line behind the other.
//!
//! Inputs that fill no instruction are left to AVX-512, and so is rounding. Which way an input is added depends on its place
//! and on how many inputs there are, and not on the rows; so more inputs, if only of zeros, can change a bit.

use std::arch::asm;
use std::arch::x86_64::__cpuid_count;
use std::cell::Cell;
use std::mem::MaybeUninit;
use std::sync::OnceLock;

use half::bf16;

use super::avx512::{self, Avx512};
use super::{End, Operands, Rows, Tile};

/// Rows and outputs of a tile register.
const SIDE: usize = 16;
/// Pairs of inputs that one instruction multiplies and adds.
const PAIRS: usize = 16;
/// Rows of two registers, and outputs of two others, which are a strip: all eight are theirs, their factors' and their
/// sums'.
const SQUARE: usize = 2 * SIDE;
/// Bytes of rows that stay in the second cache while one panel after the other is multiplied by them: panels come from the
/// third, which could not keep up with what multiplies so fast if each met few rows.
const BLOCK_BYTES: usize = 512 << 10;

/// Whether this CPU has the instructions, and the kernel lets us use them.
pub(crate) fn is_supported() -> bool {
    static SUPPORTED: OnceLock<bool> = OnceLock::new();
    *SUPPORTED.get_or_init(|| {
        // Leaf 7 tells of bf16 in bit 22 and of tiles in bit 24 of EDX.
        const BITS: u32 = 1 << 22 | 1 << 24;
        let is_there = __cpuid_count(0, 0).eax >= 7 && __cpuid_count(7, 0).edx & BITS == BITS;
        is_there && bf16::is_supported() && is_permitted()
    })
}

/// Asks Linux for the registers, which takes 8 KB more of each thread that uses them.
#[cfg(target_os = "linux")]
fn is_permitted() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_int = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_ulong = 18;
    // SAFETY: the call takes two numbers; a kernel that does not know it says so.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

/// How other systems are asked is not known here.
#[cfg(not(target_os = "linux"))]
fn is_permitted() -> bool {
    false
}

/// [`super::Factor::strip`].
pub(super) fn strip() -> usize {
    if is_supported() { SQUARE } else { avx512::strip() }
}

/// [`super::Factor::block`].
pub(super) fn block(inputs: usize) -> usize {
    match is_supported() {
        true => (BLOCK_BYTES / (inputs * size_of::<bf16>()) / SQUARE).max(3) * SQUARE,
        false => avx512::block(inputs),
    }
}

/// [`super::Factor::tile`], after [`enter`].
pub(super) unsafe fn tile(rows: usize, columns: usize, of: &Operands<bf16>) -> usize {
    // SAFETY: the caller keeps the contract.
    unsafe {
        if !is_supported() {
            return avx512::tile(rows, columns, of);
        }
        if of.groups >= PAIRS {
            return all::<Registers>(rows, columns, of);
        }
        let (count, tile) = Registers::rest(rows, columns);
        tile(of);
        count
    }
}

/// What multiplies: a [`SQUARE`] of sums, of one row of registers or two.
trait Unit {
    /// For so many rows in each row of registers, at most [`SIDE`]; in the second there may be none, and are none unless the
    /// first is full.
    ///
    /// # Safety
    /// The CPU has what it takes, a [`super::Run`] is alive, and no other of this thread is in use.
    unsafe fn new(rows: [usize; 2]) -> Self;

    /// Sums that begin with what is there, or with nothing.
    ///
    /// # Safety
    /// These rows are there, 32 sums wide.
    unsafe fn begin(&mut self, start: Option<Rows<*const f32>>);

    /// Adds the products of the rows with a strip of weights, [`PAIRS`] so many times, which is once or more.
    ///
    /// # Safety
    /// The rows and the strip have so many inputs.
    unsafe fn add(&mut self, x: Rows<*const bf16>, strip: *const bf16, times: usize);

    /// Writes the sums.
    ///
    /// # Safety
    /// These rows have room for 32 sums each.
    unsafe fn end(&mut self, out: Rows<*mut f32>);

    /// What multiplies the inputs that are left, and ends a tile.
    fn rest(rows: usize, columns: usize) -> (usize, Tile<bf16>);
}

/// [`super::Factor::tile`] of all rows at once.
unsafe fn all<U: Unit>(rows: usize, columns: usize, of: &Operands<bf16>) -> usize {
    let (times, rest) = (of.groups / PAIRS, of.groups % PAIRS);
    let mut room = MaybeUninit::<[f32; SQUARE * SQUARE]>::uninit();
    let mut waiting: Option<Finish> = None;
    let mut unit = None;
    for first in (0..rows).step_by(SQUARE) {
        let here = SQUARE.min(rows - first);
        if here < SQUARE {
            unit = None;
        }
        // SAFETY: the caller's rows, from these on; a whole strip is there, and a room has a square.
        unsafe {
            let unit = unit.get_or_insert_with(|| U::new([here.min(SIDE), here.saturating_sub(SIDE)]));
            let of = of.from(first);
            unit.begin(of.start);
            unit.add(of.x, of.strip, times);
            // Meanwhile, since tiles take long and few instructions; and before the room is written again.
            if let Some(finish) = waiting.take() {
                finish.run(U::rest);
            }
            if let (End::Kept(rows), 0) = (of.end, rest) {
                unit.end(rows);
                continue;
            }
            let sums = Rows { first: room.as_mut_ptr().cast(), stride: SQUARE };
            unit.end(sums);
            let left = Operands {
                x: of.x.from(0, 2 * PAIRS * times),
                strip: of.strip.add(2 * PAIRS * times * SQUARE),
                groups: rest,
                start: Some(sums.read()),
                ..of
            };
            waiting = Some(Finish { rows: here, columns, left });
        }
    }
    if let Some(finish) = waiting {
        // SAFETY: as above.
        unsafe { finish.run(U::rest) };
    }
    rows
}

/// What is left to do of a square.
struct Finish {
    rows: usize,
    columns: usize,
    /// The inputs that filled no instruction, their weights, and the sums of the others.
    left: Operands<bf16>,
}

impl Finish {
    /// # Safety
    /// As a [`Tile`].
    unsafe fn run(self, of: fn(usize, usize) -> (usize, Tile<bf16>)) {
        let Self { rows, columns, left } = self;
        let mut row = 0;
        while row < rows {
            let (count, tile) = of(rows - row, columns);
            // SAFETY: the caller keeps the contract.
            unsafe { tile(&left.from(row)) };
            row += count;
        }
    }
}

/// The processor's tile registers: 0 to 3 are the sums, 4 and 5 rows of inputs, 6 and 7 weights.
///
/// Its functions leave values in the registers for each other, which the compiler is not told: it has no use for them in code
/// that is not compiled for AMX, as none here is.
struct Registers {
    has_second: bool,
}

thread_local! {
    /// [`enter`]s of this thread that wait for [`leave`].
    static ENTERED: Cell<usize> = const { Cell::new(0) };
    /// What this thread's registers are laid out for, since the first of them: rows in each row of registers.
    static LAYOUT: Cell<[usize; 2]> = const { Cell::new([0; 2]) };
}

/// Until [`leave`], nothing else uses this thread's registers, so that they are laid out anew only for other rows.
pub(super) fn enter() {
    ENTERED.set(ENTERED.get() + 1);
}

/// [`enter`]'s counterpart. The last empties the registers: threads without them are switched faster.
pub(super) fn leave() {
    ENTERED.set(ENTERED.get() - 1);
    if ENTERED.get() == 0 && LAYOUT.replace([0; 2]) != [0; 2] {
        // SAFETY: whoever laid them out had the instructions.
        unsafe { asm!("tilerelease", options(nostack, nomem, preserves_flags)) };
    }
}

/// What `ldtilecfg` reads.
#[repr(C, align(64))]
struct Layout {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    /// Bytes of a row of each register.
    bytes: [u16; 16],
    rows: [u8; 16],
}

impl Unit for Registers {
    unsafe fn new([first, second]: [usize; 2]) -> Self {
        if LAYOUT.replace([first, second]) == [first, second] {
            return Self { has_second: second > 0 };
        }
        let mut layout = Layout { palette: 1, start_row: 0, reserved: [0; 14], bytes: [0; 16], rows: [0; 16] };
        for (register, rows) in [first, first, second, second, first, second, PAIRS, PAIRS].into_iter().enumerate() {
            layout.rows[register] = rows as u8;
            layout.bytes[register] = if rows > 0 { 64 } else { 0 };
        }
        // SAFETY: the CPU has the instruction; the layout is valid.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const layout, options(nostack, readonly, preserves_flags)) };
        Self { has_second: second > 0 }
    }

    unsafe fn begin(&mut self, start: Option<Rows<*const f32>>) {
        // SAFETY: the caller's rows.
        unsafe {
            let Some(rows) = start else {
                asm!("tilezero tmm0", "tilezero tmm1", options(nostack, nomem, preserves_flags));
                if self.has_second {
                    asm!("tilezero tmm2", "tilezero tmm3", options(nostack, nomem, preserves_flags));
                }
                return;
            };
            asm!("tileloadd tmm0, [{rows} + {stride}*1]", "tileloadd tmm1, [{rows} + {stride}*1 + 64]",
                rows = in(reg) rows.first, stride = in(reg) 4 * rows.stride,
                options(nostack, readonly, preserves_flags));
            if self.has_second {
                asm!("tileloadd tmm2, [{rows} + {stride}*1]", "tileloadd tmm3, [{rows} + {stride}*1 + 64]",
                    rows = in(reg) rows.from(SIDE, 0).first, stride = in(reg) 4 * rows.stride,
                    options(nostack, readonly, preserves_flags));
            }
        }
    }

    unsafe fn add(&mut self, x: Rows<*const bf16>, strip: *const bf16, times: usize) {
        // SAFETY: the caller's rows and strip, line after line.
        unsafe {
            match self.has_second {
                true => asm!(
                    "2:",
                    "tileloadd tmm6, [{strip} + {width}*1]",
                    "tileloadd tmm4, [{one} + {stride}*1]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tileloadd tmm7, [{strip} + {width}*1 + 64]",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tileloadd tmm5, [{two} + {stride}*1]",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    "add {strip}, {line}",
                    "add {one}, 64",
                    "add {two}, 64",
                    "dec {times}",
                    "jnz 2b",
                    strip = inout(reg) strip => _, width = in(reg) 4 * SQUARE, line = const 4 * SQUARE * PAIRS,
                    one = inout(reg) x.first => _, two = inout(reg) x.from(SIDE, 0).first => _,
                    stride = in(reg) 2 * x.stride, times = inout(reg) times => _,
                    options(nostack, readonly)
                ),
                false => asm!(
                    "2:",
                    "tileloadd tmm6, [{strip} + {width}*1]",
                    "tileloadd tmm4, [{one} + {stride}*1]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tileloadd tmm7, [{strip} + {width}*1 + 64]",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "add {strip}, {line}",
                    "add {one}, 64",
                    "dec {times}",
                    "jnz 2b",
                    strip = inout(reg) strip => _, width = in(reg) 4 * SQUARE, line = const 4 * SQUARE * PAIRS,
                    one = inout(reg) x.first => _, stride = in(reg) 2 * x.stride, times = inout(reg) times => _,
                    options(nostack, readonly)
                ),
            }
        }
    }

    unsafe fn end(&mut self, out: Rows<*mut f32>) {
        // SAFETY: the caller's rows.
        unsafe {
            asm!("tilestored [{rows} + {stride}*1], tmm0", "tilestored [{rows} + {stride}*1 + 64], tmm1",
                rows = in(reg) out.first, stride = in(reg) 4 * out.stride, options(nostack, preserves_flags));
            if self.has_second {
                asm!("tilestored [{rows} + {stride}*1], tmm2", "tilestored [{rows} + {stride}*1 + 64], tmm3",
                    rows = in(reg) out.from(SIDE, 0).first, stride = in(reg) 4 * out.stride,
                    options(nostack, preserves_flags));
            }
        }
    }

    fn rest(rows: usize, columns: usize) -> (usize, Tile<bf16>) {
        avx512::largest::<bf16, SQUARE>(rows, columns)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::Element;

    /// The registers as arrays, so that how they are used is tested on any CPU.
    struct Arrays {
        rows: usize,
        sums: [[f32; SQUARE]; SQUARE],
    }

    impl Unit for Arrays {
        unsafe fn new([first, second]: [usize; 2]) -> Self {
            assert!((1..=SIDE).contains(&first) && second <= SIDE && (first == SIDE || second == 0));
            Self { rows: first + second, sums: [[f32::NAN; SQUARE]; SQUARE] }
        }

        unsafe fn begin(&mut self, start: Option<Rows<*const f32>>) {
            for (row, sums) in self.sums[..self.rows].iter_mut().enumerate() {
                // SAFETY: the caller's rows.
                *sums = start
                    .map_or([0.0; SQUARE], |start| unsafe { start.from(row, 0).first.cast::<[f32; SQUARE]>().read() });
            }
        }

        unsafe fn add(&mut self, x: Rows<*const bf16>, strip: *const bf16, times: usize) {
            for (row, sums) in self.sums[..self.rows].iter_mut().enumerate() {
                for (column, sum) in sums.iter_mut().enumerate() {
                    // SAFETY: the caller's rows and strip.
                    *sum +=
                        (0..2 * PAIRS * times).map(|input| unsafe { term(x, strip, row, column, input) }).sum::<f32>();
                }
            }
        }

        unsafe fn end(&mut self, out: Rows<*mut f32>) {
            for (row, sums) in self.sums[..self.rows].iter().enumerate() {
                // SAFETY: the caller's rows.
                unsafe { out.from(row, 0).first.cast::<[f32; SQUARE]>().write(*sums) };
            }
        }

        fn rest(_: usize, columns: usize) -> (usize, Tile<bf16>) {
            assert!(columns <= SQUARE);
            (1, row)
        }
    }

    unsafe fn term(x: Rows<*const bf16>, strip: *const bf16, row: usize, column: usize, input: usize) -> f32 {
        // SAFETY: the caller's rows and strip.
        let (value, weight) =
            unsafe { (*x.from(row, input).first, *strip.add((input / 2 * SQUARE + column) * 2 + input % 2)) };
        value.wide() * weight.wide()
    }

    /// A [`Tile`] of one row.
    unsafe fn row(of: &Operands<bf16>) {
        let Operands { x, strip, groups, start, end, .. } = *of;
        // SAFETY: the caller's rows.
        let sum = |column: usize| unsafe {
            let start = start.map_or(0.0, |rows| *rows.first.add(column));
            start + (0..2 * groups).map(|input| term(x, strip, 0, column, input)).sum::<f32>()
        };
        match end {
            // SAFETY: as above.
            End::Kept(rows) => (0..SQUARE).for_each(|column| unsafe { *rows.first.add(column) = sum(column) }),
            End::Rounded { out, columns, bias, plus } => {
                for column in 0..columns {
                    let added = [bias, plus].into_iter().flatten();
                    // SAFETY: as above.
                    let added: f32 = added.map(|added| unsafe { (*added.add(column)).wide() }).sum();
                    // SAFETY: as above.
                    unsafe { *out.first.add(column) = bf16::narrow(sum(column) + added) };
                }
            }
        }
    }

    /// Small whole numbers, whose sums are exact.
    fn numbers(seed: usize, count: usize) -> Vec<f32> {
        (0..count).map(|at| ((at * 7 + seed) * 13 % 9) as f32 - 4.0).collect()
    }

    #[test]
    fn all_rows_and_inputs_are_multiplied() {
        for rows in [1, 16, 17, 32, 33, 50, 64, 96] {
            for (columns, groups, begins) in [(32, 41, true), (21, 32, false), (32, 16, true), (7, 31, false)] {
                let (width, stride) = (2 * groups + 6, 40);
                let narrow = |values: Vec<f32>| values.into_iter().map(bf16::narrow).collect::<Vec<_>>();
                let (x, strip) = (narrow(numbers(1, rows * width)), narrow(numbers(2, 2 * groups * SQUARE)));
                let start = numbers(3, rows * SQUARE);
                let (bias, plus) = (narrow(numbers(4, SQUARE)), narrow(numbers(5, rows * stride)));
                let (mut kept, mut rounded) = (vec![f32::NAN; rows * SQUARE], vec![bf16::NAN; rows * stride]);
                let into_kept = End::Kept(Rows { first: kept.as_mut_ptr(), stride: SQUARE });
                let into_rounded = End::Rounded {
                    out: Rows { first: rounded.as_mut_ptr(), stride },
                    columns,
                    bias: Some(bias.as_ptr()),
                    plus: Some(plus.as_ptr()),
                };
                let of = Operands {
                    x: Rows { first: x.as_ptr(), stride: width },
                    strip: strip.as_ptr(),
                    groups,
                    start: begins.then_some(Rows { first: start.as_ptr(), stride: SQUARE }),
                    end: into_kept,
                    next: Rows { first: std::ptr::null(), stride: 0 },
                };
                for end in [into_kept, into_rounded] {
                    // SAFETY: arrays need no instructions; rows, strip and room are there.
                    let done = unsafe { all::<Arrays>(rows, columns, &Operands { end, ..of }) };
                    assert_eq!(done, rows);
                }
                for row in 0..rows {
                    for column in 0..columns {
                        let begun = if begins { start[row * SQUARE + column] } else { 0.0 };
                        let place = |input: usize| (input / 2 * SQUARE + column) * 2 + input % 2;
                        let product = |input: usize| x[row * width + input].wide() * strip[place(input)].wide();
                        let sum = begun + (0..2 * groups).map(product).sum::<f32>();
                        assert_eq!(kept[row * SQUARE + column], sum, "{rows} × {groups} × {columns}: {row}, {column}");
                        let added = bias[column].wide() + plus[row * stride + column].wide();
                        assert_eq!(rounded[row * stride + column], bf16::narrow(sum + added));
                    }
                    let beyond = &rounded[row * stride + columns..(row + 1) * stride];
                    assert!(beyond.iter().all(|value| value.is_nan()), "beyond what was wanted");
                }
            }
        }
    }
}
