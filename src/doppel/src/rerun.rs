//! `doppel rerun RUN`: every finished stage once more, from its pinned inputs and under its own noise, and a
//! comparison.
//!
//! A stage runs as its own binary with its recorded flags, and finds its claim, its pins and its reservation; what it
//! wrote the first time is hidden from it by an overlay, and what it writes now lands in a scratch area. So it cannot
//! know that it is a rerun, spends nothing, and changes neither root.
//!
//! PRIVACY: scratch areas of both zones lie in the private root. Two results under equal noise that differ tell
//! something private, so the second stays there and is removed only when it is equal.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use clap::Args;
use lake::{LakeError, Overlay, PrivateRoot, ReleaseRoot, StorageOptions, Zone, layout};
use serde_json::{Value, json};
use stage::common::Overlays;
use stage::{Failure, Summary};
use url::Url;

use crate::anew;
use crate::equal::{Item, Verdict, compare};
use crate::recorded::{Parameters, Recorded, Stage, Starter, flag_and_value};
use crate::roots::{Roots, RootsArgs};
use crate::table::table;
use crate::values::name_value;

/// Repeat a run from its pinned inputs and compare, or make a new release from them.
///
/// Without --as, each finished stage runs again as it was started, on the versions that it read, under the same noise,
/// and every output is compared: tables row for row, adapters tensor for tensor. Nothing is published and nothing is
/// spent. What the stages write lies below reruns/RUN in the private root, and stays there only where something
/// differs, or the rerun did not end: two results under equal noise that differ tell something private, so the second
/// must not be released.
///
/// With --as, the stages but partition run once more under a new run id, on the same corpus version and with the same
/// settings: a new release with fresh noise, which the budget must pay. The same command continues it when interrupted.
///
/// Exit codes: 0 everything that was repeated is equal, or the new release is there; 2 wrong usage, such as a model
/// that is not found; 3 something is not equal, or there is no such run; 4 the budget does not suffice; 5 storage or
/// network.
#[derive(Args, Clone, Debug)]
pub struct RerunArgs {
    /// Run id.
    #[arg(value_name = "RUN", value_parser = stage::common::run_id)]
    pub id: String,
    /// Make a new release under this run id.
    #[arg(long = "as", value_name = "NEW", value_parser = stage::common::run_id)]
    pub new: Option<String>,
    /// Repeat this stage alone, by its name in `doppel show`.
    #[arg(long, value_name = "NAME", conflicts_with = "new")]
    pub stage: Option<String>,
    /// Value of a flag in all stages that were given it, such as model=models/smollm2; repeatable.
    ///
    /// Runs record a model on a local disk by its name alone, so where it lies now must be said, whatever its folder is
    /// called. Without --as its digest must be the recorded one; with --as another is told at the end. Raw inputs are
    /// read where they were.
    #[arg(short, long = "parameter", value_name = "FLAG=VALUE", value_parser = name_value)]
    pub parameters: Vec<(String, String)>,
    /// Where the roots are; both are needed.
    #[command(flatten)]
    pub roots: RootsArgs,
}

/// Repeats a run.
pub async fn rerun(args: RerunArgs) -> Result<Summary, Failure> {
    let run = &args.id;
    // A run that --as made has the claims that this command would make, so it would pass for its own continuation.
    if args.new.as_ref() == Some(run) {
        return Err(Failure::Usage(format!(
            "--as {run}: this is the run to repeat, and a new release needs a run id of its own\n\
             help: choose a run id that `doppel runs` does not list, or leave --as out to repeat {run} and compare"
        )));
    }
    let roots = Roots::open(&args.roots).await?;
    let options = StorageOptions { timeout: Duration::from_secs(args.roots.storage_timeout) };
    let recorded = Recorded::read(&roots, run).await?;
    let starter = Starter::new(roots, options, args.roots.verbosity)?;
    match &args.new {
        Some(new) => anew::release(&starter, &recorded, new, &args.parameters).await,
        None => again(&starter, recorded, &args).await,
    }
}

