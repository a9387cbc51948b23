//! Exit codes that no [`Failure`] stands for: a run that a signal stopped, or whose command failed with a code of its
//! own.

use std::process::ExitCode;
use std::sync::atomic::{AtomicU8, Ordering};

use stage::{Failure, Summary};
use tokio::signal::unix::{SignalKind, signal};

/// 0: none.
static CODE: AtomicU8 = AtomicU8::new(0);

/// Ends the process with `code` rather than that of its failure.
pub fn with(code: u8) {
    CODE.store(code, Ordering::Relaxed);
}

/// The code set by [`with`].
pub fn code() -> Option<ExitCode> {
    match CODE.load(Ordering::Relaxed) {
        0 => None,
        code => Some(ExitCode::from(code)),
    }
}

/// Does `work` until SIGINT or SIGTERM: for commands that leave nothing half-done.
pub async fn on_signal(work: impl Future<Output = Result<Summary, Failure>>) -> Result<Summary, Failure> {
    let watch = |kind| signal(kind).map_err(|error| Failure::Transient(format!("cannot watch signals: {error}")));
    let (mut interrupt, mut terminate) = (watch(SignalKind::interrupt())?, watch(SignalKind::terminate())?);
    let code = tokio::select! {
        result = work => return result,
        _ = interrupt.recv() => 130,
        _ = terminate.recv() => 143,
    };
    with(code);
    Err(Failure::Transient("stopped by a signal".to_owned()))
}
