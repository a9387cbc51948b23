//! Reruns and lineage: whole runs of the real stages, repeated after the tables moved on.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use arrow::array::{ArrayRef, AsArray, Int32Array, RecordBatch, StringArray};
use arrow::datatypes::Int32Type;
use lake::{AppTransaction, PrivateRoot, ReleaseRoot, StorageOptions, Zone, schema};
use safetensors::SafeTensors;
use scenarios::binaries::{self, Ran};
use scenarios::lakes::contents;
use scenarios::s3::{Key, S3};
use scenarios::tiny::{RUN, Workplace, with};
use serde_json::{Value, json};

const LAKE: &str = "lake";

/// A whole run, after which rows came to the corpus and to the synthetic texts.
fn ran_and_moved_on() -> Workplace {
    let place = Workplace::new();
    for task in place.pipeline(LAKE, "50") {
        let (program, arguments) = task.command.split_first().expect("a program");
        binaries::run(binaries::command(program).args(arguments), 0);
    }
    block_on(async {
        let text = |text: &str| -> ArrayRef { Arc::new(StringArray::from(vec![text])) };
        let row = [text("late/0"), text("late"), text("Came later."), text("train")];
        append(&private(&place).await, "corpora/chats", RecordBatch::try_new(schema::corpus(), row.to_vec())).await;
        let release = release(&place).await;
        let table = release.table(&path("synthetic"));
        let version = table.pin().await.expect("a version");
        let columns = schema::synthetic().fields().iter().map(|field| field.name().clone()).collect::<Vec<_>>();
        let columns: Vec<&str> = columns.iter().map(String::as_str).collect();
        let first = table.read(version, &columns).await.expect("rows").remove(0).slice(0, 1);
        append(&release, &path("synthetic"), Ok(first)).await;
    });
    place
}

async fn append<Z: Zone>(root: &Z, path: &str, batch: Result<RecordBatch, arrow::error::ArrowError>) {
    let transaction = AppTransaction { id: "later".into(), version: 0 };
    let batch = batch.expect("a row that fits");
    assert!(root.table(path).append(vec![batch], transaction).await.expect("a commit"));
}

fn path(name: &str) -> String {
    format!("runs/{RUN}/{name}")
}

fn block_on<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Runtime::new().expect("a runtime").block_on(work)
}

async fn private(place: &Workplace) -> PrivateRoot {
    PrivateRoot::open(&place.private(LAKE), &StorageOptions::default()).await.expect("a root")
}

async fn release(place: &Workplace) -> ReleaseRoot {
    ReleaseRoot::open(&place.release(LAKE), &StorageOptions::default()).await.expect("a root")
}

/// `doppel COMMAND` with both roots, in a folder without models.
fn doppel(place: &Workplace, arguments: &[&str]) -> Command {
    let mut command = binaries::command("doppel");
    command.args(arguments).args(["--private", &place.private(LAKE), "--release", &place.release(LAKE)]);
    command.current_dir(place.path(LAKE));
    command
}

/// `doppel rerun` that is told where the models lie.
fn rerun(place: &Workplace, run: &str, arguments: &[&str]) -> Command {
    let mut command = doppel(place, &["rerun", run]);
    for (flag, model) in [("model", "llama"), ("encoder", "bert")] {
        let stage = arguments.iter().position(|word| *word == "--stage").map(|at| arguments[at + 1]);
        let takes = match stage {
            None => true,
            Some(stage) => matches!((stage, flag), ("train" | "synthesize", "model") | ("embed", "encoder")),
        };
        if takes {
            command.arg("-p").arg(format!("{flag}={}", place.path(model).display()));
        }
    }
    command.args(arguments);
    command
}

/// Both roots, without what reruns keep.
fn roots(place: &Workplace) -> Vec<(PathBuf, Vec<u8>)> {
    let mut found = contents(&place.path(LAKE));
    let reruns = Path::new(&place.private(LAKE)).join("reruns");
    found.retain(|(path, _)| !path.starts_with(&reruns));
    found
}

