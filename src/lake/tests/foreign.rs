//! Tables that other programs wrote, or wrote to.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use arrow::array::{ArrayRef, AsArray, Float64Array, Int64Array, RecordBatch, StringArray};
use arrow::datatypes::{DataType, Field, Float64Type, Int64Type, Schema, SchemaRef};
use chrono::Utc;
use lake::gc::{self, Pin, Retained};
use lake::{AppTransaction, LakeError, ReleaseRoot, StorageOptions, Table, Writers, Zone};
use serde_json::{Value, json};
use tempfile::TempDir;

const TABLE: &str = "runs/flan/candidates";

/// Rows of a file.
const ROWS: i64 = 40;

/// Rows that were deleted, and their deletion vector: 44 bytes in Z85 of magic number 1681511377, one bitmap with key 0, and
/// that in the portable Roaring format.
const DELETED: [i64; 6] = [3, 4, 7, 11, 18, 29];
const VECTOR: &str = "^Bg9^0rr910000000000iXQKl0rr91000f55c8Xg0@@D72lkbi5=-{L";

struct Lake {
    folder: TempDir,
    root: ReleaseRoot,
}

impl Lake {
    async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let root = open(folder.path()).await;
        Self { folder, root }
    }

    fn commit_path(&self, version: i64) -> PathBuf {
        self.folder.path().join(format!("{TABLE}/_delta_log/{version:020}.json"))
    }

    /// Writes commit `version` as another program would.
    fn commit(&self, version: i64, actions: &[Value]) {
        let lines: Vec<String> = actions.iter().map(Value::to_string).collect();
        std::fs::write(self.commit_path(version), lines.join("\n")).unwrap();
    }

    /// What commit `version` adds.
    fn added(&self, version: i64) -> Value {
        let text = std::fs::read_to_string(self.commit_path(version)).unwrap();
        let mut lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        lines.find_map(|line| line.get("add").cloned()).unwrap()
    }
}

async fn open(folder: &Path) -> ReleaseRoot {
    ReleaseRoot::open(&folder.display().to_string(), &StorageOptions::default()).await.unwrap()
}

fn schema_of(fields: &[(&str, DataType)]) -> SchemaRef {
    Arc::new(Schema::new(fields.iter().map(|(name, kind)| Field::new(*name, kind.clone(), true)).collect::<Vec<_>>()))
}

async fn append(table: &Table, chunk: i64, schema: &SchemaRef, columns: Vec<ArrayRef>) {
    let batch = RecordBatch::try_new(schema.clone(), columns).unwrap();
    let transaction = AppTransaction { id: "flan/other".into(), version: chunk };
    assert!(table.append(vec![batch], transaction).await.unwrap());
}

/// A table of two files, from whose second one another program deleted some rows; `actions` puts what it says of the file
/// in its order.
async fn with_deleted_rows(lake: &Lake, actions: impl Fn(Value, Value) -> [Value; 2]) -> i64 {
    let schema = schema_of(&[("number", DataType::Int64)]);
    let table = lake.root.table(TABLE);
    table.create(schema.clone()).await.unwrap();
    for chunk in 0..2 {
        let numbers = Int64Array::from_iter_values(chunk * ROWS..(chunk + 1) * ROWS);
        append(&table, chunk, &schema, vec![Arc::new(numbers)]).await;
    }
    let mut add = lake.added(2);
    let remove = json!({ "path": add["path"], "deletionTimestamp": 0, "dataChange": true });
    add["deletionVector"] =
        json!({ "storageType": "i", "pathOrInlineDv": VECTOR, "sizeInBytes": 44, "cardinality": DELETED.len() });
    let protocol = json!({
        "minReaderVersion": 3, "minWriterVersion": 7,
        "readerFeatures": ["deletionVectors"], "writerFeatures": ["deletionVectors"],
    });
    let [one, two] = actions(json!({ "add": add }), json!({ "remove": remove }));
    lake.commit(3, &[json!({ "protocol": protocol }), one, two]);
    3
}

fn adds_first(add: Value, remove: Value) -> [Value; 2] {
    [add, remove]
}

