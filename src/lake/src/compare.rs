//! Whether two tables hold the same, row for row.

use arrow::array::RecordBatch;
use futures::TryStreamExt;
use futures::stream::BoxStream;

use crate::{LakeError, Table};

/// Where two tables differ first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Difference {
    /// They have other columns.
    Columns,
    /// This row, from 0 in the order of scans; of two tables of unequal length perhaps the first row that one lacks.
    Row(u64),
}

/// The first difference between a version of one table and a version of another, or `None` where they are equal.
///
/// Floats are equal where their bits are. Digests come first, so that tables written from the same rows in the same
/// chunks are not decoded. PRIVACY: of private tables, the number of a row is private too.
pub async fn first_difference(one: (&Table, i64), other: (&Table, i64)) -> Result<Option<Difference>, LakeError> {
    if one.0.digest(one.1).await? == other.0.digest(other.1).await? {
        return Ok(None);
    }
    let schema = one.0.schema(one.1).await?;
    if schema.fields() != other.0.schema(other.1).await?.fields() {
        return Ok(Some(Difference::Columns));
    }
    let columns: Vec<&str> = schema.fields().iter().map(|field| field.name().as_str()).collect();
    let (mut one, mut other) = (Rows::open(one, &columns).await?, Rows::open(other, &columns).await?);
    let mut row = 0;
    loop {
        let common = match (one.ready().await?, other.ready().await?) {
            (0, 0) => return Ok(None),
            (0, _) | (_, 0) => return Ok(Some(Difference::Row(row))),
            (one, other) => one.min(other),
        };
        if let Some(at) = first_unequal(&one.take(common), &other.take(common)) {
            return Ok(Some(Difference::Row(row + at)));
        }
        row += common as u64;
    }
}

fn first_unequal(one: &RecordBatch, other: &RecordBatch) -> Option<u64> {
    if one.columns() == other.columns() {
        return None;
    }
    let differs = |row: &usize| one.slice(*row, 1).columns() != other.slice(*row, 1).columns();
    (0..one.num_rows()).find(differs).map(|row| row as u64)
}

/// The rows of a table that were not taken yet.
struct Rows {
    batches: BoxStream<'static, Result<RecordBatch, LakeError>>,
    rest: Option<RecordBatch>,
}

impl Rows {
    async fn open((table, version): (&Table, i64), columns: &[&str]) -> Result<Self, LakeError> {
        Ok(Self { batches: table.scan(version, columns).await?, rest: None })
    }

    /// How many rows are at hand; 0 at the end of the table.
    async fn ready(&mut self) -> Result<usize, LakeError> {
        loop {
            match &self.rest {
                Some(rest) if rest.num_rows() > 0 => return Ok(rest.num_rows()),
                _ => self.rest = self.batches.try_next().await?,
            }
            if self.rest.is_none() {
                return Ok(0);
            }
        }
    }

    /// The next `count` of the rows that are at hand.
    fn take(&mut self, count: usize) -> RecordBatch {
        match self.rest.take() {
            Some(rest) => {
                self.rest = Some(rest.slice(count, rest.num_rows() - count));
                rest.slice(0, count)
            }
            None => RecordBatch::new_empty(arrow::datatypes::Schema::empty().into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::array::{ArrayRef, Float64Array};

    use super::*;
    use crate::{AppTransaction, ReleaseRoot, StorageOptions, Zone};

    /// A table of one column, with a commit for each chunk.
    async fn table(root: &ReleaseRoot, path: &str, column: &str, chunks: &[&[f64]]) -> (Table, i64) {
        let table = root.table(path);
        for (version, chunk) in chunks.iter().enumerate() {
            let values: ArrayRef = Arc::new(Float64Array::from(chunk.to_vec()));
            let batch = RecordBatch::try_from_iter([(column, values)]).unwrap();
            table.create(batch.schema()).await.unwrap();
            let transaction = AppTransaction { id: "test".into(), version: version as i64 };
            table.append(vec![batch], transaction).await.unwrap();
        }
        let version = table.pin().await.unwrap();
        (table, version)
    }

    #[tokio::test]
    async fn tables_are_compared_row_for_row_however_they_are_cut() {
        let folder = tempfile::tempdir().unwrap();
        let root = ReleaseRoot::open(&folder.path().display().to_string(), &StorageOptions::default()).await.unwrap();
        let whole = table(&root, "whole", "n", &[&[0.0, 1.0, 2.0, f64::NAN, 4.0]]).await;
        for (name, column, chunks, expected) in [
            ("same", "n", &[&[0.0, 1.0, 2.0, f64::NAN, 4.0][..]][..], None),
            ("cut", "n", &[&[0.0, 1.0, 2.0], &[f64::NAN, 4.0]], None),
            ("other", "n", &[&[0.0, 1.0], &[2.0, 3.0, 4.0]], Some(Difference::Row(3))),
            ("sign", "n", &[&[-0.0, 1.0, 2.0, f64::NAN, 4.0]], Some(Difference::Row(0))),
            ("short", "n", &[&[0.0, 1.0, 2.0, f64::NAN]], Some(Difference::Row(4))),
            ("named", "m", &[&[0.0, 1.0, 2.0, f64::NAN, 4.0]], Some(Difference::Columns)),
        ] {
            let other = table(&root, name, column, chunks).await;
            let there = first_difference((&whole.0, whole.1), (&other.0, other.1)).await.unwrap();
            let back = first_difference((&other.0, other.1), (&whole.0, whole.1)).await.unwrap();
            assert_eq!((there, back), (expected, expected), "{name}");
        }
    }
}
