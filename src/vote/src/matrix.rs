//! Rows of 32-bit floats, and the two products that everything else is made of.
//!
//! Work is cut into blocks of rows of a fixed size, and each block is computed by one thread, so results do not depend
//! on the number of threads; nor does a row's result depend on where it stands and on how many others there are.

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
        assert!(values.len().is_multiple_of(self.columns.max(1)));
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

/// Rows that one thread multiplies at a time: their products with 1,000 others fill half of a second-level cache.
pub const BLOCK: usize = 256;

/// Dot products of up to [`BLOCK`] rows with the rows of another matrix, always computed for a whole block.
///
/// PRIVACY: a product of fewer rows may add up in another order, and how many rows there are is a matter of what other units
/// have: one more would change the last bits of others' products, and so perhaps their votes.
pub struct BlockProducts {
    rows: Vec<f32>,
    products: Vec<f32>,
}

impl BlockProducts {
    /// Room for products of `columns` values with `others` rows.
    pub fn new(columns: usize, others: usize) -> Self {
        Self { rows: vec![0.0; BLOCK * columns], products: vec![0.0; BLOCK * others] }
    }

    /// `[i][j] = rows[i] · right[j]`, on this thread.
    pub fn of(&mut self, rows: &[f32], right: &Matrix) -> &mut [f32] {
        let (columns, others) = (right.columns(), right.rows());
        let count = rows.len() / columns.max(1);
        let block = if count == BLOCK { rows } else { filled(&mut self.rows, rows) };
        let out = MatMut::from_row_major_slice_mut(&mut self.products, BLOCK, others);
        let (left, right) = (view(block, columns), right.view());
        faer::linalg::matmul::matmul(out, Accum::Replace, left, right.transpose(), 1.0, Par::Seq);
        &mut self.products[..count * others]
    }
}

/// A block that begins with `rows` and goes on with zeros.
fn filled<'a>(block: &'a mut [f32], rows: &[f32]) -> &'a [f32] {
    let (given, missing) = block.split_at_mut(rows.len());
    given.copy_from_slice(rows);
    missing.fill(0.0);
    block
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_of_a_row_do_not_depend_on_its_company() {
        for (columns, others) in [(384, 100), (61, 1000), (7, 3)] {
            let value = |index: usize| ((index * 7919 + index * index % 613) % 1000) as f32 / 500.0 - 0.9987;
            let rows: Vec<f32> = (0..BLOCK * columns).map(value).collect();
            let right: Vec<f32> = (0..others * columns).map(|index| value(index + 17)).collect();
            let right = Matrix::from_values(columns, right).expect("whole rows");
            let mut products = BlockProducts::new(columns, others);
            let mut bits =
                |rows: &[f32]| -> Vec<u32> { products.of(rows, &right).iter().map(|x| x.to_bits()).collect() };
            let together = bits(&rows);
            for (from, to) in [(1, BLOCK), (0, 1), (5, 6), (3, 20), (BLOCK - 1, BLOCK)] {
                let some = bits(&rows[from * columns..to * columns]);
                assert!(some == together[from * others..to * others], "{columns} × {others}: {from}..{to}");
            }
        }
    }
}
