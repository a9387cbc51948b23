//! A real S3 server for tests: SeaweedFS on free loopback ports, with one bucket for each zone and two keys.
//!
//! The binary comes from set-up: `$DOPPEL_CACHE/bin/weed`. Everything else lives in a temporary folder, and both go when
//! the value is dropped.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// Bucket of the private zone.
pub const PRIVATE_BUCKET: &str = "doppel-private";

/// Bucket of the release zone.
pub const RELEASE_BUCKET: &str = "doppel-release";

/// Longest wait for the server; it takes about three seconds on an idle machine.
const START: Duration = Duration::from_secs(60);

/// Times that the server is started anew on other ports, since another process may take a free port first.
const ATTEMPTS: usize = 3;

/// Who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key {
    /// May read and write both buckets.
    Both,
    /// May read and write the release bucket, and nothing else.
    Release,
}

impl Key {
    /// Access key id and secret. They guard nothing but a test's own folder.
    pub fn credentials(self) -> (&'static str, &'static str) {
        match self {
            Key::Both => ("both-zones", "secret-of-both-zones"),
            Key::Release => ("release-only", "secret-of-release-only"),
        }
    }
}

/// A running server.
#[derive(Debug)]
pub struct S3 {
    server: Child,
    ports: Vec<u16>,
    port: u16,
    _folder: TempDir,
}

