//! What gc removes, and what it leaves, on a local disk.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arrow::array::{ArrayRef, AsArray, Float64Array, Int64Array, RecordBatch, StringArray};
use arrow::datatypes::Int64Type;
use chrono::Utc;
use lake::gc::{self, Pin, Plan, Reason, Retained};
use lake::{
    AppTransaction, Begin, Claim, LakeError, PrivateRoot, StorageOptions, Table, Writers, Zone, manifest, schema,
};
use tempfile::TempDir;

struct Lake {
    folder: TempDir,
    root: PrivateRoot,
}

impl Lake {
    async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let url = folder.path().display().to_string();
        let root = PrivateRoot::open(&url, &StorageOptions::default()).await.unwrap();
        Self { folder, root }
    }

    /// A table at `path` with as many commits of one row each.
    async fn table(&self, path: &str, chunks: i64) -> Table {
        let table = self.root.table(path);
        table.create(schema::loss()).await.unwrap();
        for chunk in 0..chunks {
            append(&table, chunk).await;
        }
        table
    }

    /// Makes everything that is there an hour old.
    fn age(&self) {
        set_age(self.folder.path());
    }

    async fn plan(&self, retained: &Retained) -> Plan {
        gc::plan(&self.root, retained).await.unwrap()
    }

    /// Plans twice, with one removal between: what is planned after is nothing.
    async fn collect(&self, retained: &Retained) -> Plan {
        let plan = self.plan(retained).await;
        gc::remove(&self.root, &plan).await.unwrap();
        assert_eq!(self.plan(retained).await.removals, []);
        plan
    }

    async fn paths(&self) -> Vec<String> {
        self.root.list("").await.unwrap()
    }
}

fn set_age(path: &Path) {
    for entry in std::fs::read_dir(path).unwrap().map(Result::unwrap) {
        if entry.metadata().unwrap().is_dir() {
            set_age(&entry.path());
        } else {
            let file = std::fs::File::options().append(true).open(entry.path()).unwrap();
            file.set_modified(SystemTime::now() - Duration::from_secs(3600)).unwrap();
        }
    }
}

async fn append(table: &Table, chunk: i64) {
    let transaction = AppTransaction { id: "demo/train".into(), version: chunk };
    assert!(table.append(vec![row(chunk)], transaction).await.unwrap());
}

fn row(step: i64) -> RecordBatch {
    let columns: Vec<ArrayRef> = vec![
        Arc::new(Int64Array::from(vec![step])),
        Arc::new(StringArray::from(vec!["validation"])),
        Arc::new(Float64Array::from(vec![0.5])),
    ];
    RecordBatch::try_new(schema::loss(), columns).unwrap()
}

async fn steps(table: &Table, version: i64) -> Vec<i64> {
    let batches = table.read(version, &["step"]).await.unwrap();
    batches.iter().flat_map(|batch| batch.column(0).as_primitive::<Int64Type>().values().to_vec()).collect()
}

/// Nothing pinned, nothing dropped; half an hour is old enough.
fn retained() -> Retained {
    Retained { before: Utc::now() - Duration::from_secs(1800), ..Retained::default() }
}

fn pin(path: &str, version: Option<i64>, run: Option<&str>) -> Pin {
    Pin { path: path.into(), version, run: run.map(str::to_string) }
}

fn claim(run: &str) -> Claim {
    Claim {
        run: run.into(),
        stage: "train".into(),
        shard: None,
        inputs: Vec::new(),
        config: serde_json::json!({}),
        command: Vec::new(),
        seeds: Vec::new(),
        binary: "doppel-train 0.1.0".into(),
        started: Utc::now(),
    }
}

async fn finish(lake: &Lake, run: &str) {
    let Begin::Fresh(handle) = manifest::begin(&lake.root, claim(run)).await.unwrap() else { panic!("a new run") };
    handle.finish(Vec::new(), serde_json::Value::Null).await.unwrap();
}

fn reasons(plan: &Plan) -> Vec<(&str, Reason)> {
    plan.removals.iter().map(|removal| (removal.place.as_str(), removal.reason)).collect()
}

