//! Run manifests: what made what. One claim when a stage begins, one manifest when it ends.
//!
//! Both are written with a conditional put, so that of two copies of a stage that start at once one claims the run and
//! the other continues with its pins.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use futures::{StreamExt, TryStreamExt};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{LakeError, Zone, layout};

/// One pinned input.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Input {
    /// What the stage calls it, such as `corpus` or `model`.
    pub name: String,
    /// URL or path of the table, folder or object.
    pub location: String,
    /// Table version, for tables.
    pub version: Option<i64>,
    /// Digest of the content, for public inputs only.
    pub digest: Option<String>,
}

/// One output.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Output {
    /// What the stage calls it.
    pub name: String,
    /// Path below the root.
    pub path: String,
    /// Table version, for tables.
    pub version: Option<i64>,
}

/// What a stage says before it starts; a run id is bound to it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Claim {
    /// Run id.
    pub run: String,
    /// Stage name.
    pub stage: String,
    /// `(index, count)` for a sharded stage.
    pub shard: Option<(u32, u32)>,
    /// Pinned inputs. A resumed stage gets those of the first claim, not the latest.
    pub inputs: Vec<Input>,
    /// Everything that changes the result, as JSON.
    pub config: serde_json::Value,
    /// Seeds of public randomness.
    pub seeds: Vec<u64>,
    /// Binary name, version and commit: in a manifest those of the attempt that wrote it, else of the first.
    pub binary: String,
    /// When the first attempt began.
    pub started: DateTime<Utc>,
    /// The flags that this attempt was started with, as far as they say what to do rather than where or how to tell it.
    /// Places on the machine are reduced to their names. Empty in claims of versions that did not write it down; not
    /// among what is compared, since `config` says what follows from it.
    #[serde(default)]
    pub command: Vec<String>,
}

impl Claim {
    /// Path of the manifest that ends this stage, below its root.
    pub fn manifest_path(&self) -> String {
        Paths::new(&self.run, &self.stage, self.shard).manifest
    }
}

/// A finished stage.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// What was claimed.
    pub claim: Claim,
    /// What was written.
    pub outputs: Vec<Output>,
    /// Facts worth keeping that are public: events accounted, steps taken, …
    pub facts: serde_json::Value,
    /// When the last attempt ended.
    pub ended: DateTime<Utc>,
}

/// How a stage finds its run.
#[derive(Debug)]
pub enum Begin<Z: Zone> {
    /// First attempt.
    Fresh(RunHandle<Z>),
    /// An earlier attempt with the same configuration did not finish; use its pins.
    Resumed(RunHandle<Z>),
    /// Done already: nothing to do.
    Done(Manifest),
}

/// An open stage of a run.
#[derive(Debug)]
pub struct RunHandle<Z: Zone> {
    /// The effective claim, with the pins to read and with what runs now.
    pub claim: Claim,
    zone: Z,
}

/// How many objects are read at a time: a run of many shards has a claim and a manifest for each.
const PARALLEL_READS: usize = 16;

/// Closes `run` for good: no stage begins under its id again.
///
/// A run id never means two things. Where the ledger names the run, its reservation stands and its noise is keyed by its
/// content, so a stage that ran once more would publish a second result under equal noise wherever its numbers came out
/// otherwise.
pub async fn close<Z: Zone>(zone: &Z, run: &str) -> Result<(), LakeError> {
    check_name("run id", run)?;
    let mark = format!("{{\"dropped\": \"{}\"}}\n", Utc::now().to_rfc3339());
    zone.put_if_absent(&layout::dropped(run), mark.into()).await.map(drop)
}

/// Whether `run` is [closed](close).
pub async fn is_dropped<Z: Zone>(zone: &Z, run: &str) -> Result<bool, LakeError> {
    check_name("run id", run)?;
    Ok(read::<Z, Value>(zone, &layout::dropped(run)).await?.is_some())
}

/// Refuses a run that is [closed](close) in `zone`. [`begin`] does so where it claims; a stage that spends also asks the
/// private root, where the reservation and the noise key are, whichever release root it is given.
pub async fn refuse_dropped<Z: Zone>(zone: &Z, run: &str) -> Result<(), LakeError> {
    if !is_dropped(zone, run).await? {
        return Ok(());
    }
    Err(LakeError::Conflict(format!(
        "{}: run {run} was dropped: its results are removed, and what it was stays on record\n\
         help: choose another --run",
        zone.url_of(&layout::dropped(run))
    )))
}

