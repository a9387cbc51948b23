//! Embedding tables, read in chunks; rows are scaled to unit length, as the paper does before it clusters.

use arrow::array::{AsArray, RecordBatch};
use arrow::datatypes::Float32Type;
use futures::StreamExt;
use lake::Table;

use crate::error::VoteError;
use crate::matrix::{Matrix, squared_norm};

/// One chunk of a table: its vectors, and the string columns that were asked for, in that order.
pub struct Chunk {
    /// Rows of unit length.
    pub vectors: Matrix,
    /// One vector of strings for each column.
    pub columns: Vec<Vec<String>>,
}

/// Reads `table` at `version` chunk by chunk and hands each to `visit`. `dimension` is what vectors must have; the
/// first row decides where it is `None`.
///
/// PRIVACY: errors name the row and the dimension, which the encoder decides, and no value.
pub async fn for_each_chunk(
    table: &Table,
    version: i64,
    strings: &[&str],
    mut dimension: Option<usize>,
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
        let vectors = vectors(table, &batch, row, dimension)?;
        dimension = Some(vectors.columns());
        row += batch.num_rows();
        let columns = (0..strings.len()).map(|column| texts(&batch, column)).collect::<Result<_, _>>()?;
        visit(Chunk { vectors, columns })?;
    }
    Ok(())
}

fn texts(batch: &RecordBatch, column: usize) -> Result<Vec<String>, VoteError> {
    let array = batch.column(column).as_string_opt::<i32>();
    let array = array.ok_or(VoteError::Bug("a scan gave another type than the lake promises"))?;
    Ok(array.iter().map(|text| text.unwrap_or_default().to_owned()).collect())
}

fn vectors(table: &Table, batch: &RecordBatch, first: usize, expected: Option<usize>) -> Result<Matrix, VoteError> {
    let wrong = || VoteError::Bug("a scan gave another type than the lake promises");
    let lists = batch.column(batch.num_columns() - 1).as_list_opt::<i32>().ok_or_else(wrong)?;
    let values = lists.values().as_primitive_opt::<Float32Type>().ok_or_else(wrong)?.values();
    let offsets = lists.value_offsets();
    let dimension = expected.unwrap_or((offsets[1] - offsets[0]) as usize);
    let malformed = |row: usize, problem: String| {
        let help = "embed both sides with the same encoder, under a run of their own";
        VoteError::input(table.url(), format!("row {}: column `embedding`: {problem}", first + row), help)
    };
    if dimension == 0 {
        return Err(malformed(0, "an empty vector".into()));
    }
    let mut matrix = Matrix::new(dimension);
    for (row, bounds) in offsets.windows(2).enumerate() {
        let vector = &values[bounds[0] as usize..bounds[1] as usize];
        if vector.len() != dimension {
            return Err(malformed(row, format!("found dimension {}, expected {dimension}", vector.len())));
        }
        if !vector.iter().all(|value| value.is_finite()) {
            return Err(malformed(row, "found a number that is not finite".into()));
        }
        matrix.extend(vector);
        normalise(matrix.row_mut(row));
    }
    Ok(matrix)
}

/// Scales to unit length; a zero vector stays.
fn normalise(vector: &mut [f32]) {
    let norm = squared_norm(vector).sqrt();
    if norm > 0.0 && norm.is_finite() {
        vector.iter_mut().for_each(|value| *value /= norm);
    }
}
