//! The command line contract of `doppel`: exit codes, what goes where, and runs from start to end.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use arrow::array::{ArrayRef, Float64Array, Int64Array, RecordBatch, StringArray};
use arrow::datatypes::SchemaRef;
use lake::{AppTransaction, PrivateRoot, StorageOptions, Zone, schema};
use tempfile::TempDir;

fn doppel() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_doppel"));
    for name in ["DOPPEL_PRIVATE", "DOPPEL_RELEASE", "DOPPEL_RUN", "RUST_LOG", "OTEL_EXPORTER_OTLP_ENDPOINT"] {
        command.env_remove(name);
    }
    command
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A workflow of shell commands: `(name, fields of the task, retries, script)`.
fn workflow(folder: &Path, tasks: &[(&str, &str, u32, &str)]) -> std::path::PathBuf {
    let mut file = String::from(
        "apiVersion: argoproj.io/v1alpha1\nkind: Workflow\nmetadata: {name: test}\nspec:\n  entrypoint: main\n  \
         arguments: {parameters: [{name: word, value: hello}]}\n  templates:\n  - name: main\n    dag:\n      tasks:\n",
    );
    for (name, fields, ..) in tasks {
        file += &format!("      - {{name: {name}, template: {name}{fields}}}\n");
    }
    for (name, fields, retries, script) in tasks {
        let inputs = if fields.contains("item") { "    inputs: {parameters: [{name: item}]}\n" } else { "" };
        file += &format!(
            "  - name: {name}\n    retryStrategy: {{limit: {retries}, backoff: {{duration: 10ms}}}}\n{inputs}    container:\n      \
             image: none\n      command: [sh, -c]\n      args:\n      - |\n        {script}\n"
        );
    }
    let path = folder.join("workflow.yaml");
    std::fs::write(&path, file).unwrap();
    path
}

const FAN: &str = ", withSequence: {count: 3}, arguments: {parameters: [{name: item, value: '{{item}}'}]}";

fn run(folder: &Path, tasks: &[(&str, &str, u32, &str)], flags: &[&str]) -> Output {
    let file = workflow(folder, tasks);
    doppel().arg("run").arg(file).args(flags).current_dir(folder).env("TMPDIR", folder).output().unwrap()
}

#[test]
fn a_fan_out_runs_in_order_and_is_summed_up_on_standard_output() {
    let folder = TempDir::new().unwrap();
    let tasks = [
        ("last", ", dependencies: [fan]", 0, "cat fan-* > all"),
        ("fan", FAN, 0, "echo {{workflow.parameters.word}} > fan-{{inputs.parameters.item}}"),
    ];
    let output = run(folder.path(), &tasks, &["-p", "word=bye", "--format", "json"]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert_eq!(std::fs::read_to_string(folder.path().join("all")).unwrap(), "bye\nbye\nbye\n");
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["succeeded"], true);
    let names: Vec<_> = json["tasks"].as_array().unwrap().iter().map(|task| task["task"].as_str().unwrap()).collect();
    assert_eq!(names, ["fan(0:0)", "fan(1:1)", "fan(2:2)", "last"]);
    // Standard error carries structured lines, where it is no terminal.
    for line in text(&output.stderr).lines() {
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        assert!(line.is_object());
    }
    // Nothing stays behind: neither logs nor a folder of the runner's.
    let left: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left.len(), 5, "{left:?}");
}

#[test]
fn a_failure_tells_the_task_its_last_words_and_where_its_log_is() {
    let folder = TempDir::new().unwrap();
    let tasks = [
        ("a", "", 2, "echo tried >> tries; echo the reason >&2; exit 5"),
        ("b", ", dependencies: [a]", 0, "touch never"),
    ];
    let output = run(folder.path(), &tasks, &["--logs", "logs"]);
    assert_eq!(output.status.code(), Some(5));
    let told = text(&output.stderr);
    assert!(told.contains("1 of 2 tasks failed"), "{told}");
    assert!(told.contains("a: exit code 5 after 3 attempts\n    | the reason"), "{told}");
    assert!(text(&output.stdout).contains("not run"), "{}", text(&output.stdout));
    assert_eq!(std::fs::read_to_string(folder.path().join("tries")).unwrap().lines().count(), 3);
    assert_eq!(std::fs::read_to_string(folder.path().join("logs/a.log")).unwrap().lines().count(), 3);
    assert!(!folder.path().join("never").exists());
}

