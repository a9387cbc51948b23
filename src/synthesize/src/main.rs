//! `doppel-synthesize`: sample synthetic instructions.

use std::process::ExitCode;

fn main() -> ExitCode {
    lm::tune_memory();
    stage::main("synthesize", doppel_synthesize::Args::config, doppel_synthesize::run)
}
