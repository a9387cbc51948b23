//! What nothing retained refers to, and its removal.
//!
//! The log of a table says from which version to which each of its data files lived, so the files to keep follow from
//! the versions to keep; files that no version names were left behind by writers that were killed. `deltalake`'s vacuum
//! is not used: it commits twice itself, and the first commit cleans the log up, which pinned versions need.
//!
//! Nothing younger than a minimum age is removed: a writer may be about to commit it, or a reader has just pinned it.
//! A table that goes whole goes from the end of its log: checkpoints, then commits from the newest to the first, then
//! data files. So whenever it is interrupted, what is left is an older version that can be read, or files without a
//! table; and claims go last, so that the run is still listed and can be dropped again.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use chrono::{DateTime, Utc};
use futures::{StreamExt, TryStreamExt};
use serde::Deserialize;

use crate::files::decoded;
use crate::layout::{self, run_of};
use crate::store::Stored;
use crate::{LakeError, Zone};

/// Reads and deletes that are in flight at a time.
const PARALLEL: usize = 16;

/// What has to stay.
#[derive(Clone, Debug, Default)]
pub struct Retained {
    /// Inputs and outputs that retained claims and manifests, or ledger entries, name.
    pub pins: Vec<Pin>,
    /// Runs to remove, each with the reason why its claims and manifests stay, where there is one.
    pub dropped: BTreeMap<String, Option<&'static str>>,
    /// Whether `pins` may lack some, as where one root alone is known: then every version stays.
    pub every_version: bool,
    /// Nothing that was written after this time goes.
    pub before: DateTime<Utc>,
}

/// One path below a root that something retained names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pin {
    /// Path of a table, a folder or an object.
    pub path: String,
    /// Version, for tables.
    pub version: Option<i64>,
    /// The run that names it; `None` for the ledger.
    pub run: Option<String>,
}

/// Why an object goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reason {
    /// No version of its table names it.
    Orphan,
    /// Only versions that nothing pins name it.
    Superseded,
    /// Its run is dropped.
    DroppedRun,
    /// It belongs to a scratch area of a rerun.
    Scratch,
    /// A write to a local folder that was cut short.
    Unfinished,
}

impl Reason {
    /// In words.
    pub fn text(self) -> &'static str {
        match self {
            Reason::Orphan => "no version of the table names it",
            Reason::Superseded => "only versions that nothing pins name it",
            Reason::DroppedRun => "its run is dropped",
            Reason::Scratch => "scratch of a rerun",
            Reason::Unfinished => "a write that was cut short",
        }
    }
}

/// One object to remove.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Removal {
    /// Path below the root.
    pub path: String,
    /// The table, run or area that it belongs to.
    pub place: String,
    /// Bytes.
    pub size: u64,
    /// Why.
    pub reason: Reason,
    step: Step,
}

/// Removals in this order never leave a table unreadable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Step {
    /// Nothing depends on it.
    Loose,
    /// Speeds the reading of a log up.
    Checkpoint,
    /// Makes a version.
    Commit,
    /// What no table names any more.
    Data,
    Manifest,
    Claim,
}

impl Step {
    /// Whether paths go from the last to the first, one by one: the pointer `_last_checkpoint` before what it points to,
    /// and the newest commit before older ones.
    fn backwards(self) -> bool {
        matches!(self, Step::Checkpoint | Step::Commit)
    }
}

/// What of a dropped run stays, and for whom.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Kept {
    /// Path below the root.
    pub path: String,
    /// Who needs it, in words.
    pub reason: String,
}

/// What to remove, in order, and what stays although its run is dropped.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    /// Objects to remove.
    pub removals: Vec<Removal>,
    /// What stays for somebody.
    pub kept: Vec<Kept>,
}

/// When `run` last wrote to `zone`; `None` where nothing of it is left but the mark that it is dropped.
pub async fn last_write<Z: Zone>(zone: &Z, run: &str) -> Result<Option<DateTime<Utc>>, LakeError> {
    let objects = zone.store().list_stored(&layout::run(run)).await?;
    Ok(objects.iter().filter(|object| !object.path.ends_with(layout::DROPPED)).map(|object| object.modified).max())
}

