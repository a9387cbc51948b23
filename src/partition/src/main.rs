//! The edge of partition: flags in, exit code out.

use std::process::ExitCode;

fn main() -> ExitCode {
    stage::main("partition", doppel_partition::Config::new, doppel_partition::run)
}
