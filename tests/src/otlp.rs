//! An OpenTelemetry collector on loopback: what a stage exports by OTLP/HTTP in JSON, a test can look at.

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use serde_json::Value;

/// A running collector. Its thread ends with the test process.
#[derive(Debug)]
pub struct Collector {
    address: SocketAddr,
    received: Arc<Mutex<Vec<Received>>>,
}

#[derive(Debug)]
struct Received {
    path: String,
    body: String,
}

/// One exported span.
#[derive(Clone, Debug, PartialEq)]
pub struct Span {
    /// `service.name` of the process that made it.
    pub service: String,
    /// Name, such as `doppel.train`.
    pub name: String,
    /// Trace id, in hex.
    pub trace: String,
    /// Span id, in hex.
    pub id: String,
    /// Id of the parent span, in hex; empty for a root.
    pub parent: String,
    /// Attributes as text.
    pub attributes: BTreeMap<String, String>,
    /// Status code by OTLP: 1 fine, 2 an error.
    pub status: u64,
}

/// One exported metric.
#[derive(Clone, Debug, PartialEq)]
pub struct Metric {
    /// `service.instance.id` of the process that told it.
    pub instance: String,
    /// Name, such as `doppel.tokens`.
    pub name: String,
    /// Attributes of each point, as text.
    pub attributes: Vec<BTreeMap<String, String>>,
    /// Value of a counter's, or sum of a histogram's, points.
    pub sum: f64,
}

impl Collector {
    /// Listens on a free port of loopback.
    pub fn start() -> io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let received = Arc::new(Mutex::new(Vec::new()));
        let collected = received.clone();
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let received = collected.clone();
                // A client that goes away in the middle ends its own connection only.
                thread::spawn(move || serve(&stream, &received));
            }
        });
        Ok(Self { address, received })
    }

    /// The environment that makes a stage export to here.
    pub fn env(&self) -> [(&'static str, String); 2] {
        [
            ("OTEL_EXPORTER_OTLP_ENDPOINT", format!("http://{}", self.address)),
            ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json".into()),
        ]
    }

    /// All spans so far.
    pub fn spans(&self) -> Vec<Span> {
        let mut spans = Vec::new();
        for resource in self.parts("/v1/traces", "resourceSpans") {
            let service = attributes(&resource["resource"]["attributes"]).remove("service.name").unwrap_or_default();
            for span in items(&resource, &["scopeSpans", "spans"]) {
                spans.push(Span {
                    service: service.clone(),
                    name: text(&span["name"]),
                    trace: text(&span["traceId"]),
                    id: text(&span["spanId"]),
                    parent: text(&span["parentSpanId"]),
                    attributes: attributes(&span["attributes"]),
                    status: span["status"]["code"].as_u64().unwrap_or_default(),
                });
            }
        }
        spans
    }

    /// All metrics so far.
    pub fn metrics(&self) -> Vec<Metric> {
        let mut metrics = Vec::new();
        for resource in self.parts("/v1/metrics", "resourceMetrics") {
            let instance = attributes(&resource["resource"]["attributes"]).remove("service.instance.id");
            let instance = instance.unwrap_or_default();
            metrics.extend(items(&resource, &["scopeMetrics", "metrics"]).iter().map(|metric| read(&instance, metric)));
        }
        metrics
    }

    /// Everything received, as text: for tests that look for what must not be there.
    pub fn text(&self) -> String {
        self.received().iter().map(|received| format!("{}\n", received.body)).collect()
    }

    fn parts(&self, path: &str, key: &str) -> Vec<Value> {
        let received = self.received();
        let bodies = received.iter().filter(|received| received.path == path);
        bodies
            .filter_map(|received| serde_json::from_str::<Value>(&received.body).ok())
            .flat_map(|body| items(&body, &[key]))
            .collect()
    }

    fn received(&self) -> MutexGuard<'_, Vec<Received>> {
        self.received.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn read(instance: &str, metric: &Value) -> Metric {
    let points: Vec<Value> =
        ["sum", "histogram", "gauge"].iter().flat_map(|kind| items(&metric[kind], &["dataPoints"])).collect();
    let number = |value: &Value| value.as_f64().or_else(|| value.as_str()?.parse().ok());
    let value = |point: &Value| ["asInt", "asDouble", "sum"].iter().find_map(|key| number(&point[key])).unwrap_or(0.0);
    Metric {
        instance: instance.to_string(),
        name: text(&metric["name"]),
        attributes: points.iter().map(|point| attributes(&point["attributes"])).collect(),
        sum: points.iter().map(value).sum(),
    }
}

/// The objects found by following `keys` through nested arrays.
fn items(value: &Value, keys: &[&str]) -> Vec<Value> {
    keys.iter().fold(vec![value.clone()], |found, key| {
        found.iter().filter_map(|value| value[*key].as_array().cloned()).flatten().collect()
    })
}

fn attributes(list: &Value) -> BTreeMap<String, String> {
    let pairs = list.as_array().into_iter().flatten();
    pairs
        .map(|pair| {
            let value = pair["value"].as_object().and_then(|value| value.values().next()).cloned().unwrap_or_default();
            (text(&pair["key"]), text(&value))
        })
        .collect()
}

fn text(value: &Value) -> String {
    value.as_str().map_or_else(
        || {
            if value.is_null() { String::new() } else { value.to_string() }
        },
        str::to_string,
    )
}

/// Answers the requests of one connection.
fn serve(stream: &TcpStream, received: &Mutex<Vec<Received>>) -> io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut writer = stream.try_clone()?;
    loop {
        let mut request = String::new();
        if reader.read_line(&mut request)? == 0 {
            return Ok(());
        }
        let path = request.split(' ').nth(1).unwrap_or_default().to_string();
        let mut body = vec![0; content_length(&mut reader)?];
        reader.read_exact(&mut body)?;
        let body = String::from_utf8_lossy(&body).into_owned();
        received.lock().unwrap_or_else(PoisonError::into_inner).push(Received { path, body });
        writer.write_all(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}")?;
    }
}

/// Reads the headers to their end.
fn content_length(reader: &mut impl BufRead) -> io::Result<usize> {
    let mut length = 0;
    loop {
        let mut header = String::new();
        reader.read_line(&mut header)?;
        let Some((name, value)) = header.split_once(':') else {
            return Ok(length);
        };
        if name.eq_ignore_ascii_case("content-length") {
            length = value.trim().parse().map_err(io::Error::other)?;
        }
    }
}
