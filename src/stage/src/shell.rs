//! `main` of every binary: parse, start telemetry, work, tell, exit.

use std::any::Any;
use std::io::{self, IsTerminal, Write};
use std::panic::{self, AssertUnwindSafe};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::{ArgMatches, Parser};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing::Instrument;
use tracing_subscriber::Layer;
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::layer::SubscriberExt;

use crate::binary::{binary_name, version};
use crate::logging::{self, Confidence, Log, LogFormat, Verbosity};
use crate::telemetry::{self, Telemetry};
use crate::{Failure, Format, Summary, progress, signals};

/// How long the end of a stage may wait for a collector that does not answer.
const FLUSH: Duration = Duration::from_secs(3);

/// The same when a signal asks to end: schedulers kill after some seconds of patience.
const FLUSH_ON_SIGNAL: Duration = Duration::from_millis(500);

/// With this set, a binary checks its flags and their values, and ends.
pub const CHECK_FLAGS: &str = "DOPPEL_CHECK_FLAGS";

/// Runs a stage: parses flags, starts telemetry (span `doppel.<stage>` under `TRACEPARENT`), runs `work` on a tokio
/// runtime, prints the summary or the error, and maps the outcome to the exit code of the stage contract. A panic is a
/// bug: exit code 1, its location printed without its message where a private root may be open.
///
/// `check` is what `work` itself begins with: it judges the values of the flags and touches neither storage nor a
/// model. Under [`CHECK_FLAGS`] it is all that runs.
pub fn main<A, C, E, F>(
    stage: &'static str,
    check: impl FnOnce(&A) -> Result<C, E>,
    work: impl FnOnce(A) -> F,
) -> ExitCode
where
    A: Parser + 'static,
    E: Into<Failure>,
    F: Future<Output = Result<Summary, Failure>>,
{
    Shell::new(stage).run(check, work)
}

/// A binary's shell, where [`main`] does not fit.
#[derive(Clone, Copy, Debug)]
pub struct Shell {
    stage: &'static str,
    leave_signals: bool,
}

impl Shell {
    /// The shell of the stage `stage`; `doppel` is the front.
    pub fn new(stage: &'static str) -> Self {
        Self { stage, leave_signals: false }
    }

    /// Leaves SIGHUP, SIGINT and SIGTERM to the work, which has children to end.
    pub fn leave_signals(self) -> Self {
        Self { leave_signals: true, ..self }
    }

    /// Runs `check` or `work` as [`main`] does.
    pub fn run<A, C, E, F>(self, check: impl FnOnce(&A) -> Result<C, E>, work: impl FnOnce(A) -> F) -> ExitCode
    where
        A: Parser + 'static,
        E: Into<Failure>,
        F: Future<Output = Result<Summary, Failure>>,
    {
        withhold_panics(self.stage, Confidence::Private);
        match self.parse::<A>() {
            // For whoever wants to know beforehand whether the flags are right: `doppel run` asks all stages first.
            Ok((args, _)) if std::env::var_os(CHECK_FLAGS).is_some() => {
                ExitCode::from(check(&args).map_or_else(|error| tell_failure(&error.into()), |_| 0))
            }
            Ok((args, flags)) => ExitCode::from(self.conduct(flags, || work(args))),
            Err(error) => {
                // Help and version go to standard output, misuse to standard error; a closed one is no failure.
                let _ = error.print();
                ExitCode::from(error.exit_code() as u8)
            }
        }
    }

    fn parse<A: Parser>(&self) -> Result<(A, Flags), clap::Error> {
        // The name lives as long as the process.
        let name: &'static str = Box::leak(binary_name(self.stage).into_boxed_str());
        let mut command = A::command().name(name).bin_name(name).version(version());
        let mut matches = command.try_get_matches_from_mut(std::env::args_os())?;
        let flags = Flags::read(&matches);
        crate::command::record(&command, &matches);
        let args = A::from_arg_matches_mut(&mut matches).map_err(|error| error.format(&mut command))?;
        Ok((args, flags))
    }

