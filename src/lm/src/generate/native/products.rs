//! Matrix products with weights packed as the instructions want them.
//!
//! A tile is six rows by 64 outputs, kept in registers while the inputs pass by. Every row of a tile is summed alone and in
//! order of the inputs, so that it does not matter how rows are dealt into tiles.

use tch::{Device, Tensor};

use crate::LmError;
use crate::kernels::Element;

/// Outputs that one tile computes: four vectors of sixteen.
const COLUMNS: usize = 64;
/// Rows that one tile computes: with its columns, 24 of the 32 vector registers.
const ROWS: usize = 6;
/// An element that products can be computed in.
pub(crate) trait Factor: Element {
    /// Neighbouring inputs that one instruction multiplies and adds.
    const GROUP: usize;
    /// Whether this CPU has the instructions.
    fn is_supported() -> bool;
    /// `out[row][column] = Σ x[row][i] · panel[i][column]` for `R` rows.
    ///
    /// # Safety
    /// [`Self::is_supported`]; `x` has `R` rows of `groups · GROUP` elements, `panel` holds `groups · GROUP · COLUMNS`, and
    /// `out` has `R` rows of `COLUMNS`, each `stride` apart.
    unsafe fn tile<const R: usize>(x: *const Self, panel: *const Self, groups: usize, out: *mut f32, stride: usize);
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use half::bf16;

    use super::{COLUMNS, Factor};

    impl Factor for bf16 {
        const GROUP: usize = 2;

        fn is_supported() -> bool {
            std::is_x86_feature_detected!("avx512bf16") && f32::is_supported()
        }

        unsafe fn tile<const R: usize>(
            x: *const Self,
            panel: *const Self,
            groups: usize,
            out: *mut f32,
            stride: usize,
        ) {
            #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
            unsafe fn tile<const R: usize>(
                x: *const bf16,
                panel: *const bf16,
                groups: usize,
                out: *mut f32,
                stride: usize,
            ) {
                // SAFETY: the pointers are good for these offsets by the contract of `Factor::tile`; a vector of 32 bf16
                // and one of 16 words are the same bits.
                unsafe {
                    let mut sums = [[_mm512_setzero_ps(); 4]; R];
                    for group in 0..groups {
                        let weights = panel.add(group * 2 * COLUMNS).cast::<i32>();
                        let weights: [__m512bh; 4] = std::array::from_fn(|part| {
                            std::mem::transmute(_mm512_loadu_si512(weights.add(16 * part).cast()))
                        });
                        for (row, sums) in sums.iter_mut().enumerate() {
                            let pair = x.add((row * groups + group) * 2).cast::<i32>().read_unaligned();
                            let pair: __m512bh = std::mem::transmute(_mm512_set1_epi32(pair));
                            for (sum, weights) in sums.iter_mut().zip(weights) {
                                *sum = _mm512_dpbf16_ps(*sum, pair, weights);
                            }
                        }
                    }
                    for (row, sums) in sums.iter().enumerate() {
                        for (part, sum) in sums.iter().enumerate() {
                            _mm512_storeu_ps(out.add(row * stride + 16 * part), *sum);
                        }
                    }
                }
            }
            // SAFETY: the caller keeps the contract, of which the CPU's instructions are part.
            unsafe { tile::<R>(x, panel, groups, out, stride) }
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

        unsafe fn tile<const R: usize>(
            x: *const Self,
            panel: *const Self,
            groups: usize,
            out: *mut f32,
            stride: usize,
        ) {
            #[target_feature(enable = "avx512f")]
            unsafe fn tile<const R: usize>(
                x: *const f32,
                panel: *const f32,
                groups: usize,
                out: *mut f32,
                stride: usize,
            ) {
                // SAFETY: the pointers are good for these offsets by the contract of `Factor::tile`.
                unsafe {
                    let mut sums = [[_mm512_setzero_ps(); 4]; R];
                    for group in 0..groups {
                        let weights = panel.add(group * COLUMNS);
                        let weights: [__m512; 4] = std::array::from_fn(|part| _mm512_loadu_ps(weights.add(16 * part)));
                        for (row, sums) in sums.iter_mut().enumerate() {
                            let value = _mm512_set1_ps(*x.add(row * groups + group));
                            for (sum, weights) in sums.iter_mut().zip(weights) {
                                *sum = _mm512_fmadd_ps(value, weights, *sum);
                            }
                        }
                    }
                    for (row, sums) in sums.iter().enumerate() {
                        for (part, sum) in sums.iter().enumerate() {
                            _mm512_storeu_ps(out.add(row * stride + 16 * part), *sum);
                        }
                    }
                }
            }
            // SAFETY: the caller keeps the contract, of which the CPU's instructions are part.
            unsafe { tile::<R>(x, panel, groups, out, stride) }
        }
    }
}

#[cfg(not(target_arch = "x86_64"))]
mod other {
    use half::bf16;

