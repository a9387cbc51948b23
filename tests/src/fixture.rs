//! A release root small enough to work out by hand: what the published queries are tested on.
//!
//! Run `tiny` has twelve synthetic rows of two shards in three clusters. Bin 0 has too many rows for its votes, bin 1 too
//! few (its supply runs out), and bin 2 got noise below zero. Run `tiny-base` has two rows, to compare with. Of two more
//! runs there are manifests alone: `tiny-other` trained, and `tiny-more` sampled from its adapter.

use std::sync::Arc;
use std::time::Duration;

use arrow::array::{ArrayRef, Float32Array, Int32Array, Int64Array, ListArray, RecordBatch, StringArray};
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::{DataType, SchemaRef};
use chrono::{DateTime, Utc};
use lake::{
    AppTransaction, Begin, Claim, Input, LakeError, Output, ReleaseRoot, StorageOptions, Zone, manifest, schema,
};
use serde_json::json;

/// One synthetic instruction and what became of it.
struct Row {
    id: &'static str,
    shard: i32,
    text: &'static str,
    tokens: i32,
    finish_reason: &'static str,
    bin: i32,
    distance: f32,
    embedding: [f32; 3],
    selected: bool,
}

#[rustfmt::skip]
const ROWS: [Row; 12] = [
    Row { id: "s0-0", shard: 0, text: "Write a poem about the sea",      tokens: 6,  finish_reason: "stop",   bin: 0, distance: 0.1, embedding: [1.0, 0.0, 0.0],  selected: true },
    Row { id: "s0-1", shard: 0, text: "Write a poem about the sea",      tokens: 6,  finish_reason: "stop",   bin: 0, distance: 0.1, embedding: [1.0, 0.0, 0.0],  selected: true },
    Row { id: "s0-2", shard: 0, text: "write a poem about  the SEA",     tokens: 8,  finish_reason: "stop",   bin: 0, distance: 0.2, embedding: [0.9, 0.1, 0.0],  selected: false },
    Row { id: "s0-3", shard: 0, text: "Write a song about the hills",    tokens: 6,  finish_reason: "stop",   bin: 0, distance: 0.3, embedding: [0.8, 0.6, 0.0],  selected: false },
    Row { id: "s0-4", shard: 0, text: "Sort a list in Rust",             tokens: 5,  finish_reason: "stop",   bin: 1, distance: 0.1, embedding: [0.0, 1.0, 0.0],  selected: true },
    Row { id: "s0-5", shard: 0, text: "Explain borrow checking",         tokens: 17, finish_reason: "length", bin: 1, distance: 0.4, embedding: [0.0, 0.8, 0.6],  selected: true },
    Row { id: "s1-0", shard: 1, text: "Write a limerick about rain",     tokens: 6,  finish_reason: "stop",   bin: 0, distance: 0.5, embedding: [0.6, 0.8, 0.0],  selected: false },
    Row { id: "s1-1", shard: 1, text: "Write a haiku about\nsnow",       tokens: 7,  finish_reason: "stop",   bin: 0, distance: 0.6, embedding: [0.6, 0.0, 0.8],  selected: false },
    Row { id: "s1-2", shard: 1, text: "Translate hello to French",       tokens: 4,  finish_reason: "stop",   bin: 2, distance: 0.1, embedding: [0.0, 0.0, 1.0],  selected: false },
    Row { id: "s1-3", shard: 1, text: "Translate bread to Greek",        tokens: 4,  finish_reason: "stop",   bin: 2, distance: 0.2, embedding: [0.0, 0.1, 0.9],  selected: false },
    Row { id: "s1-4", shard: 1, text: "Reverse a string in Rust",        tokens: 6,  finish_reason: "stop",   bin: 1, distance: 0.2, embedding: [0.0, 0.9, 0.1],  selected: true },
    Row { id: "s1-5", shard: 1, text: "Tell me everything about",        tokens: 32, finish_reason: "length", bin: 2, distance: 0.9, embedding: [-1.0, 0.0, 0.0], selected: false },
];

