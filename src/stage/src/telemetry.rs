//! Traces and metrics over OTLP/HTTP, by the standard `OTEL_*` variables; off when no endpoint is set.
//!
//! One trace covers a run: whoever starts a stage hands it [`child_env`], and the stage's span becomes a child of the
//! span named there (`TRACEPARENT`, W3C Trace Context). Trouble with the collector is a warning, never a failure, and
//! costs a few seconds at most, at the end.
//!
//! Every process is an instance of its own (`service.instance.id`): a backend keeps the counters of shards that run
//! side by side apart, instead of taking each for a newer value of the other.
//!
//! PRIVACY: only spans and events of our own crates are exported. A stage opens a span by a fixed label ([`phase`]) and
//! gives it numbers as [`Fact`]s, which are public by what they are; there is no way to attach free text to one.
//!
//! | metric | kind | unit |
//! |---|---|---|
//! | `doppel.stage.duration` | histogram | seconds, with `stage` and `outcome` |
//! | `doppel.rows`, `doppel.tokens`, `doppel.steps`, … | counter | items, with `stage` |
//! | `doppel.bytes` | counter | bytes, with `stage` |
//! | `doppel.rows.rate`, `doppel.tokens.rate`, … | histogram | items per second of one piece of work |

use std::collections::HashMap;
use std::env;
use std::sync::{OnceLock, mpsc};
use std::time::Duration;

use opentelemetry::metrics::{Counter, Meter};
use opentelemetry::propagation::TextMapPropagator;
use opentelemetry::trace::{Status, TraceContextExt, TracerProvider};
use opentelemetry::{Context, KeyValue, global};
use opentelemetry_otlp::{ExporterBuildError, MetricExporter, Protocol, SpanExporter, WithExportConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::metrics::SdkMeterProvider;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{SdkTracer, SdkTracerProvider};
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt;

/// A number that a stage may tell. Each is public by what it counts: nothing here follows from private records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fact {
    /// Rows written to, or read from, the release zone.
    Rows(u64),
    /// Tokens of synthetic text.
    Tokens(u64),
    /// Bytes of public objects: models, adapters, synthetic tables.
    Bytes(u64),
    /// Steps of a mechanism, as planned before it read anything.
    Steps(u64),
    /// Shard of a sharded stage.
    Shard(u32),
    /// Version of a table of the release zone.
    ReleaseVersion(i64),
}

/// Tells `fact`: on the current span, and where it is an amount, as a metric.
pub fn tell(fact: Fact) {
    let (name, value, amount) = match fact {
        Fact::Rows(value) => ("rows", value as i64, true),
        Fact::Tokens(value) => ("tokens", value as i64, true),
        Fact::Bytes(value) => ("bytes", value as i64, true),
        Fact::Steps(value) => ("steps", value as i64, false),
        Fact::Shard(value) => ("shard", i64::from(value), false),
        Fact::ReleaseVersion(value) => ("release_version", value, false),
    };
    Span::current().set_attribute(format!("doppel.{name}"), value);
    if amount {
        counter(name).add(value as u64, &attributes());
    }
}

/// A span for one part of a stage, such as `load model`; enter it, or instrument a future with it.
pub fn phase(label: &'static str) -> Span {
    tracing::info_span!("phase", otel.name = label)
}

/// `TRACEPARENT` (and `TRACESTATE`) for a child process, so that its span lies under the current one; empty when
/// there is no trace.
pub fn child_env() -> Vec<(String, String)> {
    let mut carrier = HashMap::new();
    let propagator = TraceContextPropagator::new();
    propagator.inject_context(&Span::current().context(), &mut carrier);
    if let (true, Some(root)) = (carrier.is_empty(), ROOT.get()) {
        // A thread without a span of its own still belongs to the run.
        propagator.inject_context(root, &mut carrier);
    }
    let environment = carrier.into_iter().filter(|(_, value)| !value.is_empty());
    environment.map(|(name, value)| (name.to_uppercase(), value)).collect()
}

/// The stage this process runs, for the attributes of metrics.
static STAGE: OnceLock<&'static str> = OnceLock::new();
/// The context of the stage's own span.
static ROOT: OnceLock<Context> = OnceLock::new();

pub(crate) fn counter(unit: &str) -> Counter<u64> {
    meter().u64_counter(format!("doppel.{unit}")).build()
}

pub(crate) fn record_rate(unit: &str, per_second: f64) {
    meter().f64_histogram(format!("doppel.{unit}.rate")).with_unit("1/s").build().record(per_second, &attributes());
}

pub(crate) fn attributes() -> [KeyValue; 1] {
    [KeyValue::new("stage", STAGE.get().copied().unwrap_or_default())]
}

fn meter() -> Meter {
    global::meter("doppel")
}

/// The exporters of this process.
#[derive(Default)]
pub(crate) struct Telemetry {
    tracer: Option<SdkTracerProvider>,
    meter: Option<SdkMeterProvider>,
    /// Why an exporter that was asked for is off.
    problems: Vec<String>,
}

impl Telemetry {
    /// Starts the exporters that the environment asks for.
    pub(crate) fn start(stage: &'static str) -> Self {
        let _ = STAGE.set(stage);
        let mut telemetry = Telemetry::default();
        if set("OTEL_SDK_DISABLED").is_some_and(|value| value.eq_ignore_ascii_case("true")) {
            return telemetry;
        }
        let resource = resource(stage);
        if let Some(exporter) =
            telemetry.asked("TRACES", |protocol| SpanExporter::builder().with_http().with_protocol(protocol).build())
        {
            let provider = SdkTracerProvider::builder().with_resource(resource.clone()).with_batch_exporter(exporter);
            telemetry.tracer = Some(provider.build());
        }
        if let Some(exporter) =
            telemetry.asked("METRICS", |protocol| MetricExporter::builder().with_http().with_protocol(protocol).build())
        {
            let provider = SdkMeterProvider::builder().with_resource(resource).with_periodic_exporter(exporter);
            let provider = provider.build();
            global::set_meter_provider(provider.clone());
            telemetry.meter = Some(provider);
        }
        telemetry
    }

