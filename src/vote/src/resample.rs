//! Algorithm 2 after the noise: how many rows of each bin to take, and which. Post-processing of public numbers.

use crate::error::VoteError;

/// How many rows each bin gives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Allocation {
    /// Rows to take of each bin, never more than it has.
    pub selected: Vec<u64>,
    /// Bins that were asked for more rows than they have.
    pub ran_out: Vec<usize>,
    /// Rows asked of those bins beyond what they have.
    pub shortfall: u64,
}

/// Shares `target` rows among bins in proportion to their noisy counts, negatives counting as zero.
///
/// Where a bin has fewer rows than its share it gives all, and the rest goes to the other bins in proportion; the
/// paper's code leaves such a set smaller than asked for. Fractions are settled by largest remainder, so the sum is
/// `target` unless all bins with a positive count are empty before.
pub fn allocate(target: u64, noisy: &[i64], supply: &[u64]) -> Allocation {
    let weights: Vec<u128> = noisy.iter().map(|&count| u128::from(count.max(0).unsigned_abs())).collect();
    let asked = shares(u128::from(target), &weights);
    let ran_out: Vec<usize> = (0..weights.len()).filter(|&bin| asked[bin] > u128::from(supply[bin])).collect();
    let shortfall: u128 = ran_out.iter().map(|&bin| asked[bin] - u128::from(supply[bin])).sum();
    let mut selected = vec![0_u128; weights.len()];
    let mut open = weights.clone();
    let mut left = u128::from(target);
    loop {
        let share = shares(left, &open);
        let full: Vec<usize> =
            (0..open.len()).filter(|&bin| open[bin] > 0 && share[bin] >= u128::from(supply[bin])).collect();
        if full.is_empty() {
            selected.iter_mut().zip(&share).for_each(|(selected, share)| *selected += share);
            break;
        }
        for bin in full {
            selected[bin] = u128::from(supply[bin]);
            left -= selected[bin];
            open[bin] = 0;
        }
    }
    let narrow = |count: u128| u64::try_from(count).unwrap_or(u64::MAX);
    Allocation { selected: selected.into_iter().map(narrow).collect(), ran_out, shortfall: narrow(shortfall) }
}

/// Whole shares of `total` in proportion to `weights`, by largest remainder; of equal ones the first bin gains.
fn shares(total: u128, weights: &[u128]) -> Vec<u128> {
    let sum: u128 = weights.iter().sum();
    if sum == 0 {
        return vec![0; weights.len()];
    }
    let mut shares: Vec<u128> = weights.iter().map(|weight| total * weight / sum).collect();
    let left = total - shares.iter().sum::<u128>();
    let mut order: Vec<usize> = (0..weights.len()).collect();
    order.sort_by_key(|&bin| (std::cmp::Reverse(total * weights[bin] % sum), bin));
    order.iter().take(usize::try_from(left).unwrap_or(0)).for_each(|&bin| shares[bin] += 1);
    shares
}

/// Which rows are taken: in each bin those whose id hashes lowest under the public seed, so that the order of rows
/// does not matter. `true` at the index of each row that is.
pub fn choose(ids: &[String], bins: &[u32], selected: &[u64], seed: u64) -> Result<Vec<bool>, VoteError> {
    let key = blake3::derive_key("doppel vote resample v1", &seed.to_le_bytes());
    let mut ranked: Vec<(u32, [u8; 32], usize)> = ids
        .iter()
        .zip(bins)
        .enumerate()
        .map(|(row, (id, &bin))| (bin, *blake3::keyed_hash(&key, id.as_bytes()).as_bytes(), row))
        .collect();
    ranked.sort_unstable();
    let mut left = selected.to_vec();
    let mut taken = vec![false; ids.len()];
    for (bin, _, row) in ranked {
        let left = left.get_mut(bin as usize).ok_or(VoteError::Bug("a row in a bin that does not exist"))?;
        if *left > 0 {
            *left -= 1;
            taken[row] = true;
        }
    }
    if left.iter().any(|&left| left > 0) {
        return Err(VoteError::Bug("a bin was asked for more rows than it has"));
    }
    Ok(taken)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn rows_follow_the_noisy_counts() {
        let allocation = allocate(10, &[30, -5, 10, 0, 10], &[100; 5]);
        assert_eq!(allocation, Allocation { selected: vec![6, 0, 2, 0, 2], ran_out: vec![], shortfall: 0 });
    }

    #[test]
    fn a_bin_that_runs_out_is_reported_and_the_others_fill_in() {
        let allocation = allocate(10, &[80, 10, 10], &[2, 50, 50]);
        assert_eq!(allocation, Allocation { selected: vec![2, 4, 4], ran_out: vec![0], shortfall: 6 });
    }

    #[test]
    fn all_bins_may_run_out() {
        let allocation = allocate(10, &[1, 1, -1], &[2, 3, 90]);
        assert_eq!(allocation.selected, [2, 3, 0]);
        assert_eq!(allocation.ran_out, [0, 1]);
        assert_eq!(allocate(10, &[-1, -2], &[5, 5]).selected, [0, 0]);
    }

    #[test]
    fn the_choice_does_not_depend_on_the_order_of_rows() {
        let ids: Vec<String> = (0..40).map(|id| format!("row-{id}")).collect();
        let bins: Vec<u32> = (0..40).map(|id| id % 3).collect();
        let chosen = |ids: &[String], bins: &[u32]| {
            let taken = choose(ids, bins, &[5, 0, 13], 7).expect("enough rows");
            let mut chosen: Vec<_> =
                ids.iter().zip(taken).filter(|(_, taken)| *taken).map(|(id, _)| id.clone()).collect();
            chosen.sort();
            chosen
        };
        let forward = chosen(&ids, &bins);
        assert_eq!(forward.len(), 18);
        let reverse = |v: &[String]| v.iter().rev().cloned().collect::<Vec<_>>();
        assert_eq!(forward, chosen(&reverse(&ids), &bins.iter().rev().copied().collect::<Vec<_>>()));
        assert!(choose(&ids, &bins, &[40, 0, 0], 7).is_err());
    }

    proptest! {
        #[test]
        fn allocation_respects_supply_and_meets_the_target_where_it_can(
            bins in prop::collection::vec((-20_i64..200, 0_u64..50), 1..30), target in 1_u64..600,
        ) {
            let (noisy, supply): (Vec<i64>, Vec<u64>) = bins.into_iter().unzip();
            let allocation = allocate(target, &noisy, &supply);
            let available: u64 = noisy.iter().zip(&supply).filter(|bin| *bin.0 > 0).map(|bin| bin.1).sum();
            prop_assert_eq!(allocation.selected.iter().sum::<u64>(), target.min(available));
            for bin in 0..noisy.len() {
                prop_assert!(allocation.selected[bin] <= supply[bin]);
                prop_assert!(noisy[bin] > 0 || allocation.selected[bin] == 0);
            }
            // Those that still have rows shared what was left in proportion: |selected - left · noisy / votes| < 1.
            let selected = |bin: usize| allocation.selected[bin] as i64;
            let open: Vec<usize> =
                (0..noisy.len()).filter(|&bin| noisy[bin] > 0 && allocation.selected[bin] < supply[bin]).collect();
            let left: i64 = open.iter().map(|&bin| selected(bin)).sum();
            let votes: i64 = open.iter().map(|&bin| noisy[bin]).sum();
            for bin in open {
                prop_assert!((selected(bin) * votes - left * noisy[bin]).abs() < votes);
            }
        }
    }
}
