//! The whole pipeline on models of a few thousand weights: what a user of the command line sees from end to end.

use std::path::{Path, PathBuf};
use std::process::Command;

use scenarios::binaries::{self, Ran};
use scenarios::{conversations, models};

const RUN: &str = "tiny";
const COUNT: usize = 60;
const TARGET: usize = 20;

/// A folder with conversations, models and the two roots.
struct Workplace {
    folder: tempfile::TempDir,
}

impl Workplace {
    fn new() -> Self {
        let place = Self { folder: tempfile::tempdir().expect("a temporary folder") };
        conversations::write(&place.path("conversations.json"), 300).expect("conversations are written");
        models::write_llama(&place.path("llama"), 1).expect("a model is written");
        models::write_bert(&place.path("bert"), 2).expect("an encoder is written");
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// `doppel-STAGE` with the roots that the stage takes.
    fn stage(&self, stage: &str) -> Command {
        let mut command = binaries::command(&format!("doppel-{stage}"));
        command.arg("--release").arg(self.path("release"));
        if !matches!(stage, "synthesize" | "query") {
            command.arg("--private").arg(self.path("private"));
        }
        if stage != "query" {
            command.args(["--run", RUN]);
        }
        command
    }

    fn set_budget(&self, epsilon: &str) {
        let mut command = binaries::command("doppel");
        command.args(["budget", "set", "--corpus", "chats", "--delta", "1e-5", "--epsilon", epsilon]);
        binaries::run(command.arg("--private").arg(self.path("private")), 0);
    }

    fn partition(&self) -> Command {
        let mut command = self.stage("partition");
        command.arg("--input").arg(self.path("conversations.json")).args(["--corpus", "chats"]);
        command.args(["--shape", "sharegpt", "--unit-column", "id", "--unit-rule", "prefix:_"]);
        command.args(["--language", "any", "--dedup", "exact"]);
        command
    }

    fn train(&self) -> Command {
        let mut command = self.stage("train");
        command.args(["--corpus", "chats", "--model"]).arg(self.path("llama"));
        command.args(["--rank", "2", "--targets", "q,v", "--learning-rate", "1e-2", "--steps", "2"]);
        command.args(["--expected-batch-size", "40", "--records", "200", "--noise-multiplier", "1.0"]);
        command.args(["--block-length", "64", "--dtype", "f32", "--device", "cpu"]);
        command
    }

    fn synthesize(&self, shard: &str) -> Command {
        let mut command = self.stage("synthesize");
        command.arg("--model").arg(self.path("llama")).args(["--adapter-run", RUN, "--shard", shard]);
        command.args(["--count", &COUNT.to_string(), "--max-new-tokens", "24", "--seed", "5"]);
        command.args(["--dtype", "f32", "--device", "cpu"]);
        command
    }

    fn embed(&self, of: &[&str]) -> Command {
        let mut command = self.stage("embed");
        command.arg("--encoder").arg(self.path("bert")).args(["--dtype", "f32", "--device", "cpu", "--of"]).args(of);
        command
    }

    fn vote(&self) -> Command {
        let mut command = self.stage("vote");
        command.args(["--corpus", "chats", "--clusters", "4", "--iterations", "10", "--restarts", "2"]);
        command.args(["--sigma", "5", "--target", &TARGET.to_string(), "--delta", "1e-5"]);
        command
    }

    /// All stages in order, as `(what, command)`.
    fn stages(&self) -> Vec<(&'static str, Command)> {
        vec![
            ("partition", self.partition()),
            ("train", self.train()),
            ("synthesize 0/2", self.synthesize("0/2")),
            ("synthesize 1/2", self.synthesize("1/2")),
            ("embed the synthetic", self.embed(&["synthetic"])),
            ("embed the corpus", self.embed(&["corpus", "--corpus", "chats"])),
            ("vote", self.vote()),
        ]
    }

    fn query(&self, sql: &str) -> serde_json::Value {
        let mut command = self.stage("query");
        binaries::run(command.args(["--run", RUN, "--output", "json", sql]), 0).json()
    }

    fn count(&self, table: &str) -> u64 {
        self.query(&format!("SELECT count(*) AS n FROM {table}"))[0]["n"].as_u64().expect("a count")
    }
}

/// Every file below `folder` with its content, by path.
fn contents(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).expect("the folder is there").flatten() {
        if entry.path().is_dir() {
            found.extend(contents(&entry.path()));
        } else {
            found.push((entry.path(), std::fs::read(entry.path()).expect("a file is readable")));
        }
    }
    found.sort();
    found
}

#[track_caller]
fn refused(command: &mut Command, exit_code: i32, expected: &str) -> Ran {
    let ran = binaries::run(command, exit_code);
    assert!(ran.stderr.contains(expected), "expected {expected:?} in:\n{}", ran.stderr);
    ran
}

#[test]
fn from_conversations_to_selected_rows_and_again_for_nothing() {
    let place = Workplace::new();
    place.set_budget("50");
    for (_, mut command) in place.stages() {
        binaries::run(&mut command, 0);
    }

    assert_eq!(place.count("synthetic"), COUNT as u64);
    assert_eq!(place.count("embeddings"), COUNT as u64);
    assert_eq!(place.count("clusters"), COUNT as u64);
    assert_eq!(place.count("histogram"), 4);
    let selected = place.count("selected");
    assert!((1..=TARGET as u64).contains(&selected), "{selected} selected");
    let mechanisms = place.query("SELECT DISTINCT mechanism, epsilon > 0 AS spent FROM releases ORDER BY mechanism");
    assert_eq!(
        mechanisms,
        serde_json::json!([
            { "mechanism": "discrete_gaussian", "spent": true },
            { "mechanism": "poisson_sampled_gaussian", "spent": true },
        ])
    );

    let before = (contents(&place.path("private")), contents(&place.path("release")));
    for (_, mut command) in place.stages() {
        binaries::run(&mut command, 0);
    }
    let after = (contents(&place.path("private")), contents(&place.path("release")));
    assert!(before == after, "running every stage again changed a file");
}

#[test]
fn nothing_private_reaches_the_release_zone_or_the_log() {
    let place = Workplace::new();
    place.set_budget("50");
    for (what, mut command) in place.stages() {
        let ran = binaries::run(command.arg("-vv"), 0);
        for index in 0..300 {
            let instruction = conversations::instruction(index);
            assert!(
                !ran.stderr.contains(&instruction) && !ran.stdout.contains(&instruction),
                "{what} printed a record"
            );
        }
    }
    for (path, content) in contents(&place.path("release")) {
        for index in 0..300 {
            let instruction = conversations::instruction(index);
            let found = content.windows(instruction.len()).any(|window| window == instruction.as_bytes());
            assert!(!found, "{} holds a record", path.display());
        }
    }
}

#[test]
fn a_run_id_means_one_thing() {
    let place = Workplace::new();
    place.set_budget("50");
    binaries::run(&mut place.partition(), 0);
    binaries::run(&mut place.train(), 0);
    refused(place.train().args(["--seed", "9"]), 2, "seed");
    refused(place.partition().args(["--max-per-unit", "2"]), 2, "max_per_unit");
}

#[test]
fn training_beyond_the_budget_is_refused_before_it_reads() {
    let place = Workplace::new();
    binaries::run(&mut place.partition(), 0);
    refused(&mut place.train(), 2, "budget");
    place.set_budget("0.5");
    refused(&mut place.train(), 4, "help:");
    assert!(!place.path("release/runs/tiny/adapter").exists(), "a refused run released something");
}
