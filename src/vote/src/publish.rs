//! The only module that writes to the release zone. What depends on private records comes as [`Noised`].
//!
//! Everything is written once: a file by put-if-absent, rows under an application transaction. Each step is followed by
//! reading back what is stored, so that an attempt after a crash goes on from what was published, never from a second
//! computation of it.

use std::collections::HashMap;
use std::sync::Arc;

use arrow::array::{ArrayRef, AsArray, Float32Array, Int32Array, Int64Array, RecordBatch, StringArray};
use arrow::datatypes::{Int32Type, Int64Type, SchemaRef};
use futures::StreamExt;
use lake::{AppTransaction, LakeError, Output, ReleaseRoot, Table, Zone, layout, schema};
use privacy::training::Noised;

use crate::error::VoteError;
use crate::kmeans::Assignment;
use crate::resample::allocate;
use crate::space::Space;

/// Rows of a chunk.
const CHUNK_ROWS: usize = 50_000;

/// Writes the outputs of one run.
pub struct Publisher {
    root: ReleaseRoot,
    run: String,
}

/// The histogram as published: one entry for each bin.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Histogram {
    /// Votes with noise.
    pub noisy: Vec<i64>,
    /// Synthetic rows.
    pub synthetic: Vec<u64>,
    /// Rows to select.
    pub selected: Vec<u64>,
}

impl Publisher {
    /// For `run` in `root`.
    pub fn new(root: &ReleaseRoot, run: &str) -> Self {
        Self { root: root.clone(), run: run.to_owned() }
    }

    /// The space that was stored, with the bytes that a noise context binds.
    pub async fn stored_space(&self) -> Result<Option<(Space, bytes::Bytes)>, VoteError> {
        let path = self.path("centroids.safetensors");
        let bytes = match self.root.get(&path).await {
            Err(LakeError::NotFound(_)) => return Ok(None),
            found => found?,
        };
        let space = Space::from_bytes(&bytes).ok_or_else(|| {
            VoteError::input(self.root.url_of(&path), "not the centroids of a vote", "use another --run")
        })?;
        Ok(Some((space, bytes)))
    }

    /// Stores the space, unless one is there.
    pub async fn space(&self, space: &Space) -> Result<(), VoteError> {
        self.root.put_if_absent(&self.path("centroids.safetensors"), space.to_bytes()?.into()).await?;
        Ok(())
    }

    /// Publishes the bin of each synthetic row, and reads back what stands; bins in the order of `ids`.
    pub async fn clusters(&self, ids: &[String], assignment: &Assignment) -> Result<Vec<u32>, VoteError> {
        let table = self.table("clusters");
        let mut writer = Chunks::open(table.clone(), self.transaction("clusters"), schema::clusters()).await?;
        let rows: Vec<usize> = (0..ids.len()).collect();
        for rows in rows.chunks(CHUNK_ROWS) {
            let columns: Vec<ArrayRef> = vec![
                Arc::new(StringArray::from_iter_values(rows.iter().map(|&row| &ids[row]))),
                Arc::new(Int32Array::from_iter_values(rows.iter().map(|&row| assignment.bins[row] as i32))),
                Arc::new(Float32Array::from_iter_values(
                    rows.iter().map(|&row| assignment.squared_distances[row].sqrt()),
                )),
            ];
            writer.write(columns).await?;
        }
        let mut bins = HashMap::with_capacity(ids.len());
        for batch in table.read(table.pin().await?, &["id", "bin"]).await? {
            let (read_ids, read_bins) =
                (batch.column(0).as_string::<i32>(), batch.column(1).as_primitive::<Int32Type>());
            bins.extend(
                read_ids.iter().flatten().map(str::to_owned).zip(read_bins.values().iter().map(|&bin| bin as u32)),
            );
        }
        let missing =
            || VoteError::input(table.url(), "it does not hold every synthetic row once", "use another --run");
        if bins.len() != ids.len() {
            return Err(missing());
        }
        ids.iter().map(|id| bins.get(id).copied().ok_or_else(missing)).collect()
    }

