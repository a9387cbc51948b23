//! Compaction: many small data files become few, as one new version with the same rows in the same order.
//!
//! `deltalake`'s own optimizer names its files at random and reads them in parallel, so rows would change places; here a
//! merged file takes the place of the first one that went into it. Application transactions live in the log and stay
//! known. The old files stay too, so older versions remain readable until [`crate::gc`] removes what nothing pins.

use std::collections::{HashMap, HashSet};

use deltalake::DeltaTable;
use deltalake::kernel::transaction::CommitBuilder;
use deltalake::kernel::{Action, Add, Remove};
use deltalake::protocol::DeltaOperation;
use futures::TryStreamExt;
use tokio::time::Instant;

use crate::backoff::Backoff;
use crate::delta::{self, Commit};
use crate::files::{DataFile, files, logged_paths, merged_name, writer};
use crate::rows::{self, Encoder};
use crate::table::properties;
use crate::{LakeError, Table};

/// A table with fewer files gains nothing by compaction.
const FEW: usize = 8;

/// Who may still append to a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Writers {
    /// Shards that have not ended. Files of different shards stay apart, since the next chunk of the first belongs
    /// between them.
    Running,
    /// Nobody.
    Ended,
}

/// A merged file and those that it stands for.
struct Merged {
    from: Vec<DataFile>,
    add: Add,
}

impl Table {
    /// Merges neighbouring small files up to `target_size` bytes each, in one commit that changes no row; `false` where
    /// there is nothing to gain. Memory is bounded by a few times `target_size`.
    ///
    /// Appends that come between are kept: the commit is tried again on top of them.
    pub async fn compact(&self, target_size: u64, writers: Writers) -> Result<bool, LakeError> {
        let table = self.latest().await?;
        self.require_plain(&table)?;
        let mut merged = Vec::new();
        let plain = plainly_logged(&table)?;
        for from in groups(files(&table)?, target_size, writers, |file| plain.contains(&file.path)) {
            merged.push(self.merge(&table, from).await?);
        }
        match merged.is_empty() {
            true => Ok(false),
            false => self.replace(table, &merged, target_size).await,
        }
    }

    fn require_plain(&self, table: &DeltaTable) -> Result<(), LakeError> {
        let schema = self.arrow_schema(table)?;
        let columns: Vec<&str> = schema.fields().iter().map(|field| field.name().as_str()).collect();
        match self.needs_engine(table, &columns)? {
            false => Ok(()),
            true => Err(LakeError::Usage(format!(
                "{}: the table has partitions, column mapping or deletion vectors, which doppel does not write\n\
                 help: compact it with the program that wrote it",
                self.url()
            ))),
        }
    }

    /// Writes the rows of `from`, in their order, as one file.
    async fn merge(&self, table: &DeltaTable, from: Vec<DataFile>) -> Result<Merged, LakeError> {
        let schema = self.arrow_schema(table)?;
        let wanted = rows::as_they_are(&schema);
        let mut encoder = Encoder::new(self.url(), &schema)?;
        let mut count = 0;
        for file in &from {
            let mut batches = rows::open(self.data_file(file)?, wanted.clone()).await?;
            while let Some(batch) = batches.try_next().await? {
                count += batch.num_rows();
                encoder.write(&batch)?;
            }
        }
        let add = self.put_file(merged_name(&from[0].path), encoder.finish()?, count, false).await?;
        Ok(Merged { from, add })
    }

    /// Commits `merged`, again and again until no other writer came between.
    async fn replace(&self, mut table: DeltaTable, merged: &[Merged], target_size: u64) -> Result<bool, LakeError> {
        self.store.require_conditional_puts().await?;
        let deadline = Instant::now() + self.store.timeout();
        let mut wait = Backoff::default();
        loop {
            match self.commit_merged(&table, merged, target_size).await {
                Ok(()) => return Ok(true),
                Err(Commit::Failed(error)) => return Err(error),
                Err(Commit::LookAgain(error)) if Instant::now() >= deadline => return Err(error),
                Err(Commit::LookAgain(_)) => wait.sleep(deadline).await,
            }
            table = self.latest().await?;
            let live: HashSet<String> = files(&table)?.into_iter().map(|file| file.path).collect();
            if merged.iter().any(|merged| live.contains(&merged.add.path)) {
                // The answer to our commit was lost.
                return Ok(true);
            }
            if !merged.iter().flat_map(|merged| &merged.from).all(|file| live.contains(&file.path)) {
                // Another compaction was first; our files stay unreferenced.
                return Ok(false);
            }
        }
    }

    async fn commit_merged(&self, table: &DeltaTable, merged: &[Merged], target_size: u64) -> Result<(), Commit> {
        let failed = self.blame_commit();
        let state = table.snapshot().map_err(|error| Commit::Failed(delta::explain(self.url(), &error)))?;
        let removes = merged.iter().flat_map(|merged| &merged.from).map(|file| Action::Remove(remove(file)));
        let adds = merged.iter().map(|merged| Action::Add(merged.add.clone()));
        let target_size = i64::try_from(target_size).unwrap_or(i64::MAX);
        let operation = DeltaOperation::Optimize { predicate: None, target_size };
        let commit = CommitBuilder::from(properties()).with_actions(removes.chain(adds).collect()).build(
            Some(state),
            self.log_store().map_err(Commit::Failed)?,
            operation,
        );
        commit.await.map(drop).map_err(failed)
    }
}