/// Claims (run, stage, shard) in `zone`: `inputs` of an earlier claim win if only their versions moved on, or if what
/// has a digest lies elsewhere; another configuration or other inputs are [`LakeError::Conflict`] naming what differs.
/// So they are where another shard of the run has them: a stage is one thing, whoever does its parts.
pub async fn begin<Z: Zone>(zone: &Z, claim: Claim) -> Result<Begin<Z>, LakeError> {
    check_name("run id", &claim.run)?;
    check_name("stage", &claim.stage)?;
    refuse_dropped(zone, &claim.run).await?;
    let paths = Paths::new(&claim.run, &claim.stage, claim.shard);
    if let Some(manifest) = read::<Z, Manifest>(zone, &paths.manifest).await? {
        compare(zone, &paths.manifest, &manifest.claim, &claim)?;
        refuse_other_pins(zone, &manifest.claim)?;
        return Ok(Begin::Done(manifest));
    }
    refuse_other_shards(zone, &claim).await?;
    refuse_other_pins(zone, &claim)?;
    if zone.put_if_absent(&paths.claim, encode(&claim)?.into()).await? {
        // Of two shards that begin at once, the later one at least sees the other now.
        refuse_other_shards(zone, &claim).await?;
        return Ok(Begin::Fresh(RunHandle { claim, zone: zone.clone() }));
    }
    let earlier: Claim = read(zone, &paths.claim)
        .await?
        .ok_or_else(|| LakeError::Transient(format!("{}: removed while it was read", zone.url_of(&paths.claim))))?;
    compare(zone, &paths.claim, &earlier, &claim)?;
    refuse_other_pins(zone, &earlier)?;
    let resumed = Claim { binary: claim.binary, command: claim.command, ..earlier };
    Ok(Begin::Resumed(RunHandle { claim: resumed, zone: zone.clone() }))
}

/// The manifest of a finished stage, or `None`.
pub async fn find<Z: Zone>(
    zone: &Z,
    run: &str,
    stage: &str,
    shard: Option<(u32, u32)>,
) -> Result<Option<Manifest>, LakeError> {
    check_name("run id", run)?;
    let path = Paths::new(run, stage, shard).manifest;
    let found: Option<Manifest> = read(zone, &path).await?;
    if let Some(manifest) = &found {
        check_place(zone, &path, &manifest.claim)?;
    }
    Ok(found)
}

/// Ids of all runs that left a claim or a manifest in `zone`, sorted.
pub async fn list_runs<Z: Zone>(zone: &Z) -> Result<Vec<String>, LakeError> {
    let paths = stage_objects(zone, layout::RUNS).await?;
    let mut runs: Vec<String> = paths.iter().filter_map(|path| layout::run_of(path)).map(str::to_string).collect();
    runs.dedup();
    Ok(runs)
}

/// All manifests in `zone`, by run, stage and shard.
pub async fn manifests<Z: Zone>(zone: &Z) -> Result<Vec<Manifest>, LakeError> {
    read_all(zone, layout::RUNS, false).await
}

/// The manifests of one run.
pub async fn manifests_of<Z: Zone>(zone: &Z, run: &str) -> Result<Vec<Manifest>, LakeError> {
    check_name("run id", run)?;
    read_all(zone, &layout::run(run), false).await
}

/// The claims of one run, of finished and of unfinished stages.
pub async fn claims_of<Z: Zone>(zone: &Z, run: &str) -> Result<Vec<Claim>, LakeError> {
    check_name("run id", run)?;
    read_all(zone, &layout::run(run), true).await
}

impl<Z: Zone> RunHandle<Z> {
    /// Writes the manifest: the stage is done. Where another copy of the stage was first, its manifest stands.
    pub async fn finish(self, outputs: Vec<Output>, facts: serde_json::Value) -> Result<Manifest, LakeError> {
        let path = Paths::new(&self.claim.run, &self.claim.stage, self.claim.shard).manifest;
        let manifest = Manifest { claim: self.claim, outputs, facts, ended: Utc::now() };
        if self.zone.put_if_absent(&path, encode(&manifest)?.into()).await? {
            return Ok(manifest);
        }
        let earlier: Manifest = read(&self.zone, &path)
            .await?
            .ok_or_else(|| LakeError::Transient(format!("{}: removed while it was read", self.zone.url_of(&path))))?;
        compare(&self.zone, &path, &earlier.claim, &manifest.claim)?;
        Ok(earlier)
    }
}