async fn again(starter: &Starter, recorded: Recorded, args: &RerunArgs) -> Result<Summary, Failure> {
    let mut report = Report::new(&recorded);
    let stages = chosen(&recorded, args.stage.as_deref())?;
    let mut ready = Vec::new();
    for stage in stages {
        match missing_input(starter, stage).await? {
            Some(reason) => report.left_out.push((stage.kind.name.to_owned(), reason)),
            None => ready.push(stage),
        }
    }
    let parameters = Parameters::new(&args.parameters, &ready)?;
    parameters.check(&ready)?;
    let scratch = Scratch::new(&recorded.run);
    for stage in ready {
        tracing::info!(stage = stage.kind.name, shards = stage.shards.len(), "repeating");
        report.outcomes.extend(scratch.repeat(starter, stage, &parameters).await?);
        let now = stage::binary(stage.kind.binary);
        let earlier = stage.shards.iter().map(|shard| &shard.claim.binary).filter(|earlier| **earlier != now);
        report.versions.extend(earlier.map(|earlier| format!("made by {earlier}, repeated by {now}")));
    }
    if report.is_equal() {
        scratch.remove(&starter.private).await?;
        return Ok(report.summary(None));
    }
    let place = (!report.outcomes.is_empty()).then(|| starter.private.url_of(&scratch.path));
    report.summary(place.as_deref()).print(args.roots.format)?;
    Err(Failure::Input(match place {
        None => {
            format!("run {}: nothing was repeated, which shows nothing\nhelp: see above what is missing", recorded.run)
        }
        Some(place) => format!(
            "run {}: the rerun is not equal to it\n\
             help: what it wrote lies at {place} and must not be released, since with equal noise the difference tells \
             something private; remove it when it was looked at",
            recorded.run
        ),
    }))
}

fn chosen<'a>(recorded: &'a Recorded, name: Option<&str>) -> Result<Vec<&'a Stage>, Failure> {
    let stages: Vec<&Stage> =
        recorded.stages.iter().filter(|stage| name.is_none_or(|name| stage.kind.name == name)).collect();
    if !stages.is_empty() {
        return Ok(stages);
    }
    let finished: Vec<&str> = recorded.stages.iter().map(|stage| stage.kind.name).collect();
    let what = name.map_or("no stage".to_owned(), |name| format!("no stage `{name}`"));
    let finished = if finished.is_empty() { "none".to_owned() } else { finished.join(", ") };
    Err(Failure::Input(format!("run {}: {what} has ended\nhelp: finished stages: {finished}", recorded.run)))
}

