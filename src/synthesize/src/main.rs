//! `doppel-synthesize`: sample synthetic instructions.

use std::process::ExitCode;

fn main() -> ExitCode {
    stage::main("synthesize", doppel_synthesize::run)
}
