//! What a lake keeps and what it lets go: gc, compaction and lineage over the real stages.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime};

use arrow::array::{AsArray, RecordBatch};
use lake::{AppTransaction, ReleaseRoot, StorageOptions, Table, Zone};
use scenarios::binaries::{self, Ran};
use scenarios::tiny::{RUN, Workplace, wait_for, with};
use serde_json::Value;

const LAKE: &str = "lake";
/// Samples of the run with many chunks: eight for each of two shards.
const MANY: usize = 4096;

/// A command of words without blanks.
fn command(words: &str) -> Command {
    let mut words = words.split_whitespace();
    let mut command = binaries::command(words.next().expect("a program"));
    command.args(words);
    command
}

#[track_caller]
fn run(words: &str, exit_code: i32) -> Ran {
    binaries::run(&mut command(words), exit_code)
}

fn roots(place: &Workplace) -> String {
    format!("--private={} --release={}", place.private(LAKE), place.release(LAKE))
}

/// A shard of the run `many`.
fn many(place: &Workplace, shard: &str) -> String {
    format!(
        "doppel-synthesize --run=many --release={} --model={} --no-adapter --shard={shard} --count={MANY} \
         --max-new-tokens=2 --seed=5 --dtype=f32 --device=cpu",
        place.release(LAKE),
        place.path("llama").display()
    )
}

/// Every file below `folder`.
fn files(folder: &Path) -> BTreeSet<PathBuf> {
    let mut found = BTreeSet::new();
    for entry in std::fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("an entry").path()) {
        match entry.is_dir() {
            true => found.extend(files(&entry)),
            false => drop(found.insert(entry)),
        }
    }
    found
}

/// Makes everything in the lake an hour old.
fn age(place: &Workplace) {
    for path in files(&place.path(LAKE)) {
        let file = std::fs::File::options().append(true).open(&path).expect("a file");
        file.set_modified(SystemTime::now() - Duration::from_secs(3600)).expect("its time is set");
    }
}

fn wait<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Runtime::new().expect("a runtime").block_on(work)
}

async fn release_table(place: &Workplace, path: &str) -> Table {
    ReleaseRoot::open(&place.release(LAKE), &StorageOptions::default()).await.expect("a root").table(path)
}

/// The rows of a version, or of the latest, in their order.
fn texts(place: &Workplace, path: &str, version: Option<i64>) -> (i64, Vec<String>) {
    wait(async {
        let table = release_table(place, path).await;
        let version = version.unwrap_or(table.pin().await.expect("a table"));
        let batches = table.read(version, &["id", "text"]).await.expect("rows");
        let text = |batch: &RecordBatch| {
            let (ids, texts) = (batch.column(0).as_string::<i32>(), batch.column(1).as_string::<i32>());
            ids.iter().zip(texts.iter()).map(|(id, text)| format!("{id:?} {text:?}")).collect::<Vec<_>>()
        };
        (version, batches.iter().flat_map(text).collect())
    })
}

/// A data file without a commit, as a writer leaves it that is killed between the two.
fn leave_orphan(place: &Workplace, path: &str) {
    wait(async {
        let table = release_table(place, path).await;
        let columns = ["id", "shard", "seed", "text", "tokens", "finish_reason", "mean_logprob"];
        let rows = table.read(table.pin().await.expect("a table"), &columns).await.expect("rows");
        let part = AppTransaction { id: "many/synthesize/0-of-2".into(), version: 99 };
        drop(table.upload(rows[..1].to_vec(), &part).await.expect("a data file"));
    });
}

