//! The command line contract of `doppel gc`, `compact` and `openlineage`, and what they and `runs` say of unknown runs.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::mpsc::{Receiver, channel};

use lake::{Begin, Claim, Input, Output as Made, PrivateRoot, ReleaseRoot, StorageOptions, Zone, manifest};
use tempfile::TempDir;

fn doppel(folder: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_doppel"));
    for (name, _) in std::env::vars().filter(|(name, _)| {
        ["DOPPEL_", "OTEL_", "OPENLINEAGE_", "RUST_LOG"].iter().any(|start| name.starts_with(start))
    }) {
        command.env_remove(name);
    }
    command.args(args).current_dir(folder);
    command
}

#[track_caller]
fn run(mut command: Command, exit_code: i32) -> (String, String) {
    let Output { status, stdout, stderr } = command.output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    let (stdout, stderr) = (text(stdout), text(stderr));
    assert_eq!(status.code(), Some(exit_code), "{stdout}{stderr}");
    (stdout, stderr)
}

fn claim(run: &str, stage: &str, location: &str, version: Option<i64>) -> Claim {
    let digest = Some("c0ffee".into());
    Claim {
        run: run.into(),
        stage: stage.into(),
        shard: None,
        inputs: vec![Input { name: "corpus".into(), location: location.into(), version, digest }],
        config: serde_json::json!({ "secret": "c0ffee" }),
        command: Vec::new(),
        seeds: vec![12_345],
        binary: format!("doppel-{stage} 0.1.0"),
        started: chrono::DateTime::UNIX_EPOCH,
    }
}

/// `train` of the run `demo` has only begun.
#[tokio::main]
async fn write_run(folder: &Path) {
    let options = StorageOptions::default();
    let private = PrivateRoot::open(&folder.join("private").display().to_string(), &options).await.unwrap();
    let release = ReleaseRoot::open(&folder.join("release").display().to_string(), &options).await.unwrap();
    let outputs = vec![Made { name: "embeddings".into(), path: "runs/demo/embeddings".into(), version: Some(77) }];
    let claimed = claim("demo", "embed-corpus", "corpora/chats", Some(1));
    let Begin::Fresh(handle) = manifest::begin(&private, claimed).await.unwrap() else { panic!() };
    handle.finish(outputs, serde_json::json!({ "rows": 54_321 })).await.unwrap();
    manifest::begin(&release, claim("demo", "train", "corpora/chats", Some(1))).await.unwrap();
    release.put("runs/demo/adapter/adapter_config.json", "{}".into()).await.unwrap();
}

const BOTH: [&str; 4] = ["--private", "private", "--release", "release"];

#[test]
fn to_drop_a_run_takes_both_roots() {
    let folder = TempDir::new().unwrap();
    let (_, stderr) = run(doppel(folder.path(), &["gc", "--drop", "demo", "--release", "release"]), 2);
    assert!(stderr.contains("both zones") && stderr.contains("help:"), "{stderr}");
    let (_, stderr) = run(doppel(folder.path(), &["gc"]), 2);
    assert!(stderr.contains("no root is given"), "{stderr}");
    let (_, stderr) = run(doppel(folder.path(), &["gc", "--min-age", "7", "--release", "release"]), 2);
    assert!(stderr.contains("such as 36h or 7d"), "{stderr}");
    let (_, stderr) = run(doppel(folder.path(), &["gc", "--private", "lake", "--release", "lake/release"]), 2);
    assert!(stderr.contains("the same or nested"), "{stderr}");
}

#[test]
fn a_young_run_is_not_dropped_and_an_unknown_one_is_refused() {
    let folder = TempDir::new().unwrap();
    write_run(folder.path());
    let (stdout, _) = run(doppel(folder.path(), &[&["gc", "--drop", "demo"], &BOTH[..]].concat()), 0);
    assert!(stdout.contains("run demo: kept for now"), "{stdout}");
    let drop = ["gc", "--min-age", "0s", "--drop", "demo", "--drop", "none"];
    let (_, stderr) = run(doppel(folder.path(), &[&drop, &BOTH[..]].concat()), 3);
    assert!(stderr.contains("the run `none` left nothing in file://") && stderr.contains("help:"), "{stderr}");
    assert!(folder.path().join("release/runs/demo/adapter/adapter_config.json").exists());
}

#[test]
fn a_manifest_edited_by_hand_stops_gc_before_anything_is_removed() {
    let folder = TempDir::new().unwrap();
    write_run(folder.path());
    std::fs::write(folder.path().join("private/runs/demo/stages/embed-corpus.json"), "{\"claim\": \"c0ffee").unwrap();
    let (_, stderr) =
        run(doppel(folder.path(), &[&["gc", "--min-age", "0s", "--drop", "demo"], &BOTH[..]].concat()), 3);
    assert!(stderr.contains("embed-corpus.json: line 1") && !stderr.contains("c0ffee"), "{stderr}");
    assert!(folder.path().join("release/runs/demo/adapter/adapter_config.json").exists());
}