fn kept(place: &Workplace) -> usize {
    contents(&Path::new(&place.private(LAKE)).join("reruns")).len()
}

#[track_caller]
fn says(ran: &Ran, expected: &[&str]) {
    for expected in expected {
        assert!(ran.stderr.contains(expected), "expected {expected:?} in:\n{}", ran.stderr);
    }
}

/// Changes the last byte of the last tensor of the adapter, and returns the tensor's name.
fn tamper_with_the_adapter(place: &Workplace) -> String {
    let file = Path::new(&place.release(LAKE)).join(path("adapter/adapter_model.safetensors"));
    let mut body = std::fs::read(&file).expect("an adapter");
    let last = body.len() - 1;
    body[last] ^= 1;
    std::fs::write(&file, &body).expect("an adapter");
    let tensors = SafeTensors::deserialize(&body).expect("tensors");
    let end = |name: &str| tensors.tensor(name).expect("a tensor").data().as_ptr_range().end;
    tensors.names().into_iter().max_by_key(|name| end(name)).expect("a name").to_string()
}

/// Writes the table of selected rows again, with another bin in its second row.
async fn tamper_with_the_selection(place: &Workplace) {
    let release = release(place).await;
    let table = release.table(&path("selected"));
    let batches = table.read(table.pin().await.expect("a version"), &["id", "text", "bin"]).await.expect("rows");
    let batch = arrow::compute::concat_batches(&batches[0].schema(), &batches).expect("one batch");
    let mut bins = batch.column(2).as_primitive::<Int32Type>().values().to_vec();
    bins[1] += 1;
    let columns = vec![batch.column(0).clone(), batch.column(1).clone(), Arc::new(Int32Array::from(bins)) as ArrayRef];
    std::fs::remove_dir_all(Path::new(&place.release(LAKE)).join(path("selected"))).expect("a table's folder");
    let table = release.table(&path("selected"));
    table.create(schema::selected()).await.expect("a table");
    append(&release, &path("selected"), RecordBatch::try_new(schema::selected(), columns)).await;
}

#[test]
fn a_rerun_after_the_tables_moved_on_is_equal_spends_nothing_and_changes_nothing() {
    let place = ran_and_moved_on();
    let before = roots(&place);
    let told = binaries::run(&mut rerun(&place, RUN, &["--format", "json"]), 0).json();
    assert_eq!((&told["equal"], &told["not_repeated"], &told["scratch"]), (&json!(true), &json!([]), &Value::Null));
    let mut outputs: Vec<(&str, &str)> = told["outputs"]
        .as_array()
        .expect("outputs")
        .iter()
        .map(|output| (output["stage"].as_str().expect("a stage"), output["output"].as_str().expect("a name")))
        .collect();
    outputs.sort();
    let expected = [
        ("embed", "embeddings"),
        ("embed-corpus", "embeddings"),
        ("partition", "corpus"),
        ("partition", "counts"),
        ("partition", "terms"),
        ("synthesize", "synthetic"),
        ("train", "adapter"),
        ("train", "loss"),
        ("vote", "centroids"),
        ("vote", "clusters"),
        ("vote", "comparison"),
        ("vote", "comparison_bins"),
        ("vote", "histogram"),
        ("vote", "selected"),
    ];
    assert_eq!(outputs, expected);
    assert!(roots(&place) == before, "a rerun changed a file of a root");
    assert!(!Path::new(&place.private(LAKE)).join("reruns").exists(), "an equal rerun left folders");
    let folder = place.path("").display().to_string();
    for (path, content) in contents(&Path::new(&place.release(LAKE)).join(path("stages"))) {
        let text = String::from_utf8(content).expect("JSON");
        assert!(!text.contains(&folder), "{} holds a path of this machine", path.display());
    }

    // Without its raw input, the corpus cannot be made again, and what is not finished cannot be repeated.
    std::fs::rename(place.path("conversations.json"), place.path("elsewhere.json")).expect("an input");
    std::fs::remove_file(Path::new(&place.release(LAKE)).join(path("stages/vote.json"))).expect("a manifest");
    let told = binaries::run(&mut doppel(&place, &["rerun", RUN, "--stage", "partition"]), 3).stdout;
    for part in ["nothing was repeated", "not repeated: vote: it did not end", "conversations.json cannot be read"] {
        assert!(told.contains(part), "expected {part:?} in:\n{told}");
    }
}

