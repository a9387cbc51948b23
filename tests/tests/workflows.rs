//! `doppel run` on real stages: what a preflight finds, and that a run that was stopped gives what an undisturbed one
//! does. Also, that the workflows of this repository are commands that the stages take.

use std::path::Path;
use std::process::Command;

use scenarios::binaries;
use scenarios::repository;
use scenarios::tiny::{RUN, Task, Workplace, wait_for, with};
use serde_json::Value;

/// The commands that a workflow of this repository expands to, by task.
fn expanded(file: &str) -> Vec<(String, Vec<String>)> {
    let mut command = binaries::command("doppel");
    command.args(["run", "--dry-run", "--format", "json"]).arg(repository::root().join("workflows").join(file));
    for name in ["input", "model", "encoder", "private", "release"] {
        command.arg(format!("--parameter={name}=s3://lake/{name}"));
    }
    let plan = binaries::run(&mut command, 0).json();
    let text = |value: &Value| value.as_str().expect("a word").to_owned();
    let words = |task: &Value| task["command"].as_array().expect("a command").iter().map(text).collect();
    let tasks = plan["tasks"].as_array().expect("a plan has tasks");
    tasks.iter().map(|task| (text(&task["task"]), words(task))).collect()
}

/// Lets every command's own binary check it, a few at a time.
fn check_flags(commands: &[(String, Vec<String>)]) {
    let check = |(task, words): &(String, Vec<String>)| {
        let mut command = binaries::command(&words[0]);
        let ran = binaries::run(command.args(&words[1..]).env("DOPPEL_CHECK_FLAGS", "1"), 0);
        assert!(ran.stdout.is_empty() && ran.stderr.is_empty(), "{task}: {ran:?}");
    };
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    std::thread::scope(|scope| {
        for chunk in commands.chunks(commands.len().div_ceil(threads)) {
            scope.spawn(move || chunk.iter().for_each(check));
        }
    });
}

#[test]
fn every_command_of_our_workflows_passes_its_stages_check() {
    for (file, tasks) in [("demo.yaml", 14), ("chatbot-arena-13b.yaml", 69), ("chatbot-arena-7b.yaml", 69)] {
        let commands = expanded(file);
        assert_eq!(commands.len(), tasks, "{file}");
        check_flags(&commands);
    }
}

/// Yu et al. 2024 (arXiv 2402.13659), Section 4 and Appendix; the noise multipliers are those of the design.
#[test]
fn the_papers_configuration_is_the_papers() {
    for (file, noise_multiplier) in [("chatbot-arena-13b.yaml", "1.122"), ("chatbot-arena-7b.yaml", "0.8072")] {
        let commands = expanded(file);
        let check = |task: &str, flags: &[&str]| {
            let (_, words) = commands.iter().find(|(name, _)| name == task).unwrap_or_else(|| panic!("{file}: {task}"));
            for flag in flags {
                assert!(words.iter().any(|word| word == flag), "{file}: {task}: {flag} is not in {words:?}");
            }
        };
        let noise = format!("--noise-multiplier={noise_multiplier}");
        check("train", &["--expected-batch-size=4096", "--records=180000", "--learning-rate=1e-3", "--clip-norm=0.5"]);
        // 10 epochs of 180,000 in batches of 4,096 are 439 steps.
        check("train", &["--steps=439", "--block-length=1024", "--rank=8", "--targets=q,k,v,o", &noise]);
        check("synthesize(31:31)", &["--shard=31/32", "--count=1000000", "--top-p=0.95"]);
        check("embed(31:31)", &["--shard=31/32"]);
        check("vote", &["--clusters=1000", "--sigma=10", "--target=180000"]);
        assert!(!commands.iter().any(|(task, _)| task.contains("(32:")), "{file}: 32 shards");
    }
}

#[test]
fn a_preflight_finds_wrong_values_of_flags_before_anything_starts() {
    let place = Workplace::new();
    let mut tasks = place.pipeline("lake", "50");
    for task in &mut tasks {
        for word in &mut task.command {
            match word.as_str() {
                "--sigma=5" => *word = "--sigma=-1".into(),
                "--rank=2" => *word = "--rank=0".into(),
                _ => {}
            }
        }
    }
    let told = binaries::run(&mut place.run(&tasks), 2).stderr;
    for expected in [
        "the preflight has 2 findings; nothing was started",
        "- train: --rank 0: expected",
        "- vote: --sigma: expected a positive number",
    ] {
        assert!(told.contains(expected), "{expected}\n{told}");
    }
    assert!(!place.path("lake/private/corpora").exists() && !place.path("lake/private/ledger").exists());
}

#[test]
fn a_preflight_finds_an_epsilon_that_no_noise_attains() {
    let place = Workplace::new();
    let target = "--target-epsilon=0.1 --delta=1e-5 --vote-sigma=5";
    let train = with(&place.train("lake"), "--noise-multiplier=1", target);
    let tasks = [Task::new("budget", &[], &place.budget("lake", "50")), Task::new("train", &["budget"], &train)];
    let told = binaries::run(&mut place.run(&tasks), 2).stderr;
    assert!(
        told.contains("the preflight has 1 finding") && told.contains("the vote of --vote-sigma alone spends"),
        "{told}"
    );
}