#[test]
fn exit_codes_of_the_contract_are_handed_on_and_not_retried() {
    for (script, expected) in [("exit 2", 2), ("exit 3", 3), ("exit 4", 4), ("exit 9", 1)] {
        let folder = TempDir::new().unwrap();
        let script = format!("echo x >> tries; {script}");
        let output = run(folder.path(), &[("a", "", 2, &script)], &[]);
        assert_eq!(output.status.code(), Some(expected), "{script}");
        let tries = std::fs::read_to_string(folder.path().join("tries")).unwrap().lines().count();
        assert_eq!(tries, if expected == 1 { 3 } else { 1 }, "{script}");
    }
}

#[test]
fn what_is_final_is_not_said_to_continue_by_itself() {
    for (script, expected) in [("exit 4", "first do what the task asks for"), ("exit 5", "help: the same command")] {
        let folder = TempDir::new().unwrap();
        let told = text(&run(folder.path(), &[("a", "", 0, script)], &[]).stderr);
        assert!(told.contains(expected), "{told}");
    }
}

#[test]
fn what_failed_for_good_decides_how_the_run_ends() {
    let folder = TempDir::new().unwrap();
    let tasks = [
        ("passing", "", 0, "touch tried; exit 5"),
        ("final", "", 0, "until [ -e tried ]; do sleep 0.05; done; exit 3"),
    ];
    let output = run(folder.path(), &tasks, &["--cpus", "4"]);
    let told = text(&output.stderr);
    assert!(told.contains("2 of 2 tasks failed") && told.contains("first do what the task asks for"), "{told}");
    assert_eq!(output.status.code(), Some(3), "{told}");
}

#[test]
fn running_again_continues() {
    let folder = TempDir::new().unwrap();
    let tasks = [("a", "", 0, "[ -e done ] || { touch done; exit 1; }")];
    assert_eq!(run(folder.path(), &tasks, &[]).status.code(), Some(1));
    assert_eq!(run(folder.path(), &tasks, &[]).status.code(), Some(0));
}

