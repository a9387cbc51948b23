//! What goes to standard error, and in which form.
//!
//! PRIVACY: code of ours logs by the rules of the stage contract; code of others does not know them (a Parquet reader
//! may quote a statistic, an SQL engine a literal). Where a private root is open, a message from outside our crates is
//! therefore reduced to its level and its place in the source, and told from warnings upwards only, whatever `RUST_LOG`
//! says: there is one for each commit, and who counts them counts private rows. Span fields are never printed.

use std::fmt;
use std::io::{self, IsTerminal, Write};

use clap::{Args, ValueEnum};
use serde_json::{Map, Value, json};
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Metadata, Subscriber};
use tracing_subscriber::layer::{Context, Layer};
use tracing_subscriber::{EnvFilter, registry::LookupSpan};

use crate::Failure;
use crate::progress;

/// Flags that shape what standard error tells.
#[derive(Args, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Verbosity {
    /// Tell more; repeat for debug (`-vv`) and trace (`-vvv`). `RUST_LOG` overrides.
    ///
    /// Where a private root is given, messages of third-party crates are reduced to their place in the source, however
    /// verbose: they may quote data.
    #[arg(short, long, action = clap::ArgAction::Count, help_heading = "Output")]
    pub verbose: u8,
    /// Tell errors only, without progress.
    #[arg(short, long, conflicts_with = "verbose", help_heading = "Output")]
    pub quiet: bool,
    /// Form of the log on standard error; `auto`: text on a terminal, one JSON object per line elsewhere.
    #[arg(long, value_enum, env = "DOPPEL_LOG_FORMAT", default_value_t = LogFormat::Auto, help_heading = "Output")]
    pub log_format: LogFormat,
}

impl Verbosity {
    /// The flags that mean this, for a process that this one starts.
    pub fn flags(&self) -> Vec<String> {
        let told = std::iter::repeat_n("--verbose".to_owned(), self.verbose.into());
        let quiet = self.quiet.then(|| "--quiet".to_owned());
        let format = self.log_format.to_possible_value().map(|value| format!("--log-format={}", value.get_name()));
        told.chain(quiet).chain(format).collect()
    }
}

/// Form of the log.
#[derive(ValueEnum, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// Text on a terminal, JSON elsewhere.
    #[default]
    Auto,
    /// Lines for people.
    Text,
    /// One JSON object per line.
    Json,
}

impl LogFormat {
    /// Whether lines are for people.
    pub(crate) fn is_text(self) -> bool {
        match self {
            LogFormat::Auto => io::stderr().is_terminal(),
            LogFormat::Text => true,
            LogFormat::Json => false,
        }
    }
}

/// Whether the command may hold private records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Confidence {
    /// A private root is given.
    Private,
    /// Release zone only.
    Public,
}

/// The crates whose messages keep the rules.
const OURS: [&str; 7] = ["doppel", "stage", "lake", "ledger", "privacy", "lm", "workflow"];

/// Whether a span or event comes from our own code.
pub(crate) fn is_ours(metadata: &Metadata<'_>) -> bool {
    let target = metadata.target();
    let crate_name = target.split("::").next().unwrap_or(target);
    OURS.contains(&crate_name) || crate_name.starts_with("doppel_")
}

/// The filter of the log: `RUST_LOG` where set, else by `-v` and `-q`.
///
/// On a terminal the bars tell how far the work is, so that lines are for warnings; elsewhere lines are all there is,
/// for people too: `doppel run` shows the last one of each task.
pub(crate) fn filter(verbosity: Verbosity, rust_log: Option<&str>) -> Result<EnvFilter, Failure> {
    if let Some(directives) = rust_log.filter(|directives| !directives.is_empty()) {
        return EnvFilter::try_new(directives)
            .map_err(|error| Failure::Usage(format!("RUST_LOG: {error}\nhelp: for example RUST_LOG=info,lake=debug")));
    }
    let beside_bars = verbosity.log_format.is_text() && io::stderr().is_terminal();
    let usual = if beside_bars { Level::WARN } else { Level::INFO };
    let level = match (verbosity.quiet, verbosity.verbose) {
        (true, _) => Level::ERROR,
        (_, 0) => usual,
        (_, 1) => Level::INFO.max(usual),
        (_, 2) => Level::DEBUG,
        _ => Level::TRACE,
    };
    let others = Level::WARN.min(level);
    let ours = OURS.iter().map(|name| format!("{name}={level}"));
    // The Delta kernel reports an absent table as an error; to a stage it is how every first run begins.
    let absent_tables = (level < Level::DEBUG).then(|| "buoyant_kernel::snapshot=off".to_string());
    let directives = std::iter::once(others.to_string()).chain(absent_tables).chain(ours).collect::<Vec<_>>().join(",");
    EnvFilter::try_new(directives).map_err(|error| Failure::Bug(format!("log filter: {error}")))
}

/// Writes events to standard error.
pub(crate) struct Log {
    text: bool,
    confidence: Confidence,
}

impl Log {
    pub(crate) fn new(format: LogFormat, confidence: Confidence) -> Self {
        Self { text: format.is_text(), confidence }
    }

