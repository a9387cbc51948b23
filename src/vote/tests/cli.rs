//! The command line contract of doppel-vote: exit codes, messages, and what is in the two roots afterwards.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;

use arrow::array::{ArrayRef, AsArray, Float32Array, Int32Array, Int64Array, ListArray, RecordBatch, StringArray};
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::{DataType, Field, Float64Type, Int32Type, Int64Type, SchemaRef};
use chrono::Utc;
use lake::{AppTransaction, Begin, Claim, CorpusTerms, Input, Output, PrivateRoot, ReleaseRoot, StorageOptions, Zone};
use tempfile::TempDir;
use tokio::runtime::Runtime;

/// Corners around which embeddings lie.
const CORNERS: usize = 6;
const DIMENSION: usize = 8;

/// Both roots in a temporary folder, with 240 synthetic rows spread evenly over the corners, and a corpus of 400 train
/// units of which every second lies at corner 0.
struct Setting {
    folder: TempDir,
    runtime: Runtime,
}

/// What a test may change about the setting.
struct Variation {
    corpus_dimension: usize,
    corpus_encoder: &'static str,
    epsilon: f64,
    units_moved: usize,
    /// Commits in which the vectors of the corpus are written.
    commits: usize,
    /// Rows of the corpus whose vectors hold a NaN.
    broken_records: &'static [usize],
    /// The same of the synthetic rows.
    broken_texts: &'static [usize],
    /// The same of the rows of the untuned model.
    broken_baseline: &'static [usize],
    /// Whether the last synthetic row has the id of the first.
    id_twice: bool,
}

const USUAL: Variation = Variation {
    corpus_dimension: DIMENSION,
    corpus_encoder: "e1",
    epsilon: 8.0,
    units_moved: 0,
    commits: 1,
    broken_records: &[],
    broken_texts: &[],
    broken_baseline: &[],
    id_twice: false,
};

struct Ran {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl Setting {
    fn new(variation: &Variation) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let setting = Self { folder, runtime: Runtime::new().expect("a runtime") };
        setting.runtime.block_on(setting.write(variation));
        setting
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    async fn roots(&self) -> (PrivateRoot, ReleaseRoot) {
        let (private, release) = (self.path("private"), self.path("release"));
        let options = StorageOptions::default();
        let private = PrivateRoot::open(&private.display().to_string(), &options).await.expect("a root");
        (private, ReleaseRoot::open(&release.display().to_string(), &options).await.expect("a root"))
    }

    async fn write(&self, variation: &Variation) {
        let (private, release) = self.roots().await;
        let corner = |row: usize| row % CORNERS;
        let id = |row: usize| if variation.id_twice { row % 239 } else { row };
        for (run, broken) in [("demo", variation.broken_texts), ("base", variation.broken_baseline)] {
            // The untuned model knows three corners only.
            let corner = |row| if run == "base" { row % 3 } else { corner(row) };
            let ids = strings((0..240).map(|row| format!("s{}", id(row))));
            let texts = strings((0..240).map(|row| format!("synthetic text {row}")));
            let columns = vec![
                ids.clone(),
                Arc::new(Int32Array::from(vec![0; 240])) as ArrayRef,
                Arc::new(Int64Array::from(vec![1; 240])),
                texts,
                Arc::new(Int32Array::from(vec![5; 240])),
                strings((0..240).map(|_| "stop".to_owned())),
                Arc::new(Float32Array::from(vec![-1.0; 240])),
            ];
            write_table(&release, &format!("runs/{run}/synthetic"), lake::schema::synthetic(), columns).await;
            let columns = vec![ids, vectors((0..240).map(|row| (corner(row), row)), DIMENSION, broken)];
            write_table(&release, &format!("runs/{run}/embeddings"), lake::schema::embeddings(), columns).await;
            let source = format!("runs/{run}/synthetic");
            let made = Made { encoder: "e1", dimension: DIMENSION, version: 1 };
            finish(&release, run, "embed", ("texts", &source), made).await;
        }
        self.write_corpus(&private, variation).await;
    }

