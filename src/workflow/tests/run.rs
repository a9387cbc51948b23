//! Running plans as processes.

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use workflow::Stop;
use workflow::run::program_of;
use workflow::{Event, Machine, Observer, Options, Plan, Report, State};

/// A workflow of shell commands: `(name, fields of the task, fields of the template, script)`.
fn plan(tasks: &[(&str, &str, &str, &str)], fail_fast: bool) -> Plan {
    let mut text = format!(
        "apiVersion: argoproj.io/v1alpha1\nkind: Workflow\nmetadata: {{name: t}}\nspec:\n  entrypoint: main\n  templates:\n  \
         - name: main\n    dag:\n      failFast: {fail_fast}\n      tasks:\n"
    );
    for (name, task, ..) in tasks {
        text += &format!("      - {{name: {name}, template: {name}{task}}}\n");
    }
    for (name, _, template, script) in tasks {
        text += &format!(
            "  - name: {name}\n{template}    container:\n      command: [sh, -c]\n      args:\n      - |\n        {script}\n"
        );
    }
    workflow::load("t.yaml", &text, &[]).unwrap_or_else(|findings| panic!("{findings}\n{text}"))
}

/// Remembers events as words.
#[derive(Default)]
struct Log(RefCell<Vec<String>>);

impl Observer for Log {
    fn event(&self, plan: &Plan, event: Event<'_>) {
        let name = |job: usize| &plan.jobs[job].name;
        self.0.borrow_mut().push(match event {
            Event::Started { job, attempt } => format!("start {} {attempt}", name(job)),
            Event::Line { job, line } => format!("{}: {line}", name(job)),
            Event::Retrying { job, outcome, .. } => format!("retry {} {outcome}", name(job)),
            Event::Finished { job, report } => format!("end {} {}", name(job), report.state.word()),
        });
    }
}

fn options(folder: &Path) -> Options {
    Options {
        machine: Machine { cpu: 2_000, gpus: vec!["7".into()], memory: 1 << 30 },
        grace: Duration::from_millis(400),
        env: vec![("FOLDER".into(), folder.display().to_string())],
        logs: folder.to_owned(),
        programs: Vec::new(),
    }
}

/// Runs to the end, or stops as soon as `enough` holds of what happened so far.
fn run_until(plan: &Plan, folder: &Path, enough: impl Fn(&[String]) -> bool) -> (Report, Vec<String>) {
    let (wish, stop) = watch::channel(Stop::No);
    let log = Log::default();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let report = runtime.block_on(async {
        let options = options(folder);
        let run = workflow::run(plan, &options, stop, &log);
        let stopper = async {
            while !enough(&log.0.borrow()) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            wish.send_replace(Stop::Gently);
            std::future::pending::<()>().await;
        };
        tokio::select! {
            report = run => report,
            () = stopper => unreachable!("never ends"),
        }
    });
    (report, log.0.into_inner())
}

fn run(plan: &Plan) -> (Report, Vec<String>) {
    run_until(plan, tempfile::tempdir().unwrap().path(), |_| false)
}

/// Runs to the end; each job that ended leaves a file `ended-NAME` for the others to wait for.
fn run_telling(plan: &Plan) -> Report {
    let folder = tempfile::tempdir().unwrap();
    let tell = |log: &[String]| {
        for name in log.iter().filter_map(|line| line.strip_prefix("end ")?.split(' ').next()) {
            std::fs::write(folder.path().join(format!("ended-{name}")), "").unwrap();
        }
        false
    };
    run_until(plan, folder.path(), tell).0
}

fn states(report: &Report) -> Vec<State> {
    report.jobs.iter().map(|job| job.state).collect()
}

#[test]
fn tasks_run_in_order_and_their_output_is_seen() {
    let plan = plan(&[("b", ", dependencies: [a]", "", "printf 'two\\nlast'"), ("a", "", "", "echo one >&2")], true);
    let folder = tempfile::tempdir().unwrap();
    let (report, log) = run_until(&plan, folder.path(), |_| false);
    assert!(report.success());
    assert_eq!(log, ["start a 1", "a: one", "end a succeeded", "start b 1", "b: two", "b: last", "end b succeeded"]);
    assert_eq!(std::fs::read_to_string(folder.path().join("b.log")).unwrap(), "two\nlast\n");
}

