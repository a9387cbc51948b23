//! Which signals a process is to hear.

use tokio::signal::unix::SignalKind;

/// Whether this process was started with `kind` ignored, as `nohup` does with SIGHUP: then it is not to be listened to.
/// To be asked before anybody listens, which changes the answer.
pub fn is_ignored(kind: SignalKind) -> bool {
    // SAFETY: all zeros are a valid `sigaction`; without a new action, the call only fills in the present one.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        libc::sigaction(kind.as_raw_value(), std::ptr::null(), &raw mut action) == 0
            && action.sa_sigaction == libc::SIG_IGN
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_that_is_ignored_is_told_from_one_that_is_not() {
        // One that nothing else here waits for.
        let kind = SignalKind::user_defined2();
        assert!(!is_ignored(kind));
        // SAFETY: to ignore a signal runs no code of ours.
        unsafe { libc::signal(kind.as_raw_value(), libc::SIG_IGN) };
        assert!(is_ignored(kind));
    }
}
