//! Progress: a bar on a terminal, structured lines elsewhere.
//!
//! PRIVACY: work over public things shows counts; work over private records shows only its label and elapsed time,
//! since counts and rates would tell how many records there are. The two are different types, so that a private count
//! has nowhere to go.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};
use opentelemetry::metrics::Counter;

use crate::telemetry;

/// How often a line tells how far the work is, where there is no bar.
const INTERVAL: Duration = Duration::from_secs(10);

/// Progress over public items (steps, shards, synthetic rows).
#[derive(Debug)]
pub struct Progress {
    label: &'static str,
    unit: &'static str,
    total: u64,
    position: AtomicU64,
    advanced: AtomicU64,
    clock: Clock,
    bar: ProgressBar,
    counter: Counter<u64>,
}

impl Progress {
    /// Starts a bar of `total` items named `unit`, such as `tokens`; a total of 0 means that it is not known.
    pub fn public(label: &'static str, unit: &'static str, total: u64) -> Self {
        let bar = match total {
            0 => bar(ProgressBar::new_spinner(), &format!("{{spinner}} {label}: {{human_pos}} {unit} ({{rate}})")),
            _ => bar(
                ProgressBar::new(total),
                &format!("{label} {{wide_bar}} {{human_pos}}/{{human_len}} {unit} ({{rate}}, {{eta}})"),
            ),
        };
        tracing::info!(label, unit, total, "progress begins");
        Self {
            label,
            unit,
            total,
            position: AtomicU64::new(0),
            advanced: AtomicU64::new(0),
            clock: Clock::start(),
            bar,
            counter: telemetry::counter(unit),
        }
    }

    /// Starts at `items`, which an earlier attempt did: they count for the bar, but for no rate and no metric.
    pub fn resume(&self, items: u64) {
        self.position.fetch_add(items, Ordering::Relaxed);
        self.bar.inc(items);
        self.bar.reset_eta();
    }

    /// Counts `items` more; also feeds the metric `doppel.<unit>`.
    pub fn advance(&self, items: u64) {
        let position = self.position.fetch_add(items, Ordering::Relaxed) + items;
        self.advanced.fetch_add(items, Ordering::Relaxed);
        self.bar.inc(items);
        self.counter.add(items, &telemetry::attributes());
        if self.clock.due() && self.bar.is_hidden() {
            let (label, unit, total) = (self.label, self.unit, self.total);
            tracing::info!(label, unit, done = position, total, per_second = self.rate(), "progress");
        }
    }

    fn rate(&self) -> f64 {
        let rate = self.advanced.load(Ordering::Relaxed) as f64 / self.clock.elapsed().as_secs_f64().max(1e-9);
        (rate * 1000.0).round() / 1000.0
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
        let (label, unit, done) = (self.label, self.unit, self.position.load(Ordering::Relaxed));
        let seconds = self.clock.seconds();
        tracing::info!(label, unit, done, seconds, per_second = self.rate(), "progress ended");
        if self.advanced.load(Ordering::Relaxed) > 0 {
            telemetry::record_rate(unit, self.rate());
        }
    }
}

/// Progress over private records: a label and a clock, nothing else.
#[derive(Debug)]
pub struct PrivateProgress {
    label: &'static str,
    clock: Clock,
    bar: ProgressBar,
}

impl PrivateProgress {
    /// Starts the clock.
    pub fn new(label: &'static str) -> Self {
        let bar = bar(ProgressBar::new_spinner(), &format!("{{spinner}} {label} ({{elapsed}})"));
        tracing::info!(label, "work begins");
        Self { label, clock: Clock::start(), bar }
    }

    /// Says that work goes on. How often it is called does not show: lines and frames follow the clock.
    pub fn tick(&self) {
        self.bar.tick();
        if self.clock.due() && self.bar.is_hidden() {
            tracing::info!(label = self.label, seconds = self.clock.seconds(), "working");
        }
    }
}

impl Drop for PrivateProgress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
        tracing::info!(label = self.label, seconds = self.clock.seconds(), "work ended");
    }
}

/// The bars of this process. Hidden unless the shell found a terminal and a person who wants to see them.
static BARS: OnceLock<MultiProgress> = OnceLock::new();

/// Shows bars on standard error from now on.
pub(crate) fn show() {
    let _ = BARS.set(MultiProgress::new());
}

/// The bars that [`show`] began, for a front that draws rows of its own; `None` where nobody looks on. Whoever draws on
/// another set of bars would write into these, and the log into both.
pub fn bars() -> Option<&'static MultiProgress> {
    BARS.get()
}

/// Runs `write` while the bars stand aside, so that a line does not end up inside one.
pub(crate) fn suspend<T>(write: impl FnOnce() -> T) -> T {
    match BARS.get() {
        Some(bars) => bars.suspend(write),
        None => write(),
    }
}

fn bar(bar: ProgressBar, template: &str) -> ProgressBar {
    let Some(bars) = BARS.get() else {
        bar.set_draw_target(ProgressDrawTarget::hidden());
        return bar;
    };
    let bar = bars.add(bar);
    // A template is ours and fixed; the default style does where one is wrong.
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style.with_key("rate", rate).progress_chars("━╸ "));
    }
    bar
}

/// Items per second without the digits that nobody can read.
fn rate(state: &ProgressState, out: &mut dyn std::fmt::Write) {
    let _ = write!(out, "{:.1}/s", state.per_sec());
}

/// When the work began, and when it last told so.
#[derive(Debug)]
struct Clock {
    started: Instant,
    /// Milliseconds after `started`.
    told: AtomicU64,
}

impl Clock {
    fn start() -> Self {
        Self { started: Instant::now(), told: AtomicU64::new(0) }
    }

    fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    fn seconds(&self) -> f64 {
        (self.elapsed().as_secs_f64() * 10.0).round() / 10.0
    }

    /// Whether [`INTERVAL`] has passed since it last said so; of several threads one is told.
    fn due(&self) -> bool {
        let now = self.elapsed().as_millis() as u64;
        let told = self.told.load(Ordering::Relaxed);
        now.saturating_sub(told) >= INTERVAL.as_millis() as u64
            && self.told.compare_exchange(told, now, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }
}
