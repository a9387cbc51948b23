//! Networks and servers on bad days: a stage ends well if they recover in time, and says so with nothing half done if
//! not.

use std::collections::BTreeMap;
use std::process::Command;
use std::time::Duration;

use lake::{PrivateRoot, StorageOptions, promises};
use scenarios::binaries;
use scenarios::lakes::{self, assert_same, command, results, settled};
use scenarios::proxy::{Fault, Proxy, When};
use scenarios::s3::{Key, PRIVATE_BUCKET, S3, environment};
use scenarios::tiny::{RUN, SAMPLES, Workplace};

/// Stages in their order.
const STAGES: [&str; 7] = ["partition", "train", "synthesize", "embed", "embed-corpus", "vote", "query"];

/// The command of the stage `name` on the lake called `lake`, through `proxy`.
fn stage(place: &Workplace, name: &str, lake: &str, proxy: &Proxy, seconds: u64) -> Command {
    let line = match name {
        "partition" => place.partition(lake),
        "train" => place.train(lake),
        "synthesize" => place.synthesize(lake, &format!("--adapter-run={RUN}")),
        "embed" => place.embed(lake, "--of=synthetic"),
        "embed-corpus" => place.embed_corpus(lake),
        "vote" => place.vote(lake),
        _ => format!("doppel-query --run={RUN} --release={} --output=csv", place.release(lake)),
    };
    let mut command = command(&line);
    if name == "query" {
        command.arg("SELECT count(*) FROM synthetic JOIN clusters ON synthetic.id = clusters.id");
    }
    command.arg(format!("--storage-timeout={seconds}")).envs(environment(&proxy.endpoint(), Key::Both));
    command
}

/// Runs a stage to the end that `code` says.
#[track_caller]
fn run(mut command: Command, code: i32, how: &str) {
    let output = command.output().expect("a stage starts");
    let (out, log) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(code), "{how}\n{out}\n{log}");
    assert!(code == 0 || log.contains("help:"), "{how}\n{log}");
    if command.get_program().to_string_lossy().ends_with("query") && code == 0 {
        assert_eq!(out, format!("count(*)\n{SAMPLES}\n"), "{how}");
    }
}

/// A lake on `server` with a budget and the noise key of all tests, so that lakes can be compared.
fn prepare(server: &S3, place: &Workplace, lake: &str) {
    let folder = place.path(&format!("up-{lake}"));
    lakes::write_noise_key(&folder);
    transfer(server, &folder.display().to_string(), &place.private(lake));
    let mut budget = command(&place.budget(lake, "50"));
    binaries::run(budget.envs(server.environment(Key::Both)), 0);
}

/// What came of a lake.
fn outcome(server: &S3, place: &Workplace, lake: &str, how: &str) -> Outcome {
    let folder = place.path(&format!("down-{lake}"));
    for (url, zone) in [(place.private(lake), "private"), (place.release(lake), "release")] {
        transfer(server, &url, &folder.join(zone).display().to_string());
    }
    assert_eq!(settled(&folder), ["train", "vote"], "{how}");
    results(&folder)
}

type Outcome = BTreeMap<String, Vec<String>>;

/// What comes of a lake on a good day, and the requests of each stage.
fn good_day(server: &S3, place: &Workplace) -> (Outcome, Vec<u64>) {
    let proxy = Proxy::start(server.address()).expect("a proxy");
    prepare(server, place, "s3:calm");
    let requests = STAGES.map(|name| {
        proxy.heal();
        run(stage(place, name, "s3:calm", &proxy, 60), 0, name);
        proxy.seen()
    });
    (outcome(server, place, "s3:calm", "a good day"), requests.into())
}

#[test]
fn stages_end_well_when_a_fault_ends_in_time() {
    let (server, place) = (server(), Workplace::new());
    let (expected, _) = good_day(&server, &place);
    let bursts = |hit, of| When::Bursts { hit, of };
    let faults = [
        (Fault::SlowDown, bursts(4, 40)),
        (Fault::Reset, bursts(2, 20)),
        (Fault::LostAnswer, bursts(2, 20)),
        (Fault::CutShort, bursts(2, 20)),
        // Longer than one request waits, shorter than all its attempts together.
        (Fault::Stall(Duration::from_secs(5)), bursts(1, 150)),
        (Fault::Conflict(409), bursts(2, 3)),
        (Fault::Conflict(412), bursts(2, 3)),
        (Fault::FalseConflict(412), When::From(0)),
        (Fault::TooSkewed, bursts(2, 40)),
        (Fault::TooSlow, bursts(2, 40)),
        (Fault::OtherDate, When::From(0)),
    ];
    in_lakes_of_their_own(&server, &place, &expected, "bad", &faults, |lake, proxy, (fault, when), _| {
        for name in STAGES {
            let how = format!("{name} under {fault:?}, {when:?}");
            proxy.set(*fault, *when);
            run(stage(&place, name, lake, proxy, 12), 0, &how);
            assert!(proxy.hit() > 0 || proxy.seen() == 0 && name == "query", "{how}: it hit nothing");
        }
    });
}

