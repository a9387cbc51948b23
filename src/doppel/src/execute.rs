//! `doppel run`: load, check, run, tell.

use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use clap::builder::TypedValueParser;
use serde_json::json;
use stage::{Failure, Format, Summary, Verbosity};
use tokio::sync::watch;
use workflow::retry::Outcome;
use workflow::{Job, JobReport, Machine, Observer, Options, Plan, Report, State, Stop};

use crate::exit::Signals;
use crate::finding::verdict;
use crate::invocation::Invocation;
use crate::table::{duration, table};
use crate::values::name_value;
use crate::{preflight, stages, view};

/// Run a workflow file on this machine.
///
/// The file is an Argo Workflow (argoproj.io/v1alpha1), which Kubernetes runs as it is. Here its containers' commands
/// run as processes: as many at a time as the dependencies and the declared CPUs, GPUs and memory allow, with retries
/// as declared. Exit codes 2, 3 and 4 are final unless a retry expression says otherwise. Before the first task starts,
/// a preflight checks what can be checked and reports all findings at once.
///
/// Ctrl-C ends all tasks in order (a second one at once). Running again continues: stages that are done do nothing.
#[derive(Args, Clone, Debug)]
pub struct RunArgs {
    /// Workflow file.
    pub file: PathBuf,
    /// A parameter of the workflow; repeatable.
    #[arg(short, long = "parameter", value_name = "NAME=VALUE", value_parser = name_value)]
    pub parameters: Vec<(String, String)>,
    /// Check the file and the parameters and print the tasks, without running anything.
    #[arg(long)]
    pub dry_run: bool,
    /// Skip the preflight, file and parameters excepted.
    #[arg(long)]
    pub no_preflight: bool,
    /// CPU slots; by default what this process may use.
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = clap::value_parser!(u64).range(1..=4096))]
    pub cpus: Option<u64>,
    /// GPU slots; by default those of this machine, or of CUDA_VISIBLE_DEVICES. A task without a GPU limit sees none.
    #[arg(long, value_name = "N", allow_negative_numbers = true,
          value_parser = clap::value_parser!(u64).range(0..=4096).map(|count| count as usize))]
    pub gpus: Option<usize>,
    /// Seconds between SIGTERM and SIGKILL when the run is stopped.
    #[arg(long, value_name = "SECONDS", allow_negative_numbers = true, default_value_t = 20,
          value_parser = clap::value_parser!(u64).range(0..=86_400))]
    pub grace: u64,
    /// Folder for the tasks' logs; by default a temporary one, kept only when a task fails.
    #[arg(long, value_name = "DIR")]
    pub logs: Option<PathBuf>,
    /// What standard output carries at the end.
    #[arg(long, value_enum, default_value_t = Format::Text)]
    pub format: Format,
    /// Which flags shape the log.
    #[command(flatten)]
    pub verbosity: Verbosity,
}

/// Runs the workflow file that `args` name.
pub async fn run(args: RunArgs) -> Result<Summary, Failure> {
    // Listening starts here: a signal during the preflight ends it, one during the run ends the tasks.
    let mut signals = Signals::new()?;
    let plan = load(&args)?;
    if args.dry_run {
        return Ok(Summary { text: outline(&plan), json: outline_json(&plan) });
    }
    let machine = machine(&args);
    if !args.no_preflight {
        tokio::select! {
            findings = preflight::check(&plan, &machine) => verdict(&findings)?,
            () = signals.received() => return Err(signals.stopped()),
        }
    }
    let logs = Logs::create(&args, &plan)?;
    let options = Options {
        machine,
        grace: Duration::from_secs(args.grace),
        env: environment(),
        logs: logs.folder.clone(),
        programs: stages::folders(),
    };
    let view = view::suitable(&plan);
    let report = watch_over(&plan, &options, view.as_ref(), &mut signals).await;
    logs.tidy(&report);
    conclude(&plan, &report, args.format, &signals)
}

