//! The binaries under test: those beside the running test, which `make test` builds first.

use std::path::PathBuf;
use std::process::{Command, Output};

/// The binary `name`, such as `doppel-train`. Panics with what to do when it is not built.
pub fn path(name: &str) -> PathBuf {
    // A test runs as target/<profile>/deps/<test>-<hash>; binaries lie one folder up.
    let test = std::env::current_exe().expect("a test knows its own path");
    let folder = test.ancestors().nth(2).expect("a test lies in a target folder");
    let binary = folder.join(name);
    assert!(binary.exists(), "{}: not built; run `make test`, or `cargo build --workspace --bins`", binary.display());
    binary
}

/// A command that runs the binary `name` with nothing of the user's environment that would change what it does.
pub fn command(name: &str) -> Command {
    let mut command = Command::new(path(name));
    for (variable, _) in std::env::vars().filter(|(name, _)| name.starts_with("DOPPEL_") || name.starts_with("OTEL_")) {
        command.env_remove(variable);
    }
    command.env_remove("TRACEPARENT").env_remove("RUST_LOG");
    command
}

/// Runs a command to its end and checks its exit code. A panic shows what it printed.
#[track_caller]
pub fn run(command: &mut Command, exit_code: i32) -> Ran {
    let Output { status, stdout, stderr } = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    let ran = Ran { stdout: text(stdout), stderr: text(stderr) };
    let found = status.code();
    assert_eq!(found, Some(exit_code), "{command:?}\n{}\n{}", ran.stdout, ran.stderr);
    ran
}

/// What a command printed.
#[derive(Debug)]
pub struct Ran {
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Ran {
    /// Standard output as JSON.
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}:\n{}", self.stdout))
    }
}
