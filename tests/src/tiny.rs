//! Workflows of the real stages on models of a few thousand weights: for what only shows when `doppel run` starts them.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::s3::{PRIVATE_BUCKET, RELEASE_BUCKET};
use crate::{binaries, conversations, models};

/// Run id of all stages.
pub const RUN: &str = "tiny";
/// Conversations in the input; every tenth is a second part of the one before, of the same privacy unit.
pub const CONVERSATIONS: usize = 283;
/// Samples in all shards together.
pub const SAMPLES: usize = 60;
/// Rows that vote selects at most.
pub const TARGET: usize = 20;

/// One task of a workflow.
#[derive(Clone, Debug)]
pub struct Task {
    /// Name.
    pub name: &'static str,
    /// Tasks that come before it.
    pub after: Vec<&'static str>,
    /// Program and arguments.
    pub command: Vec<String>,
}

impl Task {
    /// A task whose command has no blanks within its words.
    pub fn new(name: &'static str, after: &[&'static str], command: &str) -> Self {
        Self { name, after: after.to_vec(), command: command.split_whitespace().map(str::to_owned).collect() }
    }
}

/// A command line with `to` in place of `from`, which must be there: nothing to replace would be another test.
#[track_caller]
pub fn with(line: &str, from: &str, to: &str) -> String {
    assert!(line.contains(from), "expected {from:?} in {line:?}");
    line.replace(from, to)
}

/// A folder with conversations and models, for lakes and workflows.
pub struct Workplace {
    folder: TempDir,
}

impl Workplace {
    /// Makes the folder.
    #[allow(clippy::new_without_default, reason = "it writes files")]
    pub fn new() -> Self {
        let place = Self { folder: tempfile::tempdir().expect("a temporary folder") };
        conversations::write(&place.path("conversations.json"), CONVERSATIONS).expect("conversations are written");
        models::write_llama(&place.path("llama"), 1).expect("a model is written");
        models::write_bert(&place.path("bert"), 2).expect("an encoder is written");
        place
    }

    /// A path in the folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The whole pipeline on the lake called `lake`, with `budget` as its ε.
    pub fn pipeline(&self, lake: &str, budget: &str) -> Vec<Task> {
        let shards = ["0/2", "1/2"];
        let synthesize = |shard| self.synthesize(lake, &format!("--adapter-run={RUN} --shard={shard}"));
        let embed = |shard| self.embed(lake, &format!("--of=synthetic --shard={shard}"));
        vec![
            Task::new("budget", &[], &self.budget(lake, budget)),
            Task::new("partition", &[], &self.partition(lake)),
            Task::new("train", &["budget", "partition"], &self.train(lake)),
            Task::new("synthesize-0", &["train"], &synthesize(shards[0])),
            Task::new("synthesize-1", &["train"], &synthesize(shards[1])),
            Task::new("embed-0", &["synthesize-0", "synthesize-1"], &embed(shards[0])),
            Task::new("embed-1", &["synthesize-0", "synthesize-1"], &embed(shards[1])),
            Task::new("embed-corpus", &["partition"], &self.embed_corpus(lake)),
            Task::new("vote", &["embed-0", "embed-1", "embed-corpus"], &self.vote(lake)),
        ]
    }

    /// `doppel budget set`.
    pub fn budget(&self, lake: &str, epsilon: &str) -> String {
        format!("doppel budget set --corpus=chats --delta=1e-5 --epsilon={epsilon} --private={}", self.private(lake))
    }

    /// `doppel-partition`.
    pub fn partition(&self, lake: &str) -> String {
        let input = self.path("conversations.json");
        format!(
            "doppel-partition --run={RUN} --private={} --release={} --corpus=chats --input={} --shape=sharegpt \
             --unit-column=id --unit-rule=prefix:_ --language=any --dedup=exact",
            self.private(lake),
            self.release(lake),
            input.display()
        )
    }

