//! `doppel-audit`: an empirical lower bound on the ε of training.

use std::process::ExitCode;

fn main() -> ExitCode {
    stage::main("audit", doppel_audit::run)
}