struct Paths {
    claim: String,
    manifest: String,
}

impl Paths {
    fn new(run: &str, stage: &str, shard: Option<(u32, u32)>) -> Self {
        let shard = shard.map(|(index, count)| format!(".{index}-of-{count}")).unwrap_or_default();
        let stem = format!("{}/{stage}{shard}", layout::stages(run));
        Self { claim: format!("{stem}.claim.json"), manifest: format!("{stem}.json") }
    }
}

/// Run ids become folder names and parts of transaction ids, so they are plain.
fn check_name(what: &str, name: &str) -> Result<(), LakeError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if name.is_empty() || name.len() > 128 || name.starts_with('.') || !name.chars().all(plain) {
        return Err(LakeError::Usage(format!(
            "{what} `{name}`: expected 1 to 128 letters, digits, `_`, `-` or `.`, not beginning with a dot"
        )));
    }
    Ok(())
}

fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, LakeError> {
    serde_json::to_vec_pretty(value)
        .map_err(|_| LakeError::Usage("a setting cannot be written as JSON\nhelp: a number is not finite".into()))
}

fn parse<Z: Zone, T: DeserializeOwned>(zone: &Z, path: &str, body: &[u8]) -> Result<T, LakeError> {
    serde_json::from_slice(body).map_err(|error| {
        // Names of fields are ours; values may be anything, so serde's words about those are not repeated.
        let text = error.to_string();
        let known = ["missing field", "unknown field", "duplicate field"];
        let what = match known.iter().any(|start| text.starts_with(start)) {
            true => {
                text.split(", expected").next().and_then(|text| text.split(" at line").next()).unwrap_or("").to_string()
            }
            false => "not the expected JSON".into(),
        };
        LakeError::Malformed(format!(
            "{}: line {}, column {}: {what}\nhelp: doppel writes this object itself; restore it, or use another run id",
            zone.url_of(path),
            error.line(),
            error.column()
        ))
    })
}

async fn read<Z: Zone, T: DeserializeOwned>(zone: &Z, path: &str) -> Result<Option<T>, LakeError> {
    match zone.get(path).await {
        Ok(body) => parse(zone, path, &body).map(Some),
        Err(LakeError::NotFound(_)) => Ok(None),
        Err(error) => Err(error),
    }
}

/// What is at each of `paths`; `None` where it is gone by now.
async fn read_each<Z: Zone, T: DeserializeOwned>(zone: &Z, paths: Vec<String>) -> Result<Vec<Option<T>>, LakeError> {
    let reads = paths.into_iter().map(|path| async move { read(zone, &path).await });
    futures::stream::iter(reads).buffered(PARALLEL_READS).try_collect().await
}

async fn stage_objects<Z: Zone>(zone: &Z, below: &str) -> Result<Vec<String>, LakeError> {
    let mut paths = zone.list(below).await?;
    paths.retain(|path| {
        let parts: Vec<&str> = path.split('/').collect();
        matches!(parts[..], [layout::RUNS, _, layout::STAGES, name] if name.ends_with(".json"))
    });
    Ok(paths)
}

async fn read_all<Z: Zone, T: DeserializeOwned>(zone: &Z, below: &str, claims: bool) -> Result<Vec<T>, LakeError> {
    let mut paths = stage_objects(zone, below).await?;
    paths.retain(|path| path.ends_with(".claim.json") == claims);
    Ok(read_each(zone, paths).await?.into_iter().flatten().collect())
}

/// A run is cut into shards once: others would write the same rows again under other transaction ids. And all shards
/// have the same settings and inputs: their rows stand in one table, under one name.
async fn refuse_other_shards<Z: Zone>(zone: &Z, claim: &Claim) -> Result<(), LakeError> {
    let own = Paths::new(&claim.run, &claim.stage, claim.shard).claim;
    let mut others = Vec::new();
    for path in stage_objects(zone, &layout::stages(&claim.run)).await? {
        let name = path.rsplit('/').next().unwrap_or_default();
        let Some(rest) = name.strip_suffix(".claim.json").and_then(|name| name.strip_prefix(&claim.stage)) else {
            continue;
        };
        let earlier = match rest.strip_prefix('.') {
            None if rest.is_empty() => None,
            None => continue,
            Some(shard) => shard.split_once("-of-").and_then(|(_, count)| count.parse().ok()),
        };
        refuse_other_count(zone, &path, earlier, claim)?;
        if path != own {
            others.push(path);
        }
    }
    for (path, other) in others.iter().zip(read_each(zone, others.clone()).await?) {
        if let Some(other) = other {
            compare(zone, path, &other, claim)?;
        }
    }
    Ok(())
}