    /// `doppel-train`, two steps.
    pub fn train(&self, lake: &str) -> String {
        format!(
            "doppel-train --run={RUN} --private={} --release={} --corpus=chats --model={} --rank=2 --targets=q,v \
             --learning-rate=1e-2 --steps=2 --expected-batch-size=40 --records=200 --noise-multiplier=1 \
             --block-length=64 --dtype=f32 --device=cpu",
            self.private(lake),
            self.release(lake),
            self.path("llama").display()
        )
    }

    /// `doppel-synthesize`; `which` chooses adapter and shard.
    pub fn synthesize(&self, lake: &str, which: &str) -> String {
        format!(
            "doppel-synthesize --run={RUN} --release={} --model={} {which} --count={SAMPLES} --max-new-tokens=24 \
             --seed=5 --dtype=f32 --device=cpu",
            self.release(lake),
            self.path("llama").display()
        )
    }

    /// `doppel-embed`; `which` chooses texts and shard, and gives a private root where it is wanted.
    pub fn embed(&self, lake: &str, which: &str) -> String {
        let (release, encoder) = (self.release(lake), self.path("bert"));
        let encoder = encoder.display();
        format!("doppel-embed --run={RUN} --release={release} --encoder={encoder} {which} --dtype=f32 --device=cpu")
    }

    /// `doppel-embed` of the corpus.
    pub fn embed_corpus(&self, lake: &str) -> String {
        self.embed(lake, &format!("--private={} --of=corpus --corpus=chats", self.private(lake)))
    }

    /// `doppel-vote`.
    pub fn vote(&self, lake: &str) -> String {
        format!(
            "doppel-vote --run={RUN} --private={} --release={} --corpus=chats --clusters=4 --iterations=10 --restarts=2 \
             --sigma=5 --target={TARGET}",
            self.private(lake),
            self.release(lake)
        )
    }

    /// The private root of a lake; that of `s3:NAME` is in the private bucket of the S3 server.
    pub fn private(&self, lake: &str) -> String {
        match lake.strip_prefix("s3:") {
            Some(name) => format!("s3://{PRIVATE_BUCKET}/{name}"),
            None => self.path(lake).join("private").display().to_string(),
        }
    }

    /// The release root of a lake; that of `s3:NAME` is in the release bucket of the S3 server.
    pub fn release(&self, lake: &str) -> String {
        match lake.strip_prefix("s3:") {
            Some(name) => format!("s3://{RELEASE_BUCKET}/{name}"),
            None => self.path(lake).join("release").display().to_string(),
        }
    }

    /// `doppel run` of a workflow of `tasks`.
    pub fn run(&self, tasks: &[Task]) -> Command {
        let file = self.path("workflow.yaml");
        std::fs::write(&file, workflow(tasks)).expect("a workflow is written");
        let mut command = binaries::command("doppel");
        command.arg("run").arg(file).current_dir(self.folder.path());
        command
    }
}

/// A workflow as JSON, which is YAML too.
fn workflow(tasks: &[Task]) -> String {
    let dag = |task: &Task| json!({ "name": task.name, "template": task.name, "dependencies": task.after });
    let template =
        |task: &Task| json!({ "name": task.name, "container": { "image": "none", "command": task.command } });
    let main = json!({ "name": "main", "dag": { "tasks": tasks.iter().map(dag).collect::<Vec<_>>() } });
    let templates: Vec<Value> = std::iter::once(main).chain(tasks.iter().map(template)).collect();
    let workflow = json!({
        "apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow", "metadata": { "name": RUN },
        "spec": { "entrypoint": "main", "templates": templates },
    });
    format!("{workflow:#}")
}

/// Waits until `path` exists; panics when it takes as long as only a broken run does.
#[track_caller]
pub fn wait_for(path: &Path) {
    let started = std::time::Instant::now();
    while !path.exists() {
        assert!(started.elapsed() < std::time::Duration::from_secs(120), "{} never came", path.display());
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}
