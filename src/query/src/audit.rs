//! Manifests as tables: which run did what, from which versions, and which ε paid for it.
//!
//! Read from the release root alone. What a stage says about its mechanism stands in its manifest's `facts`; this
//! module copies it and computes nothing of its own, so an auditor sees the claim as it was made.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use arrow::array::{ArrayRef, Float64Array, Int32Array, Int64Array, RecordBatch, StringArray};
use arrow::array::{BooleanArray, TimestampMicrosecondArray};
use arrow::error::ArrowError;
use chrono::{DateTime, Utc};
use datafusion::catalog::TableProvider;
use datafusion::datasource::MemTable;
use futures::{StreamExt, TryStreamExt};
use lake::{Claim, Input, Manifest, Output, ReleaseRoot, Zone, layout, manifest};
use serde_json::Value;

use crate::error::QueryError;

/// The tables that tell of all runs.
pub const TABLES: [&str; 6] = ["runs", "stages", "inputs", "outputs", "releases", "tables"];

/// What vote makes of public vectors alone, before its mechanism counts a vote.
const BEFORE_THE_VOTES: [&str; 2] = ["clusters", "centroids"];

/// Runs, or tables, read at a time.
const CONCURRENCY: usize = 16;

/// A stage as the release root knows it: claimed, and perhaps done.
#[derive(Clone, Debug)]
struct Stage {
    claim: Claim,
    done: Option<Done>,
    /// Whether gc let go of its run: its results are removed, and it stays on record.
    dropped: bool,
}

#[derive(Clone, Debug)]
struct Done {
    outputs: Vec<Output>,
    facts: Value,
    ended: DateTime<Utc>,
}

/// Claims and manifests of all runs.
#[derive(Debug)]
pub struct Audit {
    stages: Vec<Stage>,
}

impl Audit {
    /// Reads every claim and manifest of `root`. A root without any run is [`QueryError::Missing`]: an empty answer
    /// from a root whose name is mistyped would say that nothing was released.
    pub async fn read(root: &ReleaseRoot) -> Result<Self, QueryError> {
        let runs = manifest::list_runs(root).await?;
        if runs.is_empty() && root.list(layout::RUNS).await?.is_empty() {
            return Err(QueryError::Missing(format!(
                "{}: no run is there\nhelp: correct --release, or let a stage write there first",
                root.url()
            )));
        }
        let runs: Vec<Vec<Stage>> = futures::stream::iter(runs)
            .map(|run| async move { read_run(root, &run).await })
            .buffered(CONCURRENCY)
            .try_collect()
            .await?;
        Ok(Self { stages: runs.into_iter().flatten().collect() })
    }

    /// One of [`TABLES`].
    pub async fn table(&self, root: &ReleaseRoot, name: &str) -> Result<Arc<dyn TableProvider>, QueryError> {
        let rows = match name {
            "runs" => self.runs(),
            "stages" => self.stages(),
            "inputs" => self.inputs(),
            "outputs" => self.outputs(),
            "releases" => self.releases(),
            _ => tables(root).await?,
        }
        .map_err(|error| QueryError::Bug(error.to_string()))?;
        Ok(Arc::new(MemTable::try_new(rows.schema(), vec![vec![rows]])?))
    }

    fn runs(&self) -> Result<RecordBatch, ArrowError> {
        let mut runs: BTreeMap<&str, Vec<&Stage>> = BTreeMap::new();
        for stage in &self.stages {
            runs.entry(&stage.claim.run).or_default().push(stage);
        }
        let started = |stages: &Vec<&Stage>| stages.iter().map(|stage| stage.claim.started).min();
        let ended = |stages: &Vec<&Stage>| {
            let ends: Option<Vec<_>> = stages.iter().map(|stage| Some(stage.done.as_ref()?.ended)).collect();
            ends?.into_iter().max()
        };
        let done = |stages: &Vec<&Stage>| stages.iter().filter(|stage| stage.done.is_some()).count() as i64;
        RecordBatch::try_from_iter_with_nullable([
            ("run", texts(runs.keys().map(|run| Some(*run))), false),
            ("started", times(runs.values().map(started)), true),
            ("ended", times(runs.values().map(ended)), true),
            ("claimed", longs(runs.values().map(|stages| Some(stages.len() as i64))), false),
            ("done", longs(runs.values().map(|stages| Some(done(stages)))), false),
            ("dropped", flags(runs.values().map(|stages| stages.iter().any(|stage| stage.dropped))), false),
        ])
    }

