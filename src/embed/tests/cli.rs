//! The command line contract of doppel-embed: exit codes, messages, and what is in storage afterwards.

use std::collections::BTreeMap;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;

use arrow::array::{ArrayRef, AsArray, RecordBatch, StringArray};
use arrow::datatypes::{Float32Type, SchemaRef};
use lake::{AppTransaction, PrivateRoot, ReleaseRoot, StorageOptions, Zone, schema};
use lm::device::{Compute, DeviceChoice, DtypeChoice};
use lm::encoder::Encoder;
use serde_json::{Value, json};
use tempfile::TempDir;

/// A tiny random T5 encoder, made by tests/golden/encoder.py.
fn encoder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../lm/src/encoder/golden/t5-relu").canonicalize().unwrap()
}

struct Place {
    folder: TempDir,
}

impl Place {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).display().to_string()
    }

    fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_doppel-embed"));
        for name in ["DOPPEL_RUN", "DOPPEL_PRIVATE", "DOPPEL_RELEASE", "RUST_LOG"] {
            command.env_remove(name);
        }
        command.args(["--format", "json", "--dtype", "f32", "--device", "cpu", "--encoder"]).arg(encoder());
        command
    }

    /// Embeds public texts, with no private root.
    fn synthetic(&self, run: &str, arguments: &[&str]) -> Output {
        let mut command = self.command();
        command.args(["--of", "synthetic", "--run", run, "--release", &self.path("release")]).args(arguments);
        command.output().unwrap()
    }

    /// Embeds a corpus, with no release root.
    fn corpus(&self, run: &str, arguments: &[&str]) -> Output {
        let mut command = self.command();
        command.args(["--of", "corpus", "--run", run, "--private", &self.path("private")]).args(arguments);
        command.output().unwrap()
    }

    /// A corpus with `rows` records, each its own unit, in one commit.
    fn write_corpus(&self, rows: usize) {
        let column = |name: &str| (0..rows).map(|row| format!("{name}{row}")).collect::<Vec<_>>();
        let split = (0..rows).map(|row| if row % 3 == 0 { "test" } else { "train" }.to_string()).collect();
        self.write("corpora/chat", schema::corpus(), vec![column("r"), column("u"), column("secret "), split]);
    }

    fn write(&self, path: &str, schema: SchemaRef, columns: Vec<Vec<String>>) {
        let arrays = columns.into_iter().map(|column| Arc::new(StringArray::from(column)) as ArrayRef).collect();
        let batch = RecordBatch::try_new(schema.clone(), arrays).unwrap();
        let (private, release) = (self.path("private"), self.path("release"));
        block_on(async {
            let options = StorageOptions::default();
            let table = match path.starts_with("corpora/") {
                true => PrivateRoot::open(&private, &options).await.unwrap().table(path),
                false => ReleaseRoot::open(&release, &options).await.unwrap().table(path),
            };
            table.create(schema).await.unwrap();
            table.append(vec![batch], AppTransaction { id: "test".into(), version: 0 }).await.unwrap();
        });
    }

    /// A table with `id` and `text` in the release zone.
    fn candidates(&self, path: &str, texts: &[String]) {
        let ids = (0..texts.len()).map(|row| format!("{row:05}")).collect();
        self.write(path, strings(&["id", "text"]), vec![ids, texts.to_vec()]);
    }

    fn vectors(&self, zone: &str, run: &str) -> BTreeMap<String, Vec<f32>> {
        let (url, path) = (self.path(zone), format!("runs/{run}/embeddings"));
        let batches = block_on(async {
            let options = StorageOptions::default();
            let table = match zone {
                "private" => PrivateRoot::open(&url, &options).await.unwrap().table(&path),
                _ => ReleaseRoot::open(&url, &options).await.unwrap().table(&path),
            };
            table.read(table.pin().await.unwrap(), &["id", "embedding"]).await.unwrap()
        });
        let mut vectors = BTreeMap::new();
        for batch in batches {
            let lists = batch.column(1).as_list::<i32>();
            for (row, id) in batch.column(0).as_string::<i32>().iter().enumerate() {
                let vector = lists.value(row).as_primitive::<Float32Type>().values().to_vec();
                let earlier = vectors.insert(id.unwrap().to_string(), vector);
                assert!(earlier.is_none(), "{id:?} is there twice");
            }
        }
        vectors
    }
}

fn block_on<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Runtime::new().unwrap().block_on(work)
}

fn strings(names: &[&str]) -> SchemaRef {
    use arrow::datatypes::{DataType, Field, Schema};
    Arc::new(Schema::new(names.iter().map(|name| Field::new(*name, DataType::Utf8, false)).collect::<Vec<_>>()))
}

fn texts(count: usize) -> Vec<String> {
    (0..count).map(|row| format!("{} {row}", "word".repeat(row % 5))).collect()
}