#[test]
fn compaction_names_what_is_no_table_and_refuses_a_corpus() {
    let folder = TempDir::new().unwrap();
    write_run(folder.path());
    let (stdout, _) = run(doppel(folder.path(), &[&["compact"], &BOTH[..]].concat()), 0);
    assert!(stdout.starts_with("no tables to compact in file://") && stdout.contains("/release"), "{stdout}");
    let (_, stderr) = run(doppel(folder.path(), &[&["compact", "--run", "none"], &BOTH[..]].concat()), 3);
    assert!(stderr.contains("the run `none` left nothing"), "{stderr}");
    let (_, stderr) = run(doppel(folder.path(), &[&["compact", "runs/demo/none"], &BOTH[..]].concat()), 3);
    assert!(stderr.contains("runs/demo/none: no table there"), "{stderr}");
    let (_, stderr) = run(doppel(folder.path(), &[&["compact", "corpora/chats"], &BOTH[..]].concat()), 2);
    assert!(stderr.contains("a corpus is one commit"), "{stderr}");
}

#[test]
fn lineage_goes_to_standard_output_without_what_is_private() {
    let folder = TempDir::new().unwrap();
    write_run(folder.path());
    let (stdout, _) = run(doppel(folder.path(), &[&["openlineage"], &BOTH[..]].concat()), 0);
    let events: Vec<serde_json::Value> = stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let told: Vec<_> = events.iter().map(|event| (event["eventType"].clone(), event["job"]["name"].clone())).collect();
    let expected = [("START", "embed-corpus"), ("START", "train"), ("COMPLETE", "embed-corpus")];
    assert_eq!(told, expected.map(|(kind, stage)| (kind.into(), stage.into())));
    assert_eq!(events[0]["run"]["facets"]["parent"]["run"], events[1]["run"]["facets"]["parent"]["run"]);
    assert_eq!(events[0]["run"]["runId"], events[2]["run"]["runId"]);
    for private in ["c0ffee", "54321", "12345", "\"77\""] {
        assert!(!stdout.contains(private), "{private}: {stdout}");
    }
    // Without the private root its datasets have a namespace of their own.
    let (stdout, _) = run(doppel(folder.path(), &["openlineage", "--run", "demo", "--release", "release"]), 0);
    let event: serde_json::Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(event["inputs"][0]["namespace"], "doppel://private");
    let (_, stderr) = run(doppel(folder.path(), &["openlineage", "--run", "none", "--release", "release"]), 3);
    assert!(stderr.contains("`none`"), "{stderr}");
}

#[test]
fn lineage_names_a_local_table_by_its_path() {
    let folder = TempDir::new().unwrap();
    let place = folder.path().join("my dä");
    std::fs::create_dir(&place).unwrap();
    write_run(&place);
    let (stdout, _) = run(doppel(&place, &[&["openlineage"], &BOTH[..]].concat()), 0);
    let last: serde_json::Value = serde_json::from_str(stdout.lines().last().unwrap()).unwrap();
    let table = place.canonicalize().unwrap().join("private/runs/demo/embeddings");
    assert_eq!(last["outputs"][0]["name"], table.display().to_string());
}

/// An HTTP server that answers each request with `status`, and hands on what came. The status may have headers behind it.
fn server(status: impl Into<String>) -> (String, Receiver<String>) {
    let status = status.into();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut request = Vec::new();
            let mut buffer = [0; 65_536];
            while !is_whole(&request) {
                match stream.read(&mut buffer) {
                    Ok(0) | Err(_) => break,
                    Ok(read) => request.extend_from_slice(&buffer[..read]),
                }
            }
            let answer = format!("HTTP/1.1 {status}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
            stream.write_all(answer.as_bytes()).unwrap();
            let _ = sender.send(String::from_utf8(request).unwrap());
        }
    });
    (url, receiver)
}

fn is_whole(request: &[u8]) -> bool {
    let text = String::from_utf8_lossy(request);
    let Some((head, body)) = text.split_once("\r\n\r\n") else { return false };
    let length =
        head.lines().find_map(|line| line.to_lowercase().strip_prefix("content-length: ")?.parse::<usize>().ok());
    length.is_some_and(|length| body.len() >= length)
}