impl S3 {
    /// Starts a server of its own for one test; fails with what set-up should have provided.
    pub fn start() -> Result<Self, String> {
        let weed = cache().join("bin/weed");
        if !weed.is_file() {
            return Err(format!("{}: not there\nhelp: run `make setup`, which fetches the S3 server", weed.display()));
        }
        let mut last = String::new();
        for _ in 0..ATTEMPTS {
            match Self::try_start(&weed) {
                Ok(server) => return Ok(server),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// URL of the private root of a deployment in this server.
    pub fn private_url(&self, prefix: &str) -> String {
        format!("s3://{PRIVATE_BUCKET}/{prefix}")
    }

    /// URL of the release root of a deployment in this server.
    pub fn release_url(&self, prefix: &str) -> String {
        format!("s3://{RELEASE_BUCKET}/{prefix}")
    }

    /// `http://127.0.0.1:PORT`.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address())
    }

    /// Where the server listens, for a proxy to stand in front of it.
    pub fn address(&self) -> SocketAddr {
        SocketAddr::from((Ipv4Addr::LOCALHOST, self.port))
    }

    /// Whether the object at `url` is there, asked of the file server below.
    pub fn holds(&self, url: &str) -> bool {
        let path = url.strip_prefix("s3://").expect("an S3 URL");
        let status = http(self.ports[4], "HEAD", &format!("/buckets/{path}"));
        assert!(matches!(status, Some(200 | 404)), "{url}: {status:?}");
        status == Some(200)
    }

    /// The environment that makes doppel, and any other S3 client, use this server with `key`.
    pub fn environment(&self, key: Key) -> Vec<(&'static str, String)> {
        environment(&self.endpoint(), key)
    }

    fn try_start(weed: &Path) -> Result<Self, String> {
        let text = |error: std::io::Error| format!("the S3 server: {error}");
        let folder = tempfile::Builder::new().prefix("doppel-s3-").tempdir().map_err(text)?;
        let config = folder.path().join("s3.json");
        std::fs::write(&config, identities()).map_err(text)?;
        std::fs::create_dir(folder.path().join("data")).map_err(text)?;
        let log = std::fs::File::create(folder.path().join("log")).map_err(text)?;
        let ports = free_ports(8).map_err(text)?;
        let server = Command::new(weed)
            .args(arguments(&ports))
            .arg(format!("-dir={}", folder.path().join("data").display()))
            .arg(format!("-s3.config={}", config.display()))
            .current_dir(folder.path())
            .env_clear()
            .env("HOME", folder.path())
            .stdin(Stdio::null())
            .stdout(log.try_clone().map_err(text)?)
            .stderr(log)
            .spawn()
            .map_err(text)?;
        let mut server = Self { server, port: ports[6], ports, _folder: folder };
        server.wait_until_ready()?;
        Ok(server)
    }

    /// Creates the buckets, which are folders of the file server below, and waits until the S3 side answers for them.
    fn wait_until_ready(&mut self) -> Result<(), String> {
        let deadline = Instant::now() + START;
        let filer = self.ports[4];
        let ready = |path: &str, port: u16, method: &str, wanted: &[u16]| {
            http(port, method, path).is_some_and(|status| wanted.contains(&status))
        };
        while Instant::now() < deadline {
            if let Ok(Some(status)) = self.server.try_wait() {
                return Err(format!("the S3 server stopped at its start ({status}):\n{}", self.log_tail()));
            }
            let buckets = [PRIVATE_BUCKET, RELEASE_BUCKET];
            // Without credentials the S3 side refuses, which shows that it has read its keys.
            if ready("/", self.port, "GET", &[403])
                && buckets.iter().all(|bucket| ready(&format!("/buckets/{bucket}/"), filer, "POST", &[200, 201]))
                && buckets.iter().all(|bucket| ready(&format!("/{bucket}/"), self.port, "GET", &[403]))
            {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        Err(format!("the S3 server did not answer within {} s:\n{}", START.as_secs(), self.log_tail()))
    }

    fn log_tail(&self) -> String {
        let log = std::fs::read_to_string(self._folder.path().join("log")).unwrap_or_default();
        let lines: Vec<&str> = log.lines().rev().take(20).collect();
        lines.into_iter().rev().collect::<Vec<_>>().join("\n")
    }
}

impl Drop for S3 {
    fn drop(&mut self) {
        // The server keeps nothing that outlives the test, so it need not be asked kindly.
        let _ = self.server.kill();
        let _ = self.server.wait();
        // It leaves sockets outside its folder, named after its ports.
        for (part, port) in
            [("master-grpc", 1), ("volume-grpc", 3), ("filer-grpc", 5), ("filer", 4), ("s3", 6), ("s3-grpc", 7)]
        {
            let _ = std::fs::remove_file(format!("/tmp/seaweedfs-{part}-{}.sock", self.ports[port]));
        }
    }
}

/// The environment for an S3 `endpoint`, such as a proxy before the server, with `key`.
pub fn environment(endpoint: &str, key: Key) -> Vec<(&'static str, String)> {
    let (id, secret) = key.credentials();
    vec![
        ("AWS_ENDPOINT_URL", endpoint.to_string()),
        ("AWS_REGION", "us-east-1".into()),
        ("AWS_ALLOW_HTTP", "true".into()),
        ("AWS_ACCESS_KEY_ID", id.into()),
        ("AWS_SECRET_ACCESS_KEY", secret.into()),
        // The machine's own profile must not decide a test.
        ("AWS_CONFIG_FILE", "/dev/null".into()),
        ("AWS_SHARED_CREDENTIALS_FILE", "/dev/null".into()),
    ]
}

/// Where set-up keeps what tests need.
pub fn cache() -> PathBuf {
    match std::env::var_os("DOPPEL_CACHE") {
        Some(path) => path.into(),
        None => PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cache/doppel"),
    }
}

fn arguments(ports: &[u16]) -> Vec<String> {
    let names = [
        "master.port",
        "master.port.grpc",
        "volume.port",
        "volume.port.grpc",
        "filer.port",
        "filer.port.grpc",
        "s3.port",
        "s3.port.grpc",
    ];
    let mut arguments: Vec<String> = [
        "server",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        "-s3",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-s3.iam=false",
        // It would report to its makers otherwise.
        "-master.telemetry=false",
        "-master.volumeSizeLimitMB=256",
        "-volume.max=32",
    ]
    .map(String::from)
    .into();
    arguments.extend(names.iter().zip(ports).map(|(name, port)| format!("-{name}={port}")));
    arguments
}

fn identities() -> String {
    let identity = |name: &str, key: Key, buckets: &[&str]| {
        let (id, secret) = key.credentials();
        let actions: Vec<String> = buckets
            .iter()
            .flat_map(|bucket| ["Read", "Write", "List"].map(|action| format!("\"{action}:{bucket}\"")))
            .collect();
        format!(
            r#"{{"name": "{name}", "credentials": [{{"accessKey": "{id}", "secretKey": "{secret}"}}], "actions": [{}]}}"#,
            actions.join(", ")
        )
    };
    format!(
        r#"{{"identities": [{}, {}]}}"#,
        identity("both", Key::Both, &[PRIVATE_BUCKET, RELEASE_BUCKET]),
        identity("release", Key::Release, &[RELEASE_BUCKET])
    )
}

/// Ports that are free now; all are held until all are found, so that they differ.
fn free_ports(count: usize) -> std::io::Result<Vec<u16>> {
    let listeners: Vec<TcpListener> =
        (0..count).map(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0))).collect::<Result<_, _>>()?;
    listeners.iter().map(|listener| Ok(listener.local_addr()?.port())).collect()
}

/// The status of a plain HTTP request to a loopback port; `None` if there was no answer.
fn http(port: u16, method: &str, path: &str) -> Option<u16> {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(2)).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(5))).ok()?;
    let request =
        format!("{method} {path} HTTP/1.1\r\nHost: {address}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).ok()?;
    let mut head = [0; 12];
    stream.read_exact(&mut head).ok()?;
    std::str::from_utf8(&head).ok()?.strip_prefix("HTTP/1.1 ")?.parse().ok()
}