    fn stages(&self) -> Result<RecordBatch, ArrowError> {
        let all = || self.stages.iter();
        let done = || self.stages.iter().map(|stage| stage.done.as_ref());
        let mut columns = identity(all());
        columns.extend([
            ("done", flags(done().map(|done| done.is_some())), false),
            ("binary", texts(all().map(|stage| Some(stage.claim.binary.as_str()))), false),
            ("started", times(all().map(|stage| Some(stage.claim.started))), false),
            ("ended", times(done().map(|done| Some(done?.ended))), true),
            ("config", texts(all().map(|stage| Some(stage.claim.config.to_string()))), false),
            ("seeds", texts(all().map(|stage| serde_json::to_string(&stage.claim.seeds).ok())), true),
            ("facts", texts(done().map(|done| Some(done?.facts.to_string()))), true),
        ]);
        RecordBatch::try_from_iter_with_nullable(columns)
    }

    fn inputs(&self) -> Result<RecordBatch, ArrowError> {
        let rows: Vec<(&Stage, &Input)> =
            self.stages.iter().flat_map(|stage| stage.claim.inputs.iter().map(move |input| (stage, input))).collect();
        let mut columns = identity(rows.iter().map(|(stage, _)| *stage));
        columns.extend([
            ("name", texts(rows.iter().map(|(_, input)| Some(input.name.as_str()))), false),
            ("location", texts(rows.iter().map(|(_, input)| Some(input.location.as_str()))), false),
            ("version", longs(rows.iter().map(|(_, input)| input.version)), true),
            ("digest", texts(rows.iter().map(|(_, input)| input.digest.as_deref())), true),
        ]);
        RecordBatch::try_from_iter_with_nullable(columns)
    }

    fn outputs(&self) -> Result<RecordBatch, ArrowError> {
        let rows: Vec<(&Stage, &Output)> = self.stages.iter().flat_map(outputs_of).collect();
        let mut columns = identity(rows.iter().map(|(stage, _)| *stage));
        columns.extend([
            ("name", texts(rows.iter().map(|(_, output)| Some(output.name.as_str()))), false),
            ("path", texts(rows.iter().map(|(_, output)| Some(output.path.as_str()))), false),
            ("version", longs(rows.iter().map(|(_, output)| output.version)), true),
        ]);
        RecordBatch::try_from_iter_with_nullable(columns)
    }

    /// One row per mechanism and output that it has a part in: what it claims to cost, what it read and what it wrote.
    fn releases(&self) -> Result<RecordBatch, ArrowError> {
        let rows: Vec<(&Stage, &Value, &Value, &Output)> = self
            .stages
            .iter()
            .flat_map(|stage| {
                let facts = stage.done.as_ref().map_or(&Value::Null, |done| &done.facts);
                let events = facts["events"].as_array().map_or(&[][..], Vec::as_slice);
                events.iter().flat_map(move |event| released(stage).map(move |output| (stage, facts, event, output)))
            })
            .collect();
        let corpus = |stage: &Stage| stage.claim.inputs.iter().find(|input| input.name == "corpus").cloned();
        let model = |stage: &Stage| stage.claim.inputs.iter().find(|input| input.name == "model").cloned();
        let number = |key: &'static str| {
            Arc::new(Float64Array::from_iter(rows.iter().map(|(_, _, event, _)| event[key].as_f64()))) as ArrayRef
        };
        let fact = |key: &'static str| {
            Arc::new(Float64Array::from_iter(rows.iter().map(|(_, facts, ..)| facts[key].as_f64()))) as ArrayRef
        };
        RecordBatch::try_from_iter_with_nullable([
            ("run", texts(rows.iter().map(|row| Some(row.0.claim.run.as_str()))), false),
            ("stage", texts(rows.iter().map(|row| Some(row.0.claim.stage.as_str()))), false),
            ("mechanism", texts(rows.iter().map(|row| row.2["kind"].as_str())), true),
            ("noise_multiplier", number("noise_multiplier"), true),
            ("sampling_probability", number("sampling_probability"), true),
            ("steps", longs(rows.iter().map(|row| row.2["steps"].as_i64())), true),
            ("epsilon", fact("epsilon"), true),
            ("delta", fact("delta"), true),
            ("corpus", texts(rows.iter().map(|row| Some(corpus(row.0)?.location))), true),
            ("corpus_version", longs(rows.iter().map(|row| corpus(row.0)?.version)), true),
            ("model", texts(rows.iter().map(|row| Some(model(row.0)?.location))), true),
            ("model_digest", texts(rows.iter().map(|row| model(row.0)?.digest)), true),
            ("output", texts(rows.iter().map(|row| Some(row.3.path.as_str()))), false),
            ("output_version", longs(rows.iter().map(|row| row.3.version)), true),
            ("released", times(rows.iter().map(|row| Some(row.0.done.as_ref()?.ended))), true),
            ("dropped", flags(rows.iter().map(|row| row.0.dropped)), false),
        ])
    }
}