#[test]
fn gc_and_compaction_beside_shards_lose_no_row_and_keep_what_others_pin() {
    let place = Workplace::new();
    std::fs::create_dir_all(place.private(LAKE)).expect("a folder");
    let table = place.path(LAKE).join("release/runs/many/synthetic");

    // A shard that is killed in its work, and what such writers leave.
    let mut killed =
        command(&many(&place, "0/2")).stderr(Stdio::null()).stdout(Stdio::null()).spawn().expect("a shard");
    wait_for(&table.join("_delta_log/00000000000000000002.json"));
    killed.kill().expect("it is killed");
    killed.wait().expect("it ended");
    run(&many(&place, "0/2"), 0);
    leave_orphan(&place, "runs/many/synthetic");
    std::fs::write(table.join("half.parquet#1"), "half").expect("a file");
    age(&place);

    // A dry run lists them and removes nothing.
    let gc = format!("doppel gc --min-age=30m {}", roots(&place));
    let before = files(&place.path(LAKE));
    let listed = run(&format!("{gc} --dry-run"), 0).stdout;
    assert!(listed.contains("-00000099-") && listed.contains("half.parquet#1"), "{listed}");
    assert!(listed.contains("would be removed"), "{listed}");
    assert_eq!(files(&place.path(LAKE)), before);

    // The other shard runs, and is killed once, while gc removes them.
    for kill in [true, false] {
        let shard = command(&many(&place, "1/2")).stderr(Stdio::null()).stdout(Stdio::null()).spawn();
        let mut shard = shard.expect("a shard");
        loop {
            run(&gc, 0);
            if kill {
                shard.kill().expect("it is killed");
            }
            if let Some(status) = shard.try_wait().expect("a shard") {
                assert!(kill || status.success(), "{status}");
                break;
            }
        }
    }
    let left = files(&table);
    assert!(!left.iter().any(|path| path.display().to_string().contains("-00000099-")));
    assert!(!table.join("half.parquet#1").exists());
    let (whole, rows) = texts(&place, "runs/many/synthetic", None);
    assert_eq!((rows.len(), rows.iter().collect::<BTreeSet<_>>().len()), (MANY, MANY));

    // Compaction changes no row; what was there before still reads.
    let told = run(&format!("doppel compact --run=many {}", roots(&place)), 0).stdout;
    let (compact, merged) = texts(&place, "runs/many/synthetic", None);
    assert_eq!((compact, merged == rows), (whole + 1, true));
    assert!(told.contains(&format!("compacted as version {compact}")), "{told}");
    assert!(texts(&place, "runs/many/synthetic", Some(whole)).1 == rows);
    let again = run(&format!("doppel compact runs/many/synthetic --format=json {}", roots(&place)), 0).json();
    assert_eq!((&again[0]["compacted"], &again[0]["version"]), (&false.into(), &compact.into()));
    let count = format!("doppel-query --run=many --release={} --output=csv", place.release(LAKE));
    let counted = binaries::run(command(&count).arg("SELECT count(DISTINCT id) AS n FROM synthetic"), 0).stdout;
    assert_eq!(counted, format!("n\n{MANY}\n"));

    // A shard that has lost its manifest finds its chunks in the compacted table, and appends nothing.
    std::fs::remove_file(place.path(LAKE).join("release/runs/many/stages/synthesize.1-of-2.json")).expect("a manifest");
    run(&many(&place, "1/2"), 0);
    assert_eq!(texts(&place, "runs/many/synthetic", None).0, compact);

    // Another run embeds the compacted table, so dropping its maker leaves that version, and the other run as it was.
    let embed = format!(
        "doppel-embed --run=other --release={} --encoder={} --of=synthetic --table=runs/many/synthetic --dtype=f32 \
         --device=cpu",
        place.release(LAKE),
        place.path("bert").display()
    );
    run(&embed, 0);
    age(&place);
    let data = |paths: BTreeSet<PathBuf>| {
        paths
            .into_iter()
            .filter(|path| {
                path.extension().is_some_and(|kind| kind == "parquet")
                    && !path.display().to_string().contains("_delta_log")
            })
            .count()
    };
    assert!(data(files(&table)) > 16);
    let told = run(&format!("{gc} --drop=many"), 0).stdout;
    assert!(told.contains("kept: release runs/many/synthetic: run other names it"), "{told}");
    assert_eq!(data(files(&table)), 1, "{told}");
    assert!(texts(&place, "runs/many/synthetic", Some(compact)).1 == rows);
    assert!(run(&embed, 0).stdout.contains("done already"));
    assert!(run(&gc, 0).stdout.contains("nothing to remove"));
}

#[test]
fn a_dropped_run_stays_paid_and_its_lineage_is_told_without_private_figures() {
    let place = Workplace::new();
    binaries::run(&mut place.run(&place.pipeline(LAKE, "50")), 0);
    let events = place.path("events.jsonl");
    run(&format!("doppel openlineage --to={} {}", events.display(), roots(&place)), 0);
    check_lineage(&place, &std::fs::read_to_string(&events).expect("events"));

    // Private tables are compacted without a word about what there was to do.
    let told = run(&format!("doppel compact --format=json {}", roots(&place)), 0).json();
    for table in told.as_array().expect("tables").iter().filter(|table| table["zone"] == "private") {
        assert_eq!(table.as_object().map(serde_json::Map::len), Some(2), "{table}");
    }

    let budget = format!("doppel budget chats --format=json --private={}", place.private(LAKE));
    let before = run(&budget, 0).json();
    let gc = format!("doppel gc --min-age=30m --drop={RUN} {}", roots(&place));
    assert!(run(&gc, 0).stdout.contains("kept for now"), "what was just written stays");
    age(&place);
    let told = run(&gc, 0).stdout;
    let private: Vec<&str> = told.lines().filter(|line| line.starts_with("private")).collect();
    assert!(private.iter().any(|line| line.contains(&format!("runs/{RUN}/embeddings"))), "{told}");
    assert!(private.iter().all(|line| !line.contains(".parquet") && !line.contains(" kB")), "{told}");
    assert_eq!(run(&budget, 0).json(), before);
    for gone in [format!("release/runs/{RUN}/adapter"), format!("private/runs/{RUN}/train/checkpoints")] {
        let path = place.path(LAKE).join(gone);
        assert!(!path.exists() || files(&path).is_empty(), "{}", path.display());
    }
    for kept in ["private/corpora/chats", "private/ledger/chats", "private/keys"] {
        assert!(!files(&place.path(LAKE).join(kept)).is_empty(), "{kept}");
    }
    let manifests = files(&place.path(LAKE).join(format!("release/runs/{RUN}/stages")));
    assert!(manifests.iter().any(|path| path.ends_with("vote.json")), "{manifests:?}");
    let came_from = run(&format!("doppel lineage {RUN}/selected {}", roots(&place)), 0).stdout;
    assert!(came_from.contains(&format!("made by vote of run {RUN} (dropped)")), "{came_from}");
    let refused = run(&place.train(LAKE), 2).stderr;
    assert!(refused.contains("was dropped") && refused.contains("help:"), "{refused}");
    // Nor under a release root that does not know the run: its reservation and its noise are in the private root.
    let elsewhere = place.path("elsewhere");
    std::fs::create_dir_all(&elsewhere).expect("a folder");
    for stage in [place.train(LAKE), place.vote(LAKE)] {
        let stage = with(&stage, &place.release(LAKE), &elsewhere.display().to_string());
        let refused = run(&stage, 2).stderr;
        assert!(refused.contains("was dropped") && refused.contains("help:"), "{refused}");
    }
    assert!(!elsewhere.join("runs").exists());
    assert_eq!(run(&budget, 0).json(), before);
    assert!(run(&gc, 0).stdout.contains("nothing to remove"));
}