#[test]
fn stages_may_be_tried_again_when_a_fault_does_not_end() {
    let (server, place) = (server(), Workplace::new());
    let (expected, requests) = good_day(&server, &place);
    let faults = [
        Fault::SlowDown,
        Fault::Reset,
        Fault::LostAnswer,
        Fault::CutShort,
        Fault::Stall(Duration::from_secs(5)),
        Fault::Conflict(412),
        Fault::TooSkewed,
    ];
    in_lakes_of_their_own(&server, &place, &expected, "worse", &faults, |lake, proxy, &fault, number| {
        for (index, name) in STAGES.into_iter().enumerate() {
            // Each fault begins at another place of a stage, and at every place of some stage.
            let place_of_all = (number + index) as u64 % faults.len() as u64;
            let from = match fault {
                Fault::Conflict(_) if name == "query" => continue,
                // Every stage has four conditional puts.
                Fault::Conflict(_) => place_of_all % 4,
                // Half of all requests read.
                _ => requests[index] * place_of_all / (2 * faults.len() as u64),
            };
            let how = format!("{name} under {fault:?} from request {from} on");
            proxy.set(fault, When::From(from));
            run(stage(&place, name, lake, proxy, 2), 5, &how);
            assert!(proxy.hit() > 0, "{how}: it hit nothing");
            // With its answer lost, it may be there.
            if fault != Fault::LostAnswer {
                let manifest = manifest(&place, lake, name);
                assert!(!server.holds(&manifest), "{how}: {manifest} is there");
            }
            proxy.heal();
            run(stage(&place, name, lake, proxy, 60), 0, &format!("{name} after {fault:?} from request {from} on"));
        }
    });
}

/// Lets `work` run all stages under each of `faults` in a lake of its own, all at the same time, and compares what comes
/// of them.
fn in_lakes_of_their_own<F: Sync + std::fmt::Debug>(
    server: &S3,
    place: &Workplace,
    expected: &Outcome,
    kind: &str,
    faults: &[F],
    work: impl Fn(&str, &Proxy, &F, usize) + Sync,
) {
    std::thread::scope(|scope| {
        for (number, fault) in faults.iter().enumerate() {
            let (work, how) = (&work, format!("{kind}, {fault:?}"));
            scope.spawn(move || {
                let name = format!("s3:{kind}-{number}");
                prepare(server, place, &name);
                work(&name, &Proxy::start(server.address()).expect("a proxy"), fault, number);
                assert_same(&outcome(server, place, &name, &how), expected, &how);
            });
        }
    });
}

/// Where the manifest of a finished stage would be.
fn manifest(place: &Workplace, lake: &str, stage: &str) -> String {
    let zone = if matches!(stage, "partition" | "embed-corpus") { place.private(lake) } else { place.release(lake) };
    format!("{zone}/runs/{RUN}/stages/{stage}.json")
}

#[test]
fn a_stall_of_thirty_seconds_is_no_matter() {
    let (server, place) = (server(), Workplace::new());
    let proxy = Proxy::start(server.address()).expect("a proxy");
    proxy.set(Fault::Stall(Duration::from_secs(30)), When::Bursts { hit: 1, of: 1000 });
    let mut command = command(&place.synthesize("s3:stalled", "--no-adapter"));
    command.envs(environment(&proxy.endpoint(), Key::Release));
    run(command, 0, "synthesize under a stall of 30 s");
    assert_eq!(proxy.hit(), 1);
}

#[test]
fn large_objects_go_up_whole_whatever_happens_to_their_parts() {
    let server = server();
    // Among them the requests that begin and end the upload.
    for of in [2, 3, 5] {
        let proxy = Proxy::start(server.address()).expect("a proxy");
        proxy.set(Fault::LostAnswer, When::Bursts { hit: 1, of });
        let mut child = Command::new(std::env::current_exe().expect("the test knows itself"));
        child.args(["--exact", "child_large", "--ignored", "--nocapture"]);
        child.envs(environment(&proxy.endpoint(), Key::Both));
        child.env("TEST_ROOT", format!("s3://{PRIVATE_BUCKET}/large-{of}"));
        assert!(binaries::run(&mut child, 0).stdout.contains("1 passed"));
        assert!(proxy.hit() > 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "started by large_objects_go_up_whole_whatever_happens_to_their_parts"]
async fn child_large() {
    let url = std::env::var("TEST_ROOT").expect("set by the test that starts this one");
    let root = PrivateRoot::open(&url, &StorageOptions { timeout: Duration::from_secs(30) }).await.expect("a root");
    promises::large_objects(&root).await;
}

fn server() -> S3 {
    S3::start().unwrap_or_else(|error| panic!("{error}"))
}

/// Copies between this machine and the S3 server in a process of its own, since credentials come from the environment.
#[track_caller]
fn transfer(server: &S3, from: &str, to: &str) {
    let mut child = Command::new(std::env::current_exe().expect("the test knows itself"));
    child.args(["--exact", "child_transfer", "--ignored", "--nocapture"]);
    child.envs(server.environment(Key::Both)).env("TEST_FROM", from).env("TEST_TO", to);
    assert!(binaries::run(&mut child, 0).stdout.contains("1 passed"));
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "started by tests that look at a lake on S3"]
async fn child_transfer() {
    let variable = |name| std::env::var(name).expect("set by the test that starts this one");
    lakes::transfer(&variable("TEST_FROM"), &variable("TEST_TO")).await;
}
