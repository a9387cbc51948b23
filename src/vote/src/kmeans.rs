//! k-means by Lloyd's iterations, seeded by k-means++ on a sample.
//!
//! The distance of all rows to all centroids is a matrix product, which is where the time goes; each block of rows is
//! multiplied and searched by one thread while it is in its cache. Everything is a function of the data and a public
//! seed: the number of threads does not matter.

use pulp::Arch;
use rand_chacha::ChaCha8Rng;
use rand_core::{RngCore, SeedableRng};
use rayon::prelude::*;

use crate::matrix::{BLOCK, BlockProducts, Matrix, squared_distance, squared_norm};

/// How to cluster; public.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Number of clusters, K: from 1 to the number of rows.
    pub clusters: usize,
    /// Lloyd iterations at most, at least 1; fewer when nothing changes any more.
    pub iterations: usize,
    /// How often to start anew, at least 1; the smallest inertia wins.
    pub restarts: usize,
    /// Rows to find centroids from, chosen by the seed; `None` for all.
    pub subsample: Option<usize>,
    /// Seed of public randomness.
    pub seed: u64,
}

/// Which centroid each row is nearest to.
#[derive(Clone, Debug, PartialEq)]
pub struct Assignment {
    /// Index of the nearest centroid.
    pub bins: Vec<u32>,
    /// Its squared distance.
    pub squared_distances: Vec<f32>,
}

impl Assignment {
    /// Sum of squared distances: what k-means makes small.
    pub fn inertia(&self) -> f64 {
        self.squared_distances.iter().map(|&distance| f64::from(distance)).sum()
    }

    /// Rows of each bin.
    pub fn counts(&self, bins: usize) -> Vec<u64> {
        let mut counts = vec![0; bins];
        self.bins.iter().for_each(|&bin| counts[bin as usize] += 1);
        counts
    }
}

/// Centroids, and how good they are on the rows that they were found from.
#[derive(Clone, Debug, PartialEq)]
pub struct Clustering {
    /// One row for each cluster.
    pub centroids: Matrix,
    /// Sum of squared distances of the rows to the centroids before their last move, which only made it smaller: one
    /// more pass over the rows for the last digits would cost as much as an iteration.
    pub inertia: f64,
    /// Iterations that were run, in the restart that won.
    pub iterations: usize,
}

/// Finds centroids.
pub fn fit(data: &Matrix, plan: &Plan) -> Clustering {
    let sampled = plan.subsample.filter(|&sample| sample < data.rows()).map(|sample| {
        let mut rows = sample_rows(data.rows(), sample.max(plan.clusters), stream(plan.seed, u64::MAX));
        rows.sort_unstable();
        data.gather(&rows)
    });
    let data = sampled.as_ref().unwrap_or(data);
    let runs = (0..plan.restarts.max(1)).map(|restart| run(data, plan, restart as u64));
    runs.min_by(|a, b| a.inertia.total_cmp(&b.inertia)).unwrap_or(Clustering {
        centroids: Matrix::new(data.columns()),
        inertia: 0.0,
        iterations: 0,
    })
}

fn run(data: &Matrix, plan: &Plan, restart: u64) -> Clustering {
    let mut centroids = initial(data, plan.clusters, stream(plan.seed, restart));
    let mut clustering = Clustering { centroids: Matrix::new(data.columns()), inertia: f64::INFINITY, iterations: 0 };
    let mut earlier = Vec::new();
    while clustering.iterations < plan.iterations.max(1) {
        let mut assignment = assign(data, &centroids);
        clustering.inertia = assignment.inertia();
        if assignment.bins == earlier {
            break;
        }
        clustering.iterations += 1;
        earlier.clone_from(&assignment.bins);
        fill_empty(&mut assignment, plan.clusters);
        update(data, &assignment.bins, &mut centroids);
    }
    Clustering { centroids, ..clustering }
}

