//! The private comparison: how far each set of texts is from real test records, over the bins.
//!
//! PRIVACY: computed from test records without a mechanism, so it goes to the private root and nowhere else. Its bins
//! are those of the vote; test units did not vote.

use std::sync::Arc;

use arrow::array::{ArrayRef, Float64Array, Int32Array, Int64Array, StringArray};
use lake::{PrivateRoot, Zone, schema};

use crate::error::VoteError;
use crate::publish::Chunks;

/// Shares of a set over the bins; all zero for an empty set.
pub fn shares(counts: &[u64]) -> Vec<f64> {
    let total: u64 = counts.iter().sum();
    counts.iter().map(|&count| if total == 0 { 0.0 } else { count as f64 / total as f64 }).collect()
}

/// Half of the sum of absolute differences: the largest difference in the probability of any set of bins.
pub fn total_variation(one: &[f64], other: &[f64]) -> f64 {
    0.5 * one.iter().zip(other).map(|(a, b)| (a - b).abs()).sum::<f64>()
}

/// Writes `comparison` and `comparison_bins` of `run`: `sets` by name, against `test`, as counts by bin.
pub async fn write(root: &PrivateRoot, run: &str, test: &[u64], sets: &[(&str, Vec<u64>)]) -> Result<(), VoteError> {
    let open = |name: &str, schema| {
        Chunks::open(root.table(&format!("runs/{run}/{name}")), format!("{run}/vote/{name}"), schema)
    };
    let distance = |counts: &[u64]| total_variation(&shares(test), &shares(counts));
    let columns: Vec<ArrayRef> = vec![
        Arc::new(StringArray::from_iter_values(sets.iter().map(|(name, _)| name))),
        Arc::new(Float64Array::from_iter_values(sets.iter().map(|(_, counts)| distance(counts)))),
    ];
    open("comparison", schema::comparison()).await?.write(columns).await?;

    let all = std::iter::once(("test", test)).chain(sets.iter().map(|(name, counts)| (*name, counts.as_slice())));
    let (mut bins, mut names, mut all_counts, mut all_shares) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for (name, counts) in all {
        bins.extend(0..counts.len() as i32);
        names.extend(counts.iter().map(|_| name));
        all_counts.extend(counts.iter().map(|&count| count as i64));
        all_shares.extend(shares(counts));
    }
    let columns: Vec<ArrayRef> = vec![
        Arc::new(Int32Array::from(bins)),
        Arc::new(StringArray::from(names)),
        Arc::new(Int64Array::from(all_counts)),
        Arc::new(Float64Array::from(all_shares)),
    ];
    open("comparison_bins", schema::comparison_bins()).await?.write(columns).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn total_variation_is_zero_for_the_same_and_one_for_disjoint() {
        let (a, b) = (shares(&[2, 2, 0]), shares(&[0, 0, 5]));
        assert_eq!(total_variation(&a, &a), 0.0);
        assert_eq!(total_variation(&a, &b), 1.0);
        assert_eq!(total_variation(&a, &shares(&[4, 0, 0])), 0.5);
        assert_eq!(shares(&[0, 0]), [0.0, 0.0]);
    }
}
