//! How signals end the front.

use stage::{Failure, Summary};
use tokio::signal::unix::{SignalKind, signal};

/// Does `work` until SIGINT or SIGTERM: for commands that leave nothing half-done.
pub async fn on_signal(work: impl Future<Output = Result<Summary, Failure>>) -> Result<Summary, Failure> {
    let watch = |kind| signal(kind).map_err(|error| Failure::Transient(format!("cannot watch signals: {error}")));
    let (mut interrupt, mut terminate) = (watch(SignalKind::interrupt())?, watch(SignalKind::terminate())?);
    let code = tokio::select! {
        result = work => return result,
        _ = interrupt.recv() => 130,
        _ = terminate.recv() => 143,
    };
    Err(Failure::Ended { code, message: "stopped by a signal".to_owned() })
}
