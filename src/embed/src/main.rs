//! `doppel-embed`: one vector per text.

use std::process::ExitCode;

fn main() -> ExitCode {
    lm::tune_memory();
    stage::main("embed", doppel_embed::Args::config, doppel_embed::run)
}