#[tokio::test]
async fn files_that_no_version_names_go_once_they_are_old() {
    let lake = Lake::new().await;
    let table = lake.table("runs/demo/loss", 3).await;
    let orphan = AppTransaction { id: "demo/train".into(), version: 9 };
    drop(table.upload(vec![row(9)], &orphan).await.unwrap());
    let before = lake.paths().await;
    assert_eq!(lake.plan(&retained()).await.removals, [], "a writer may be about to commit it");
    lake.age();
    drop(table.upload(vec![row(9)], &orphan).await.unwrap());
    let plan = lake.collect(&retained()).await;
    assert_eq!(reasons(&plan), [("runs/demo/loss", Reason::Orphan)]);
    assert!(plan.removals[0].path.contains("-00000009-") && plan.removals[0].size > 0);
    assert_eq!(lake.paths().await.len(), before.len(), "the young one stays");
    assert_eq!(steps(&lake.root.table("runs/demo/loss"), 3).await, [0, 1, 2]);
}

#[tokio::test]
async fn superseded_files_go_unless_a_pinned_or_a_recent_version_has_them() {
    let lake = Lake::new().await;
    let table = lake.table("runs/demo/loss", 10).await;
    lake.age();
    assert!(table.compact(1 << 20, Writers::Ended).await.unwrap());
    assert_eq!(lake.plan(&retained()).await.removals, [], "the version before was the latest a moment ago");
    lake.age();
    let every = Retained { every_version: true, ..retained() };
    assert_eq!(lake.plan(&every).await.removals, [], "pins may be missing");

    let pins = vec![pin("runs/demo/loss", Some(4), Some("other")), pin("runs/demo", Some(8), Some("other"))];
    let plan = lake.collect(&Retained { pins, ..retained() }).await;
    assert_eq!(reasons(&plan), [("runs/demo/loss", Reason::Superseded); 6]);
    let table = lake.root.table("runs/demo/loss");
    assert_eq!(steps(&table, 4).await, [0, 1, 2, 3]);
    assert_eq!(steps(&table, 11).await, (0..10).collect::<Vec<_>>());
    assert!(matches!(table.read(8, &["step"]).await, Err(LakeError::Malformed(_))));
    append(&table, 10).await;
    assert_eq!(steps(&table, 12).await, (0..11).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_log_with_a_gap_makes_nothing_certain() {
    let lake = Lake::new().await;
    let table = lake.table("runs/demo/loss", 3).await;
    drop(table.upload(vec![row(9)], &AppTransaction { id: "a".into(), version: 9 }).await.unwrap());
    lake.age();
    std::fs::remove_file(lake.folder.path().join("runs/demo/loss/_delta_log/00000000000000000001.json")).unwrap();
    let plan = lake.plan(&retained()).await;
    assert_eq!(plan.removals, []);
    assert!(plan.kept[0].reason.contains("no complete history"), "{:?}", plan.kept);
}

#[tokio::test]
async fn a_dropped_run_goes_and_what_others_name_stays_with_its_manifests() {
    let lake = Lake::new().await;
    finish(&lake, "gone").await;
    finish(&lake, "source").await;
    for run in ["gone", "source"] {
        lake.table(&format!("runs/{run}/loss"), 2).await;
        lake.table(&format!("runs/{run}/more"), 12).await;
        lake.root.put(&format!("runs/{run}/adapter/config.json"), "{}".into()).await.unwrap();
        lake.root.put(&format!("runs/{run}/adapter-notes"), "{}".into()).await.unwrap();
    }
    lake.table("corpora/demo", 1).await;
    lake.root.put("ledger/demo/00000000.json", "{}".into()).await.unwrap();
    lake.root.put("keys/noise.key", "secret".into()).await.unwrap();
    lake.age();
    let pins = vec![pin("runs/source/loss", Some(1), Some("other")), pin("runs/source/adapter/", None, Some("other"))];
    let dropped = ["gone", "source"].map(|run| (run.to_string(), None)).into();
    let plan = lake.collect(&Retained { pins, dropped, ..retained() }).await;
    let kept: Vec<&str> = plan.kept.iter().map(|kept| kept.path.as_str()).collect();
    assert_eq!(kept, ["runs/source/adapter/", "runs/source/loss", "runs/source/stages"]);
    assert_eq!(plan.kept[1].reason, "run other names it");
    let mut left = lake.paths().await;
    left.retain(|path| !path.contains("/_delta_log/") && !path.ends_with(".parquet"));
    let expected = [
        "keys/noise.key",
        "ledger/demo/00000000.json",
        "runs/source/adapter/config.json",
        "runs/source/stages/train.claim.json",
        "runs/source/stages/train.json",
    ];
    assert_eq!(left, expected);
    assert_eq!(steps(&lake.root.table("runs/source/loss"), 1).await, [0]);
    assert_eq!(lake.root.table("corpora/demo").version().await.unwrap(), Some(1));
    for gone in ["runs/gone/loss", "runs/gone/more", "runs/source/more"] {
        assert_eq!(lake.root.table(gone).version().await.unwrap(), None, "{gone}");
    }
    assert_eq!(gc::last_write(&lake.root, "gone").await.unwrap(), None);
}

#[tokio::test]
async fn a_run_that_the_ledger_names_keeps_its_manifests_and_never_begins_again() {
    let lake = Lake::new().await;
    finish(&lake, "paid").await;
    lake.root.put("runs/paid/train/checkpoints/step-00000001.safetensors", "state".into()).await.unwrap();
    lake.age();
    let dropped = [("paid".to_string(), Some("the ledger names the run"))].into();
    manifest::close(&lake.root, "paid").await.unwrap();
    let plan = lake.collect(&Retained { dropped, ..retained() }).await;
    assert_eq!(reasons(&plan), [("runs/paid", Reason::DroppedRun)]);
    assert!(plan.kept.iter().any(|kept| kept.reason == "the ledger names the run"), "{:?}", plan.kept);
    assert_eq!(manifest::manifests_of(&lake.root, "paid").await.unwrap().len(), 1);
    for stage in ["train", "vote"] {
        let again = Claim { stage: stage.into(), ..claim("paid") };
        let error = manifest::begin(&lake.root, again).await.unwrap_err();
        assert!(
            matches!(&error, LakeError::Conflict(text) if text.contains("dropped") && text.contains("help:")),
            "{error}"
        );
    }
}

/// Whatever prefix of the removals was carried out, a table is an older version of itself, or none.
#[tokio::test]
async fn an_interrupted_removal_leaves_no_table_that_cannot_be_read() {
    let lake = Lake::new().await;
    finish(&lake, "gone").await;
    lake.table("runs/gone/loss", 12).await;
    lake.age();
    let retained = Retained { dropped: [("gone".to_string(), None)].into(), ..retained() };
    let plan = lake.plan(&retained).await;
    assert!(plan.removals.iter().any(|removal| removal.path.ends_with(".checkpoint.parquet")));
    let mut versions = Vec::new();
    for removal in &plan.removals {
        lake.root.delete(&removal.path).await.unwrap();
        let table = lake.root.table("runs/gone/loss");
        if let Some(version) = table.version().await.unwrap() {
            assert_eq!(steps(&table, version).await.len() as i64, version, "{}", removal.path);
            versions.push(version);
        }
        let listed = manifest::list_runs(&lake.root).await.unwrap();
        assert_eq!(listed.is_empty(), removal == plan.removals.last().unwrap(), "a run is listed to the last");
    }
    assert_eq!((versions.first(), versions.last()), (Some(&12), Some(&0)));
    assert_eq!(lake.paths().await, Vec::<String>::new());
}

#[tokio::test]
async fn scratch_and_writes_that_were_cut_short_go_when_they_are_old() {
    let lake = Lake::new().await;
    lake.root.put("reruns/old/private/runs/a", "x".into()).await.unwrap();
    lake.root.put("reruns/young/private/runs/a", "x".into()).await.unwrap();
    lake.root.put("runs/demo/adapter", "x".into()).await.unwrap();
    std::fs::write(lake.folder.path().join("runs/demo/adapter.json#12"), "half").unwrap();
    std::fs::write(lake.folder.path().join("runs/demo/notes#a"), "whole").unwrap();
    std::fs::write(lake.folder.path().join("runs/demo/issue#42"), "whole").unwrap();
    std::fs::write(lake.folder.path().join("runs/demo/_last_checkpoint#1"), "half").unwrap();
    lake.age();
    lake.root.put("reruns/young/private/runs/b", "x".into()).await.unwrap();
    std::fs::write(lake.folder.path().join("runs/demo/adapter.json#13"), "half").unwrap();
    let plan = lake.collect(&retained()).await;
    assert_eq!(
        reasons(&plan),
        [
            ("unfinished writes", Reason::Unfinished),
            ("unfinished writes", Reason::Unfinished),
            ("reruns/old", Reason::Scratch)
        ]
    );
    for (left, expected) in [
        ("reruns/young/private/runs/a", true),
        ("runs/demo/adapter.json#12", false),
        ("runs/demo/adapter.json#13", true),
        ("runs/demo/notes#a", true),
        ("runs/demo/issue#42", true),
        ("runs/demo/_last_checkpoint#1", false),
    ] {
        assert_eq!(lake.folder.path().join(left).exists(), expected, "{left}");
    }
}
