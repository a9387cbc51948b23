//! Rates of clustering and of the whole vote: `cargo bench -p doppel-vote --bench speed -- cluster 180000 256 1000`.
//!
//! `cluster` is k-means alone: twenty Lloyd iterations, no subsample. `vote` reduces the columns to 90 % of the variance
//! first, and assigns every row at the end, as voting does. Rows are random, those of `vote` with a spectrum that falls as
//! that of embeddings; the same work as `tests/bench/peers.py` does. Prints one JSON line; `flops` are the floating-point
//! operations of the distances and the covariance, for each row.
#![allow(clippy::print_stdout)]

use std::error::Error;
use std::time::Instant;

use doppel_vote::kmeans::{self, Plan};
use doppel_vote::matrix::Matrix;
use doppel_vote::pca::Covariance;
use rand_chacha::ChaCha8Rng;
use rand_core::{RngCore, SeedableRng};

const ITERATIONS: usize = 20;
const VARIANCE: f64 = 0.9;
/// The variance of column i falls as a power of i.
const FALL: f32 = -1.2;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with("--")).collect();
    let number = |index: usize, default: usize| arguments.get(index).map_or(Ok(default), |text| text.parse());
    let (count, columns, clusters) = (number(1, 180_000)?, number(2, 256)?, number(3, 1000)?);
    let plan = Plan { clusters, iterations: ITERATIONS, restarts: 1, subsample: None, seed: 1 };
    match arguments.first().map(String::as_str) {
        Some("cluster") => cluster(&random(count, &vec![1.0; columns]), &plan),
        Some("vote") => {
            let scales: Vec<f32> = (0..columns).map(|column| ((column + 1) as f32).powf(FALL / 2.0)).collect();
            vote(&random(count, &scales), &plan)?;
        }
        // `cargo test --benches` runs this without arguments: that it starts is all that it checks.
        _ => {}
    }
    Ok(())
}

fn cluster(rows: &Matrix, plan: &Plan) {
    let clock = Instant::now();
    let found = kmeans::fit(rows, plan);
    let flops = 2 * plan.clusters * rows.columns();
    report(rows.rows() * found.iterations, clock, flops as f64);
}

fn vote(rows: &Matrix, plan: &Plan) -> Result<(), Box<dyn Error>> {
    let clock = Instant::now();
    let mut covariance = Covariance::new(rows.columns());
    covariance.add(rows);
    let pca = covariance.components(VARIANCE)?;
    let reduced = pca.project(rows);
    let found = kmeans::fit(&reduced, plan);
    let votes = kmeans::assign(&reduced, &found.centroids).counts(plan.clusters);
    assert_eq!(votes.iter().sum::<u64>(), rows.rows() as u64);
    let products = rows.columns() * (rows.columns() + reduced.columns());
    let distances = (found.iterations + 1) * plan.clusters * reduced.columns();
    report(rows.rows(), clock, 2.0 * (products + distances) as f64);
    Ok(())
}

fn report(rows: usize, clock: Instant, flops: f64) {
    let rate = rows as f64 / clock.elapsed().as_secs_f64();
    println!("{{\"rate\": {rate:.0}, \"unit\": \"rows/s\", \"flops\": {flops}}}");
}

/// Rows of independent normal values, about: sums of twelve uniforms, each column with its standard deviation.
fn random(count: usize, deviations: &[f32]) -> Matrix {
    let mut stream = ChaCha8Rng::seed_from_u64(0);
    let mut normal = || (0..12).map(|_| stream.next_u32() as f32 / u32::MAX as f32 - 0.5).sum::<f32>();
    let mut rows = Matrix::new(deviations.len());
    for _ in 0..count {
        let row: Vec<f32> = deviations.iter().map(|deviation| deviation * normal()).collect();
        rows.extend(&row);
    }
    rows
}