    use super::*;

    macro_rules! plain {
        ($element:ty) => {
            impl Factor for $element {
                const GROUP: usize = 1;

                fn is_supported() -> bool {
                    false
                }

                unsafe fn tile<const R: usize>(_: *const Self, _: *const Self, _: usize, _: *mut f32, _: usize) {}
            }
        };
    }

    plain!(bf16);
    plain!(f32);
}

/// A weight in panels of [`COLUMNS`] outputs: panel, group of inputs, output, input within the group.
pub(super) struct Matrix<E> {
    panels: Vec<E>,
    /// Inputs, rounded up to whole groups; the rest must be zero in `x` too.
    pub(super) inputs: usize,
    /// Outputs, rounded up to whole panels; the rest are zero.
    pub(super) outputs: usize,
}

impl<E: Factor> Matrix<E> {
    /// Packs `[outputs, inputs]`.
    pub(super) fn pack(weight: &Tensor) -> Result<Self, LmError> {
        let (rows, inputs) = weight.size2()?;
        let (rows, inputs) = (rows as usize, inputs as usize);
        let mut values = vec![E::narrow(0.0); rows * inputs];
        copy(weight, &mut values)?;
        let groups = inputs.div_ceil(E::GROUP);
        let count = rows.div_ceil(COLUMNS);
        let mut panels = vec![E::narrow(0.0); count * groups * E::GROUP * COLUMNS];
        for (panel, target) in panels.chunks_exact_mut(groups * E::GROUP * COLUMNS).enumerate() {
            for (column, row) in (panel * COLUMNS..rows.min((panel + 1) * COLUMNS)).enumerate() {
                for (input, value) in values[row * inputs..(row + 1) * inputs].iter().enumerate() {
                    target[(input / E::GROUP * COLUMNS + column) * E::GROUP + input % E::GROUP] = *value;
                }
            }
        }
        Ok(Self { panels, inputs: groups * E::GROUP, outputs: count * COLUMNS })
    }

    /// `out[row] = weight · x[row]`; rows of `x` are `inputs` wide, those of `out` `outputs`.
    pub(super) fn multiply(&self, x: &[E], rows: usize, out: &mut [f32]) {
        let groups = self.inputs / E::GROUP;
        assert!(E::is_supported() && x.len() >= rows * self.inputs && out.len() >= rows * self.outputs);
        for (panel, weights) in self.panels.chunks_exact(self.inputs * COLUMNS).enumerate() {
            let mut row = 0;
            while row < rows {
                let x = x[row * self.inputs..].as_ptr();
                let target = out[row * self.outputs + panel * COLUMNS..].as_mut_ptr();
                // SAFETY: lengths and instructions were checked above; a tile's rows end before `rows`.
                unsafe {
                    let tile = match rows - row {
                        1 => E::tile::<1>,
                        2 => E::tile::<2>,
                        3 => E::tile::<3>,
                        4 => E::tile::<4>,
                        5 => E::tile::<5>,
                        _ => E::tile::<ROWS>,
                    };
                    tile(x, weights.as_ptr(), groups, target, self.outputs);
                }
                row += ROWS;
            }
        }
    }
}

/// Copies a tensor's values as they are.
pub(super) fn copy<E: Element>(tensor: &Tensor, values: &mut [E]) -> Result<(), LmError> {
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
        for (inputs, outputs) in [(7, 5), (64, 64), (33, 130)] {
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