fn remove(file: &DataFile) -> Remove {
    Remove {
        path: file.path.clone(),
        data_change: false,
        deletion_timestamp: Some(chrono::Utc::now().timestamp_millis()),
        extended_file_metadata: Some(true),
        partition_values: Some(HashMap::new()),
        size: i64::try_from(file.size).ok(),
        ..Remove::default()
    }
}

/// Files that the log calls by names which every program writes alike. Others cannot be removed: readers compare the
/// letters of a removal with those of the addition, and `deltalake` encodes names in its own way.
fn plainly_logged(table: &DeltaTable) -> Result<HashSet<String>, LakeError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '/' | '-');
    let paths = logged_paths(table)?.into_iter();
    Ok(paths.filter(|(path, logged)| path == logged && path.chars().all(plain)).map(|(path, _)| path).collect())
}

/// Runs of neighbouring small files that become one each, of those that are `removable`. A file of half the target or
/// more is large enough.
fn groups(
    files: Vec<DataFile>,
    target_size: u64,
    writers: Writers,
    removable: impl Fn(&DataFile) -> bool,
) -> Vec<Vec<DataFile>> {
    if files.len() < FEW {
        return Vec::new();
    }
    let small = |file: &DataFile| file.size < target_size / 2 && removable(file);
    let mut groups: Vec<(u64, Vec<DataFile>)> = Vec::new();
    for file in files {
        let joins = |(size, group): &(u64, Vec<DataFile>)| {
            let same = writers == Writers::Ended || writer(&group[0].path) == writer(&file.path);
            same && small(&group[0]) && small(&file) && size + file.size <= target_size
        };
        match groups.last_mut() {
            Some(group) if joins(group) => {
                group.0 += file.size;
                group.1.push(file);
            }
            _ => groups.push((file.size, vec![file])),
        }
    }
    groups.into_iter().map(|(_, group)| group).filter(|group| group.len() > 1).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::array::{ArrayRef, AsArray, Float64Array, Int64Array, RecordBatch, StringArray};
    use arrow::datatypes::Int64Type;

    use super::*;
    use crate::{AppTransaction, ReleaseRoot, StorageOptions, Zone, schema};

    fn file(path: &str, size: u64) -> DataFile {
        DataFile { path: path.into(), size, rows: None, deletions: None, partition: String::new() }
    }

    #[track_caller]
    fn grouped(files: &[(&str, u64)], writers: Writers, expected: &[&[usize]]) {
        // Neighbours behind the files that matter, too large to be merged, so that there are not too few.
        let more = (0..FEW).map(|index| file(&format!("z-{index:08}-0123456789ab.parquet"), 1000));
        let all: Vec<DataFile> = files.iter().map(|(path, size)| file(path, *size)).chain(more).collect();
        let found: Vec<Vec<String>> = groups(all, 100, writers, |file| !file.path.contains('%'))
            .into_iter()
            .map(|group| group.into_iter().map(|file| file.path).collect())
            .collect();
        let expected: Vec<Vec<String>> =
            expected.iter().map(|group| group.iter().map(|&index| files[index].0.to_string()).collect()).collect();
        assert_eq!(found, expected);
    }

    #[test]
    fn neighbours_are_merged_up_to_the_target_and_large_files_are_left() {
        let files = [
            ("a-00000000-0.parquet", 40),
            ("a-00000001-0.parquet", 40),
            ("a-00000002-0.parquet", 40),
            ("a-00000003-0.parquet", 50),
            ("a-00000004-0.parquet", 10),
            ("a-00000005-0.parquet", 10),
        ];
        grouped(&files, Writers::Ended, &[&[0, 1], &[4, 5]]);
    }

    #[test]
    fn files_of_different_shards_stay_apart_while_shards_run() {
        let files = [
            ("a.0-00000000-0.parquet", 10),
            ("a.0-00000001-0.parquet", 10),
            ("a.1-00000000-0.parquet", 10),
            ("a.1-00000001-0.parquet", 10),
        ];
        grouped(&files, Writers::Running, &[&[0, 1], &[2, 3]]);
        grouped(&files, Writers::Ended, &[&[0, 1, 2, 3]]);
    }

    #[test]
    fn a_file_that_cannot_be_removed_stands_between_its_neighbours() {
        let files = [
            ("a-00000000-0.parquet", 10),
            ("a-00000001-0.parquet", 10),
            ("a-00000002-%.parquet", 10),
            ("a-00000003-0.parquet", 10),
            ("a-00000004-0.parquet", 10),
        ];
        grouped(&files, Writers::Ended, &[&[0, 1], &[3, 4]]);
    }

    async fn table(folder: &tempfile::TempDir) -> Table {
        let root = ReleaseRoot::open(&folder.path().display().to_string(), &StorageOptions::default()).await.unwrap();
        let table = root.table("runs/demo/loss");
        table.create(schema::loss()).await.unwrap();
        table
    }

    async fn append(table: &Table, shard: i64, chunk: i64) -> bool {
        let columns: Vec<ArrayRef> = vec![
            Arc::new(Int64Array::from(vec![shard * 1000 + chunk])),
            Arc::new(StringArray::from(vec!["validation"])),
            Arc::new(Float64Array::from(vec![0.5])),
        ];
        let batch = RecordBatch::try_new(schema::loss(), columns).unwrap();
        let transaction = AppTransaction { id: format!("demo/train/{shard}-of-16"), version: chunk };
        table.append(vec![batch], transaction).await.unwrap()
    }

    async fn steps(table: &Table, version: i64) -> Vec<i64> {
        let batches = table.read(version, &["step"]).await.unwrap();
        batches.iter().flat_map(|batch| batch.column(0).as_primitive::<Int64Type>().values().to_vec()).collect()
    }

    async fn file_count(table: &Table) -> usize {
        files(&table.latest().await.unwrap()).unwrap().len()
    }

    #[tokio::test]
    async fn rows_keep_their_order_and_old_versions_and_retries_their_meaning() {
        let folder = tempfile::tempdir().unwrap();
        let table = table(&folder).await;
        for (shard, chunk) in (0..5).flat_map(|chunk| [(0, chunk), (9, chunk), (10, chunk)]) {
            assert!(append(&table, shard, chunk).await);
        }
        let before = table.pin().await.unwrap();
        let rows = steps(&table, before).await;
        assert!(table.compact(1 << 20, Writers::Running).await.unwrap());
        let after = table.pin().await.unwrap();
        assert_eq!((after, file_count(&table).await), (before + 1, 3));
        assert_eq!(steps(&table, after).await, rows);
        assert_eq!(steps(&table, before).await, rows);
        assert_eq!(table.count(after).await.unwrap(), 15);
        assert!(!append(&table, 9, 2).await, "a retried chunk is known");
        assert!(append(&table, 9, 5).await);
        let mut expected = rows.clone();
        expected.insert(10, 9005);
        assert_eq!(steps(&table, table.pin().await.unwrap()).await, expected, "a later chunk takes its place");
    }

    #[tokio::test]
    async fn a_table_that_is_compact_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let table = table(&folder).await;
        for chunk in 0..FEW as i64 - 1 {
            append(&table, 0, chunk).await;
        }
        assert!(!table.compact(1 << 20, Writers::Ended).await.unwrap(), "it has few files");
        append(&table, 1, 0).await;
        assert!(table.compact(1 << 20, Writers::Ended).await.unwrap());
        assert!(!table.compact(1 << 20, Writers::Ended).await.unwrap(), "it was compacted");
        assert_eq!(file_count(&table).await, 1);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn appends_and_compactions_at_the_same_time_lose_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let first = table(&folder).await;
        for chunk in 0..FEW as i64 {
            append(&first, 0, chunk).await;
        }
        let appends = (1..4).map(|shard| {
            let table = Table::new(first.store.clone(), "runs/demo/loss", None, true);
            tokio::spawn(async move {
                for chunk in 0..8 {
                    assert!(append(&table, shard, chunk).await);
                }
            })
        });
        let compactions = (0..2).map(|_| {
            let table = Table::new(first.store.clone(), "runs/demo/loss", None, true);
            tokio::spawn(async move {
                for _ in 0..4 {
                    table.compact(1 << 20, Writers::Running).await.unwrap();
                }
            })
        });
        for task in appends.chain(compactions).collect::<Vec<_>>() {
            task.await.unwrap();
        }
        let expected: Vec<i64> = (0..4).flat_map(|shard| (0..8).map(move |chunk| shard * 1000 + chunk)).collect();
        assert_eq!(steps(&first, first.pin().await.unwrap()).await, expected);
    }

    #[tokio::test]
    async fn what_lost_the_race_against_an_append_is_committed_on_top_of_it() {
        let folder = tempfile::tempdir().unwrap();
        let table = table(&folder).await;
        for chunk in 0..FEW as i64 {
            append(&table, 0, chunk).await;
        }
        let stale = table.latest().await.unwrap();
        let from = groups(files(&stale).unwrap(), 1 << 20, Writers::Running, |_| true).remove(0);
        let merged = [table.merge(&stale, from).await.unwrap()];
        append(&table, 1, 0).await;
        assert!(table.replace(stale.clone(), &merged, 1 << 20).await.unwrap());
        assert_eq!(table.count(table.pin().await.unwrap()).await.unwrap(), FEW as u64 + 1);
        // Once more, as after a lost answer, and then for a compaction whose files are gone.
        let committed = table.pin().await.unwrap();
        assert!(table.replace(stale.clone(), &merged, 1 << 20).await.unwrap());
        let late = [table.merge(&stale, files(&stale).unwrap()).await.unwrap()];
        assert!(!table.replace(stale, &late, 1 << 20).await.unwrap());
        assert_eq!(table.pin().await.unwrap(), committed);
    }
}