fn load(args: &RunArgs) -> Result<Plan, Failure> {
    let file = args.file.display().to_string();
    let text = std::fs::read_to_string(&args.file)
        .map_err(|error| Failure::Usage(format!("{file}: {error}\nhelp: give the path of a workflow file")))?;
    workflow::load(&file, &text, &args.parameters).map_err(|findings| Failure::Usage(findings.to_string()))
}

fn machine(args: &RunArgs) -> Machine {
    let mut machine = Machine::detect();
    if let Some(cpus) = args.cpus {
        machine.cpu = cpus * 1_000;
    }
    if let Some(gpus) = args.gpus {
        machine.gpus = gpu_slots(machine.gpus, gpus);
    }
    machine
}

/// `count` GPUs of those `found`. Where there are to be more, the caller knows better: the smallest other numbers.
fn gpu_slots(found: Vec<String>, count: usize) -> Vec<String> {
    let others = (0..count).map(|id| id.to_string()).filter(|id| !found.contains(id));
    found.iter().cloned().chain(others).take(count).collect()
}

/// What every task's process gets: the trace, and logs for people where people look on.
fn environment() -> Vec<(String, String)> {
    let mut env = stage::telemetry::child_env();
    if stage::progress::bars().is_some() && std::env::var_os("DOPPEL_LOG_FORMAT").is_none() {
        env.push(("DOPPEL_LOG_FORMAT".to_owned(), "text".to_owned()));
    }
    env
}

/// Runs the plan; the first signal ends the tasks gently, a second one at once.
async fn watch_over(plan: &Plan, options: &Options, view: &dyn Observer, signals: &mut Signals) -> Report {
    let (wish, stop) = watch::channel(Stop::No);
    let run = workflow::run(plan, options, stop, view);
    tokio::pin!(run);
    loop {
        tokio::select! {
            report = &mut run => return report,
            () = signals.received() => {
                let now = *wish.borrow();
                let next = if now == Stop::No { Stop::Gently } else { Stop::Kill };
                tracing::warn!("stopping all tasks; a second signal kills them");
                wish.send_replace(next);
            }
        }
    }
}

/// The folder of the tasks' logs.
struct Logs {
    folder: PathBuf,
    temporary: bool,
}

impl Logs {
    fn create(args: &RunArgs, plan: &Plan) -> Result<Self, Failure> {
        let temporary = args.logs.is_none();
        let folder = args.logs.clone().unwrap_or_else(|| {
            let name = plan.name.replace(|c: char| !c.is_ascii_alphanumeric(), "-");
            let since = std::time::UNIX_EPOCH.elapsed().unwrap_or_default().as_millis();
            std::env::temp_dir().join(format!("doppel-{name}-{since}-{}", std::process::id()))
        });
        // Tasks of other people's workflows may print what is not for everybody on the machine.
        let created = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&folder);
        created.map_err(|error| {
            Failure::Usage(format!("{}: {error}\nhelp: choose a folder for the logs with --logs", folder.display()))
        })?;
        Ok(Self { folder, temporary })
    }

    /// Removes a temporary folder, unless what is told of a failed task will name a log in it.
    fn tidy(&self, report: &Report) {
        let named = report.failed().into_iter().any(|job| has_log(&report.jobs[job]));
        if self.temporary && !named {
            // What cannot be removed from a temporary folder is the system's to remove.
            let _ = std::fs::remove_dir_all(&self.folder);
        }
    }
}

/// Whether the task has a log. Where nothing was started, what lies there is of an earlier run.
fn has_log(report: &JobReport) -> bool {
    let was_started = report.attempts > 0 && !matches!(report.outcome, Some(Outcome::NotStarted(_)));
    was_started && report.log.is_file()
}