#[test]
fn slots_bound_what_runs_at_a_time() {
    // Each waits until it sees the other, so two must run at once; with one slot each would wait in vain.
    let meet = "touch $FOLDER/{{inputs.parameters.i}}; for n in $(seq 100); do [ $(ls $FOLDER | grep -c '^[01]$') = 2 ] && exit 0; sleep 0.05; done; exit 1";
    let input = "    inputs: {parameters: [{name: i}]}\n";
    let fan = ", withItems: [0, 1], arguments: {parameters: [{name: i, value: '{{item}}'}]}";
    assert!(run(&plan(&[("meet", fan, input, meet)], true)).0.success());

    let alone = "mkdir $FOLDER/lock || exit 1; sleep 0.1; rmdir $FOLDER/lock; echo gpu=${CUDA_VISIBLE_DEVICES-all}";
    let fan = ", withItems: [0, 1, 2]";
    let mut plan = plan(&[("alone", fan, "", alone)], true);
    for job in &mut plan.jobs {
        job.gpus = 1;
    }
    let (report, log) = run(&plan);
    assert!(report.success());
    assert_eq!(log.iter().filter(|line| line.ends_with(": gpu=7")).count(), 3, "{log:?}");

    plan.jobs[0].gpus = 2;
    let (report, _) = run(&plan);
    assert_eq!(report.jobs[0].outcome.as_ref().unwrap().to_string(), "not started: needs 2 GPUs; this machine has 1");
}

#[test]
fn a_job_that_asks_for_no_gpu_sees_none() {
    let (_, log) = run(&plan(&[("none", "", "", "echo gpu=${CUDA_VISIBLE_DEVICES-all}")], true));
    assert!(log.contains(&"none: gpu=".to_owned()), "{log:?}");
}

#[test]
fn failures_are_retried_as_declared() {
    let twice = "    retryStrategy: {limit: 2, backoff: {duration: 10ms}}\n";
    let flaky = "echo x >> $FOLDER/tries; [ $(wc -l < $FOLDER/tries) -ge 3 ]";
    let (report, log) = run(&plan(&[("flaky", "", twice, flaky)], true));
    assert_eq!((states(&report), report.jobs[0].attempts), (vec![State::Succeeded], 3), "{log:?}");
    assert!(log.contains(&"retry flaky exit code 1".to_owned()));

    for (script, attempts) in [("exit 3", 1), ("exit 5", 3), ("kill -9 $$$$", 3)] {
        let (report, _) = run(&plan(&[("bad", "", twice, script)], true));
        assert_eq!((states(&report), report.jobs[0].attempts), (vec![State::Failed], attempts), "{script}");
    }
}

#[test]
fn after_a_failure_nothing_new_starts_unless_the_dag_says_so() {
    let tasks = [
        ("bad", "", "", "echo why >&2; exit 4"),
        ("next", ", dependencies: [bad]", "", "true"),
        ("slow", "", "", "until [ -e $FOLDER/ended-bad ]; do sleep 0.02; done"),
        ("after-slow", ", dependencies: [slow]", "", "true"),
    ];
    let report = run_telling(&plan(&tasks, true));
    assert_eq!(states(&report), [State::Failed, State::NotRun, State::Succeeded, State::NotRun]);
    assert_eq!(report.jobs[0].tail, ["why"]);
    let report = run_telling(&plan(&tasks, false));
    assert_eq!(states(&report), [State::Failed, State::NotRun, State::Succeeded, State::Succeeded]);
}

#[test]
fn a_dag_that_went_on_after_a_failure_counts_as_failed_at_its_end() {
    let text = "apiVersion: argoproj.io/v1alpha1
kind: Workflow
metadata: {name: t}
spec:
  entrypoint: main
  templates:
  - name: main
    dag:
      tasks:
      - {name: inner, template: inner}
      - {name: slow, template: wait, arguments: {parameters: [{name: for, value: inner.next}]}}
      - {name: after-slow, template: nothing, dependencies: [slow]}
  - name: inner
    dag:
      failFast: false
      tasks:
      - {name: bad, template: bad}
      - {name: never, template: nothing, dependencies: [bad]}
      - {name: next, template: wait, arguments: {parameters: [{name: for, value: inner.bad}]}}
  - name: bad
    container: {command: ['false']}
  - name: nothing
    container: {command: ['true']}
  - name: wait
    inputs: {parameters: [{name: for}]}
    container:
      command: [sh, -c, 'until [ -e $FOLDER/ended-{{inputs.parameters.for}} ]; do sleep 0.02; done']
";
    let plan = workflow::load("t.yaml", text, &[]).unwrap();
    let report = run_telling(&plan);
    let found: Vec<_> = plan.jobs.iter().zip(states(&report)).map(|(job, state)| (job.name.as_str(), state)).collect();
    assert_eq!(
        found,
        [
            ("inner.bad", State::Failed),
            ("inner.never", State::NotRun),
            ("inner.next", State::Succeeded),
            ("slow", State::Succeeded),
            ("after-slow", State::NotRun),
        ]
    );
}

#[test]
fn what_a_failed_attempt_left_in_its_group_ends_with_it() {
    let once = "    retryStrategy: {limit: 1}\n";
    // The second attempt gets the lock when nobody of the first holds it any more.
    let script = "exec 9>>$FOLDER/lock; flock -w 20 9 || exit 3; [ -e $FOLDER/first ] && exit 0; touch $FOLDER/first; sleep 60 & exit 1";
    let (report, log) = run(&plan(&[("forgetful", "", once, script)], true));
    assert_eq!((states(&report), report.jobs[0].attempts), (vec![State::Succeeded], 2), "{log:?}");
}