#[test]
fn a_rerun_on_s3_is_equal() {
    let (place, server) = (Workplace::new(), S3::start().expect("a server"));
    let (private, release) = (server.private_url("again"), server.release_url("again"));
    let environment = server.environment(Key::Both);
    for task in place.pipeline(LAKE, "50") {
        let there =
            |word: &String| word.replace(&place.private(LAKE), &private).replace(&place.release(LAKE), &release);
        let command: Vec<String> = task.command.iter().map(there).collect();
        binaries::run(binaries::command(&command[0]).args(&command[1..]).envs(environment.clone()), 0);
    }
    let mut command = binaries::command("doppel");
    command.args(["rerun", RUN, "--private", &private, "--release", &release, "--format", "json"]);
    for (flag, model) in [("model", "llama"), ("encoder", "bert")] {
        command.arg("-p").arg(format!("{flag}={}", place.path(model).display()));
    }
    let told = binaries::run(command.envs(environment).current_dir(place.path("")), 0).json();
    assert_eq!((&told["equal"], &told["not_repeated"], &told["scratch"]), (&json!(true), &json!([]), &Value::Null));
    assert_eq!(told["outputs"].as_array().map(Vec::len), Some(14));
}

#[test]
fn what_was_tampered_with_is_not_equal_and_the_place_is_told() {
    let place = ran_and_moved_on();
    block_on(tamper_with_the_selection(&place));
    let ran = binaries::run(&mut rerun(&place, RUN, &["--stage", "vote"]), 3);
    assert!(ran.stdout.contains("not equal: row 1\n"), "{}", ran.stdout);
    assert!(ran.stdout.contains("1 of 6 outputs are not equal"), "{}", ran.stdout);
    says(&ran, &["must not be released", &format!("private/reruns/{RUN}/")]);
    assert!(kept(&place) > 0, "the unequal outputs are gone");

    let tensor = tamper_with_the_adapter(&place);
    let before = roots(&place);
    let told = binaries::run(&mut rerun(&place, RUN, &["--stage", "train", "--format", "json"]), 3).json();
    let place_of = |name: &str| {
        let outputs = told["outputs"].as_array().expect("outputs");
        outputs.iter().find(|output| output["output"] == name).expect("an output")["where"].clone()
    };
    assert_eq!(place_of("adapter"), format!("adapter_model.safetensors: {tensor}"));
    assert_eq!(place_of("loss"), Value::Null);
    assert!(roots(&place) == before, "a rerun changed a file of a root");
}

#[test]
fn a_rerun_that_cannot_be_says_why() {
    let place = ran_and_moved_on();
    let ran = binaries::run(&mut doppel(&place, &["rerun", "nobody"]), 3);
    says(&ran, &["the run `nobody` left nothing", "`doppel runs` lists runs"]);
    let ran = binaries::run(&mut doppel(&place, &["rerun", RUN, "--stage", "tain"]), 3);
    says(&ran, &["no stage `tain` has ended", "train"]);
    let ran = binaries::run(&mut doppel(&place, &["rerun", RUN, "-p", "input=moved.json"]), 2);
    says(&ran, &["-p input: no digest of a raw input is recorded", "help:"]);
    let ran = binaries::run(&mut doppel(&place, &["rerun", RUN]), 2);
    says(&ran, &["--model=llama: not found", "-p model=PATH", "--encoder=bert: not found", "with the digest "]);
    // Another model of the same name and shape is told by its digest.
    let other = place.path("other");
    scenarios::models::write_llama(&other, 7).expect("a model is written");
    let given = format!("model={}", other.display());
    let ran = binaries::run(&mut doppel(&place, &["rerun", RUN, "--stage", "train", "-p", &given]), 2);
    says(&ran, &["digest of input model: earlier", "train: doppel-train ended with exit code 2"]);
    let mut command = binaries::command("doppel");
    let ran = binaries::run(command.args(["rerun", RUN, "--release", &place.release(LAKE)]), 2);
    says(&ran, &["pass --private URL and --release URL"]);
    assert_eq!(kept(&place), 0);
}

