//! Embedding tables, read in chunks; rows are scaled to unit length, as the paper does before it clusters.

use arrow::array::{AsArray, RecordBatch, StringArray};
use arrow::datatypes::Float32Type;
use futures::StreamExt;
use lake::Table;

use crate::error::VoteError;
use crate::matrix::{Matrix, squared_norm};

/// Whose vectors are read, and so what happens to one that is not finite or has another dimension.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whose {
    /// Public ones: it is refused, by its row. The first row decides the dimension where it is `None`.
    Public(Option<usize>),
    /// Private ones, of this dimension: it is void. PRIVACY: to refuse it would tell something about one unit.
    Private(usize),
}

/// One chunk of a table: its vectors, and the string columns that were asked for, in that order.
pub struct Chunk {
    /// Rows of unit length; a void one is zero.
    pub vectors: Matrix,
    /// Which rows are void; none of public ones.
    pub void: Vec<bool>,
    /// The columns of strings.
    pub columns: Vec<StringArray>,
}

/// Reads `table` at `version` chunk by chunk and hands each to `visit`.
pub async fn for_each_chunk(
    table: &Table,
    version: i64,
    strings: &[&str],
    mut whose: Whose,
    mut visit: impl FnMut(Chunk) -> Result<(), VoteError>,
) -> Result<(), VoteError> {
    let names: Vec<&str> = strings.iter().copied().chain(["embedding"]).collect();
    let mut batches = table.scan(version, &names).await?;
    let mut row = 0;
    while let Some(batch) = batches.next().await {
        let batch = batch?;
        if batch.num_rows() == 0 {
            continue;
        }
        let (vectors, void) = vectors(table, &batch, row, whose)?;
        if whose == Whose::Public(None) {
            whose = Whose::Public(Some(vectors.columns()));
        }
        row += batch.num_rows();
        let columns = (0..strings.len()).map(|column| texts(&batch, column)).collect::<Result<_, _>>()?;
        visit(Chunk { vectors, void, columns })?;
    }
    Ok(())
}

fn texts(batch: &RecordBatch, column: usize) -> Result<StringArray, VoteError> {
    let array = batch.column(column).as_string_opt::<i32>();
    array.cloned().ok_or(VoteError::Bug("a scan gave another type than the lake promises"))
}

/// The vectors of a batch whose rows are numbered from `first`, and which of them are void.
fn vectors(table: &Table, batch: &RecordBatch, first: usize, whose: Whose) -> Result<(Matrix, Vec<bool>), VoteError> {
    let wrong = || VoteError::Bug("a scan gave another type than the lake promises");
    let lists = batch.column(batch.num_columns() - 1).as_list_opt::<i32>().ok_or_else(wrong)?;
    let values = lists.values().as_primitive_opt::<Float32Type>().ok_or_else(wrong)?.values();
    let offsets = lists.value_offsets();
    let dimension = match whose {
        Whose::Public(None) => (offsets[1] - offsets[0]) as usize,
        Whose::Public(Some(dimension)) | Whose::Private(dimension) => dimension,
    };
    let refused = |row: usize, problem: String| {
        let help = "embed both sides with the same encoder, under a run of their own";
        VoteError::input(table.url(), format!("row {}: column `embedding`: {problem}", first + row), help)
    };
    if dimension == 0 {
        return Err(refused(0, "an empty vector".into()));
    }
    let mut matrix = Matrix::from_values(dimension, vec![0.0; batch.num_rows() * dimension]).ok_or_else(wrong)?;
    let mut void = vec![false; batch.num_rows()];
    for (row, bounds) in offsets.windows(2).enumerate() {
        let vector = &values[bounds[0] as usize..bounds[1] as usize];
        match (problem(vector, dimension), whose) {
            (None, _) => {
                matrix.row_mut(row).copy_from_slice(vector);
                normalise(matrix.row_mut(row));
            }
            (Some(_), Whose::Private(_)) => void[row] = true,
            (Some(problem), Whose::Public(_)) => return Err(refused(row, problem)),
        }
    }
    Ok((matrix, void))
}

/// What is wrong with a vector.
fn problem(vector: &[f32], dimension: usize) -> Option<String> {
    if vector.len() != dimension {
        return Some(format!("found dimension {}, expected {dimension}", vector.len()));
    }
    let finite = vector.iter().all(|value| value.is_finite());
    (!finite).then(|| "found a number that is not finite".into())
}

/// Scales to unit length; a zero vector stays.
fn normalise(vector: &mut [f32]) {
    let norm = squared_norm(vector).sqrt();
    if norm > 0.0 && norm.is_finite() {
        vector.iter_mut().for_each(|value| *value /= norm);
    }
}
