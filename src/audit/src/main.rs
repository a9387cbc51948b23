//! `doppel-audit`: an empirical lower bound on the ε of training.

use std::process::ExitCode;

fn main() -> ExitCode {
    lm::tune_memory();
    stage::main("audit", doppel_audit::Args::mechanism, doppel_audit::run)
}