/// Writes the fixture below `url` and opens it.
pub async fn write(url: &str) -> Result<ReleaseRoot, LakeError> {
    let root = ReleaseRoot::open(url, &StorageOptions { timeout: Duration::from_secs(30) }).await?;
    let all: Vec<&Row> = ROWS.iter().collect();
    for shard in 0..2 {
        // One commit per shard: version 1 has the first alone.
        let rows: Vec<&Row> = ROWS.iter().filter(|row| row.shard == shard).collect();
        append(&root, "tiny", "synthetic", schema::synthetic(), synthetic(&rows), shard.into()).await?;
    }
    append(&root, "tiny", "embeddings", schema::embeddings(), embeddings(&all), 0).await?;
    append(&root, "tiny", "clusters", schema::clusters(), clusters(&all), 0).await?;
    append(&root, "tiny", "histogram", schema::histogram(), histogram(), 0).await?;
    let chosen: Vec<&Row> = ROWS.iter().filter(|row| row.selected).collect();
    append(&root, "tiny", "selected", schema::selected(), selected(&chosen), 0).await?;
    append(&root, "tiny-base", "synthetic", schema::synthetic(), synthetic(&all[..2]), 0).await?;
    manifests(&root).await?;
    Ok(root)
}

async fn append(
    root: &ReleaseRoot,
    run: &str,
    name: &str,
    schema: SchemaRef,
    columns: Vec<ArrayRef>,
    version: i64,
) -> Result<(), LakeError> {
    let table = root.table(&format!("runs/{run}/{name}"));
    let batch =
        RecordBatch::try_new(schema.clone(), columns).map_err(|error| LakeError::Malformed(error.to_string()))?;
    table.create(schema).await?;
    table.append(vec![batch], AppTransaction { id: format!("{run}/fixture/{name}"), version }).await?;
    Ok(())
}

fn texts(rows: &[&Row], column: impl Fn(&Row) -> &str) -> ArrayRef {
    Arc::new(StringArray::from_iter_values(rows.iter().map(|row| column(row))))
}

fn ints(rows: &[&Row], column: impl Fn(&Row) -> i32) -> ArrayRef {
    Arc::new(Int32Array::from_iter_values(rows.iter().map(|row| column(row))))
}

fn synthetic(rows: &[&Row]) -> Vec<ArrayRef> {
    vec![
        texts(rows, |row| row.id),
        ints(rows, |row| row.shard),
        Arc::new(Int64Array::from_iter_values(rows.iter().map(|row| i64::from(row.shard) + 100))),
        texts(rows, |row| row.text),
        ints(rows, |row| row.tokens),
        texts(rows, |row| row.finish_reason),
        Arc::new(Float32Array::from_iter_values(rows.iter().map(|row| -row.tokens as f32 / 8.0))),
    ]
}

fn embeddings(rows: &[&Row]) -> Vec<ArrayRef> {
    let schema = schema::embeddings();
    let DataType::List(element) = schema.field(1).data_type().clone() else {
        panic!("embeddings are lists");
    };
    let values = Float32Array::from_iter_values(rows.iter().flat_map(|row| row.embedding));
    let lists = ListArray::new(element, OffsetBuffer::from_lengths(rows.iter().map(|_| 3)), Arc::new(values), None);
    vec![texts(rows, |row| row.id), Arc::new(lists)]
}

fn clusters(rows: &[&Row]) -> Vec<ArrayRef> {
    let distances = Float32Array::from_iter_values(rows.iter().map(|row| row.distance));
    vec![texts(rows, |row| row.id), ints(rows, |row| row.bin), Arc::new(distances)]
}

fn histogram() -> Vec<ArrayRef> {
    vec![
        Arc::new(Int32Array::from(vec![0, 1, 2])),
        Arc::new(Int64Array::from(vec![20, 60, -4])),
        Arc::new(Int64Array::from(vec![6, 3, 3])),
        Arc::new(Int64Array::from(vec![2, 3, 0])),
    ]
}

fn selected(rows: &[&Row]) -> Vec<ArrayRef> {
    vec![texts(rows, |row| row.id), texts(rows, |row| row.text), ints(rows, |row| row.bin)]
}

