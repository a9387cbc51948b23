//! The lake on a real S3 server: the promises of a root, keys that may do less, and servers that misbehave.
//!
//! Each case runs in a process of its own (this test binary again, with one `child_` test and an environment), since
//! credentials come from the environment and tests of one process share theirs.

// What a case prints is searched for secrets by the test that started it.
#![allow(clippy::print_stderr)]

use std::io::{Read, Write};
use std::net::TcpListener;
use std::process::Command;
use std::time::{Duration, Instant};

use lake::{LakeError, PrivateRoot, ReleaseRoot, StorageOptions, Zone, check_disjoint, promises};
use scenarios::s3::{self, Key, S3};

/// Runs the ignored test `name` of this file in a process with `environment`, and gives its output.
#[track_caller]
fn child(name: &str, environment: &[(&str, String)]) -> String {
    let executable = std::env::current_exe().expect("the test knows itself");
    let mut command = Command::new(executable);
    command.args(["--exact", name, "--ignored", "--nocapture"]);
    for (key, _) in std::env::vars().filter(|(key, _)| key.starts_with("AWS_")) {
        command.env_remove(key);
    }
    let output = command.envs(environment.iter().cloned()).output().expect("the test starts itself");
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{text}");
    assert!(text.contains("1 passed"), "{text}");
    text
}

fn variable(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| panic!("{name} is set by the test that starts this one"))
}

fn options(seconds: u64) -> StorageOptions {
    StorageOptions { timeout: Duration::from_secs(seconds) }
}

fn server() -> S3 {
    S3::start().unwrap_or_else(|error| panic!("{error}"))
}

#[test]
fn an_s3_bucket_keeps_all_promises() {
    let server = server();
    let mut environment = server.environment(Key::Both);
    environment.push(("TEST_ROOT", server.private_url("my läke/private")));
    child("child_promises", &environment);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "started by an_s3_bucket_keeps_all_promises"]
async fn child_promises() {
    let root = PrivateRoot::open(&variable("TEST_ROOT"), &options(60)).await.unwrap();
    promises::all(&root).await;
}

#[test]
fn a_profile_gives_the_credentials_that_the_environment_does_not() {
    let server = server();
    let folder = tempfile::tempdir().unwrap();
    let (id, secret) = Key::Both.credentials();
    let credentials = folder.path().join("credentials");
    std::fs::write(&credentials, format!("[lake]\naws_access_key_id = {id}\naws_secret_access_key = {secret}\n"))
        .unwrap();
    let config = folder.path().join("config");
    std::fs::write(&config, format!("[profile lake]\nregion = us-east-1\nendpoint_url = {}\n", server.endpoint()))
        .unwrap();
    let environment = [
        ("AWS_PROFILE", "lake".to_string()),
        ("AWS_ALLOW_HTTP", "true".into()),
        ("AWS_SHARED_CREDENTIALS_FILE", credentials.display().to_string()),
        ("AWS_CONFIG_FILE", config.display().to_string()),
        ("TEST_ROOT", server.private_url("profile")),
    ];
    child("child_objects", &environment);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "started by a_profile_gives_the_credentials_that_the_environment_does_not"]
async fn child_objects() {
    let root = PrivateRoot::open(&variable("TEST_ROOT"), &options(30)).await.unwrap();
    promises::objects(&root).await;
}

#[test]
fn the_release_key_works_in_the_release_zone_alone() {
    let server = server();
    let mut environment = server.environment(Key::Release);
    environment.push(("TEST_PRIVATE", server.private_url("lake")));
    environment.push(("TEST_RELEASE", server.release_url("lake")));
    let output = child("child_release_key", &environment);
    assert!(
        !output.contains(Key::Release.credentials().1) && !output.contains(Key::Release.credentials().0),
        "{output}"
    );
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "started by the_release_key_works_in_the_release_zone_alone"]
async fn child_release_key() {
    let release = ReleaseRoot::open(&variable("TEST_RELEASE"), &options(30)).await.unwrap();
    let private = PrivateRoot::open(&variable("TEST_PRIVATE"), &options(30)).await.unwrap();
    check_disjoint(&private, &release).unwrap();
    promises::tables(&release).await;
    let refused = [
        private.get("corpora/demo").await.map(drop),
        private.put("corpora/demo", "text".into()).await,
        private.put_if_absent("corpora/demo", "text".into()).await.map(drop),
        private.list("corpora").await.map(drop),
        private.table("corpora/demo").pin().await.map(drop),
    ];
    for found in refused {
        eprintln!("{found:?}");
        assert!(matches!(&found, Err(LakeError::Forbidden(text)) if text.contains("doppel-private")), "{found:?}");
    }
}

