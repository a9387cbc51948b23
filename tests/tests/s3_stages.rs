//! The stages on a real S3 server, with two buckets and two keys: what a cluster's operator sees.

// Listings travel on the standard output of a child.
#![allow(clippy::print_stdout)]

use std::net::TcpListener;
use std::path::PathBuf;
use std::process::Command;

use lake::{PrivateRoot, StorageOptions, Zone};
use scenarios::binaries::{self, Ran};
use scenarios::s3::{self, Key, PRIVATE_BUCKET, RELEASE_BUCKET, S3};
use scenarios::{conversations, models};

const RUN: &str = "tiny";
const RAW: &str = "raw/conversations.json";

/// Conversations and models on this machine, and the roots wherever `environment` leads.
struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let place = Self { folder: tempfile::tempdir().expect("a temporary folder") };
        conversations::write(&place.path("conversations.json"), 120).expect("conversations are written");
        models::write_llama(&place.path("llama"), 1).expect("a model is written");
        models::write_bert(&place.path("bert"), 2).expect("an encoder is written");
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn partition(&self, run: &str, input: &str) -> Command {
        let mut command = stage("partition", &["--run", run, "--private", &private(), "--corpus", run]);
        command.args(["--input", input, "--unit-rule", "prefix:_", "--language", "any", "--dedup", "exact"]);
        command
    }

    fn train(&self) -> Command {
        let mut command = stage("train", &["--run", RUN, "--private", &private(), "--release", &release()]);
        command.args(["--corpus", RUN, "--model"]).arg(self.path("llama"));
        command.args(["--rank", "2", "--targets", "q,v", "--steps", "1", "--expected-batch-size", "20"]);
        command.args(["--records", "100", "--noise-multiplier", "1.0", "--block-length", "32"]);
        command.args(["--dtype", "f32", "--device", "cpu"]);
        command
    }

    fn synthesize(&self) -> Command {
        let mut command = stage("synthesize", &["--run", RUN, "--release", &release(), "--no-adapter", "--model"]);
        command.arg(self.path("llama")).args(["--count", "12", "--max-new-tokens", "8"]);
        command.args(["--dtype", "f32", "--device", "cpu"]);
        command
    }

    fn embed(&self) -> Command {
        let mut command = stage("embed", &["--run", RUN, "--release", &release(), "--of", "synthetic", "--encoder"]);
        command.arg(self.path("bert")).args(["--dtype", "f32", "--device", "cpu"]);
        command
    }

    fn vote(&self) -> Command {
        let mut command = stage("vote", &["--run", RUN, "--private", &private(), "--release", &release()]);
        command.args(["--corpus", RUN, "--clusters", "2", "--target", "4", "--delta", "1e-5"]);
        command
    }
}

fn stage(name: &str, arguments: &[&str]) -> Command {
    let mut command = binaries::command(&format!("doppel-{name}"));
    for (variable, _) in std::env::vars().filter(|(variable, _)| variable.starts_with("AWS_")) {
        command.env_remove(variable);
    }
    command.args(arguments);
    command
}

fn query(sql: &str) -> Command {
    stage("query", &["--run", RUN, "--release", &release(), "--output", "csv", sql])
}

fn private() -> String {
    format!("s3://{PRIVATE_BUCKET}/lake")
}

fn release() -> String {
    format!("s3://{RELEASE_BUCKET}/lake")
}