    /// The histogram, if it was published.
    pub async fn stored_histogram(&self) -> Result<Option<Histogram>, VoteError> {
        let table = self.table("histogram");
        if table.last_chunk(&self.transaction("histogram")).await?.is_none() {
            return Ok(None);
        }
        let mut rows = Vec::new();
        let columns = ["bin", "noisy_count", "synthetic_count", "selected_count"];
        for batch in table.read(table.pin().await?, &columns).await? {
            let bins = batch.column(0).as_primitive::<Int32Type>().values();
            let counts = |column: usize| batch.column(column).as_primitive::<Int64Type>().values();
            rows.extend((0..bins.len()).map(|row| (bins[row], counts(1)[row], counts(2)[row], counts(3)[row])));
        }
        rows.sort_unstable();
        let mut histogram = Histogram::default();
        for (_, noisy, synthetic, selected) in rows {
            histogram.noisy.push(noisy);
            histogram.synthetic.push(synthetic.unsigned_abs());
            histogram.selected.push(selected.unsigned_abs());
        }
        Ok(Some(histogram))
    }

    /// Publishes the noised votes, with the rows that each bin has and the rows that it will give.
    pub async fn histogram(&self, votes: &Noised<Vec<i64>>, synthetic: &[u64], target: u64) -> Result<(), VoteError> {
        let noisy = votes.value();
        let selected = allocate(target, noisy, synthetic).selected;
        let wide = |counts: &[u64]| Int64Array::from_iter_values(counts.iter().map(|&count| count as i64));
        let columns: Vec<ArrayRef> = vec![
            Arc::new(Int32Array::from_iter_values(0..noisy.len() as i32)),
            Arc::new(Int64Array::from(noisy.clone())),
            Arc::new(wide(synthetic)),
            Arc::new(wide(&selected)),
        ];
        let writer = Chunks::open(self.table("histogram"), self.transaction("histogram"), schema::histogram());
        writer.await?.write(columns).await
    }

    /// Publishes the rows of `candidates` whose ids `bin_of` knows, with their bins.
    pub async fn selected(
        &self,
        candidates: &Table,
        version: i64,
        bin_of: &HashMap<&str, u32>,
    ) -> Result<(), VoteError> {
        let mut writer = Chunks::open(self.table("selected"), self.transaction("selected"), schema::selected()).await?;
        let mut rows: Vec<(String, String, i32)> = Vec::new();
        let mut found = 0;
        let mut batches = candidates.scan(version, &["id", "text"]).await?;
        while let Some(batch) = batches.next().await {
            let batch = batch?;
            let (ids, texts) = (batch.column(0).as_string::<i32>(), batch.column(1).as_string::<i32>());
            for (id, text) in ids.iter().flatten().zip(texts.iter().flatten()) {
                if let Some(&bin) = bin_of.get(id) {
                    found += 1;
                    rows.push((id.to_owned(), text.to_owned(), bin as i32));
                }
                if rows.len() == CHUNK_ROWS {
                    writer.write(selected_columns(&std::mem::take(&mut rows))).await?;
                }
            }
        }
        if found != bin_of.len() {
            let problem = "it does not hold every embedded row once";
            return Err(VoteError::input(candidates.url(), problem, "embed the table as it is now, in another --run"));
        }
        if !rows.is_empty() || found == 0 {
            writer.write(selected_columns(&rows)).await?;
        }
        Ok(())
    }

    /// What was written, for the manifest.
    pub async fn outputs(&self) -> Result<Vec<Output>, VoteError> {
        let mut outputs = Vec::new();
        for name in ["clusters", "histogram", "selected"] {
            let version = Some(self.table(name).pin().await?);
            outputs.push(Output { name: name.to_owned(), path: self.path(name), version });
        }
        let path = self.path("centroids.safetensors");
        outputs.push(Output { name: "centroids".to_owned(), path, version: None });
        Ok(outputs)
    }

    fn path(&self, name: &str) -> String {
        layout::of_run(&self.run, name)
    }

    fn table(&self, name: &str) -> Table {
        self.root.table(&self.path(name))
    }

    fn transaction(&self, name: &str) -> String {
        format!("{}/vote/{name}", self.run)
    }
}

