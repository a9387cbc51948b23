//! What a store behind a root promises, as tests that disk and a real S3 server both pass.
//!
//! Each function panics where a promise is broken. They need an empty root and leave objects in it.
#![allow(clippy::missing_panics_doc, clippy::unwrap_used)]

use std::sync::Arc;

use arrow::array::{ArrayRef, AsArray, Float32Array, Int32Array, ListArray, RecordBatch, StringArray};
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::{DataType, Field, Float32Type, Schema, SchemaRef};
use bytes::Bytes;

use crate::{AppTransaction, LakeError, Zone};

/// All promises, one after the other.
pub async fn all<Z: Zone>(root: &Z) {
    objects(root).await;
    conditional_put(root).await;
    large_objects(root).await;
    tables(root).await;
    concurrent_creates(root).await;
    concurrent_appends(root, 8, 5).await;
    copies_of_one_shard(root).await;
}

/// Objects are replaced whole, listed below folders, and deleted twice without complaint.
pub async fn objects<Z: Zone>(root: &Z) {
    assert!(matches!(root.get("objects/none").await, Err(LakeError::NotFound(_))));
    assert_eq!(root.list("objects").await.unwrap(), Vec::<String>::new());
    let names = ["objects/a", "objects/b/with space", "objects/b/ünï", "objects-beside/c"];
    for name in names {
        root.put(name, Bytes::from(name)).await.unwrap();
        root.put(name, Bytes::from(format!("{name}, again"))).await.unwrap();
        assert_eq!(root.get(name).await.unwrap(), format!("{name}, again"));
    }
    assert_eq!(root.list("objects").await.unwrap(), ["objects/a", "objects/b/with space", "objects/b/ünï"]);
    assert_eq!(root.list("objects/b").await.unwrap().len(), 2);
    root.put("objects/empty", Bytes::new()).await.unwrap();
    assert_eq!(root.get("objects/empty").await.unwrap(), Bytes::new());
    root.delete("objects/a").await.unwrap();
    root.delete("objects/a").await.unwrap();
    assert!(matches!(root.get("objects/a").await, Err(LakeError::NotFound(_))));
    assert!(matches!(root.get("objects/../objects/empty").await, Err(LakeError::Usage(_))));
}

/// Of many writers of one object, exactly one is told that it wrote it, and its content stays.
pub async fn conditional_put<Z: Zone>(root: &Z) {
    assert!(root.put_if_absent("claims/first", "a".into()).await.unwrap());
    assert!(!root.put_if_absent("claims/first", "a".into()).await.unwrap(), "the same content is no second claim");
    assert!(!root.put_if_absent("claims/first", "b".into()).await.unwrap());
    assert_eq!(root.get("claims/first").await.unwrap(), "a");
    let claims = (0..16).map(|writer| {
        let root = root.clone();
        tokio::spawn(async move { root.put_if_absent("claims/race", format!("{writer}").into()).await.unwrap() })
    });
    let mut winners = Vec::new();
    for (writer, claim) in claims.collect::<Vec<_>>().into_iter().enumerate() {
        if claim.await.unwrap() {
            winners.push(writer.to_string());
        }
    }
    assert_eq!(winners.len(), 1);
    assert_eq!(root.get("claims/race").await.unwrap(), winners[0]);
}