    async fn write_corpus(&self, private: &PrivateRoot, variation: &Variation) {
        let rows = 500;
        let split = |row: usize| if row < 400 { "train" } else { "test" };
        let corner = |row: usize| match row {
            moved if moved < variation.units_moved => CORNERS - 1,
            half if half % 2 == 0 => 0,
            other => other % CORNERS,
        };
        let ids = strings((0..rows).map(|row| format!("r{row}")));
        let units = strings((0..rows).map(|row| format!("unit-{row}")));
        let splits = strings((0..rows).map(|row| split(row).to_owned()));
        let texts = strings((0..rows).map(|row| format!("private text {row}")));
        let columns = vec![ids.clone(), units.clone(), texts, splits.clone()];
        write_table(private, "corpora/chats", lake::schema::corpus(), columns).await;
        let dimension = variation.corpus_dimension;
        let vectors = vectors((0..rows).map(|row| (corner(row), row)), dimension, variation.broken_records);
        let columns = vec![ids, units, splits, vectors];
        let schema = lake::schema::private_embeddings();
        write_in_commits(private, "runs/demo/embeddings", schema, columns, variation.commits).await;
        let made = Made { encoder: variation.corpus_encoder, dimension, version: variation.commits as i64 };
        finish(private, "demo", "embed-corpus", ("corpus", "corpora/chats"), made).await;
        let terms = CorpusTerms { privacy_unit: "id".into(), max_per_unit: 1, conditions: Vec::new() };
        terms.write(private, "chats").await.expect("terms");
        ledger::set_budget(private, "chats", variation.epsilon, 1e-5).await.expect("a budget");
    }

    fn run(&self, flags: &[&str]) -> Ran {
        let mut command = Command::new(env!("CARGO_BIN_EXE_doppel-vote"));
        command.env_clear().args(["--run", "demo", "--sigma", "2", "--format", "json"]);
        command.arg("--private").arg(self.path("private")).arg("--release").arg(self.path("release"));
        for (flag, value) in [("--corpus", "chats"), ("--clusters", "6"), ("--target", "60")] {
            if !flags.contains(&flag) {
                command.args([flag, value]);
            }
        }
        let output = command.args(flags).output().expect("the binary runs");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Ran { code: output.status.code(), stdout: text(&output.stdout), stderr: text(&output.stderr) }
    }

    fn read(&self, zone: &str, path: &str, columns: &[&str]) -> Vec<RecordBatch> {
        self.runtime.block_on(async {
            let (private, release) = self.roots().await;
            let table = if zone == "private" { private.table(path) } else { release.table(path) };
            table.read(table.pin().await.expect("a table"), columns).await.expect("rows")
        })
    }

    /// (noisy, synthetic, selected) of each bin.
    fn histogram(&self) -> Vec<(i64, i64, i64)> {
        let batches =
            self.read("release", "runs/demo/histogram", &["noisy_count", "synthetic_count", "selected_count"]);
        let column =
            |batch: &RecordBatch, column: usize| batch.column(column).as_primitive::<Int64Type>().values().to_vec();
        let rows = |batch: &RecordBatch| {
            let (a, b, c) = (column(batch, 0), column(batch, 1), column(batch, 2));
            (0..a.len()).map(|row| (a[row], b[row], c[row])).collect::<Vec<_>>()
        };
        batches.iter().flat_map(rows).collect()
    }

    fn selected(&self) -> Vec<(String, String, i32)> {
        let batches = self.read("release", "runs/demo/selected", &["id", "text", "bin"]);
        let row = |batch: &RecordBatch, row: usize| {
            let text = |column: usize| batch.column(column).as_string::<i32>().value(row).to_owned();
            (text(0), text(1), batch.column(2).as_primitive::<Int32Type>().value(row))
        };
        batches.iter().flat_map(|batch| (0..batch.num_rows()).map(|at| row(batch, at)).collect::<Vec<_>>()).collect()
    }

