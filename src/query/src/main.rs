//! `doppel-query`: SQL over the release zone.

use std::process::ExitCode;
use std::thread;

/// Twice what [`doppel_query::session::MOST_VALUES`] need; only what is used is taken.
const STACK: usize = 1 << 28;

fn main() -> ExitCode {
    let main = || stage::main("query", doppel_query::Args::options, doppel_query::run);
    let thread = thread::Builder::new().name("main".into()).stack_size(STACK).spawn(main);
    thread.ok().and_then(|thread| thread.join().ok()).unwrap_or(ExitCode::FAILURE)
}