#[test]
fn a_wrong_secret_is_refused_without_repeating_it() {
    let server = server();
    let mut environment = server.environment(Key::Both);
    environment.retain(|(name, _)| *name != "AWS_SECRET_ACCESS_KEY");
    environment.push(("AWS_SECRET_ACCESS_KEY", "a-secret-that-is-wrong".into()));
    environment.push(("TEST_ROOT", server.private_url("lake")));
    let output = child("child_forbidden", &environment);
    assert!(!output.contains("a-secret") && !output.contains(Key::Both.credentials().0), "{output}");
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "started by a_wrong_secret_is_refused_without_repeating_it"]
async fn child_forbidden() {
    let root = PrivateRoot::open(&variable("TEST_ROOT"), &options(10)).await.unwrap();
    let found = root.get("a").await;
    eprintln!("{found:?}");
    assert!(matches!(found, Err(LakeError::Forbidden(_))), "{found:?}");
}

#[test]
fn a_missing_bucket_is_named() {
    let server = server();
    let mut environment = server.environment(Key::Both);
    environment.push(("TEST_ROOT", "s3://no-such-bucket/lake".into()));
    child("child_missing_bucket", &environment);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "started by a_missing_bucket_is_named"]
async fn child_missing_bucket() {
    let root = PrivateRoot::open(&variable("TEST_ROOT"), &options(10)).await.unwrap();
    // A server may hide from this key whether the bucket is there.
    for found in
        [root.get("a").await.map(drop), root.put("a", "text".into()).await, root.table("t").pin().await.map(drop)]
    {
        eprintln!("{found:?}");
        let named = |text: &String| text.contains("no-such-bucket");
        assert!(
            matches!(&found, Err(LakeError::NoBucket(text) | LakeError::Forbidden(text)) if named(text)),
            "{found:?}"
        );
    }
}

#[test]
fn an_endpoint_that_nobody_listens_at_ends_at_the_deadline() {
    // Not a free port: a server that another test starts might get it.
    let mut environment = s3::environment("http://127.0.0.1:1", Key::Both);
    environment.push(("TEST_ROOT", "s3://doppel-private/lake".into()));
    child("child_unreachable", &environment);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "started by an_endpoint_that_nobody_listens_at_ends_at_the_deadline"]
async fn child_unreachable() {
    let (root, begin) = (variable("TEST_ROOT"), Instant::now());
    let (private, release) = (PrivateRoot::open(&root, &options(2)).await, ReleaseRoot::open(&root, &options(2)).await);
    // Which zone it is cannot be told, so that neither is opened.
    for found in [private.map(drop), release.map(drop)] {
        eprintln!("{found:?}");
        assert!(
            matches!(&found, Err(LakeError::Transient(text)) if text.contains("s3://doppel-private/lake")),
            "{found:?}"
        );
    }
    assert!(begin.elapsed() < Duration::from_secs(25), "{:?}", begin.elapsed());
}

#[test]
fn an_http_endpoint_needs_to_be_allowed_and_tls_needs_to_be_spoken() {
    let server = server();
    let mut environment = server.environment(Key::Both);
    environment.retain(|(name, _)| *name != "AWS_ALLOW_HTTP");
    child("child_http_not_allowed", &environment);
    environment.retain(|(name, _)| *name != "AWS_ENDPOINT_URL");
    environment.push(("AWS_ENDPOINT_URL", server.endpoint().replace("http://", "https://")));
    child("child_no_tls", &environment);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "started by an_http_endpoint_needs_to_be_allowed_and_tls_needs_to_be_spoken"]
async fn child_http_not_allowed() {
    let found = PrivateRoot::open("s3://doppel-private/lake", &options(2)).await;
    assert!(matches!(&found, Err(LakeError::Usage(text)) if text.contains("AWS_ALLOW_HTTP")), "{found:?}");
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "started by an_http_endpoint_needs_to_be_allowed_and_tls_needs_to_be_spoken"]
async fn child_no_tls() {
    let root = PrivateRoot::open("s3://doppel-private/lake", &options(2)).await.unwrap();
    let found = root.get("a").await;
    assert!(matches!(&found, Err(LakeError::Usage(text)) if text.contains("does not speak TLS")), "{found:?}");
}

/// A server that holds nothing and answers every write with success, conditions or not.
fn store_without_conditions() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let endpoint = format!("http://{}", listener.local_addr().expect("an address"));
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            std::thread::spawn(move || {
                let mut buffer = [0; 65_536];
                // The tests' bodies are small, so that a request is one read.
                while stream.read(&mut buffer).is_ok_and(|read| read > 0) {
                    let answer = match buffer.starts_with(b"GET ") {
                        true => "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
                        false => "HTTP/1.1 200 OK\r\nETag: \"1\"\r\nContent-Length: 0\r\n\r\n",
                    };
                    if stream.write_all(answer.as_bytes()).is_err() {
                        return;
                    }
                }
            });
        }
    });
    endpoint
}