/// What the published schema of a RunEvent requires, and what must not be in one.
fn check_lineage(place: &Workplace, lines: &str) {
    let events: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).expect("an event")).collect();
    let (mut started, mut completed) = (BTreeSet::new(), BTreeSet::new());
    for event in &events {
        check_event(event);
        let id = event["run"]["runId"].as_str().expect("an id").to_owned();
        let new = match event["eventType"].as_str() {
            Some("START") => started.insert(id),
            Some("COMPLETE") => completed.insert(id),
            other => panic!("{other:?}"),
        };
        assert!(new, "one of each for a run");
    }
    // partition, train, two shards of synthesize and of embed, embed of the corpus, vote.
    assert_eq!((started.len(), &completed), (8, &started));
    let of = |stage: &str| {
        let wanted = |event: &&&Value| event["job"]["name"] == stage && event["eventType"] == "COMPLETE";
        *events.iter().collect::<Vec<_>>().iter().find(wanted).unwrap_or_else(|| panic!("{stage}"))
    };
    let private = place.path(LAKE).canonicalize().expect("a lake").join("private");
    let corpus = &of("train")["inputs"][0];
    assert_eq!(
        (&corpus["namespace"], &corpus["name"]),
        (&"file".into(), &private.join("corpora/chats").display().to_string().into())
    );
    assert_eq!(corpus["facets"]["version"]["datasetVersion"], "1");
    assert_eq!(of("partition")["outputs"][0]["name"], corpus["name"], "the graph joins");
    assert!(of("vote")["outputs"].as_array().is_some_and(|outputs| outputs.len() == 4));
    // A version of private embeddings would count the chunks of records.
    assert_eq!(of("embed-corpus")["outputs"][0]["facets"], serde_json::json!({}));
    for word in ["facts", "config", "fingerprint", "seeds", "rows"] {
        assert!(!lines.contains(&format!("\"{word}\"")), "{word}");
    }
}

#[track_caller]
fn check_event(event: &Value) {
    let text = |value: &Value| value.as_str().unwrap_or_else(|| panic!("no text in {event}")).to_owned();
    let is_uri = |value: &Value| assert!(text(value).contains(':') && !text(value).contains(' '), "{value}");
    let is_uuid = |value: &Value| {
        let groups: Vec<usize> = text(value).split('-').map(str::len).collect();
        assert_eq!(groups, [8, 4, 4, 4, 12], "{value}");
        assert!(text(value).chars().all(|c| c == '-' || c.is_ascii_hexdigit()), "{value}");
    };
    chrono::DateTime::parse_from_rfc3339(&text(&event["eventTime"])).expect("a date-time");
    is_uri(&event["producer"]);
    assert_eq!(event["schemaURL"], "https://openlineage.io/spec/2-0-2/OpenLineage.json#/$defs/RunEvent");
    is_uuid(&event["run"]["runId"]);
    is_uuid(&event["run"]["facets"]["parent"]["run"]["runId"]);
    text(&event["run"]["facets"]["parent"]["job"]["namespace"]);
    text(&event["run"]["facets"]["parent"]["job"]["name"]);
    text(&event["run"]["facets"]["processing_engine"]["version"]);
    assert_eq!(event["job"]["facets"]["jobType"]["processingType"], "BATCH");
    let datasets: Vec<&Value> =
        [&event["inputs"], &event["outputs"]].into_iter().flat_map(|list| list.as_array().expect("a list")).collect();
    for named in datasets.iter().copied().chain([&event["job"]]) {
        assert!(!text(&named["namespace"]).is_empty() && !text(&named["name"]).is_empty(), "{event}");
    }
    let holders = datasets.iter().copied().chain([&event["job"], &event["run"]]);
    for facet in holders.flat_map(|holder| holder["facets"].as_object().expect("facets").values()) {
        is_uri(&facet["_producer"]);
        is_uri(&facet["_schemaURL"]);
    }
}
