//! What a user of `doppel-train` sees: exit codes and messages, on a tiny model and a corpus of forty units.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use arrow::array::{ArrayRef, RecordBatch, StringArray};
use assert_cmd::Command;
use lake::{AppTransaction, CorpusTerms, PrivateRoot, StorageOptions, Zone, schema};
use scenarios::models;

/// A text that must appear nowhere but in the private root.
const MARKER: &str = "zebra-quartz-marker";

struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    /// A model, and a corpus with a budget.
    fn new(epsilon: f64) -> Self {
        let place = Self { folder: tempfile::tempdir().unwrap() };
        models::write_llama(&place.path("llama"), 1).unwrap();
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(async {
            let options = StorageOptions { timeout: Duration::from_secs(30) };
            let root = PrivateRoot::open(place.path("private").to_str().unwrap(), &options).await.unwrap();
            write_corpus(&root).await;
            ledger::set_budget(&root, "chats", epsilon, 1e-5).await.unwrap();
        });
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn train(&self, run: &str) -> Command {
        self.train_on(run, "chats", "llama")
    }

    fn train_on(&self, run: &str, corpus: &str, model: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_doppel-train"));
        command.arg("--private").arg(self.path("private")).arg("--release").arg(self.path("release"));
        command.args(["--run", run, "--corpus", corpus, "--model"]).arg(self.path(model));
        command.args(["--rank", "2", "--targets", "q,v", "--learning-rate", "1e-2", "--block-length", "48"]);
        command.args(["--dtype", "f32", "--device", "cpu"]);
        command
    }

    fn dp(&self, run: &str) -> Command {
        let mut command = self.train(run);
        command.args(["--expected-batch-size", "16", "--records", "32", "--steps", "3", "--noise-multiplier", "1"]);
        command
    }
}

async fn write_corpus(root: &PrivateRoot) {
    let rows: Vec<[String; 4]> = (0..40)
        .map(|unit| {
            let split = if unit % 5 == 4 { "validation" } else { "train" };
            [format!("r{unit}"), format!("u{unit}"), format!("{MARKER} number {unit}"), split.to_string()]
        })
        .collect();
    let column = |index: usize| -> ArrayRef {
        Arc::new(StringArray::from_iter_values(rows.iter().map(|row| row[index].as_str())))
    };
    let batch = RecordBatch::try_new(schema::corpus(), (0..4).map(column).collect()).unwrap();
    let table = root.table("corpora/chats");
    table.create(schema::corpus()).await.unwrap();
    table.append(vec![batch], AppTransaction { id: "test/partition".into(), version: 0 }).await.unwrap();
    let terms = CorpusTerms { privacy_unit: "id".into(), max_per_unit: 1, conditions: vec![] };
    terms.write(root, "chats").await.unwrap();
}

fn ended(command: &mut Command, exit_code: i32) -> String {
    let output = command.output().unwrap();
    let told = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(exit_code), "{told}");
    assert!(!told.contains(MARKER), "private text was told: {told}");
    told
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).into_iter().flatten() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => files.extend(self::files(&path)),
            false => files.push(path),
        }
    }
    files
}

#[test]
fn a_run_publishes_an_adapter_and_a_second_one_is_a_no_op() {
    let place = Place::new(1000.0);
    ended(&mut place.dp("one"), 0);
    let adapter = place.path("release/runs/one/adapter/adapter_model.safetensors");
    let first = std::fs::read(&adapter).unwrap();
    let again = ended(place.dp("one").args(["--format", "json"]), 0);
    assert!(again.contains("\"already_done\":true") || again.contains("\"already_done\": true"), "{again}");
    assert_eq!(std::fs::read(&adapter).unwrap(), first);
    for file in files(&place.path("release")) {
        let bytes = std::fs::read(&file).unwrap();
        assert!(!bytes.windows(MARKER.len()).any(|window| window == MARKER.as_bytes()), "{}", file.display());
    }
}