    /// The line of an event, if it may be told.
    fn line(&self, event: &Event<'_>) -> Option<String> {
        let metadata = event.metadata();
        let mut fields = Fields::default();
        if self.confidence == Confidence::Public || is_ours(metadata) {
            event.record(&mut fields);
        } else if *metadata.level() > Level::WARN {
            return None;
        } else {
            let place = format!("{}:{}", metadata.file().unwrap_or("?"), metadata.line().unwrap_or(0));
            fields.message = format!("message withheld at {place}");
        }
        Some(if self.text { text_line(metadata, fields) } else { json_line(metadata, fields) })
    }
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Log {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        if let Some(line) = self.line(event) {
            write_line(&line);
        }
    }
}

/// Writes a line to standard error, above the bars; a closed standard error is no reason to fail.
pub(crate) fn write_line(line: &str) {
    progress::suspend(|| {
        let _ = writeln!(io::stderr().lock(), "{line}");
    });
}

fn text_line(metadata: &Metadata<'_>, fields: Fields) -> String {
    let mut line = format!("{} {:5} {}", chrono::Local::now().format("%H:%M:%S"), metadata.level(), fields.message);
    for (name, value) in fields.rest {
        line.push_str(&format!(" {name}={value}"));
    }
    line
}

fn json_line(metadata: &Metadata<'_>, fields: Fields) -> String {
    let mut object = Map::new();
    object.insert("timestamp".into(), json!(chrono::Utc::now().to_rfc3339_opts(chrono::SecondsFormat::Millis, true)));
    object.insert("level".into(), json!(metadata.level().as_str()));
    object.insert("target".into(), json!(metadata.target()));
    object.insert("message".into(), json!(fields.message));
    object.extend(fields.rest);
    Value::Object(object).to_string()
}

/// The message and the other fields of an event.
#[derive(Default)]
struct Fields {
    message: String,
    rest: Map<String, Value>,
}

impl Fields {
    fn put(&mut self, field: &Field, value: Value) {
        self.rest.insert(field.name().to_string(), value);
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        match field.name() {
            "message" => self.message = format!("{value:?}"),
            _ => self.put(field, json!(format!("{value:?}"))),
        }
    }
    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            "message" => self.message = value.to_string(),
            _ => self.put(field, json!(value)),
        }
    }
    fn record_u64(&mut self, field: &Field, value: u64) {
        self.put(field, json!(value));
    }
    fn record_i64(&mut self, field: &Field, value: i64) {
        self.put(field, json!(value));
    }
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.put(field, json!(value));
    }
    fn record_bool(&mut self, field: &Field, value: bool) {
        self.put(field, json!(value));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use tracing_subscriber::layer::SubscriberExt;

    use super::*;

    /// Collects what [`Log`] would write.
    struct Collect(Log, Arc<Mutex<Vec<String>>>);

    impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Collect {
        fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
            if let (Ok(mut lines), Some(line)) = (self.1.lock(), self.0.line(event)) {
                lines.push(line);
            }
        }
    }

    /// The lines of `work` under `RUST_LOG=trace`.
    fn lines(confidence: Confidence, format: LogFormat, work: impl FnOnce()) -> String {
        let collected = Arc::new(Mutex::new(Vec::new()));
        let filter = filter(Verbosity::default(), Some("trace")).unwrap();
        let layer = Collect(Log::new(format, confidence), collected.clone()).with_filter(filter);
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), work);
        collected.lock().unwrap().join("\n")
    }

    fn a_reader_quotes_a_record() {
        let span = tracing::info_span!(target: "parquet::file", "read", record = "PLANTED-SPAN");
        let _entered = span.enter();
        tracing::trace!(target: "parquet::file", smallest = "PLANTED-FIELD", "row says PLANTED-MESSAGE");
        tracing::error!(target: "log", "PLANTED-BRIDGED");
        tracing::info!(target: "doppel_train::run", steps = 3, "our own");
    }

    #[test]
    fn with_a_private_root_other_crates_tell_their_place_only() {
        for format in [LogFormat::Text, LogFormat::Json] {
            let told = lines(Confidence::Private, format, a_reader_quotes_a_record);
            assert!(!told.contains("PLANTED"), "{told}");
            assert!(told.contains("message withheld at ") && told.contains("our own"), "{told}");
            // Of two foreign messages, the error alone: a trace for each row would count rows.
            assert_eq!(told.lines().count(), 2, "{told}");
        }
    }

    #[test]
    fn without_a_private_root_they_may_speak_but_span_fields_are_not_printed() {
        let told = lines(Confidence::Public, LogFormat::Text, a_reader_quotes_a_record);
        assert!(told.contains("PLANTED-FIELD") && told.contains("PLANTED-MESSAGE"), "{told}");
        assert!(!told.contains("PLANTED-SPAN"), "{told}");
    }

    #[test]
    fn json_lines_are_objects_with_typed_fields() {
        let told = lines(Confidence::Private, LogFormat::Json, || {
            tracing::info!(target: "lake::store", bytes = 7u64, name = "a\"b", "two\nlines");
        });
        let line: Value = serde_json::from_str(&told).unwrap();
        assert_eq!(line["message"], "two\nlines");
        assert_eq!((&line["bytes"], &line["name"], &line["level"]), (&json!(7), &json!("a\"b"), &json!("INFO")));
    }

    #[test]
    fn a_wrong_rust_log_is_wrong_usage() {
        let refused = filter(Verbosity::default(), Some("lake=loud")).map(|_| ()).unwrap_err();
        assert_eq!(refused.exit_code(), 2);
        assert!(refused.to_string().starts_with("RUST_LOG: "), "{refused}");
    }
}
