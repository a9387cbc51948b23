//! What a user of `doppel-train` sees: exit codes and messages, on a tiny model and a corpus of forty units.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use arrow::array::{ArrayRef, AsArray, RecordBatch, StringArray};
use arrow::datatypes::{Float64Type, Int64Type};
use assert_cmd::Command;
use lake::{AppTransaction, CorpusTerms, PrivateRoot, StorageOptions, Zone, schema};
use scenarios::models;

/// A text that must appear nowhere but in the private root.
const MARKER: &str = "zebra-quartz-marker";

const SETTINGS: [&str; 8] =
    ["--expected-batch-size", "16", "--records", "32", "--steps", "3", "--noise-multiplier", "1"];

struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    /// A model, and a corpus with a budget.
    fn new(epsilon: f64) -> Self {
        let place = Self { folder: tempfile::tempdir().unwrap() };
        models::write_llama(&place.path("llama"), 1).unwrap();
        place.within(async |root| {
            write_corpus(&root, MARKER).await;
            ledger::set_budget(&root, "chats", epsilon, 1e-5).await.unwrap();
        });
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Does something with the private root.
    fn within<T>(&self, work: impl AsyncFnOnce(PrivateRoot) -> T) -> T {
        tokio::runtime::Runtime::new().unwrap().block_on(async {
            let options = StorageOptions { timeout: Duration::from_secs(30) };
            work(PrivateRoot::open(self.path("private").to_str().unwrap(), &options).await.unwrap()).await
        })
    }

    /// A place with the same model and a copy of the private root, noise key and all.
    fn copy(&self) -> Self {
        self.within(async |root| drop(ledger::noise_key(&root).await.unwrap()));
        let place = Self { folder: tempfile::tempdir().unwrap() };
        for from in files(self.folder.path()) {
            let to = place.folder.path().join(from.strip_prefix(self.folder.path()).unwrap());
            std::fs::create_dir_all(to.parent().unwrap()).unwrap();
            std::fs::copy(from, to).unwrap();
        }
        place
    }

    /// Stops a run after its first step, as if it had been killed there.
    fn stop_after_one_step(&self, command: Command, run: &str) {
        self.stop_in_step(2, command, run);
    }

    /// Stops a run before it can write the checkpoint of `step`: a folder stands where that must go.
    fn stop_in_step(&self, step: u64, mut command: Command, run: &str) {
        let checkpoint = self.checkpoint(run, step);
        std::fs::create_dir_all(&checkpoint).unwrap();
        let told = ended(&mut command, 2);
        assert!(told.contains(&format!("step-{step:08}.safetensors")), "{told}");
        std::fs::remove_dir(checkpoint).unwrap();
    }

    fn checkpoint(&self, run: &str, step: u64) -> PathBuf {
        self.path(&format!("private/runs/{run}/train/checkpoints/step-{step:08}.safetensors"))
    }

    fn first_checkpoint(&self, run: &str) -> PathBuf {
        self.checkpoint(run, 1)
    }

    fn adapter(&self, run: &str) -> Vec<u8> {
        std::fs::read(self.path(&format!("release/runs/{run}/adapter/adapter_model.safetensors"))).unwrap()
    }

    /// `(step, validation loss)` in the private root, by step.
    fn losses(&self, run: &str, stage: &str) -> Vec<(i64, f64)> {
        let mut rows = self.within(async |root| {
            let table = root.table(&format!("runs/{run}/{stage}/loss"));
            let batches = table.read(table.pin().await.unwrap(), &["step", "loss"]).await.unwrap();
            let row = |batch: &RecordBatch, row| {
                let (steps, losses) = (batch.column(0).as_primitive::<Int64Type>(), batch.column(1));
                (steps.value(row), losses.as_primitive::<Float64Type>().value(row))
            };
            batches.iter().flat_map(|batch| (0..batch.num_rows()).map(|at| row(batch, at))).collect::<Vec<_>>()
        });
        rows.sort_by_key(|row| row.0);
        rows
    }

    fn train(&self, run: &str) -> Command {
        self.train_on(run, "chats", "llama")
    }

    fn train_on(&self, run: &str, corpus: &str, model: &str) -> Command {
        let mut command = self.bare(run, corpus, model);
        command.args(["--rank", "2", "--targets", "q,v", "--learning-rate", "1e-2", "--block-length", "48"]);
        command.args(["--dtype", "f32", "--device", "cpu"]);
        command
    }

    /// With no flag but those that name things.
    fn bare(&self, run: &str, corpus: &str, model: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_doppel-train"));
        command.arg("--private").arg(self.path("private")).arg("--release").arg(self.path("release"));
        command.args(["--run", run, "--corpus", corpus, "--model"]).arg(self.path(model));
        command
    }

    fn dp(&self, run: &str) -> Command {
        let mut command = self.train(run);
        command.args(SETTINGS);
        command
    }

    fn baseline(&self, run: &str) -> Command {
        let mut command = self.train(run);
        command.args(["--expected-batch-size", "16", "--records", "32", "--steps", "2", "--no-dp"]);
        command
    }
}

