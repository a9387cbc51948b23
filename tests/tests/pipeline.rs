//! The whole pipeline on models of a few thousand weights: what a user of the command line sees from end to end.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use arrow::array::{ArrayRef, RecordBatch, StringArray};
use arrow::datatypes::{DataType, Field, Schema};
use lake::{AppTransaction, PrivateRoot, ReleaseRoot, StorageOptions, Zone};
use scenarios::binaries::{self, Ran};
use scenarios::lakes::{NOISE_KEY, cells, command, contents, write_noise_key};
use scenarios::otlp::Collector;
use scenarios::tiny::{RUN, SAMPLES, TARGET, Workplace, with};
use serde_json::{Value, json};

const LAKE: &str = "lake";

/// A place with one lake, and the commands of its stages.
struct Pipeline {
    place: Workplace,
}

impl Pipeline {
    fn new() -> Self {
        Self { place: Workplace::new() }
    }

    /// A path in the lake.
    fn path(&self, name: &str) -> PathBuf {
        self.place.path(LAKE).join(name)
    }

    fn set_budget(&self, epsilon: &str) {
        binaries::run(&mut command(&self.place.budget(LAKE, epsilon)), 0);
    }

    fn partition(&self) -> Command {
        command(&self.place.partition(LAKE))
    }

    fn train(&self) -> Command {
        command(&self.place.train(LAKE))
    }

    fn synthesize(&self, shard: &str) -> Command {
        command(&self.place.synthesize(LAKE, &format!("--adapter-run={RUN} --shard={shard}")))
    }

    fn vote(&self) -> Command {
        command(&self.place.vote(LAKE))
    }

    /// All stages in order, as `(what, command)`; each is given both roots, as `DOPPEL_PRIVATE` and `DOPPEL_RELEASE` would.
    fn stages(&self) -> Vec<(&'static str, Command)> {
        let private = self.place.private(LAKE);
        vec![
            ("partition", self.partition()),
            ("train", self.train()),
            ("synthesize 0/2", self.synthesize("0/2")),
            ("synthesize 1/2", self.synthesize("1/2")),
            ("embed the synthetic", command(&self.place.embed(LAKE, &format!("--of=synthetic --private={private}")))),
            ("embed the corpus", command(&self.place.embed_corpus(LAKE))),
            ("vote", self.vote()),
        ]
    }

    fn query(&self, sql: &str) -> Command {
        let mut query = command(&format!("doppel-query --run={RUN} --release={}", self.place.release(LAKE)));
        query.args(["--output=json", sql]);
        query
    }

    fn rows(&self, sql: &str) -> Value {
        binaries::run(&mut self.query(sql), 0).json()
    }

    /// A table with nothing but ids and texts in the release zone.
    fn write_texts(&self, path: &str, texts: &BTreeMap<String, String>) {
        let schema = Schema::new(["id", "text"].map(|name| Field::new(name, DataType::Utf8, false)).to_vec());
        let columns: Vec<ArrayRef> = vec![
            Arc::new(StringArray::from_iter_values(texts.keys())),
            Arc::new(StringArray::from_iter_values(texts.values())),
        ];
        let batch = RecordBatch::try_new(Arc::new(schema), columns).expect("two columns");
        let url = self.path("release").display().to_string();
        tokio::runtime::Runtime::new().expect("a runtime").block_on(async {
            let table = ReleaseRoot::open(&url, &StorageOptions::default()).await.expect("a root").table(path);
            table.create(batch.schema()).await.expect("a table");
            table.append(vec![batch], AppTransaction { id: "flan".into(), version: 0 }).await.expect("rows");
        });
    }

    fn count(&self, table: &str) -> u64 {
        self.rows(&format!("SELECT count(*) AS n FROM {table}"))[0]["n"].as_u64().expect("a count")
    }
}

#[track_caller]
fn refused(command: &mut Command, exit_code: i32, expected: &str) -> Ran {
    let ran = binaries::run(command, exit_code);
    assert!(ran.stderr.contains(expected), "expected {expected:?} in:\n{}", ran.stderr);
    ran
}

