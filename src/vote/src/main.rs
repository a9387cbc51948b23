//! The edge of vote: flags in, exit code out.

use std::process::ExitCode;

fn main() -> ExitCode {
    stage::main("vote", doppel_vote::Config::new, doppel_vote::run)
}
