//! The stages on a real S3 server, with two buckets and two keys: what a cluster's operator sees.

// Listings travel on the standard output of a child.
#![allow(clippy::print_stdout)]

use std::net::TcpListener;
use std::process::Command;

use lake::{PrivateRoot, StorageOptions, Zone};
use scenarios::binaries::{self, Ran};
use scenarios::conversations;
use scenarios::lakes::command;
use scenarios::s3::{self, Key, PRIVATE_BUCKET, RELEASE_BUCKET, S3};
use scenarios::tiny::{CONVERSATIONS, RUN, SAMPLES, Workplace, with};

const LAKE: &str = "s3:lake";
const RAW: &str = "raw/conversations.json";

/// Partition of an object in the private bucket.
fn partition(place: &Workplace, input: &str) -> Command {
    command(&partition_line(place, input))
}

fn partition_line(place: &Workplace, input: &str) -> String {
    with(&place.partition(LAKE), &local(place), input)
}

/// The conversations on this machine.
fn local(place: &Workplace) -> String {
    place.path("conversations.json").display().to_string()
}

fn train(place: &Workplace) -> Command {
    command(&place.train(LAKE))
}

fn synthesize(place: &Workplace) -> Command {
    command(&place.synthesize(LAKE, "--no-adapter"))
}

fn embed(place: &Workplace) -> Command {
    command(&place.embed(LAKE, "--of=synthetic"))
}

fn vote(place: &Workplace) -> Command {
    command(&place.vote(LAKE))
}

fn query(place: &Workplace, sql: &str) -> Command {
    let mut query = command(&format!("doppel-query --run={RUN} --release={} --output=csv", place.release(LAKE)));
    query.arg(sql);
    query
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
    let (place, server) = (Workplace::new(), S3::start().unwrap_or_else(|error| panic!("{error}")));
    let (both, release_only) = (server.environment(Key::Both), server.environment(Key::Release));
    child("child_upload", &server, &[("TEST_FILE", local(&place))]);
    let input = format!("s3://{PRIVATE_BUCKET}/{RAW}");

    // What fails leaves nothing behind.
    let before = objects(&server);
    let missing = format!("s3://{PRIVATE_BUCKET}/raw/none.json");
    run(partition(&place, &missing), &both, 3, &["none.json", "not found"]);
    run(partition(&place, &input), &release_only, 3, &[PRIVATE_BUCKET, "refused access", "help:"]);
    assert_eq!(objects(&server), before);

    run(partition(&place, &input), &both, 0, &[]);
    assert!(run(partition(&place, &input), &both, 0, &[]).stdout.contains("done already"));
    run(synthesize(&place), &release_only, 0, &[]);
    run(embed(&place), &release_only, 0, &[]);
    let sql = "SELECT count(*) AS n FROM synthetic JOIN embeddings ON synthetic.id = embeddings.id";
    assert_eq!(run(query(&place, sql), &release_only, 0, &[]).stdout, format!("n\n{SAMPLES}\n"));

    let before = objects(&server);
    let other = command(&with(&partition_line(&place, &input), "--corpus=chats", "--corpus=other"));
    for command in [other, train(&place), vote(&place)] {
        run(command, &release_only, 3, &[PRIVATE_BUCKET, "refused access", "help:"]);
    }
    assert_eq!(objects(&server), before);

    // An input that was replaced is not what the run was made of.
    conversations::write(&place.path("conversations.json"), CONVERSATIONS + 10).expect("conversations are written");
    child("child_upload", &server, &[("TEST_FILE", local(&place))]);
    run(partition(&place, &input), &both, 2, &[&input, "changed", "help:"]);
}

#[test]
fn an_endpoint_that_nobody_listens_at_may_be_tried_again() {
    let place = Workplace::new();
    let port = TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("an address").port();
    let nobody = s3::environment(&format!("http://127.0.0.1:{port}"), Key::Both);
    let remote = format!("s3://{PRIVATE_BUCKET}/{RAW}");
    let commands = [
        partition(&place, &local(&place)),
        partition(&place, &remote),
        train(&place),
        synthesize(&place),
        embed(&place),
        vote(&place),
        query(&place, "SELECT 1 FROM synthetic"),
    ];
    for mut command in commands {
        command.args(["--storage-timeout", "1"]);
        run(command, &nobody, 5, &["s3://doppel-", "help:"]);
    }
    // With an input that cannot be reached, nothing is begun in a private root that can.
    let mut command = command(&with(&place.partition("lake"), &local(&place), &remote));
    command.args(["--storage-timeout", "1"]);
    run(command, &nobody, 5, &[&remote, "help:"]);
    assert!(!place.path("lake").exists(), "something was left behind");
}
