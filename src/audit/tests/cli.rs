//! What a user of `doppel-audit` sees: a table, JSON, exit codes.

use assert_cmd::Command;
use serde_json::Value;

fn audit(flags: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_doppel-audit"));
    command.env_clear().envs(std::env::var_os("LD_LIBRARY_PATH").map(|path| ("LD_LIBRARY_PATH", path)));
    if !flags.contains(&"--canaries") {
        command.args(["--canaries", "500"]);
    }
    command.args(flags);
    command
}

#[test]
fn the_default_is_a_table_with_claim_and_bound() {
    let output = audit(&[]).assert().success().get_output().clone();
    let text = String::from_utf8(output.stdout).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    assert!(lines[0].ends_with("claimed ε  lower bound"), "{text}");
    assert!(lines[1].starts_with("each step") && lines[2].starts_with("one run"), "{text}");
    // The ε of q = 0.1, σ = 2, 40 steps at δ = 1e-5 by dp_accounting 0.6: 1.484; of one step: 0.369.
    assert!(lines[1].contains("0.369") && lines[2].contains("1.484"), "{text}");
}

#[test]
fn json_has_every_figure_and_one_seed_one_answer() {
    let flags = ["--format", "json", "--sampling-probability", "0.5", "--steps", "5", "--seed", "7"];
    let run = || audit(&flags).assert().success().get_output().stdout.clone();
    let output = run();
    assert_eq!(output, run());
    let report: Value = serde_json::from_slice(&output).unwrap();
    assert_eq!(report["refuted"], false);
    assert_eq!(report["confidence"], 0.95);
    assert_eq!(report["mechanism"]["steps"], 5);
    let audits = report["audits"].as_array().unwrap();
    assert_eq!(audits.len(), 2);
    for audit in audits {
        let figure = |name: &str| audit[name].as_f64().unwrap();
        assert!(figure("lower_bound") < figure("claimed_epsilon"), "{audit}");
        assert!(figure("right") <= figure("guesses") && figure("guesses") <= figure("canaries"), "{audit}");
    }
}

#[test]
fn a_model_can_be_audited_too() {
    let folder = tempfile::tempdir().unwrap();
    scenarios::models::write_llama(folder.path(), 1).unwrap();
    let model = folder.path().to_str().unwrap();
    let flags = ["--format", "json", "--steps", "3", "--model", model];
    let output = audit(&flags).assert().success().get_output().clone();
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["audits"][2]["audit"], "one run of the model");
    assert_eq!(report["audits"][2]["canaries"], 500);
}

#[test]
fn misuse_and_a_missing_model_have_their_exit_codes() {
    audit(&["--noise-multiplier", "0"]).assert().code(2);
    audit(&["--canaries", "1"]).assert().code(2);
    let output = audit(&["--model", "no/such/folder"]).assert().code(3).get_output().clone();
    assert!(String::from_utf8(output.stderr).unwrap().contains("no/such/folder"));
}