/// Looks what can go from `zone`; removes nothing.
pub async fn plan<Z: Zone>(zone: &Z, retained: &Retained) -> Result<Plan, LakeError> {
    let mut plan = Plan::default();
    let objects = zone.store().list_stored("").await?;
    let tables = tables(&objects);
    let (dropped, rest): (Vec<&Stored>, Vec<&Stored>) =
        objects.iter().partition(|object| run_of(&object.path).is_some_and(|run| retained.dropped.contains_key(run)));
    let stay = drop_runs(&dropped, &tables, retained, &mut plan);
    let mut pinned: HashMap<&str, Vec<i64>> = HashMap::new();
    for pin in &retained.pins {
        pinned.entry(&pin.path).or_default().extend(pin.version);
    }
    for table in tables.iter().filter(|table| is_ours(table)) {
        let gone = run_of(table).is_some_and(|run| retained.dropped.contains_key(run)) && !stay.contains(*table);
        if !gone {
            let pinned = pinned.get(table).map_or(&[][..], Vec::as_slice);
            shrink(zone, (table, inside(&objects, table)), pinned, retained, &mut plan).await?;
        }
    }
    if Z::NAME == crate::PrivateRoot::NAME {
        clear_scratch(&rest, retained, &mut plan);
    }
    for object in zone.store().list_unfinished()? {
        if object.modified < retained.before {
            plan.removals.push(removal(&object, "unfinished writes", Reason::Unfinished, Step::Loose));
        }
    }
    plan.removals.sort_by(|a, b| {
        let by_path = a.path.cmp(&b.path);
        a.step.cmp(&b.step).then(if a.step.backwards() { by_path.reverse() } else { by_path })
    });
    plan.kept.sort();
    Ok(plan)
}

/// Removes what `plan` says. Safe to interrupt: a new plan has what is left.
pub async fn remove<Z: Zone>(zone: &Z, plan: &Plan) -> Result<(), LakeError> {
    for step in plan.removals.chunk_by(|a, b| a.step == b.step) {
        let parallel = if step[0].step.backwards() { 1 } else { PARALLEL };
        let deletes = step.iter().map(|removal| async move {
            match removal.reason {
                Reason::Unfinished => zone.store().delete_unfinished(&removal.path).await,
                _ => zone.delete(&removal.path).await,
            }
        });
        // A stream of borrowed futures that keep their order.
        futures::stream::iter(deletes).buffered(parallel).try_collect::<Vec<()>>().await?;
    }
    Ok(())
}

fn removal(object: &Stored, place: &str, reason: Reason, step: Step) -> Removal {
    Removal { path: object.path.clone(), place: place.to_string(), size: object.size, reason, step }
}

/// Paths of tables: folders with a log.
fn tables(objects: &[Stored]) -> BTreeSet<&str> {
    objects.iter().filter_map(|object| Some(object.path.split_once("/_delta_log/")?.0)).collect()
}

/// Tables of other programs are their own concern.
fn is_ours(table: &str) -> bool {
    run_of(table).is_some() || layout::is_of_corpus(table)
}

/// Whether `path` is `folder` or lies in it.
fn within(path: &str, folder: &str) -> bool {
    path.strip_prefix(folder.trim_end_matches('/')).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// The objects that lie in `folder`, of all by path.
fn inside<'a>(objects: &'a [Stored], folder: &str) -> &'a [Stored] {
    // What follows the slash of a folder sorts before the next character in its place.
    let (first, end) = (format!("{folder}/"), format!("{folder}0"));
    let place = |bound: &str| objects.partition_point(|object| object.path.as_str() < bound);
    &objects[place(&first)..place(&end)]
}

/// The folders that `path` lies in, from the outermost one, and itself.
fn ancestors(path: &str) -> impl Iterator<Item = &str> {
    path.match_indices('/').map(|(end, _)| &path[..end]).chain([path])
}

/// The table that the object at `path` is part of.
fn table_of<'a>(path: &str, tables: &BTreeSet<&'a str>) -> Option<&'a str> {
    ancestors(path).find_map(|folder| tables.get(folder).copied())
}