fn conclude(plan: &Plan, report: &Report, format: Format, signals: &Signals) -> Result<Summary, Failure> {
    let summary = Summary { text: result_table(plan, report), json: result_json(plan, report) };
    if report.success() {
        return Ok(summary);
    }
    summary.print(format)?;
    Err(match (report.failed().is_empty(), report.stopped) {
        (true, _) => signals.stopped(),
        (false, false) => failure(plan, report),
        // Whatever failed before: to whoever sent the signal, this is how it ended.
        (false, true) => Failure::Ended { code: signals.code, message: failure(plan, report).to_string() },
    })
}

/// The failure of the task that decides, with what each failed one last said.
fn failure(plan: &Plan, report: &Report) -> Failure {
    let failed = report.failed();
    let mut text = format!("{} of {} tasks failed", failed.len(), plan.jobs.len());
    for &job in &failed {
        text += &format!("\n  {}", complaint(&plan.jobs[job].name, &report.jobs[job]));
    }
    let codes: Vec<i32> = failed.iter().filter_map(|job| Some(report.jobs[*job].outcome.as_ref()?.code())).collect();
    // What only a person can mend comes before what may mend itself.
    let code = codes.iter().find(|code| (2..=4).contains(*code)).or(codes.first()).copied();
    text += match code {
        // Final ones: the same command would only fail again.
        Some(2..=4) => "\nhelp: first do what the task asks for; the same command then continues with what is not done",
        _ => "\nhelp: the same command continues with what is not done yet",
    };
    match code {
        Some(3) => Failure::Input(text),
        Some(4) => Failure::Budget(text),
        Some(5) => Failure::Transient(text),
        Some(2) => Failure::Usage(text),
        // A command that failed in a way of its own: it is not for the front to call that a bug.
        _ => Failure::Ended { code: 1, message: text },
    }
}

fn complaint(name: &str, report: &JobReport) -> String {
    let outcome = report.outcome.as_ref().map(ToString::to_string).unwrap_or_default();
    let times = if report.attempts > 1 { format!(" after {} attempts", report.attempts) } else { String::new() };
    let mut text = format!("{name}: {outcome}{times}");
    for line in &report.tail {
        text += &format!("\n    | {line}");
    }
    if has_log(report) {
        text += &format!("\n    log: {}", report.log.display());
    }
    text
}

fn result_table(plan: &Plan, report: &Report) -> String {
    let rows: Vec<Vec<String>> = plan
        .jobs
        .iter()
        .zip(&report.jobs)
        .map(|(job, report)| {
            let (attempts, time) = match report.state {
                State::NotRun => (String::new(), String::new()),
                _ => (report.attempts.to_string(), duration(report.elapsed)),
            };
            let state = if already_done(job, report) { "done already" } else { report.state.word() };
            vec![job.name.clone(), state.to_owned(), attempts, time]
        })
        .collect();
    let done = report.jobs.iter().filter(|job| job.state == State::Succeeded).count();
    let before = match plan.jobs.iter().zip(&report.jobs).filter(|(job, report)| already_done(job, report)).count() {
        0 => String::new(),
        all if all == plan.jobs.len() => "; all were done already, so nothing was done".to_owned(),
        some => format!("; {some} were done already"),
    };
    let table = table(&["task", "state", "attempts", "time"], &rows, &[2, 3]);
    format!("{table}\n{done} of {} tasks succeeded in {}{before}", plan.jobs.len(), duration(report.elapsed))
}

/// Whether a task of ours found its work done, by what it said at its end. What a query or an audit says is an answer:
/// neither leaves anything that could be done already.
fn already_done(job: &Job, report: &JobReport) -> bool {
    report.state == State::Succeeded
        && Invocation::new(job).is_some_and(|one| !matches!(one.program, "query" | "audit"))
        && report.tail.iter().any(|line| stage::tells_already_done(line))
}