/// The stages of one run. A manifest holds its claim, so a claim counts only where there is no manifest yet.
async fn read_run(root: &ReleaseRoot, run: &str) -> Result<Vec<Stage>, QueryError> {
    let dropped = manifest::is_dropped(root, run).await?;
    let mut stages = BTreeMap::new();
    for claim in manifest::claims_of(root, run).await? {
        stages.insert((claim.stage.clone(), claim.shard), Stage { claim, done: None, dropped });
    }
    for manifest in manifest::manifests_of(root, run).await? {
        let Manifest { claim, outputs, facts, ended } = manifest;
        let done = Some(Done { outputs, facts, ended });
        stages.insert((claim.stage.clone(), claim.shard), Stage { claim, done, dropped });
    }
    Ok(stages.into_values().collect())
}

fn outputs_of(stage: &Stage) -> impl Iterator<Item = (&Stage, &Output)> {
    let outputs = stage.done.as_ref().map_or(&[][..], |done| done.outputs.as_slice());
    outputs.iter().map(move |output| (stage, output))
}

/// The outputs in which the stage's mechanism has a part.
fn released(stage: &Stage) -> impl Iterator<Item = &Output> {
    let is_public = |output: &Output| stage.claim.stage == "vote" && BEFORE_THE_VOTES.contains(&output.name.as_str());
    outputs_of(stage).map(|(_, output)| output).filter(move |output| !is_public(output))
}

/// `(run, table)` of all Delta tables of one run, or of all runs, sorted.
pub(crate) async fn tables_of(root: &ReleaseRoot, run: Option<&str>) -> Result<Vec<(String, String)>, QueryError> {
    let prefix = run.map_or_else(|| layout::RUNS.to_string(), layout::run);
    let paths = root.list(&prefix).await?;
    let tables: BTreeSet<(String, String)> = paths
        .iter()
        .filter_map(|path| {
            let (table, _) = path.split_once("/_delta_log/")?;
            let run = layout::run_of(table)?;
            let table = table.strip_prefix(&layout::of_run(run, ""))?;
            (!table.contains('/')).then(|| (run.to_string(), table.to_string()))
        })
        .collect();
    Ok(tables.into_iter().collect())
}

async fn tables(root: &ReleaseRoot) -> Result<Result<RecordBatch, ArrowError>, QueryError> {
    let rows: Vec<(String, String, Option<i64>)> = futures::stream::iter(tables_of(root, None).await?)
        .map(|(run, name)| async move {
            let version = root.table(&layout::of_run(&run, &name)).version().await?;
            Ok::<_, QueryError>((run, name, version))
        })
        .buffered(CONCURRENCY)
        .try_collect()
        .await?;
    Ok(RecordBatch::try_from_iter_with_nullable([
        ("run", texts(rows.iter().map(|row| Some(row.0.as_str()))), false),
        ("name", texts(rows.iter().map(|row| Some(row.1.as_str()))), false),
        ("version", longs(rows.iter().map(|row| row.2)), true),
    ]))
}

/// The columns that say which stage a row is about.
fn identity<'a>(stages: impl Iterator<Item = &'a Stage> + Clone) -> Vec<(&'static str, ArrayRef, bool)> {
    let shard = |stage: &Stage| stage.claim.shard.map(|(index, _)| index as i32);
    let shards = |stage: &Stage| stage.claim.shard.map(|(_, count)| count as i32);
    vec![
        ("run", texts(stages.clone().map(|stage| Some(stage.claim.run.as_str()))), false),
        ("stage", texts(stages.clone().map(|stage| Some(stage.claim.stage.as_str()))), false),
        ("shard", Arc::new(Int32Array::from_iter(stages.clone().map(shard))), true),
        ("shards", Arc::new(Int32Array::from_iter(stages.map(shards))), true),
    ]
}

fn texts<T: AsRef<str>>(values: impl Iterator<Item = Option<T>>) -> ArrayRef {
    Arc::new(StringArray::from_iter(values))
}

fn flags(values: impl Iterator<Item = bool>) -> ArrayRef {
    Arc::new(BooleanArray::from_iter(values.map(Some)))
}

fn longs(values: impl Iterator<Item = Option<i64>>) -> ArrayRef {
    Arc::new(Int64Array::from_iter(values))
}

fn times(values: impl Iterator<Item = Option<DateTime<Utc>>>) -> ArrayRef {
    let micros = values.map(|time| time.map(|time| time.timestamp_micros()));
    Arc::new(TimestampMicrosecondArray::from_iter(micros).with_timezone("UTC"))
}