/// Nearest centroid of each row; the first of several that are equally near.
pub fn assign(data: &Matrix, centroids: &Matrix) -> Assignment {
    let (columns, bins) = (centroids.columns(), centroids.rows());
    let half_norms: Vec<f32> = (0..bins).map(|bin| 0.5 * squared_norm(centroids.row(bin))).collect();
    let mut nearest = vec![0_u32; data.rows()];
    let mut squared_distances = vec![0.0_f32; data.rows()];
    let arch = Arch::new();
    nearest
        .par_chunks_mut(BLOCK)
        .zip(squared_distances.par_chunks_mut(BLOCK))
        .zip(data.values().par_chunks(BLOCK * columns.max(1)))
        .for_each_init(
            || BlockProducts::new(columns, bins),
            |products, ((nearest, distances), rows)| {
                let products = products.of(rows, centroids);
                arch.dispatch(
                    #[inline(always)]
                    || nearest_of_block(products, &half_norms, nearest),
                );
                for ((row, &bin), distance) in rows.chunks_exact(columns).zip(&*nearest).zip(distances) {
                    // From the difference, not from the product: the latter loses what matters to a near centroid.
                    *distance = squared_distance(arch, row, centroids.row(bin as usize));
                }
            },
        );
    Assignment { bins: nearest, squared_distances }
}

/// [`nearest_of`] for each row of `products`.
#[inline(always)]
fn nearest_of_block(products: &mut [f32], half_norms: &[f32], nearest: &mut [u32]) {
    for (products, nearest) in products.chunks_exact_mut(half_norms.len()).zip(nearest) {
        products.iter_mut().zip(half_norms).for_each(|(product, norm)| *product -= norm);
        *nearest = nearest_of(products);
    }
}

/// The first bin of largest `x·c − ½‖c‖²`, which is that of smallest `‖x − c‖²`.
#[inline(always)]
fn nearest_of(scores: &[f32]) -> u32 {
    const LANES: usize = 64;
    let (chunks, rest) = scores.as_chunks::<LANES>();
    let mut best = [f32::NEG_INFINITY; LANES];
    for chunk in chunks {
        best.iter_mut().zip(chunk).for_each(|(best, &score)| *best = if score > *best { score } else { *best });
    }
    let best = best.iter().chain(rest).fold(f32::NEG_INFINITY, |best, &score| if score > best { score } else { best });
    // Most chunks hold no such score, and are passed over sixteen or more at a time.
    let holds = |chunk: &[f32; LANES]| chunk.iter().fold(false, |found, &score| found | (score == best));
    let passed = chunks.iter().position(holds).unwrap_or(chunks.len()) * LANES;
    let index = scores[passed..].iter().position(|&score| score == best).unwrap_or(0);
    // Scores that are no numbers equal nothing: the first bin, as good as any.
    if passed + index < scores.len() { (passed + index) as u32 } else { 0 }
}

/// Gives each empty cluster the row that is farthest from its own centroid, taken from a cluster that keeps others.
fn fill_empty(assignment: &mut Assignment, clusters: usize) {
    let mut counts = assignment.counts(clusters);
    let empty: Vec<usize> = (0..clusters).filter(|&bin| counts[bin] == 0).collect();
    if empty.is_empty() {
        return;
    }
    let mut farthest: Vec<usize> = (0..assignment.bins.len()).collect();
    let distance = |row: usize| assignment.squared_distances[row];
    farthest.sort_by(|&a, &b| distance(b).total_cmp(&distance(a)).then(a.cmp(&b)));
    let mut rows = farthest.into_iter();
    for bin in empty {
        let donor = rows.find(|&row| counts[assignment.bins[row] as usize] > 1);
        if let Some(row) = donor {
            counts[assignment.bins[row] as usize] -= 1;
            counts[bin] = 1;
            assignment.bins[row] = bin as u32;
        }
    }
}

