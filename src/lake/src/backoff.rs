//! Waiting before another try.

use std::time::Duration;

use tokio::time::Instant;

/// Waits that grow, with jitter, so that writers that collided do not collide again.
#[derive(Default)]
pub(crate) struct Backoff {
    attempts: u32,
}

impl Backoff {
    /// Waits for longer each time, but not past the deadline.
    pub(crate) async fn sleep(&mut self, deadline: Instant) {
        let ceiling = Duration::from_millis(50 << self.attempts.min(6));
        self.attempts += 1;
        // A random UUID is at hand, and this needs no better source.
        let random = uuid::Uuid::new_v4().as_u64_pair().1 as u32;
        let wait = ceiling.mul_f64(0.2 + 0.8 * f64::from(random) / f64::from(u32::MAX));
        tokio::time::sleep_until(deadline.min(Instant::now() + wait)).await;
    }
}