    /// (set, count, share) of the private comparison.
    fn comparison_bins(&self) -> Vec<(String, i64, f64)> {
        let batches = self.read("private", "runs/demo/comparison_bins", &["set", "count", "share"]);
        let row = |batch: &RecordBatch, row: usize| {
            let set = batch.column(0).as_string::<i32>().value(row).to_owned();
            let count = batch.column(1).as_primitive::<Int64Type>().value(row);
            (set, count, batch.column(2).as_primitive::<Float64Type>().value(row))
        };
        batches.iter().flat_map(|batch| (0..batch.num_rows()).map(|at| row(batch, at)).collect::<Vec<_>>()).collect()
    }

    /// Claims and manifests in the release zone by path, without the time and what follows from noise.
    fn release_objects(&self) -> BTreeMap<String, serde_json::Value> {
        self.runtime.block_on(async {
            let (_, release) = self.roots().await;
            let mut objects = BTreeMap::new();
            for path in release.list("runs").await.expect("a listing") {
                if path.contains("/stages/") {
                    let body = release.get(&path).await.expect("an object");
                    let mut object: serde_json::Value = serde_json::from_slice(&body).expect("JSON");
                    object["claim"]["started"].take();
                    ["started", "ended", "facts"].iter().for_each(|field| drop(object[*field].take()));
                    objects.insert(path, object);
                }
            }
            objects
        })
    }

