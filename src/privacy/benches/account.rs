//! ε by PLD at a fixed discretisation, ours against dp_accounting's on the same machine in the same run.
//!
//!     DP_ACCOUNTING_PYTHON=venv/bin/python cargo bench -p privacy --bench account
//!
//! The Python needs dp-accounting 0.6.0. One JSON line: seconds per answer (the median of several), both answers, so
//! that a reader sees that the work was equal, and the ratio. Without the variable, only our own times.

#![allow(clippy::print_stdout, reason = "a benchmark's output is its result")]

use std::process::Command;
use std::time::Instant;

use privacy::accounting::epsilon_at_interval;
use privacy::event::Event;

const INTERVAL: f64 = 1e-4;
const DELTA: f64 = 5e-7;
const PEER: &str = include_str!("account.py");

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
    let ours = seconds[seconds.len() / 2];
    let mut line = serde_json::json!({ "seconds": ours, "epsilon": epsilon, "interval": INTERVAL });
    if let Ok(python) = std::env::var("DP_ACCOUNTING_PYTHON") {
        let output = Command::new(python).args(["-c", PEER]).output()?;
        let peer: serde_json::Value = serde_json::from_slice(&output.stdout)?;
        line["ratio"] = (peer["seconds"].as_f64().unwrap_or(f64::NAN) / ours).into();
        line["dp_accounting"] = peer;
    }
    println!("{line}");
    Ok(())
}
