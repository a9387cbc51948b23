//! `doppel-embed`: one vector per text.

use std::process::ExitCode;

fn main() -> ExitCode {
    stage::main("embed", doppel_embed::run)
}