/// Why a stage's raw input cannot be read any more. Without it the corpus cannot be made again; all else can.
async fn missing_input(starter: &Starter, stage: &Stage) -> Result<Option<String>, Failure> {
    if stage.kind.name != "partition" {
        return Ok(None);
    }
    for input in stage.shards.iter().flat_map(|shard| &shard.claim.inputs) {
        match lake::read_stream(&input.location, &starter.options).await {
            Ok(_) => {}
            Err(LakeError::NotFound(_) | LakeError::Forbidden(_)) => {
                return Ok(Some(format!("its input {} cannot be read", input.location)));
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(None)
}

/// Where a rerun writes, below the private root.
struct Scratch {
    path: String,
}

impl Scratch {
    /// One of its own for each rerun, so that two at a time do not meet.
    fn new(run: &str) -> Self {
        let now = chrono::Utc::now().format("%Y%m%dT%H%M%S");
        Self { path: format!("{}/{run}/{now}-{}", layout::RERUNS, std::process::id()) }
    }

    /// Runs all shards of a stage in one area, apart from those of other stages: each must read what the others wrote
    /// the first time.
    async fn repeat(&self, starter: &Starter, stage: &Stage, parameters: &Parameters) -> Result<Vec<Outcome>, Failure> {
        let area = |zone: &str| starter.private.url_of(&format!("{}/{}/{zone}", self.path, stage.kind.name));
        let (private, release) = (area("private"), area("release"));
        let (outputs, beside) = (outputs(stage), beside(stage));
        let mut own: Vec<String> = outputs.iter().map(|item| item.path.clone()).collect();
        own.extend(stage.shards.iter().map(|shard| shard.claim.manifest_path()));
        let mut hidden = BTreeMap::from([(stage.zone, own)]);
        hidden.entry(PrivateRoot::NAME).or_default().extend(beside.hidden);
        let mut overlay = |zone, scratch: &String| Overlay {
            scratch: scratch.clone(),
            hidden: hidden.remove(zone).unwrap_or_default(),
        };
        let overlays = Overlays {
            private: Some(overlay(PrivateRoot::NAME, &private)),
            release: Some(overlay(ReleaseRoot::NAME, &release)),
        };
        for shard in &stage.shards {
            let flags = parameters.apply(&with_inputs(&shard.claim));
            starter.start(stage.kind, &flags, Some(&overlays)).await?;
        }
        let private = PrivateRoot::open(&private, &starter.options).await?;
        let release = ReleaseRoot::open(&release, &starter.options).await?;
        let of_stage = outputs.into_iter().map(|item| (stage.zone, item));
        let mut outcomes = Vec::new();
        for (zone, item) in of_stage.chain(beside.compared.into_iter().map(|item| (PrivateRoot::NAME, item))) {
            let verdict = match zone {
                ReleaseRoot::NAME => compare(&starter.release, &release, &item).await?,
                _ => compare(&starter.private, &private, &item).await?,
            };
            outcomes.extend(verdict.map(|verdict| Outcome { stage: stage.kind.name, zone, item, verdict }));
        }
        Ok(outcomes)
    }

    async fn remove(&self, private: &PrivateRoot) -> Result<(), Failure> {
        for path in private.list(&self.path).await? {
            private.delete(&path).await?;
        }
        // What is left on a local disk are empty folders, which hurt nobody where they cannot be removed.
        let url = Url::parse(&private.url_of(&self.path)).ok();
        if let Some(folder) = url.and_then(|url| url.to_file_path().ok()) {
            let _ = std::fs::remove_dir_all(&folder);
            // The folders of the run's reruns and of all reruns, unless there are others in them.
            for above in folder.ancestors().skip(1).take(2) {
                let _ = std::fs::remove_dir(above);
            }
        }
        Ok(())
    }
}

/// What the shards of a stage wrote: a table of several shards at the version of the last of them.
fn outputs(stage: &Stage) -> Vec<Item> {
    let mut items: Vec<Item> = Vec::new();
    for output in stage.shards.iter().flat_map(|shard| &shard.outputs) {
        match items.iter_mut().find(|item| item.path == output.path) {
            Some(item) => item.version = item.version.max(output.version),
            None => {
                let (name, path) = (output.name.clone(), output.path.clone());
                items.push(Item { name, path, version: output.version });
            }
        }
    }
    items
}

/// What a stage keeps in the private root besides its outputs.
struct Beside {
    hidden: Vec<String>,
    compared: Vec<Item>,
}

fn beside(stage: &Stage) -> Beside {
    let Some(claim) = stage.shards.first().map(|shard| &shard.claim) else {
        return Beside { hidden: Vec::new(), compared: Vec::new() };
    };
    let (run, corpus) = (&claim.run, claim.config["corpus"].as_str().unwrap_or_default());
    let item = |name: &str, path: String| Item { name: name.to_owned(), path, version: None };
    // Checkpoints, and what votes are bound to.
    let working = layout::working(run, stage.kind.name);
    let (own, compared) = match stage.kind.name {
        "train" | "train-baseline" => (working, vec![item("loss", layout::loss(run, stage.kind.name))]),
        "vote" => {
            let names = [layout::COMPARISON, layout::COMPARISON_BINS];
            (working, names.map(|name| item(name, layout::of_run(run, name))).to_vec())
        }
        "partition" => {
            let (terms, counts) = (item("terms", layout::terms(corpus)), layout::partition_counts(run));
            (layout::owner(corpus), vec![terms, item("counts", counts)])
        }
        _ => (working, Vec::new()),
    };
    let hidden = std::iter::once(own).chain(compared.iter().map(|item| item.path.clone())).collect();
    Beside { hidden, compared }
}

/// The recorded flags, with the places of raw inputs from the claim: in the private root they are written down whole.
fn with_inputs(claim: &lake::Claim) -> Vec<String> {
    let is_input = |word: &&String| flag_and_value(word).0 == "input";
    let mut words: Vec<String> = claim.command.iter().filter(|word| !is_input(word)).cloned().collect();
    if claim.stage == "partition" {
        words.extend(claim.inputs.iter().map(|input| format!("--input={}", input.location)));
    }
    words
}

/// What came of one output.
struct Outcome {
    stage: &'static str,
    zone: &'static str,
    item: Item,
    verdict: Verdict,
}

/// What came of all.
struct Report {
    run: String,
    outcomes: Vec<Outcome>,
    left_out: Vec<(String, String)>,
    versions: BTreeSet<String>,
}

impl Report {
    fn new(recorded: &Recorded) -> Self {
        let (run, left_out) = (recorded.run.clone(), recorded.unfinished.clone());
        Self { run, outcomes: Vec::new(), left_out, versions: BTreeSet::new() }
    }

    fn is_equal(&self) -> bool {
        !self.outcomes.is_empty() && self.outcomes.iter().all(|outcome| outcome.verdict == Verdict::Equal)
    }

    fn summary(&self, scratch: Option<&str>) -> Summary {
        let rows: Vec<Vec<String>> = self.outcomes.iter().map(Outcome::row).collect();
        let mut text = if rows.is_empty() {
            String::new()
        } else {
            table(&["stage", "output", "zone", "result"], &rows, &[]) + "\n\n"
        };
        let unequal = self.outcomes.iter().filter(|outcome| outcome.verdict != Verdict::Equal).count();
        text += &match (self.outcomes.len(), unequal) {
            (0, _) => format!("run {}: nothing was repeated", self.run),
            (all, 0) => format!("run {}: all {all} outputs are equal; nothing was published or spent", self.run),
            (all, unequal) => format!("run {}: {unequal} of {all} outputs are not equal", self.run),
        };
        for (stage, reason) in &self.left_out {
            text += &format!("\nnot repeated: {stage}: {reason}");
        }
        for versions in &self.versions {
            text += &format!("\nother versions: {versions}");
        }
        let left_out = self.left_out.iter().map(|(stage, reason)| json!({ "stage": stage, "reason": reason }));
        let json = json!({
            "run": self.run,
            "equal": self.is_equal(),
            "outputs": self.outcomes.iter().map(Outcome::json).collect::<Vec<_>>(),
            "not_repeated": left_out.collect::<Vec<_>>(),
            "other_versions": self.versions,
            "scratch": scratch,
        });
        Summary { text, json }
    }
}

impl Outcome {
    fn result(&self) -> (bool, Option<&str>) {
        match &self.verdict {
            Verdict::Equal => (true, None),
            Verdict::NotEqual(place) => (false, place.as_deref()),
        }
    }

    fn row(&self) -> Vec<String> {
        let result = match self.result() {
            (true, _) => "equal".to_owned(),
            (false, None) => "not equal".to_owned(),
            (false, Some(place)) => format!("not equal: {place}"),
        };
        vec![self.stage.to_owned(), self.item.name.clone(), self.zone.to_owned(), result]
    }

    fn json(&self) -> Value {
        let (equal, place) = self.result();
        json!({
            "stage": self.stage, "zone": self.zone, "output": self.item.name, "path": self.item.path, "equal": equal,
            "where": place,
        })
    }
}