fn result_json(plan: &Plan, report: &Report) -> serde_json::Value {
    let tasks = plan.jobs.iter().zip(&report.jobs).map(|(job, report)| {
        json!({
            "task": job.name,
            "state": report.state.word(),
            "already_done": already_done(job, report),
            "attempts": report.attempts,
            "seconds": report.elapsed.as_secs_f64(),
            "exit_code": report.outcome.as_ref().map(workflow::retry::Outcome::code),
        })
    });
    json!({
        "workflow": plan.name,
        "succeeded": report.success(),
        "seconds": report.elapsed.as_secs_f64(),
        "tasks": tasks.collect::<Vec<_>>(),
    })
}

/// What `--dry-run` prints.
fn outline(plan: &Plan) -> String {
    let mut text = format!("{}: {} tasks", plan.name, plan.jobs.len());
    for job in &plan.jobs {
        let after: Vec<&str> = job.after.iter().map(|job| plan.jobs[*job].name.as_str()).collect();
        let after = if after.is_empty() { String::new() } else { format!(" (after {})", after.join(", ")) };
        text += &format!("\n{}{after}\n    {}", job.name, shell_line(&job.command));
    }
    text
}

fn outline_json(plan: &Plan) -> serde_json::Value {
    let tasks = plan.jobs.iter().map(|job| {
        let after: Vec<&str> = job.after.iter().map(|job| plan.jobs[*job].name.as_str()).collect();
        json!({ "task": job.name, "after": after, "command": job.command, "gpus": job.gpus })
    });
    json!({ "workflow": plan.name, "parameters": plan.parameters, "tasks": tasks.collect::<Vec<_>>() })
}

/// A command as a shell would take it.
fn shell_line(command: &[String]) -> String {
    let quoted = command.iter().map(|word| {
        let plain = !word.is_empty() && word.chars().all(|c| c.is_ascii_alphanumeric() || "-_./:=,@%+".contains(c));
        if plain { word.clone() } else { format!("'{}'", word.replace('\'', r"'\''")) }
    });
    quoted.collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_gpu_is_given_out_twice() {
        let slots = |found: &[&str], count| gpu_slots(found.iter().map(|id| (*id).to_owned()).collect(), count);
        assert_eq!(slots(&["1"], 2), ["1", "0"]);
        assert_eq!(slots(&["2", "0"], 4), ["2", "0", "1", "3"]);
        assert_eq!(slots(&["0", "1", "2"], 1), ["0"]);
        assert_eq!(slots(&[], 2), ["0", "1"]);
    }

    #[test]
    fn temporary_logs_stay_only_where_a_failed_task_has_one() {
        let left = |state: State, outcome: Outcome, written: bool| {
            let folder = tempfile::tempdir().unwrap();
            let logs = Logs { folder: folder.path().join("logs"), temporary: true };
            std::fs::create_dir(&logs.folder).unwrap();
            let log = logs.folder.join("a.log");
            if written {
                std::fs::write(&log, "said\n").unwrap();
            }
            let (elapsed, tail) = (Duration::ZERO, Vec::new());
            let job = JobReport { state, attempts: 1, outcome: Some(outcome), elapsed, tail, log };
            let report = Report { jobs: vec![job], elapsed, stopped: state == State::Stopped };
            logs.tidy(&report);
            (logs.folder.exists(), complaint("a", &report.jobs[0]).contains("log: "))
        };
        assert_eq!(left(State::Failed, Outcome::Exit(1), true), (true, true));
        for written in [false, true] {
            assert_eq!(left(State::Failed, Outcome::NotStarted("no program".to_owned()), written), (false, false));
        }
        assert_eq!(left(State::Stopped, Outcome::Signal(15), true), (false, false));
    }

    #[test]
    fn commands_are_quoted_for_a_shell() {
        let command = ["sh", "-c", "echo 'a b'", ""].map(str::to_owned);
        assert_eq!(shell_line(&command), r"sh -c 'echo '\''a b'\''' ''");
    }
}