/// The line that a task writes to a file.
fn line_of(file: &Path) -> String {
    let started = Instant::now();
    loop {
        let line = std::fs::read_to_string(file).unwrap_or_default();
        if line.ends_with('\n') {
            return line.trim().to_owned();
        }
        assert!(started.elapsed() < Duration::from_secs(30), "{} was never written", file.display());
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn ctrl_c_ends_the_tasks_and_leaves_none_behind() {
    let folder = TempDir::new().unwrap();
    let script = "echo $$$$ > pid; sleep 60 & wait";
    let file =
        workflow(folder.path(), &[("slow", "", 3, script), ("after", ", dependencies: [slow]", 0, "touch never")]);
    let mut child = doppel()
        .args(["run", "--grace", "5"])
        .arg(&file)
        .current_dir(folder.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let pid = line_of(&folder.path().join("pid"));
    let id = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(id, rustix::process::Signal::INT).unwrap();
    let status = child.wait().unwrap();
    assert_eq!(status.code(), Some(130));
    let mut told = String::new();
    child.stderr.take().unwrap().read_to_string(&mut told).unwrap();
    assert!(told.contains("the same command continues"), "{told}");
    assert!(!Path::new(&format!("/proc/{pid}")).exists(), "the task still runs");
    assert!(!folder.path().join("never").exists());
}

#[test]
fn a_second_ctrl_c_kills_a_task_that_will_not_end() {
    let folder = TempDir::new().unwrap();
    // The signal ends what the shell has started, too, so that the loop must stand when it comes.
    let script =
        "trap 'echo asked > asked' TERM; for n in $(seq 600); do [ -s pid ] || echo $$$$ > pid; sleep 0.1; done";
    let file = workflow(folder.path(), &[("stubborn", "", 0, script)]);
    let mut command = doppel();
    command.args(["run", "--grace", "3600"]).arg(&file).current_dir(folder.path());
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let id = rustix::process::Pid::from_child(&child);
    let pid = line_of(&folder.path().join("pid"));
    rustix::process::kill_process(id, rustix::process::Signal::INT).unwrap();
    line_of(&folder.path().join("asked"));
    assert!(child.try_wait().unwrap().is_none(), "the first one waits for the task");
    rustix::process::kill_process(id, rustix::process::Signal::INT).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert!(!Path::new(&format!("/proc/{pid}")).exists(), "the task still runs");
}

#[cfg(target_os = "linux")]
#[test]
fn nohup_outlives_its_terminal() {
    let folder = TempDir::new().unwrap();
    let script = "echo ready > ready; until [ -e go ]; do sleep 0.05; done";
    let file = workflow(folder.path(), &[("patient", "", 0, script)]);
    let mut command = Command::new("sh");
    command.args(["-c", "trap '' HUP; exec \"$0\" run \"$1\"", env!("CARGO_BIN_EXE_doppel")]).arg(&file);
    command.current_dir(folder.path()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = command.spawn().unwrap();
    line_of(&folder.path().join("ready"));
    rustix::process::kill_process(rustix::process::Pid::from_child(&child), rustix::process::Signal::HUP).unwrap();
    std::fs::write(folder.path().join("go"), "").unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn ctrl_c_in_a_pause_before_a_retry_tells_why_the_task_failed() {
    let folder = TempDir::new().unwrap();
    let file = workflow(folder.path(), &[("flaky", "", 3, "echo the reason >&2; exit 5")]);
    let patient = std::fs::read_to_string(&file).unwrap().replace("10ms", "1h");
    std::fs::write(&file, patient).unwrap();
    let mut command = doppel();
    command.arg("run").arg(&file).current_dir(folder.path()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut told = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    while !line.contains("it will be tried again") {
        line.clear();
        assert!(told.read_line(&mut line).unwrap() > 0, "the run ended");
    }
    let id = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(id, rustix::process::Signal::INT).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130));
    let mut rest = String::new();
    told.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("flaky: exit code 5\n    | the reason"), "{rest}");
}

#[test]
fn running_again_what_is_done_says_so() {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("w.yaml");
    let text_of_file = "apiVersion: argoproj.io/v1alpha1\nkind: Workflow\nmetadata: {name: t}\nspec:\n  entrypoint: main\n  \
         templates:\n  - name: main\n    container:\n      image: none\n      \
         command: [doppel, budget, set, --corpus=c, --epsilon=8, '--delta=1e-5', --private=private]\n";
    std::fs::write(&file, text_of_file).unwrap();
    let run = |flags: &[&str]| {
        let output = doppel().arg("run").arg(&file).args(flags).current_dir(folder.path()).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
        text(&output.stdout)
    };
    let told = run(&[]);
    assert!(told.contains("1 of 1 tasks succeeded") && !told.contains("already"), "{told}");
    let told = run(&[]);
    assert!(told.contains("all were done already, so nothing was done"), "{told}");
    let json: serde_json::Value = serde_json::from_str(&run(&["--format", "json"])).unwrap();
    assert_eq!((&json["tasks"][0]["state"], &json["tasks"][0]["already_done"]), (&"succeeded".into(), &true.into()));
}

#[test]
fn the_answer_of_a_query_is_not_taken_for_work_done_already() {
    use std::os::unix::fs::PermissionsExt;

    let folder = TempDir::new().unwrap();
    for name in ["doppel-query", "doppel-vote"] {
        let program = folder.path().join(name);
        std::fs::write(&program, "#!/bin/sh\necho 'the homework is done already'\n").unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    let file = folder.path().join("w.yaml");
    let at = folder.path().display();
    let text_of_file = format!(
        "apiVersion: argoproj.io/v1alpha1\nkind: Workflow\nmetadata: {{name: t}}\nspec:\n  entrypoint: main\n  templates:\n  \
         - name: main\n    dag: {{tasks: [{{name: query, template: query}}, {{name: vote, template: vote}}]}}\n  \
         - name: query\n    container: {{image: none, command: ['{at}/doppel-query']}}\n  \
         - name: vote\n    container: {{image: none, command: ['{at}/doppel-vote']}}\n"
    );
    std::fs::write(&file, text_of_file).unwrap();
    let output = doppel().args(["run", "--format", "json"]).arg(&file).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let already = |task: usize| json["tasks"][task]["already_done"].as_bool();
    assert_eq!((already(0), already(1)), (Some(false), Some(true)), "{json}");
}

#[test]
fn a_dry_run_tells_the_commands_and_starts_nothing() {
    let folder = TempDir::new().unwrap();
    let output = run(folder.path(), &[("a", "", 0, "touch here; echo it's")], &["--dry-run"]);
    assert_eq!(output.status.code(), Some(0));
    assert!(
        text(&output.stdout).starts_with("test: 1 tasks\na\n    sh -c 'touch here; echo it'\\''s"),
        "{}",
        text(&output.stdout)
    );
    assert!(!folder.path().join("here").exists());
}

#[test]
fn a_faulty_workflow_is_told_with_its_places_and_exit_code_2() {
    let folder = TempDir::new().unwrap();
    let tasks = [
        ("a", ", dependencies: [b], wen: x", 0, "true"),
        ("b", ", dependencies: [a]", 0, "echo {{workflow.parameters.wort}}"),
    ];
    let output = run(folder.path(), &tasks, &[]);
    assert_eq!(output.status.code(), Some(2));
    let told = text(&output.stderr);
    assert!(told.contains("workflow.yaml:11:") && told.contains("unknown field; did you mean `when`?"), "{told}");

    let tasks =
        [("a", ", dependencies: [b]", 0, "true"), ("b", ", dependencies: [a]", 0, "echo {{workflow.parameters.wort}}")];
    let told = text(&run(folder.path(), &tasks, &[]).stderr);
    assert!(told.contains("2 findings"), "{told}");
    assert!(told.contains("in a cycle: a → b → a") && told.contains("did you mean `word`?"), "{told}");

    let output = doppel().args(["run", "no/such/file.yaml"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
}

#[test]
fn the_preflight_tells_all_it_finds_before_anything_starts() {
    let folder = TempDir::new().unwrap();
    std::fs::write(folder.path().join("file"), "").unwrap();
    let file = folder.path().join("w.yaml");
    let ours = |name: &str, command: &str| {
        format!(
            "  - name: {name}\n    container:\n      image: none\n      command: {command}\n      volumeMounts: [{{name: m, mountPath: /no/such}}]\n"
        )
    };
    let text_of_file = format!(
        "apiVersion: argoproj.io/v1alpha1\nkind: Workflow\nmetadata: {{name: t}}\nspec:\n  entrypoint: main\n  templates:\n  \
         - name: main\n    dag:\n      tasks:\n      - {{name: first, template: first}}\n      - {{name: set, template: set}}\n      \
         - {{name: gone, template: gone}}\n  - name: first\n    container: {{image: none, command: [touch, started]}}\n{}{}",
        ours("set", "[doppel, budget, set, --corpus, c, --epsilon, many, --delta, '1e-5', --private, file]"),
        ours("gone", "[no-such-program-anywhere]"),
    );
    std::fs::write(&file, text_of_file).unwrap();
    let output = doppel().arg("run").arg(&file).current_dir(folder.path()).output().unwrap();
    let told = text(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{told}");
    for expected in [
        "nothing was started",
        "gone: the program `no-such-program-anywhere` is neither beside doppel nor on PATH",
        "- set, gone: /no/such is no folder of this machine",
        "set: invalid value 'many' for '--epsilon",
    ] {
        assert!(told.contains(expected), "{expected}\n{told}");
    }
    assert!(!told.contains("For more information"), "{told}");
    assert!(!folder.path().join("started").exists());
}

#[test]
fn the_preflight_finds_a_task_without_items_that_others_wait_for() {
    let folder = TempDir::new().unwrap();
    let none = FAN.replace("count: 3", "count: 0");
    let tasks = [("fan", none.as_str(), 0, "true"), ("last", ", dependencies: [fan]", 0, "touch last")];
    let output = run(folder.path(), &tasks, &[]);
    assert_eq!(output.status.code(), Some(2));
    let told = text(&output.stderr);
    assert!(told.contains("fan: expands to no task, though others wait for it"), "{told}");
    assert!(!folder.path().join("last").exists());
}

/// The task starts in its working folder, so the preflight must look there too.
#[test]
fn the_preflight_takes_relative_roots_from_the_working_folder() {
    let folder = TempDir::new().unwrap();
    std::fs::create_dir(folder.path().join("work")).unwrap();
    let file = folder.path().join("w.yaml");
    let text_of_file = "apiVersion: argoproj.io/v1alpha1\nkind: Workflow\nmetadata: {name: t}\nspec:\n  entrypoint: main\n  \
         templates:\n  - name: main\n    container:\n      image: none\n      workingDir: work\n      \
         command: [doppel, budget, set, --corpus=c, --epsilon=8, '--delta=1e-5', --private=private]\n";
    std::fs::write(&file, text_of_file).unwrap();
    let output = doppel().arg("run").arg(&file).current_dir(folder.path()).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert!(folder.path().join("work/private/ledger").exists() && !folder.path().join("private").exists());
}

/// A program of others may have a name like ours; the preflight must not do its work.
#[test]
fn a_program_of_others_runs_once() {
    use std::os::unix::fs::PermissionsExt;

    let folder = TempDir::new().unwrap();
    let program = folder.path().join("doppel-notify");
    std::fs::write(&program, "#!/bin/sh\necho ran >> ran\n").unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    let file = folder.path().join("w.yaml");
    let text_of_file = format!(
        "apiVersion: argoproj.io/v1alpha1\nkind: Workflow\nmetadata: {{name: t}}\nspec:\n  entrypoint: main\n  templates:\n  \
         - name: main\n    container: {{image: none, command: ['{}']}}\n",
        program.display()
    );
    std::fs::write(&file, text_of_file).unwrap();
    let output = doppel().arg("run").arg(&file).current_dir(folder.path()).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert_eq!(std::fs::read_to_string(folder.path().join("ran")).unwrap(), "ran\n");
}

#[test]
fn budgets_are_set_shown_and_plotted() {
    let folder = TempDir::new().unwrap();
    let budget = |args: &[&str]| {
        let output =
            doppel().arg("budget").args(args).args(["--private", "private"]).current_dir(folder.path()).output();
        let output = output.unwrap();
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    };
    for expected in ["the budget is", "done already; the budget is"] {
        let (code, told, _) = budget(&["set", "--corpus", "sharegpt", "--epsilon", "8", "--delta", "1e-5"]);
        assert_eq!((code, told), (Some(0), format!("sharegpt: {expected} ε = 8 at δ = 1e-5\n")));
    }
    let (code, _, error) = budget(&["--format", "json", "set"]);
    assert!(code == Some(3) && error.contains("help: flags stand behind `set`"), "{error}");
    let (code, told, _) = budget(&["sharegpt"]);
    assert_eq!(code, Some(0));
    assert!(told.starts_with("sharegpt: ε = 0.0000 of 8 at δ = 1e-5 spent"), "{told}");
    let (code, told, _) = budget(&["--corpus", "sharegpt", "--format", "json", "--plot", "b.svg"]);
    let json: serde_json::Value = serde_json::from_str(&told).unwrap();
    assert_eq!((code, &json["budget"]["epsilon"], &json["spent"]["pld"]), (Some(0), &8.0.into(), &0.0.into()));
    assert!(std::fs::read_to_string(folder.path().join("b.svg")).unwrap().contains("<svg"));
    let (code, _, told) = budget(&["sharegtp"]);
    assert_eq!(code, Some(3));
    assert!(told.contains("did you mean `sharegpt`?"), "{told}");
    // One that is broken does not hide the others.
    std::fs::create_dir(folder.path().join("private/ledger/broken")).unwrap();
    std::fs::write(folder.path().join("private/ledger/broken/00000000.json"), "{").unwrap();
    let (code, told, error) = budget(&[]);
    assert!(code == Some(3) && told.starts_with("sharegpt: ε = 0.0000 of 8"), "{told}");
    assert!(error.contains("ledger/broken/00000000.json"), "{error}");
    let (code, told, error) = budget(&["broken"]);
    assert!(code == Some(3) && told.is_empty() && error.contains("ledger/broken/00000000.json"), "{told}{error}");
    for (epsilon, delta, expected) in
        [("-1", "1e-5", "above 0"), ("inf", "1e-5", "above 0"), ("8", "1", "between 0 and 1")]
    {
        let (code, _, told) = budget(&["set", "--corpus", "x", "--epsilon", epsilon, "--delta", delta]);
        assert_eq!(code, Some(2));
        assert!(told.contains(expected), "{told}");
    }
}

/// Writes rows to a table of the private root `private` in `folder`.
async fn write_private(folder: &Path, path: &str, schema: SchemaRef, columns: Vec<ArrayRef>) {
    let url = folder.join("private").display().to_string();
    let table = PrivateRoot::open(&url, &StorageOptions::default()).await.unwrap().table(path);
    table.create(schema.clone()).await.unwrap();
    let rows = RecordBatch::try_new(schema, columns).unwrap();
    table.append(vec![rows], AppTransaction { id: path.to_owned(), version: 0 }).await.unwrap();
}

#[tokio::test]
async fn the_private_comparison_of_a_run_is_a_table_that_says_what_it_is() {
    let folder = TempDir::new().unwrap();
    let compare = |args: &[&str]| {
        let output = doppel().arg("compare").args(args).current_dir(folder.path()).output().unwrap();
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    };
    let losses: Vec<ArrayRef> = vec![
        Arc::new(Int64Array::from(vec![8, 0])),
        Arc::new(StringArray::from(vec!["validation", "validation"])),
        Arc::new(Float64Array::from(vec![3.6104, 3.8125])),
    ];
    write_private(folder.path(), "runs/demo/train/loss", schema::loss(), losses).await;
    let (code, told, _) = compare(&["demo", "--private", "private"]);
    assert_eq!(code, Some(0), "losses are there before the votes");
    assert!(!told.contains("total variation") && !told.contains("baseline"), "{told}");

    let baseline: Vec<ArrayRef> = vec![
        Arc::new(Int64Array::from(vec![8])),
        Arc::new(StringArray::from(vec!["validation"])),
        Arc::new(Float64Array::from(vec![2.75])),
    ];
    write_private(folder.path(), "runs/plain/train-baseline/loss", schema::loss(), baseline).await;
    let (code, told, complaint) = compare(&["plain", "--private", "private"]);
    assert_eq!(code, Some(0), "{complaint}");
    assert!(told.contains("validation loss of the baseline") && told.contains("2.750"), "{told}");
    let (_, told, _) = compare(&["plain", "--private", "private", "--format", "json"]);
    let json: serde_json::Value = serde_json::from_str(&told).unwrap();
    assert_eq!(json["baseline_validation_loss"], serde_json::json!([{ "steps": 8, "nats_per_token": 2.75 }]));
    assert_eq!(json["validation_loss"], serde_json::json!([]));

    let sets: Vec<ArrayRef> = vec![
        Arc::new(StringArray::from(vec!["base", "synthetic", "selected"])),
        Arc::new(Float64Array::from(vec![0.5126, 0.3, 0.21])),
    ];
    write_private(folder.path(), "runs/demo/comparison", schema::comparison(), sets).await;
    let (code, told, _) = compare(&["demo", "--private", "private"]);
    assert_eq!(code, Some(0));
    assert!(told.lines().next().is_some_and(|line| line.starts_with("PRIVATE figures")), "{told}");
    for row in ["base                 0.513", "selected             0.210", "before training", "3.812", "after 8 steps"]
    {
        assert!(told.contains(row), "{row}\n{told}");
    }
    let (_, told, _) = compare(&["demo", "--private", "private", "--format", "json"]);
    let json: serde_json::Value = serde_json::from_str(&told).unwrap();
    assert!(json["private"].as_str().is_some_and(|notice| notice.contains("do not publish")));
    assert_eq!(json["sets"][1], serde_json::json!({ "set": "synthetic", "total_variation": 0.3 }));
    assert_eq!(json["validation_loss"][0], serde_json::json!({ "steps": 0, "nats_per_token": 3.8125 }));

    let (code, told, complaint) = compare(&["nowhere", "--private", "private"]);
    assert_eq!((code, told.as_str()), (Some(3), ""));
    assert!(
        complaint.contains("the run `nowhere` has no comparison here") && complaint.contains("help:"),
        "{complaint}"
    );
    assert_eq!(compare(&["demo"]).0, Some(2), "there is no private root by default");
}

#[test]
fn accounting_gives_the_checked_values() {
    // Yu et al. 2024: q = 4096/180000, 439 steps; dp_accounting's values, see the design.
    let training = "noise_multiplier=1.1220,sampling_probability=0.022755555555555557,steps=439";
    let account = |args: &[&str]| {
        let output = doppel().args(["account", "--delta", "5e-7", "--format", "json"]).args(args).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
        serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap()
    };
    let close = |value: &serde_json::Value, expected: f64| (value.as_f64().unwrap() - expected).abs() < 0.005;
    let json = account(&["--mechanism", training]);
    assert!(close(&json["epsilon"]["pld"], 2.860) && close(&json["epsilon"]["rdp"], 3.161), "{json}");
    let json = account(&["--mechanism", training, "--mechanism", "noise_multiplier=10"]);
    assert!(close(&json["epsilon"]["pld"], 2.897), "{json}");
    let open = "sampling_probability=0.022755555555555557,steps=439";
    let json = account(&["--mechanism", open, "--target-epsilon", "2.860"]);
    assert!((json["noise_multiplier"].as_f64().unwrap() - 1.122).abs() < 0.002, "{json}");
    assert!(json["epsilon"]["pld"].as_f64().unwrap() <= 2.860, "{json}");
    let closed = ["account", "--delta", "5e-7", "--mechanism", training, "--target-epsilon", "8"];
    let output = doppel().args(closed).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("no --mechanism leaves it out\nhelp: "), "{}", text(&output.stderr));
}

#[test]
fn a_trade_off_curve_is_a_table_and_a_plot() {
    let folder = TempDir::new().unwrap();
    let args = ["account", "--delta", "1e-5", "--mechanism", "noise_multiplier=10", "--curve", "c.png"];
    let output = doppel().args(args).current_dir(folder.path()).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert!(text(&output.stdout).lines().count() > 20);
    assert!(std::fs::read(folder.path().join("c.png")).unwrap().starts_with(b"\x89PNG"));
}

#[test]
fn a_plan_says_what_is_feasible_and_why_the_rest_is_not() {
    let args = [
        "plan",
        "--records",
        "7168",
        "--target-epsilon",
        "7.5",
        "--delta",
        "1e-5",
        "--expected-batch-size",
        "64,512",
        "--steps",
        "8",
        "--parameters",
        "230400",
        "--format",
        "json",
    ];
    let output = doppel().args(args).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let settings = json["settings"].as_array().unwrap();
    assert_eq!((&settings[0]["feasible"], &settings[1]["feasible"]), (&false.into(), &true.into()), "{json}");
    assert!(settings[0]["why_not"].as_str().unwrap().contains("drowns"));

    let output =
        doppel().args(["plan", "--records", "1000", "--target-epsilon", "1", "--delta", "0.1"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("choose below"));
}

#[test]
fn misuse_is_exit_code_2() {
    for args in [
        &["frobnicate"][..],
        &[],
        &["run"],
        &["run", "x.yaml", "-p", "novalue"],
        &["budget", "--corpus", "x"],
        &["account", "--delta", "2", "--mechanism", "noise_multiplier=1"],
        &["account", "--delta", "1e-5", "--mechanism", "noise_multiplier=-1"],
        &["runs"],
    ] {
        let output = doppel().args(args).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{args:?}: {}", text(&output.stderr));
        assert!(output.stdout.is_empty(), "{args:?}");
    }
}

#[test]
fn a_new_release_needs_a_run_id_of_its_own() {
    let folder = TempDir::new().unwrap();
    let rerun = |new: &str| {
        let args = ["rerun", "demo", "--as", new, "--private", "private", "--release", "release"];
        let output = doppel().args(args).current_dir(folder.path()).output().unwrap();
        (output.status.code(), text(&output.stderr))
    };
    let (code, told) = rerun("demo");
    assert_eq!(code, Some(2), "{told}");
    assert!(told.contains("a new release needs a run id of its own") && told.contains("help:"), "{told}");
    // With another run id, what is wrong is that there is no run to repeat.
    let (code, told) = rerun("again");
    assert_eq!(code, Some(3), "{told}");
}

#[test]
fn a_stage_is_called_by_its_name() {
    let folder = TempDir::new().unwrap();
    let binary = folder.path().join("doppel-vote");
    std::fs::write(&binary, "#!/bin/sh\necho vote \"$@\"\nexit 4\n").unwrap();
    let mut permissions = std::fs::metadata(&binary).unwrap().permissions();
    std::os::unix::fs::PermissionsExt::set_mode(&mut permissions, 0o755);
    std::fs::set_permissions(&binary, permissions).unwrap();
    // A copy of the front, so that only this stage lies beside it.
    let front = folder.path().join("doppel");
    std::fs::copy(env!("CARGO_BIN_EXE_doppel"), &front).unwrap();
    let output = Command::new(&front).args(["vote", "--help", "x y"]).output().unwrap();
    assert_eq!((output.status.code(), text(&output.stdout).as_str()), (Some(4), "vote --help x y\n"));
    // The front's own help knows no flag of a stage.
    let output = Command::new(&front).args(["help", "vote"]).output().unwrap();
    assert_eq!((output.status.code(), text(&output.stdout).as_str()), (Some(4), "vote --help\n"));
    let output = Command::new(&front).args(["help", "run"]).output().unwrap();
    assert!(text(&output.stdout).contains("Usage: doppel run"), "{}", text(&output.stdout));
    let output = Command::new(&front).arg("train").env("PATH", folder.path()).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("doppel-train is neither beside doppel nor on PATH"));
}

#[test]
fn a_root_that_holds_nothing_is_not_taken_for_one_without_runs() {
    let folder = TempDir::new().unwrap();
    let events = folder.path().join("events.jsonl");
    std::fs::write(&events, "{}").unwrap();
    for args in [
        &["runs", "--release", "relaese"][..],
        &["budget", "--private", "relaese"],
        &["openlineage", "--release", "relaese", "--to", "events.jsonl"],
    ] {
        let output = doppel().args(args).current_dir(folder.path()).output().unwrap();
        assert_eq!((output.status.code(), output.stdout.as_slice()), (Some(3), &b""[..]), "{args:?}");
        let told = text(&output.stderr);
        assert!(told.contains("/relaese: nothing is there\nhelp: "), "{told}");
    }
    assert_eq!(std::fs::read(&events).unwrap(), b"{}");
    // One of them may not have been written to yet.
    std::fs::create_dir(folder.path().join("private")).unwrap();
    std::fs::write(folder.path().join("private/object"), "").unwrap();
    let both = ["runs", "--private", "private", "--release", "release"];
    let output = doppel().args(both).current_dir(folder.path()).output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert!(text(&output.stdout).starts_with("no runs in file://"), "{}", text(&output.stdout));
    let output = doppel().args(["show", "demo", "--release", "release"]).current_dir(folder.path()).output().unwrap();
    assert_eq!(output.status.code(), Some(3));
}

/// The workflows of this repository expand, with every command as the stages take it.
#[test]
fn our_workflows_expand() {
    let workflows = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../workflows");
    for (file, tasks) in [("demo.yaml", 14), ("chatbot-arena-13b.yaml", 69), ("chatbot-arena-7b.yaml", 69)] {
        let mut command = doppel();
        command.args(["run", "--dry-run", "--format", "json"]).arg(workflows.join(file));
        for name in ["input", "model", "encoder", "private", "release"] {
            command.args(["-p", &format!("{name}=s3://lake/{name}")]);
        }
        let output = command.output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{file}: {}", text(&output.stderr));
        let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(json["tasks"].as_array().unwrap().len(), tasks, "{file}");
    }
}
