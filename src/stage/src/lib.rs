//! The shell that every stage binary shares: flags, exit codes, logs, telemetry, progress.
//!
//! It is here so that every binary keeps the stage contract in the same way, and so that there is one place where a
//! leak would have to happen. It must never know a mechanism, a model or a record. A stage's `main.rs` is
//! `stage::main("train", doppel_train::Args::config, doppel_train::run)`; the rest lives in its `lib.rs`. Start reading
//! at [`shell`].
//!
//! # Exit codes
//! | code | meaning |
//! |---|---|
//! | 0 | done, or done already |
//! | 1 | a bug of ours, panics included |
//! | 2 | wrong usage or configuration |
//! | 3 | an input is missing or malformed |
//! | 4 | refused by the privacy budget |
//! | 5 | storage or network: safe to retry |
//! | 129, 130, 143 | ended by SIGHUP, SIGINT, SIGTERM, as shells and schedulers expect; running it again continues |
//!
//! # What may leave
//! Standard output carries data or one summary. Standard error carries a failure as text, and logs: for people on a
//! terminal, one JSON object per line elsewhere (`--log-format` decides otherwise). About private records a stage can
//! tell a label and elapsed time ([`PrivateProgress`]); numbers leave as [`telemetry::Fact`] or [`Progress`] only.

mod binary;
pub mod command;
pub mod common;
pub mod failure;
mod logging;
mod outcome;
pub mod progress;
mod shard;
pub mod shell;
pub mod signals;
pub mod telemetry;

pub use binary::binary;
pub use command::{PLACE, base_name, command};
pub use common::{Common, Format, is_rerun};
pub use failure::Failure;
pub use logging::Verbosity;
pub use outcome::{Summary, print, tells_already_done};
pub use progress::{PrivateProgress, Progress};
pub use shard::{Shard, transaction};
pub use shell::{Shell, main};
