//! One trace and the metrics of a whole run, as an OpenTelemetry collector receives them.

use std::collections::{BTreeMap, BTreeSet};

use scenarios::otlp::{Collector, Metric, Span};
use scenarios::tiny::{CONVERSATIONS, SAMPLES, Task, Workplace};
use scenarios::{binaries, conversations};
use serde_json::Value;

/// Two stages on private records, two on public ones.
fn run(place: &Workplace) -> Collector {
    let collector = Collector::start().expect("a collector on loopback");
    let tasks = [
        Task::new("partition", &[], &place.partition("lake")),
        Task::new("embed-corpus", &["partition"], &place.embed_corpus("lake")),
        Task::new("synthesize", &[], &place.synthesize("lake", "--no-adapter")),
        Task::new("embed", &["synthesize"], &place.embed("lake", "--of=synthetic")),
    ];
    binaries::run(place.run(&tasks).envs(collector.env()), 0);
    collector
}

/// Ids of the spans around `span`, the nearest first.
fn ancestors<'a>(spans: &'a BTreeMap<&str, &'a Span>, span: &'a Span) -> Vec<&'a str> {
    let parent = |id: &&'a str| spans.get(id).map(|span| span.parent.as_str());
    std::iter::successors(Some(span.parent.as_str()), parent).collect()
}

/// Sum of a metric over the processes whose points name `stage`.
fn sum(metrics: &[Metric], name: &str, stage: &str) -> f64 {
    let of_stage = |metric: &&Metric| metric.attributes.iter().any(|point| point["stage"] == stage);
    metrics.iter().filter(|metric| metric.name == name).filter(of_stage).map(|metric| metric.sum).sum()
}

/// Every string and number in a JSON value, as text.
fn scalars(value: &Value, found: &mut BTreeSet<String>) {
    match value {
        Value::Array(items) => items.iter().for_each(|item| scalars(item, found)),
        Value::Object(fields) => fields.values().for_each(|field| scalars(field, found)),
        Value::String(text) => drop(found.insert(text.clone())),
        other => drop(found.insert(other.to_string())),
    }
}

#[test]
fn a_run_is_one_trace_with_durations_and_rows_and_nothing_private() {
    let place = Workplace::new();
    let collector = run(&place);

    let spans = collector.spans();
    let by_id: BTreeMap<&str, &Span> = spans.iter().map(|span| (span.id.as_str(), span)).collect();
    let named = |name: &str| spans.iter().filter(|span| span.name == name).collect::<Vec<_>>();
    let [front] = named("doppel.doppel")[..] else {
        panic!("one span of the front: {spans:?}");
    };
    assert_eq!((front.parent.as_str(), front.service.as_str()), ("", "doppel"));
    for (name, times) in [("doppel.partition", 1), ("doppel.synthesize", 1), ("doppel.embed", 2)] {
        assert_eq!(named(name).len(), times, "{name} in {spans:?}");
    }
    for span in &spans {
        assert_eq!(span.trace, front.trace, "{} is in another trace", span.name);
        assert!(span.status == 1 || !span.name.starts_with("doppel."), "{} has not ended well", span.name);
        let is_below = span.id == front.id || ancestors(&by_id, span).contains(&front.id.as_str());
        assert!(is_below, "{} is not below the front's span", span.name);
    }

    let metrics = collector.metrics();
    for stage in ["doppel", "partition", "synthesize", "embed"] {
        let seconds = sum(&metrics, "doppel.stage.duration", stage);
        assert!(seconds > 0.0 && seconds < 600.0, "{stage} took {seconds} s");
    }
    assert_eq!(sum(&metrics, "doppel.rows", "embed"), SAMPLES as f64, "the public rows, and no row of the corpus");
    assert!(sum(&metrics, "doppel.tokens", "synthesize") > 0.0);
    assert_eq!(sum(&metrics, "doppel.rows", "partition"), 0.0, "the number of records is private");

    nothing_private(&collector);
}

fn nothing_private(collector: &Collector) {
    let text = collector.text();
    for index in 0..CONVERSATIONS {
        assert!(!text.contains(&conversations::instruction(index)), "an instruction was exported");
        assert!(!text.contains(&format!("u{index:05}")), "the id of a unit was exported");
    }
    let mut told = BTreeSet::new();
    for body in serde_json::Deserializer::from_str(&text).into_iter::<Value>() {
        scalars(&body.expect("an exported body is JSON"), &mut told);
    }
    let second_parts = (0..CONVERSATIONS).filter(|index| index % 10 == 9).count();
    for count in [CONVERSATIONS, CONVERSATIONS - second_parts] {
        assert!(!told.contains(&count.to_string()), "a number of records was exported: {count}");
    }
}
