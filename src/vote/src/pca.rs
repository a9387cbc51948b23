//! Principal components of the synthetic embeddings: the space in which they are clustered.
//!
//! Rows arrive in chunks, so the embeddings themselves need not be in memory: what is kept is their covariance.

use faer::linalg::matmul::triangular::{self, BlockStructure};
use faer::{Accum, Mat, MatRef, Par, Side};
use rayon::prelude::*;

use crate::matrix::{self, BlockProducts, Matrix, view};

/// Why there are no principal components.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PcaError {
    /// Fewer than two rows, or all the same.
    #[error("the embeddings do not vary")]
    NoVariance,
    /// The eigenvalue decomposition did not converge.
    #[error("the eigenvalue decomposition of the covariance failed")]
    Decomposition,
}

/// Mean and covariance of rows that come in chunks.
///
/// Products are summed relative to the first row in f64, chunk by chunk, so that a mean far from zero, as embeddings
/// have, does not cancel out the variance.
#[derive(Clone, Debug)]
pub struct Covariance {
    rows: usize,
    origin: Vec<f32>,
    sum: Vec<f64>,
    products: Mat<f64>,
}

/// Rows that are multiplied at once.
const BLOCK: usize = 2048;

impl Covariance {
    /// Of rows of `columns` values.
    pub fn new(columns: usize) -> Self {
        Self { rows: 0, origin: Vec::new(), sum: vec![0.0; columns], products: Mat::zeros(columns, columns) }
    }

    /// Adds rows.
    pub fn add(&mut self, chunk: &Matrix) {
        let columns = self.sum.len();
        if self.origin.is_empty() && chunk.rows() > 0 {
            self.origin = chunk.row(0).to_vec();
        }
        for block in chunk.values().chunks(BLOCK * columns.max(1)) {
            let mut shifted = block.to_vec();
            for row in shifted.chunks_exact_mut(columns) {
                row.iter_mut().zip(&self.origin).for_each(|(value, origin)| *value -= origin);
                self.sum.iter_mut().zip(&*row).for_each(|(sum, &value)| *sum += f64::from(value));
            }
            let shifted = view(&shifted, columns);
            let mut products = Mat::<f32>::zeros(columns, columns);
            // The rest is symmetric, and the decomposition does not look at it.
            triangular::matmul(
                &mut products,
                BlockStructure::TriangularLower,
                Accum::Replace,
                shifted.transpose(),
                BlockStructure::Rectangular,
                shifted,
                BlockStructure::Rectangular,
                1.0,
                Par::rayon(0),
            );
            for column in 0..columns {
                for row in column..columns {
                    self.products[(row, column)] += f64::from(products[(row, column)]);
                }
            }
            self.rows += shifted.nrows();
        }
    }

    /// The fewest components that carry `variance` of the whole, between 0 and 1.
    pub fn components(&self, variance: f64) -> Result<Pca, PcaError> {
        if self.rows < 2 {
            return Err(PcaError::NoVariance);
        }
        let columns = self.sum.len();
        let rows = self.rows as f64;
        let covariance = Mat::from_fn(columns, columns, |i, j| {
            (self.products[(i, j)] - self.sum[i] * self.sum[j] / rows) / (rows - 1.0)
        });
        let eigen = covariance.self_adjoint_eigen(Side::Lower).map_err(|_| PcaError::Decomposition)?;
        // Largest first; rounding may leave small negative ones.
        let values: Vec<f64> = (0..columns).rev().map(|i| eigen.S()[i].max(0.0)).collect();
        let total: f64 = values.iter().sum();
        if total <= f64::EPSILON {
            return Err(PcaError::NoVariance);
        }
        let kept = count_for(&values, total, variance);
        let vectors = eigen.U();
        let mut components = Matrix::new(columns);
        for index in 0..kept {
            components.extend(&oriented(vectors, columns - 1 - index));
        }
        let mean =
            self.origin.iter().zip(&self.sum).map(|(&origin, sum)| (f64::from(origin) + sum / rows) as f32).collect();
        let explained = values[..kept].iter().sum::<f64>() / total;
        Ok(Pca { mean, components, explained })
    }
}

fn count_for(values: &[f64], total: f64, variance: f64) -> usize {
    let mut sum = 0.0;
    let enough = values.iter().position(|value| {
        sum += value;
        sum / total >= variance
    });
    enough.map_or(values.len(), |last| last + 1)
}