fn selected_columns(rows: &[(String, String, i32)]) -> Vec<ArrayRef> {
    vec![
        Arc::new(StringArray::from_iter_values(rows.iter().map(|row| &row.0))),
        Arc::new(StringArray::from_iter_values(rows.iter().map(|row| &row.1))),
        Arc::new(Int32Array::from_iter_values(rows.iter().map(|row| row.2))),
    ]
}

/// Appends chunk after chunk, passing over those that an earlier attempt wrote.
pub struct Chunks {
    table: Table,
    schema: SchemaRef,
    id: String,
    next: i64,
    written: Option<i64>,
}

impl Chunks {
    /// Creates the table unless it exists.
    pub async fn open(table: Table, id: String, schema: SchemaRef) -> Result<Self, VoteError> {
        table.create(schema.clone()).await?;
        let written = table.last_chunk(&id).await?;
        Ok(Self { table, schema, id, next: 0, written })
    }

    /// Appends one chunk.
    pub async fn write(&mut self, columns: Vec<ArrayRef>) -> Result<(), VoteError> {
        let version = self.next;
        self.next += 1;
        if self.written.is_some_and(|written| version <= written) {
            return Ok(());
        }
        let batch = RecordBatch::try_new(self.schema.clone(), columns)
            .map_err(|_| VoteError::Bug("columns that do not fit the schema of their table"))?;
        self.table.append(vec![batch], AppTransaction { id: self.id.clone(), version }).await?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use lake::StorageOptions;

    use super::*;

    /// Rows that fill two chunks, and a part of a third.
    const ROWS: usize = 120_000;

    #[tokio::test]
    async fn an_attempt_that_finds_the_first_chunk_writes_the_others() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let place = folder.path().display().to_string();
        let root = ReleaseRoot::open(&place, &StorageOptions::default()).await.expect("a root");
        let ids: Vec<String> = (0..ROWS).map(|row| format!("s{row}")).collect();
        let bins: Vec<u32> = (0..ROWS).map(|row| (row % 7) as u32).collect();
        let assignment = Assignment { bins: bins.clone(), squared_distances: vec![4.0; ROWS] };
        let candidates = root.table("candidates");
        let rows: Vec<_> = ids.iter().map(|id| (id.clone(), format!("text {id}"), 0)).collect();
        let mut writer =
            Chunks::open(candidates.clone(), "candidates".into(), schema::selected()).await.expect("a table");
        writer.write(selected_columns(&rows)).await.expect("rows");
        let version = candidates.pin().await.expect("a table");

        for (run, attempts) in [("whole", &[ROWS][..]), ("resumed", &[CHUNK_ROWS, ROWS])] {
            let publisher = Publisher::new(&root, run);
            for &rows in attempts {
                let stored = publisher.clusters(&ids[..rows], &assignment).await.expect("clusters");
                assert!(stored == bins[..rows], "{run}: {rows} rows");
                let bin_of = ids[..rows].iter().map(String::as_str).zip(bins[..rows].iter().copied()).collect();
                publisher.selected(&candidates, version, &bin_of).await.expect("selected");
                let last = rows.div_ceil(CHUNK_ROWS) as i64 - 1;
                for name in ["clusters", "selected"] {
                    let written =
                        publisher.table(name).last_chunk(&publisher.transaction(name)).await.expect("a table");
                    assert_eq!(written, Some(last), "{run}: {name}");
                    assert!(
                        published(&publisher, name).await == (ids[..rows].to_vec(), bins[..rows].to_vec()),
                        "{run}: {name}"
                    );
                }
            }
        }
    }

    /// Ids and bins of a table, in its order.
    async fn published(publisher: &Publisher, name: &str) -> (Vec<String>, Vec<u32>) {
        let table = publisher.table(name);
        let batches = table.read(table.pin().await.expect("a table"), &["id", "bin"]).await.expect("rows");
        let ids = batches.iter().flat_map(|batch| batch.column(0).as_string::<i32>().iter().flatten());
        let bins = batches.iter().flat_map(|batch| batch.column(1).as_primitive::<Int32Type>().values().iter());
        (ids.map(str::to_owned).collect(), bins.map(|&bin| bin as u32).collect())
    }
}