#[test]
fn a_preflight_tells_everything_about_storage_models_and_budget_at_once() {
    let place = Workplace::new();
    std::fs::write(place.path("file"), "").expect("a file is written");
    std::fs::create_dir(place.path("empty")).expect("a folder is made");
    let missing = with(&place.partition("lake"), "conversations.json", "missing.json");
    let inside = format!("--release={}", place.path("lake/private/inside").display());
    let tasks = [
        Task::new("budget", &[], &place.budget("lake", "0.01")),
        Task::new("partition", &[], &missing),
        // Nested roots, a folder without a model, and more ε than the budget.
        Task::new("train", &["budget"], &{
            let train = with(&place.train("lake"), "/llama", "/empty");
            with(&train, &format!("--release={}", place.release("lake")), &inside)
        }),
        // A root below a file can be made by nobody.
        Task::new("embed", &[], &with(&place.embed("file", "--of=synthetic"), "/bert", "/missing")),
    ];
    let told = binaries::run(&mut place.run(&tasks), 2).stderr;
    for expected in [
        "the preflight has 6 findings; nothing was started",
        "are the same or nested",
        "missing.json: No such file or directory",
        "/empty: neither config.json nor one .gguf file is there",
        "/missing: No such file or directory",
        "chats: the workflow would bring ε to",
        "/file/release",
    ] {
        assert!(told.contains(expected), "{expected}\n{told}");
    }
    assert!(!place.path("lake/private/corpora").exists() && !place.path("lake/private/ledger").exists());

    let tasks = [Task::new("partition", &[], &missing)];
    binaries::run(&mut place.run(&tasks), 3);
    let tasks = [
        Task::new("budget", &[], &place.budget("lake", "0.01")),
        Task::new("train", &["budget"], &place.train("lake")),
    ];
    binaries::run(&mut place.run(&tasks), 4);
}

/// Starts the run, sends it SIGINT when `path` is there, and expects it to end by that.
fn interrupt_at(command: &mut Command, path: &Path) {
    let mut child = command.spawn().expect("doppel starts");
    wait_for(path);
    let sent = Command::new("kill").args(["-s", "INT", &child.id().to_string()]).status().expect("kill runs");
    assert!(sent.success());
    assert_eq!(child.wait().expect("doppel ends").code(), Some(130));
}

/// What a run left: rows of the tables in the release zone, the adapter, the private figures.
fn results(place: &Workplace, lake: &str) -> Vec<(String, Value)> {
    let order =
        [("synthetic", "id"), ("embeddings", "id"), ("clusters", "id"), ("histogram", "bin"), ("selected", "id")];
    let mut found: Vec<(String, Value)> = Vec::new();
    for (table, key) in order {
        let mut query = binaries::command("doppel-query");
        query.args(["--release", &place.release(lake), "--run", RUN, "--output", "json"]);
        query.arg(format!("SELECT * FROM {table} ORDER BY {key}"));
        found.push((table.to_owned(), binaries::run(&mut query, 0).json()));
    }
    let adapter = place.path(lake).join(format!("release/runs/{RUN}/adapter/adapter_model.safetensors"));
    found.push(("adapter".to_owned(), std::fs::read(adapter).expect("an adapter is there").into()));
    let mut compare = binaries::command("doppel");
    compare.args(["compare", RUN, "--format", "json", "--private", &place.private(lake)]);
    found.push(("comparison".to_owned(), binaries::run(&mut compare, 0).json()));
    found
}

#[test]
fn a_run_that_was_interrupted_continues_to_what_an_undisturbed_one_gives() {
    let place = Workplace::new();
    binaries::run(&mut place.run(&place.pipeline("calm", "50")), 0);

    // The same secret, so that the same noise is due.
    let keys = place.path("rough/private/keys");
    std::fs::create_dir_all(&keys).expect("a folder is made");
    std::fs::copy(place.path("calm/private/keys/noise.key"), keys.join("noise.key")).expect("the key is there");

    // Until the gate opens no run can end, however late the signal comes.
    let gate = place.path("gate");
    let mut tasks = place.pipeline("rough", "50");
    let wait = format!("until [ -e {} ]; do sleep 0.1; done", gate.display());
    tasks.push(Task { name: "gate", after: vec![], command: ["sh", "-c", &wait].map(str::to_owned).to_vec() });
    let rough = || {
        let mut command = place.run(&tasks);
        command.args(["--cpus", "4"]);
        command
    };
    for claim in ["train", "synthesize.1-of-2"] {
        interrupt_at(&mut rough(), &place.path(&format!("rough/release/runs/{RUN}/stages/{claim}.claim.json")));
    }
    std::fs::write(&gate, "").expect("the gate opens");
    binaries::run(&mut rough(), 0);
    let again = binaries::run(rough().args(["--format", "json"]), 0).json();
    for task in
        ["budget", "partition", "train", "synthesize-0", "synthesize-1", "embed-0", "embed-1", "embed-corpus", "vote"]
    {
        let told = again["tasks"].as_array().and_then(|tasks| tasks.iter().find(|other| other["task"] == task));
        assert!(told.is_some_and(|told| told["already_done"] == true), "{task}: {again:#}");
    }

    for ((what, calm), (_, rough)) in results(&place, "calm").into_iter().zip(results(&place, "rough")) {
        assert!(calm == rough, "{what} differs:\n{calm}\n{rough}");
    }
    let mut budget = binaries::command("doppel");
    budget.args(["budget", "chats", "--format", "json", "--private", &place.private("rough")]);
    let ledger = binaries::run(&mut budget, 0).json();
    let entries = ledger["entries"].as_array().expect("entries");
    let told: Vec<_> = entries.iter().map(|entry| (entry["stage"].as_str(), entry["settled"].as_bool())).collect();
    assert_eq!(told, [(Some("train"), Some(true)), (Some("vote"), Some(true))], "one reservation per mechanism");
}
