//! Second pass: the records that stay become the corpus table, in one commit: a corpus is there whole or not at all.
//!
//! PRIVACY: a commit for each chunk would make the table's version, which releases name, tell how many records there
//! are.

use std::collections::HashMap;
use std::sync::Arc;

use arrow::array::{ArrayRef, RecordBatch, StringArray};
use lake::{AppTransaction, Table, Uploaded};
use rayon::prelude::*;
use serde::Serialize;

use crate::bound::{Choice, Keys, Split};
use crate::config::Config;
use crate::error::PartitionError;
use crate::input::Batch;
use crate::select::Kept;

/// Rows of a chunk, unless its texts are long.
const CHUNK_ROWS: usize = 50_000;
/// Bytes of text in a chunk, about: what is held in memory before it is written.
const CHUNK_BYTES: usize = 64 << 20;

/// A row of the corpus.
pub struct Row {
    kept: Kept,
    split: Split,
}

/// Records of each split. PRIVACY: private unless declared public.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct SplitCounts {
    /// To train on and to vote with.
    pub train: u64,
    /// To watch the loss on.
    pub validation: u64,
    /// To compare with.
    pub test: u64,
}

/// Finds the selected records in the second reading of the inputs.
pub struct Extraction {
    config: Arc<Config>,
    keys: Arc<Keys>,
    selection: Vec<Choice>,
    /// How many of the selection were found.
    found: usize,
    /// Number of the next record over all inputs.
    ordinal: u64,
    /// Of texts that may be equal and still be units of their own: how many came so far.
    times: HashMap<u64, u64>,
}

impl Extraction {
    /// `selection` is in the order of the input.
    pub fn new(config: Arc<Config>, keys: Arc<Keys>, selection: Vec<Choice>) -> Self {
        Self { config, keys, selection, found: 0, ordinal: 0, times: HashMap::new() }
    }

    /// The rows of the next batch; only selected records are parsed.
    pub fn rows(&mut self, batch: &Batch) -> Result<Vec<Row>, PartitionError> {
        let first = self.ordinal;
        self.ordinal += batch.len() as u64;
        let rest = &self.selection[self.found..];
        let wanted = &rest[..rest.partition_point(|choice| choice.ordinal < self.ordinal)];
        let rows = wanted
            .par_iter()
            .map(|choice| self.row(batch, *choice, (choice.ordinal - first) as usize))
            .collect::<Vec<_>>();
        let mut rows = rows.into_iter().collect::<Result<Vec<_>, _>>()?;
        // PRIVACY: equal texts are told apart by number alone, so that one of them more or less, wherever it stands, is
        // one unit more or less.
        if self.config.equal_records_are_units() {
            for (row, choice) in rows.iter_mut().zip(wanted) {
                let times = self.times.entry(choice.priority).or_default();
                let earlier = std::mem::replace(times, *times + 1);
                if earlier > 0 {
                    let text = std::mem::take(&mut row.kept.text);
                    *row = self.placed(Kept::new(&self.config, &earlier.to_string(), text));
                }
            }
        }
        self.found += wanted.len();
        Ok(rows)
    }

    /// Whether every selected record was found.
    pub fn is_complete(&self) -> bool {
        self.found == self.selection.len()
    }

    fn row(&self, batch: &Batch, choice: Choice, index: usize) -> Result<Row, PartitionError> {
        let record = batch.read(index)?;
        let text = record.text.ok_or_else(|| PartitionError::changed(batch.object()))?;
        let kept = Kept::new(&self.config, &record.source, text);
        if self.keys.priority(&kept.record_id) != choice.priority {
            return Err(PartitionError::changed(batch.object()));
        }
        Ok(self.placed(kept))
    }

    fn placed(&self, kept: Kept) -> Row {
        let split = self.keys.split(&kept.unit, self.config.split);
        Row { kept, split }
    }
}

/// Writes rows to the corpus table, chunk by chunk, and commits them together at the end.
pub struct Writer {
    table: Table,
    transaction: AppTransaction,
    files: Vec<Uploaded>,
    rows: Vec<Row>,
    bytes: usize,
    counts: SplitCounts,
}

impl Writer {
    /// A writer of `table` under the application id `application`.
    pub async fn open(table: Table, application: String) -> Result<Self, PartitionError> {
        table.create(lake::schema::corpus()).await?;
        let transaction = AppTransaction { id: application, version: 0 };
        Ok(Self { table, transaction, files: Vec::new(), rows: Vec::new(), bytes: 0, counts: SplitCounts::default() })
    }

    /// Takes rows in the order of the input.
    pub async fn add(&mut self, rows: Vec<Row>) -> Result<(), PartitionError> {
        for row in rows {
            self.bytes += row.kept.text.len() + row.kept.unit.len() + row.kept.record_id.len();
            match row.split {
                Split::Train => self.counts.train += 1,
                Split::Validation => self.counts.validation += 1,
                Split::Test => self.counts.test += 1,
            }
            self.rows.push(row);
            if self.rows.len() >= CHUNK_ROWS || self.bytes >= CHUNK_BYTES {
                self.upload().await?;
            }
        }
        Ok(())
    }

    /// Commits everything, unless an earlier attempt did; the table and how many records each split has.
    pub async fn finish(mut self) -> Result<(Table, SplitCounts), PartitionError> {
        if !self.rows.is_empty() {
            self.upload().await?;
        }
        self.table.append_uploaded(self.files, self.transaction).await?;
        Ok((self.table, self.counts))
    }

    async fn upload(&mut self) -> Result<(), PartitionError> {
        let rows = std::mem::take(&mut self.rows);
        self.bytes = 0;
        let part = AppTransaction { id: self.transaction.id.clone(), version: self.files.len() as i64 };
        self.files.push(self.table.upload(vec![batch(&rows)?], &part).await?);
        Ok(())
    }
}

fn batch(rows: &[Row]) -> Result<RecordBatch, PartitionError> {
    fn column<'a>(rows: &'a [Row], value: impl Fn(&'a Row) -> &'a str) -> ArrayRef {
        Arc::new(StringArray::from_iter_values(rows.iter().map(value)))
    }
    let columns = vec![
        column(rows, |row| &row.kept.record_id),
        column(rows, |row| &row.kept.unit),
        column(rows, |row| &row.kept.text),
        column(rows, |row| row.split.name()),
    ];
    RecordBatch::try_new(lake::schema::corpus(), columns)
        .map_err(|_| PartitionError::Bug("rows that do not fit the corpus schema"))
}