#[test]
fn stopping_ends_the_whole_process_group_also_one_that_will_not() {
    let tasks = [
        ("stubborn", "", "", "trap '' TERM; echo ready; (trap '' TERM; sleep 30; touch $FOLDER/lived) & sleep 30"),
        ("polite", "", "", "trap 'echo bye; exit 7' TERM; echo ready; sleep 30 & wait"),
        ("later", ", dependencies: [polite]", "", "true"),
    ];
    let started = Instant::now();
    let ready = |log: &[String]| log.iter().filter(|line| line.ends_with(": ready")).count() == 2;
    let (report, log) = run_until(&plan(&tasks, true), tempfile::tempdir().unwrap().path(), ready);
    assert!(started.elapsed() < Duration::from_secs(5));
    assert!(report.stopped);
    assert_eq!(states(&report), [State::Stopped, State::Stopped, State::NotRun]);
    assert!(log.contains(&"polite: bye".to_owned()), "{log:?}");
    assert_eq!(report.jobs[0].outcome.as_ref().unwrap().to_string(), "killed by signal 9");
}

#[test]
fn a_pause_before_a_retry_ends_when_the_run_is_stopped() {
    let tasks = [("bad", "", "    retryStrategy: {limit: 9, backoff: {duration: 1h}}\n", "echo why; exit 1")];
    let retrying = |log: &[String]| log.iter().any(|line| line.starts_with("retry bad"));
    let (report, _) = run_until(&plan(&tasks, true), tempfile::tempdir().unwrap().path(), retrying);
    assert!(report.stopped);
    assert_eq!((states(&report), report.jobs[0].attempts), (vec![State::Failed], 1));
    assert_eq!(report.jobs[0].tail, ["why"]);
}

#[test]
fn a_pause_before_a_retry_ends_when_another_task_has_failed() {
    let hour = "    retryStrategy: {limit: 9, backoff: {duration: 1h}}\n";
    let tasks = [
        ("flaky", "", hour, "echo why; touch $FOLDER/tried; exit 1"),
        ("bad", "", "", "until [ -e $FOLDER/tried ]; do sleep 0.05; done; exit 4"),
    ];
    let (report, _) = run(&plan(&tasks, true));
    assert_eq!(states(&report), [State::Failed, State::Failed]);
    assert_eq!((report.jobs[0].attempts, report.jobs[0].tail.as_slice()), (1, ["why".to_owned()].as_slice()));
}

#[test]
fn a_program_that_is_not_there_fails_its_task() {
    let mut plan = plan(&[("a", "", "    retryStrategy: {limit: 3}\n", "true")], true);
    plan.jobs[0].command[0] = "no-such-program-anywhere".into();
    let (report, _) = run(&plan);
    assert_eq!((states(&report), report.jobs[0].attempts), (vec![State::Failed], 1));
}

#[test]
fn no_two_tasks_write_to_one_log() {
    let long = |end: &str| "x".repeat(150) + end;
    let names = [long("(0:a)"), long("(1:b)"), "c(0:é)".into(), "c-0".into(), "c(0".into()];
    let tasks = ["a", "b", "c", "d", "e"].map(|name| (name, format!("echo {name}")));
    let tasks = tasks.each_ref().map(|(name, script)| (*name, "", "", script.as_str()));
    let mut plan = plan(&tasks, true);
    for (job, name) in plan.jobs.iter_mut().zip(names) {
        job.name = name;
    }
    let folder = tempfile::tempdir().unwrap();
    let (report, _) = run_until(&plan, folder.path(), |_| false);
    for (job, (name, ..)) in report.jobs.iter().zip(tasks) {
        assert_eq!(std::fs::read_to_string(&job.log).unwrap(), format!("{name}\n"), "{}", job.log.display());
    }
    // Short names stay as people know them.
    assert_eq!(report.jobs[2].log, folder.path().join("c_0.log"));
}

#[test]
fn a_relative_program_is_one_of_the_tasks_working_folder() {
    let folder = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink("/bin/sh", folder.path().join("own-shell")).unwrap();
    // The same folder, from where this process works.
    let up: PathBuf = std::env::current_dir().unwrap().components().skip(1).map(|_| "..").collect();
    let relative = up.join(folder.path().strip_prefix("/").unwrap());
    let mut plan = plan(&[("a", "", "", "echo here")], true);
    plan.jobs[0].command[0] = "./own-shell".into();
    for place in [folder.path(), relative.as_path()] {
        plan.jobs[0].working_dir = Some(place.display().to_string());
        let (report, log) = run(&plan);
        assert_eq!(states(&report), [State::Succeeded], "{log:?} {:?}", report.jobs[0].outcome);
    }
    plan.jobs[0].working_dir = None;
    assert_eq!(program_of(&plan.jobs[0], &[]), None);
    // One that is found in a relative folder of the search must be found from the working folder, too.
    plan.jobs[0].command[0] = "own-shell".into();
    plan.jobs[0].working_dir = Some("/".into());
    assert!(program_of(&plan.jobs[0], &[relative]).unwrap().is_absolute());
}