#[test]
fn from_conversations_to_selected_rows_and_again_for_nothing() {
    let pipeline = Pipeline::new();
    pipeline.set_budget("50");
    for (_, mut command) in pipeline.stages() {
        binaries::run(&mut command, 0);
    }

    assert_eq!(pipeline.count("synthetic"), SAMPLES as u64);
    assert_eq!(pipeline.count("embeddings"), SAMPLES as u64);
    assert_eq!(pipeline.count("clusters"), SAMPLES as u64);
    assert_eq!(pipeline.count("histogram"), 4);
    let selected = pipeline.count("selected");
    assert!((1..=TARGET as u64).contains(&selected), "{selected} selected");
    let mechanisms = pipeline.rows("SELECT DISTINCT mechanism, epsilon > 0 AS spent FROM releases ORDER BY mechanism");
    assert_eq!(
        mechanisms,
        json!([
            { "mechanism": "discrete_gaussian", "spent": true },
            { "mechanism": "poisson_sampled_gaussian", "spent": true },
        ])
    );

    let before = (contents(&pipeline.path("private")), contents(&pipeline.path("release")));
    for (_, mut command) in pipeline.stages() {
        binaries::run(&mut command, 0);
    }
    let after = (contents(&pipeline.path("private")), contents(&pipeline.path("release")));
    assert!(before == after, "running every stage again changed a file");
}

/// Stands in every private text, and in every privacy unit. No model of some thousand weights spells either by chance.
const MARKS: [&str; 2] = ["zjkmwq", "xvunit"];

/// So many units that every count of records or units has four digits, as no size, setting or port of this run has.
const MARKED_UNITS: usize = 2111;

/// Conversations of [`MARKED_UNITS`] units of one to three parts, all of them marked.
fn marked_conversations() -> Value {
    let parts = (0..MARKED_UNITS).flat_map(|unit| (0..=unit % 3).map(move |part| (unit, part)));
    let conversation = |(unit, part): (usize, usize)| {
        json!({
            "id": format!("{}{unit}_{part}", MARKS[1]),
            "conversations": [{ "from": "human", "value": format!("Greet {} {unit} and {part}", MARKS[0]) }],
        })
    };
    Value::Array(parts.map(conversation).collect())
}

/// One column of a table, each cell as text.
struct Column {
    table: String,
    name: String,
    cells: Vec<String>,
}

/// All columns of all tables of a zone that lies at `folder`.
async fn columns(zone: &impl Zone, folder: &Path) -> Vec<Column> {
    let log =
        |path: &Path| Some(path.parent()?.strip_prefix(folder).ok()?.to_str()?.strip_suffix("/_delta_log")?.into());
    let tables: BTreeSet<String> = contents(folder).iter().filter_map(|(path, _)| log(path)).collect();
    let mut found = Vec::new();
    for path in tables {
        let table = zone.table(&path);
        let version = table.pin().await.expect("a table has a version");
        for field in table.schema(version).await.expect("a table has columns").fields() {
            let batches = table.read(version, &[field.name()]).await.expect("a column is readable");
            let cells = batches.iter().flat_map(|batch| cells(batch.column(0))).collect();
            found.push(Column { table: path.clone(), name: field.name().clone(), cells });
        }
    }
    found
}

/// What a file other than a table's data says: JSON objects, the header of safetensors, any text.
fn told_by_file(path: &Path, content: &[u8]) -> String {
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("parquet") => String::new(),
        Some("safetensors") => {
            let (length, rest) = content.split_first_chunk::<8>().expect("a safetensors file has a header");
            String::from_utf8_lossy(&rest[..u64::from_le_bytes(*length) as usize]).into_owned()
        }
        Some("json") => serde_json::Deserializer::from_slice(content)
            .into_iter::<Value>()
            .map(|object| without_file_sizes(object.expect("JSON")).to_string() + "\n")
            .collect(),
        _ => String::from_utf8_lossy(content).into_owned(),
    }
}

/// Takes the size of a data file out of a line of a table's log: it follows from what is in the file, and may be any
/// number.
fn without_file_sizes(mut line: Value) -> Value {
    if let Some(size) = line.get_mut("add").and_then(|add| add.get_mut("size")) {
        size.take();
    }
    line
}

