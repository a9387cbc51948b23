//! partition: raw conversations become a corpus of instructions with bounded privacy units.
//!
//! The only stage that reads raw data. It reads the inputs twice: [`select`] decides which records stay, holding hashes
//! and no text; [`corpus`] then writes them. Between the two nothing is written, so an input that turns out to be
//! malformed leaves nothing behind. Both passes are deterministic, so an attempt that was killed can be repeated.
//!
//! Must never know: models, mechanisms. It spends no budget, but it makes the promise that others rely on: at most
//! `max_per_unit` records of a unit, and a unit in one split only. Start reading at [`run`].

pub mod bound;
pub mod config;
pub mod corpus;
pub mod dedup;
pub mod error;
pub mod input;
pub mod language;
pub mod record;
pub mod select;

use std::sync::Arc;

use chrono::Utc;
use lake::{Begin, Claim, CorpusTerms, Input, Manifest, Output, Private, PrivateRoot, RunHandle, Zone};
use serde::{Deserialize, Serialize};
use stage::progress::PrivateProgress;
use stage::{Failure, Summary};
use tokio::sync::mpsc;

pub use config::{Args, Config};
pub use error::PartitionError;

use crate::bound::{Choice, Keys};
use crate::config::{Dedup, UnitRule};
use crate::corpus::{Extraction, SplitCounts, Writer, changed};
use crate::input::{Event, Identity, Object, QUEUE};
use crate::select::{Counts, Selected, Selection};

const STAGE: &str = "partition";

/// The stage: settings from `args` to a summary.
pub async fn run(args: Args) -> Result<Summary, Failure> {
    let config = Arc::new(Config::new(&args)?);
    let root = args.common.private_root().await?;
    let claim = claim(&args.common.run, &config);
    let corpus = &config.corpus;
    if lake::manifest::find(&root, &claim.run, STAGE, None).await?.is_some() {
        // Done already, or a conflict with what was done: `begin` tells which.
        if let Begin::Done(manifest) = lake::manifest::begin(&root, claim.clone()).await? {
            return Ok(summary(corpus, None, &manifest));
        }
    }
    let report = partition(&root, &config, claim, &args.common.storage()).await?;
    Ok(report)
}

async fn partition(
    root: &PrivateRoot,
    config: &Arc<Config>,
    claim: Claim,
    storage: &lake::StorageOptions,
) -> Result<Summary, Failure> {
    let run = claim.run.clone();
    let mut objects = Vec::new();
    for url in &config.inputs {
        objects.push(Object::open(url, storage).await?);
    }
    let objects = Arc::new(objects);
    let key = ledger::noise_key(root).await.map_err(PartitionError::from)?;
    let keys = Arc::new(Keys::new(&key, &config.corpus));
    let selected = first_pass(config, &keys, &objects).await?;
    let terms = terms(config, &selected);

    let handle = match lake::manifest::begin(root, claim).await? {
        Begin::Fresh(handle) | Begin::Resumed(handle) => handle,
        Begin::Done(manifest) => return Ok(summary(&config.corpus, None, &manifest)),
    };
    own(root, config, &run, &objects).await?;
    let (table, splits) = second_pass(root, config, keys, &objects, selected.choices, &run).await?;
    let counts = Private::new(AllCounts { steps: selected.counts, splits });
    let manifest = finish(root, config, handle, &table, &terms, &counts).await?;
    Ok(summary(&config.corpus, config.public_counts.then(|| counts.expose()), &manifest))
}

fn claim(run: &str, config: &Config) -> Claim {
    let input = |(index, url): (usize, &String)| Input {
        name: format!("input-{index}"),
        location: url.clone(),
        version: None,
        digest: None,
    };
    Claim {
        run: run.to_owned(),
        stage: STAGE.to_owned(),
        shard: None,
        inputs: config.inputs.iter().enumerate().map(input).collect(),
        config: config.as_json(),
        seeds: Vec::new(),
        binary: stage::binary(STAGE),
        started: Utc::now(),
    }
}

