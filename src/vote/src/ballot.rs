//! The private step of Algorithm 2: units vote for bins, and only the noised counts leave.

use arrow::array::Array;
use lake::{Private, Table};
use privacy::histogram::VotingMechanism;
use privacy::keyed::{Context, NoiseKey};
use privacy::training::Noised;

use crate::embeddings::{Whose, for_each_chunk};
use crate::error::VoteError;
use crate::space::Space;

/// Noised votes of the train split over the bins of `space`.
///
/// PRIVACY: `space` comes from public embeddings alone; each unit has one vote, so its vote vector has L2 norm ≤ 1;
/// the caller has reserved `mechanism.event()`. Exact votes live in this function and in the mechanism only.
pub async fn hold(
    mechanism: &VotingMechanism,
    key: &NoiseKey,
    context: &Context,
    space: &Space,
    embeddings: &Table,
    version: i64,
) -> Result<Noised<Vec<i64>>, VoteError> {
    let votes = votes(space, embeddings, version, "train").await?;
    Ok(mechanism.release(key, context, space.bins(), votes.expose()))
}

/// `(unit, bin)` of each record of `split`. A void vector votes for the bin after the last, which does not exist: so
/// its unit keeps a vote that counts for nothing.
pub async fn votes(
    space: &Space,
    embeddings: &Table,
    version: i64,
    split: &str,
) -> Result<Private<Vec<(String, usize)>>, VoteError> {
    let mut votes = Vec::new();
    let whose = Whose::Private(space.pca.input_columns());
    for_each_chunk(embeddings, version, &["unit", "split"], whose, |chunk| {
        let [units, splits] = &chunk.columns[..] else {
            return Err(VoteError::Bug("a scan of two columns gave another number"));
        };
        let rows: Vec<usize> = (0..splits.len()).filter(|&row| splits.value(row) == split).collect();
        let assignment = space.assign(&chunk.vectors.gather(&rows));
        votes.extend(rows.iter().zip(&assignment.bins).map(|(&row, &bin)| {
            let bin = if chunk.void[row] { space.bins() } else { bin as usize };
            (units.value(row).to_owned(), bin)
        }));
        Ok(())
    })
    .await?;
    Ok(Private::new(votes))
}