/// Manifests of all stages, and a claim of a second synthesize that did not end.
async fn manifests(root: &ReleaseRoot) -> Result<(), LakeError> {
    let model = input("model", "models/tiny-llama", None, Some("0123abcd"));
    let encoder = input("encoder", "models/tiny-bert", None, Some("4567cdef"));
    let corpus = |name: &str, version| input("corpus", &format!("corpora/{name}"), Some(version), None);
    let adapter = |run: &str| input("adapter", &format!("runs/{run}/adapter"), None, Some("89abef01"));
    let texts = |name: &str, run: &str, version| input(name, &format!("runs/{run}/synthetic"), Some(version), None);
    let vectors = |name: &str, run: &str, version| input(name, &format!("runs/{run}/embeddings"), version, None);

    let training = |epsilon: f64| {
        json!({
            "events": [{
                "kind": "poisson_sampled_gaussian", "sampling_probability": 0.25, "noise_multiplier": 1.5, "steps": 4,
            }],
            "epsilon": epsilon, "delta": 1e-5,
        })
    };
    let voting = json!({
        "events": [{ "kind": "discrete_gaussian", "noise_multiplier": 10.0 }],
        "epsilon": 0.4125, "delta": 1e-5,
    });

    let train = claim("tiny", "train", None, vec![corpus("tiny", 7), model.clone()]);
    finish(root, train, &["adapter"], training(2.75)).await?;
    let shard = |index| claim("tiny", "synthesize", Some((index, 2)), vec![model.clone(), adapter("tiny")]);
    finish(root, shard(0), &["synthetic"], json!({ "rows": 6 })).await?;
    manifest::begin(root, shard(1)).await?;
    let embed = claim("tiny", "embed", None, vec![texts("texts", "tiny", 2), encoder.clone()]);
    finish(root, embed, &["embeddings"], json!({ "dimension": 3 })).await?;
    let read = vec![
        texts("candidates", "tiny", 2),
        vectors("embeddings", "tiny", Some(1)),
        corpus("tiny", 7),
        vectors("corpus-embeddings", "tiny", None),
        vectors("baseline-embeddings", "tiny-more", Some(1)),
    ];
    let vote = claim("tiny", "vote", None, read);
    finish(root, vote, &["clusters", "histogram", "selected", "centroids"], voting).await?;

    let train = claim("tiny-other", "train", None, vec![corpus("other", 1), model.clone()]);
    finish(root, train, &["adapter"], training(1.25)).await?;
    let synthesize = claim("tiny-more", "synthesize", None, vec![model, adapter("tiny-other")]);
    finish(root, synthesize, &["synthetic"], json!({ "rows": 2 })).await?;
    let embed = claim("tiny-more", "embed", None, vec![texts("texts", "tiny-more", 1), encoder]);
    finish(root, embed, &["embeddings"], json!({ "dimension": 3 })).await
}

fn input(name: &str, location: &str, version: Option<i64>, digest: Option<&str>) -> Input {
    Input { name: name.into(), location: location.into(), version, digest: digest.map(str::to_string) }
}

fn claim(run: &str, stage: &str, shard: Option<(u32, u32)>, inputs: Vec<Input>) -> Claim {
    Claim {
        run: run.into(),
        stage: stage.into(),
        shard,
        inputs,
        config: json!({ "stage": stage }),
        seeds: vec![1],
        binary: format!("doppel-{stage} 0.1.0"),
        started: DateTime::<Utc>::UNIX_EPOCH,
        command: Vec::new(),
    }
}

async fn finish(root: &ReleaseRoot, claim: Claim, outputs: &[&str], facts: serde_json::Value) -> Result<(), LakeError> {
    let Begin::Fresh(handle) = manifest::begin(root, claim).await? else {
        return Ok(());
    };
    let run = handle.claim.run.clone();
    let output = |name: &&str| {
        let (file, version) = match *name {
            "adapter" => ("adapter", None),
            "centroids" => ("centroids.safetensors", None),
            table => (table, Some(1)),
        };
        Output { name: name.to_string(), path: format!("runs/{run}/{file}"), version }
    };
    handle.finish(outputs.iter().map(output).collect(), facts).await?;
    Ok(())
}