    fn conduct<F>(self, flags: Flags, work: impl FnOnce() -> F) -> u8
    where
        F: Future<Output = Result<Summary, Failure>>,
    {
        let started = Instant::now();
        withhold_panics(self.stage, flags.confidence);
        let telemetry = match start(self.stage, &flags) {
            Ok(telemetry) => Arc::new(telemetry),
            Err(failure) => return tell_failure(&failure),
        };
        let span = telemetry::root_span(self.stage, flags.run.as_deref());
        let result = self.execute(&telemetry, &span, started, work);
        let result = result.and_then(|summary| summary.print(flags.format));
        let (outcome, code) = match &result {
            Ok(()) => ("done", 0),
            Err(failure) => (failure.kind(), failure.exit_code()),
        };
        span.in_scope(|| tell_end(self.stage, outcome, code, flags.verbosity.log_format));
        Telemetry::ended(outcome, code, started.elapsed());
        drop(span);
        if !telemetry.flush(FLUSH) {
            tracing::warn!("telemetry: the collector did not take everything within {} s", FLUSH.as_secs());
        }
        result.map_or_else(|failure| tell_failure(&failure), |()| 0)
    }

    /// Runs the work to its end on a runtime; a panic in it becomes a failure.
    fn execute<F>(
        self,
        telemetry: &Arc<Telemetry>,
        span: &tracing::Span,
        started: Instant,
        work: impl FnOnce() -> F,
    ) -> Result<Summary, Failure>
    where
        F: Future<Output = Result<Summary, Failure>>,
    {
        // Threads have as much of a stack as the first one has: queries descend into long expressions.
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().thread_stack_size(8 << 20).build();
        let runtime = runtime.map_err(|error| Failure::Transient(format!("cannot start threads: {error}")))?;
        if !self.leave_signals {
            let _guard = runtime.enter();
            let watch =
                |kind| signal(kind).map_err(|error| Failure::Transient(format!("cannot watch signals: {error}")));
            let hang_up = match signals::is_ignored(SignalKind::hangup()) {
                true => None,
                false => Some(watch(SignalKind::hangup())?),
            };
            let (interrupt, terminate) = (watch(SignalKind::interrupt())?, watch(SignalKind::terminate())?);
            runtime.spawn(end_on_signal(telemetry.clone(), started, interrupt, terminate, hang_up));
        }
        let result =
            panic::catch_unwind(AssertUnwindSafe(|| runtime.block_on(async { work().instrument(span.clone()).await })));
        // What is left are storage calls that nobody waits for.
        runtime.shutdown_background();
        result.unwrap_or_else(|payload: Box<dyn Any + Send>| {
            // PRIVACY: the payload may quote a record; the hook told what may be told.
            drop(payload);
            Err(Failure::Bug(format!("{} panicked; the place is above", binary_name(self.stage))))
        })
    }
}

/// What the shell itself wants to know of the command line, whatever else the command takes.
struct Flags {
    verbosity: Verbosity,
    format: Format,
    run: Option<String>,
    confidence: Confidence,
}

impl Flags {
    /// Reads the flags of [`crate::Common`] where the command has them, also below a subcommand.
    fn read(matches: &ArgMatches) -> Self {
        let matches = std::iter::successors(Some(matches), |matches| Some(matches.subcommand()?.1)).collect::<Vec<_>>();
        fn one<T: Clone + Send + Sync + 'static>(matches: &[&ArgMatches], id: &str) -> Option<T> {
            matches.iter().rev().find_map(|matches| matches.try_get_one::<T>(id).ok().flatten().cloned())
        }
        let known = |id: &str| matches.iter().any(|matches| matches.try_contains_id(id).is_ok());
        let private = one::<String>(&matches, "private").is_some_and(|url| !url.is_empty());
        Self {
            verbosity: Verbosity {
                verbose: one(&matches, "verbose").unwrap_or_default(),
                quiet: one(&matches, "quiet").unwrap_or_default(),
                log_format: one::<LogFormat>(&matches, "log_format").unwrap_or_default(),
            },
            format: one(&matches, "format").unwrap_or(Format::Text),
            run: one(&matches, "run"),
            // A command without such a flag may have private data by another way.
            confidence: if known("private") && !private { Confidence::Public } else { Confidence::Private },
        }
    }
}