fn json_of(output: &Output) -> Value {
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Asserts exit code and message, and that nothing went to standard output.
fn fails(output: &Output, code: i32, message: &str) {
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{error}");
    assert!(error.contains(message), "expected {message:?} in {error}");
    assert!(output.stdout.is_empty());
}

#[test]
fn synthetic_texts_are_embedded_without_a_private_root_and_once() {
    let place = Place::new();
    let texts = texts(30);
    place.candidates("runs/demo/synthetic", &texts);
    let first = json_of(&place.synthetic("demo", &[]));
    assert_eq!(
        (&first["zone"], &first["dimension"], &first["already_done"]),
        (&json!("release"), &json!(24), &json!(false))
    );
    let vectors = place.vectors("release", "demo");
    let compute = Compute::resolve(DeviceChoice::Cpu, DtypeChoice::F32).unwrap();
    let expected = Encoder::load(&encoder(), compute)
        .unwrap()
        .embed(&texts.iter().map(String::as_str).collect::<Vec<_>>(), 4096)
        .unwrap();
    assert_eq!(vectors.into_values().collect::<Vec<_>>(), expected);
    assert_eq!(json_of(&place.synthetic("demo", &[]))["already_done"], json!(true));
    assert_eq!(place.vectors("release", "demo").len(), 30);
}

#[test]
fn shards_cover_all_rows_once_and_agree_with_one_piece() {
    let place = Place::new();
    place.candidates("runs/flan/candidates", &texts(4500));
    for shard in ["1/2", "0/2"] {
        json_of(&place.synthetic("parts", &["--table", "runs/flan/candidates", "--shard", shard]));
    }
    json_of(&place.synthetic("whole", &["--table", "runs/flan/candidates"]));
    let parts = place.vectors("release", "parts");
    assert_eq!(parts.len(), 4500);
    assert_eq!(parts, place.vectors("release", "whole"));
    let again = place.synthetic("parts", &["--table", "runs/flan/candidates", "--shard", "0/3"]);
    assert_eq!(again.status.code(), Some(2));
}

#[test]
fn killed_while_embedding_then_rerun_gives_what_one_clean_run_gives() {
    let place = Place::new();
    place.candidates("runs/flan/candidates", &texts(9000));
    let mut command = place.command();
    command.args(["--of", "synthetic", "--run", "killed", "--table", "runs/flan/candidates"]);
    let mut child = command.args(["--release", &place.path("release")]).spawn().unwrap();
    let log = place.path("release/runs/killed/embeddings/_delta_log/00000000000000000001.json");
    for _ in 0..600 {
        if Path::new(&log).exists() || child.try_wait().unwrap().is_some() {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let _ = child.kill();
    child.wait().unwrap();
    json_of(&place.synthetic("killed", &["--table", "runs/flan/candidates"]));
    json_of(&place.synthetic("clean", &["--table", "runs/flan/candidates"]));
    let killed = place.vectors("release", "killed");
    assert_eq!(killed.len(), 9000);
    assert_eq!(killed, place.vectors("release", "clean"));
}

#[test]
fn a_corpus_stays_in_the_private_zone_and_its_size_is_not_told() {
    let place = Place::new();
    // Four digits, which no time of day in a log line has.
    let rows = 1373;
    place.write_corpus(rows);
    let output = place.corpus("demo", &["--corpus", "chat", "-v"]);
    let summary = json_of(&output);
    assert_eq!((&summary["zone"], &summary["stage"]), (&json!("private"), &json!("embed-corpus")));
    let told = format!("{summary}{}", String::from_utf8_lossy(&output.stderr));
    assert!(!told.contains("1373") && !told.contains("secret"), "{told}");
    assert_eq!(place.vectors("private", "demo").len(), rows);
    assert!(!Path::new(&place.path("release")).exists());
    let manifest = std::fs::read_to_string(place.path("private/runs/demo/stages/embed-corpus.json")).unwrap();
    assert!(manifest.contains("corpora/chat"));
}

#[test]
fn corpora_of_one_and_of_two_chunks_look_alike_from_outside() {
    let told = |rows| {
        let place = Place::new();
        place.write_corpus(rows);
        let output = place.corpus("demo", &["--corpus", "chat", "-vvv", "--log-format", "json"]);
        let again = place.corpus("demo", &["--corpus", "chat"]);
        assert_eq!(place.vectors("private", "demo").len(), rows);
        (json_of(&output), json_of(&again), timeless(&output), timeless(&again))
    };
    // A chunk has 2,048 rows.
    let (one, two) = (told(2000), told(2100));
    assert_eq!(one.0["version"], Value::Null, "{}", one.0);
    assert!(one.2.iter().any(|line| line["message"] == "stage ended"), "{:?}", one.2);
    assert_eq!(one, two);
}

/// The lines of the log without what follows the clock: times, and how often it is told that work goes on.
fn timeless(output: &Output) -> Vec<Value> {
    let lines = String::from_utf8_lossy(&output.stderr).into_owned();
    let mut lines: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).expect("JSON lines")).collect();
    lines.retain(|line| line["message"] != "working");
    for line in &mut lines {
        ["timestamp", "seconds"].iter().for_each(|field| drop(line[*field].take()));
    }
    lines
}

#[test]
fn a_sample_with_missing_shards_is_not_embedded() {
    let place = Place::new();
    place.candidates("runs/demo/synthetic", &texts(3));
    let claim = json!({
        "run": "demo", "stage": "synthesize", "shard": [0, 2], "inputs": [], "config": {}, "seeds": [0],
        "binary": "doppel-synthesize 0", "started": "2026-01-01T00:00:00Z",
    });
    std::fs::create_dir_all(place.path("release/runs/demo/stages")).unwrap();
    let stages = |name: &str| place.path(&format!("release/runs/demo/stages/{name}"));
    std::fs::write(stages("synthesize.0-of-2.claim.json"), claim.to_string()).unwrap();
    let manifest = json!({ "claim": claim, "outputs": [], "facts": {}, "ended": "2026-01-01T00:00:00Z" });
    std::fs::write(stages("synthesize.0-of-2.json"), manifest.to_string()).unwrap();
    fails(&place.synthetic("demo", &[]), 3, "shard 1/2 has not finished");
    // A table that was named is taken as it is.
    json_of(&place.synthetic("demo", &["--table", "runs/demo/synthetic"]));
}

/// What was begun elsewhere, or by another build, differs by rounding, and which shard a row is in depends on the records
/// before it.
#[test]
fn a_corpus_is_embedded_on_machines_of_one_kind_by_one_build() {
    let place = Place::new();
    place.write_corpus(30);
    let part = |shard| place.corpus("demo", &["--corpus", "chat", "--shard", shard]);
    json_of(&part("0/2"));
    let stages = place.folder.path().join("private/runs/demo/stages");
    let files = ["embed-corpus.0-of-2.json", "embed-corpus.0-of-2.claim.json"].map(|name| stages.join(name));
    let saved = files.each_ref().map(|file| std::fs::read_to_string(file).unwrap());
    for (key, value, expected) in [
        ("compute", json!("cuda, f32"), "its corpus is embedded on cuda, f32 by doppel-embed "),
        ("build", json!("doppel-embed 0.0.9"), "by doppel-embed 0.0.9; this would be cpu, f32, "),
        ("build", Value::Null, "by an earlier build; this would be cpu, f32, "),
    ] {
        for (file, text) in files.iter().zip(&saved) {
            let mut told: Value = serde_json::from_str(text).unwrap();
            let claim = if told["claim"].is_null() { &mut told } else { &mut told["claim"] };
            claim["config"][key] = value.clone();
            std::fs::write(file, told.to_string()).unwrap();
        }
        fails(&part("1/2"), 2, expected);
        assert_eq!(json_of(&part("0/2"))["already_done"], json!(true));
    }
    files.iter().zip(saved).for_each(|(file, text)| std::fs::write(file, text).unwrap());
    json_of(&part("1/2"));
}

#[test]
fn a_run_id_with_other_settings_is_refused() {
    let place = Place::new();
    place.candidates("runs/demo/synthetic", &texts(3));
    place.candidates("runs/flan/candidates", &texts(3));
    json_of(&place.synthetic("demo", &[]));
    fails(&place.synthetic("demo", &["--table", "runs/flan/candidates"]), 2, "earlier runs/demo/synthetic");
    let mut command = place.command();
    command.args(["--of", "synthetic", "--run", "demo", "--release", &place.path("release")]);
    let other = command.env("IGNORED", "").args(["--batch-tokens", "64"]).output().unwrap();
    assert_eq!(json_of(&other)["already_done"], json!(true), "batch size is no setting of the result");
}

#[test]
fn inputs_that_cannot_be_used_are_named() {
    let place = Place::new();
    fails(&place.synthetic("demo", &[]), 3, "runs/demo/synthetic");
    fails(&place.corpus("demo", &["--corpus", "chat"]), 3, "corpora/chat");

    place.write("runs/other/candidates", strings(&["id", "body"]), vec![vec!["a".into()], vec!["b".into()]]);
    fails(&place.synthetic("other", &["--table", "runs/other/candidates"]), 3, "text");

    place.candidates("runs/none/synthetic", &[]);
    fails(&place.synthetic("none", &[]), 3, "no rows");

    place.candidates("runs/demo/synthetic", &texts(2));
    let with = |encoder: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_doppel-embed"));
        command.args(["--of", "synthetic", "--run", "demo", "--release", &place.path("release"), "--encoder", encoder]);
        command.output().unwrap()
    };
    fails(&with(&place.path("absent")), 3, "absent");
    fails(&with(&place.path("release")), 3, "no modules.json");
    assert!(!Path::new(&place.path("release/runs/demo/embeddings")).exists());
}

#[test]
fn wrong_usage_says_what_to_change() {
    let place = Place::new();
    fails(&place.synthetic("a", &["--corpus", "chat"]), 2, "--of corpus");
    fails(&place.synthetic("a", &["--shard", "2/2"]), 2, "0/8");
    fails(&place.synthetic("a", &["--table", "../private/x"]), 2, "--table");
    fails(&place.synthetic("a", &["--batch-tokens", "0"]), 2, "--batch-tokens 0");
    fails(&place.corpus("a", &[]), 2, "--corpus");
    let mut command = place.command();
    command.args(["--of", "synthetic", "--run", "a"]);
    fails(&command.output().unwrap(), 2, "no release root is given");
}