#[test]
fn a_store_without_conditional_puts_is_refused() {
    child("child_no_conditions", &s3::environment(&store_without_conditions(), Key::Both));
    let mut environment = s3::environment(&store_without_conditions(), Key::Both);
    environment.push(("AWS_CONDITIONAL_PUT", "disabled".into()));
    child("child_no_conditions", &environment);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "started by a_store_without_conditional_puts_is_refused"]
async fn child_no_conditions() {
    let root = PrivateRoot::open("s3://doppel-private/lake", &options(5)).await.unwrap();
    let found = root.put_if_absent("claim", "text".into()).await;
    assert!(matches!(&found, Err(LakeError::Usage(text)) if text.contains("conditional puts")), "{found:?}");
}

#[test]
fn a_model_folder_and_raw_input_are_fetched_from_s3() {
    let server = server();
    let mut environment = server.environment(Key::Both);
    environment.push(("TEST_ROOT", server.release_url("models")));
    child("child_fetch", &environment);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "started by a_model_folder_and_raw_input_are_fetched_from_s3"]
async fn child_fetch() {
    use futures::TryStreamExt;
    let url = variable("TEST_ROOT");
    let root = ReleaseRoot::open(&url, &options(30)).await.unwrap();
    root.put("tiny/config.json", "{}".into()).await.unwrap();
    root.put("tiny/sub/weights", vec![1; 100].into()).await.unwrap();
    let folder = lake::fetch_folder(&format!("{url}/tiny"), &options(30)).await.unwrap();
    let kept = folder.path().to_path_buf();
    assert_eq!(std::fs::read(kept.join("sub/weights")).unwrap(), [1; 100]);
    drop(folder);
    assert!(!kept.exists());
    let file = lake::fetch_folder(&format!("{url}/tiny/config.json"), &options(30)).await.unwrap();
    assert_eq!(std::fs::read(file.path()).unwrap(), b"{}");
    assert!(file.path().ends_with("config.json"));
    assert!(matches!(lake::fetch_folder(&format!("{url}/none"), &options(30)).await, Err(LakeError::NotFound(_))));
    let stream = lake::read_stream(&format!("{url}/tiny/sub/weights"), &options(30)).await.unwrap();
    assert_eq!(stream.bytes.try_collect::<Vec<_>>().await.unwrap().concat(), [1; 100]);
}

#[test]
fn gc_and_compaction_keep_their_promises_on_s3() {
    let server = server();
    let mut environment = server.environment(Key::Both);
    environment.push(("TEST_ROOT", server.private_url("my l\u{e4}ke/private")));
    child("child_gc", &environment);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "started by gc_and_compaction_keep_their_promises_on_s3"]
async fn child_gc() {
    use lake::gc::{self, Pin, Retained};
    let root = PrivateRoot::open(&variable("TEST_ROOT"), &options(60)).await.unwrap();
    for run in ["kept", "gone"] {
        let table = root.table(&format!("runs/{run}/loss"));
        table.create(lake::schema::loss()).await.unwrap();
        for step in 0..12 {
            let transaction = lake::AppTransaction { id: "a/train".into(), version: step };
            assert!(table.append(vec![loss(step)], transaction).await.unwrap());
        }
        assert!(table.compact(1 << 20, lake::Writers::Ended).await.unwrap());
    }
    // All that is there counts as old.
    let retained = Retained {
        pins: vec![Pin { path: "runs/kept/loss".into(), version: Some(5), run: Some("other".into()) }],
        dropped: [("gone".to_string(), None)].into(),
        before: chrono::Utc::now() + Duration::from_secs(3600),
        ..Retained::default()
    };
    let plan = gc::plan(&root, &retained).await.unwrap();
    gc::remove(&root, &plan).await.unwrap();
    assert_eq!(gc::plan(&root, &retained).await.unwrap().removals, []);
    assert_eq!(root.list("runs/gone").await.unwrap(), Vec::<String>::new());
    let table = root.table("runs/kept/loss");
    assert_eq!(table.read(5, &["step"]).await.unwrap().iter().map(|batch| batch.num_rows()).sum::<usize>(), 5);
    assert_eq!(table.read(13, &["step"]).await.unwrap().iter().map(|batch| batch.num_rows()).sum::<usize>(), 12);
    assert!(matches!(table.read(12, &["step"]).await, Err(LakeError::Malformed(_))));
}

fn loss(step: i64) -> arrow::array::RecordBatch {
    use arrow::array::{ArrayRef, Float64Array, Int64Array, StringArray};
    let columns: Vec<ArrayRef> = vec![
        std::sync::Arc::new(Int64Array::from(vec![step])),
        std::sync::Arc::new(StringArray::from(vec!["validation"])),
        std::sync::Arc::new(Float64Array::from(vec![0.5])),
    ];
    arrow::array::RecordBatch::try_new(lake::schema::loss(), columns).unwrap()
}