/// Moves each centroid to the mean of its rows; one without rows stays.
fn update(data: &Matrix, bins: &[u32], centroids: &mut Matrix) {
    let clusters = centroids.rows();
    let columns = centroids.columns();
    // Rows by bin, by counting: each centroid then sums its own rows, in their order, on one thread.
    let mut starts = vec![0_usize; clusters + 1];
    bins.iter().for_each(|&bin| starts[bin as usize + 1] += 1);
    (0..clusters).for_each(|bin| starts[bin + 1] += starts[bin]);
    let mut next = starts.clone();
    let mut members = vec![0_usize; bins.len()];
    for (row, &bin) in bins.iter().enumerate() {
        members[next[bin as usize]] = row;
        next[bin as usize] += 1;
    }
    centroids.values_mut().par_chunks_mut(columns).enumerate().for_each_init(
        || vec![0.0_f64; columns],
        |sum, (bin, centroid)| {
            let members = &members[starts[bin]..starts[bin + 1]];
            if members.is_empty() {
                return;
            }
            sum.fill(0.0);
            for &row in members {
                sum.iter_mut().zip(data.row(row)).for_each(|(sum, &value)| *sum += f64::from(value));
            }
            let scale = 1.0 / members.len() as f64;
            centroid.iter_mut().zip(&*sum).for_each(|(value, sum)| *value = (sum * scale) as f32);
        },
    );
}

/// Rows that k-means++ looks at, for each cluster: enough to see every cluster, few enough for K passes over them.
const SEEDING_ROWS: usize = 4;

/// k-means++ (Arthur and Vassilvitskii 2007) on a sample: each centroid is a row, drawn with probability proportional
/// to its squared distance from those drawn before.
fn initial(data: &Matrix, clusters: usize, mut random: ChaCha8Rng) -> Matrix {
    let sample = (clusters * SEEDING_ROWS).max(1024).min(data.rows());
    let data = data.gather(&sample_rows(data.rows(), sample, random.clone()));
    random.set_stream(random.get_stream() ^ (1 << 63));
    let mut centroids = Matrix::new(data.columns());
    let mut distances = vec![f32::INFINITY; data.rows()];
    let mut chosen = below(&mut random, data.rows());
    let arch = Arch::new();
    for _ in 0..clusters {
        let centroid = data.row(chosen).to_vec();
        centroids.extend(&centroid);
        distances.par_iter_mut().with_min_len(512).enumerate().for_each(|(row, distance)| {
            *distance = distance.min(squared_distance(arch, data.row(row), &centroid));
        });
        // The row itself, exactly: rounding must not let it be drawn again.
        distances[chosen] = 0.0;
        chosen = draw(&distances, &mut random);
    }
    centroids
}

/// An index, with probability proportional to its weight; any when all weights are 0.
fn draw(weights: &[f32], random: &mut ChaCha8Rng) -> usize {
    let total: f64 = weights.iter().map(|&weight| f64::from(weight)).sum();
    if total <= 0.0 {
        return below(random, weights.len());
    }
    let mut left = unit_interval(random) * total;
    let passed = |&weight: &f32| {
        left -= f64::from(weight);
        left < 0.0
    };
    let last = weights.iter().rposition(|&weight| weight > 0.0).unwrap_or(0);
    weights.iter().position(passed).unwrap_or(last)
}

/// `sample` different rows of `rows`, by a partial Fisher-Yates shuffle.
fn sample_rows(rows: usize, sample: usize, mut random: ChaCha8Rng) -> Vec<usize> {
    let mut all: Vec<usize> = (0..rows).collect();
    let sample = sample.min(rows);
    for index in 0..sample {
        all.swap(index, index + below(&mut random, rows - index));
    }
    all.truncate(sample);
    all
}

/// The stream of public randomness of one restart.
fn stream(seed: u64, restart: u64) -> ChaCha8Rng {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    random.set_stream(restart & !(1 << 63));
    random
}

fn unit_interval(random: &mut ChaCha8Rng) -> f64 {
    (random.next_u64() >> 11) as f64 / (1_u64 << 53) as f64
}

/// An index below `bound`; the bias of the multiplication is below 2⁻³² for any number of rows that fits in memory.
fn below(random: &mut ChaCha8Rng, bound: usize) -> usize {
    ((u128::from(random.next_u64()) * bound as u128) >> 64) as usize
}

#[cfg(test)]
#[path = "kmeans_tests.rs"]
mod tests;