/// Which records stay.
async fn first_pass(
    config: &Arc<Config>,
    keys: &Arc<Keys>,
    objects: &Arc<Vec<Object>>,
) -> Result<Selected, PartitionError> {
    let progress = PrivateProgress::new("choosing records");
    let mut selection = Selection::new(config.clone(), keys.clone());
    let (mut events, reader) = read(config, objects);
    while let Some(event) = events.recv().await {
        match event {
            Event::CutOff { object, records } => cut_off(config, &object, records)?,
            Event::Batch(batch) => {
                selection = on_worker(move || selection.add(&batch).map(|()| selection)).await?;
                progress.tick();
            }
        }
    }
    joined(reader.await)?;
    selection.finish()
}

/// Writes the records that stay.
async fn second_pass(
    root: &PrivateRoot,
    config: &Arc<Config>,
    keys: Arc<Keys>,
    objects: &Arc<Vec<Object>>,
    selection: Vec<Choice>,
    run: &str,
) -> Result<(lake::Table, SplitCounts), PartitionError> {
    let progress = PrivateProgress::new("writing the corpus");
    let table = root.table(&format!("corpora/{}", config.corpus));
    let mut writer = Writer::open(table, format!("{run}/{STAGE}")).await?;
    let mut extraction = Extraction::new(config.clone(), keys, selection);
    let (mut events, reader) = read(config, objects);
    while let Some(event) = events.recv().await {
        if let Event::Batch(batch) = event {
            let rows;
            (extraction, rows) = on_worker(move || extraction.rows(&batch).map(|rows| (extraction, rows))).await?;
            writer.add(rows).await?;
            progress.tick();
        }
    }
    joined(reader.await)?;
    if !extraction.is_complete() {
        let last = objects.last().map_or("the input", |object| object.identity.url.as_str());
        return Err(changed(last));
    }
    writer.finish().await
}

type Reader = tokio::task::JoinHandle<Result<(), PartitionError>>;

/// Starts reading all inputs in order; the reader ends when the receiver is dropped.
fn read(config: &Arc<Config>, objects: &Arc<Vec<Object>>) -> (mpsc::Receiver<Event>, Reader) {
    let (sender, receiver) = mpsc::channel(QUEUE);
    let (config, objects) = (config.clone(), objects.clone());
    let reader = tokio::spawn(async move {
        for object in objects.iter() {
            object.feed(&config, &sender).await?;
        }
        Ok(())
    });
    (receiver, reader)
}

async fn on_worker<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, PartitionError> + Send + 'static,
) -> Result<T, PartitionError> {
    joined(tokio::task::spawn_blocking(work).await)
}

fn joined<T>(outcome: Result<Result<T, PartitionError>, tokio::task::JoinError>) -> Result<T, PartitionError> {
    outcome.unwrap_or(Err(PartitionError::Bug("a worker of partition panicked")))
}

fn cut_off(config: &Config, object: &str, records: u64) -> Result<(), PartitionError> {
    if config.strict {
        return Err(PartitionError::Object {
            object: object.to_owned(),
            problem: "cut off: it ends inside a record, or without the `]` of its array".into(),
            help: "fetch it again, or take its whole records by leaving out --strict".into(),
        });
    }
    // PRIVACY: the size of what could be read is as good as the number of records, so it is told only if declared.
    if config.public_counts {
        tracing::warn!(object, records, "the input is cut off; its {records} whole records are taken");
    } else {
        tracing::warn!(
            object,
            "the input is cut off; its whole records are taken (--declare-public-counts tells how many)"
        );
    }
    Ok(())
}

/// Who writes a corpus, and from what: one run, and the same inputs at every attempt.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Owner {
    run: String,
    inputs: Vec<Identity>,
}