async fn numbers(root: &ReleaseRoot, version: i64) -> Vec<i64> {
    let batches = root.table(TABLE).read(version, &["number"]).await.unwrap();
    batches.iter().flat_map(|batch| batch.column(0).as_primitive::<Int64Type>().values().to_vec()).collect()
}

#[tokio::test]
async fn rows_keep_their_order_whatever_the_log_says_first() {
    let lake = Lake::new().await;
    let version = with_deleted_rows(&lake, adds_first).await;
    let expected: Vec<i64> = (0..2 * ROWS).filter(|number| !DELETED.contains(&(number - ROWS))).collect();
    assert_eq!(numbers(&lake.root, version).await, expected);
    assert_eq!(lake.root.table(TABLE).count(version).await.unwrap(), expected.len() as u64);

    let url = url::Url::from_directory_path(lake.folder.path().join(TABLE)).unwrap();
    let table = deltalake::open_table(url).await.unwrap();
    deltalake::checkpoints::create_checkpoint(&table, None).await.unwrap();
    assert_eq!(numbers(&open(lake.folder.path()).await, version).await, expected, "from the checkpoint");
}

#[tokio::test]
async fn a_file_is_found_however_its_name_is_written_in_the_log() {
    let lake = Lake::new().await;
    let version = with_deleted_rows(&lake, adds_first).await;
    let folder = lake.folder.path().join(TABLE);
    // One program encodes all that it can, another only what it must.
    for (commit, name, logged) in
        [(1, "1 of a|b*ä.parquet", "1%20of%20a%7cb%2A%C3%A4.parquet"), (3, "2 a|b*.parquet", "2%20a|b*.parquet")]
    {
        let path = lake.added(commit)["path"].as_str().unwrap().to_owned();
        std::fs::rename(folder.join(&path), folder.join(name)).unwrap();
        for version in 1..=3 {
            let text = std::fs::read_to_string(lake.commit_path(version)).unwrap();
            std::fs::write(lake.commit_path(version), text.replace(&path, logged)).unwrap();
        }
    }
    let found = numbers(&open(lake.folder.path()).await, version).await;
    let expected: Vec<i64> = (0..2 * ROWS).filter(|number| !DELETED.contains(&(number - ROWS))).collect();
    assert_eq!(found, expected);
}

#[tokio::test]
async fn compaction_leaves_a_file_whose_name_is_written_in_another_way() {
    let lake = Lake::new().await;
    let schema = schema_of(&[("number", DataType::Int64)]);
    let table = lake.root.table(TABLE);
    table.create(schema.clone()).await.unwrap();
    for chunk in 0..10 {
        append(&table, chunk, &schema, vec![Arc::new(Int64Array::from(vec![chunk]))]).await;
    }
    let rows: Vec<i64> = (0..10).collect();
    // A code that no name needs, in small and in capital letters, and one that a name needs.
    for (chunk, encoded) in [(2, "%2d"), (5, "%2D"), (7, "-%7C")] {
        let path = lake.added(chunk + 1)["path"].as_str().unwrap().to_owned();
        let (start, random) = path.rsplit_once('-').unwrap();
        let name = if chunk == 7 { format!("{start}-|{random}") } else { path.clone() };
        let folder = lake.folder.path().join(TABLE);
        std::fs::rename(folder.join(&path), folder.join(name)).unwrap();
        let text = std::fs::read_to_string(lake.commit_path(chunk + 1)).unwrap();
        let logged = format!("{start}{encoded}{random}");
        std::fs::write(lake.commit_path(chunk + 1), text.replace(&path, &logged)).unwrap();
    }
    // A checkpoint of the commits as they were would have the former names.
    let log = lake.commit_path(0).parent().unwrap().to_path_buf();
    for entry in std::fs::read_dir(log).unwrap().map(|entry| entry.unwrap().path()) {
        if entry.extension().is_none_or(|end| end == "parquet") {
            std::fs::remove_file(entry).unwrap();
        }
    }
    let root = open(lake.folder.path()).await;
    let table = root.table(TABLE);
    let before = table.pin().await.unwrap();
    assert_eq!(numbers(&root, before).await, rows);
    assert!(table.compact(1 << 20, Writers::Ended).await.unwrap());
    assert_eq!(table.pin().await.unwrap(), before + 1);
    let root = open(lake.folder.path()).await;
    assert_eq!(numbers(&root, before + 1).await, rows);
    assert_eq!(root.table(TABLE).count(before + 1).await.unwrap(), 10);
}