#[test]
fn a_run_whose_manifest_is_lost_repeats_its_noise_and_spends_nothing() {
    let place = Place::new(1000.0);
    ended(&mut place.dp("one"), 0);
    let adapter = place.path("release/runs/one/adapter/adapter_model.safetensors");
    let first = std::fs::read(&adapter).unwrap();
    let entries = files(&place.path("private/ledger")).len();
    // Everything of the run is lost but the ledger and the claim: trained again from the first step.
    std::fs::remove_file(place.path("release/runs/one/stages/train.json")).unwrap();
    std::fs::remove_dir_all(place.path("private/runs/one/train")).unwrap();
    ended(&mut place.dp("one"), 0);
    assert_eq!(std::fs::read(&adapter).unwrap(), first, "the same noise gives the same adapter");
    assert_eq!(files(&place.path("private/ledger")).len(), entries, "nothing was spent twice");
    // A new id is a new release: other noise, and a reservation of its own.
    ended(&mut place.dp("two"), 0);
    assert_ne!(std::fs::read(place.path("release/runs/two/adapter/adapter_model.safetensors")).unwrap(), first);
    assert!(files(&place.path("private/ledger")).len() > entries);
}

#[test]
fn a_run_id_with_other_settings_is_refused() {
    let place = Place::new(1000.0);
    ended(&mut place.dp("one"), 0);
    let told = ended(place.dp("one").args(["--seed", "5"]), 2);
    assert!(told.contains("seed"), "{told}");
}

#[test]
fn a_spent_budget_is_exit_code_4_and_publishes_nothing() {
    let place = Place::new(0.5);
    let told = ended(&mut place.dp("one"), 4);
    assert!(told.contains("budget"), "{told}");
    assert!(!place.path("release/runs/one/adapter").exists());
}

#[test]
fn a_missing_corpus_and_a_missing_model_are_exit_code_3() {
    let place = Place::new(10.0);
    let settings = ["--expected-batch-size", "16", "--records", "32", "--steps", "3", "--noise-multiplier", "1"];
    let told = ended(place.train_on("one", "other", "llama").args(settings), 3);
    assert!(told.contains("corpora/other"), "{told}");
    let told = ended(place.train_on("one", "chats", "nowhere").args(settings), 3);
    assert!(told.contains("nowhere"), "{told}");
}

#[test]
fn a_model_without_a_tokenizer_is_exit_code_3() {
    let place = Place::new(1000.0);
    std::fs::remove_file(place.path("llama/tokenizer.json")).unwrap();
    let told = ended(&mut place.dp("one"), 3);
    assert!(told.contains("tokenizer"), "{told}");
}

#[test]
fn a_corpus_smaller_than_the_expected_batch_is_exit_code_3_without_its_size() {
    let place = Place::new(1000.0);
    let mut command = place.train("one");
    command.args(["--expected-batch-size", "500", "--records", "1000", "--steps", "1", "--noise-multiplier", "5"]);
    let told = ended(&mut command, 3);
    assert!(told.contains("fewer units than the expected batch"), "{told}");
    assert!(!told.contains("32"), "the number of units is private: {told}");
}

#[test]
fn all_wrong_flags_are_told_at_once() {
    let place = Place::new(10.0);
    let mut command = place.train("one");
    command.args(["--expected-batch-size", "64", "--records", "32", "--steps", "0", "--noise-multiplier", "1"]);
    let told = ended(&mut command, 2);
    assert!(told.contains("--steps 0") && told.contains("sampling probability 2"), "{told}");
}

#[test]
fn a_baseline_without_privacy_stays_in_the_private_zone() {
    let place = Place::new(10.0);
    let mut command = place.train("plain");
    command.args(["--expected-batch-size", "16", "--records", "32", "--steps", "2", "--no-dp"]);
    ended(&mut command, 0);
    assert!(place.path("private/runs/plain/adapter/adapter_config.json").exists());
    assert!(files(&place.path("release")).is_empty());
    assert!(files(&place.path("private/ledger")).len() <= 1, "no mechanism, no reservation");
}
