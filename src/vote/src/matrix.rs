//! Rows of 32-bit floats, and the two products that everything else is made of.
//!
//! Work is cut into blocks of rows of a fixed size, and each block is computed by one thread, so results do not depend
//! on the number of threads.

use faer::{Accum, MatMut, MatRef, Par};
use pulp::Arch;

/// A dense matrix, row after row.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Matrix {
    columns: usize,
    values: Vec<f32>,
}

impl Matrix {
    /// An empty matrix to push rows to.
    pub fn new(columns: usize) -> Self {
        Self { columns, values: Vec::new() }
    }

    /// Takes `values`, row after row; `None` unless they fill whole rows.
    pub fn from_values(columns: usize, values: Vec<f32>) -> Option<Self> {
        (columns > 0 && values.len().is_multiple_of(columns)).then_some(Self { columns, values })
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.values.len().checked_div(self.columns).unwrap_or(0)
    }

    /// Number of columns.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// All values, row after row.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// All values, to change.
    pub fn values_mut(&mut self) -> &mut [f32] {
        &mut self.values
    }

    /// One row.
    pub fn row(&self, row: usize) -> &[f32] {
        &self.values[row * self.columns..(row + 1) * self.columns]
    }

    /// One row, to change.
    pub fn row_mut(&mut self, row: usize) -> &mut [f32] {
        &mut self.values[row * self.columns..(row + 1) * self.columns]
    }

    /// Appends rows.
    pub fn extend(&mut self, values: &[f32]) {
        debug_assert!(values.len().is_multiple_of(self.columns.max(1)));
        self.values.extend_from_slice(values);
    }

    /// The rows that `rows` names, in that order.
    pub fn gather(&self, rows: &[usize]) -> Self {
        let mut gathered = Self { columns: self.columns, values: Vec::with_capacity(rows.len() * self.columns) };
        rows.iter().for_each(|&row| gathered.extend(self.row(row)));
        gathered
    }

    /// The whole as faer sees it.
    pub fn view(&self) -> MatRef<'_, f32> {
        view(&self.values, self.columns)
    }
}

/// Rows of `columns` values as faer sees them.
pub fn view(values: &[f32], columns: usize) -> MatRef<'_, f32> {
    MatRef::from_row_major_slice(values, values.len() / columns.max(1), columns)
}

/// `out[i][j] = left[i] · right[j]`, on this thread.
pub fn dot_products(left: MatRef<'_, f32>, right: MatRef<'_, f32>, out: &mut [f32]) {
    let out = MatMut::from_row_major_slice_mut(out, left.nrows(), right.nrows());
    faer::linalg::matmul::matmul(out, Accum::Replace, left, right.transpose(), 1.0, Par::Seq);
}

/// Squared Euclidean distance.
pub fn squared_distance(arch: Arch, left: &[f32], right: &[f32]) -> f32 {
    // Without the attribute the closure is a function of its own, compiled for the oldest processor.
    arch.dispatch(
        #[inline(always)]
        || sum_of(left, right, |a, b| (a - b) * (a - b)),
    )
}

/// Squared Euclidean length.
pub fn squared_norm(values: &[f32]) -> f32 {
    sum_of(values, values, |a, b| a * b)
}

/// Sums side by side: four vector registers, so that additions need not wait for each other, and smaller rounding errors
/// than one long sum.
#[inline(always)]
fn sum_of(left: &[f32], right: &[f32], term: impl Fn(f32, f32) -> f32) -> f32 {
    const LANES: usize = 64;
    let (left_chunks, left_rest) = left.as_chunks::<LANES>();
    let (right_chunks, right_rest) = right.as_chunks::<LANES>();
    let mut sums = [0.0_f32; LANES];
    for (a, b) in left_chunks.iter().zip(right_chunks) {
        sums.iter_mut().zip(a.iter().zip(b)).for_each(|(sum, (&a, &b))| *sum += term(a, b));
    }
    let rest: f32 = left_rest.iter().zip(right_rest).map(|(&a, &b)| term(a, b)).sum();
    let mut width = LANES;
    while width > 1 {
        width /= 2;
        let (low, high) = sums.split_at_mut(width);
        low.iter_mut().zip(&*high).for_each(|(low, &high)| *low += high);
    }
    sums[0] + rest
}