    fn spent(&self) -> usize {
        self.runtime.block_on(async {
            let (private, _) = self.roots().await;
            ledger::read(&private, "chats").await.expect("a ledger").spent().len()
        })
    }
}

impl Ran {
    #[track_caller]
    fn check(self, code: i32, messages: &[&str]) -> Self {
        let shown = format!("{}\n{}", self.stdout, self.stderr);
        assert_eq!(self.code, Some(code), "{shown}");
        messages.iter().for_each(|message| assert!(shown.contains(message), "no `{message}` in\n{shown}"));
        assert!(!shown.contains("unit-") && !shown.contains("private text"), "{shown}");
        self
    }
}

fn strings(values: impl Iterator<Item = String>) -> ArrayRef {
    Arc::new(StringArray::from_iter_values(values))
}

/// Vectors near their corner, at a place of their own; those of `broken` rows begin with a NaN.
fn vectors(rows: impl Iterator<Item = (usize, usize)>, dimension: usize, broken: &[usize]) -> ArrayRef {
    let mut values = Vec::new();
    let mut count = 0;
    for (corner, row) in rows {
        count += 1;
        let wiggle = |column: usize| match column {
            0 if broken.contains(&row) => f32::NAN,
            _ => ((row * 31 + column * 17) % 23) as f32 / 230.0,
        };
        values.extend((0..dimension).map(|column| if column == corner { 1.0 } else { 0.0 } + wiggle(column)));
    }
    let element = Arc::new(Field::new("element", DataType::Float32, false));
    let offsets = OffsetBuffer::from_lengths(vec![dimension; count]);
    Arc::new(ListArray::new(element, offsets, Arc::new(Float32Array::from(values)), None))
}

async fn write_table<Z: Zone>(zone: &Z, path: &str, schema: SchemaRef, columns: Vec<ArrayRef>) {
    write_in_commits(zone, path, schema, columns, 1).await;
}

async fn write_in_commits<Z: Zone>(zone: &Z, path: &str, schema: SchemaRef, columns: Vec<ArrayRef>, commits: usize) {
    let table = zone.table(path);
    table.create(schema.clone()).await.expect("a table");
    let batch = RecordBatch::try_new(schema, columns).expect("a batch");
    let rows = batch.num_rows().div_ceil(commits);
    for version in 0..commits {
        let first = version * rows;
        let part = batch.slice(first, rows.min(batch.num_rows() - first));
        let transaction = AppTransaction { id: "setting".into(), version: version as i64 };
        assert!(table.append(vec![part], transaction).await.expect("rows"));
    }
}

/// What the manifest of doppel-embed says of its vectors.
struct Made {
    encoder: &'static str,
    dimension: usize,
    version: i64,
}

/// The manifest that doppel-embed leaves.
async fn finish<Z: Zone>(zone: &Z, run: &str, stage: &str, (input, location): (&str, &str), made: Made) {
    let named = |name: &str, location: &str, version, digest| Input {
        name: name.into(),
        location: location.into(),
        version,
        digest,
    };
    let claim = Claim {
        run: run.into(),
        stage: stage.into(),
        shard: None,
        inputs: vec![
            named(input, location, Some(1), None),
            named("encoder", "minilm", None, Some(made.encoder.into())),
        ],
        config: serde_json::json!({}),
        seeds: Vec::new(),
        binary: "test".into(),
        started: Utc::now(),
        command: Vec::new(),
    };
    let Begin::Fresh(handle) = lake::manifest::begin(zone, claim).await.expect("a claim") else {
        panic!("{run} has {stage} already");
    };
    let path = format!("runs/{run}/embeddings");
    let outputs = vec![Output { name: "embeddings".into(), path, version: Some(made.version) }];
    handle.finish(outputs, serde_json::json!({ "dimension": made.dimension })).await.expect("a manifest");
}

#[test]
fn votes_decide_what_is_selected() {
    let setting = Setting::new(&USUAL);
    let ran = setting.run(&["--baseline-run", "base", "--delta", "1e-5"]).check(0, &["epsilon"]);
    let summary: serde_json::Value = serde_json::from_str(&ran.stdout).expect("JSON");
    let histogram = setting.histogram();
    assert_eq!(histogram.len(), 6);
    assert!(histogram.iter().all(|bin| bin.1 == 40), "{histogram:?}");
    // 400 units: 200 + 0 at corner 0, the other 200 at corners 1, 3 and 5; noise of σ = 2 is below 14 almost always.
    let mut noisy: Vec<i64> = histogram.iter().map(|bin| bin.0).collect();
    noisy.sort_unstable();
    for (found, expected) in noisy.iter().zip([0, 0, 66, 67, 67, 200]) {
        assert!((found - expected).abs() < 14, "{noisy:?}");
    }
    let selected = setting.selected();
    assert_eq!(selected.len(), 60);
    let ids: HashSet<&String> = selected.iter().map(|row| &row.0).collect();
    assert_eq!(ids.len(), 60, "without replacement");
    assert!(selected.iter().all(|row| row.1 == format!("synthetic text {}", &row.0[1..])));
    let largest = histogram.iter().max().expect("bins");
    assert!((25..=35).contains(&largest.2), "half of the target: {histogram:?}");
    assert_eq!(summary["facts"]["selected"], 60);
    assert!(setting.path("release/runs/demo/centroids.safetensors").exists());
    comparison_shows_what_resampling_buys(&setting);
}

fn comparison_shows_what_resampling_buys(setting: &Setting) {
    let batches = setting.read("private", "runs/demo/comparison", &["set", "total_variation"]);
    let [batch] = &batches[..] else { panic!("one batch") };
    let sets: Vec<_> = batch.column(0).as_string::<i32>().iter().flatten().collect();
    let distances = batch.column(1).as_primitive::<Float64Type>().values();
    assert_eq!(sets, ["base", "synthetic", "selected"]);
    assert!(distances[2] < 0.15 && distances[1] > 0.3 && distances[0] > 0.2, "{distances:?}");
    let bins = setting.comparison_bins();
    assert_eq!(bins.len(), 24, "four sets over six bins");
    for (set, rows) in [("test", 100), ("base", 240), ("synthetic", 240), ("selected", 60)] {
        let of_set: Vec<_> = bins.iter().filter(|row| row.0 == set).collect();
        assert_eq!(of_set.iter().map(|row| row.1).sum::<i64>(), rows, "{set}");
        assert!(of_set.iter().all(|row| row.2 == row.1 as f64 / rows as f64), "{of_set:?}");
    }
    assert!(!setting.path("release/runs/demo/comparison").exists());
}

#[test]
fn a_bin_that_runs_out_is_reported() {
    let setting = Setting::new(&USUAL);
    let ran = setting.run(&["--target", "150"]).check(0, &[]);
    let summary: serde_json::Value = serde_json::from_str(&ran.stdout).expect("JSON");
    assert_eq!(summary["facts"]["selected"].as_u64().expect("a count"), setting.selected().len() as u64);
    assert_eq!(summary["facts"]["ran_out"]["bins"].as_array().map(Vec::len), Some(1));
    assert!(setting.histogram().iter().any(|bin| bin.2 == 40), "the bin gave all it has");
}

#[test]
fn a_second_run_finds_it_done_and_other_settings_are_refused() {
    let setting = Setting::new(&USUAL);
    let first = setting.run(&[]).check(0, &[]);
    let again = setting.run(&[]).check(0, &[]);
    let now_done = first.stdout.replace(r#""already_done":false"#, r#""already_done":true"#);
    assert!(now_done != first.stdout && now_done == again.stdout, "{}", again.stdout);
    setting.run(&["--target", "61"]).check(2, &["target"]);
    assert_eq!(setting.spent(), 1);
}

#[test]
fn killed_while_voting_then_rerun_spends_once_and_repeats_the_noise() {
    let setting = Setting::new(&USUAL);
    setting.run(&[]).check(0, &[]);
    let (histogram, selected) = (setting.histogram(), setting.selected());
    let forget = |names: &[&str]| {
        fs::remove_file(setting.path("release/runs/demo/stages/vote.json")).expect("a manifest");
        names.iter().for_each(|name| fs::remove_dir_all(setting.path(name)).expect("a table"));
    };
    for names in [
        &["release/runs/demo/selected"][..],
        &["release/runs/demo/selected", "release/runs/demo/histogram", "private/runs/demo/comparison"],
        &["release/runs/demo/selected", "release/runs/demo/histogram", "release/runs/demo/clusters"],
    ] {
        forget(names);
        setting.run(&[]).check(0, &[]);
        assert_eq!((setting.histogram(), setting.selected()), (histogram.clone(), selected.clone()), "{names:?}");
        assert_eq!(setting.spent(), 1);
    }
}

#[test]
fn votes_on_replaced_centroids_are_refused_rather_than_noised_a_second_time() {
    let setting = Setting::new(&USUAL);
    setting.run(&[]).check(0, &[]);
    for gone in ["histogram", "selected"] {
        fs::remove_dir_all(setting.path(&format!("release/runs/demo/{gone}"))).expect("a table");
    }
    fs::remove_file(setting.path("release/runs/demo/stages/vote.json")).expect("a manifest");
    let centroids = setting.path("release/runs/demo/centroids.safetensors");
    let original = fs::read(&centroids).expect("centroids");
    let mut replaced = original.clone();
    // The last bits of the last number.
    let place = replaced.len() - 4;
    replaced[place] ^= 1;
    fs::write(&centroids, replaced).expect("other centroids");
    setting.run(&[]).check(3, &["other centroids", "help:"]);
    assert!(!setting.path("release/runs/demo/histogram").exists());
    fs::write(&centroids, original).expect("the centroids");
    setting.run(&[]).check(0, &[]);
    assert_eq!(setting.spent(), 1);
}

#[test]
fn other_data_get_other_noise() {
    let noisy = |units_moved| {
        let setting = Setting::new(&Variation { units_moved, ..USUAL });
        // The same key in both, as after a restore: only the data differ.
        fs::create_dir_all(setting.path("private/keys")).expect("a folder");
        fs::write(setting.path("private/keys/noise.key"), format!("{}\n", "7".repeat(64))).expect("a key");
        setting.run(&[]).check(0, &[]);
        setting.histogram().into_iter().map(|bin| bin.0).collect::<Vec<_>>()
    };
    let (one, other) = (noisy(0), noisy(1));
    // One unit moved from one bin to another: with the same noise four of six bins would be equal.
    let equal = one.iter().zip(&other).filter(|(a, b)| a == b).count();
    assert!(equal < 4, "{one:?} {other:?}");
}

#[test]
fn over_budget_is_refused_before_a_vote_is_formed() {
    let setting = Setting::new(&Variation { epsilon: 0.5, ..USUAL });
    setting.run(&[]).check(4, &["0.5", "help:"]);
    assert_eq!(setting.spent(), 0);
    // The ledger is asked before anything is written, public as it may be; the key comes before the noise.
    for path in ["release/runs/demo/centroids.safetensors", "release/runs/demo/clusters", "private/keys/noise.key"] {
        assert!(!setting.path(path).exists(), "{path}");
    }
}

#[test]
fn how_often_the_private_vectors_were_committed_is_told_nowhere() {
    let told = |commits| {
        let setting = Setting::new(&Variation { commits, ..USUAL });
        let ran = setting.run(&[]).check(0, &[]);
        let mut summary: serde_json::Value = serde_json::from_str(&ran.stdout).expect("JSON");
        summary["facts"].take();
        (setting.release_objects(), summary)
    };
    let (one, seven) = (told(1), told(7));
    assert!(one.0.contains_key("runs/demo/stages/vote.claim.json"), "{:?}", one.0.keys());
    assert!(one.0.contains_key("runs/demo/stages/vote.json"), "{:?}", one.0.keys());
    assert_eq!(one, seven);
}

#[test]
fn clusters_ignore_the_private_data() {
    let published = |units_moved| {
        let setting = Setting::new(&Variation { units_moved, ..USUAL });
        setting.run(&[]).check(0, &[]);
        let clusters = fs::read_dir(setting.path("release/runs/demo/clusters")).expect("a table").flatten();
        let data_files = clusters.map(|entry| entry.path()).filter(|path| path.extension() == Some("parquet".as_ref()));
        let clusters: Vec<Vec<u8>> = data_files.map(|path| fs::read(path).expect("a file")).collect();
        let centroids = fs::read(setting.path("release/runs/demo/centroids.safetensors")).expect("centroids");
        assert_eq!(clusters.len(), 1);
        (centroids, clusters, setting.histogram().into_iter().map(|bin| bin.0).max().expect("bins"))
    };
    let (one, other) = (published(0), published(400));
    // Half of 400 units at one corner, or all: the noise of σ = 2 does not reach so far.
    assert!(other.2 - one.2 > 100, "the corpora are told apart: {} {}", one.2, other.2);
    assert!(one.0 == other.0, "centroids");
    assert!(one.1 == other.1, "clusters");
}

#[test]
fn a_private_vector_that_is_not_finite_votes_for_nothing_and_a_public_one_is_refused() {
    // A unit of the train split, and one of the test split.
    let setting = Setting::new(&Variation { broken_records: &[0, 450], ..USUAL });
    let ran = setting.run(&[]).check(0, &[]);
    assert!(!ran.stderr.contains("finite") && !ran.stdout.contains("finite"), "{}\n{}", ran.stdout, ran.stderr);
    let bins = setting.comparison_bins();
    assert_eq!(bins.iter().filter(|row| row.0 == "test").map(|row| row.1).sum::<i64>(), 99);

    let setting = Setting::new(&Variation { broken_texts: &[7], ..USUAL });
    setting.run(&[]).check(3, &["row 7: column `embedding`: found a number that is not finite", "help:"]);
    assert_eq!(setting.spent(), 0);
}

#[test]
fn bad_public_tables_cost_no_budget() {
    let setting = Setting::new(&Variation { id_twice: true, ..USUAL });
    setting.run(&[]).check(3, &["runs/demo/embeddings", "an id occurs twice", "help:"]);
    assert_eq!(setting.spent(), 0);

    let setting = Setting::new(&Variation { broken_baseline: &[5], ..USUAL });
    setting
        .run(&["--baseline-run", "base"])
        .check(3, &["runs/base/embeddings", "row 5: column", "not finite", "help:"]);
    assert_eq!(setting.spent(), 0);
}

#[test]
fn what_does_not_fit_is_refused() {
    let setting = Setting::new(&USUAL);
    let cases: &[(&[&str], i32, &[&str])] = &[
        (&["--clusters", "241"], 2, &["--clusters 241", "240 synthetic rows"]),
        (&["--target", "241"], 2, &["--target 241", "240 synthetic rows"]),
        (&["--corpus", "other"], 2, &["--corpus other", "corpora/chats"]),
        (&["--candidates", "flan"], 2, &["--candidates flan", "runs/demo/synthetic"]),
        (&["--baseline-run", "nobody"], 3, &["nobody", "embed", "help:"]),
        (&["--clusters", "0", "--target", "0"], 2, &["--clusters", "--target"]),
        (&["--variance", "1.5"], 2, &["--variance"]),
        (&["--delta", "1e-301"], 2, &["--delta"]),
        (&["--subsample", "3"], 2, &["--subsample"]),
    ];
    for (flags, code, messages) in cases {
        setting.run(flags).check(*code, messages);
        assert!(!setting.path("release/runs/demo/stages/vote.claim.json").exists(), "{flags:?}");
    }
    assert_eq!(setting.spent(), 0);
}

#[test]
fn vectors_of_two_encoders_are_refused() {
    let setting = Setting::new(&Variation { corpus_encoder: "e2", ..USUAL });
    setting.run(&[]).check(3, &["another encoder", "help:"]);
    let setting = Setting::new(&Variation { corpus_dimension: 7, ..USUAL });
    setting.run(&[]).check(3, &["another encoder", "help:"]);
    assert!(!setting.path("release/runs/demo/histogram").exists());
}

#[test]
fn shards_that_did_not_embed_the_same_are_refused() {
    let setting = Setting::new(&USUAL);
    let stages = setting.path("private/runs/demo/stages");
    let whole = fs::read(stages.join("embed-corpus.json")).expect("a manifest");
    let whole: serde_json::Value = serde_json::from_slice(&whole).expect("JSON");
    fs::remove_file(stages.join("embed-corpus.json")).expect("a manifest");
    let write = |index: u32, place: &str, value: serde_json::Value| {
        let mut manifest = whole.clone();
        manifest["claim"]["shard"] = serde_json::json!([index, 2]);
        *manifest.pointer_mut(place).expect("a field") = value;
        fs::write(stages.join(format!("embed-corpus.{index}-of-2.json")), manifest.to_string()).expect("a manifest");
    };
    write(0, "/claim/run", "demo".into());
    setting.run(&[]).check(3, &["of 2 shards of `embed-corpus`, each expected once, found 0/2", "help:"]);
    for (place, value) in [
        ("/claim/inputs/0/location", "corpora/other".into()),
        ("/claim/inputs/0/version", 7.into()),
        ("/claim/inputs/1/digest", "e2".into()),
        ("/facts/dimension", 9.into()),
    ] {
        write(1, place, value);
        setting.run(&[]).check(3, &["shards 1/2 of `embed-corpus` differ from shard 0/2", "help:"]);
    }
    write(1, "/claim/shard", serde_json::json!([1, 3]));
    setting.run(&[]).check(3, &["shards 1/3 of `embed-corpus` differ from shard 0/2", "help:"]);
    write(1, "/claim/shard", serde_json::json!([0, 2]));
    setting.run(&[]).check(3, &["each expected once, found 0/2, 0/2", "help:"]);
    assert_eq!(setting.spent(), 0);
    write(1, "/claim/run", "demo".into());
    setting.run(&[]).check(0, &[]);
}
