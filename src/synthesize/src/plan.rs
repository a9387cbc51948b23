//! Which samples a shard draws, with which seeds, and in which chunks it commits them.
//!
//! Samples are numbered from 0 to count - 1 over the whole run, and a sample's seed follows from the run's public seed
//! and its number alone. So the union over the shards is the same set for any number of shards.

use std::collections::BTreeMap;
use std::ops::Range;

use stage::Shard;

/// Samples of one commit: large enough that a million samples make few files, small enough to lose little when killed.
pub const CHUNK_ROWS: u64 = 256;

/// The numbers of the samples that `shard` draws of `count`: shards are runs of numbers whose lengths differ by one at
/// most.
pub fn range(count: u64, shard: Shard) -> Range<u64> {
    let at = |index: u32| (u128::from(count) * u128::from(index) / u128::from(shard.count)) as u64;
    at(shard.index)..at(shard.index + 1)
}

/// Seed of sample `index`, at most 63 bits, since the column is a signed integer.
pub fn seed(run_seed: u64, index: u64) -> u64 {
    let mut hasher = blake3::Hasher::new_derive_key("doppel 2026 synthesize: seed of a sample");
    let hash = hasher.update(&run_seed.to_le_bytes()).update(&index.to_le_bytes()).finalize();
    let bytes: [u8; 8] = std::array::from_fn(|at| hash.as_bytes()[at]);
    u64::from_le_bytes(bytes) >> 1
}

/// Chunks of a range of numbers: collects what is drawn, in any order, and gives out whole chunks in theirs.
///
/// Chunks are cut by number, not by who finished first, so that a chunk has the same rows at every attempt.
#[derive(Debug)]
pub struct Chunks<T> {
    range: Range<u64>,
    next: u64,
    waiting: BTreeMap<u64, T>,
}

impl<T> Chunks<T> {
    /// Chunks of `range`, of which those up to `committed` are there already.
    pub fn new(range: Range<u64>, committed: Option<i64>) -> Self {
        let next = committed.map_or(0, |chunk| u64::try_from(chunk + 1).unwrap_or_default());
        Self { range, next, waiting: BTreeMap::new() }
    }

    /// Numbers that are still to be drawn.
    pub fn remaining(&self) -> Range<u64> {
        self.bounds(self.next).start..self.range.end
    }

    /// Takes in sample `index`.
    pub fn add(&mut self, index: u64, sample: T) {
        self.waiting.insert(index, sample);
    }

    /// The next chunk with its number, once all of it is there.
    pub fn take(&mut self) -> Option<(i64, Vec<(u64, T)>)> {
        let bounds = self.bounds(self.next);
        if bounds.is_empty() || self.waiting.range(bounds.clone()).count() as u64 != bounds.end - bounds.start {
            return None;
        }
        let later = self.waiting.split_off(&bounds.end);
        let chunk = std::mem::replace(&mut self.waiting, later).into_iter().collect();
        self.next += 1;
        Some((self.next as i64 - 1, chunk))
    }

    /// Whether all chunks were taken.
    pub fn is_done(&self) -> bool {
        self.remaining().is_empty()
    }

    fn bounds(&self, chunk: u64) -> Range<u64> {
        let at = |chunk: u64| chunk.saturating_mul(CHUNK_ROWS).saturating_add(self.range.start).min(self.range.end);
        at(chunk)..at(chunk.saturating_add(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_number_of_shards_draws_each_sample_once() {
        for (count, shards) in [(1, 1), (10, 3), (1000, 7), (5, 5), (1 << 40, 32)] {
            let ranges: Vec<_> = (0..shards).map(|index| range(count, Shard { index, count: shards })).collect();
            assert_eq!((ranges[0].start, ranges[ranges.len() - 1].end), (0, count));
            assert!(ranges.windows(2).all(|pair| pair[0].end == pair[1].start));
            let lengths: Vec<u64> = ranges.iter().map(|range| range.end - range.start).collect();
            assert!(lengths.iter().max().unwrap() - lengths.iter().min().unwrap() <= 1);
        }
    }

    #[test]
    fn seeds_differ_by_number_and_by_run_and_fit_the_column() {
        let seeds: std::collections::BTreeSet<u64> =
            (0..4).flat_map(|run| (0..1000).map(move |index| seed(run, index))).collect();
        assert_eq!(seeds.len(), 4000);
        assert!(seeds.iter().all(|seed| i64::try_from(*seed).is_ok()));
        // Written down once: a change would make a finished run's samples impossible to draw again.
        assert_eq!(seed(0, 0), 3_065_181_330_458_289_175);
    }

    #[test]
    fn chunks_come_whole_and_in_order_however_samples_finish() {
        let mut chunks = Chunks::new(100..100 + 2 * CHUNK_ROWS + 10, None);
        let mut numbers: Vec<u64> = chunks.remaining().collect();
        numbers.reverse();
        let mut taken = Vec::new();
        for number in numbers {
            chunks.add(number, ());
            while let Some((chunk, rows)) = chunks.take() {
                taken.push((chunk, rows.len() as u64, rows[0].0));
            }
        }
        assert!(chunks.is_done());
        assert_eq!(taken, [(0, CHUNK_ROWS, 100), (1, CHUNK_ROWS, 100 + CHUNK_ROWS), (2, 10, 100 + 2 * CHUNK_ROWS)]);
    }

    #[test]
    fn a_killed_shard_goes_on_behind_its_last_chunk() {
        let resumed = Chunks::<()>::new(0..1000, Some(1));
        assert_eq!(resumed.remaining(), 2 * CHUNK_ROWS..1000);
        assert!(Chunks::<()>::new(0..1000, Some(3)).is_done());
        assert!(!Chunks::<()>::new(0..1000, Some(2)).is_done());
    }
}