/// Numbers, digests and names in a text.
fn words(text: &str) -> impl Iterator<Item = &str> {
    let is_part = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
    text.split(move |c: char| !is_part(c)).map(|word| word.trim_matches(['.', '-']))
}

/// Words that nothing outside the private zone may say: ids and numbers of records and units, losses, the noise key,
/// digests of what is private.
async fn private_words(pipeline: &Pipeline) -> BTreeSet<String> {
    let folder = pipeline.path("private");
    let private = PrivateRoot::open(&folder.display().to_string(), &StorageOptions::default()).await.expect("a root");
    let mut found = BTreeSet::new();
    for column in columns(&private, &folder).await {
        let table = private.table(&column.table);
        let version = table.pin().await.expect("a table has a version");
        found.insert(table.digest(version).await.expect("a table has a digest"));
        match column.name.as_str() {
            "record_id" | "unit" | "loss" => found.extend(column.cells),
            _ => {}
        }
    }
    let file = |name: &str| std::fs::read_to_string(folder.join(name)).expect("a private file");
    let counts = file("runs/tiny/partition-counts.json");
    // A small number may be anybody's.
    found.extend(words(&counts).filter(|word| word.parse().is_ok_and(|count: u64| count >= 1000)).map(str::to_string));
    let ledger = contents(&folder.join("ledger")).into_iter().map(|(path, content)| told_by_file(&path, &content));
    for text in ledger.chain([file("keys/noise.key")]) {
        found.extend(words(&text).filter(|word| word.len() == 64).map(str::to_string));
    }
    found
}

#[track_caller]
fn says_nothing_private(what: &str, text: &str, private: &BTreeSet<String>) {
    for mark in MARKS {
        assert!(!text.contains(mark), "{what} holds {mark}");
    }
    if let Some(word) = words(text).find(|word| private.contains(*word)) {
        panic!("{what} says {word}");
    }
}

#[test]
fn nothing_private_reaches_the_release_zone_the_output_the_log_or_the_telemetry() {
    let pipeline = Pipeline::new();
    std::fs::write(pipeline.place.path("conversations.json"), marked_conversations().to_string())
        .expect("conversations");
    // A fixed key makes every run draw the same, so that this test cannot fail by chance.
    write_noise_key(&pipeline.path("private"));
    pipeline.set_budget("50");
    let collector = Collector::start().expect("a collector");
    let mut printed = Vec::new();
    // The second round finds everything done, and tells so.
    for format in ["text", "json"] {
        for (what, mut command) in pipeline.stages() {
            if what == "partition" {
                command.args(["--max-per-unit", "2"]);
            }
            let ran = binaries::run(
                command.args(["-vvv", "--log-format", "json", "--format", format]).envs(collector.env()),
                0,
            );
            printed.extend([(what, ran.stdout), (what, ran.stderr)]);
        }
    }
    let mut query = pipeline.query("SELECT * FROM clusters");
    let ran = binaries::run(query.args(["-vvv", "--log-format", "json"]).envs(collector.env()), 0);
    printed.extend([("query", ran.stdout), ("query", ran.stderr)]);

    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let private = runtime.block_on(private_words(&pipeline));
    for known in [MARKED_UNITS.to_string(), NOISE_KEY.trim().to_string(), format!("{}7", MARKS[1])] {
        assert!(private.contains(&known), "{known} is no secret of this run");
    }
    for (what, text) in &printed {
        assert!(!text.is_empty(), "{what} printed nothing");
        says_nothing_private(what, text, &private);
    }

    let spans: BTreeSet<String> = collector.spans().into_iter().map(|span| span.name).collect();
    for stage in ["partition", "train", "synthesize", "embed", "vote", "query"] {
        assert!(spans.contains(&format!("doppel.{stage}")), "{stage} exported no span: {spans:?}");
    }
    assert!(collector.metrics().iter().any(|metric| metric.name == "doppel.rows" && metric.sum > 0.0));
    says_nothing_private("telemetry", &collector.text(), &private);

    let folder = pipeline.path("release");
    for (path, content) in contents(&folder) {
        says_nothing_private(&path.display().to_string(), &told_by_file(&path, &content), &private);
        let holds = |mark: &str| content.windows(mark.len()).any(|window| window == mark.as_bytes());
        assert!(!MARKS.into_iter().any(holds), "{} holds a mark", path.display());
    }
    let release = runtime.block_on(ReleaseRoot::open(&folder.display().to_string(), &StorageOptions::default()));
    let columns = runtime.block_on(columns(&release.expect("a root"), &folder));
    let tables: BTreeSet<&str> = columns.iter().map(|column| column.table.as_str()).collect();
    let expected =
        ["clusters", "embeddings", "histogram", "selected", "synthetic"].map(|name| format!("runs/tiny/{name}"));
    assert_eq!(tables, expected.iter().map(String::as_str).collect());
    for column in columns {
        // What a mechanism gave may be any number: generated texts and noised counts.
        let is_output = matches!(column.name.as_str(), "text" | "noisy_count");
        let private = if is_output { &BTreeSet::new() } else { &private };
        says_nothing_private(&format!("{}.{}", column.table, column.name), &column.cells.join("\n"), private);
    }
}

