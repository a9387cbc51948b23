//! The space in which bins lie: principal components and centroids, a function of public embeddings and a public seed.
//!
//! Stored as `centroids.safetensors` before the first vote. An attempt that goes on after a crash, perhaps on another
//! machine with other rounding, takes what is stored: so there is one set of bins for each run.

use std::collections::HashMap;

use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};

use crate::error::VoteError;
use crate::kmeans::{Assignment, Clustering, assign};
use crate::matrix::Matrix;
use crate::pca::Pca;

/// A projection and the centroids in its image.
#[derive(Clone, Debug, PartialEq)]
pub struct Space {
    /// Projection to principal components.
    pub pca: Pca,
    /// One centroid for each bin.
    pub centroids: Matrix,
    /// Sum of squared distances of the clustered rows to their centroids.
    pub inertia: f64,
    /// Iterations of k-means.
    pub iterations: u64,
}

/// What the file says about itself; in one entry, since the order of several would differ from write to write.
#[derive(Serialize, Deserialize)]
struct Notes {
    explained_variance: f64,
    inertia: f64,
    iterations: u64,
}

const NOTES: &str = "doppel";

impl Space {
    /// Joins both.
    pub fn new(pca: Pca, clustering: Clustering) -> Self {
        let Clustering { centroids, inertia, iterations } = clustering;
        Self { pca, centroids, inertia, iterations: iterations as u64 }
    }

    /// Number of bins.
    pub fn bins(&self) -> usize {
        self.centroids.rows()
    }

    /// The bin of each row of embeddings.
    pub fn assign(&self, embeddings: &Matrix) -> Assignment {
        assign(&self.pca.project(embeddings), &self.centroids)
    }

    /// As a safetensors file: `mean` [d], `components` [p, d], `centroids` [K, p].
    pub fn to_bytes(&self) -> Result<Vec<u8>, VoteError> {
        let bug = |_| VoteError::Bug("centroids do not fit a safetensors file");
        let bytes = |values: &[f32]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>();
        let (mean, components) = (bytes(&self.pca.mean), bytes(self.pca.components.values()));
        let centroids = bytes(self.centroids.values());
        let shape = |matrix: &Matrix| vec![matrix.rows(), matrix.columns()];
        let tensors = [
            ("mean", TensorView::new(Dtype::F32, vec![self.pca.mean.len()], &mean).map_err(bug)?),
            ("components", TensorView::new(Dtype::F32, shape(&self.pca.components), &components).map_err(bug)?),
            ("centroids", TensorView::new(Dtype::F32, shape(&self.centroids), &centroids).map_err(bug)?),
        ];
        let notes =
            Notes { explained_variance: self.pca.explained, inertia: self.inertia, iterations: self.iterations };
        let notes = serde_json::to_string(&notes).map_err(|_| VoteError::Bug("notes that are not JSON"))?;
        let notes = Some(HashMap::from([(NOTES.to_owned(), notes)]));
        safetensors::serialize(tensors, notes).map_err(bug)
    }

    /// Reads what [`Space::to_bytes`] wrote; `None` for anything else.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (_, header) = SafeTensors::read_metadata(bytes).ok()?;
        let notes: Notes = serde_json::from_str(header.metadata().as_ref()?.get(NOTES)?).ok()?;
        let file = SafeTensors::deserialize(bytes).ok()?;
        let mean = floats(&file, "mean")?;
        let components = matrix(&file, "components").filter(|matrix| matrix.columns() == mean.len())?;
        let centroids = matrix(&file, "centroids").filter(|matrix| matrix.columns() == components.rows())?;
        let pca = Pca { mean, components, explained: notes.explained_variance };
        Some(Self { pca, centroids, inertia: notes.inertia, iterations: notes.iterations })
    }
}

fn matrix(file: &SafeTensors<'_>, name: &str) -> Option<Matrix> {
    let columns = *file.tensor(name).ok()?.shape().get(1)?;
    Matrix::from_values(columns, floats(file, name)?)
}

fn floats(file: &SafeTensors<'_>, name: &str) -> Option<Vec<f32>> {
    let tensor = file.tensor(name).ok().filter(|tensor| tensor.dtype() == Dtype::F32)?;
    let (chunks, _) = tensor.data().as_chunks::<4>();
    Some(chunks.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space() -> Space {
        let components = Matrix::from_values(3, vec![1.0, 0.0, 0.0, 0.0, 1.0, 0.0]).expect("whole rows");
        let centroids = Matrix::from_values(2, vec![0.0, 0.0, 5.0, 5.0, -5.0, 5.0]).expect("whole rows");
        let pca = Pca { mean: vec![1.0, 1.0, 1.0], components, explained: 0.93 };
        Space { pca, centroids, inertia: 12.5, iterations: 7 }
    }

    #[test]
    fn a_space_survives_its_file_and_writes_the_same_bytes() {
        let bytes = space().to_bytes().expect("a file");
        assert_eq!(Space::from_bytes(&bytes), Some(space()));
        assert_eq!(bytes, space().to_bytes().expect("a file"));
    }

    #[test]
    fn other_files_are_not_taken() {
        let bytes = space().to_bytes().expect("a file");
        assert_eq!(Space::from_bytes(&bytes[..bytes.len() - 4]), None);
        assert_eq!(Space::from_bytes(b"{}"), None);
    }

    #[test]
    fn rows_fall_into_the_bin_of_the_nearest_centroid() {
        let rows = Matrix::from_values(3, vec![1.0, 1.0, 9.0, 6.5, 6.0, -4.0, -3.0, 6.0, 0.0]).expect("whole rows");
        assert_eq!(space().assign(&rows).bins, [0, 1, 2]);
    }
}
