//! Shows a run while it goes on: a line per running task on a terminal, structured log lines elsewhere.

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use workflow::{Event, JobReport, Observer, Plan, State};

use crate::table::duration;

/// The view that suits standard error: bars where the shell shows some.
pub fn suitable(plan: &Plan) -> Box<dyn Observer> {
    match stage::progress::bars() {
        Some(bars) => Box::new(Live::new(bars, plan.jobs.len() as u64)),
        None => Box::new(Lines),
    }
}

/// One log line per event.
struct Lines;

impl Observer for Lines {
    fn event(&self, plan: &Plan, event: Event<'_>) {
        let name = |job: usize| plan.jobs[job].name.as_str();
        match event {
            Event::Started { job, attempt } => {
                tracing::info!(task = name(job), attempt, "task started")
            }
            Event::Line { job, line } => tracing::debug!(task = name(job), line, "task says"),
            Event::Retrying { job, outcome, pause } => {
                let pause = pause.as_secs_f64();
                tracing::warn!(task = name(job), %outcome, pause, "task failed; it will be tried again");
            }
            Event::Finished { job, report } => {
                let seconds = report.elapsed.as_secs_f64();
                let (state, attempts) = (report.state.word(), report.attempts);
                match (&report.state, &report.outcome) {
                    (State::Failed, Some(outcome)) => {
                        tracing::error!(task = name(job), state, attempts, seconds, %outcome, "task ended");
                    }
                    _ => tracing::info!(task = name(job), state, attempts, seconds, "task ended"),
                }
            }
        }
    }
}

/// Bars: one for the whole, one per running task with its last line.
struct Live {
    bars: &'static MultiProgress,
    whole: ProgressBar,
    running: Mutex<HashMap<usize, ProgressBar>>,
}

impl Live {
    fn new(bars: &'static MultiProgress, jobs: u64) -> Self {
        let whole = bars.add(ProgressBar::new(jobs));
        whole.set_style(style("{bar:30} {pos}/{len} tasks · {elapsed}"));
        whole.enable_steady_tick(Duration::from_millis(500));
        Self { bars, whole, running: Mutex::default() }
    }

    fn running(&self) -> std::sync::MutexGuard<'_, HashMap<usize, ProgressBar>> {
        self.running.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn start(&self, plan: &Plan, job: usize, attempt: u32) {
        let bar = self.bars.insert_before(&self.whole, ProgressBar::new_spinner());
        bar.set_style(style("{spinner} {prefix} {elapsed:>4} {wide_msg}"));
        let again = if attempt > 1 { format!(" (attempt {attempt})") } else { String::new() };
        bar.set_prefix(format!("{}{again}", plan.jobs[job].name));
        bar.enable_steady_tick(Duration::from_millis(250));
        self.running().insert(job, bar);
    }

    fn end(&self, job: usize) {
        if let Some(bar) = self.running().remove(&job) {
            bar.finish_and_clear();
        }
    }

    /// A line above the bars. Where the terminal is gone, nobody misses it.
    fn say(&self, line: &str) {
        let _ = self.bars.println(line);
    }
}

impl Observer for Live {
    fn event(&self, plan: &Plan, event: Event<'_>) {
        match event {
            Event::Started { job, attempt } => self.start(plan, job, attempt),
            Event::Line { job, line } => {
                if let Some(bar) = self.running().get(&job) {
                    bar.set_message(printable(said(line)));
                }
            }
            Event::Retrying { job, outcome, pause } => {
                self.end(job);
                let name = &plan.jobs[job].name;
                self.say(&format!("↻ {name}: {outcome}; again in {}", duration(pause)));
            }
            Event::Finished { job, report } => {
                self.end(job);
                self.whole.inc(1);
                if let Some(line) = ended(&plan.jobs[job].name, report) {
                    self.say(&line);
                }
                if self.whole.position() == plan.jobs.len() as u64 {
                    self.whole.finish_and_clear();
                }
            }
        }
    }
}

fn style(template: &str) -> ProgressStyle {
    // A template that does not parse would be a bug of ours; a plain bar is no reason to stop a run.
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

fn ended(name: &str, report: &JobReport) -> Option<String> {
    let time = duration(report.elapsed);
    match (report.state, &report.outcome) {
        (State::Succeeded, _) => Some(format!("✓ {name} ({time})")),
        (State::Failed, Some(outcome)) => Some(format!("✗ {name}: {outcome} ({time})")),
        (State::Failed, None) => Some(format!("✗ {name} ({time})")),
        (State::Stopped, _) => Some(format!("■ {name}: stopped ({time})")),
        (State::NotRun, _) => None,
    }
}

/// A line of a stage's log without the time and the level, which its row has no room for.
fn said(line: &str) -> &str {
    line.split_once(" INFO  ").map_or(line, |(_, said)| said)
}

/// A line without what would move the cursor.
fn printable(line: &str) -> String {
    line.chars().filter(|c| !c.is_control()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_shows_what_the_stage_said() {
        let line = "12:30:01 INFO  progress label=sample unit=tokens done=64 total=96\u{7}";
        assert_eq!(printable(said(line)), "progress label=sample unit=tokens done=64 total=96");
        assert_eq!(said("whatever another program says"), "whatever another program says");
    }
}