/// Starts logs, bars and exporters.
fn start(stage: &'static str, flags: &Flags) -> Result<Telemetry, Failure> {
    let filter = logging::filter(flags.verbosity, std::env::var("RUST_LOG").ok().as_deref())?;
    let telemetry = Telemetry::start(stage);
    let ours = filter_fn(|metadata| logging::is_ours(metadata) && *metadata.level() <= tracing::Level::INFO);
    let traces = telemetry.tracer().map(|tracer| {
        // Where code stands and which thread ran it belongs to logs.
        let layer = tracing_opentelemetry::layer().with_tracer(tracer);
        layer.with_location(false).with_threads(false).with_target(false).with_filter(ours)
    });
    let log = Log::new(flags.verbosity.log_format, flags.confidence).with_filter(filter);
    let subscriber = tracing_subscriber::registry().with(traces).with(log);
    tracing::subscriber::set_global_default(subscriber).map_err(|error| Failure::Bug(error.to_string()))?;
    if io::stderr().is_terminal() && !flags.verbosity.quiet {
        progress::show();
    }
    telemetry.warn();
    Ok(telemetry)
}

/// Ends the process on SIGINT, SIGTERM or SIGHUP, at once: storage is consistent after a kill at any point, and the work
/// may be deep in a computation that awaits nothing. Copies on this machine are deleted. Exit code 128 + signal.
async fn end_on_signal(
    telemetry: Arc<Telemetry>,
    started: Instant,
    mut interrupt: Signal,
    mut terminate: Signal,
    mut hang_up: Option<Signal>,
) {
    let hung_up = async {
        match &mut hang_up {
            Some(hang_up) => drop(hang_up.recv().await),
            None => std::future::pending().await,
        }
    };
    let (name, code): (_, u8) = tokio::select! {
        _ = interrupt.recv() => ("SIGINT", 130),
        _ = terminate.recv() => ("SIGTERM", 143),
        () = hung_up => ("SIGHUP", 129),
    };
    tracing::warn!(signal = name, exit_code = code, "stopped; the same command continues");
    let last = move || {
        Telemetry::cut_off(code, started.elapsed());
        telemetry.flush(FLUSH_ON_SIGNAL);
        lake::delete_temporary_folders();
    };
    let _ = tokio::task::spawn_blocking(last).await;
    // SAFETY: `_exit` takes a number and does not return. `exit` would run destructors of libraries whose threads
    // still work.
    unsafe { libc::_exit(i32::from(code)) }
}

/// Logs how the stage ended. A collector of logs needs the level of a failure; a person reads its text below.
fn tell_end(stage: &'static str, outcome: &'static str, exit_code: u8, format: LogFormat) {
    if exit_code == 0 || format.is_text() {
        tracing::info!(stage, outcome, exit_code, "stage ended");
    } else {
        tracing::error!(stage, outcome, exit_code, "stage ended");
    }
}

fn tell_failure(failure: &Failure) -> u8 {
    logging::write_line(&format!("error: {failure}"));
    failure.exit_code()
}

/// Says where a panic happened. What it says may quote a record, so it is told only where no private root is given.
fn withhold_panics(stage: &'static str, confidence: Confidence) {
    panic::set_hook(Box::new(move |info| {
        let place = info.location().map_or_else(|| "an unknown place".to_string(), ToString::to_string);
        let message = match (confidence, info.payload_as_str()) {
            (Confidence::Public, Some(message)) => message,
            _ => "the message is withheld, since it may quote private data",
        };
        let _ = writeln!(io::stderr(), "{}: bug at {place}: {message}", binary_name(stage));
    }));
}