/// Plans the removal of dropped runs; returns the tables of theirs that stay.
fn drop_runs<'a>(
    objects: &[&'a Stored],
    tables: &BTreeSet<&'a str>,
    retained: &Retained,
    plan: &mut Plan,
) -> BTreeSet<&'a str> {
    let mut stay = BTreeSet::new();
    let mut pins: HashMap<&str, &Pin> = HashMap::new();
    for pin in &retained.pins {
        pins.entry(pin.path.trim_end_matches('/')).or_insert(pin);
    }
    for run in objects.chunk_by(|a, b| run_of(&a.path) == run_of(&b.path)) {
        let Some(name) = run_of(&run[0].path) else { continue };
        let mut kept = BTreeMap::new();
        let mut going = Vec::new();
        for object in run.iter().filter(|object| object.path != layout::dropped(name)) {
            let table = table_of(&object.path, tables);
            // What a table is part of is never a folder that somebody named.
            let pin = ancestors(table.unwrap_or(&object.path)).find_map(|folder| pins.get(folder).copied());
            match pin {
                Some(pin) => {
                    kept.insert(pin.path.clone(), pin);
                    stay.extend(table);
                }
                None => going.push((*object, table)),
            }
        }
        for pin in kept.values() {
            let whom = pin.run.as_ref().map_or("a ledger entry".to_string(), |run| format!("run {run}"));
            plan.kept.push(Kept { path: pin.path.clone(), reason: format!("{whom} names it") });
        }
        let (place, stages) = (layout::run(name), layout::stages(name));
        let is_told = |path: &str| within(path, &stages);
        let on_record = retained.dropped.get(name).copied().flatten();
        if let Some(reason) = on_record.or((!kept.is_empty()).then_some("they say what made the rest")) {
            if going.iter().any(|(object, _)| is_told(&object.path)) {
                plan.kept.push(Kept { path: stages.clone(), reason: reason.to_string() });
            }
            going.retain(|(object, _)| !is_told(&object.path));
        }
        plan.removals.extend(going.into_iter().map(|(object, table)| {
            removal(object, table.unwrap_or(&place), Reason::DroppedRun, step(&object.path, is_told(&object.path)))
        }));
    }
    stay
}

fn step(path: &str, is_told: bool) -> Step {
    match path.split_once("/_delta_log/") {
        Some((_, name)) if commit_number(name).is_some() => Step::Commit,
        Some(_) => Step::Checkpoint,
        None if is_told && path.ends_with(".claim.json") => Step::Claim,
        None if is_told => Step::Manifest,
        None => Step::Data,
    }
}

/// The version that the log object `name` commits.
fn commit_number(name: &str) -> Option<i64> {
    name.strip_suffix(".json").filter(|number| number.len() == 20)?.parse().ok()
}

/// Plans the removal of data files of `table` that no retained version names.
async fn shrink<Z: Zone>(
    zone: &Z,
    (table, objects): (&str, &[Stored]),
    pinned: &[i64],
    retained: &Retained,
    plan: &mut Plan,
) -> Result<(), LakeError> {
    let old = objects.iter().filter(|object| object.modified < retained.before && is_data(&object.path, table));
    if old.clone().next().is_none() {
        return Ok(());
    }
    // The log is listed anew, after the data files: what is committed meanwhile is then known.
    let Some(lives) = read_log(zone, table).await? else {
        let reason = "its log has no complete history, so nothing of it is removed".to_string();
        plan.kept.push(Kept { path: table.to_string(), reason });
        return Ok(());
    };
    for object in old {
        let reason = match lives.get(&object.path[table.len() + 1..]) {
            None => Reason::Orphan,
            Some(_) if retained.every_version => continue,
            Some(life) if life.must_stay(pinned, retained.before) => continue,
            Some(_) => Reason::Superseded,
        };
        plan.removals.push(removal(object, table, reason, Step::Loose));
    }
    Ok(())
}

/// Whether `path` is a data file of `table`; what begins with `_` or `.` is none, by the protocol.
fn is_data(path: &str, table: &str) -> bool {
    let below = path.get(table.len() + 1..).unwrap_or_default();
    below.ends_with(".parquet") && !below.starts_with(['_', '.'])
}

