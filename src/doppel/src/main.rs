//! `doppel`: the front. Runs workflows, answers for the ledger, calls the stages.

use std::process::ExitCode;

use stage::Failure;
use stage::shell::Shell;

fn main() -> ExitCode {
    let words: Vec<_> = std::env::args_os().skip(1).collect();
    if let Some((stage, args)) = doppel::stages::called(&words) {
        return doppel::stages::become_stage(stage, &args);
    }
    // Whatever can be said of the values of its flags, the parsers of those say.
    Shell::new("doppel").leave_signals().run(|_| Ok::<_, Failure>(()), doppel::run)
}
