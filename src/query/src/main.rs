//! `doppel-query`: SQL over the release zone.

use std::process::ExitCode;
use std::thread;

/// Twice what [`doppel_query::session::MOST_VALUES`] need; only what is used is taken.
const STACK: usize = 1 << 28;

fn main() -> ExitCode {
    let main = || stage::main("query", doppel_query::Args::options, doppel_query::run);
    match thread::Builder::new().name("main".into()).stack_size(STACK).spawn(main) {
        Ok(thread) => thread.join().unwrap_or(ExitCode::FAILURE),
        // Where addresses are limited, most queries do with less.
        Err(_) => main(),
    }
}
