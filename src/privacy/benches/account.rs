//! Rate of accounting: ε by PLD at a fixed discretisation, of the event that `account` of `tests/bench/peers.py` takes.
//!
//! Prints one JSON line: answers per second (by the median of several), and the answer, so that a reader sees that the
//! work was equal.

#![allow(clippy::print_stdout, reason = "a benchmark's output is its result")]

use std::time::Instant;

use privacy::accounting::epsilon_at_interval;
use privacy::event::Event;

const INTERVAL: f64 = 1e-4;
const DELTA: f64 = 5e-7;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let events = [Event::PoissonSampledGaussian {
        sampling_probability: 4096.0 / 180_000.0,
        noise_multiplier: 1.1220,
        steps: 439,
    }];
    let mut seconds = Vec::new();
    let mut epsilon = 0.0;
    for _ in 0..21 {
        let start = Instant::now();
        epsilon = epsilon_at_interval(&events, DELTA, INTERVAL)?;
        seconds.push(start.elapsed().as_secs_f64());
    }
    seconds.sort_by(f64::total_cmp);
    let rate = 1.0 / seconds[seconds.len() / 2];
    println!("{}", serde_json::json!({ "rate": rate, "unit": "answers/s", "epsilon": epsilon }));
    Ok(())
}