/// Large objects go up in parts and come back in ranges, equal to the last byte.
pub async fn large_objects<Z: Zone>(root: &Z) {
    let body: Bytes = (0..20_000_003_u32).map(|index| (index.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    for path in ["large/one", "large/sub/other"] {
        root.put(path, body.clone()).await.unwrap();
        assert!(root.get(path).await.unwrap() == body);
    }
    let folder = tempfile::tempdir().unwrap();
    root.download("large", &folder.path().join("down")).await.unwrap();
    for name in ["one", "sub/other"] {
        assert!(std::fs::read(folder.path().join("down").join(name)).unwrap() == body, "{name}");
    }
    assert!(matches!(root.download("none", folder.path()).await, Err(LakeError::NotFound(_))));
}

/// A retry adds nothing, versions stay readable, rows keep their order, and a digest follows the content.
pub async fn tables<Z: Zone>(root: &Z) {
    let table = root.table("tables/my table");
    assert_eq!(table.version().await.unwrap(), None);
    assert!(matches!(table.pin().await, Err(LakeError::NotFound(_))));
    assert_eq!(table.last_chunk("run/stage").await.unwrap(), None);
    table.create(schema()).await.unwrap();
    table.create(schema()).await.unwrap();
    let other = Arc::new(Schema::new(vec![Field::new("id", DataType::Int64, false)]));
    assert!(matches!(table.create(other).await, Err(LakeError::Malformed(_))));
    let empty = table.pin().await.unwrap();

    assert!(table.append(vec![rows("a", 3)], chunk("run/stage", 0)).await.unwrap());
    assert!(!table.append(vec![rows("a", 3)], chunk("run/stage", 0)).await.unwrap());
    let first = table.pin().await.unwrap();
    assert!(table.append(vec![rows("b", 2), rows("c", 1)], chunk("run/stage", 1)).await.unwrap());
    // A fresh handle, as a restarted process has.
    let again = root.table("tables/my table");
    assert!(!again.append(vec![rows("b", 2)], chunk("run/stage", 1)).await.unwrap());
    assert_eq!(again.last_chunk("run/stage").await.unwrap(), Some(1));
    assert_eq!(again.last_chunk("run/other").await.unwrap(), None);

    let latest = again.pin().await.unwrap();
    assert_eq!(ids(&again.read(empty, &["id"]).await.unwrap()), Vec::<String>::new());
    assert_eq!(ids(&again.read(first, &["id"]).await.unwrap()), ["a0", "a1", "a2"]);
    let all = again.read(latest, &["embedding", "id"]).await.unwrap();
    assert_eq!(ids(&all), ["a0", "a1", "a2", "b0", "b1", "c0"]);
    assert_eq!(again.count(latest).await.unwrap(), 6);
    let vectors = all[0].column(0).as_list::<i32>();
    assert_eq!(vectors.value(1).as_primitive::<Float32Type>().values(), &[1.0, f32::MIN_POSITIVE, -0.5]);

    let digest = again.digest(first).await.unwrap();
    assert_eq!(again.digest(first).await.unwrap(), digest);
    assert_ne!(again.digest(latest).await.unwrap(), digest);
    let twin = root.table("tables/twin");
    twin.create(schema()).await.unwrap();
    twin.append(vec![rows("a", 3)], chunk("another/name", 0)).await.unwrap();
    assert_eq!(twin.digest(twin.pin().await.unwrap()).await.unwrap(), digest);

    let error = again.scan(latest, &["nothing"]).await.err().unwrap();
    assert!(matches!(&error, LakeError::Malformed(text) if text.contains("`nothing`")), "{error}");
    assert!(matches!(again.scan(latest + 1, &["id"]).await, Err(LakeError::NotFound(_))));

    let session = datafusion::prelude::SessionContext::new();
    session.register_table("t", again.provider(first).await.unwrap()).unwrap();
    let found = session.sql("SELECT id FROM t ORDER BY id DESC LIMIT 1").await.unwrap().collect().await.unwrap();
    assert!(format!("{found:?}").contains("a2"));
}

/// Many writers that create one table at the same time all succeed, with one table.
pub async fn concurrent_creates<Z: Zone>(root: &Z) {
    let creates = (0..8).map(|_| {
        let table = root.table("tables/raced");
        tokio::spawn(async move { table.create(schema()).await })
    });
    for create in creates.collect::<Vec<_>>() {
        create.await.unwrap().unwrap();
    }
    assert_eq!(root.table("tables/raced").version().await.unwrap(), Some(0));
}

/// `writers` shards append `chunks` chunks each at the same time, every chunk twice: each row is there once, in the
/// order of shards and chunks.
pub async fn concurrent_appends<Z: Zone>(root: &Z, writers: usize, chunks: i64) {
    root.table("tables/shards").create(schema()).await.unwrap();
    let shards = (0..writers).map(|shard| {
        let table = root.table("tables/shards");
        tokio::spawn(async move {
            let id = format!("run/synthesize/{shard}-of-{writers}");
            for version in 0..chunks {
                let batch = || vec![rows(&format!("{shard}/{version}/"), 2)];
                assert!(table.append(batch(), chunk(&id, version)).await.unwrap());
                assert!(!table.append(batch(), chunk(&id, version)).await.unwrap());
            }
        })
    });
    for shard in shards.collect::<Vec<_>>() {
        shard.await.unwrap();
    }
    let table = root.table("tables/shards");
    let found = ids(&table.read(table.pin().await.unwrap(), &["id"]).await.unwrap());
    let expected = (0..writers).flat_map(|shard| {
        (0..chunks).flat_map(move |version| (0..2).map(move |row| format!("{shard}/{version}/{row}")))
    });
    assert_eq!(found, expected.collect::<Vec<_>>());
}

/// Copies of the same shard that run at the same time write each chunk once between them.
pub async fn copies_of_one_shard<Z: Zone>(root: &Z) {
    root.table("tables/copies").create(schema()).await.unwrap();
    let copies = (0..4).map(|_| {
        let table = root.table("tables/copies");
        tokio::spawn(async move {
            let mut written = 0;
            for version in 0..3 {
                let batch = vec![rows(&format!("{version}/"), 2)];
                written += usize::from(table.append(batch, chunk("run/stage/0-of-1", version)).await.unwrap());
            }
            written
        })
    });
    let mut written = 0;
    for copy in copies.collect::<Vec<_>>() {
        written += copy.await.unwrap();
    }
    assert_eq!(written, 3);
    let table = root.table("tables/copies");
    let found = ids(&table.read(table.pin().await.unwrap(), &["id"]).await.unwrap());
    assert_eq!(found, ["0/0", "0/1", "1/0", "1/1", "2/0", "2/1"]);
}

fn schema() -> SchemaRef {
    let item = Field::new("element", DataType::Float32, false);
    Arc::new(Schema::new(vec![
        Field::new("id", DataType::Utf8, false),
        Field::new("bin", DataType::Int32, false),
        Field::new("embedding", DataType::List(Arc::new(item)), false),
    ]))
}

fn rows(prefix: &str, count: usize) -> RecordBatch {
    let ids = StringArray::from((0..count).map(|row| format!("{prefix}{row}")).collect::<Vec<_>>());
    let bins = Int32Array::from((0..count as i32).collect::<Vec<_>>());
    let values = (0..count).flat_map(|row| [row as f32, f32::MIN_POSITIVE, -0.5]).collect::<Vec<_>>();
    let item = Arc::new(Field::new("element", DataType::Float32, false));
    let offsets = OffsetBuffer::from_lengths(std::iter::repeat_n(3, count));
    let vectors = ListArray::new(item, offsets, Arc::new(Float32Array::from(values)), None);
    let columns: Vec<ArrayRef> = vec![Arc::new(ids), Arc::new(bins), Arc::new(vectors)];
    RecordBatch::try_new(schema(), columns).unwrap()
}

fn chunk(id: &str, version: i64) -> AppTransaction {
    AppTransaction { id: id.into(), version }
}

fn ids(batches: &[RecordBatch]) -> Vec<String> {
    let column = |batch: &RecordBatch| batch.column_by_name("id").unwrap().clone();
    batches
        .iter()
        .flat_map(|batch| column(batch).as_string::<i32>().iter().flatten().map(str::to_string).collect::<Vec<_>>())
        .collect()
}