#[test]
fn other_candidates_are_embedded_and_voted_on_in_place_of_sampled_texts() {
    let pipeline = Pipeline::new();
    pipeline.set_budget("50");
    let texts: BTreeMap<String, String> =
        (0..80).map(|row| (format!("flan-{row}"), format!("Premise {row}: {}.", "no ".repeat(row % 17)))).collect();
    pipeline.write_texts("candidates/flan", &texts);
    binaries::run(&mut pipeline.partition(), 0);
    binaries::run(&mut command(&pipeline.place.embed_corpus(LAKE)), 0);
    binaries::run(&mut command(&pipeline.place.embed(LAKE, "--of=synthetic --table=candidates/flan")), 0);
    binaries::run(pipeline.vote().args(["--candidates", "candidates/flan"]), 0);
    let selected = pipeline.rows("SELECT id, text FROM selected");
    let selected = selected.as_array().expect("rows");
    assert!((1..=TARGET).contains(&selected.len()), "{} selected", selected.len());
    for row in selected {
        let (id, text) = (row["id"].as_str().expect("an id"), row["text"].as_str().expect("a text"));
        assert_eq!(texts.get(id).map(String::as_str), Some(text), "{id}");
    }
}

#[test]
fn a_run_id_means_one_thing() {
    let pipeline = Pipeline::new();
    pipeline.set_budget("50");
    binaries::run(&mut pipeline.partition(), 0);
    binaries::run(&mut pipeline.train(), 0);
    refused(pipeline.train().args(["--seed", "9"]), 2, "seed");
    refused(pipeline.partition().args(["--max-per-unit", "2"]), 2, "max_per_unit");
}

#[test]
fn training_beyond_the_budget_is_refused_before_it_reads() {
    let pipeline = Pipeline::new();
    binaries::run(&mut pipeline.partition(), 0);
    refused(&mut pipeline.train(), 2, "budget");
    pipeline.set_budget("0.5");
    // Without the records, only a stage that does not read them can say that the budget does not suffice.
    let corpus = pipeline.path("private/corpora/chats");
    let rows = contents(&corpus).into_iter().filter(|(path, _)| path.extension().is_some_and(|end| end == "parquet"));
    rows.for_each(|(path, _)| std::fs::remove_file(path).expect("a data file"));
    refused(&mut pipeline.train(), 4, "help:");
    assert!(!pipeline.path("release/runs").exists(), "a refused run left something");
}

#[test]
fn of_two_trainings_that_race_for_the_last_of_a_budget_one_wins() {
    let pipeline = Pipeline::new();
    // One spends 2.93, two 3.61.
    pipeline.set_budget("3.2");
    binaries::run(&mut pipeline.partition(), 0);
    let start = |run: &str| {
        let mut command = command(&with(&pipeline.place.train(LAKE), &format!("--run={RUN}"), &format!("--run={run}")));
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().expect("doppel-train starts")
    };
    let racers = [start("one"), start("two")];
    let ended = racers.map(|racer| racer.wait_with_output().expect("doppel-train ends").status.code());
    assert!(matches!(ended, [Some(0), Some(4)] | [Some(4), Some(0)]), "{ended:?}");
}
