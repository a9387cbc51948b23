//! The private comparison: how far each set of texts is from real test records, over the bins.
//!
//! PRIVACY: computed from test records without a mechanism, so it goes to the private root and nowhere else. Its bins
//! are those of the vote; test units did not vote.

use std::sync::Arc;

use arrow::array::{ArrayRef, Float64Array, Int32Array, Int64Array, StringArray};
use lake::{PrivateRoot, Zone, layout, schema};

use crate::error::VoteError;
use crate::publish::Chunks;

/// Shares of a set over the bins; `None` for an empty set, which has none and so no distance from another.
pub fn shares(counts: &[u64]) -> Option<Vec<f64>> {
    let total: u64 = counts.iter().sum();
    (total > 0).then(|| counts.iter().map(|&count| count as f64 / total as f64).collect())
}

/// Half of the sum of absolute differences: the largest difference in the probability of any set of bins.
pub fn total_variation(one: &[f64], other: &[f64]) -> f64 {
    0.5 * one.iter().zip(other).map(|(a, b)| (a - b).abs()).sum::<f64>()
}

/// Writes `comparison` and `comparison_bins` of `run`: `sets` by name, against `test`, as counts by bin. Where either
/// side is empty there is nothing to compare, and no row.
pub async fn write(root: &PrivateRoot, run: &str, test: &[u64], sets: &[(&str, Vec<u64>)]) -> Result<(), VoteError> {
    let open =
        |name: &str, schema| Chunks::open(root.table(&layout::of_run(run, name)), format!("{run}/vote/{name}"), schema);
    let distance = |counts: &[u64]| Some(total_variation(&shares(test)?, &shares(counts)?));
    let distances = sets.iter().filter_map(|(name, counts)| Some((*name, distance(counts)?)));
    let (names, distances): (Vec<&str>, Vec<f64>) = distances.unzip();
    let columns: Vec<ArrayRef> = vec![Arc::new(StringArray::from(names)), Arc::new(Float64Array::from(distances))];
    open(layout::COMPARISON, schema::comparison()).await?.write(columns).await?;

    let all = std::iter::once(("test", test)).chain(sets.iter().map(|(name, counts)| (*name, counts.as_slice())));
    let (mut bins, mut names, mut all_counts, mut all_shares) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for (name, counts) in all {
        let Some(shares) = shares(counts) else { continue };
        bins.extend(0..counts.len() as i32);
        names.extend(counts.iter().map(|_| name));
        all_counts.extend(counts.iter().map(|&count| count as i64));
        all_shares.extend(shares);
    }
    let columns: Vec<ArrayRef> = vec![
        Arc::new(Int32Array::from(bins)),
        Arc::new(StringArray::from(names)),
        Arc::new(Int64Array::from(all_counts)),
        Arc::new(Float64Array::from(all_shares)),
    ];
    open(layout::COMPARISON_BINS, schema::comparison_bins()).await?.write(columns).await
}

#[cfg(test)]
mod tests {
    use arrow::array::AsArray;
    use lake::StorageOptions;

    use super::*;

    #[test]
    fn total_variation_is_zero_for_the_same_and_one_for_disjoint() {
        let [a, b, c] = [[2, 2, 0], [0, 0, 5], [4, 0, 0]].map(|counts| shares(&counts).expect("a set"));
        assert_eq!(total_variation(&a, &a), 0.0);
        assert_eq!(total_variation(&a, &b), 1.0);
        assert_eq!(total_variation(&a, &c), 0.5);
        assert_eq!(shares(&[0, 0]), None);
    }

    #[tokio::test]
    async fn where_a_side_is_empty_there_is_no_row() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let place = folder.path().display().to_string();
        let root = PrivateRoot::open(&place, &StorageOptions::default()).await.expect("a root");
        let sets = [("synthetic", vec![3, 1]), ("selected", vec![0, 0])];

        write(&root, "some", &[1, 1], &sets).await.expect("tables");
        assert_eq!(names(&root, "runs/some/comparison").await, ["synthetic"]);
        assert_eq!(names(&root, "runs/some/comparison_bins").await, ["test", "test", "synthetic", "synthetic"]);

        write(&root, "untested", &[0, 0], &sets).await.expect("tables");
        assert!(names(&root, "runs/untested/comparison").await.is_empty());
        assert_eq!(names(&root, "runs/untested/comparison_bins").await, ["synthetic", "synthetic"]);
    }

    /// The sets that the rows of a table name; the table must be there.
    async fn names(root: &PrivateRoot, path: &str) -> Vec<String> {
        let table = root.table(path);
        let batches = table.read(table.pin().await.expect("a table"), &["set"]).await.expect("rows");
        let sets = batches.iter().flat_map(|batch| batch.column(0).as_string::<i32>().iter().flatten());
        sets.map(str::to_owned).collect()
    }
}