/// The `inputs` of the claim of a stage, by name.
fn pinned(place: &Workplace, run: &str, stage: &str, input: &str) -> Value {
    let told = binaries::run(&mut doppel(place, &["show", run, "--format", "json"]), 0).json();
    let stages = told["stages"].as_array().expect("stages").clone();
    let claims = stages.into_iter().map(|stage| stage["manifest"]["claim"].clone());
    let claim = claims.into_iter().find(|claim| claim["stage"] == stage).expect("a stage");
    let inputs = claim["inputs"].as_array().expect("inputs").clone();
    inputs.into_iter().find(|one| one["name"] == input).expect("an input")["version"].clone()
}

fn reservations(place: &Workplace) -> Vec<(String, String)> {
    let mut command = binaries::command("doppel");
    command.args(["budget", "chats", "--format", "json", "--private", &place.private(LAKE)]);
    let told = binaries::run(&mut command, 0).json();
    let entries = told["entries"].as_array().expect("entries").clone();
    let text = |entry: &Value, key: &str| entry[key].as_str().expect("a text").to_owned();
    entries.iter().map(|entry| (text(entry, "run"), text(entry, "stage"))).collect()
}

#[test]
fn a_new_release_reads_the_old_snapshots_under_new_noise_and_pays_for_it() {
    let place = ran_and_moved_on();
    let adapter = |run: &str| {
        let file = Path::new(&place.release(LAKE)).join(format!("runs/{run}/adapter/adapter_model.safetensors"));
        std::fs::read(file).expect("an adapter")
    };
    let before = roots(&place);
    binaries::run(&mut rerun(&place, RUN, &["--as", "again"]), 0);
    let after = roots(&place);
    assert!(adapter(RUN) != adapter("again"), "the noise is the same");
    let paid = [(RUN, "train"), (RUN, "vote"), ("again", "train"), ("again", "vote")];
    assert_eq!(reservations(&place), paid.map(|(run, stage)| (run.to_owned(), stage.to_owned())));
    for stage in ["train", "embed-corpus", "vote"] {
        let version = pinned(&place, RUN, stage, "corpus");
        assert!(version.is_number());
        assert_eq!(pinned(&place, "again", stage, "corpus"), version, "{stage} reads another version");
    }
    assert!(before.iter().all(|file| after.contains(file)), "the old run changed");

    // Once more it finds everything done; under the id of another run it is refused, as is what the budget cannot pay.
    binaries::run(&mut rerun(&place, RUN, &["--as", "again"]), 0);
    assert!(roots(&place) == after, "a finished release changed");
    says(&binaries::run(&mut rerun(&place, "again", &["--as", RUN]), 2), &["the run tiny exists"]);
    // With a changed setting it goes on as well, where the setting is the same again.
    let shorter = || rerun(&place, RUN, &["--as", "shorter", "-p", "steps=1"]);
    let told = binaries::run(&mut shorter(), 0).stdout;
    assert!(told.contains("changed: --steps=1"), "{told}");
    let after = roots(&place);
    binaries::run(&mut shorter(), 0);
    assert!(roots(&place) == after, "a finished release changed");
    says(&binaries::run(&mut rerun(&place, RUN, &["--as", "shorter"]), 2), &["the run shorter exists"]);

    let set = place.budget(LAKE, "3.7");
    binaries::run(binaries::command("doppel").args(set.split(' ').skip(1)), 0);
    says(&binaries::run(&mut rerun(&place, RUN, &["--as", "third"]), 4), &["run third would bring ε to"]);
    assert!(!Path::new(&place.release(LAKE)).join("runs/third").exists(), "a refused release began");
    // A release of a release is repeated like any other.
    let told = binaries::run(&mut rerun(&place, "again", &["--stage", "train", "--format", "json"]), 0).json();
    assert_eq!(told["equal"], true);
    // A model is known by its digest, whatever its folder is called by now.
    std::fs::rename(place.path("llama"), place.path("renamed")).expect("a model");
    let given = format!("model={}", place.path("renamed").display());
    let mut moved = doppel(&place, &["rerun", RUN, "--stage", "synthesize", "-p", &given, "--format", "json"]);
    assert_eq!(binaries::run(&mut moved, 0).json()["equal"], true);
}