/// Forty units whose texts begin with `words`.
async fn write_corpus(root: &PrivateRoot, words: &str) {
    let rows: Vec<[String; 4]> = (0..40)
        .map(|unit| {
            let split = if unit % 5 == 4 { "validation" } else { "train" };
            [format!("r{unit}"), format!("u{unit}"), format!("{words} number {unit}"), split.to_string()]
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
    files.sort();
    files
}

#[test]
fn a_run_publishes_an_adapter_and_a_second_one_is_a_no_op() {
    let place = Place::new(1000.0);
    ended(&mut place.dp("one"), 0);
    let first = place.adapter("one");
    let again = ended(place.dp("one").args(["--format", "json"]), 0);
    assert!(again.contains("\"already_done\":true") || again.contains("\"already_done\": true"), "{again}");
    assert!(place.adapter("one") == first);
    for file in files(&place.path("release")) {
        let bytes = std::fs::read(&file).unwrap();
        assert!(!bytes.windows(MARKER.len()).any(|window| window == MARKER.as_bytes()), "{}", file.display());
    }
}

#[test]
fn a_run_whose_manifest_is_lost_repeats_its_noise_and_spends_nothing() {
    let place = Place::new(1000.0);
    ended(&mut place.dp("one"), 0);
    let first = place.adapter("one");
    let entries = files(&place.path("private/ledger")).len();
    // Everything of the run is lost but the ledger and the claim: trained again from the first step.
    std::fs::remove_file(place.path("release/runs/one/stages/train.json")).unwrap();
    std::fs::remove_dir_all(place.path("private/runs/one/train")).unwrap();
    ended(&mut place.dp("one"), 0);
    assert!(place.adapter("one") == first, "the same noise gives the same adapter");
    assert_eq!(files(&place.path("private/ledger")).len(), entries, "nothing was spent twice");
    // A new id is a new release: other noise, and a reservation of its own.
    ended(&mut place.dp("two"), 0);
    assert!(place.adapter("two") != first);
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
    let told = ended(place.train_on("one", "other", "llama").args(SETTINGS), 3);
    assert!(told.contains("corpora/other"), "{told}");
    let told = ended(place.train_on("one", "chats", "nowhere").args(SETTINGS), 3);
    assert!(told.contains("nowhere"), "{told}");
}

/// What partition leaves while it is at work, or when it was killed: a table without rows, and no terms.
#[test]
fn a_corpus_that_is_not_complete_reserves_nothing_and_binds_no_run_id() {
    let place = Place::new(1000.0);
    place.within(async |root| {
        root.table("corpora/begun").create(schema::corpus()).await.unwrap();
        ledger::set_budget(&root, "begun", 1000.0, 1e-5).await.unwrap();
    });
    let told = ended(place.train_on("one", "begun", "llama").args(SETTINGS), 3);
    assert!(told.contains("begun.terms.json") && told.contains("run partition to its end"), "{told}");
    place.within(async |root| {
        let terms = CorpusTerms { privacy_unit: "id".into(), max_per_unit: 1, conditions: vec![] };
        terms.write(&root, "begun").await.unwrap();
    });
    let told = ended(place.train_on("one", "begun", "llama").args(SETTINGS), 3);
    assert!(told.contains("version 0 has no rows"), "{told}");
    assert!(files(&place.path("release")).is_empty(), "no claim");
    place.within(async |root| assert_eq!(ledger::read(&root, "begun").await.unwrap().spent().len(), 0));
}

#[test]
fn settings_that_cannot_work_reserve_nothing_and_bind_no_run_id() {
    let place = Place::new(1000.0);
    models::write_llama(&place.path("mute"), 1).unwrap();
    std::fs::remove_file(place.path("mute/tokenizer.json")).unwrap();
    let before = files(&place.path("private"));
    let told = ended(place.train_on("one", "chats", "mute").args(SETTINGS), 3);
    assert!(told.contains("tokenizer"), "{told}");
    models::write_llama(&place.path("endless"), 1).unwrap();
    let config = std::fs::read_to_string(place.path("endless/config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_str(&config).unwrap();
    config["eos_token_id"] = 5000.into();
    std::fs::write(place.path("endless/config.json"), config.to_string()).unwrap();
    let told = ended(place.train_on("one", "chats", "endless").args(SETTINGS), 3);
    assert!(told.contains("a token id is outside the model's vocabulary"), "{told}");
    models::write_llama(&place.path("broken"), 1).unwrap();
    let weights = place.path("broken/model.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    // The last tensor is the final norm.
    let end = bytes.len() - 4;
    bytes[end..].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(weights, bytes).unwrap();
    let told = ended(place.train_on("one", "chats", "broken").args(SETTINGS), 3);
    assert!(told.contains("broken: on a short text") && told.contains("not finite"), "{told}");
    for (flags, expected) in [
        (["--block-length=300", "--seed=0"], "--block-length 300: the model has 256 positions"),
        (["--alpha=-1", "--rank=9999"], "--alpha -1"),
        (["--delta=2", "--seed=0"], "--delta 2"),
        (["--weight-decay=1e4", "--learning-rate=1e-3"], "expected less than 1"),
    ] {
        let told = ended(place.bare("one", "chats", "llama").args(SETTINGS).args(flags), 2);
        assert!(told.contains(expected), "{told}");
    }
    assert_eq!(files(&place.path("private")), before, "the ledger and the rest are as they were");
    assert!(files(&place.path("release")).is_empty(), "no claim");
    ended(&mut place.dp("one"), 0);
}

#[test]
fn a_corpus_smaller_than_the_expected_batch_is_exit_code_3_without_its_size_and_costs_nothing() {
    let place = Place::new(1000.0);
    let mut command = place.train("one");
    command.args(["--expected-batch-size", "500", "--records", "1000", "--steps", "1", "--noise-multiplier", "5"]);
    let told = ended(&mut command, 3);
    assert!(told.contains("fewer units than the expected batch"), "{told}");
    assert!(told.contains("runs/RUN/partition-counts.json"), "{told}");
    // Neither the time of a log line nor the name of this test's folder.
    let error = told.split("error: ").last().unwrap_or_default();
    let error = error.replace(&place.folder.path().display().to_string(), "");
    assert!(!error.contains("32"), "the number of units is private: {told}");
    assert!(files(&place.path("release")).is_empty(), "no claim");
    place.within(async |root| assert_eq!(ledger::read(&root, "chats").await.unwrap().spent().len(), 0));
    ended(&mut place.dp("one"), 0);
}

#[test]
fn missing_flags_are_told_with_those_that_may_stand_for_them() {
    let place = Place::new(10.0);
    let told = ended(place.bare("one", "chats", "llama").args(["--expected-batch-size", "16"]), 2);
    for expected in [
        "--records <RECORDS>|--sampling-probability <SAMPLING_PROBABILITY>",
        "--steps <STEPS>|--epochs <EPOCHS>",
        "--noise-multiplier <NOISE_MULTIPLIER>|--target-epsilon <TARGET_EPSILON>|--no-dp",
    ] {
        assert!(told.contains(expected), "{told}");
    }
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
    ended(&mut place.baseline("plain"), 0);
    assert!(place.path("private/runs/plain/adapter/adapter_config.json").exists());
    assert!(files(&place.path("release")).is_empty());
    assert!(files(&place.path("private/ledger")).len() <= 1, "no mechanism, no reservation");
}

#[test]
fn a_baseline_of_one_step_is_a_result() {
    let place = Place::new(10.0);
    let mut command = place.train("plain");
    ended(command.args(["--expected-batch-size", "16", "--records", "32", "--steps", "1", "--no-dp"]), 0);
    assert!(place.path("private/runs/plain/adapter/adapter_config.json").exists());
}

#[test]
fn a_baseline_and_private_training_under_one_run_id_share_nothing() {
    let place = Place::new(1000.0);
    let alone = place.copy();
    ended(&mut place.baseline("one"), 0);
    ended(&mut place.dp("one"), 0);
    let steps = |stage: &str| place.losses("one", stage).iter().map(|row| row.0).collect::<Vec<_>>();
    assert_eq!(steps("train-baseline"), [0, 2]);
    assert_eq!(steps("train"), [0, 3]);
    // Training starts from nothing beside a baseline too.
    ended(&mut alone.dp("one"), 0);
    assert!(alone.adapter("one") == place.adapter("one"));
}

#[test]
fn killed_after_a_step_then_rerun_gives_what_an_undisturbed_run_gives() {
    let place = Place::new(1000.0);
    let undisturbed = place.copy();
    ended(&mut undisturbed.dp("one"), 0);
    place.stop_after_one_step(place.dp("one"), "one");
    assert!(place.first_checkpoint("one").exists());
    assert!(!place.path("release/runs/one/adapter").exists(), "nothing is released half-way");
    ended(&mut place.dp("one"), 0);
    assert!(place.adapter("one") == undisturbed.adapter("one"));
    assert_eq!(place.losses("one", "train"), undisturbed.losses("one", "train"));
    let ledger = |place: &Place| files(&place.path("private/ledger")).len();
    assert_eq!(ledger(&place), ledger(&undisturbed), "resuming spends nothing");
}

#[test]
fn killed_between_checkpoints_then_rerun_gives_what_an_undisturbed_run_gives() {
    let place = Place::new(1000.0);
    let undisturbed = place.copy();
    let five_steps = |place: &Place| {
        let mut command = place.train("one");
        command.args(["--expected-batch-size", "16", "--records", "32", "--steps", "5", "--noise-multiplier", "1"]);
        command.args(["--checkpoint-every", "2"]);
        command
    };
    ended(&mut five_steps(&undisturbed), 0);
    place.stop_in_step(4, five_steps(&place), "one");
    let kept = [1, 2, 3].map(|step| place.checkpoint("one", step).exists());
    assert_eq!(kept, [false, true, false]);
    ended(&mut five_steps(&place), 0);
    assert!(place.adapter("one") == undisturbed.adapter("one"));
}

#[test]
fn a_checkpoint_that_was_cut_is_exit_code_3() {
    let place = Place::new(1000.0);
    place.stop_after_one_step(place.dp("one"), "one");
    let whole = std::fs::read(place.first_checkpoint("one")).unwrap();
    std::fs::write(place.first_checkpoint("one"), &whole[..whole.len() / 2]).unwrap();
    let told = ended(&mut place.dp("one"), 3);
    assert!(told.contains("step-00000001.safetensors") && told.contains("help: remove the object"), "{told}");
    // Without it, the run starts anew under the reservation that it has.
    std::fs::remove_file(place.first_checkpoint("one")).unwrap();
    ended(&mut place.dp("one"), 0);
}

#[test]
fn an_unfinished_run_goes_on_with_the_same_data_and_noise_only() {
    let place = Place::new(1000.0);
    place.stop_after_one_step(place.dp("one"), "one");
    let mut noisier = place.train("one");
    noisier.args(["--expected-batch-size", "16", "--records", "32", "--steps", "3", "--noise-multiplier", "2"]);
    let told = ended(&mut noisier, 2);
    assert!(told.contains("noise_multiplier"), "{told}");

    let entries = files(&place.path("private/ledger"));
    std::fs::remove_dir_all(place.path("private/corpora")).unwrap();
    place.within(async |root| write_corpus(&root, "other words").await);
    let told = ended(&mut place.dp("one"), 2);
    assert!(told.contains("reserved for something else"), "{told}");
    assert!(told.contains("the content of an input, or the device or precision"), "{told}");
    assert_eq!(files(&place.path("private/ledger")), entries);
    assert!(!place.path("release/runs/one/adapter").exists());
}

#[test]
fn the_validation_loss_stays_in_the_private_root() {
    let place = Place::new(1000.0);
    let mut told = String::new();
    for mut command in [place.dp("one"), place.dp("one")] {
        told.push_str(&ended(command.args(["-vv", "--format", "json"]), 0));
    }
    let losses = place.losses("one", "train");
    assert!(losses.len() == 2 && losses[0].1 != losses[1].1, "one before and one after training");
    let mut public = vec![told];
    for file in files(&place.path("release")) {
        assert!(!file.to_string_lossy().contains("loss"), "{}", file.display());
        public.push(String::from_utf8_lossy(&std::fs::read(file).unwrap()).into_owned());
    }
    for (_, loss) in losses {
        let digits = &loss.to_string()[..8];
        assert!(public.iter().all(|text| !text.contains(digits)), "a validation loss was told");
    }
}
