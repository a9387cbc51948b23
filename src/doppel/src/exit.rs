//! How signals end the front.

use stage::{Failure, Summary};
use tokio::signal::unix::{Signal, SignalKind, signal};

/// Does `work` until a signal comes: for commands that leave nothing half-done.
pub async fn on_signal(work: impl Future<Output = Result<Summary, Failure>>) -> Result<Summary, Failure> {
    let mut signals = Signals::new()?;
    tokio::select! {
        result = work => return result,
        () = signals.received() => {}
    }
    Err(Failure::Ended { code: signals.code, message: "stopped by a signal".to_owned() })
}

/// SIGINT, SIGTERM and, unless it was ignored from the start, SIGHUP.
pub struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hang_up: Option<Signal>,
    /// Exit code for the first that came.
    pub code: u8,
}

impl Signals {
    /// Begins to listen.
    pub fn new() -> Result<Self, Failure> {
        let watch = |kind| signal(kind).map_err(|error| Failure::Transient(format!("cannot watch signals: {error}")));
        let hang_up =
            if stage::signals::is_ignored(SignalKind::hangup()) { None } else { Some(watch(SignalKind::hangup())?) };
        Ok(Self {
            interrupt: watch(SignalKind::interrupt())?,
            terminate: watch(SignalKind::terminate())?,
            hang_up,
            code: 0,
        })
    }

    /// Waits for the next one.
    pub async fn received(&mut self) {
        let code = tokio::select! {
            _ = self.interrupt.recv() => 130,
            _ = self.terminate.recv() => 143,
            Some(_) = heard(&mut self.hang_up) => 129,
        };
        if self.code == 0 {
            self.code = code;
        }
    }

    /// How a run ends that the first one stopped.
    pub fn stopped(&self) -> Failure {
        let message = "stopped by a signal\nhelp: the same command continues".to_owned();
        Failure::Ended { code: self.code, message }
    }
}

/// The next of a signal, if it is listened to.
async fn heard(signal: &mut Option<Signal>) -> Option<()> {
    signal.as_mut()?.recv().await
}
