//! Rate of clustering: `cargo bench -p doppel-vote --bench speed -- cluster 180000 256 1000` for rows, columns, clusters.
//!
//! Random vectors, twenty Lloyd iterations, no subsample: the same work as `cluster` of `tests/bench/peers.py`. Prints one
//! JSON line.
#![allow(clippy::print_stdout)]

use std::error::Error;
use std::time::Instant;

use doppel_vote::kmeans::{self, Plan};
use doppel_vote::matrix::Matrix;
use rand_chacha::ChaCha8Rng;
use rand_core::{RngCore, SeedableRng};

const ITERATIONS: usize = 20;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with("--")).collect();
    if arguments.first().map(String::as_str) != Some("cluster") {
        // `cargo test --benches` runs this without arguments: that it starts is all that it checks.
        return Ok(());
    }
    let number = |index: usize, default: usize| arguments.get(index).map_or(Ok(default), |text| text.parse());
    let (count, dimension, clusters) = (number(1, 180_000)?, number(2, 256)?, number(3, 1000)?);
    let rows = random(count, dimension);
    let plan = Plan { clusters, iterations: ITERATIONS, restarts: 1, subsample: None, seed: 1 };
    let clock = Instant::now();
    let found = kmeans::fit(&rows, &plan);
    let rate = (found.iterations * count) as f64 / clock.elapsed().as_secs_f64();
    println!(
        "{{\"name\": \"cluster\", \"rate\": {rate:.0}, \"unit\": \"rows/s\", \"iterations\": {}}}",
        found.iterations
    );
    Ok(())
}

/// Rows of independent standard normal values, about: sums of twelve uniforms.
fn random(count: usize, dimension: usize) -> Matrix {
    let mut stream = ChaCha8Rng::seed_from_u64(0);
    let mut uniform = || stream.next_u32() as f32 / u32::MAX as f32 - 0.5;
    let mut rows = Matrix::new(dimension);
    for _ in 0..count {
        let row: Vec<f32> = (0..dimension).map(|_| (0..12).map(|_| uniform()).sum()).collect();
        rows.extend(&row);
    }
    rows
}
