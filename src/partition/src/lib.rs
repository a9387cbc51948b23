//! partition: raw conversations become a corpus of instructions with bounded privacy units.
//!
//! The only stage that reads raw data. It reads the inputs twice: [`select`] decides which records stay, holding hashes
//! and no text; [`corpus`] then writes them. Until both the choice and a digest of the inputs are there nothing is
//! written, so an input that turns out to be malformed leaves nothing behind. Both passes are deterministic, so an
//! attempt that was killed can be repeated.
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
pub mod owner;
pub mod record;
pub mod select;

use std::sync::Arc;

use chrono::Utc;
use lake::{
    Begin, Claim, CorpusTerms, Input, Manifest, Output, Private, PrivateRoot, RunHandle, StorageOptions, Zone, layout,
};
use serde::Serialize;
use stage::progress::PrivateProgress;
use stage::{Failure, Summary};
use tokio::sync::mpsc;
use tokio::task::block_in_place;

pub use config::{Args, Config};
pub use error::PartitionError;

use crate::bound::{Choice, Keys};
use crate::config::{Dedup, UnitRule};
use crate::corpus::{Extraction, SplitCounts, Writer};
use crate::input::{Event, Object, QUEUE};
use crate::owner::Owner;
use crate::select::{Counts, Selected, Selection};

const STAGE: &str = "partition";

/// The stage: settings from `args` to a summary.
pub async fn run(args: Args) -> Result<Summary, Failure> {
    let config = Arc::new(Config::new(&args)?);
    let root = args.common.private_root().await?;
    let storage = args.common.storage();
    let claim = claim(&args.common.run, &config);
    if lake::manifest::find(&root, &claim.run, STAGE, None).await?.is_some() {
        // Done already, or a conflict with what was done: `begin` tells which.
        if let Begin::Done(manifest) = lake::manifest::begin(&root, claim.clone()).await? {
            owner::refuse_changed(&root, &config.corpus, &storage).await?;
            return Ok(already_done(&config.corpus, &manifest));
        }
    }
    partition(&root, &config, claim, &storage).await
}

async fn partition(
    root: &PrivateRoot,
    config: &Arc<Config>,
    claim: Claim,
    storage: &StorageOptions,
) -> Result<Summary, Failure> {
    let run = claim.run.clone();
    let mut objects = Vec::new();
    for url in &config.inputs {
        objects.push(Object::open(url, storage).await?);
    }
    let mut owner = Owner { run: run.clone(), inputs: objects.iter().map(|object| object.identity.clone()).collect() };
    owner.refuse_other_run(root, &config.corpus).await?;
    let objects = Arc::new(objects);
    let key = ledger::noise_key(root).await.map_err(PartitionError::from)?;
    let keys = Arc::new(Keys::new(&key, &config.corpus));
    let selected = first_pass(config, &keys, &objects).await?;
    let terms = terms(config, &selected);
    owner.read_digests(storage).await?;
    if config.equal_records_are_units() {
        owner.refuse_copies()?;
    }

    let handle = match lake::manifest::begin(root, claim).await? {
        Begin::Fresh(handle) | Begin::Resumed(handle) => handle,
        Begin::Done(manifest) => return Ok(already_done(&config.corpus, &manifest)),
    };
    owner.take(root, &config.corpus).await?;
    let (table, splits) = second_pass(root, config, keys, &objects, selected.choices, &run).await?;
    let counts = Private::new(AllCounts { steps: selected.counts, splits });
    finish(root, config, handle, &table, &terms, &counts).await?;
    Ok(summary(&config.corpus, &run, config.public_counts.then(|| counts.expose())))
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
        command: stage::command(),
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
    read(config, objects, async |event| {
        match event {
            Event::CutOff { object, records } => cut_off(config, &object, records)?,
            Event::Batch(batch) => block_in_place(|| selection.add(&batch))?,
        }
        progress.tick();
        Ok(())
    })
    .await?;
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
    let table = root.table(&layout::corpus(&config.corpus));
    let mut writer = Writer::open(table, format!("{run}/{STAGE}")).await?;
    let mut extraction = Extraction::new(config.clone(), keys, selection);
    read(config, objects, async |event| {
        if let Event::Batch(batch) = event {
            writer.add(block_in_place(|| extraction.rows(&batch))?).await?;
        }
        progress.tick();
        Ok(())
    })
    .await?;
    if !extraction.is_complete() {
        let last = objects.last().map_or("the input", |object| object.identity.url.as_str());
        return Err(PartitionError::changed(last));
    }
    writer.finish().await
}

/// Reads all inputs in order and hands over what they hold; when `take` fails, the reader ends before this does.
async fn read(
    config: &Arc<Config>,
    objects: &Arc<Vec<Object>>,
    mut take: impl AsyncFnMut(Event) -> Result<(), PartitionError>,
) -> Result<(), PartitionError> {
    let (sender, mut events) = mpsc::channel(QUEUE);
    let (config, objects) = (config.clone(), objects.clone());
    let reader = tokio::spawn(async move {
        for object in objects.iter() {
            object.feed(&config, &sender).await?;
        }
        Ok::<(), PartitionError>(())
    });
    let taken = async {
        while let Some(event) = events.recv().await {
            take(event).await?;
        }
        Ok::<(), PartitionError>(())
    };
    let taken = taken.await;
    drop(events);
    let fed = reader.await.unwrap_or(Err(PartitionError::Bug("the reader of partition panicked")));
    taken.and(fed)
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
) -> Result<(), Failure> {
    terms.write(root, &config.corpus).await?;
    let body = serde_json::to_vec_pretty(counts.expose()).map_err(|error| Failure::Bug(error.to_string()))?;
    root.put(&layout::partition_counts(&handle.claim.run), body.into()).await?;
    let path = layout::corpus(&config.corpus);
    let outputs = vec![Output { name: "corpus".into(), path, version: Some(table.pin().await?) }];
    let facts = serde_json::json!({
        "unit_rule": config.unit_rule.to_string(),
        "dedup": config.dedup,
        "terms": terms,
    });
    handle.finish(outputs, facts).await?;
    Ok(())
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

fn already_done(corpus: &str, manifest: &Manifest) -> Summary {
    Summary {
        text: format!("partition: done already; corpus `{corpus}` is in the private zone"),
        json: serde_json::json!({
            "stage": STAGE, "run": manifest.claim.run, "already_done": true, "corpus": corpus,
        }),
    }
}

fn summary(corpus: &str, run: &str, counts: Option<&AllCounts>) -> Summary {
    let mut json = serde_json::json!({ "stage": STAGE, "run": run, "already_done": false, "corpus": corpus });
    let mut text = format!("partition: corpus `{corpus}` is in the private zone");
    if let Some(AllCounts { steps, splits }) = counts {
        json["counts"] = serde_json::json!({ "steps": steps, "splits": splits });
        text.push_str(&format!(
            ": {} records of {} units from {}; {} train, {} validation, {} test",
            steps.kept, steps.units, steps.read, splits.train, splits.validation, splits.test
        ));
    }
    Summary { text, json }
}