/// An eigenvector, its sign chosen so that its largest entry is positive: the same on every machine.
fn oriented(vectors: MatRef<'_, f64>, column: usize) -> Vec<f32> {
    let vector: Vec<f64> = (0..vectors.nrows()).map(|row| vectors[(row, column)]).collect();
    let largest =
        vector.iter().copied().fold(0.0_f64, |best, value| if value.abs() > best.abs() { value } else { best });
    let sign = if largest < 0.0 { -1.0 } else { 1.0 };
    vector.into_iter().map(|value| (sign * value) as f32).collect()
}

/// A projection to principal components.
#[derive(Clone, Debug, PartialEq)]
pub struct Pca {
    /// Mean that is taken off first.
    pub mean: Vec<f32>,
    /// Components as rows, the most important first.
    pub components: Matrix,
    /// Share of the variance that they carry.
    pub explained: f64,
}

impl Pca {
    /// Dimension of what is projected.
    pub fn input_columns(&self) -> usize {
        self.mean.len()
    }

    /// Dimension of the projection.
    pub fn output_columns(&self) -> usize {
        self.components.rows()
    }

    /// Projects rows.
    pub fn project(&self, rows: &Matrix) -> Matrix {
        let (input, output) = (self.input_columns(), self.output_columns());
        let mut projected = vec![0.0; rows.rows() * output];
        let blocks = rows.values().par_chunks(matrix::BLOCK * input);
        projected.par_chunks_mut(matrix::BLOCK * output).zip(blocks).for_each_init(
            || BlockProducts::new(input, output),
            |products, (projected, rows)| {
                let mut centred = rows.to_vec();
                for row in centred.chunks_exact_mut(input) {
                    row.iter_mut().zip(&self.mean).for_each(|(value, mean)| *value -= mean);
                }
                projected.copy_from_slice(products.of(&centred, &self.components));
            },
        );
        Matrix::from_values(output, projected).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows on a line through a far point, with a little of a second direction.
    fn line() -> Matrix {
        let mut rows = Matrix::new(3);
        for step in 0..1000 {
            let t = (step as f32 - 499.5) / 500.0;
            let s = if step % 2 == 0 { 0.01 } else { -0.01 };
            rows.extend(&[100.0 + 0.6 * t, 100.0 + 0.8 * t, 100.0 + s]);
        }
        rows
    }

    fn fit(rows: &Matrix, chunk: usize, variance: f64) -> Pca {
        let mut covariance = Covariance::new(rows.columns());
        for values in rows.values().chunks(chunk * rows.columns()) {
            covariance.add(&Matrix::from_values(rows.columns(), values.to_vec()).expect("whole rows"));
        }
        covariance.components(variance).expect("rows vary")
    }

    #[test]
    fn the_first_component_is_the_direction_of_the_line() {
        let pca = fit(&line(), 100, 0.9);
        assert_eq!(pca.output_columns(), 1);
        for (value, expected) in pca.components.row(0).iter().zip([0.6, 0.8, 0.0]) {
            assert!((value - expected).abs() < 1e-3, "{:?}", pca.components.row(0));
        }
        assert!(pca.explained > 0.999);
        assert_eq!(fit(&line(), 100, 1.0).output_columns(), 2, "the rows lie in a plane");
    }

    #[test]
    fn chunks_do_not_matter() {
        let (one, many) = (fit(&line(), 1000, 0.9), fit(&line(), 7, 0.9));
        for (a, b) in one.components.values().iter().zip(many.components.values()) {
            assert!((a - b).abs() < 1e-5);
        }
    }

    #[test]
    fn projecting_keeps_distances_when_all_variance_is_kept() {
        let rows = line();
        let projected = fit(&rows, 1000, 1.0).project(&rows);
        let distance = |m: &Matrix| crate::matrix::squared_distance(pulp::Arch::new(), m.row(0), m.row(999));
        assert!((distance(&rows) - distance(&projected)).abs() < 1e-3);
        let mean: f32 = (0..1000).map(|row| projected.row(row)[0]).sum::<f32>() / 1000.0;
        assert!(mean.abs() < 1e-4, "{mean}");
    }

    #[test]
    fn rows_that_do_not_vary_have_no_components() {
        let mut covariance = Covariance::new(2);
        covariance.add(&Matrix::from_values(2, vec![1.0, 2.0, 1.0, 2.0]).expect("whole rows"));
        assert_eq!(covariance.components(0.9), Err(PcaError::NoVariance));
    }
}