fn refuse_other_count<Z: Zone>(zone: &Z, path: &str, earlier: Option<u32>, claim: &Claim) -> Result<(), LakeError> {
    let now = claim.shard.map(|(_, count)| count);
    if earlier == now {
        return Ok(());
    }
    let say = |count: Option<u32>| count.map_or("one piece".to_string(), |count| format!("{count} shards"));
    Err(LakeError::Conflict(format!(
        "{}: {} of run {} was begun in {}, now in {}\nhelp: keep the count, or use another --run",
        zone.url_of(path),
        claim.stage,
        claim.run,
        say(earlier),
        say(now)
    )))
}

/// Every version that was asked for is the one that the stage reads.
fn refuse_other_pins<Z: Zone>(zone: &Z, claim: &Claim) -> Result<(), LakeError> {
    for (table, asked) in zone.pins() {
        let of_table = || claim.inputs.iter().filter(|input| input.location == *table);
        if of_table().any(|input| input.version == Some(*asked)) {
            continue;
        }
        let Some(read) = of_table().find_map(|input| input.version) else {
            let tables = claim.inputs.iter().filter(|input| input.version.is_some());
            let tables: Vec<&str> = tables.map(|input| input.location.as_str()).collect();
            return Err(LakeError::Usage(format!(
                "--pin {table}={asked}: {} of run {} does not read it\nhelp: it reads {}",
                claim.stage,
                claim.run,
                if tables.is_empty() { "no table".into() } else { tables.join(", ") }
            )));
        };
        return Err(LakeError::Conflict(format!(
            "--pin {table}={asked}: {} of run {} reads version {read}, which this run, or a stage that it follows, \
             pinned before\nhelp: leave the pin out, or use another --run",
            claim.stage, claim.run
        )));
    }
    Ok(())
}

fn check_place<Z: Zone>(zone: &Z, path: &str, claim: &Claim) -> Result<(), LakeError> {
    let paths = Paths::new(&claim.run, &claim.stage, claim.shard);
    if path != paths.claim && path != paths.manifest {
        return Err(LakeError::Malformed(format!(
            "{}: it speaks of another run, stage or shard\n\
             help: doppel writes this object itself; restore it, or use another run id",
            zone.url_of(path)
        )));
    }
    Ok(())
}

/// Refuses other settings or inputs than those of a claim of the same stage at `path`.
fn compare<Z: Zone>(zone: &Z, path: &str, earlier: &Claim, now: &Claim) -> Result<(), LakeError> {
    check_place(zone, path, earlier)?;
    let differences = differences(earlier, now);
    if differences.is_empty() {
        return Ok(());
    }
    Err(LakeError::Conflict(format!(
        "run {} has {} already, with other settings ({}):\n{}\nhelp: use the earlier settings, or another --run",
        now.run,
        now.stage,
        zone.url_of(path),
        differences.join("\n")
    )))
}

/// One line for each setting and input that differs: name, earlier, now.
fn differences(earlier: &Claim, now: &Claim) -> Vec<String> {
    let (before, after) = (settings(earlier), settings(now));
    let mut names: Vec<&String> = before.keys().chain(after.keys()).collect();
    names.sort();
    names.dedup();
    let show = |value: Option<&String>| value.cloned().unwrap_or("(not set)".into());
    names
        .into_iter()
        .filter(|&name| before.get(name) != after.get(name))
        .map(|name| format!("  {name}: earlier {}, now {}", show(before.get(name)), show(after.get(name))))
        .collect()
}

fn settings(claim: &Claim) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    flatten("", &claim.config, &mut found);
    found.insert("seeds".into(), format!("{:?}", claim.seeds));
    for input in &claim.inputs {
        // A table may have moved on, and its digest with it; whatever has no version must be the same, byte for byte,
        // and then may lie elsewhere.
        match (input.version, &input.digest) {
            (None, Some(digest)) => found.insert(format!("digest of input {}", input.name), digest.clone()),
            _ => found.insert(format!("input {}", input.name), input.location.clone()),
        };
    }
    found
}

