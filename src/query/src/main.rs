//! `doppel-query`: SQL over the release zone.

use std::process::ExitCode;

fn main() -> ExitCode {
    stage::main("query", doppel_query::Args::options, doppel_query::run)
}
