//! The contract of every stage binary, by running one: exit codes, streams, signals, telemetry.

use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

// By path: the crate `scenarios` builds on the stages, so that depending on it here would go in a circle.
#[path = "../../../tests/src/otlp.rs"]
mod otlp;

use otlp::Collector;

/// The example `doppel_probe`, which `cargo test` builds beside this test.
fn probe() -> Command {
    let test = std::env::current_exe().unwrap();
    let program: PathBuf = test.parent().and_then(|deps| deps.parent()).unwrap().join("examples/doppel_probe");
    assert!(program.exists(), "{} is not built\nhelp: cargo test -p stage, without --test", program.display());
    let mut command = Command::new(program);
    for (name, _) in std::env::vars() {
        if name.starts_with("OTEL_") || name.starts_with("DOPPEL_") || name.starts_with("TRACE") || name == "RUST_LOG" {
            command.env_remove(name);
        }
    }
    command
}

fn run(arguments: &[&str]) -> Output {
    probe().args(["--run", "r1"]).args(arguments).output().unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// The lines of the log, without the failure's text.
fn log(output: &Output) -> Vec<Value> {
    stderr(output).lines().map_while(|line| serde_json::from_str(line).ok()).collect()
}

#[test]
fn the_summary_is_a_sentence_or_one_json_object() {
    let text = run(&[]);
    assert_eq!((text.status.code(), stdout(&text).as_str()), (Some(0), "probe: done\n"));
    let json = run(&["--format", "json"]);
    assert_eq!((json.status.code(), stdout(&json).as_str()), (Some(0), "{\"stage\":\"probe\"}\n"));
}

#[test]
fn each_failure_has_its_exit_code_and_its_text_on_standard_error() {
    let output = run(&["--behave", "fail-on-input"]);
    assert_eq!((output.status.code(), stdout(&output).as_str()), (Some(3), ""));
    assert!(stderr(&output).ends_with("error: corpus: row 7 has no text\nhelp: drop it\n"), "{}", stderr(&output));
    assert_eq!(run(&["--behave", "refuse"]).status.code(), Some(4));
    assert_eq!(run(&["--behave", "nonsense"]).status.code(), Some(2));
    assert_eq!(run(&["--run", "a/b"]).status.code(), Some(2));
    assert_eq!(probe().output().unwrap().status.code(), Some(2), "a run id is needed");
    let output = probe().args(["--run", "r1"]).env("RUST_LOG", "lake=loud").output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
}

#[test]
fn flags_and_their_values_can_be_checked_without_the_work() {
    let check = |arguments: &[&str]| {
        let output = probe().args(arguments).env("DOPPEL_CHECK_FLAGS", "1").output().unwrap();
        (output.status.code(), stdout(&output), stderr(&output))
    };
    assert_eq!(check(&["--run", "r1", "--behave", "fail-on-input"]), (Some(0), String::new(), String::new()));
    let (code, _, told) = check(&["--run", "r1", "--behave", "be-misconfigured"]);
    assert_eq!((code, told.as_str()), (Some(2), "error: --behave be-misconfigured: expected anything else\n"));
    assert_eq!(check(&["--run", "a/b"]).0, Some(2));
    assert_eq!(run(&["--behave", "be-misconfigured"]).status.code(), Some(2), "the work begins with the same check");
}

#[test]
fn help_and_version_go_to_standard_output() {
    let version = probe().arg("--version").output().unwrap();
    assert_eq!(version.status.code(), Some(0));
    assert!(stdout(&version).starts_with(concat!("doppel-probe ", env!("CARGO_PKG_VERSION"))), "{}", stdout(&version));
    let help = probe().arg("--help").env("DOPPEL_PRIVATE", "s3://key:SECRET@bucket").output().unwrap();
    assert_eq!(help.status.code(), Some(0));
    assert!(stdout(&help).contains("Usage: doppel-probe") && !stdout(&help).contains("SECRET"));
}

#[test]
fn a_panic_is_a_bug_whose_message_is_withheld_where_private_data_may_be_in_it() {
    let output = run(&["--behave", "panic", "--private", "/nowhere"]);
    assert_eq!(output.status.code(), Some(1));
    let text = stderr(&output);
    assert!(text.contains("doppel-probe: bug at ") && text.contains("doppel_probe.rs:"), "{text}");
    assert!(!text.contains("PLANTED"), "{text}");
    let output = run(&["--behave", "panic"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("PLANTED"), "release zone only: {}", stderr(&output));
}

#[test]
fn logs_are_json_lines_elsewhere_and_other_crates_do_not_quote_data() {
    let output = run(&["--behave", "log", "--private", "/nowhere", "-vvv"]);
    let lines = log(&output);
    assert_eq!(lines.len(), stderr(&output).lines().count(), "{}", stderr(&output));
    assert!(lines.iter().any(|line| line["message"] == "ours" && line["rows"] == 3), "{lines:?}");
    assert!(lines.iter().any(|line| line["target"] == "parquet"), "{lines:?}");
    assert!(!stderr(&output).contains("PLANTED"));
    let quiet = run(&["--behave", "log", "-q", "--private", "/nowhere"]);
    assert!(!stderr(&quiet).contains("ours"), "{}", stderr(&quiet));
    // Nobody draws bars for whoever reads text through a pipe, so that lines must tell how far the work is.
    let text = run(&["--behave", "log", "--log-format", "text"]);
    assert!(stderr(&text).contains(" ours rows=3\n"), "{}", stderr(&text));
    let text = run(&["--log-format", "text"]);
    for expected in [" INFO  progress begins label=\"sample\"", " INFO  work begins label=\"count votes\""] {
        assert!(stderr(&text).contains(expected), "{expected}\n{}", stderr(&text));
    }
}

#[test]
fn a_closed_reader_is_no_failure() {
    let mut child = probe().args(["--run", "r1"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
}

#[test]
fn a_signal_ends_even_work_that_never_awaits() {
    for (signal, code) in [("HUP", 129), ("INT", 130), ("TERM", 143)] {
        let temporary = tempfile::tempdir().unwrap();
        let mut command = probe();
        command.env("TMPDIR", temporary.path());
        command.args(["--run", "r1", "--behave", "spin"]).stdout(Stdio::piped()).stderr(Stdio::piped());
        // SAFETY: `signal` may be called between fork and exec. The tests themselves may run under `nohup`.
        unsafe {
            command.pre_exec(|| {
                libc::signal(libc::SIGHUP, libc::SIG_DFL);
                Ok(())
            })
        };
        let mut child = command.spawn().unwrap();
        let mut out = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        out.read_line(&mut line).unwrap();
        assert_eq!(line, "spinning\n");
        let copies = || std::fs::read_dir(temporary.path()).unwrap().count();
        assert_eq!(copies(), 1);
        let asked = Instant::now();
        let sent = Command::new("kill").args(["-s", signal, &child.id().to_string()]).status().unwrap();
        assert!(sent.success());
        let status = child.wait().unwrap();
        let mut text = String::new();
        child.stderr.take().unwrap().read_to_string(&mut text).unwrap();
        assert_eq!(status.code(), Some(code), "{text}");
        assert!(asked.elapsed() < Duration::from_secs(3), "{:?}", asked.elapsed());
        assert!(text.contains("the same command continues"), "{text}");
        assert_eq!(copies(), 0, "copies stay behind");
    }
}

#[test]
fn what_ignores_the_end_of_its_terminal_outlives_it() {
    let probe = probe();
    let mut command = Command::new("sh");
    // As `nohup` does it.
    command.args(["-c", r#"trap '' HUP; exec "$0" "$@""#]).arg(probe.get_program());
    for (name, _) in probe.get_envs() {
        command.env_remove(name);
    }
    command.args(["--run", "r1", "--behave", "spin"]).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "spinning\n");
    for signal in ["HUP", "TERM"] {
        assert!(Command::new("kill").args(["-s", signal, &child.id().to_string()]).status().unwrap().success());
    }
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(143), "{}", stderr(&output));
}

#[test]
fn the_log_tells_the_exit_code_that_the_process_has() {
    let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
    let output = probe().args(["--run", "r1"]).stdout(full).output().unwrap();
    assert_eq!(output.status.code(), Some(5), "{}", stderr(&output));
    let lines = log(&output);
    let end = lines.iter().find(|line| line["message"] == "stage ended").unwrap_or_else(|| panic!("{lines:?}"));
    assert_eq!((&end["exit_code"], &end["outcome"]), (&Value::from(5), &Value::from("transient")));
}

#[test]
fn roots_are_needed_and_must_lie_apart() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_string();
    let (private, release, nested) = (path("private"), path("release"), path("private/release"));
    let open = |roots: &[&str]| run(&[&["--behave", "open-roots"], roots].concat());
    assert_eq!(open(&["--private", &private, "--release", &release]).status.code(), Some(0));
    let output = open(&["--release", &release]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("no private root is given\nhelp: pass --private URL, or set DOPPEL_PRIVATE"));
    for release in [&private, &nested] {
        assert_eq!(open(&["--private", &private, "--release", release]).status.code(), Some(2));
    }
    std::fs::create_dir(&private).unwrap();
    std::fs::write(format!("{private}/zone.json"), r#"{"zone": "private"}"#).unwrap();
    let output = open(&["--private", &release, "--release", &private]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("were --private and --release swapped?"), "{}", stderr(&output));
    assert!(!std::path::Path::new(&release).exists(), "something was written");
}

#[test]
fn spans_and_metrics_of_a_run_reach_the_collector_in_one_trace() {
    let collector = Collector::start().unwrap();
    let (trace, parent) = ("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331");
    let output = probe()
        .args(["--run", "r1"])
        .envs(collector.env())
        .env("TRACEPARENT", format!("00-{trace}-{parent}-01"))
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let spans = collector.spans();
    let find = |name: &str| spans.iter().find(|span| span.name == name).unwrap_or_else(|| panic!("{name}: {spans:?}"));
    let (stage, phase) = (find("doppel.probe"), find("sample"));
    assert_eq!((stage.trace.as_str(), stage.parent.as_str(), stage.status), (trace, parent, 1));
    assert_eq!((&phase.trace, &phase.parent), (&stage.trace, &stage.id));
    assert_eq!(stage.service, "doppel-probe");
    assert_eq!((stage.attributes["run"].as_str(), stage.attributes["outcome"].as_str()), ("r1", "done"));
    assert_eq!(phase.attributes["doppel.rows"], "40");

    let metrics = collector.metrics();
    let find = |name: &str| metrics.iter().find(|metric| metric.name == name).unwrap_or_else(|| panic!("{metrics:?}"));
    assert_eq!(find("doppel.tokens").sum, 75.0, "resumed work counts once");
    assert_eq!(find("doppel.rows").sum, 40.0);
    assert!(find("doppel.tokens.rate").sum > 0.0);
    let duration = find("doppel.stage.duration");
    assert!(duration.sum > 0.0 && duration.sum < 60.0);
    assert_eq!(duration.attributes[0]["outcome"], "done");
}

#[test]
fn processes_side_by_side_are_told_apart() {
    let collector = Collector::start().unwrap();
    let run = |attributes: &str| {
        let mut command = probe();
        command.args(["--run", "r1"]).envs(collector.env()).env("OTEL_RESOURCE_ATTRIBUTES", attributes);
        assert_eq!(command.output().unwrap().status.code(), Some(0));
        let metrics = collector.metrics();
        metrics.into_iter().rfind(|metric| metric.name == "doppel.rows").unwrap().instance
    };
    let (one, other) = (run(""), run("deployment.environment=test"));
    assert!(!one.is_empty() && !other.is_empty() && one != other, "{one:?} {other:?}");
    assert_eq!(run("a=b, service.instance.id=mine"), "mine");
}

#[test]
fn a_stage_that_a_signal_ends_is_told_like_any_other() {
    let collector = Collector::start().unwrap();
    let mut command = probe();
    command.args(["--run", "r1", "--behave", "spin"]).envs(collector.env());
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "spinning\n");
    assert!(Command::new("kill").args(["-s", "TERM", &child.id().to_string()]).status().unwrap().success());
    assert_eq!(child.wait().unwrap().code(), Some(143));
    let spans = collector.spans();
    let stage = spans.iter().find(|span| span.name == "doppel.probe").unwrap_or_else(|| panic!("{spans:?}"));
    let told = (stage.status, stage.attributes["outcome"].as_str(), stage.attributes["exit_code"].as_str());
    assert_eq!(told, (2, "stopped", "143"));
    let metrics = collector.metrics();
    let duration = metrics.iter().find(|metric| metric.name == "doppel.stage.duration").unwrap();
    assert_eq!(duration.attributes[0]["outcome"], "stopped");
}

#[test]
fn a_failed_stage_ends_its_span_with_its_kind_but_not_its_text() {
    let collector = Collector::start().unwrap();
    let output = probe().args(["--run", "r1", "--behave", "fail-on-input"]).envs(collector.env()).output().unwrap();
    assert_eq!(output.status.code(), Some(3));
    let spans = collector.spans();
    assert_eq!((spans[0].status, spans[0].attributes["outcome"].as_str()), (2, "input"), "{spans:?}");
    assert!(!collector.text().contains("row 7"), "{}", collector.text());
}

#[test]
fn a_child_process_is_handed_the_trace() {
    let collector = Collector::start().unwrap();
    let output = probe().args(["--run", "r1", "--behave", "print-child-env"]).envs(collector.env()).output().unwrap();
    let span = &collector.spans()[0];
    let expected = format!("TRACEPARENT=00-{}-{}-01", span.trace, span.id);
    assert!(stdout(&output).contains(&expected), "{expected} in {}", stdout(&output));
    assert_eq!(stdout(&run(&["--behave", "print-child-env"])), "probe: done\n", "no trace, nothing to hand on");
}

#[test]
fn other_crates_and_their_data_stay_out_of_the_trace() {
    let collector = Collector::start().unwrap();
    let mut command = probe();
    command.args(["--run", "r1", "--behave", "log", "--private", "/nowhere", "-vvv"]).env("RUST_LOG", "trace");
    let output = command.envs(collector.env()).output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert!(!collector.spans().is_empty());
    assert!(!format!("{}{}", collector.text(), stderr(&output)).contains("PLANTED"));
}

#[test]
fn a_collector_that_is_not_there_costs_seconds_and_no_failure() {
    // A listener that takes connections and never answers.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let refused = {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap()
    };
    for address in [silent.local_addr().unwrap(), refused] {
        let started = Instant::now();
        let mut command = probe();
        command.args(["--run", "r1"]).env("OTEL_EXPORTER_OTLP_ENDPOINT", format!("http://{address}"));
        let output = command.output().unwrap();
        assert_eq!((output.status.code(), stdout(&output).as_str()), (Some(0), "probe: done\n"));
        assert!(started.elapsed() < Duration::from_secs(8), "{:?}", started.elapsed());
    }
}

#[test]
fn an_unsupported_protocol_is_a_warning() {
    let mut command = probe();
    command.args(["--run", "r1"]).env("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9");
    let output = command.env("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc").output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert!(stderr(&output).contains("OTLP protocol `grpc` is not supported"), "{}", stderr(&output));
}
