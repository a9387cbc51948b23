//! `doppel-query`: SQL over the release zone.

use std::process::ExitCode;

fn main() -> ExitCode {
    stage::main::<doppel_query::Args, _>("query", doppel_query::run)
}