/// Makes this run the only one that writes to the corpus, before its first row.
async fn own(root: &PrivateRoot, config: &Config, run: &str, objects: &[Object]) -> Result<(), Failure> {
    let path = format!("corpora/{}.owner.json", config.corpus);
    let owner = Owner { run: run.to_owned(), inputs: objects.iter().map(|object| object.identity.clone()).collect() };
    let body = serde_json::to_vec_pretty(&owner).map_err(|error| Failure::Bug(error.to_string()))?;
    if root.put_if_absent(&path, body.into()).await? {
        return Ok(());
    }
    let place = format!("{}/{path}", root.url());
    let earlier: Owner = serde_json::from_slice(&root.get(&path).await?)
        .map_err(|_| Failure::Input(format!("{place}: not an owner record\nhelp: restore it from a backup")))?;
    if earlier.run != owner.run {
        return Err(Failure::Usage(format!(
            "corpus `{}` exists already: run `{}` wrote it\n\
             help: choose another --corpus; a corpus never changes, since ledger entries refer to it",
            config.corpus, earlier.run
        )));
    }
    if earlier.inputs != owner.inputs {
        return Err(Failure::Input(format!(
            "corpus `{}`: an input changed since an earlier attempt of run `{run}` began to write\n\
             help: partition it under a new --run and --corpus",
            config.corpus
        )));
    }
    Ok(())
}

/// Everything counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
struct AllCounts {
    steps: Counts,
    splits: SplitCounts,
}

async fn finish(
    root: &PrivateRoot,
    config: &Config,
    handle: RunHandle<PrivateRoot>,
    table: &lake::Table,
    terms: &CorpusTerms,
    counts: &Private<AllCounts>,
) -> Result<Manifest, Failure> {
    terms.write(root, &config.corpus).await?;
    let body = serde_json::to_vec_pretty(counts.expose()).map_err(|error| Failure::Bug(error.to_string()))?;
    root.put(&format!("runs/{}/partition-counts.json", handle.claim.run), body.into()).await?;
    let path = format!("corpora/{}", config.corpus);
    let outputs = vec![Output { name: "corpus".into(), path, version: Some(table.pin().await?) }];
    let facts = serde_json::json!({
        "unit_rule": config.unit_rule.to_string(),
        "dedup": config.dedup,
        "terms": terms,
    });
    Ok(handle.finish(outputs, facts).await?)
}

/// The terms under which a guarantee about this corpus holds.
fn terms(config: &Config, selected: &Selected) -> CorpusTerms {
    let column = selected.unit_columns.iter().map(String::as_str).collect::<Vec<_>>().join(" or ");
    let privacy_unit = match &config.unit_rule {
        UnitRule::Whole => column,
        UnitRule::Prefix(separator) => format!("{column} up to the first {separator}"),
        UnitRule::Record => "record".to_owned(),
    };
    let conditions = match config.dedup {
        Dedup::None => Vec::new(),
        Dedup::Exact => vec![condition("equal texts")],
        Dedup::Ngram => vec![condition(&format!("equal texts and shared {}-grams", config.ngram))],
    };
    CorpusTerms { privacy_unit, max_per_unit: config.max_per_unit, conditions }
}

fn condition(compared: &str) -> String {
    format!(
        "deduplication by {compared} compares records of different units: the guarantee holds for the corpus as \
         partitioned, not for the raw data"
    )
}

fn summary(corpus: &str, counts: Option<&AllCounts>, manifest: &Manifest) -> Summary {
    let version = manifest.outputs.first().and_then(|output| output.version);
    let mut json = serde_json::json!({
        "stage": STAGE, "run": manifest.claim.run, "corpus": corpus, "version": version,
    });
    let mut text = format!("corpus `{corpus}` is there (run {}, version {})", manifest.claim.run, version.unwrap_or(0));
    if let Some(AllCounts { steps, splits }) = counts {
        json["counts"] = serde_json::json!({ "steps": steps, "splits": splits });
        text.push_str(&format!(
            ": {} records of {} units from {}; {} train, {} validation, {} test",
            steps.kept, steps.units, steps.read, splits.train, splits.validation, splits.test
        ));
    }
    Summary { text, json }
}