#[test]
fn lineage_is_posted_event_by_event_with_the_key() {
    let folder = TempDir::new().unwrap();
    write_run(folder.path());
    let (url, requests) = server("201 Created");
    let mut command = doppel(folder.path(), &[&["openlineage"], &BOTH[..]].concat());
    command.env("OPENLINEAGE_URL", &url).env("OPENLINEAGE_API_KEY", "a-secret-key");
    let (stdout, stderr) = run(command, 0);
    assert_eq!(stdout, "openlineage: 3 events told\n");
    assert!(!stderr.contains("a-secret-key"), "{stderr}");
    for request in (0..3).map(|_| requests.recv().unwrap()) {
        let (head, body) = request.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("POST /api/v1/lineage HTTP/1.1"), "{head}");
        assert!(head.contains("authorization: Bearer a-secret-key"), "{head}");
        assert!(head.contains("content-type: application/json"), "{head}");
        let event: serde_json::Value = serde_json::from_str(body).unwrap();
        assert!(event["run"]["runId"].is_string());
    }
}

#[test]
fn a_redirect_is_not_followed_with_the_key() {
    let folder = TempDir::new().unwrap();
    write_run(folder.path());
    let (elsewhere, requests) = server("200 OK");
    let (url, _) = server(format!("307 Temporary Redirect\r\nlocation: {elsewhere}/api/v1/lineage"));
    let mut command = doppel(folder.path(), &[&["openlineage", "--to", &url], &BOTH[..]].concat());
    command.env("OPENLINEAGE_API_KEY", "a-secret-key");
    let (_, stderr) = run(command, 2);
    assert!(stderr.contains("answered 307") && stderr.contains("help:"), "{stderr}");
    assert!(requests.try_recv().is_err(), "the other server was asked");
}

#[tokio::main]
async fn begin(folder: &Path, claim: Claim) -> Result<(), String> {
    let release = folder.join("release").display().to_string();
    let release = ReleaseRoot::open(&release, &StorageOptions::default()).await.unwrap();
    manifest::begin(&release, claim).await.map(drop).map_err(|error| error.to_string())
}

#[test]
fn the_id_of_a_dropped_run_is_closed_and_dropping_it_again_does_nothing() {
    let drop = [&["gc", "--min-age", "0s", "--drop", "demo"], &BOTH[..]].concat();
    let train = || claim("demo", "train", "corpora/chats", Some(1));
    let folder = TempDir::new().unwrap();
    write_run(folder.path());
    // Another run samples the adapter, so that what says where it came from must stay.
    begin(folder.path(), claim("other", "synthesize", "runs/demo/adapter", None)).unwrap();
    let (stdout, _) = run(doppel(folder.path(), &drop), 0);
    assert!(stdout.contains("kept: release runs/demo/stages"), "{stdout}");
    let refused = begin(folder.path(), train()).unwrap_err();
    assert!(refused.contains("run demo was dropped"), "{refused}");
    let (stdout, _) = run(doppel(folder.path(), &[&["runs"], &BOTH[..]].concat()), 0);
    assert!(stdout.lines().any(|line| line.starts_with("demo ") && line.contains("  dropped  ")), "{stdout}");
    let (stdout, _) = run(doppel(folder.path(), &[&["show", "demo"], &BOTH[..]].concat()), 0);
    assert!(stdout.starts_with("run demo was dropped"), "{stdout}");
    // Where nothing stays, the mark does: the run is no unknown one.
    let folder = TempDir::new().unwrap();
    write_run(folder.path());
    run(doppel(folder.path(), &drop), 0);
    assert!(begin(folder.path(), train()).unwrap_err().contains("run demo was dropped"));
    let (stdout, _) = run(doppel(folder.path(), &drop), 0);
    assert!(stdout.contains("nothing to remove") && stdout.contains("run demo: dropped before"), "{stdout}");
}

#[test]
fn mistyped_roots_are_named() {
    let folder = TempDir::new().unwrap();
    let (_, told) = run(doppel(folder.path(), &["runs", "--private", "typo", "--release", "typo2"]), 3);
    assert!(told.contains("/typo and file://") && told.contains("/typo2: nothing is there\nhelp: "), "{told}");
}

#[test]
fn an_endpoint_that_fails_is_told_by_remedy() {
    let folder = TempDir::new().unwrap();
    write_run(folder.path());
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let cases = [
        (server("503 Service Unavailable").0, 5, "answered 503"),
        (server("404 Not Found").0, 2, "/api/v1/lineage: the server answered 404"),
        (server("401 Unauthorized").0, 2, "OPENLINEAGE_API_KEY"),
        (format!("http://{nobody}"), 5, "cannot be reached"),
        ("http://me:a-secret@host".to_owned(), 2, "a URL with credentials"),
    ];
    for (to, code, expected) in cases {
        let (_, stderr) = run(doppel(folder.path(), &[&["openlineage", "--to", &to], &BOTH[..]].concat()), code);
        assert!(stderr.contains(expected) && stderr.contains("help:"), "{stderr}");
        assert!(!stderr.contains("a-secret"), "{stderr}");
    }
    let (_, stderr) = run(doppel(folder.path(), &[&["openlineage", "--to", "none/events"], &BOTH[..]].concat()), 2);
    assert!(stderr.contains("none/events"), "{stderr}");
}