fn flatten(name: &str, value: &Value, into: &mut BTreeMap<String, String>) {
    match value {
        Value::Object(fields) if !fields.is_empty() => {
            for (field, value) in fields {
                let name = if name.is_empty() { field.clone() } else { format!("{name}.{field}") };
                flatten(&name, value, into);
            }
        }
        // A setting that a newer version added and leaves unset is the same as one that an older did not know.
        Value::Null => {}
        other => {
            into.insert(if name.is_empty() { "config".into() } else { name.into() }, other.to_string());
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::{ReleaseRoot, StorageOptions};

    async fn root() -> (tempfile::TempDir, ReleaseRoot) {
        let folder = tempfile::tempdir().unwrap();
        let root = ReleaseRoot::open(&folder.path().display().to_string(), &StorageOptions::default()).await.unwrap();
        (folder, root)
    }

    fn claim(config: Value, version: i64) -> Claim {
        Claim {
            run: "demo".into(),
            stage: "synthesize".into(),
            shard: Some((0, 2)),
            inputs: vec![Input {
                name: "adapter".into(),
                location: "runs/demo/adapter".into(),
                version: Some(version),
                digest: None,
            }],
            config,
            seeds: vec![7],
            binary: "doppel-synthesize 0.1.0".into(),
            started: DateTime::UNIX_EPOCH,
            command: vec![],
        }
    }

    #[tokio::test]
    async fn a_stage_is_fresh_then_resumed_with_its_first_pins_then_done() {
        let (_folder, root) = root().await;
        let config = json!({"top_p": 0.1 + 0.2, "count": 10});
        assert!(matches!(begin(&root, claim(config.clone(), 3)).await.unwrap(), Begin::Fresh(_)));
        let Begin::Resumed(handle) = begin(&root, claim(config.clone(), 5)).await.unwrap() else {
            panic!("expected a resumed run")
        };
        assert_eq!(handle.claim.inputs[0].version, Some(3));
        let manifest = handle.finish(vec![], json!({"rows": 10})).await.unwrap();
        let Begin::Done(found) = begin(&root, claim(config, 9)).await.unwrap() else { panic!("expected a done run") };
        assert_eq!(found, manifest);
        assert_eq!(find(&root, "demo", "synthesize", Some((0, 2))).await.unwrap(), Some(manifest.clone()));
        assert_eq!(find(&root, "demo", "synthesize", Some((1, 2))).await.unwrap(), None);
        assert_eq!(manifests(&root).await.unwrap(), vec![manifest]);
        assert_eq!(list_runs(&root).await.unwrap(), vec!["demo"]);
    }

    #[tokio::test]
    async fn other_settings_are_refused_by_name() {
        let (_folder, root) = root().await;
        begin(&root, claim(json!({"top_p": 0.95, "count": 10}), 3)).await.unwrap();
        let error = begin(&root, claim(json!({"top_p": 0.9, "count": 10, "top_k": 5}), 3)).await.unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, LakeError::Conflict(_)));
        assert!(text.contains("  top_p: earlier 0.95, now 0.9"), "{text}");
        assert!(text.contains("  top_k: earlier (not set), now 5"), "{text}");
        assert!(!text.contains("count"), "{text}");
    }

    #[tokio::test]
    async fn a_pin_that_the_stage_does_not_read_at_that_version_is_refused() {
        let (_folder, root) = root().await;
        let pins = |table: &str, version| [(table.to_owned(), version)].into_iter().collect();
        let other = root.clone().pinned(pins("corpora/chats", 0));
        let error = begin(&other, claim(json!({}), 3)).await.unwrap_err();
        assert!(matches!(&error, LakeError::Usage(text) if text.contains("it reads runs/demo/adapter")), "{error}");
        assert!(root.list("").await.unwrap().is_empty(), "a refused stage left a claim");
        let pinned = root.clone().pinned(pins("runs/demo/adapter", 3));
        assert!(matches!(begin(&pinned, claim(json!({}), 3)).await.unwrap(), Begin::Fresh(_)));
        let moved = root.clone().pinned(pins("runs/demo/adapter", 5));
        let error = begin(&moved, claim(json!({}), 5)).await.unwrap_err();
        assert!(matches!(&error, LakeError::Conflict(text) if text.contains("reads version 3")), "{error}");
    }

    #[tokio::test]
    async fn a_manifest_names_the_command_and_the_binary_that_wrote_it() {
        let (_folder, root) = root().await;
        let mut first = claim(json!({}), 3);
        first.command = vec!["--device=cuda".into()];
        first.binary = "doppel-synthesize 0.0.9".into();
        begin(&root, first.clone()).await.unwrap();
        let mut second = claim(json!({}), 3);
        second.command = vec!["--device=cpu".into()];
        let Begin::Resumed(handle) = begin(&root, second.clone()).await.unwrap() else {
            panic!("expected a resumed run")
        };
        let manifest = handle.finish(vec![], json!({})).await.unwrap();
        assert_eq!((&manifest.claim.command, &manifest.claim.binary), (&second.command, &second.binary));
        assert_eq!(claims_of(&root, "demo").await.unwrap(), [first.clone()]);
        let mut older = serde_json::to_value(&first).unwrap();
        older.as_object_mut().unwrap().remove("command");
        assert_eq!(serde_json::from_value::<Claim>(older).unwrap().command, Vec::<String>::new());
    }

    #[tokio::test]
    async fn another_number_of_shards_is_refused() {
        let (_folder, root) = root().await;
        begin(&root, claim(json!({}), 3)).await.unwrap();
        let mut other = claim(json!({}), 3);
        other.shard = Some((1, 4));
        let error = begin(&root, other).await.unwrap_err().to_string();
        assert!(error.contains("2 shards, now in 4 shards"), "{error}");
    }

    #[tokio::test]
    async fn shards_of_a_run_have_the_same_settings_and_inputs() {
        let (_folder, root) = root().await;
        let shard = |index, count: u64, location: &str| {
            let mut claim = claim(json!({ "count": count }), 3);
            claim.shard = Some((index, 2));
            claim.inputs[0].location = location.into();
            claim
        };
        begin(&root, shard(0, 10, "runs/demo/adapter")).await.unwrap();
        for (other, expected) in [
            (shard(1, 20, "runs/demo/adapter"), "  count: earlier 10, now 20"),
            (shard(1, 10, "runs/other/adapter"), "  input adapter: earlier runs/demo/adapter, now runs/other/adapter"),
        ] {
            let error = begin(&root, other).await.unwrap_err().to_string();
            assert!(error.contains(expected) && error.contains("0-of-2.claim.json"), "{error}");
        }
        assert_eq!(claims_of(&root, "demo").await.unwrap().len(), 1, "a refused shard left a claim");
        begin(&root, shard(1, 10, "runs/demo/adapter")).await.unwrap();
    }

    #[tokio::test]
    async fn what_has_a_digest_may_lie_elsewhere() {
        let (_folder, root) = root().await;
        let model = |location: &str, digest: &str| {
            let mut claim = claim(json!({}), 3);
            let digest = Some(digest.into());
            claim.inputs = vec![Input { name: "model".into(), location: location.into(), version: None, digest }];
            claim
        };
        begin(&root, model("smol", "c0ffee")).await.unwrap();
        assert!(matches!(begin(&root, model("snapshot", "c0ffee")).await.unwrap(), Begin::Resumed(_)));
        let error = begin(&root, model("smol", "f00d")).await.unwrap_err().to_string();
        assert!(error.contains("digest of input model: earlier c0ffee, now f00d"), "{error}");
    }

    #[tokio::test]
    async fn a_manifest_edited_by_hand_is_named_with_the_place() {
        let (_folder, root) = root().await;
        begin(&root, claim(json!({}), 3)).await.unwrap();
        let path = "runs/demo/stages/synthesize.0-of-2.claim.json";
        root.put(path, "{\n \"run\": \"secret text\", 5".into()).await.unwrap();
        let error = begin(&root, claim(json!({}), 3)).await.unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, LakeError::Malformed(_)), "{text}");
        assert!(text.contains("synthesize.0-of-2.claim.json: line 2") && !text.contains("secret"), "{text}");
    }

    #[tokio::test]
    async fn a_run_id_that_would_leave_its_folder_is_refused() {
        let (_folder, root) = root().await;
        let mut odd = claim(json!({}), 3);
        odd.run = "../private".into();
        assert!(matches!(begin(&root, odd).await.unwrap_err(), LakeError::Usage(_)));
    }
}
