//! The binaries of the stages: where they are, and becoming one.

use std::ffi::{OsStr, OsString};
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

/// Stages in the order of the pipeline, then the audit, which is called as they are.
pub const STAGES: [&str; 7] = ["partition", "train", "synthesize", "embed", "vote", "query", "audit"];

/// The stage that the words of a command line call, and what it is given: after `help`, too, since the stage alone
/// knows its flags.
pub fn called(words: &[OsString]) -> Option<(&'static str, Vec<OsString>)> {
    match words {
        [help, name] if help == "help" => Some((named(name)?, vec!["--help".into()])),
        [name, args @ ..] => Some((named(name)?, args.to_vec())),
        [] => None,
    }
}

fn named(name: &OsStr) -> Option<&'static str> {
    STAGES.into_iter().find(|stage| name == *stage)
}

/// Folders that are searched for a stage's binary before `PATH`: that of this binary.
pub fn folders() -> Vec<PathBuf> {
    let here = std::env::current_exe().ok().and_then(|exe| exe.parent().map(PathBuf::from));
    here.into_iter().collect()
}

/// Replaces this process with the stage's binary; returns only if that fails.
pub fn become_stage(stage: &str, args: &[OsString]) -> ExitCode {
    let name = format!("doppel-{stage}");
    let reason = match workflow::run::find_program(&name, &folders()) {
        None => format!(
            "the binary {name} is neither beside doppel nor on PATH\nhelp: install it, or build it with `make build`"
        ),
        Some(program) => {
            let error = Command::new(&program).args(args).exec();
            format!("{}: {error}", program.display())
        }
    };
    // Nothing else can be told, and a closed standard error is no reason to panic.
    let _ = writeln!(std::io::stderr(), "error: {reason}");
    ExitCode::from(2)
}