#[test]
fn a_pin_reads_that_version_and_one_of_another_table_is_refused() {
    let place = ran_and_moved_on();
    let train = |run: &str, pin: &str| {
        let command = with(&place.train(LAKE), &format!("--run={RUN}"), &format!("--run={run} --pin={pin}"));
        let mut words = command.split(' ').map(str::to_owned);
        let mut train = binaries::command(&words.next().expect("a program"));
        train.args(words.filter(|word| !word.is_empty()));
        train
    };
    let old = pinned(&place, RUN, "train", "corpus").as_i64().expect("a version");
    binaries::run(&mut train("old", &format!("corpora/chats={old}")), 0);
    assert_eq!(pinned(&place, "old", "train", "corpus"), old);
    let ran = binaries::run(&mut train("old", &format!("corpora/chats={}", old + 1)), 2);
    says(&ran, &["reads version"]);
    says(&binaries::run(&mut train("new", "corpora/chats=9"), 3), &["version 9 is pinned"]);
    says(&binaries::run(&mut train("new", "corpora/other=1"), 2), &["does not read it", "it reads corpora/chats"]);
}

#[test]
fn lineage_walks_from_the_selected_rows_to_the_raw_input() {
    let place = ran_and_moved_on();
    let text = binaries::run(&mut doppel(&place, &["lineage", "tiny/selected"]), 0).stdout;
    for part in [
        "runs/tiny/selected at version 1  (release zone)\n  made by vote of run tiny, doppel-vote",
        "candidates: runs/tiny/synthetic at version",
        "made by synthesize 0/2, 1/2 of run tiny",
        "adapter: runs/tiny/adapter  digest",
        "made by train of run tiny",
        "corpus: corpora/chats at version 1  (private zone)",
        "made by partition of run tiny",
        "/conversations.json\n",
        "raw input",
        "model: llama  digest",
        "as above",
    ] {
        assert!(text.contains(part), "expected {part:?} in:\n{text}");
    }
    let tree = binaries::run(&mut doppel(&place, &["lineage", "corpora/chats@1", "--format", "json"]), 0).json();
    let maker = &tree["made_by"][0];
    assert_eq!((&maker["stage"], &tree["note"]), (&json!("partition"), &Value::Null));
    let input = &maker["inputs"][0];
    assert!(input["path"].as_str().is_some_and(|path| path.ends_with("/conversations.json")), "{input}");
    let moved = binaries::run(&mut doppel(&place, &["lineage", "corpora/chats"]), 0).stdout;
    assert!(moved.contains("no stage ended with this version: partition of run tiny wrote the table"), "{moved}");
    let ran = binaries::run(&mut doppel(&place, &["lineage", "tiny/selekted"]), 3);
    says(&ran, &["did you mean `runs/tiny/selected`?"]);

    let shown = binaries::run(&mut doppel(&place, &["show", RUN]), 0).stdout;
    for part in [
        "binary    doppel-train",
        "command   --run=tiny",
        "--model=llama",
        "reads     corpus: corpora/chats at version 1",
        "writes    adapter",
        "settings  {",
        "seeds     5",
    ] {
        assert!(shown.contains(part), "expected {part:?} in:\n{shown}");
    }
}