/// Which versions have a file: from `added` to the one before `removed`.
#[derive(Clone, Copy, Debug)]
struct Life {
    added: i64,
    removed: Option<(i64, DateTime<Utc>)>,
}

impl Life {
    /// Whether a pinned version has it, or one that was the latest not long ago.
    fn must_stay(&self, pinned: &[i64], before: DateTime<Utc>) -> bool {
        match self.removed {
            None => true,
            Some((removed, at)) => at >= before || pinned.iter().any(|version| (self.added..removed).contains(version)),
        }
    }
}

/// The lives of all files that the log of `table` names, by path; `None` where the log has a gap or holds what is not
/// known, so that no life is certain.
async fn read_log<Z: Zone>(zone: &Z, table: &str) -> Result<Option<HashMap<String, Life>>, LakeError> {
    let log = format!("{table}/_delta_log");
    let commits = zone.store().list_stored(&log).await?.into_iter().filter_map(|object| {
        let number = commit_number(object.path.strip_prefix(&log)?.trim_start_matches('/'))?;
        Some((number, object))
    });
    let commits: Vec<(i64, Stored)> = commits.collect();
    if commits.iter().zip(0..).any(|((number, _), expected)| *number != expected) || commits.is_empty() {
        return Ok(None);
    }
    let reads = commits.into_iter().map(|(number, object)| async move {
        let body = zone.get(&object.path).await?;
        Ok::<_, LakeError>((number, object.modified, body))
    });
    let mut reads = futures::stream::iter(reads).buffered(PARALLEL);
    let mut lives: HashMap<String, Life> = HashMap::new();
    while let Some((version, at, body)) = reads.try_next().await? {
        let lines = body.split(|&byte| byte == b'\n').filter(|line| !line.is_empty());
        let Ok(actions) = lines.map(serde_json::from_slice::<Action>).collect::<Result<Vec<_>, _>>() else {
            return Ok(None);
        };
        for remove in actions.iter().filter_map(|action| action.remove.as_ref()) {
            if let Some(life) = lives.get_mut(&decoded(&remove.path)) {
                life.removed = Some((version, at));
            }
        }
        // Behind all removes, whatever the order of lines: who deletes some rows of a file removes it as it was, and adds it
        // with a list of these rows.
        for add in actions.iter().filter_map(|action| action.add.as_ref()) {
            // A path that comes back lives from the first time on.
            let life = lives.entry(decoded(&add.path)).or_insert(Life { added: version, removed: None });
            life.removed = None;
        }
    }
    Ok(Some(lives))
}

/// What a line of a log says about files.
#[derive(Deserialize)]
struct Action {
    add: Option<Named>,
    remove: Option<Named>,
}

#[derive(Deserialize)]
struct Named {
    path: String,
}

/// Plans the removal of scratch areas of reruns to which nothing was written for long.
fn clear_scratch(objects: &[&Stored], retained: &Retained, plan: &mut Plan) {
    let area = |object: &Stored| {
        let below = object.path.strip_prefix(layout::RERUNS)?.strip_prefix('/')?;
        below.split('/').next().map(|run| format!("{}/{run}", layout::RERUNS))
    };
    for objects in objects.chunk_by(|a, b| area(a) == area(b)) {
        let Some(place) = area(objects[0]) else { continue };
        if objects.iter().all(|object| object.modified < retained.before) {
            let removals = objects.iter().map(|object| removal(object, &place, Reason::Scratch, Step::Data));
            plan.removals.extend(removals);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_not_inside() {
        let stored = |path: &str| Stored { path: path.to_owned(), size: 0, modified: Utc::now() };
        let objects = ["t-b/x", "t.json", "t/x", "t/y/z", "t0/x", "tt/x"].map(stored);
        let paths =
            |folder: &str| inside(&objects, folder).iter().map(|object| object.path.as_str()).collect::<Vec<_>>();
        assert_eq!(paths("t"), ["t/x", "t/y/z"]);
        assert_eq!(paths("t/y"), ["t/y/z"]);
        assert!(paths("s").is_empty() && paths("u").is_empty());
        let tables = BTreeSet::from(["t", "t/y"]);
        assert_eq!((table_of("t/y/z", &tables), table_of("t0/x", &tables)), (Some("t"), None));
    }
}