#[tokio::test]
async fn gc_leaves_a_file_of_which_rows_were_deleted() {
    for actions in [adds_first, |add, remove| [remove, add]] {
        let lake = Lake::new().await;
        let version = with_deleted_rows(&lake, actions).await;
        let pins = vec![Pin { path: TABLE.into(), version: Some(version), run: Some("other".into()) }];
        let all_is_old = Retained { pins, before: Utc::now() + Duration::from_secs(60), ..Retained::default() };
        let plan = gc::plan(&lake.root, &all_is_old).await.unwrap();
        assert_eq!(plan.removals, []);
    }
}

#[tokio::test]
async fn compaction_changes_no_value_of_columns_that_only_share_a_name_with_ours() {
    let lake = Lake::new().await;
    let schema =
        schema_of(&[("mean_logprob", DataType::Float64), ("split", DataType::Utf8), ("share", DataType::Utf8)]);
    let table = lake.root.table(TABLE);
    table.create(schema.clone()).await.unwrap();
    for chunk in 0..9 {
        let columns: Vec<ArrayRef> = vec![
            Arc::new(Float64Array::from(vec![chunk as f64 + 0.1])),
            Arc::new(StringArray::from(vec![None::<&str>])),
            Arc::new(StringArray::from(vec!["half"])),
        ];
        append(&table, chunk, &schema, columns).await;
    }
    assert!(table.compact(1 << 20, Writers::Ended).await.unwrap());
    let url = url::Url::from_directory_path(lake.folder.path().join(TABLE)).unwrap();
    let provider = deltalake::open_table(url).await.unwrap().table_provider().await.unwrap();
    let session = datafusion::prelude::SessionContext::new();
    let rows = session.read_table(provider).unwrap().collect().await.unwrap();
    let mut found: Vec<f64> = Vec::new();
    for batch in &rows {
        found.extend(batch.column_by_name("mean_logprob").unwrap().as_primitive::<Float64Type>().values());
        assert_eq!(batch.column_by_name("split").unwrap().null_count(), batch.num_rows());
    }
    assert_eq!(found, (0..9).map(|chunk| f64::from(chunk) + 0.1).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_column_that_came_later_is_null_in_earlier_files_and_ours_may_not_be() {
    let lake = Lake::new().await;
    let fields = [("number", DataType::Int64), ("note", DataType::Utf8), ("text", DataType::Utf8)];
    let schema = schema_of(&fields[..1]);
    let table = lake.root.table(TABLE);
    table.create(schema.clone()).await.unwrap();
    append(&table, 0, &schema, vec![Arc::new(Int64Array::from(vec![1]))]).await;
    let text = std::fs::read_to_string(lake.commit_path(0)).unwrap();
    let mut lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let mut metadata = lines.find_map(|line| line.get("metaData").cloned()).unwrap();
    let field = |name: &str, kind: &str| json!({ "name": name, "type": kind, "nullable": true, "metadata": {} });
    let fields = [field("number", "long"), field("note", "string"), field("text", "string")];
    metadata["schemaString"] = json!({ "type": "struct", "fields": fields }).to_string().into();
    lake.commit(2, &[json!({ "metaData": metadata })]);

    let table = lake.root.table(TABLE);
    let rows = table.read(2, &["number", "note"]).await.unwrap();
    assert_eq!((rows[0].num_rows(), rows[0].column(1).null_count()), (1, 1));
    let refused = table.read(2, &["text"]).await.unwrap_err();
    let told = refused.to_string();
    assert!(matches!(refused, LakeError::Malformed(_)), "{told}");
    assert!(told.contains("column `text` holds null") && told.contains("take another --run"), "{told}");
}