/// Runs `command` with `environment`; its messages must hold each of `expected`, and no secret.
#[track_caller]
fn run(mut command: Command, environment: &[(&'static str, String)], exit_code: i32, expected: &[&str]) -> Ran {
    let ran = binaries::run(command.envs(environment.iter().cloned()), exit_code);
    for text in expected {
        assert!(ran.stderr.contains(text), "{command:?}: no {text:?} in\n{}", ran.stderr);
    }
    for key in [Key::Both, Key::Release] {
        let (id, secret) = key.credentials();
        assert!(!ran.stderr.contains(secret) && !ran.stderr.contains(id), "{}", ran.stderr);
    }
    ran
}

/// Runs the ignored test `name` of this file in a process of its own, since credentials come from the environment.
#[track_caller]
fn child(name: &str, server: &S3, variables: &[(&'static str, String)]) -> String {
    let mut command = Command::new(std::env::current_exe().expect("the test knows itself"));
    command.args(["--exact", name, "--ignored", "--nocapture"]);
    let ran = run(command, &[&server.environment(Key::Both)[..], variables].concat(), 0, &[]);
    assert!(ran.stdout.contains("1 passed"), "{}", ran.stdout);
    ran.stdout
}

fn variable(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| panic!("{name} is set by the test that starts this one"))
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "started by tests that need an input in the bucket"]
async fn child_upload() {
    let bucket = PrivateRoot::open(&format!("s3://{PRIVATE_BUCKET}"), &StorageOptions::default()).await.unwrap();
    bucket.put(RAW, std::fs::read(variable("TEST_FILE")).unwrap().into()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "started by tests that look at what is left behind"]
async fn child_list() {
    for bucket in [PRIVATE_BUCKET, RELEASE_BUCKET] {
        let root = PrivateRoot::open(&format!("s3://{bucket}"), &StorageOptions::default()).await.unwrap();
        for path in root.list("").await.unwrap() {
            println!("object {bucket}/{path}");
        }
    }
}

/// All objects of both buckets but the noise key, which is drawn at first sight of a private root.
fn objects(server: &S3) -> Vec<String> {
    let listing = child("child_list", server, &[]);
    let objects = listing.lines().filter(|line| line.contains("object ") && !line.ends_with("noise.key"));
    objects.map(str::to_owned).collect()
}

#[test]
fn the_stages_run_on_two_buckets_and_the_release_key_opens_one() {
    let (place, server) = (Place::new(), S3::start().unwrap_or_else(|error| panic!("{error}")));
    let (both, release_only) = (server.environment(Key::Both), server.environment(Key::Release));
    child("child_upload", &server, &[("TEST_FILE", place.path("conversations.json").display().to_string())]);
    let input = format!("s3://{PRIVATE_BUCKET}/{RAW}");

    // What fails leaves nothing behind.
    let before = objects(&server);
    let missing = format!("s3://{PRIVATE_BUCKET}/raw/none.json");
    run(place.partition("none", &missing), &both, 3, &["none.json", "not found"]);
    run(place.partition("none", &input), &release_only, 3, &[PRIVATE_BUCKET, "refused access", "help:"]);
    assert_eq!(objects(&server), before);

    run(place.partition(RUN, &input), &both, 0, &[]);
    assert!(run(place.partition(RUN, &input), &both, 0, &[]).stdout.contains("done already"));
    run(place.synthesize(), &release_only, 0, &[]);
    run(place.embed(), &release_only, 0, &[]);
    let sql = "SELECT count(*) AS n FROM synthetic JOIN embeddings ON synthetic.id = embeddings.id";
    assert_eq!(run(query(sql), &release_only, 0, &[]).stdout, "n\n12\n");

    let before = objects(&server);
    for command in [place.partition("other", &input), place.train(), place.vote()] {
        run(command, &release_only, 3, &[PRIVATE_BUCKET, "refused access", "help:"]);
    }
    assert_eq!(objects(&server), before);

    // An input that was replaced is not what the run was made of.
    conversations::write(&place.path("conversations.json"), 130).expect("conversations are written");
    child("child_upload", &server, &[("TEST_FILE", place.path("conversations.json").display().to_string())]);
    run(place.partition(RUN, &input), &both, 2, &[&input, "changed", "help:"]);
}

#[test]
fn an_endpoint_that_nobody_listens_at_may_be_tried_again() {
    let place = Place::new();
    let port = TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("an address").port();
    let nobody = s3::environment(&format!("http://127.0.0.1:{port}"), Key::Both);
    let local = place.path("conversations.json").display().to_string();
    let remote = format!("s3://{PRIVATE_BUCKET}/{RAW}");
    let commands = [
        place.partition(RUN, &local),
        place.partition(RUN, &remote),
        place.train(),
        place.synthesize(),
        place.embed(),
        place.vote(),
        query("SELECT 1 FROM synthetic"),
    ];
    for mut command in commands {
        command.args(["--storage-timeout", "1"]);
        run(command, &nobody, 5, &["s3://doppel-", "help:"]);
    }
    // With an input that cannot be reached, nothing is begun in a private root that can.
    let root = place.path("private");
    let mut command = stage("partition", &["--run", RUN, "--corpus", RUN, "--input", &remote, "--private"]);
    command.arg(&root).args(["--storage-timeout", "1"]);
    run(command, &nobody, 5, &[&remote, "help:"]);
    assert!(!root.exists(), "something was left behind");
}