    /// Builds the exporter of `signal` if an endpoint is set for it.
    fn asked<E>(&mut self, signal: &str, build: impl FnOnce(Protocol) -> Result<E, ExporterBuildError>) -> Option<E> {
        let off = set(&format!("OTEL_{signal}_EXPORTER")).is_some_and(|exporter| exporter == "none");
        if off || either(signal, "ENDPOINT").is_none() {
            return None;
        }
        let protocol = match either(signal, "PROTOCOL").as_deref() {
            None | Some("http/protobuf") => Protocol::HttpBinary,
            Some("http/json") => Protocol::HttpJson,
            Some(other) => {
                self.problems.push(format!("OTLP protocol `{other}` is not supported; set http/protobuf or http/json"));
                return None;
            }
        };
        build(protocol).map_err(|error| self.problems.push(format!("OTLP exporter: {error}"))).ok()
    }

    pub(crate) fn tracer(&self) -> Option<SdkTracer> {
        self.tracer.as_ref().map(|provider| provider.tracer("doppel"))
    }

    /// Warns of exporters that are off; apart from [`Telemetry::start`], since the log begins after it.
    pub(crate) fn warn(&self) {
        for problem in &self.problems {
            tracing::warn!("telemetry is off: {problem}");
        }
    }

    /// Records how the stage ended.
    pub(crate) fn ended(outcome: &'static str, exit_code: u8, duration: Duration) {
        if let Some(context) = ROOT.get() {
            let span = context.span();
            span.set_attribute(KeyValue::new("outcome", outcome));
            span.set_attribute(KeyValue::new("exit_code", i64::from(exit_code)));
            // The message stays on standard error; the kind is enough to find it.
            span.set_status(if exit_code == 0 { Status::Ok } else { Status::error(outcome) });
        }
        let [stage] = attributes();
        let histogram = meter().f64_histogram("doppel.stage.duration").with_unit("s").build();
        histogram.record(duration.as_secs_f64(), &[stage, KeyValue::new("outcome", outcome)]);
    }

    /// Records that a signal ended the stage, and ends its span, which the work that it cuts off still holds.
    pub(crate) fn cut_off(exit_code: u8, duration: Duration) {
        Self::ended("stopped", exit_code, duration);
        if let Some(context) = ROOT.get() {
            context.span().end();
        }
    }

    /// Sends what is left, for at most `limit`; `false` when the collector did not take it in time.
    pub(crate) fn flush(&self, limit: Duration) -> bool {
        let (sender, receiver) = mpsc::channel();
        let mut waiting = 0;
        let mut run = |work: Box<dyn FnOnce() -> bool + Send>| {
            let sender = sender.clone();
            waiting += 1;
            std::thread::spawn(move || {
                let _ = sender.send(work());
            });
        };
        if let Some(tracer) = self.tracer.clone() {
            run(Box::new(move || tracer.shutdown_with_timeout(limit).is_ok()));
        }
        if let Some(meter) = self.meter.clone() {
            run(Box::new(move || meter.shutdown_with_timeout(limit).is_ok()));
        }
        // A thread that hangs on a dead collector ends with the process.
        let deadline = std::time::Instant::now() + limit;
        (0..waiting)
            .all(|_| receiver.recv_timeout(deadline.saturating_duration_since(std::time::Instant::now())) == Ok(true))
    }
}

/// The stage's span, under the span that `TRACEPARENT` names.
pub(crate) fn root_span(stage: &'static str, run: Option<&str>) -> Span {
    let span = tracing::info_span!("stage", otel.name = format!("doppel.{stage}"), stage, run);
    let carrier = ["TRACEPARENT", "TRACESTATE"].into_iter().filter_map(|name| Some((name.to_lowercase(), set(name)?)));
    let parent = TraceContextPropagator::new().extract(&carrier.collect::<HashMap<_, _>>());
    // Without exporters there is no context to set.
    let _ = span.set_parent(parent);
    let _ = ROOT.set(span.context());
    span
}

fn resource(stage: &str) -> Resource {
    let declared = set("OTEL_RESOURCE_ATTRIBUTES").unwrap_or_default();
    let declares = |name: &str| {
        declared.split(',').filter_map(|pair| pair.split_once('=')).any(|(declared, _)| declared.trim() == name)
    };
    let mut builder = Resource::builder().with_attribute(KeyValue::new("service.version", crate::binary::version()));
    if !declares("service.instance.id") {
        builder = builder.with_attribute(KeyValue::new("service.instance.id", uuid::Uuid::new_v4().to_string()));
    }
    if set("OTEL_SERVICE_NAME").is_none() && !declares("service.name") {
        builder = builder.with_service_name(crate::binary::binary_name(stage));
    }
    builder.build()
}

/// The variable of one signal, or else of all.
fn either(signal: &str, name: &str) -> Option<String> {
    set(&format!("OTEL_EXPORTER_OTLP_{signal}_{name}")).or_else(|| set(&format!("OTEL_EXPORTER_OTLP_{name}")))
}

/// A variable that is there and not empty, which by the specification means the same as absent.
fn set(name: &str) -> Option<String> {
    env::var(name).ok().filter(|value| !value.is_empty())
}
